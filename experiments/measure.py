"""The end of a run: image_files drawn from the trained weights, and how good they are, in numbers and in words."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from diffusion import evaluate
from diffusion.io import files
from experiments import build, drawing, image_files, session
from experiments.config import Config

# Data sets whose image_files the digit classifier was made for.
DIGITS = ("mnist5k", "mnist")
# Numbers from fewer image_files say little: there are 64 features.
ENOUGH = 100


def finish(
    config: Config, workdir: Path, seen: build.Seen, params: Any, steps: int, seconds: float, log: session.Log
) -> dict[str, Any]:
    """Draws config.sample.count image_files, writes samples.npz, samples.png and report.json, and returns the report.

    An expert, which draws nothing alone, only has its report written. `steps` and `seconds` are those of the training
    that ended here.
    """
    report = {"train_steps": steps, "train_seconds": seconds}
    if config.process.split is not None:
        report |= {"split": config.process.split, "experts": len(config.process.snr_splits) + 1}
        return write_report(workdir, report)
    labels = equal_share(config.sample.count, seen.num_classes)
    low = np.asarray(drawing.shrunk(config, held_out(config, labels))) if config.condition.size else None
    draw = drawing.drawer(config, seen)
    images, sample_seconds = collect(draw, params, labels, config.sample.batch_size, low)
    save(workdir, images, labels, seen.num_classes)
    log.image(steps, "samples", images[0])
    report |= {"sample_seconds": sample_seconds, "sample_count": len(images)}
    if config.condition.size:
        report["condition"] = list(config.condition.size)
    report |= {"sample_steps": len(drawing.time_grid(config)) - 1, "guidance": config.sample.guidance}
    if config.data.name in DIGITS and images.shape[1:] == (28, 28, 1) and len(images) >= 4:
        report |= quality(config, images, labels if seen.num_classes else None)
    return write_report(workdir, report)


def write_report(workdir: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Writes report.json, which makes the run a finished one."""
    text = json.dumps(report, indent=2) + "\n"
    files.atomic_write(workdir / "report.json", lambda file: file.write(text.encode()))
    return report


def equal_share(count: int, classes: int) -> np.ndarray:
    """Labels [count] that go round all classes; zeros if there are none."""
    return np.arange(count) % max(classes, 1)


def held_out(config: Config, labels: np.ndarray) -> np.ndarray:
    """Held-out image_files uint8 [N, H, W, C] of these labels, in turn where there are too few.

    Raises:
      ValueError: there is none of a class.
    """
    source = build.source(config, config.data.held_out)
    if not config.model.conditional or not source.num_classes:
        return source.images[np.arange(len(labels)) % len(source.labels)]
    places = {label: np.flatnonzero(source.labels == label) for label in np.unique(labels)}
    missing = [label for label, found in places.items() if not len(found)]
    if missing:
        raise ValueError(f"{source.name} has no held-out image_files of the classes {missing}; see --config.data.held_out")
    turns = [np.count_nonzero(labels[:i] == label) for i, label in enumerate(labels)]
    return source.images[[places[label][turn % len(places[label])] for label, turn in zip(labels, turns, strict=True)]]


def collect(
    draw: drawing.Draw, params: Any, labels: np.ndarray, batch_size: int, low: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """All image_files [N, H, W, C] of `labels`, drawn behind a progress bar, and the seconds that it took.

    `low` [N, h, w, C] are the smaller image_files that a conditional network starts from.
    """
    batches = []
    with session.Bar(len(labels), "drawing", "picture") as progress:
        for batch in drawing.in_batches(draw, params, labels, batch_size, low):
            batches.append(batch)
            progress.update(len(batch))
            if rate := progress.rate():  # unknown after the first batch, which compiles
                progress.note(f"{rate:.0f} image_files/s")
        seconds = progress.seconds()
    return np.concatenate(batches), seconds


def save(folder: Path, images: np.ndarray, labels: np.ndarray, classes: int) -> None:
    """Writes samples.npz with all image_files and samples.png with the first rows of them."""
    image_files.save_npz(folder / "samples.npz", images, labels if classes else None)
    columns = min(len(images), classes if 1 < classes <= 20 else 10)
    image_files.save(folder / "samples.png", image_files.grid(images[: 10 * columns], columns))


def quality(config: Config, images: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
    """`diffusion.evaluate.report` of digits, without agreements where there are no labels.

    Half as many image_files as there are real ones are enough, and leave the other half to compare with; of more, as many
    are measured, chosen by chance. `measured` says how many.

    Raises:
      TypeError, ValueError: those are no digits, or too few; see `diffusion.evaluate.report`.
    """
    train, held_out = build.source(config, "train"), build.source(config, "test")
    most = (len(train.labels) + len(held_out.labels)) // 2
    chosen = np.random.default_rng(0).permutation(len(images))[:most] if len(images) > most else np.arange(len(images))
    asked_for = np.zeros(len(images), int) if labels is None else labels
    if len(asked_for) != len(images):
        raise ValueError(f"there are {len(asked_for)} labels for {len(images)} image_files")
    values = evaluate.report(images[chosen], asked_for[chosen], train, held_out)
    if labels is None:
        values = {name: value for name, value in values.items() if not name.startswith("agreement")}
    return {"measured": len(chosen), **values}


def paragraph(workdir: Path, report: dict[str, Any]) -> str:
    """What a run reached, in words, and what to type next."""
    if "split" in report:
        others = [f"{workdir}" if i == report["split"] else f"WORKDIR{i}" for i in range(report["experts"])]
        return (
            f"Trained expert {report['split']} of {report['experts']}, {report['train_steps']} steps in "
            f"{minutes(report['train_seconds'])}. Alone it draws nothing; what it restores: {workdir / 'previews'}.\n"
            f"Next, with all experts: python -m experiments.sample --workdir={','.join(others)} --num_samples=64"
        )
    words = [
        f"Trained {report['train_steps']} steps in {minutes(report['train_seconds'])}, then drew "
        f"{report['sample_count']} image_files in {minutes(report['sample_seconds'])} "
        f"({report['sample_steps']} steps each, guidance {report['guidance']:g})."
    ]
    if "distance" in report:
        words.append(
            f"Feature distance to real digits: {report['distance']:.2f}, {report['distance'] / report['floor']:.2f} "
            f"times the {report['floor']:.2f} of as many real digits (1 would be as good as real; lower is better)."
        )
    else:
        words.append("There is no feature network for image_files like these: look at them.")
    if report.get("agreement") is not None:
        words.append(
            f"An independent classifier reads the digit that was asked for in {report['agreement']:.1%} of them."
        )
    if report.get("measured", ENOUGH) < ENOUGH:
        words.append(caution(report["measured"], "--config.sample.count"))
    words.append(f"Pictures: {workdir / 'samples.png'}; arrays: {workdir / 'samples.npz'}.")
    enlarges = " --base_samples=runs/NAME/samples.npz" if report.get("condition") else " --num_samples=64 --trajectory"
    return " ".join(words) + f"\nNext: python -m experiments.sample --workdir={workdir}{enlarges}"


def caution(count: int, flag: str) -> str:
    """What to think of numbers from so few image_files, and the flag that draws more."""
    return f"Of {count} image_files these numbers are mostly chance: draw {ENOUGH} or more, better 1,000 ({flag})."


def minutes(seconds: float) -> str:
    """A duration in words."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} minutes"
