"""experiments.likelihood: bits of the images of a run, alone or with experts."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import likelihood
from experiments.run_dir import trained
from tests.experiments.runs import own_flags


@pytest.mark.slow
def test_bits_depend_on_the_image_alone_and_add_up(chain_run, tmp_path):
    options = {"count": 5, "split": "test"}
    values = likelihood.measure(trained([chain_run]), tmp_path / "a", batch_size=5, **options)
    again = likelihood.measure(trained([chain_run]), tmp_path / "b", batch_size=2, **options)
    assert values["bits_per_dim"] == pytest.approx(again["bits_per_dim"], rel=1e-5)
    total = values["prior"] + values["between"] + values["decoder"]
    assert values["bits_per_dim"] == pytest.approx(total, rel=1e-5)
    assert json.loads((tmp_path / "a" / "likelihood.json").read_text()) == values
    with np.load(tmp_path / "a" / "likelihood.npz") as file:
        assert file["terms"].shape == (8, 5)
        np.testing.assert_allclose(file["prior"] + file["terms"].sum(0), file["total"], rtol=1e-5)
    with Image.open(tmp_path / "a" / "likelihood.png") as image:
        assert image.width > 500


@pytest.mark.slow
def test_experts_code_images_each_at_its_own_times(expert_runs, tmp_path):
    run = trained(expert_runs[0])
    likelihood.measure(run, tmp_path / "both", count=3)
    worse = (run.params[0], jax.tree.map(lambda p: p + 0.3, run.params[1]))
    likelihood.measure(run._replace(params=worse), tmp_path / "worse", count=3)
    with np.load(tmp_path / "both" / "likelihood.npz") as a, np.load(tmp_path / "worse" / "likelihood.npz") as b:
        same = np.isclose(a["terms"], b["terms"]).all(1)
    assert same.any() and not same.all()
    assert (np.diff(same.astype(int)) >= 0).all(), "the noisier steps come first, and only they are the second expert's"


def test_likelihood_needs_a_chain(chain_run, tmp_path):
    run = trained([chain_run])
    c = run.config
    c.process.path, c.process.betas, c.process.variance, c.process.vlb_weight = "linear", "linear", "fixed_small", 0.0
    c.model.clock, c.sample.respacing = "1000 t", None
    with pytest.raises(ValueError, match=r"--config\.process\.path is not a chain of steps.*: set it to vp"):
        likelihood.measure(run, tmp_path)


@pytest.mark.slow
def test_the_flow_gives_bits_for_a_run_on_any_path_and_says_how_the_steps_matter(run, tmp_path):
    options = {"count": 3, "steps": 4, "split": "test"}
    values = likelihood.measure_flow(trained([run.workdir]), tmp_path / "a", batch_size=3, **options)
    again = likelihood.measure_flow(trained([run.workdir]), tmp_path / "b", batch_size=2, **options)
    assert values["bits_per_dim"] == pytest.approx(again["bits_per_dim"], rel=1e-4)
    assert json.loads((tmp_path / "a" / "likelihood.json").read_text()) == values
    with np.load(tmp_path / "a" / "likelihood.npz") as file:
        assert file["total"].shape == file["halved"].shape == (3,) and np.isfinite(file["total"]).all()
        assert values["largest_change_when_halved"] == pytest.approx(np.abs(file["total"] - file["halved"]).max())
        # The level of 256 values is the rest.
        np.testing.assert_allclose(file["prior"] + file["change"] - np.log2(2 / 255), file["total"], rtol=1e-4)


def test_the_flow_refuses_what_it_cannot_do(run, tmp_path):
    with pytest.raises(ValueError, match="--ode_steps=3 must be even"):
        likelihood.measure_flow(trained([run.workdir]), tmp_path, steps=3)
    with pytest.raises(ValueError, match=r"--first=2 must lie between 0 and 1\.0"):
        likelihood.measure_flow(trained([run.workdir]), tmp_path, first=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ode", "--respacing=4"], "--respacing=4 has no effect with --ode: leave it out"),
        (["--ode", "--noclip"], "--clip=False has no effect with --ode"),
        (["--ode_steps=8"], "--ode_steps=8 has no effect without --ode"),
        (["--probes=2"], "--probes=2 has no effect without --ode"),
        (["--first=0.01"], r"--first=0\.01 has no effect without --ode"),
    ],
)
def test_flags_without_effect_are_refused(tmp_path, monkeypatch, arguments, message):
    own = own_flags(monkeypatch, tmp_path, likelihood)
    monkeypatch.setattr(likelihood, "trained", lambda *_: pytest.fail("it began"))
    with pytest.raises(ValueError, match=message):
        likelihood.main(own(["likelihood", *arguments]))
