"""The end of a run: pictures drawn from the trained weights, and how good they are, in numbers and in words."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from diffusion import checkpoint, data
from diffusion.models import Model
from experiments import build, pictures, session
from experiments.config import Config

# Data sets whose pictures the digit classifier understands.
_DIGITS = ("mnist5k", "mnist")


def finish(
    config: Config,
    workdir: Path,
    source: data.Source,
    model: Model,
    params: Any,
    train_seconds: float,
    log: session.Log,
) -> dict[str, Any]:
    """Draws config.sample.count pictures, writes samples.npz, samples.png and report.json, returns the report."""
    classes = build.num_classes(config, source)
    labels = np.arange(config.sample.count) % max(classes, 1)
    draw = build.drawer(config, model, source.images.shape[1:], classes)
    began = time.perf_counter()
    images = collect(draw, params, labels, config.sample.batch_size)
    report: dict[str, Any] = {"train_seconds": train_seconds, "sample_seconds": time.perf_counter() - began}
    pictures.save_npz(workdir / "samples.npz", images, labels)
    columns = min(classes, 10) or 10
    grid = pictures.grid(images[: 10 * columns], columns)
    pictures.save(workdir / "samples.png", grid)
    log.image(config.train.steps, "samples", np.asarray(grid))
    report |= {
        "count": len(images),
        "steps": config.train.steps,
        **quality(images, labels if classes else None, config),
    }
    text = json.dumps(report, indent=2) + "\n"
    checkpoint.atomic_write(workdir / "report.json", lambda file: file.write(text.encode()))
    return report
