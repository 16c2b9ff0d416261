"""Convolutions that train fast on a CPU too: the gradient to the kernel is a sum over strips of rows.

    y[p] = sum_d x[p + d] k[d]        dL/dk[d] = sum_s sum_{p in strip s} x[p + d]^T dL/dy[p]        (1)

XLA's CPU backend takes the sum over all positions p as one matrix product and does not block it: beyond some thousand
positions, batch included, its operands leave the caches, and a product over 16,384 runs at less than half the speed of
four over 4,096. Other backends are given the gradient whole. Both functions serve flax's `Conv` as its
`conv_general_dilated`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

POSITIONS = 4096  # of a strip
STRIPS = 16  # at most, since each of them is compiled


def conv3x3(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """x [B, H, W, C] and kernel [3, 3, C, D] to [B, H, W, D], with zeros around x; it has no forward derivatives."""
    return _same(x, kernel)


def conv1x1(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """x [B, H, W, C] and kernel [1, 1, C, D] to [B, H, W, D], as the matrix product it is.

    As a convolution its gradient to the kernel takes XLA five times as long on a CPU.
    """
    return jnp.einsum("bhwc,cd->bhwd", x, kernel[0, 0])


def _conv(x: jax.Array, kernel: jax.Array, rows: int) -> jax.Array:
    """With `rows` of zeros above and below."""
    padding = ((rows, rows), (1, 1))
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.custom_vjp
def _same(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _conv(x, kernel, 1)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _same(x, kernel), (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], down: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    (to_x,) = jax.linear_transpose(partial(_conv, kernel=kernel, rows=1), x)(down)
    b, height, width, _ = x.shape
    rows = max(POSITIONS // (b * width), -(-height // STRIPS))
    if rows >= height:
        return to_x, _to_kernel(x, down, 1)
    return to_x, jax.lax.platform_dependent(
        x, down, cpu=partial(_to_kernel_in_strips, rows=rows), default=partial(_to_kernel, rows=1)
    )


_same.defvjp(_forward, _backward)


def _to_kernel(x: jax.Array, down: jax.Array, rows: int) -> jax.Array:
    """Gradient to the kernel of `_conv` with `rows`."""
    kernel = jax.ShapeDtypeStruct((3, 3, x.shape[-1], down.shape[-1]), x.dtype)
    return jax.linear_transpose(lambda kernel: _conv(x, kernel, rows), kernel)(down)[0]


def _to_kernel_in_strips(x: jax.Array, down: jax.Array, rows: int) -> jax.Array:
    """The same for all of a picture, eq. (1), `rows` at a time."""
    x, strips = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0))), range(0, down.shape[1], rows)
    return sum(_to_kernel(x[:, i : i + rows + 2], down[:, i : i + rows], 0) for i in strips)
