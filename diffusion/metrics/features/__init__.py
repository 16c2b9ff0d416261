"""Feature functions: images uint8 [N, H, W, C] -> features float32 [N, F], and logits where the network classifies.

Distances between sets of images are measured in the features of a network. Which network suits depends on the images,
so every metric takes a feature function as an argument:

    features(images) -> Extracted(features [N, F], logits [N, classes] or None)                    (1)

An image's features must not depend on the other images of the array.

    digits         28x28 digits; the weights come with this package
    efficientnet   photographs and other images; the weights come in another package
    inception      FID's network, for numbers that are compared with published ones; the user names the file

A feature function of your own needs no registration; `Named` gives it the name that reports print:

    def features(images):
        return Extracted(my_network(images))

    report(..., features=Named("my network", features))
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Extracted(NamedTuple):
    """What a feature function returns for N images, float32.

    features: [N, F].
    logits: [N, classes], or None.
    spatial: [N, G], features that still know where in the image they are (sFID's), or None.
    """

    features: np.ndarray
    logits: np.ndarray | None = None
    spatial: np.ndarray | None = None


Features = Callable[[np.ndarray], Extracted]


class Named(NamedTuple):
    """A feature function that knows the name of its network, for reports."""

    name: str
    function: Features

    def __call__(self, images: np.ndarray) -> Extracted:
        return self.function(images)


def name_of(features: Features) -> str:
    """The name of a feature function: that of `Named`, else that of the function."""
    return getattr(features, "name", None) or getattr(features, "__name__", type(features).__name__)
