"""Patches in JAX: arrays [B, *S, C] to tokens [B, N, D] and back, for any number of spatial axes, overlapping or not.

    tokens = P x                     patchify: every window, flattened                             (1)
    P^T tokens                       fold: windows added where they overlap                        (2)
    x = P^T tokens * (1 / P^T 1)     unpatchify: windows averaged where they overlap               (3)

P is linear and made of slices, reshapes and transposes, so its adjoint, which JAX derives, is pads and adds rather than
scatters; sums run over windows in ascending order, last axis first. (On a CPU the values of P x are looked up in a
table instead, see `diffusion.cpu.lookup`.) (3) is the left inverse of (1): exact where one or two windows meet along an
axis, to rounding elsewhere. It multiplies by the reciprocal because XLA would make that of a division anyway, so the
result is the same in and out of jit. For the 2-D overlapping case (3) is the `recompose` of Piantedosi, "Diffusion
model" (piantedosi.github.io/diffusion_model). Windows are in row-major order; inside a token values are ordered
(*patch, C), channels fastest (DiT, JiT, space-to-depth), or (C, *patch) with layout="chw" (PixelUnshuffle).
`diffusion.patch.views` and `diffusion.patch.compiled` do the same on the host, bit for bit.
"""

from collections.abc import Sequence
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.cpu import lookup
from diffusion.patch.geometry import Geometry, array_geometry, check_summable, coverage, token_geometry

_BLOCKS = 64  # terms of one fused sum or concatenation; more are split axis by axis, since programs grow with them


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
    _, cut, _ = array_geometry(x.shape, x.dtype, patch_size, stride, layout)
    return _cut(x, cut, layout)


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
    b, cut, c = token_geometry(tokens.shape, tokens.dtype, size, patch_size, stride, layout)
    check_summable(tokens.dtype)
    # A shape derived from the tokens: inside `shard_map` it varies over the same mesh axes as they do.
    x = jax.eval_shape(lambda tokens: jnp.zeros_like(tokens, shape=(b, *cut.size, c)), tokens)
    (y,) = jax.linear_transpose(lambda x: _slices(x, cut, layout), x)(tokens)
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
    b, cut, c = token_geometry(tokens.shape, tokens.dtype, size, patch_size, stride, layout)
    if cut.patch == cut.stride:
        rank = len(cut.size)
        inner = (c, *cut.patch) if layout == "chw" else (*cut.patch, c)
        first = 1 + rank + (layout == "chw")
        order = [a for axis in range(rank) for a in (1 + axis, first + axis)]
        last = 1 + rank if layout == "chw" else 1 + 2 * rank
        return tokens.reshape(b, *cut.grid, *inner).transpose(0, *order, last).reshape(b, *cut.size, c)
    total = fold(tokens, size, patch_size, stride, layout=layout)
    return total * (1 / coverage(size, patch_size, stride)).astype(tokens.dtype)[None, ..., None]


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
@partial(jax.jit, static_argnums=(1, 2))
def _cut(x: jax.Array, cut: Geometry, layout: str) -> jax.Array:
    """Eq. (1) for windows that tile x; on a CPU by a lookup table, whose derivatives are those of `_slices`."""
    slices = partial(_slices, cut=cut, layout=layout)
    if not lookup.is_faster(x, cut):
        return slices(x)
    return jax.lax.platform_dependent(x, cpu=partial(lookup.look_up, cut=cut, layout=layout), default=slices)


@_cut.defjvp
def _cut_jvp(cut: Geometry, layout: str, primals, tangents):
    return _cut(*primals, cut, layout), _slices(*tangents, cut, layout)


def _slices(x: jax.Array, cut: Geometry, layout: str) -> jax.Array:
    """Eq. (1) in slices of x padded and split into blocks of `stride`: a window is the blocks from its own on."""
    b, c, rank = x.shape[0], x.shape[-1], len(cut.size)
    blocks = [-(-p // s) for p, s in zip(cut.patch, cut.stride, strict=True)]
    shape = [(g + k - 1, s) for g, k, s in zip(cut.grid, blocks, cut.stride, strict=True)]
    if max(blocks) > 1:
        ends = [(0, g * s - n, 0) for (g, s), n in zip(shape, cut.size, strict=True)]
        x = jax.lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), *ends, (0, 0, 0)])
    x = x.reshape(b, *(length for pair in shape for length in pair), c)
    x = x.transpose(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    # Nested, so that each slice has one use: XLA then fuses all of them, and their adjoint, into one pass over memory.
    x = _join_blocks(x, cut, blocks, 0, nested=prod(blocks) <= _BLOCKS)
    x = jnp.moveaxis(x, -1, 1 + rank) if layout == "chw" else x
    return x.reshape(b, prod(cut.grid), prod(cut.patch) * c)


def _join_blocks(x: jax.Array, cut: Geometry, blocks: Sequence[int], axis: int, nested: bool) -> jax.Array:
    """Blocks x [B, *grid + blocks - 1, *stride, C] as windows [B, *grid, *patch, C], for `axis` and those after it."""
    rank = len(blocks)
    if axis == rank:
        return x
    p, s, g = cut.patch[axis], cut.stride[axis], cut.grid[axis]
    parts = []
    for k in range(blocks[axis]):
        part = jax.lax.slice_in_dim(x, k, k + g, axis=1 + axis)
        part = jax.lax.slice_in_dim(part, 0, min(s, p - k * s), axis=1 + rank + axis)
        parts.append(_join_blocks(part, cut, blocks, axis + 1, nested) if nested else part)
    x = parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1 + rank + axis)
    return x if nested else _join_blocks(x, cut, blocks, axis + 1, nested)
