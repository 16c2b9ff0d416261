"""Feature functions: images uint8 [N, H, W, C] -> features float32 [N, F], and logits where the network classifies.

Distances between sets of images are measured in the features of a network. Which network suits depends on the images,
so every metric takes a feature function as an argument:

    features(images) -> Extracted(features [N, F], logits [N, classes] or None)                    (1)

An image's features must not depend on the other images of the array. `digits` has the one for 28x28 digits. A feature
function of your own needs no registration:

    def features(images):
        return Extracted(my_network(images))
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Extracted(NamedTuple):
    """What a feature function returns for N images: features float32 [N, F], logits float32 [N, classes] or None."""

    features: np.ndarray
    logits: np.ndarray | None = None


Features = Callable[[np.ndarray], Extracted]
