"""Our side of a benchmark: the training step of `experiments.train` and the pictures of `experiments.sample`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import build, drawing, objective
from experiments.config import Config


def params(config: Config, seen: build.Seen, noise: float) -> Any:
    """Parameters with noise on them, as NumPy: many are zero at first, and no comparison must pass because of that."""
    leaves, structure = jax.tree.flatten(build.init_params(config, seen))
    keys = jax.random.split(jax.random.key(config.seed + 1), len(leaves))
    noisy = [p + noise * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return structure.unflatten(map(np.asarray, noisy))


def train(
    config: Config, seen: build.Seen, params: Any, batch: dict[str, np.ndarray], steps: int
) -> Callable[[], None]:
    """Runs `steps` training steps on a batch of uint8 pictures [B, H, W, C] and labels."""
    step = jax.jit(objective.make_step(config, seen), donate_argnums=1)
    key = jax.random.key(config.seed)
    state = objective.init_state(config, seen, jax.tree.map(jnp.asarray, params))

    def run() -> None:
        nonlocal state
        for _ in range(steps):
            state, _ = step(key, state, jax.device_put(batch))
        jax.block_until_ready(state)

    return run


def draw(
    config: Config, seen: build.Seen, params: Any, labels: np.ndarray, sample_steps: int
) -> Callable[[], np.ndarray]:
    """Draws a picture per label in `sample_steps` steps of DDIM."""
    few = dataclasses.replace(config.sample, steps=sample_steps, sampler="ddim", last=None, respacing=None)
    drawer = drawing.drawer(dataclasses.replace(config, sample=few), seen)
    params, index = jax.tree.map(jnp.asarray, params), np.arange(len(labels))
    return lambda: np.asarray(drawer(params, index, labels))
