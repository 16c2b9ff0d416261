"""Rows of features: checked once, and pairs of them in blocks, so that no table of all pairs is in memory."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

T = TypeVar("T")

ROWS = 256  # rows of a table of pairs that are in memory at once
CHUNK = 4096  # rows that are converted to float64 at once


def square_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a_i - b_j|^2 [N, M] of float64 [N, F] and [M, F]; exact for integers such as pixels."""
    gaps = (-2 * a) @ b.T
    gaps += np.square(a).sum(1)[:, None]  # in place, because passes over memory are what costs time here
    gaps += np.square(b).sum(1)
    return np.maximum(gaps, 0, out=gaps)


def by_rows(f: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """f of blocks of the rows x [N, ...], put together: [N, ...]."""
    return np.concatenate(over_blocks(lambda block: f(x[block]), len(x)))


def over_blocks(f: Callable[[slice], T], n: int) -> list[T]:
    """f of slices that cover n rows, ROWS in each, computed in as many threads as there are cores, in their order."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        return list(threads.map(f, [slice(i, i + ROWS) for i in range(0, n, ROWS)]))


def pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays, if their shapes are [N, F] and [M, F] and all values finite.

    Raises:
      ValueError: fewer than 2 rows, another F, or a value that is NaN or infinite.
    """
    a, b = finite("the first features", a), finite("the second features", b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features must be [N, F] and [M, F] with N, M >= 2, not {a.shape} and {b.shape}")
    return a, b


def finite(name: str, x: np.ndarray) -> np.ndarray:
    """x [N, ...] as an array of its own type, if it has rows and all values are finite.

    Raises:
      ValueError: no rows, or a value that is NaN or infinite.
    """
    x = np.asarray(x)
    if not x.size or not x.ndim:
        raise ValueError(f"{name} must have at least one row, not shape {x.shape}")
    bad = 0 if x.dtype.kind in "iub" else sum(int((~np.isfinite(part)).sum()) for part in chunks(x))
    if bad:
        raise ValueError(f"{name} contain {bad} values that are NaN or infinite")
    return x


def chunks(x: np.ndarray) -> list[np.ndarray]:
    """Views of blocks of the rows of x [N, ...]."""
    return [x[i : i + CHUNK] for i in range(0, len(x), CHUNK)]
