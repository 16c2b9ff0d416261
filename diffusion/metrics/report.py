"""All numbers of one set of samples, each with the value that real images reach."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion.data import Source
from diffusion.data.batches import checked_images, checked_labels
from diffusion.metrics.distances import (
    agreement,
    distance_and_reference,
    kernel_distance,
    nearest_ratio,
    precision_recall,
    split_real,
)
from diffusion.metrics.features import Extracted, Features

RENAMED = {"floor": "reference", "kernel_floor": "kernel_reference"}  # names that earlier versions wrote


def report(
    images: np.ndarray,
    labels: np.ndarray | None,
    train: Source,
    held_out: Source,
    *,
    features: Features,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, float]:
    """All numbers of n samples uint8 [n, H, W, C] of classes `labels` [n], which should be nearly equal shares.

    `train` has the images that the model was trained on, `held_out` those that it was not trained on. Distances are
    from both together. `features` maps images to features (`diffusion.metrics.features`).

    agreement, agreement_0 ..    share whose largest logit is at their label, of all and of each class that occurs;
                                 only with labels, and with a feature function that returns logits
    distance, reference, ratio   `distance_and_reference`, and the first over the second
    kernel_distance              from the real images without n of them
    kernel_reference             of these n real images from the others (below 0, see `kernel_distance`)
    precision, recall            with respect to these n real images
    nearest_ratio                on pixels

    Raises:
      TypeError: images are not uint8 or labels not integers.
      ValueError: wrong shapes or labels, n < 4, or too few real images (see `distance_and_reference`).
    """
    images = checked_images(images)
    n = len(images)
    if labels is not None:
        labels = checked_labels(labels, n, train.num_classes or None)
    if n < 4:
        raise ValueError(f"measuring needs at least 4 images, better hundreds, not {n}: pass more samples")
    real_labels = np.concatenate([train.labels, held_out.labels])
    part, rest = split_real(real_labels, n, np.random.default_rng(seed))
    real_images = [source.images[:] for source in (train, held_out)]
    nearest = nearest_ratio(images, *real_images)  # before the features, because it checks the shapes

    fake, logits, _ = _extract(features, images)
    real = _extract(features, np.concatenate(real_images)).features
    distance, reference = distance_and_reference(fake, real, real_labels, repeats=repeats, seed=seed)
    precision, recall = precision_recall(real[part], fake)
    agreements = {}
    if labels is not None and logits is not None:
        agreements["agreement"] = agreement(logits, labels)
        agreements |= {f"agreement_{c}": agreement(logits[labels == c], labels[labels == c]) for c in np.unique(labels)}
    return {
        **agreements,
        "distance": distance,
        "reference": reference,
        "ratio": distance / reference,
        "kernel_distance": kernel_distance(fake, real[rest]),
        "kernel_reference": kernel_distance(real[part], real[rest]),
        "precision": precision,
        "recall": recall,
        "nearest_ratio": nearest,
    }


def with_current_names(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A report that was read from a file, with the names that earlier versions wrote replaced by today's."""
    return {RENAMED.get(name, name): value for name, value in stored.items()}


def _extract(features: Features, images: np.ndarray) -> Extracted:
    extracted = features(images)
    if not isinstance(extracted, Extracted):
        raise TypeError(
            "the feature function must return diffusion.metrics.features.Extracted(features [N, F], logits or None), "
            f"not {type(extracted).__name__}"
        )
    return extracted
