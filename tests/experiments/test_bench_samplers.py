"""The study of samplers, tiny: resumed, with a run and without, and errors that are what they should be."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import process
from diffusion.predict import Estimate
from experiments import config as configs
from experiments.bench import evaluations, samplers
from experiments.parts import DataSpec
from experiments.run_dir import Trained, trained


@pytest.mark.slow
def test_the_study_of_a_run_is_resumed_told_and_drawn(run, tmp_path):
    found, names, kept = samplers.opened(None, {}), ["euler", "dpmpp_2m_sde"], []
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
    run = Trained(configs.Config(sample=given), DataSpec((8, 8, 1)), None, 1)
    found = samplers.with_method(run, samplers.METHODS["unipc 3"], 7).config.sample
    assert (found.sampler, found.order, found.steps, found.eta) == ("unipc", 3, 7, 0.0)
    assert (found.guidance, found.guidance_high, found.last) == (1.4, 0.8, 0.2)
    run.config.sample = found
    found = samplers.with_method(run, samplers.METHODS["unipc 2"], 1).config.sample
    assert (found.order, found.steps, found.last) == (2, 1, None)
    for method in samplers.METHODS.values():
        samplers.sampler(method, 5)


@pytest.mark.slow
def test_a_step_of_heun_and_of_edm_takes_two_evaluations_but_the_last():
    """As counted in the samplers' own calls of a denoiser."""
    for method in samplers.METHODS.values():
        name, calls = method.fields["sampler"], []
        predict = lambda xt, t: calls.append(t) or Estimate(xt, xt, xt)  # noqa: B023, E731
        made, xt = samplers.sampler(method, 3), jnp.ones((1, 1, 1))
        memory = made.init(xt)
        with jax.disable_jit():
            for step, (t, s) in enumerate(((0.9, 0.6), (0.6, 0.3), (0.3, 0.0))):
                keys = jax.random.split(jax.random.key(step), 1)
                xt, memory = made.step(keys, predict, process.Linear(), xt, jnp.float32(t), jnp.float32(s), memory)
        assert evaluations.evaluated(name, 3) == len(calls)
        assert evaluations.steps_for(name, len(calls)) == 3


def test_results_of_another_run_are_not_mixed(tmp_path):
    path, sizes, config = str(tmp_path / "found.json"), {"num_samples": 4}, configs.Config()
    run = Trained(config, DataSpec((8, 8, 1)), {"w": np.ones(3)}, 5)
    samplers.commands.write_json(path, samplers.opened(path, sizes))
    found = samplers.opened(path, sizes, run, [tmp_path / "a"])
    assert found["run"] == "mnist, step 5" and found["workdir"] == [str(tmp_path / "a")]
    samplers.commands.write_json(path, found)
    assert samplers.opened(path, sizes, run, [tmp_path / "moved"]) == found
    deeper = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=8))
    for other in (run._replace(params={"w": np.zeros(3)}), run._replace(config=deeper)):
        with pytest.raises(ValueError, match=r"results of mnist, step 5, in .*a; the weights or the config in .*b are"):
            samplers.opened(path, sizes, other, [tmp_path / "b"])


def test_results_of_other_sizes_are_not_mixed(tmp_path):
    path = str(tmp_path / "found.json")
    samplers.commands.write_json(path, samplers.opened(path, {"mixture_samples": 64}))
    assert samplers.opened(path, {"mixture_samples": 64})["mixture"] == {}
    with pytest.raises(ValueError, match="holds results of mixture_samples=64, not 32: pass another file"):
        samplers.opened(path, {"mixture_samples": 32})


def test_methods_and_evaluations_that_are_none_are_named():
    assert samplers.chosen([], ["5", "10"]) == (list(samplers.METHODS), [5, 10])
    with pytest.raises(ValueError, match=r"--evaluations=5,x must be numbers from 2 on"):
        samplers.chosen([], ["5", "x"])
    with pytest.raises(ValueError, match=r"--methods=dmp: the methods are euler; ddim"):
        samplers.chosen(["euler", "dmp"], ["5"])
