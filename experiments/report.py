"""What is said of samples: how they are made and saved with progress shown, their numbers, and these in words."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion.data import Source
from diffusion.metrics.features import Extracted, Named, digits, efficientnet, inception
from diffusion.metrics.report import report as measure
from diffusion.metrics.seams import has_seams
from experiments import display, image_files, inputs, parts, sampling
from experiments.config import Config
from experiments.progress import Bar
from experiments.run_dir import RunDir

# Data sets whose images the digit classifier was trained for.
DIGITS = ("mnist5k", "mnist")
DIGIT_FEATURES = Named(digits.NAME, digits.digit_features)
# Numbers from fewer images say little: there are 64 features.
ENOUGH = 100
# Of a data set that is not digits at most so many real images are compared: a large network takes 20 ms for each.
# They are in memory at once, so they are also at most so many bytes, as float64.
REAL, REAL_BYTES = 5_000, 4 << 30


def _image_features(images: np.ndarray) -> Extracted:
    with Bar(len(images), "features", "image") as progress:
        return efficientnet.efficientnet_features(images, progress=progress.update)


IMAGE_FEATURES = Named(efficientnet.NAME, _image_features)


def fid_features(path: str) -> Named:
    """FID's features, with the published weights of Inception-v3 in the file `path`.

    Raises:
      OSError, ValueError: the file is missing or another one.
    """
    params = inception.load_weights(path)

    def features(images: np.ndarray) -> Extracted:
        with Bar(len(images), "features", "image") as progress:
            return inception.inception_features(images, params, progress.update)

    return Named(inception.NAME, features)


def collect(
    sample: sampling.SampleFn, params: Any, labels: np.ndarray, batch_size: int, low: np.ndarray | None = None
) -> tuple[np.ndarray, float, np.ndarray]:
    """Samples [N, *S, C] of `labels`, made with a progress bar, the seconds that they took, and which are finite [N].

    `sample` is `sampling.sample_fn(..., finite=True)`. `low` [N, h, w, C] are the low-resolution images of a
    super-resolution network.
    """
    batches, finite = [], []
    with Bar(len(labels), "sampling", "image") as progress:
        for batch, whole in sampling.in_batches(sample, params, labels, batch_size, low):
            batches.append(batch)
            finite.append(whole)
            progress.update(len(batch))
            if rate := progress.rate():  # unknown after the first batch, which compiles
                progress.note(f"{rate:.0f} images/s")
        seconds = progress.seconds()
    return np.concatenate(batches), seconds, np.concatenate(finite)


def non_finite(count: int, total: int) -> str:
    """What samples that hold NaN are, and what to do."""
    return (
        f"{count} of {total} samples hold NaN or infinite values, which are black or white in the images: the network "
        "or the sampler diverged. Sample from an earlier --checkpoint, with less --guidance or with other --steps."
    )


def save(arrays: Path, image: Path, images: np.ndarray, labels: np.ndarray, spec: parts.DataSpec) -> Image.Image:
    """Writes all samples to the file `arrays` (.npz), in the type and range of the data, and images of the first rows
    of them to `image` (.png), which it returns."""
    classes = spec.num_classes
    image_files.save_npz(arrays, of_type(images, spec), labels if classes else None)
    columns = min(len(images), classes if 1 < classes <= 20 else 10)
    grid = image_files.grid(display.as_images(images[: 10 * columns], spec.value_range), columns)
    image_files.save(image, grid)
    return grid


def of_type(images: np.ndarray, spec: parts.DataSpec) -> np.ndarray:
    """Samples in the data's type, also where it has 64 bits and they were computed with 32."""
    if images.dtype == spec.dtype:
        return images
    return np.clip(images.astype(spec.dtype), *np.array(spec.value_range, spec.dtype))


def features_for(config: Config, shape: tuple[int, ...]) -> Named:
    """The features in which samples of `shape` [H, W, C] are compared with the data of a run.

    Digits of 28x28 have a classifier of their own; everything else is compared with EfficientNet-Lite0.

    Raises:
      ImportError: the package with the weights of EfficientNet-Lite0 is not installed; the message says how to.
      ValueError: there are no features for such arrays.
    """
    if config.data.name in DIGITS and tuple(shape) == (28, 28, 1):
        return DIGIT_FEATURES
    if len(shape) != 3 or shape[-1] not in (1, 3):
        raise ValueError(f"there are features for images with 1 or 3 channels, and none for arrays of shape {shape}")
    efficientnet.check_installed()
    return IMAGE_FEATURES


def patches(config: Config, spec: parts.DataSpec) -> tuple[int, int | None] | None:
    """Patch size and stride of a run's network, for the seam metric; None where the patches of images have no seams."""
    if len(spec.shape) != 3:
        return None
    found = config.model.patch_size, getattr(config.model, "stride", None)
    return found if has_seams(spec.shape[:-1], *found) else None


