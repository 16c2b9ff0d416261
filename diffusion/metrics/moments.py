"""Mean and covariance of features that arrive in batches, and the Frechet distance between two Gaussians.

Of n rows x_i with mean m, M = sum_i (x_i - m)(x_i - m)^T is kept instead of the rows: [F, F] for any n. Rows with
n', m', M' are added by (Chan, Golub and LeVeque 1983)

    M'' = M + M' + (m' - m)(m' - m)^T n n' / (n + n')                                               (1)

which, unlike sum_i x_i x_i^T, loses no digits where the mean is large. The squared Frechet distance between the
Gaussians with means m and covariances S = M / (n - 1) is (Dowson and Landau 1982)

    |m_a - m_b|^2 + tr(S_a + S_b) - 2 sum_i sqrt(lambda_i),   lambda = eig(S_a^1/2 S_b S_a^1/2)      (2)

whose matrix is symmetric: its eigenvalues are real, and those that rounding makes negative are 0. With F = 2,048 the
distance called FID is this one, of features of the published Inception-v3; with spatial features it is called sFID.
All values are float64.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from diffusion.metrics.blocks import chunks, finite


class Moments(NamedTuple):
    """Of `count` rows: `mean` [F] and `m2` [F, F], M of eq. (1)."""

    count: int
    mean: np.ndarray
    m2: np.ndarray


class Gaussian(NamedTuple):
    """`mean` [F] and `covariance` [F, F]."""

    mean: np.ndarray
    covariance: np.ndarray


def moments(features: np.ndarray | Iterable[np.ndarray]) -> Moments:
    """Moments of features [N, F], or of an iterable of such batches, of which one is in memory at a time.

    Raises:
      ValueError: no rows, batches with another F, or a value that is NaN or infinite.
    """
    total = None
    for batch in [features] if isinstance(features, np.ndarray) else features:
        for part in chunks(_rows(batch)):
            total = _of(part) if total is None else merge(total, _of(part))
    if total is None:
        raise ValueError("there are no features: pass at least one batch [N, F]")
    return total


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the rows of both, eq. (1).

    Raises:
      ValueError: they have another F.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"batches of {len(a.mean)} and of {len(b.mean)} features cannot be added: use one network")
    count, shift = a.count + b.count, b.mean - a.mean
    m2 = a.m2 + b.m2 + np.outer(shift, shift * (a.count * b.count / count))
    return Moments(count, a.mean + shift * (b.count / count), m2)


def gaussian(x: Moments) -> Gaussian:
    """Mean and unbiased covariance M / (n - 1).

    Raises:
      ValueError: fewer than 2 rows.
    """
    if x.count < 2:
        raise ValueError(f"a covariance needs at least 2 rows, not {x.count}")
    return Gaussian(x.mean, x.m2 / (x.count - 1))


def frechet(a: Gaussian, b: Gaussian, root: np.ndarray | None = None) -> float:
    """Squared Frechet distance, eq. (2). `root` is `square_root(a.covariance)`, where it is known.

    Raises:
      ValueError: they have another F.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"the two sides have {len(a.mean)} and {len(b.mean)} features, so they come from different networks: "
            "measure both with one"
        )
    root = square_root(a.covariance) if root is None else root
    product = root @ b.covariance @ root
    cross = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0)).sum()
    squared = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return float(max(squared, 0.0))


def square_root(covariance: np.ndarray) -> np.ndarray:
    """Symmetric square root of a positive semidefinite matrix [F, F]."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def scarce(count: int, features: int) -> str | None:
    """Why a Frechet distance from so few rows says little, or None: their covariance has not full rank."""
    if count > features:
        return None
    return (
        f"{count} images are too few for the Frechet distance in {features} features: their covariance has rank "
        f"{count - 1} at most, and the distance depends mostly on how many there are; measure more than {features}, or "
        "use the kernel distance"
    )


def _of(rows: np.ndarray) -> Moments:
    rows = rows.astype(np.float64)
    mean = rows.mean(0)
    rows -= mean
    return Moments(len(rows), mean, rows.T @ rows)


def _rows(batch: np.ndarray) -> np.ndarray:
    batch = finite("the features", batch)
    if batch.ndim != 2:
        raise ValueError(f"features must be [N, F], not {batch.shape}")
    return batch
