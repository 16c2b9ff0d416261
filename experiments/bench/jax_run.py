"""Our side of a benchmark: the training step of `experiments.train` and the samples of `experiments.sample`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import inputs, objective, parts, sampling
from experiments.config import Config


def data_spec(config: Config, num_classes: int) -> parts.DataSpec:
    """What the network must know of its data; the data itself is only opened if the config leaves its shape open."""
    c = config.data
    if c.size and c.channels:
        return parts.DataSpec((*c.size, c.channels), tuple(map(str, range(num_classes * c.labels))))
    return inputs.data_spec(config, inputs.source(config))


def params(run: parts.Parts, noise: float) -> Any:
    """Parameters with noise on them, as NumPy: many are zero at first, and no comparison must pass because of that."""
    rng = np.random.default_rng(run.seed + 1)
    initial = parts.init_params(run)
    return jax.tree.map(lambda p: np.asarray(p) + np.float32(noise) * rng.standard_normal(p.shape, np.float32), initial)


def train(run: parts.Parts, params: Any, batch: dict[str, np.ndarray], steps: int) -> Callable[[], None]:
    """Takes `steps` training steps on a batch of uint8 images [B, H, W, C] and labels."""
    state = objective.init_state(run, jax.tree.map(jnp.asarray, params))
    return steps_on(jax.jit(objective.make_step(run), donate_argnums=1), run.seed, state, batch, steps)


def steps_on(step: Callable[..., tuple[Any, Any]], seed: int, state: Any, batch: Any, steps: int) -> Callable[[], None]:
    """Takes `steps` steps of a compiled (key, state, batch) -> (state, metrics); the next call goes on from there."""
    key = jax.random.key(seed)

    def run() -> None:
        nonlocal state
        for _ in range(steps):
            state, _ = step(key, state, jax.device_put(batch))
        jax.block_until_ready(state)

    return run


def with_sample_steps(config: Config, steps: int) -> Config:
    """The config with so many steps of DDIM."""
    few = dataclasses.replace(config.sample, steps=steps, sampler="ddim", last=None, respacing=None, floor=0.0)
    return dataclasses.replace(config, sample=few)


def with_model(config: Config, **fields: Any) -> Config:
    """The config with other fields of the network."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


def guided(config: Config, spec: parts.DataSpec) -> bool:
    """Whether a step of sampling runs the network with and without the label."""
    return spec.num_classes > 0 and config.sample.guidance not in (0, 1)


def sample(run: parts.Parts, params: Any, labels: np.ndarray) -> Callable[[], np.ndarray]:
    """Makes a sample for each label, with the sampler and the steps of `run`."""
    make, index = sampling.sample_fn(run), np.arange(len(labels))
    params = jax.tree.map(jnp.asarray, params)
    return lambda: np.asarray(make(params, index, labels))