def quality(
    config: Config,
    images: np.ndarray,
    labels: np.ndarray | None,
    features: Named | None,
    patches: tuple[int, int | None] | None = None,
) -> dict[str, Any]:
    """`diffusion.metrics.report.report` of samples against the data of `config`, and the name of the features.

    Samples and data of another type than uint8 have their range scaled to 0 .. 255, and for features they are rounded.
    Without features (None) only what follows from pixels is measured.

    The logits of digits are compared with the labels; other networks know other classes. At most half as many samples
    as there are real images are measured, chosen at random, since as many real images are compared with the other half.
    `measured` is their number. With EfficientNet-Lite0, or without features, at most `REAL` real images are compared.
    Real digits in the place of the samples have their classes; other real images have the shares of all of them.

    Raises:
      TypeError, ValueError: the samples are of another format, or too few; see `diffusion.metrics.report.report`.
    """
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"there are {len(labels)} labels for {len(images)} images")
    convert = display.scaled if features is None else display.eight_bit
    real = [inputs.source(config, split) for split in ("train", config.data.held_out)]
    images = convert(images, real[0].value_range)
    real = [display.converted(source, convert) for source in real]
    if features != DIGIT_FEATURES:
        labels = None
    training = real[0].images  # a copy of any of them counts
    if features in (IMAGE_FEATURES, None):
        real = _subset(real)
    most = sum(len(source.labels) for source in real) // 2
    chosen = np.random.default_rng(0).permutation(len(images))[:most] if len(images) > most else np.arange(len(images))
    labels = None if labels is None else labels[chosen]
    values = measure(images[chosen], labels, *real, features=features, patches=patches, training=training)
    return {"measured": len(chosen), **({} if features is None else {"features": features.name}), **values}


def _subset(real: list[Source]) -> list[Source]:
    """At most `REAL` images of both sources, and `REAL_BYTES` bytes of them as float64, in proportion, at random."""
    total = sum(len(source.labels) for source in real)
    most = max(min(REAL, REAL_BYTES // (8 * math.prod(real[0].images.shape[1:]))), 8)
    if total <= most:
        return real
    found = []
    for source in real:
        n = len(source.labels)
        rows = np.sort(np.random.default_rng(0).permutation(n)[: max(n * most // total, 2)])
        found.append(source._replace(images=source.images[rows], labels=source.labels[rows]))
    return found


def paragraph(workdir: Path, report: dict[str, Any]) -> str:
    """A report in words, and what to type next."""
    if "split" in report:
        others = [f"{workdir}" if i == report["split"] else f"WORKDIR{i}" for i in range(report["experts"])]
        return (
            f"Trained expert {report['split']} of {report['experts']}, {report['train_steps']} steps in "
            f"{minutes(report['train_seconds'])}. Alone it cannot sample; see what it denoises: "
            f"{RunDir(workdir).previews}.\n"
            f"Next, with all experts: python -m experiments.sample --workdir={','.join(others)} --num_samples=64"
        )
    guidance = f", guidance {report['guidance']:g}" if "guidance" in report else ""
    words = [
        f"Trained {report['train_steps']} steps in {minutes(report['train_seconds'])}, then made "
        f"{report['sample_count']} samples in {minutes(report['sample_seconds'])} "
        f"({report['sample_steps']} step{'s' * (report['sample_steps'] > 1)} each{guidance})."
    ]
    if report.get("sample_non_finite"):
        words.append(non_finite(report["sample_non_finite"], report["sample_count"]))
    if "distance" in report:
        words.append(
            f"{_distance_name(report)} to real images: {report['distance']:.2f}, "
            f"{report['ratio']:.2f} times the {report['reference']:.2f} of as many real images "
            "(1 would be as good as real; lower is better)."
        )
    else:
        reason = report.get("unmeasured", "there is no feature network for this data set")
        words.append(
            f"{'Not compared in features' if 'patch_distance' in report else 'Nothing was measured'}: {reason}."
        )
    if "distance" not in report and "patch_distance" in report:
        real = f", of as many real images {report['patch_reference']:.3f}" if "patch_reference" in report else ""
        words.append(f"Sliced distance of patches of pixels: {report['patch_distance']:.3f}{real} (lower is better).")
    if report.get("agreement") is not None:
        words.append(f"An independent classifier reads the label as given in {report['agreement']:.1%} of them.")
    if report.get("measured", ENOUGH) < ENOUGH:
        words.append(
            caution(report["measured"], "experiments.sample --num_samples, and experiments.evaluate --samples")
        )
    folder = RunDir(workdir)
    words.append(f"Report: {folder.page}; images: {folder.samples_image}; arrays: {folder.samples}.")
    enlarges = " --base_samples=runs/NAME/samples.npz" if report.get("condition") else " --num_samples=64 --trajectory"
    return " ".join(words) + f"\nNext: python -m experiments.sample --workdir={workdir}{enlarges}"


def _distance_name(report: dict[str, Any]) -> str:
    """FID is said of Inception-v3 with the published weights only; `fid_features` takes no others."""
    name = report.get("features", digits.NAME)  # which earlier versions did not write
    return "FID" if name == inception.NAME else f"Frechet distance on {name}"


def caution(count: int, flag: str) -> str:
    """A warning for numbers from few samples, with the flag that makes more."""
    return f"Of {count} samples these numbers are mostly noise: make {ENOUGH} or more, better 1,000 ({flag})."


def minutes(seconds: float) -> str:
    """A duration in words."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} minutes"
