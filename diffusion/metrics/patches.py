"""Sliced distance of patches of pixels: what images of any kind are compared by where there is no feature network.

Small patches at random places of each image are compared as sets, eq. (1) of `sliced`. It finds wrong colours, noise,
blur and too little variety; whether the parts of an image belong together, it does not see.
"""

from operator import index

import numpy as np

from diffusion.metrics.blocks import finite
from diffusion.metrics.sliced import sliced_distance

SIZE = 8  # pixels
COUNT = 4  # of each image


def patch_distance(a: np.ndarray, b: np.ndarray, *, directions: int = 200, seed: int = 0) -> float:
    """Sliced distance of random patches of images a [N, *S, C] and b [M, *S, C], values divided by 255.

    As `sliced_distance`, it is above 0 for two sets of one distribution: compare only values with the same N and M.

    Raises:
      ValueError: images of different shapes or without spatial axes, fewer than 1 image, or values that are NaN or
        infinite.
    """
    if a.shape[1:] != b.shape[1:] or a.ndim < 3:
        raise ValueError(f"images must have one shape [N, *S, C], not {a.shape} and {b.shape}")
    # Other places in each set, so that equal positions do not make the sets more alike.
    first, second = (random_patches(x, seed=2 * seed + i) for i, x in enumerate((a, b)))
    return sliced_distance(first, second, directions=directions, seed=seed)


def random_patches(images: np.ndarray, *, size: int = SIZE, count: int = COUNT, seed: int = 0) -> np.ndarray:
    """`count` patches of `size` pixels a side, or of the whole side where it is shorter, of images [N, *S, C].

    Returns [N * count, F] float64, values divided by 255.

    Raises:
      ValueError: size or count below 1, or a value that is NaN or infinite.
    """
    images = finite("images", images)
    if index(size) < 1 or index(count) < 1:
        raise ValueError(f"size={size} and count={count} must be at least 1")
    n, *space, c = images.shape
    sides = [min(size, side) for side in space]
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        starts = [rng.integers(0, side - p + 1, n) for side, p in zip(space, sides, strict=True)]
        # The rows [N, 1, ..], [N, p, 1 ..] .. of indices are broadcast to [N, p, q, ..].
        at = [np.arange(n).reshape(-1, *[1] * len(space))]
        for i, (start, p) in enumerate(zip(starts, sides, strict=True)):
            shape = [n, *[1] * len(space)]
            shape[i + 1] = p
            at.append((start[:, None] + np.arange(p)).reshape(shape))
        found.append(images[tuple(at)].reshape(n, -1).astype(np.float64) / 255)
    return np.concatenate(found)
