"""The blog's network, trained and sampled by our functions and by its own program, written again in Keras.

    python -m experiments.bench.blog

Training: the published batch of 5 images x 100 noise samples each, noising included. Sampling: the published loop calls
`predict` for one image at a time, 500 times; ours makes 1 or 64 samples in one compiled loop. Sampling is timed over
fewer steps, alpha' = alpha^(n/n') as published, since every step costs the same. First both programs are shown to be
the same: with our parameters copied, predictions and samples must agree. Then they take turns in one process on
the same cores (`timing`).

TensorFlow is an extra: pip install -e '.[bench]'; without it our side is timed alone.
"""

import importlib.util
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from diffusion import sample as samplers
from diffusion.grids import uniform_grid
from diffusion.patch.geometry import geometry
from experiments import command, inputs, sampling
from experiments.bench import commands, jax_run, peers, tables, timing
from experiments.config import Config
from experiments.configs import blog
from experiments.parts import Parts, resolve

SAMPLES = (1, 64)
KERAS = "Keras, as published"
# Speed per image over the published program that this project promises.
TARGETS = {"train": {"ours": 10}, "sample": {"ours, 1 at a time": 20, "ours, 64 at a time": 100}}
NOISE = 0.002  # on the initial parameters; with much more, an untrained sampler amplifies rounding
PARITY_STEPS = 10
MISSING = "TensorFlow is not installed, so ours is timed alone: pip install -e '.[bench]' for the comparison"


def main(argv: Sequence[str]) -> None:
    command.start()
    compare = importlib.util.find_spec("tensorflow") is not None
    if not compare:
        print(MISSING)
    commands.perform(argv, partial(run, blog.get_config(), compare=compare, **commands.amounts()), report)


def run(config: Config, *, compare: bool, rounds: int = 3, steps: int = 1, sample_steps: int = 2) -> dict[str, Any]:
    """All measurements, ready for JSON.

    Raises:
      AssertionError: the two programs do not compute the same.
    """
    source = inputs.source(config)
    spec = inputs.data_spec(config, source)
    resolved, timed = resolve(config, spec), resolve(jax_run.with_sample_steps(config, sample_steps), spec)
    params = jax_run.params(resolved, NOISE)
    batch = {"x": source.images[: config.train.batch_size], "y": source.labels[: config.train.batch_size]}
    size = config.train.batch_size * config.train.repeat

    # A call's training examples, and its samples as parts of a whole one.
    train, train_work = {"ours": jax_run.train(resolved, params, batch, steps)}, {"ours": steps * size}
    sample, sample_work = {}, {}
    for n in SAMPLES:
        name = f"ours, {n} at a time"
        sample[name] = jax_run.sample(timed, params, np.zeros(n, np.int32))
        sample_work[name] = n * sample_steps / config.process.steps
    agreement, versions = None, {}
    if compare:
        published = Published(config, resolved, params)
        agreement, versions = published.parity(PARITY_STEPS), published.versions()
        train[KERAS], train_work[KERAS] = partial(published.train, batch["x"]), size
        x1 = np.random.default_rng(0).standard_normal(spec.shape[:2])
        sample[KERAS] = partial(published.sample, x1, sample_steps)
        sample_work[KERAS] = sample_steps / config.process.steps
    return {
        "machine": timing.machine() | versions,
        "config": config.name,
        "batch_size": size,
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "parity": agreement,
        "sample_steps": config.process.steps,
        "sample_steps_timed": sample_steps,
        "train": timing.compare(train, train_work, rounds),
        "sample": timing.compare(sample, sample_work, rounds),
    }


