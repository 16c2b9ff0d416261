"""JiT's loss and whole sampling runs against numbers made with its own program (tests/data/jit_maths_*.npz).

Through a config and `experiments`, so that fields, floors and guidance are those of a run. Its time is 1 - t.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import loss, predict, process
from diffusion.models.base import Model
from diffusion.models.vit import ViT
from experiments import config as configs
from experiments import parts, sampling
from experiments.parts import DataSpec

FILES = sorted((Path(__file__).parent / "data").glob("jit_maths_*.npz"))


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def case(request, monkeypatch):
    """The file's arrays as [B, H, W, C], its stand-in network, and a run with its settings."""
    with np.load(request.param) as file:
        values = {name: file[name] for name in file.files}
    given = json.loads(str(values.pop("config")))
    arrays = {k: jnp.asarray(v.transpose(0, 2, 3, 1) if v.ndim == 4 else v) for k, v in values.items()}

    def apply(params, xt, t, y=None, *, key=None):
        assert not params and key is None
        shift = arrays["b"][None] + arrays["table"][y]  # [B, C]
        mixed = jnp.einsum("oc,bhwc->bhwo", arrays["W"], xt, precision="highest")
        return jnp.tanh(mixed + shift[:, None, None] + (1 - t)[:, None, None, None])

    monkeypatch.setattr(ViT, "model", lambda self, task: Model(lambda *_: {}, apply))
    config = configs.Config()
    config.process.noise_scale = given["noise_scale"]
    config.process.loss_floor = config.sample.floor = given["t_eps"]
    config.sample.steps, config.sample.sampler = given["steps"], {"heun": "heun", "euler": "ddim"}[given["method"]]
    config.sample.guidance, config.sample.guidance_open = given["cfg"], True
    config.sample.guidance_low = 1 - given["interval_max"]
    config.sample.guidance_high = 1 - given["interval_min"]
    run = parts.resolve(config, DataSpec((4, 4, 3), tuple(map(str, range(given["num_classes"])))))
    return SimpleNamespace(config=config, run=run, given=given, **arrays)


def test_files_are_there():
    assert len(FILES) == 2


@pytest.mark.slow
def test_the_loss_of_an_example(case):
    """(x - x_hat)^2 / max(t, floor)^2: below the floor, of which one time is, the division is by the floor."""
    t = 1 - case.t
    assert (t < case.given["t_eps"]).any()
    np.testing.assert_allclose(process.noise(case.run.path, case.x, t, case.e), case.zt, rtol=1e-5, atol=1e-5)
    values, _ = loss.loss_at(
        loss.Draw(t, case.e),
        lambda xt, t, y: case.run.model.apply({}, xt, t, y),
        case.run.path,
        case.x,
        case.y,
        prediction="x0",
        weight=case.run.weight,
    )
    np.testing.assert_allclose(values, case.loss, rtol=1e-5)


def test_a_whole_sampling_run(case, monkeypatch):
    """`sample_fn` from JiT's own noise: guidance with open ends, the floor, Heun's method with Euler's last step."""
    monkeypatch.setattr(sampling, "initial_noise", lambda run, keys: case.given["noise_scale"] * case.z)
    monkeypatch.setattr(sampling, "to_data", lambda run, x: x)
    made = sampling.sample_fn(case.run)({}, jnp.arange(3), case.y)
    np.testing.assert_allclose(made, case.sample, atol=1e-5 * np.abs(case.sample).max())


def test_the_start_of_a_run_has_the_scale_of_the_path(case):
    keys = jax.random.split(jax.random.key(0), 64)
    x1 = sampling.initial_noise(case.run, keys)
    assert x1.shape == (64, 4, 4, 3)
    assert float(x1.std()) == pytest.approx(case.given["noise_scale"], rel=0.05)


def test_the_floor_is_that_of_the_published_velocity(case):
    """(x_hat - z) / max(1 - t, t_eps) in the published time, at every time, t = 0 with no noise included."""
    t = jnp.array([0.0, 0.02, 0.7])
    pred, path = jnp.tanh(case.e), case.run.path
    floored = predict.convert(lambda xt, t, y: pred, path, "x0", "flow", case.run.floor)(case.zt, t)
    wanted = (case.zt - pred) / jnp.maximum(t, case.given["t_eps"])[:, None, None, None]
    np.testing.assert_allclose(floored, wanted, rtol=2e-5, atol=2e-5)
