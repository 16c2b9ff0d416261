"""The images of a run: opened as its config says, batches for training, and held-out images."""

import numpy as np

from diffusion import data
from experiments.config import Config
from experiments.parts import DataSpec


def source(config: Config, split: str = "train") -> data.Source:
    """The images of a split."""
    c = config.data
    return data.load(c.name, split, size=c.size, crop=c.crop, channels=c.channels, data_dir=c.data_dir)


def data_spec(config: Config, images: data.Source) -> DataSpec:
    """What the network must know of these images; without labels where the config leaves them out."""
    return DataSpec(tuple(images.images.shape[1:]), tuple(images.class_names) if config.data.labels else ())


def batch(config: Config, images: data.Source, step: int) -> dict[str, np.ndarray]:
    """The training batch of a step: {"x": uint8 [B, H, W, C], "y": labels [B]}."""
    c = config.data
    return data.batch(images, config.seed, step, config.train.batch_size, flip=c.flip, shift=c.shift)


def held_out(config: Config, labels: np.ndarray) -> np.ndarray:
    """Held-out images uint8 [N, H, W, C] of these labels [N], repeated where there are too few.

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
