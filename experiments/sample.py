"""Draws pictures from a trained run; the run's stored config says everything about the network.

    python -m experiments.sample --workdir=runs/mnist --num_samples=64 --steps=50 --guidance=2 --labels=0,1,2
    python -m experiments.sample --workdir=runs/mnist --num_samples=10 --trajectory

Writes samples.npz (arr_0 uint8 [N, H, W, C], arr_1 labels) and samples.png; with --trajectory also a film strip and an
animation of the denoising. Picture i depends on the seed and its number i alone, not on the batch size.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from diffusion import checkpoint
from experiments import build, measure, pictures, session
from experiments.config import Config

flags.declare_key_flag("workdir")
_OUTDIR = flags.DEFINE_string("outdir", None, "Where to write; default: a new folder WORKDIR/samples/NUMBER.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 64, "How many pictures.", lower_bound=1)
_LABELS = flags.DEFINE_list("labels", None, "Classes, by number or name, taken in turn; default: all of them.")
_SEED = flags.DEFINE_integer("seed", None, "Another seed, other pictures; default: the run's.")
_STEPS = flags.DEFINE_integer("steps", None, "Sampler steps; default: the run's.")
_SAMPLER = flags.DEFINE_string("sampler", None, "ddim, ancestral or heun; default: the run's.")
_GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale (1: none); default: the run's.")
_OVERSTEP = flags.DEFINE_float("overstep", None, "Step size of ddim (the blog's 1.5); default: the run's.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Pictures at a time; default: the run's.")
_CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "Training step to draw from; default: the newest.")
_TRAJECTORY = flags.DEFINE_bool("trajectory", False, "Also draw how the first pictures emerge from noise.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Allow writing over earlier samples in --outdir.")

# As many frames and pictures as can be taken in at a glance.
_STRIP_FRAMES, _STRIP_ROWS, _ANIMATION_FRAMES = 11, 10, 60


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    session.start()
    workdir = session.workdir()
    config, seen = build.stored(workdir)
    override(config, seen)
    labels = parse_labels(_LABELS.value, _NUM_SAMPLES.value, seen.class_names)
    params, step = checkpoint.restore_ema(workdir / "checkpoints", _CHECKPOINT.value, report=print)
    outdir = claim(workdir, _OUTDIR.value, _OVERWRITE.value)
    print(f"drawing {len(labels)} pictures from step {step} of {workdir}")
    images, seconds = measure.collect(build.drawer(config, seen), params, labels, config.sample.batch_size)
    measure.save(outdir, images, labels, seen.num_classes)
    if _TRAJECTORY.value:
        trajectory(config, seen, params, labels, outdir)
    print(f"{measure.minutes(seconds)}; written to {outdir}: {', '.join(sorted(p.name for p in outdir.iterdir()))}")


def override(config: Config, seen: build.Seen) -> None:
    """Puts the flags that were given into `config.sample`.

    Raises:
      ValueError: a flag makes no sense, or belongs to another kind of run.
    """
    given = {
        "seed": _SEED.value,
        "steps": _STEPS.value,
        "sampler": _SAMPLER.value,
        "guidance": _GUIDANCE.value,
        "overstep": _OVERSTEP.value,
        "batch_size": _BATCH_SIZE.value,
    }
    for name, value in given.items():
        if value is not None:
            setattr(config.sample, name, value)
    for name in ("steps", "batch_size"):
        if getattr(config.sample, name) < 1:
            raise ValueError(f"--{name}={getattr(config.sample, name)} must be at least 1")
    if not math.isfinite(config.sample.guidance):
        raise ValueError(f"--guidance={config.sample.guidance} must be a finite number")
    if _GUIDANCE.value is not None and not seen.num_classes:
        raise ValueError(f"--guidance={_GUIDANCE.value} needs a run that was trained with labels; this one was not")
    build.sampler_step(config)


def parse_labels(given: Sequence[str] | None, count: int, class_names: Sequence[str]) -> np.ndarray:
    """Labels [count]: those given, in turn, or all classes in turn.

    Raises:
      ValueError: a label is no class of this run, or the run has none.
    """
    if given is None:
        return measure.equal_share(count, len(class_names))
    if not class_names:
        raise ValueError(f"--labels={','.join(given)}: this run was trained without labels")
    numbers = {name: i for i, name in enumerate(class_names)} | {str(i): i for i in range(len(class_names))}
    wrong = [label for label in given if label.strip() not in numbers]
    if wrong or not given:
        raise ValueError(f"--labels: {wrong} are not among the classes 0..{len(class_names) - 1} of this run")
    return np.resize([numbers[label.strip()] for label in given], count)


def claim(workdir: Path, outdir: str | None, overwrite: bool) -> Path:
    """The folder to write to, made and proven writable before any drawing.

    Raises:
      ValueError: it holds samples already, and `overwrite` is off.
    """
    if outdir is None:
        taken = [int(p.name) for p in (workdir / "samples").glob("*") if p.name.isdigit()]
        folder = workdir / "samples" / f"{max(taken, default=0) + 1:03d}"
    else:
        folder = Path(outdir)
        if (folder / "samples.npz").exists() and not overwrite:
            raise ValueError(f"{folder} holds samples already; pass --overwrite or another --outdir")
    checkpoint.check_writable(folder)
    return folder


def trajectory(config: Config, seen: build.Seen, params: object, labels: np.ndarray, outdir: Path) -> None:
    """Writes trajectory.png, a row per picture, and trajectory.gif."""
    labels = labels[:_STRIP_ROWS]
    keep = min(config.sample.steps + 1, _ANIMATION_FRAMES)
    _, frames = build.drawer(config, seen, keep)(params, np.arange(len(labels)), labels)
    frames = np.asarray(frames)
    chosen = np.unique(np.linspace(0, keep - 1, min(keep, _STRIP_FRAMES)).round().astype(int))
    pictures.save(outdir / "trajectory.png", pictures.strip(frames[chosen]))
    animation = [pictures.grid(frame, min(len(labels), 5)) for frame in frames]
    pictures.save_animation(outdir / "trajectory.gif", animation)


if __name__ == "__main__":
    session.run(main)
