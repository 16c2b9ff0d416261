"""Patches in JAX: arrays [B, *S, C] to tokens [B, N, D] and back, for any number of spatial axes, overlapping or not.

    tokens = P x                     patchify: every window, flattened                             (1)
    P^T tokens                       fold: windows added where they overlap                        (2)
    x = P^T tokens * (1 / P^T 1)     unpatchify: windows averaged where they overlap               (3)

P is linear and made of slices, reshapes and transposes, so its adjoint, which JAX derives, is pads and adds rather than
scatters; sums run over windows in ascending order, last axis first. (3) is the left inverse of (1): exact where one or
two windows meet along an axis, to rounding elsewhere. It multiplies by the reciprocal because XLA would make that of a
division anyway, and so the result is the same in and out of jit. For the 2-D overlapping case (3) is the `recompose` of
Piantedosi, "Diffusion model" (piantedosi.github.io/diffusion_model). Windows are in row-major order; inside a token
values are ordered (*patch, C), channels fastest (DiT, JiT, space-to-depth), or (C, *patch) with layout="chw"
(PixelUnshuffle). `diffusion.patch_numpy` and `diffusion.patch_numba` do the same on the host, bit for bit.
"""

from collections.abc import Sequence
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.geometry import array_geometry, check_summable, coverage, token_geometry


def patchify(
    x: jax.Array, patch_size: int | Sequence[int], stride: int | Sequence[int] | None = None, *, layout: str = "hwc"
) -> jax.Array:
    """Cuts x [B, *S, C] into tokens [B, N, prod(patch) * C], eq. (1).

    Windows of `patch_size` start every `stride` elements (default: `patch_size`). Differentiable; keeps the dtype.

    >>> patchify(jnp.arange(16).reshape(1, 4, 4, 1), 2)[0, 1].tolist()
    [2, 3, 6, 7]

    Raises:
      ValueError: x has no spatial axis, or the windows do not tile it.
    """
    b, shape, c = array_geometry(x.shape, x.dtype, patch_size, stride, layout)
    rank = len(shape.size)
    for axis, (p, s, g) in enumerate(zip(shape.patch, shape.stride, shape.grid, strict=True)):
        # After earlier axes were split the array is [B, g1, p1, ..., n, ...]: this axis stands at 1 + 2 * axis.
        x = _split(x, 1 + 2 * axis, p, s, g)
    windows = range(1, 2 * rank + 1, 2)
    within = range(2, 2 * rank + 1, 2)
    inner = (2 * rank + 1, *within) if layout == "chw" else (*within, 2 * rank + 1)
    return x.transpose(0, *windows, *inner).reshape(b, prod(shape.grid), prod(shape.patch) * c)


def fold(
    tokens: jax.Array,
    size: Sequence[int],
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    layout: str = "hwc",
) -> jax.Array:
    """Adds tokens [B, N, D] back into an array [B, *size, C]; the adjoint of `patchify`, eq. (2).

    >>> fold(jnp.ones((1, 2, 3)), (5,), 3, 2)[0, :, 0].tolist()
    [1.0, 1.0, 2.0, 1.0, 1.0]

    Raises:
      ValueError: N or D does not belong to this geometry.
      TypeError: tokens are integers (sums of overlapping integers would not survive the dtype; convert first).
    """
    b, shape, c = token_geometry(tokens.shape, tokens.dtype, size, patch_size, stride, layout)
    check_summable(tokens.dtype)
    x = jax.ShapeDtypeStruct((b, *shape.size, c), tokens.dtype)
    (y,) = jax.linear_transpose(lambda x: patchify(x, patch_size, stride, layout=layout), x)(tokens)
    return y


def unpatchify(
    tokens: jax.Array,
    size: Sequence[int],
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    layout: str = "hwc",
) -> jax.Array:
    """Puts tokens [B, N, D] back into an array [B, *size, C], averaging overlaps, eq. (3): inverse of `patchify`.

    >>> x = jnp.arange(10.0).reshape(1, 10, 1)
    >>> bool((unpatchify(patchify(x, 4, 2), (10,), 4, 2) == x).all())
    True

    Raises:
      ValueError: N or D does not belong to this geometry.
      TypeError: tokens of overlapping windows are integers (their average is not an integer).
    """
    b, shape, c = token_geometry(tokens.shape, tokens.dtype, size, patch_size, stride, layout)
    if shape.patch == shape.stride:
        rank = len(shape.size)
        inner = (c, *shape.patch) if layout == "chw" else (*shape.patch, c)
        first = 1 + rank + (layout == "chw")
        order = [a for axis in range(rank) for a in (1 + axis, first + axis)]
        last = 1 + rank if layout == "chw" else 1 + 2 * rank
        return tokens.reshape(b, *shape.grid, *inner).transpose(0, *order, last).reshape(b, *shape.size, c)
    total = fold(tokens, size, patch_size, stride, layout=layout)
    return total * (1 / coverage(size, patch_size, stride)).astype(tokens.dtype)[None, ..., None]


def _split(x: jax.Array, axis: int, patch: int, stride: int, grid: int) -> jax.Array:
    """Splits `axis` into (grid, patch): blocks of `stride` elements, the j-th shifted by j * stride, side by side."""
    blocks = []
    for start in range(0, patch, stride):
        width = min(stride, patch - start)
        stop = start + (grid - 1) * stride + width
        block = jax.lax.slice_in_dim(x, start, stop, axis=axis)
        pad = grid * stride - block.shape[axis]
        if pad:
            block = jax.lax.pad(block, np.zeros((), x.dtype), [(0, pad * (a == axis), 0) for a in range(x.ndim)])
        block = block.reshape(*x.shape[:axis], grid, stride, *x.shape[axis + 1 :])
        blocks.append(jax.lax.slice_in_dim(block, 0, width, axis=axis + 1))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis + 1)
