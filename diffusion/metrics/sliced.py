"""Sliced Wasserstein distance of features: one-dimensional optimal transport along random directions.

With directions u_1 .. u_M, uniform on the unit sphere of R^F, and W_2 the Wasserstein distance in one dimension, which
pairs sorted values,

    sliced = 3 F / M  sum_m  W_2(u_m . a, u_m . b)^2                                                (1)

Of Inception-v3 features and as many real images as samples this is MIND, the Monge Inception distance (Berthet et al.
2026, 2605.06797), whose factor 3 F puts it on the scale of FID; of other features it is a sliced distance and not MIND.
It needs no covariance, so fewer images than the Frechet distance do. Features shifted by s have the distance 3 |s|^2
on average over directions. All values are float64.
"""

from operator import index

import numpy as np

from diffusion.metrics.blocks import pair

AT_ONCE = 50  # directions whose projections are in memory at once


def sliced_distance(a: np.ndarray, b: np.ndarray, *, directions: int = 1000, seed: int = 0) -> float:
    """Sliced squared 2-Wasserstein distance, eq. (1), of features a [N, F] and b [M, F].

    Sides of different sizes are compared by their quantile functions, which for N = M pairs sorted values. It is 0 for
    equal sets only, and above 0 for two sets of one distribution: compare only values with the same N and M.

    Raises:
      ValueError: directions < 1, fewer than 2 rows, another F, or a value that is NaN or infinite.
    """
    a, b = pair(a, b)
    if index(directions) < 1:
        raise ValueError(f"directions={directions} must be at least 1")
    rng, total, f = np.random.default_rng(seed), 0.0, a.shape[1]
    first, second, weights = _pairing(len(a), len(b))
    for start in range(0, directions, AT_ONCE):
        u = rng.normal(size=(min(AT_ONCE, directions - start), f))
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        x, y = (np.sort(u @ side.T.astype(np.float64), axis=1) for side in (a, b))
        total += (np.square(x[:, first] - y[:, second]) @ weights).sum()
    return float(3 * f * total / directions)


def _pairing(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which of n and of m sorted values are transported to each other, and the mass of each such pair."""
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)  # in units of 1 / (n m), exact
    mass = np.diff(ends, prepend=0)
    return (ends - 1) // m, (ends - 1) // n, mass / (n * m)
