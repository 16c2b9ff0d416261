"""Static geometry of patches: which windows a (patch_size, stride) pair cuts from an array, in any number of axes.

Along an axis of length n, windows of length p start at 0, s, 2s, ...; there are

    g = (n - p) / s + 1                                                                            (1)

of them. They tile the axis, every element covered at least once and none left over, exactly when

    1 <= s <= p <= n   and   (n - p) mod s = 0.                                                    (2)

Every patching function of this package (JAX, NumPy, Numba) takes its shapes and its errors from here.
"""

from collections.abc import Sequence
from operator import index
from typing import NamedTuple

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
      ValueError: the windows do not tile the array, eq. (2); the message names the nearest patch size and stride that do.
      TypeError: a length is not an integer.
    """
    size = tuple(index(n) for n in size)
    if not size:
        raise ValueError("patching needs at least one spatial axis: the array must be [B, *S, C] with S of length >= 1")
    patch = per_axis("patch_size", patch_size, len(size))
    step = patch if stride is None else per_axis("stride", stride, len(size))
    for axis, (n, p, s) in enumerate(zip(size, patch, step, strict=True)):
        if p > n:
            raise ValueError(f"patch_size={p} is larger than spatial axis {axis} of length {n}")
        if s > p:
            raise ValueError(f"stride={s} is larger than patch_size={p}: elements between windows would be lost")
        if (n - p) % s:
            raise ValueError(_does_not_tile(axis, n, p, s, stride is None))
    return Geometry(size, patch, step, tuple((n - p) // s + 1 for n, p, s in zip(size, patch, step, strict=True)))


def check_layout(layout: str) -> None:
    """Raises ValueError unless `layout` is the order of values inside a token: "hwc" (channels last) or "chw"."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not one of {LAYOUTS}")


def _does_not_tile(axis: int, n: int, p: int, s: int, stride_follows_patch: bool) -> str:
    nearest = min((q for q in range(1, n + 1) if n % q == 0), key=lambda q: (abs(q - p), q))
    strides = [q for q in range(1, p + 1) if (n - p) % q == 0]
    step = min(strides, key=lambda q: (abs(q - s), -q))
    subject = f"patch_size={p}" if stride_follows_patch else f"patch_size={p} with stride={s}"
    return (
        f"{subject} does not tile spatial axis {axis} of length {n}; "
        f"patch_size={p} with stride={step} does, and so does patch_size={nearest} without overlap"
    )
