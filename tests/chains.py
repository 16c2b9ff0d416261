"""Published chains (tests/data/*_maths_*.npz): schedules, one step of each kind, losses and whole DDIM runs."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.grids import respaced_grid
from diffusion.predict import WithVariance
from diffusion.process import VP, named_betas

FILES = sorted((Path(__file__).parent / "data").glob("[as]*_maths_*.npz"))
PREDICTIONS = {"EPSILON": "eps", "START_X": "x0", "V": "v"}


@dataclass
class Chain:
    """A file: `values` with images as NHWC, and what its config says in our words."""

    values: dict
    path: VP
    grid: np.ndarray
    prediction: str
    variance: str
    weighting: str | None

    @property
    def now(self):
        """Times t and the next ones s, [4], of the file's steps."""
        rising = jnp.asarray(self.grid[::-1], float)
        return rising[1:][self.values["t"]], rising[:-1][self.values["t"]]

    def denoise(self, xt, t, y=None):
        v = self.values
        index = len(self.path.betas) * t - 1
        out = xt @ jnp.asarray(v["W"].T, xt.dtype) + v["b"].reshape(1, 1, 1, -1) + index.reshape(-1, 1, 1, 1) / 1000
        if not self.variance.startswith("learned"):
            return out
        pred, extra = jnp.split(out, 2, -1)
        return WithVariance(pred, jax.nn.sigmoid(extra))


def load(file):
    with np.load(file) as stored:
        values = {name: stored[name] for name in stored.files}
    config = json.loads(str(values.pop("config")))
    values = {k: np.moveaxis(v, 1, -1) if v.ndim == 4 else v for k, v in values.items()}
    learned = "learned_sigmoid" if file.stem.startswith("seed") else "learned_range"
    return Chain(
        values,
        VP(named_betas(config["schedule"], config["T"])),
        respaced_grid(config["respace"], config["T"]),
        PREDICTIONS[config["prediction"]],
        learned if config["learn_sigma"] else "fixed_large",
        config["weight"],
    )


def close(ours, theirs, tolerance=1e-5):
    """Equal to `tolerance` of the largest magnitude."""
    theirs = np.asarray(theirs, np.float64)
    np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=0, atol=tolerance * np.abs(theirs).max())
