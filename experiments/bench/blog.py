"""The blog's network, trained and sampled by our functions and by its own program, made anew in Keras.

    python -m experiments.bench.blog

Training: the published batch of 5 pictures x 100 noisings, noising included. Sampling: the published loop calls
`predict` for one picture at a time, 500 times; ours draws 1 or 64 pictures in one compiled loop. Sampling is timed over
fewer steps, alpha' = alpha^(n/n') as published, since every step costs the same. First both programs are shown to be
the same: with our parameters copied, predictions and drawn pictures must agree. Then they take turns in one process on
the same cores (`timing`).

TensorFlow is an extra: pip install 'patch-diffusion[bench]'; without it our side is timed alone.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import app

from diffusion import sample as sampling
from diffusion.geometry import geometry
from diffusion.models.blog import blog as network
from experiments import build, session
from experiments.bench import ours, timing
from experiments.config import Config
from experiments.configs import blog

PICTURES = (1, 64)
KERAS = "Keras, as published"
# Speed per picture over the published program that this project promises.
TARGETS = {"training": 10, "drawing 1": 20, "drawing 64": 100}
# Predictions of the two networks and pictures of the two samplers, relative to the largest value.
TOLERANCE = 1e-4
MISSING = "TensorFlow is not installed, so ours is timed alone: pip install 'patch-diffusion[bench]' for the comparison"


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    timing.check_json(timing.JSON.value)
    session.start()
    compare = importlib.util.find_spec("tensorflow") is not None
    if not compare:
        print(MISSING)
    result = run(
        blog.get_config(),
        compare=compare,
        rounds=timing.ROUNDS.value,
        steps=timing.STEPS.value,
        sample_steps=timing.SAMPLE_STEPS.value,
    )
    print(report(result))
    timing.write_json(timing.JSON.value, result)


def run(
    config: Config, *, compare: bool, rounds: int = 3, steps: int = 1, sample_steps: int = 2
) -> dict[str, Any]:
    """All measurements, ready for JSON.

    Raises:
      AssertionError: the two programs do not compute the same.
    """
    source = build.source(config)
    seen = build.seen(config, source)
    params = ours.params(config, seen)
    batch = {"x": source.images[: config.train.batch_size], "y": source.labels[: config.train.batch_size]}
    size = config.train.batch_size * config.train.repeat

    train = {"ours": ours.train(config, seen, params, batch, steps)}
    draw = {
        f"ours, {n} at a time": ours.draw(config, seen, params, np.zeros(n, np.int32), sample_steps) for n in PICTURES
    }
    work = {"ours": steps * size} | {
        f"ours, {n} at a time": n * sample_steps / config.process.steps for n in PICTURES
    }
    agreement = None
    if compare:
        published = Published(config, seen, params)
        agreement = published.parity(min(sample_steps, 3))
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
        "sample": timing.summary(
            timing.interleave(draw, rounds), work | {KERAS: sample_steps / config.process.steps}
        ),
    }
