"""The blog's network, trained and sampled by our functions and by its own program, made anew in Keras.

    python -m experiments.bench.blog

Training: the published batch of 5 pictures x 100 noisings, noising included. Sampling: the published loop calls
`predict` for one picture at a time, 500 times; ours draws 1 or 64 pictures in one compiled loop. Sampling is timed over
fewer steps, alpha' = alpha^(n/n') as published, since every step costs the same. First both programs are shown to be
the same: with our parameters copied, predictions and drawn pictures must agree. Then they take turns in one process on
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
from absl import app, flags

from diffusion import sample as sampling
from diffusion.patch.geometry import geometry
from experiments import build, drawing, session
from experiments.bench import ours, timing
from experiments.config import Config
from experiments.configs import blog

PICTURES = (1, 64)
KERAS = "Keras, as published"
# Speed per picture over the published program that this project promises.
TARGETS = {"train": {"ours": 10}, "sample": {"ours, 1 at a time": 20, "ours, 64 at a time": 100}}
# Predictions of the two networks and pictures of the two samplers, relative to the largest value.
TOLERANCE = 1e-4
NOISE = 0.002  # on the initial parameters; with much more, an untrained sampler amplifies rounding
PARITY_STEPS = 10
MISSING = "TensorFlow is not installed, so ours is timed alone: pip install -e '.[bench]' for the comparison"


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    timing.check_json(flags.FLAGS.json)
    session.start()
    compare = importlib.util.find_spec("tensorflow") is not None
    if not compare:
        print(MISSING)
    result = run(
        blog.get_config(),
        compare=compare,
        rounds=flags.FLAGS.rounds,
        steps=flags.FLAGS.steps,
        sample_steps=flags.FLAGS.sample_steps,
    )
    print(report(result))
    timing.write_json(flags.FLAGS.json, result)


def run(config: Config, *, compare: bool, rounds: int = 3, steps: int = 1, sample_steps: int = 2) -> dict[str, Any]:
    """All measurements, ready for JSON.

    Raises:
      AssertionError: the two programs do not compute the same.
    """
    source = build.source(config)
    seen = build.seen(config, source)
    params = ours.params(config, seen, NOISE)
    batch = {"x": source.images[: config.train.batch_size], "y": source.labels[: config.train.batch_size]}
    size = config.train.batch_size * config.train.repeat

    train = {"ours": ours.train(config, seen, params, batch, steps)}
    draw = {
        f"ours, {n} at a time": ours.draw(config, seen, params, np.zeros(n, np.int32), sample_steps) for n in PICTURES
    }
    work = {"ours": steps * size} | {f"ours, {n} at a time": n * sample_steps / config.process.steps for n in PICTURES}
    agreement = None
    if compare:
        published = Published(config, seen, params)
        agreement = published.parity(PARITY_STEPS)
        train[KERAS] = partial(published.train, batch["x"])
        draw[KERAS] = partial(published.draw, np.random.default_rng(0).standard_normal(seen.shape[:2]), sample_steps)
    return {
        "machine": timing.machine() | (published.versions() if compare else {}),
        "config": config.name,
        "batch_size": size,
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "parity": agreement,
        "sample_steps": config.process.steps,
        "sample_steps_timed": sample_steps,
        "train": timing.summary(timing.interleave(train, rounds), work | {KERAS: size}),
        "sample": timing.summary(timing.interleave(draw, rounds), work | {KERAS: sample_steps / config.process.steps}),
    }


class Published:
    """The blog's program with our parameters."""

    def __init__(self, config: Config, seen: build.Seen, params: Any) -> None:
        from experiments.bench import keras_blog

        self._program, self._config, self._seen, self._params = keras_blog, config, seen, params
        c, p = config.model, config.process
        self._cut = {"window": c.patch_size, "stride": c.stride}
        self._noise = {"rate": p.rate, "steps": p.steps}
        self._rng = np.random.default_rng(0)
        n = math.prod(geometry(seen.shape[:2], c.patch_size, c.stride).grid)
        self._model = keras_blog.network(n, c.patch_size**2, depth=c.depth, heads=c.heads, head_dim=c.head_dim)
        keras_blog.copy_params(self._model, params)
        self._model.compile(keras_blog.keras.optimizers.Adam(config.train.learning_rate), "mse")

    def train(self, images: np.ndarray) -> None:
        """One training step on uint8 images [B, H, W, 1], each noised as often as the config says."""
        x0 = np.asarray(images, np.float32) / 256 - 0.5
        made = self._program.training_batch(self._rng, x0, self._config.train.repeat, **self._noise, **self._cut)
        self._model.train_on_batch(*made)

    def draw(self, start: np.ndarray, steps: int) -> np.ndarray:
        """One picture [H, W] from noise `start`, in `steps` steps."""
        rate = self._noise["rate"] ** (self._noise["steps"] / steps)
        return self._program.draw(self._model, start, rate, steps, self._config.sample.overstep, **self._cut)

    def parity(self, steps: int) -> dict[str, float]:
        """Largest difference of predictions and of drawn pictures, relative to the largest value.

        Raises:
          AssertionError: one is larger than TOLERANCE.
        """
        p, config, seen = self._noise, self._config, self._seen
        path = build.path(config)
        key = jax.random.key(config.seed + 2)
        x1 = jax.random.normal(key, (2, *seen.shape))
        t = np.array([1.0, 0.1], np.float32)
        tokens = np.asarray(build.network(config, seen).apply(self._params, x1, t, None))
        level = (p["rate"] ** (p["steps"] * t)).astype(np.float32)
        cut = self._program.patchify(np.asarray(x1), self._cut["window"], self._cut["stride"])
        theirs = self._model.predict(self._program.with_level(np.asarray(cut), level), verbose=0)

        drawn = sampling.sample(
            key,
            drawing.denoiser(config, seen, self._params),
            path,
            x1[:1],
            sampling.uniform_grid(steps),
            prediction=config.process.prediction,
            step=drawing.sampler_step(config),
        )
        picture = self.draw(np.asarray(x1[0, ..., 0]), steps)
        errors = {
            "prediction": relative(theirs, tokens),
            "picture": relative(picture, np.asarray(drawn[0, ..., 0])),
        }
        if not max(errors.values()) <= TOLERANCE:
            raise AssertionError(f"the published program does not compute what ours does: {errors} exceed {TOLERANCE}")
        return errors

    def versions(self) -> dict[str, str]:
        """What was compared with."""
        import tensorflow

        return {"keras": self._program.keras.__version__, "tensorflow": tensorflow.__version__}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def report(result: dict[str, Any]) -> str:
    """The result in words and two tables."""
    machine, errors = result["machine"], result["parity"]
    versions = [f"{name} {machine[name]}" for name in ("jax", "keras", "tensorflow") if name in machine]
    lines = [
        f"{result['config']}: {result['parameters']:,} parameters, float32; {machine['device']}, "
        f"{machine['cores']} cores, {', '.join(versions)}"
    ]
    if errors:
        lines.append(
            f"same program: predictions agree to {errors['prediction']:.1e}, pictures to {errors['picture']:.1e}"
        )
    lines.append(
        f"A picture takes {result['sample_steps']} steps; timed over {result['sample_steps_timed']} and scaled up."
    )
    titles = {"train": f"training, batch {result['batch_size']}", "sample": "drawing, per picture"}
    for kind, title in titles.items():
        rows = result[kind]
        heads = ["ms per picture", "pictures/s"] + ["speed over Keras", "target"] * (KERAS in rows)
        cells = [[name, f"{1000 * row['seconds']:.3f}", f"{row['per_second']:.2f}"] for name, row in rows.items()]
        if KERAS in rows:
            for cell, (name, row) in zip(cells, rows.items(), strict=True):
                target = TARGETS.get(kind, {}).get(name)
                cell += [timing.over(row, KERAS), f"{target} x" if target else ""]
        lines += ["", timing.table(title, heads, cells)]
    return "\n".join(lines)


if __name__ == "__main__":
    session.run(main, timing.define_flags)
