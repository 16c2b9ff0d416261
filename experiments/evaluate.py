"""Measures images against real ones.

    python -m experiments.evaluate --workdir=runs/mnist
    python -m experiments.evaluate --samples=samples.npz --json
    python -m experiments.evaluate --samples=samples.npz --reference=statistics.npz    or folder:PATH, array:PATH, mnist
    python -m experiments.evaluate --reference=folder:PATH --save_reference=statistics.npz

Reads arr_0 [N, H, W, C] and, where there is one, arr_1 [N], the labels that the samples should have: the layout of
`experiments.sample` and of guided-diffusion. They are uint8, or of the type of the run's data, and are then measured as
uint8. Real images are those that the run was trained on and its held-out ones, digits without --workdir, or those of
--reference. A file of statistics (`diffusion.metrics.references`) holds mean and covariance of features, which must be
of the network that is used here: the digits' classifier for digits (without --workdir for all of 28x28x1), and
EfficientNet-Lite0 for other images, or with --inception that of FID. The numbers are explained in `diffusion.metrics`.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from diffusion import data
from diffusion.data.batches import checked_images
from diffusion.data.values import FLAG
from diffusion.io import files
from diffusion.metrics import references
from diffusion.metrics.features import Features, Named
from diffusion.metrics.moments import Gaussian, gaussian, moments
from diffusion.metrics.report import AT_ONCE, against, cautions, comparison, extract, lines
from experiments import command, display, image_files, inputs, report
from experiments.config import Config
from experiments.parts import DataSpec
from experiments.paths import define_path
from experiments.run_dir import RunDir

flags.declare_key_flag("workdir")
_SAMPLES = define_path("samples", None, "File of images; default: samples.npz of --workdir.")
_INCEPTION = define_path(
    "inception",
    None,
    "File with the published weights of Inception-v3, pt_inception-2015-12-05-6726825d.pth: gives FID.",
)
_JSON = flags.DEFINE_bool("json", False, "Print the numbers as JSON.")
_REFERENCE = flags.DEFINE_string(
    "reference",
    None,
    "Real images: a file of statistics .npz, folder:PATH, array:PATH, or a data set; default: those of the run.",
)
_SAVE_REFERENCE = define_path(
    "save_reference", None, "Write statistics of the real images to this file .npz, and measure nothing."
)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    command.start()
    if _REFERENCE.value is not None and not _REFERENCE.value.strip():
        raise ValueError(
            "--reference= names nothing; if it is a shell variable, it may not be set. Leave it out, or pass one"
        )
    config, path, labelled, patches, spec = Config(), Path(_SAMPLES.value or ""), True, None, DataSpec((28, 28, 1))
    if command.has_workdir() or not (_SAMPLES.value or _SAVE_REFERENCE.value):
        folder = RunDir(command.workdir())
        config, spec = folder.stored()
        path, labelled = path if _SAMPLES.value else folder.samples, bool(spec.num_classes)
        patches = report.patches(config, spec)
    if _SAVE_REFERENCE.value:
        print(save_reference(config, _REFERENCE.value, Path(_SAVE_REFERENCE.value)))
        return
    images, labels = image_files.read_npz(path)
    with about(path):
        images = measurable(images, spec)
        if not _REFERENCE.value and images.shape[1:] != spec.shape:
            raise ValueError(
                f"it holds images of shape {images.shape[1:]}, and real ones of {spec.shape} are compared with"
            )
    try:
        features = features_for(config, images.shape[1:])
    except (ImportError, ValueError) as e:
        if _REFERENCE.value or _INCEPTION.value:
            raise
        features = None
        print(f"not compared in features: {e}\n", file=sys.stderr)
    shown = display.eight_bit(images, spec.value_range)
    if _REFERENCE.value:
        values = against_reference(config, shown, _REFERENCE.value, features)
    else:
        with about(path):
            values = report.quality(config, images, labels if labelled else None, features, patches)
    if _JSON.value:
        print(json.dumps({"samples": str(path), **values}, indent=2))
    else:
        print(table(path, shown, values, features and features.name, _REFERENCE.value or config.data.name))


@contextlib.contextmanager
def about(file: Path | str) -> Iterator[None]:
    """Errors about the images or statistics in a file begin with its name."""
    try:
        yield
    except (TypeError, ValueError) as e:
        raise type(e)(f"{file}: {e}") from e


def measurable(images: np.ndarray, spec: DataSpec) -> np.ndarray:
    """Samples of a run with data like `spec`, if they are of its type; images uint8 [N, H, W, C] of any shape.

    Raises:
      TypeError, ValueError: they are of another type, or no images where the run is one of images.
    """
    if spec.plain and len(spec.shape) == 3:
        return checked_images(images)
    if images.dtype != spec.dtype:
        raise TypeError(f"it holds {images.dtype}, but the run was trained on {spec.dtype}")
    return images


def features_for(config: Config, shape: Sequence[int]) -> Named:
    """The features that the flags ask for, for images of this shape [H, W, C].

    Raises:
      ImportError, OSError, ValueError: there are none; see `report.features_for` and `report.fid_features`.
    """
    return report.fid_features(_INCEPTION.value) if _INCEPTION.value else report.features_for(config, tuple(shape))


def against_reference(config: Config, images: np.ndarray, reference: str, features: Named) -> dict[str, Any]:
    """The numbers of samples uint8 [N, H, W, C] with respect to --reference.

    Of a folder or data set at most half as many samples as real images are measured, chosen at random.

    Raises:
      TypeError, ValueError: the samples are of another format, too few, or have other features than the statistics.
      OSError: there is no such file or data set.
    """
    if is_file_of_statistics(reference):
        real = statistics(reference, features)
        with about(reference):
            values = against(extract(features, images), *real)
        return {"measured": len(images), "features": features.name, **values}
    source = opened(config, reference, images.shape[1:])
    print(data.describe(source), end="\n\n", file=sys.stderr)
    source = display.converted(source, display.eight_bit)
    most = len(source.labels) // 2
    if len(images) > most:
        images = images[np.random.default_rng(0).permutation(len(images))[:most]]
    values = comparison(extract(features, images), extract(features, source.images), source.labels)
    return {"measured": len(images), "features": features.name, **values}


def is_file_of_statistics(reference: str) -> bool:
    """Whether --reference names a file of statistics, not images."""
    return reference.endswith(".npz") and not reference.startswith("array:")


def statistics(path: str, features: Features) -> tuple[Gaussian, Gaussian | None]:
    """Mean and covariance of features and of spatial features in a file; of its images where it has no statistics.

    Raises:
      OSError, ValueError: see `diffusion.metrics.references.read`.
    """
    file = Path(path).expanduser()
    found = references.read(file)
    if found.features is not None:
        return found.features, found.spatial
    return gaussians(features, checked_images(image_files.read_npz(file)[0]))


def gaussians(features: Features, images: Any) -> tuple[Gaussian, Gaussian | None]:
    """Mean and covariance of the features, and of the spatial ones, of images that are read a block at a time."""
    with_places: list[np.ndarray] = []

    def blocks() -> Iterator[np.ndarray]:
        for i in range(0, len(images), AT_ONCE):
            found = features(images[i : i + AT_ONCE])
            if found.spatial is not None:
                with_places.append(found.spatial)
            yield found.features

    pooled = gaussian(moments(blocks()))
    return pooled, gaussian(moments(with_places)) if with_places else None


def opened(config: Config, reference: str, shape: Sequence[int] | None) -> data.Source:
    """The images of a folder or data set, of this shape (None: the config's); of a folder all, else those to train on.

    Raises:
      OSError, ValueError: see `diffusion.data.load`.
    """
    c = config.data
    size, channels = (c.size, c.channels) if shape is None else (tuple(shape[:-1]), shape[-1])
    split = "all" if reference.startswith(("folder:", "array:", "datasets:")) else "train"
    if reference.startswith("array:"):
        try:
            source = inputs.load(reference, split, channels=shape[-1] if shape else c.channels, value_range=c.range)
        except ValueError as e:
            if c.range is None and FLAG in str(e):
                raise ValueError(
                    f"--reference={reference} holds other values than uint8, of a range that a run states: pass its "
                    "--workdir, or convert them to uint8 in 0 .. 255"
                ) from e
            raise
        if shape is not None and source.images.shape[1:] != tuple(shape):
            raise ValueError(
                f"{reference} has arrays of shape {source.images.shape[1:]}, and the samples {tuple(shape)}"
            )
        return source
    options = {"bad_files": c.bad_files} if reference.startswith("folder:") else {}
    try:
        return inputs.load(reference, split, size=size, crop=c.crop, channels=channels, data_dir=c.data_dir, **options)
    except ValueError as e:
        if "--config.data." not in str(e):
            raise
        raise ValueError(f"{e}. Here such fields are those of the run: pass --workdir of one that has them") from e


def save_reference(config: Config, reference: str | None, path: Path) -> str:
    """Writes mean and covariance of the features of --reference, or of the run's training images; says what it wrote.

    Raises:
      ValueError: --reference is a file, which holds statistics already, or images cannot be read.
      OSError: there is no such data set, or `path` cannot be written.
    """
    if reference is not None and is_file_of_statistics(reference):
        raise ValueError(f"--save_reference needs images, and --reference={reference} is a file: pass folder:PATH")
    source = inputs.source(config) if reference is None else opened(config, reference, None)
    source = display.converted(source, display.eight_bit)
    features = features_for(config, source.images.shape[1:])
    found = gaussians(features, source.images)
    files.atomic_write(path, lambda file: references.write(file, *found))
    count = f"{len(found[0].mean)} features ({features.name})"
    return f"{path}: mean and covariance of {count} of {len(source.labels):,} images of {source.name}"


def table(path: Path, images: np.ndarray, values: dict[str, Any], features: str | None, reference: str) -> str:
    """The numbers, a line each, with 95 % intervals and what to compare them with, and why they may mislead."""
    warnings = cautions(images, values)
    if values["measured"] < report.ENOUGH:
        warnings.append(report.caution(values["measured"], "experiments.sample --num_samples, and here --samples=FILE"))
    on = f"{values['feature_count']:.0f} features ({features})" if features else "pixels"
    title = f"{values['measured']:,} images of {path}, against {reference}, on {on}"
    return "\n".join([title, "", *lines(values, features), *(f"\n{each}" for each in warnings)])


if __name__ == "__main__":
    command.run(main)
