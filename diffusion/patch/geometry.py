"""Static geometry of patches: which windows a (patch_size, stride) pair cuts from an array, in any number of axes.

Along an axis of length n, windows of length p start at 0, s, 2s, ...; there are

    g = (n - p) / s + 1                                                                            (1)

of them. They tile the axis, every element covered at least once and none left over, exactly when

    1 <= s <= p <= n   and   (n - p) mod s = 0.                                                    (2)

Every patching function of this package (JAX, NumPy, Numba) takes its shapes and its errors from here.
"""

from collections.abc import Sequence
from math import prod
from operator import index
from typing import NamedTuple

import numpy as np

LAYOUTS = ("hwc", "chw")


class Geometry(NamedTuple):
    """Lengths per spatial axis: array `size`, window `patch`, step `stride` and number of windows `grid`."""

    size: tuple[int, ...]
    patch: tuple[int, ...]
    stride: tuple[int, ...]
    grid: tuple[int, ...]


def per_axis(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """`value` repeated for each of `rank` axes if it is one integer; a sequence must hold `rank` positive integers."""
    try:
        values = tuple(index(v) for v in value) if isinstance(value, Sequence) else (index(value),) * rank
    except TypeError:
        raise TypeError(f"{name}={value!r} must be an integer or a sequence of {rank} integers") from None
    if len(values) != rank:
        raise ValueError(f"{name}={values} has {len(values)} entries for {rank} spatial axes")
    if min(values, default=1) < 1:
        raise ValueError(f"{name}={values} must be positive")
    return values


def geometry(
    size: Sequence[int], patch_size: int | Sequence[int], stride: int | Sequence[int] | None = None
) -> Geometry:
    """Geometry of windows `patch_size` every `stride` (default: `patch_size`, no overlap) over an array of `size`.

    Raises:
      ValueError: the windows do not tile the array, eq. (2); the message names the nearest sizes that do.
      TypeError: a length is not an integer.
    """
    try:
        size = tuple(index(n) for n in size)
    except TypeError:
        raise TypeError(f"size={size!r} must be a sequence of integers, one per spatial axis") from None
    if not size:
        raise ValueError("patching needs at least one spatial axis: the array must be [B, *S, C] with S of length >= 1")
    patch = per_axis("patch_size", patch_size, len(size))
    step = patch if stride is None else per_axis("stride", stride, len(size))
    for axis, (n, p, s) in enumerate(zip(size, patch, step, strict=True)):
        if n < 1:
            raise ValueError(f"spatial axis {axis} has length {n}: there is nothing to cut windows from")
        if p > n:
            raise ValueError(f"patch_size={p} is larger than spatial axis {axis} of length {n}; at most {n} fits")
        if s > p:
            lost = f"stride={s} is larger than patch_size={p}: elements between windows would be lost"
            raise ValueError(f"{lost}; stride={_nearest_stride(n, p, s)} tiles spatial axis {axis} of length {n}")
        if (n - p) % s:
            raise ValueError(_does_not_tile(axis, n, p, s, stride is None))
    return Geometry(size, patch, step, tuple((n - p) // s + 1 for n, p, s in zip(size, patch, step, strict=True)))


def check_layout(layout: str) -> None:
    """Raises ValueError unless `layout` is the order of values inside a token: "hwc" (channels last) or "chw"."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not one of {LAYOUTS}")


def array_geometry(
    shape: Sequence[int], dtype, patch_size: int | Sequence[int], stride: int | Sequence[int] | None, layout: str
) -> tuple[int, Geometry, int]:
    """Batch, geometry and channels of an array [B, *S, C] for `patchify`, with all of its checks.

    Raises:
      ValueError: the shape has no spatial axis, the layout is unknown, or the windows do not tile the array.
      TypeError: `dtype` is not numeric (boolean, integer, floating or complex), or a length is not an integer.
    """
    check_layout(layout)
    _check_numeric("array", dtype)
    if len(shape) < 3:
        raise ValueError(f"expected an array [B, *S, C] with at least one spatial axis, got shape {tuple(shape)}")
    b, *size, c = shape
    return b, geometry(size, patch_size, stride), c


def token_geometry(
    shape: Sequence[int],
    dtype,
    size: Sequence[int],
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    layout: str,
) -> tuple[int, Geometry, int]:
    """Batch, geometry and channels of tokens [B, N, D] for `unpatchify`, with all of its checks.

    Raises:
      ValueError: N or D does not belong to the geometry, the layout is unknown, or the windows do not tile `size`.
      TypeError: `dtype` is not numeric, a length is not an integer, or integers would have to be averaged.
    """
    check_layout(layout)
    _check_numeric("tokens", dtype)
    cut = geometry(size, patch_size, stride)
    n, p = prod(cut.grid), prod(cut.patch)
    if len(shape) != 3 or shape[1] != n or shape[2] % p or not shape[2]:
        raise ValueError(
            f"tokens have shape {tuple(shape)}, but size={cut.size} with patch_size={cut.patch} and "
            f"stride={cut.stride} has shape [B, {n}, {p} * C]"
        )
    if cut.patch != cut.stride:
        check_summable(dtype)
    return shape[0], cut, shape[2] // p


def check_summable(dtype) -> None:
    """Raises TypeError for integers: sums of overlapping windows would overflow, and averages are not integers."""
    if np.can_cast(dtype, np.int64, "same_kind"):
        raise TypeError(f"overlapping windows are added in floating point, not in {np.dtype(dtype)}: convert first")


def coverage(
    size: Sequence[int], patch_size: int | Sequence[int], stride: int | Sequence[int] | None = None
) -> np.ndarray:
    """The number of windows that cover each element, int [*size].

    >>> coverage((5,), 3, 2).tolist()
    [1, 1, 2, 1, 1]
    """
    counts = np.ones((), int)
    for n, p, s, g in zip(*geometry(size, patch_size, stride), strict=True):
        starts = np.arange(g) * s
        position = np.arange(n)[:, None]
        along = ((starts <= position) & (position < starts + p)).sum(1)
        counts = counts[..., None] * along
    return counts


def _check_numeric(what: str, dtype) -> None:
    try:
        # The test that works for extension types such as bfloat16 as well as for NumPy's own.
        numeric = np.can_cast(dtype, np.complex128, "same_kind")
    except TypeError:  # not a NumPy dtype, such as JAX's random keys
        numeric = False
    if not numeric:
        raise TypeError(f"{what} of dtype {dtype} cannot be cut into patches: the dtype must be a number or a boolean")


def _nearest_stride(n: int, p: int, s: int) -> int:
    return min((q for q in range(1, p + 1) if (n - p) % q == 0), key=lambda q: (abs(q - s), -q))


def _does_not_tile(axis: int, n: int, p: int, s: int, stride_follows_patch: bool) -> str:
    nearest = min((q for q in range(1, n + 1) if n % q == 0), key=lambda q: (abs(q - p), q))
    subject = f"patch_size={p}" if stride_follows_patch else f"patch_size={p} with stride={s}"
    return (
        f"{subject} does not tile spatial axis {axis} of length {n}; patch_size={p} with "
        f"stride={_nearest_stride(n, p, s)} does, and so does patch_size={nearest} without overlap"
    )
