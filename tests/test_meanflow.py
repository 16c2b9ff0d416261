"""The mean-flow loss against the published program's numbers, and loss and sampler where the average velocity is known."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import grids, meanflow
from diffusion.guide import clip
from diffusion.models.vit import vit
from diffusion.predict import WithVelocity, target
from diffusion.process import Cosine, Linear, coefficients, expand
from diffusion.sample import heun, sample
from diffusion.times import logit_normal_times
from tests.models.networks import ready

PUBLISHED = Path(__file__).parent / "data" / "pmf_loss.npz"
MEAN, SCALE = 0.7, 0.3


def published(dtype):
    """The file's arrays, and its network as a mean-flow network that predicts the flow."""
    with np.load(PUBLISHED) as stored:
        values = {k: stored[k] for k in stored.files}
    config = json.loads(str(values.pop("config")))
    values = {k: jnp.asarray(a, dtype if a.dtype.kind == "f" else int) for k, a in values.items()}
    net = {k.removeprefix("net_"): a for k, a in values.items() if k.startswith("net_")}

    def denoise(z, t, y):
        t, h = t[:, :1], t[:, 1:]
        labels, numbers = y
        log_w, ends = -jnp.log(1 - numbers[:, :1]), numbers[:, 1:2] - numbers[:, 2:]
        row = lambda vector: vector[None]  # noqa: E731
        u = row(net["a"]) + t * row(net["p"]) + h * row(net["q"]) + log_w * row(net["s"])
        u = u + ends * row(net["m"]) + net["table"][labels]
        v = row(net["b"]) + t * row(net["p2"]) + log_w * row(net["s2"]) + net["table2"][labels]
        u, v = u[:, None, None], v[:, None, None]
        u = jnp.tanh(jnp.einsum("bhwc,dc->bhwd", z, net["A"], precision="highest") + u)
        return WithVelocity(u, jnp.tanh(jnp.einsum("bhwc,dc->bhwd", z, net["B"], precision="highest") + v))

    dropped = jnp.arange(len(values["t"])) < config["dropped_first"]
    sampled = meanflow.Draw(*(values[k] for k in ("t", "r", "e", "w", "t_min", "t_max")), dropped)
    return values, denoise, sampled, config["num_classes"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-6), ("float32", 1e-4)])
def test_the_published_loss_and_its_parts(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        expected, denoise, sampled, null = published(dtype)
        arguments = sampled, denoise, Linear(), expected["x"], expected["y"]
        z, found = meanflow.velocities(*arguments, null=null, prediction="flow")
        loss, _ = meanflow.loss_at(*arguments, null=null, prediction="flow")
        pairs = {"z": z, "u": found.u, "du_dt": found.du_dt, "V": found.V, "v": found.v, "v_g": found.guided}
        for name, ours in (pairs | {"loss": loss}).items():
            assert ours.dtype == dtype
            scale = float(jnp.abs(expected[name]).max())
            np.testing.assert_allclose(ours, expected[name], rtol=0, atol=tolerance * scale, err_msg=name)
