"""The end of a run: samples of the trained weights, measured where there are features for them, and a report."""

from typing import Any

import numpy as np

from experiments import figures, image_files, inputs, page, parts, processes, report, sampling
from experiments.config import Config
from experiments.log import Log
from experiments.run_dir import RunDir


def finish(
    config: Config, run: parts.Parts, folder: RunDir, params: Any, steps: int, seconds: float, log: Log
) -> dict[str, Any]:
    """Makes config.sample.count samples, writes them and their report, and returns the report.

    Files: samples.npz, samples.png, the images of `draw`, report.json, which marks a run as finished, and report.html.
    One expert cannot sample alone: it has only the last two. `steps` and `seconds` are those of the training. Several
    processes make the samples together; the first one measures and writes, and has the whole report.
    """
    reached = {"train_steps": steps, "train_seconds": seconds}
    if run.split is not None:
        reached |= {"split": run.split, "experts": len(run.bounds) + 1}
        if not processes.first():
            return reached
        folder.write_report(reached)
        page.write(folder)
        return reached
    labels = inputs.equal_shares(config.sample.count, run.spec.num_classes)
    low = np.asarray(sampling.low_resolution(run, inputs.held_out(config, labels))) if run.superres else None
    sample = sampling.sample_fn(run, finite=True)
    images, sample_seconds, finite = report.collect(sample, params, labels, config.sample.batch_size, low)
    frames = None
    try:
        frames = figures.film(run, params, labels, low)
    except (ValueError, RuntimeError, MemoryError) as e:
        if processes.several():
            raise  # the others may be waiting for this one
        print(f"samples on their way from noise could not be made: {e}")
    if not processes.first():
        return reached
    grid = report.save(folder.samples, folder.samples_image, images, labels, run.spec)
    log.image(steps, "samples", np.asarray(grid))
    reached |= {"sample_seconds": sample_seconds, "sample_count": len(images)}
    if not finite.all():
        reached["sample_non_finite"] = int((~finite).sum())
    if run.superres:
        reached["condition"] = list(run.superres.size)
    reached |= {"sample_steps": len(run.grid) - 1}
    if run.spec.num_classes:
        reached["guidance"] = config.sample.guidance
    features = None
    try:
        features = report.features_for(config, run.spec.shape)
    except (ImportError, ValueError) as e:
        reached["unmeasured"] = str(e)
    try:
        given = labels if run.spec.num_classes else None
        reached |= report.quality(config, images, given, features, report.patches(config, run.spec))
    except ValueError as e:  # the samples are there, and the training must not end with an error
        reached["unmeasured"] = str(e)
    folder.write_report(reached)  # before what is only to look at
    try:
        draw(config, run, folder, frames, images[finite])
    except (ValueError, OSError, RuntimeError, MemoryError) as e:
        print(f"some images of the report could not be made: {e}")
    page.write(folder)
    log.tell(steps, {f"report/{name}": value for name, value in reached.items() if isinstance(value, int | float)})
    return reached


def draw(config: Config, run: parts.Parts, folder: RunDir, frames: np.ndarray | None, images: np.ndarray) -> None:
    """Writes what numbers alone do not show: samples on their way from noise, the nearest training images, seams.

    `frames` are those of `figures.film`, if there are any; `images` [N, *S, C] are the samples that are finite.
    """
    if frames is not None:
        image_files.save(folder.film_strip, figures.film_strip(frames))
    if not len(images):
        return
    train, cut = inputs.source(config), report.patches(config, run.spec)
    image_files.save(folder.nearest_image, figures.nearest_pairs(images, train))
    if cut is not None:
        image_files.save(folder.seam_image, figures.seam_maps(images, train, cut))
