"""Draws image_files from a trained run; the run's stored config says everything about the network.

    python -m experiments.sample --workdir=runs/mnist --num_samples=64 --steps=50 --guidance=2 --labels=0,1,2
    python -m experiments.sample --workdir=runs/mnist --num_samples=10 --trajectory
    python -m experiments.sample --workdir=runs/unet_split0,runs/unet_split1            with SNR experts
    python -m experiments.sample --workdir=runs/large --base_samples=runs/small/samples.npz    super-resolution

Writes samples.npz (arr_0 uint8 [N, H, W, C], arr_1 labels) and samples.png; with --trajectory also a film strip and an
animation of the denoising. Picture i depends on the seed and its number i alone, not on the batch size.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from diffusion import guide
from experiments import build, drawing, measure, objective, image_files, runs, session
from experiments.config import Config

flags.declare_key_flag("workdir")
_OUTDIR = flags.DEFINE_string("outdir", None, "Where to write; default: a new folder WORKDIR/samples/NUMBER.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", None, "How many image_files; default 64.", lower_bound=1)
_LABELS = flags.DEFINE_list("labels", None, "Classes, by number or name, taken in turn; default: all of them.")
_SEED = flags.DEFINE_integer("seed", None, "Another seed, other image_files; default: the run's.")
_STEPS = flags.DEFINE_integer("steps", None, "Sampler steps; default: the run's.")
_RESPACING = flags.DEFINE_string("respacing", None, "Steps of a chain to take instead: 250, 10,15,20 or ddim25.")
_SAMPLER = flags.DEFINE_string("sampler", None, "ddim, ancestral or heun; default: the run's.")
_ETA = flags.DEFINE_float("eta", None, "Noise that ddim puts back, 0 to 1; default: the run's.")
_GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale (1: none); default: the run's.")
_GUIDANCE_LOW = flags.DEFINE_float("guidance_low", None, "Time from which guidance acts; default: the run's.")
_GUIDANCE_HIGH = flags.DEFINE_float("guidance_high", None, "Time up to which guidance acts; default: the run's.")
_CLIP = flags.DEFINE_bool("clip", None, "Keep estimates of the picture in its range; default: the run's.")
_THRESHOLD = flags.DEFINE_float("threshold", None, "Quantile of dynamic thresholding, 0.995; default: the run's.")
_OVERSTEP = flags.DEFINE_float("overstep", None, "Step size of ddim (the blog's 1.5); default: the run's.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Pictures at a time; default: the run's.")
_CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "Training step to draw from; default: the newest.")
_EMA = flags.DEFINE_float("ema", None, "Which of a run's averages, by its decay; default: the first of its list.")
_BASE_SAMPLES = flags.DEFINE_string(
    "base_samples", None, "The smaller image_files that a super-resolution run enlarges: a samples.npz of another run."
)
_CONDITION_NOISE = flags.DEFINE_float("condition_noise", None, "Deviation of noise put on those; default: the run's.")
_TRAJECTORY = flags.DEFINE_bool("trajectory", False, "Also draw how the first image_files emerge from noise.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Allow writing over earlier samples in --outdir.")

# As many frames and image_files as can be taken in at a glance.
_STRIP_FRAMES, _STRIP_ROWS, _ANIMATION_FRAMES = 11, 10, 60


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    session.start()
    workdirs = session.workdirs()
    run = runs.trained(workdirs, _CHECKPOINT.value, _EMA.value)
    config, seen = run.config, run.seen
    override(config, seen)
    low, labels = base_samples(config, seen)
    draw = drawing.drawer(config, seen, team=run.team)
    few = [a[:1] for a in (labels, labels, low) if a is not None]
    jax.eval_shape(draw, run.params, *few)
    outdir = session.claim(workdirs[0] / "samples", "samples.npz", _OUTDIR.value, _OVERWRITE.value)
    print(f"drawing {len(labels)} image_files from step {run.step} of {' and '.join(map(str, workdirs))}")
    images, seconds = measure.collect(draw, run.params, labels, config.sample.batch_size, low)
    measure.save(outdir, images, labels, seen.num_classes)
    if _TRAJECTORY.value:
        trajectory(run, labels, low, outdir)
    print(f"{measure.minutes(seconds)}; written to {outdir}: {', '.join(sorted(p.name for p in outdir.iterdir()))}")


def override(config: Config, seen: build.Seen) -> None:
    """Puts the flags that were given into `config`.

    Raises:
      ValueError: a flag makes no sense, or belongs to another kind of run.
    """
    given = {
        "seed": _SEED.value,
        "steps": _STEPS.value,
        "respacing": _RESPACING.value,
        "sampler": _SAMPLER.value,
        "eta": _ETA.value,
        "guidance": _GUIDANCE.value,
        "guidance_low": _GUIDANCE_LOW.value,
        "guidance_high": _GUIDANCE_HIGH.value,
        "clip": _CLIP.value,
        "threshold": _THRESHOLD.value,
        "overstep": _OVERSTEP.value,
        "batch_size": _BATCH_SIZE.value,
    }
    c = config.sample
    if _STEPS.value is not None and _RESPACING.value is not None:
        raise ValueError(f"--steps={_STEPS.value} and --respacing={_RESPACING.value} both say which steps: pass one")
    if _STEPS.value is not None:
        c.respacing = None
    if _RESPACING.value is not None:
        c.shift, c.last = 1.0, None
    if _CLIP.value is not None and _THRESHOLD.value is None:
        c.threshold = None
    if _THRESHOLD.value is not None and _CLIP.value is None:
        c.clip = False
    for name, value in given.items():
        if value is not None:
            setattr(c, name, value)
    for name in ("steps", "batch_size"):
        if getattr(c, name) < 1:
            raise ValueError(f"--{name}={getattr(c, name)} must be at least 1")
    if not math.isfinite(c.guidance):
        raise ValueError(f"--guidance={c.guidance} must be a finite number")
    guided = [name for name in ("guidance", "guidance_low", "guidance_high") if given[name] is not None]
    if guided and not seen.num_classes:
        raise ValueError(f"--{guided[0]}={given[guided[0]]} needs a run that was trained with labels; this one was not")
    guide.interval(c.guidance, c.guidance_low, c.guidance_high)
    if _CONDITION_NOISE.value is not None:
        if not config.condition.size:
            raise ValueError("--condition_noise belongs to a super-resolution run, and this is none")
        config.condition.sample_noise = _CONDITION_NOISE.value
        objective.check_condition(config, seen)
    drawing.sampler_step(config), drawing.time_grid(config)


def base_samples(config: Config, seen: build.Seen) -> tuple[np.ndarray | None, np.ndarray]:
    """The smaller image_files to start from, if this run enlarges image_files, and labels [N], as the flags say.

    Raises:
      ValueError: smaller image_files are missing, not wanted, or of another size; labels are wrong.
    """
    size = config.condition.size
    if not size:
        if _BASE_SAMPLES.value:
            raise ValueError(f"--base_samples={_BASE_SAMPLES.value}: this run was not trained to enlarge image_files")
        return None, parse_labels(_LABELS.value, _NUM_SAMPLES.value or 64, seen.class_names)
    if not _BASE_SAMPLES.value:
        raise ValueError(
            f"this run enlarges image_files of {size[0]}x{size[1]}: pass some, --base_samples=runs/NAME/samples.npz"
        )
    low, labels = image_files.read_npz(Path(_BASE_SAMPLES.value))
    if not len(low) or (labels is not None and len(labels) != len(low)):
        count = "no" if labels is None else len(labels)
        raise ValueError(f"--base_samples={_BASE_SAMPLES.value} holds {len(low)} image_files and {count} labels")
    if low.dtype != np.uint8 or low.shape[1:] != (*size, seen.shape[-1]):
        raise ValueError(
            f"--base_samples={_BASE_SAMPLES.value} holds {low.dtype} {low.shape}, but this run enlarges uint8 "
            f"{('N', *size, seen.shape[-1])}"
        )
    low = low[: _NUM_SAMPLES.value]
    if _NUM_SAMPLES.value is not None and len(low) < _NUM_SAMPLES.value:
        raise ValueError(f"--num_samples={_NUM_SAMPLES.value}: {_BASE_SAMPLES.value} holds only {len(low)} image_files")
    if _LABELS.value is None and labels is not None and seen.num_classes:
        if labels.min() < 0 or labels.max() >= seen.num_classes:
            raise ValueError(
                f"{_BASE_SAMPLES.value} has labels outside 0..{seen.num_classes - 1}, the classes of this run"
            )
        return low, labels[: len(low)].astype(np.int32)
    return low, parse_labels(_LABELS.value, len(low), seen.class_names)


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


def trajectory(run: runs.Trained, labels: np.ndarray, low: np.ndarray | None, outdir: Path) -> None:
    """Writes trajectory.png, a row per picture, and trajectory.gif."""
    n = min(len(labels), _STRIP_ROWS)
    keep = min(len(drawing.time_grid(run.config)), _ANIMATION_FRAMES)
    draw = drawing.drawer(run.config, run.seen, keep, run.team)
    _, frames = draw(run.params, np.arange(n), labels[:n], *(() if low is None else (low[:n],)))
    frames = np.asarray(frames)
    chosen = np.unique(np.linspace(0, keep - 1, min(keep, _STRIP_FRAMES)).round().astype(int))
    image_files.save(outdir / "trajectory.png", image_files.strip(frames[chosen]))
    animation = [image_files.grid(frame, min(n, 5)) for frame in frames]
    image_files.save_animation(outdir / "trajectory.gif", animation)


if __name__ == "__main__":
    session.run(main)
