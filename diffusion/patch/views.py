"""Patches in NumPy: windows as views of the array, and `patchify`, `fold` and `unpatchify` built on them.

An array in memory is a start, a shape and a stride per axis, the bytes from one element to the next. Cutting windows of
p elements every s elements along an axis of length n and byte stride b needs no copy; the axis becomes two,

    (n; b)  ->  (g; s b), (p; b)        g = (n - p) / s + 1                                        (1)

and the last byte reached, (g - 1) s b + (p - 1) b = (n - 1) b, is the last one of the array. Every condition of (1) is
checked before the view is made, so no combination of arguments reads memory outside the array. Signatures,
order of values, and errors are those of `diffusion.patch`; sums run over windows in ascending order, last axis first.
"""

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.lib.stride_tricks import as_strided

from diffusion.patch.geometry import array_geometry, check_summable, coverage, token_geometry


def windows(
    x: np.ndarray,
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    channels: bool = True,
) -> np.ndarray:
    """Windows of x [B, *S, C] as a read-only view [B, *grid, *patch, C], eq. (1): nothing is copied.

    With `channels=False` x is [B, *S] and the view [B, *grid, *patch]. Any memory layout is allowed (Fortran order,
    slices, negative strides, foreign byte order). Reductions over the patch axes pool, `einsum` convolves.

    >>> x = np.arange(16).reshape(1, 4, 4, 1)
    >>> windows(x, 2).max((3, 4))[0, ..., 0].tolist()  # max pooling
    [[5, 7], [13, 15]]
    >>> np.shares_memory(windows(x, 2), x)
    True

    Raises:
      ValueError: x has no spatial axis, or the windows do not tile it.
      TypeError: x is not numeric.
    """
    x = np.asarray(x)
    if not channels:
        return windows(x[..., None], patch_size, stride)[..., 0]
    _, cut, _ = array_geometry(x.shape, x.dtype, patch_size, stride, "hwc")
    batch, *along, channel = x.strides
    steps = [s * b for s, b in zip(cut.stride, along, strict=True)]
    shape = (x.shape[0], *cut.grid, *cut.patch, x.shape[-1])
    return as_strided(x, shape, (batch, *steps, *along, channel), writeable=False)


def patchify(
    x: np.ndarray, patch_size: int | Sequence[int], stride: int | Sequence[int] | None = None, *, layout: str = "hwc"
) -> np.ndarray:
    """Cuts x [B, *S, C] into tokens [B, N, prod(patch) * C]: a new array of the same dtype.

    >>> patchify(np.arange(16).reshape(1, 4, 4, 1), 2)[0, 1].tolist()
    [2, 3, 6, 7]

    Raises:
      ValueError: x has no spatial axis, the windows do not tile it, or the layout is unknown.
      TypeError: x is not numeric.
    """
    x = np.asarray(x)
    b, cut, c = array_geometry(x.shape, x.dtype, patch_size, stride, layout)
    tokens = np.array(token_view(x, patch_size, stride, layout), order="C")
    return tokens.reshape(b, prod(cut.grid), prod(cut.patch) * c)


def fold(
    tokens: np.ndarray,
    size: Sequence[int],
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    layout: str = "hwc",
) -> np.ndarray:
    """Adds tokens [B, N, D] back into an array [B, *size, C]; the adjoint of `patchify`.

    >>> fold(np.ones((1, 2, 3)), (5,), 3, 2)[0, :, 0].tolist()
    [1.0, 1.0, 2.0, 1.0, 1.0]

    Raises:
      ValueError: N or D does not belong to this geometry.
      TypeError: tokens are integers (sums of overlapping integers would not survive the dtype; convert first).
    """
    tokens = np.asarray(tokens)
    b, cut, c = token_geometry(tokens.shape, tokens.dtype, size, patch_size, stride, layout)
    check_summable(tokens.dtype)
    y = split_tokens(tokens, b, cut, c, layout)
    for axis in reversed(range(len(cut.size))):
        # y is [B, g1 .. gk, p1 .. pk, (axes already summed), C]: the last pair (gk, pk) becomes one axis.
        y = np.moveaxis(y, (1 + axis, 2 + 2 * axis), (0, 1))
        y = np.moveaxis(_overlap_add(y, cut.stride[axis]), 0, 1 + 2 * axis)
    return np.ascontiguousarray(y)


def unpatchify(
    tokens: np.ndarray,
    size: Sequence[int],
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    layout: str = "hwc",
) -> np.ndarray:
    """Puts tokens [B, N, D] back into an array [B, *size, C], averaging overlaps: the inverse of `patchify`.

    >>> x = np.arange(10.0).reshape(1, 10, 1)
    >>> bool((unpatchify(patchify(x, 4, 2), (10,), 4, 2) == x).all())
    True

    Raises:
      ValueError: N or D does not belong to this geometry.
      TypeError: tokens of overlapping windows are integers (their average is not an integer).
    """
    tokens = np.asarray(tokens)
    b, cut, c = token_geometry(tokens.shape, tokens.dtype, size, patch_size, stride, layout)
    if cut.patch == cut.stride:
        return np.array(image_view(split_tokens(tokens, b, cut, c, layout)), order="C").reshape(b, *cut.size, c)
    total = fold(tokens, size, patch_size, stride, layout=layout)
    total *= (1 / coverage(size, patch_size, stride)).astype(tokens.dtype)[..., None]
    return total


def token_view(x: np.ndarray, patch_size, stride, layout: str) -> np.ndarray:
    """`windows` of x with the axes in the order that tokens have in memory."""
    view = windows(x, patch_size, stride)
    return np.moveaxis(view, -1, x.ndim - 1) if layout == "chw" else view


def split_tokens(tokens: np.ndarray, b: int, cut, c: int, layout: str) -> np.ndarray:
    """Tokens [B, N, D] as [B, *grid, *patch, C], whatever the layout: a view where the memory allows one."""
    if layout == "chw":
        return np.moveaxis(tokens.reshape(b, *cut.grid, c, *cut.patch), 1 + len(cut.grid), -1)
    return tokens.reshape(b, *cut.grid, *cut.patch, c)


def image_view(split: np.ndarray) -> np.ndarray:
    """[B, *grid, *patch, C] with each axis of the grid before its axis of the patch: [B, g1, p1, g2, p2, .., C]."""
    rank = split.ndim // 2 - 1
    pairs = [axis for k in range(rank) for axis in (1 + k, 1 + rank + k)]
    return split.transpose(0, *pairs, split.ndim - 1)


def _overlap_add(y: np.ndarray, s: int) -> np.ndarray:
    """Sums windows y [g, p, ...] that start every s elements into [(g - 1) s + p, ...], earlier windows first."""
    g, p, *rest = y.shape
    if s == p:
        return y.reshape(g * p, *rest)
    blocks = -(-p // s)
    total = np.zeros((g + blocks - 1, s, *rest), y.dtype)
    for j in reversed(range(blocks)):  # block j of window i lands on block i + j: the largest j is the earliest window
        part = y[:, j * s : (j + 1) * s]
        total[j : j + g, : part.shape[1]] += part
    return total.reshape((g + blocks - 1) * s, *rest)[: (g - 1) * s + p]
