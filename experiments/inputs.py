"""The images of a run, or its other arrays: opened as its config says, batches for training, and held-out images."""

from typing import Any

import numpy as np

from diffusion import data
from experiments.config import Config
from experiments.parts import DataSpec
from experiments.paths import cache_folder
from experiments.progress import Reading


def source(config: Config, split: str = "train") -> data.Source:
    """The images of a split."""
    c = config.data
    names = ("size", "crop", "channels", "data_dir", "class_names_in", "bad_files")
    return load(c.name, split, **{name: getattr(c, name) for name in names}, value_range=c.range)


def load(name: str, split: str, **options: Any) -> data.Source:
    """`diffusion.data.load`, which shows its progress and remembers the files that it checked."""
    with Reading() as progress:
        return data.load(name, split, **options, cache_dir=cache_folder() / "images", progress=progress)


def data_spec(config: Config, images: data.Source) -> DataSpec:
    """What the network must know of these images; without labels where the config leaves them out."""
    names = tuple(images.class_names) if config.data.labels else ()
    return DataSpec(tuple(images.images.shape[1:]), names, str(images.dtype), images.value_range)


def batch(config: Config, images: data.Source, step: int, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The training batch of a step: {"x": [B, *S, C] of the data's type, "y": labels [B]}; or these rows of it."""
    c = config.data
    return data.batch(images, config.seed, step, config.train.batch_size, flip=c.flip, shift=c.shift, rows=rows)


def held_out(config: Config, labels: np.ndarray) -> np.ndarray:
    """Held-out images [N, *S, C] of these labels [N], repeated where there are too few.

    Raises:
      ValueError: there is none of a class.
    """
    images = source(config, config.data.held_out)
    if not config.data.labels or not images.num_classes:
        return images.images[np.arange(len(labels)) % len(images.labels)]
    places = {label: np.flatnonzero(images.labels == label) for label in np.unique(labels).tolist()}
    missing = [label for label, found in places.items() if not len(found)]
    if missing:
        raise ValueError(f"{images.name} has no held-out images of the classes {missing}; see --config.data.held_out")
    turns = [np.count_nonzero(labels[:i] == label) for i, label in enumerate(labels)]
    return images.images[[places[label][turn % len(places[label])] for label, turn in zip(labels, turns, strict=True)]]


def equal_shares(count: int, classes: int) -> np.ndarray:
    """Labels [count] that cycle through all classes; zeros if there are none."""
    return np.arange(count) % max(classes, 1)
