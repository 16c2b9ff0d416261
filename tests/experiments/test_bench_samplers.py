"""The study of samplers, tiny: resumed, with a run and without, and errors that are what they should be."""

import json

import numpy as np
import pytest

from experiments import config as configs
from experiments.bench import samplers
from experiments.run_dir import trained


def test_the_study_of_a_run_is_resumed_told_and_drawn(run, tmp_path):
    found, names, kept = samplers.opened(None, None, {}), ["euler", "dpmpp_2m_sde"], []
    samplers.mixture(found, names, [4, 16], 64, lambda result: kept.append(json.dumps(result)))
    samplers.mixture(found, names, [4, 16], 64, lambda result: pytest.fail("measured twice"))
    assert len(kept) == 8
    for rows in found["mixture"].values():
        assert rows["euler"]["16"]["error"] < rows["euler"]["4"]["error"]
        assert "flow" in rows["euler"]["4"] and "flow" not in rows["dpmpp_2m_sde"]["4"]
    samplers.digits(found, trained([run.workdir]), ["heun"], [4], 12, lambda result: None)
    assert {"distance", "ratio", "seconds", "non_finite"} <= set(found["digits"]["heun"]["4"])
    words = samplers.described(found)
    assert "mixture, even times: error" in words and "samples: seconds" in words
    samplers.plot(found | {"run": "smoke"}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_quantiles_of_the_mixture_have_its_moments():
    found = samplers.quantiles(20000)
    mean = (samplers.SHARES * samplers.MEANS).sum()
    second = (samplers.SHARES * (samplers.MEANS**2 + samplers.STDS**2)).sum()
    assert found.mean() == pytest.approx(mean, abs=1e-4) and np.square(found).mean() == pytest.approx(second, abs=1e-3)


def test_a_run_keeps_its_guidance_and_loses_what_the_sampler_does_not_use():
    given = configs.Sample(steps=9, sampler="ddim", eta=0.5, last=0.2, guidance=1.4, guidance_high=0.8)
    found = samplers.fields(given, samplers.METHODS["unipc 3"], 7)
    assert (found.sampler, found.order, found.steps, found.eta) == ("unipc", 3, 7, 0.0)
    assert (found.guidance, found.guidance_high, found.last) == (1.4, 0.8, 0.2)
    for method in samplers.METHODS.values():
        samplers.sampler(method, 5)


def test_results_of_other_sizes_are_not_mixed(tmp_path):
    path = str(tmp_path / "found.json")
    samplers.commands.write_json(path, samplers.opened(path, None, {"mixture_samples": 64}))
    assert samplers.opened(path, None, {"mixture_samples": 64})["mixture"] == {}
    with pytest.raises(ValueError, match="holds results of mixture_samples=64, not 32: pass another file"):
        samplers.opened(path, None, {"mixture_samples": 32})


def test_methods_and_evaluations_that_are_none_are_named():
    assert samplers.chosen([], ["5", "10"]) == (list(samplers.METHODS), [5, 10])
    with pytest.raises(ValueError, match=r"--evaluations=5,x must be numbers from 2 on"):
        samplers.chosen([], ["5", "x"])
    with pytest.raises(ValueError, match=r"--methods=dmp: the methods are euler; ddim"):
        samplers.chosen(["euler", "dmp"], ["5"])