class Published:
    """The blog's program with our parameters."""

    def __init__(self, config: Config, resolved: Parts, params: Any) -> None:
        from experiments.bench import keras_blog

        self._program, self._config, self._run, self._params = keras_blog, config, resolved, params
        c, p = config.model, config.process
        self._cut = {"window": c.patch_size, "stride": c.stride}
        self._noise = {"rate": p.rate, "steps": p.steps}
        self._rng = np.random.default_rng(0)
        n = math.prod(geometry(resolved.spec.shape[:2], c.patch_size, c.stride).grid)
        self._model = keras_blog.network(n, c.patch_size**2, depth=c.depth, heads=c.heads, head_dim=c.head_dim)
        keras_blog.copy_params(self._model, params)
        self._model.compile(keras_blog.keras.optimizers.Adam(config.train.learning_rate), "mse")

    def train(self, images: np.ndarray) -> None:
        """One training step on uint8 images [B, H, W, 1], each noised as often as the config says."""
        x0 = np.asarray(images, np.float32) / 256 - 0.5
        made = self._program.training_batch(self._rng, x0, self._config.train.repeat, **self._noise, **self._cut)
        self._model.train_on_batch(*made)

    def sample(self, x1: np.ndarray, steps: int) -> np.ndarray:
        """One sample [H, W] from the noise x1 [H, W], in `steps` steps."""
        rate = self._noise["rate"] ** (self._noise["steps"] / steps)
        return self._program.sample(self._model, x1, rate, steps, self._config.sample.overstep, **self._cut)

    def parity(self, steps: int) -> dict[str, float]:
        """Largest difference of predictions and of samples, relative to the largest value.

        Raises:
          AssertionError: the programs are not the same.
        """
        p, resolved = self._noise, self._run
        key = jax.random.key(resolved.seed + 2)
        x1 = jax.random.normal(key, (2, *resolved.spec.shape))
        t = np.array([1.0, 0.1], np.float32)
        tokens = np.asarray(resolved.model.apply(self._params, x1, t))
        level = (p["rate"] ** (p["steps"] * t)).astype(np.float32)
        cut = self._program.patchify(np.asarray(x1), self._cut["window"], self._cut["stride"])
        theirs = self._model.predict(self._program.with_level(np.asarray(cut), level), verbose=0)

        x0 = samplers.sample(
            key,
            sampling.denoiser(resolved, self._params),
            resolved.path,
            x1[:1],
            uniform_grid(steps),
            prediction=resolved.denoiser_prediction,
            sampler=resolved.sampler,
        )
        their_x0 = self.sample(np.asarray(x1[0, ..., 0]), steps)
        errors = {"predictions": relative(theirs, tokens), "samples": relative(their_x0, np.asarray(x0[0, ..., 0]))}
        return peers.check_same("the published program", errors)

    def versions(self) -> dict[str, str]:
        """What was compared with."""
        import tensorflow

        return {"keras": self._program.keras.__version__, "tensorflow": tensorflow.__version__}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference over the largest value of b."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def report(result: dict[str, Any]) -> str:
    """The result in words and two tables."""
    lines = [
        f"{result['config']}: {result['parameters']:,} parameters, float32; "
        + tables.where(result["machine"], ["jax", "keras", "tensorflow"])
    ]
    if result["parity"]:
        lines.append(f"The published program is {peers.agreement(result['parity'])}.")
    lines.append(
        f"A sample takes {result['sample_steps']} steps; timed over {result['sample_steps_timed']} and scaled up."
    )
    titles = {"train": f"training, batch {result['batch_size']}", "sample": "sampling, per image"}
    for kind, title in titles.items():
        rows = result[kind]
        heads = ["ms per image", "images/s"] + ["speed over Keras", "target"] * (KERAS in rows)
        cells = [[name, f"{1000 * row['seconds']:.3f}", f"{row['per_second']:.2f}"] for name, row in rows.items()]
        if KERAS in rows:
            for cell, (name, row) in zip(cells, rows.items(), strict=True):
                target = TARGETS.get(kind, {}).get(name)
                cell += [tables.over(row, KERAS), f"{target} x" if target else ""]
        lines += ["", tables.table(title, heads, cells)]
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main, commands.define_flags)
