"""Bootstrap intervals: how much a number would vary with other images of the same kind (Efron 1979).

Images are drawn with replacement, and the number is computed again. A set with repeated images is a little further
from the real ones than a set without, because the draw adds its own variance: distances of resamples are too large on
average. So the percentiles are moved to have the mean of the resamples at the number itself.
"""

from collections.abc import Callable
from operator import index
from typing import NamedTuple

import numpy as np

from diffusion.metrics import blocks
from diffusion.metrics.distances import kernel_distance


class Interval(NamedTuple):
    """A number lies between `low` and `high`."""

    low: float
    high: float


def bootstrap(
    statistic: Callable[[np.ndarray], float], n: int, *, resamples: int = 200, level: float = 0.95, seed: int = 0
) -> Interval:
    """The interval of `statistic`, a function of the numbers of images, int [n] in 0 .. n - 1, some of them repeated.

    It holds for what the number is on average over sets of n images. Of a distance that average depends on n.

    Raises:
      ValueError: n or resamples < 2, or level outside 0 .. 1.
    """
    _check(n, resamples, level)
    rng = np.random.default_rng(seed)
    values = np.array([statistic(rng.integers(0, n, n)) for _ in range(resamples)])
    return _around(statistic(np.arange(n)), values, level)


def kernel_interval(
    a: np.ndarray, b: np.ndarray, *, resamples: int = 200, level: float = 0.95, seed: int = 0
) -> Interval:
    """`bootstrap` of `distances.kernel_distance` over the rows of a [N, F]; b [M, F] stays.

    Pairs of one image with its own copy are left out, as the distance leaves out pairs of an image with itself. The
    kernel of all pairs is computed once: a row of weights for each resample.

    Raises:
      ValueError: as `bootstrap` and `kernel_distance`.
    """
    a, b = (x.astype(np.float64) for x in blocks.pair(a, b))
    n, f = a.shape
    _check(n, resamples, level)
    rng = np.random.default_rng(seed)
    counts = np.stack([_counts(rng, n) for _ in range(resamples)])
    within, cross = np.zeros(len(counts)), np.zeros(n)
    for i in range(0, n, blocks.ROWS):
        rows = a[i : i + blocks.ROWS]
        kernel = (rows @ a.T / f + 1) ** 3
        kernel[np.arange(len(rows)), np.arange(i, i + len(rows))] = 0
        within += ((counts @ kernel.T) * counts[:, i : i + blocks.ROWS]).sum(1)
        cross[i : i + blocks.ROWS] = ((rows @ b.T / f + 1) ** 3).mean(1)
    pairs = n**2 - np.square(counts).sum(1)
    return _around(kernel_distance(a, b), within / pairs - 2 * counts @ cross / n, level)


def _counts(rng: np.random.Generator, n: int) -> np.ndarray:
    """How often each of n rows is drawn, float64 [n]; drawn again where all are one row, which has no pairs."""
    counts = np.bincount(rng.integers(0, n, n), minlength=n)
    return counts.astype(np.float64) if counts.max() < n else _counts(rng, n)


def _check(n: int, resamples: int, level: float) -> None:
    if index(n) < 2 or index(resamples) < 2:
        raise ValueError(f"n={n} and resamples={resamples} must be at least 2")
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1")


def _around(value: float, resampled: np.ndarray, level: float) -> Interval:
    """Percentiles of the resampled values, whose mean is moved to the value."""
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2]) - resampled.mean() + value
    return Interval(float(low), float(high))
