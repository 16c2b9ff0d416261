"""Convolutions for XLA's CPU backend: large images are convolved in strips of rows, and single channels as sums.

    y[p] = sum_d x[p + d] k[d]        dL/dk[d] = sum_s sum_{p in strip s} x[p + d]^T dL/dy[p]        (1)

XLA's CPU backend takes the sum over all positions p as one matrix product and does not block it: beyond some thousand
positions, batch included, its operands leave the caches, and a product over 16,384 runs at less than half the speed of
four over 4,096. With y in strips the gradient is (1) by itself, and derivatives of every kind and order exist. Other
backends are given the convolution whole. `conv3x3` and `conv1x1` serve flax's `Conv` as its `conv_general_dilated`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

POSITIONS = 4096  # of a strip
STRIPS = 16  # at most, since each of them is compiled


def conv3x3(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """x [B, H, W, C] and kernel [3, 3, C, D] to [B, H, W, D], with zeros around x."""
    b, height, width, _ = x.shape
    rows = max(POSITIONS // (b * width), -(-height // STRIPS))
    if rows >= height:
        return _conv(x, kernel, 1)
    return jax.lax.platform_dependent(x, kernel, cpu=partial(_in_strips, rows=rows), default=partial(_conv, rows=1))


def conv1x1(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """x [B, H, W, C] and kernel [1, 1, C, D] to [B, H, W, D], as the matrix product it is.

    As a convolution its gradient to the kernel takes XLA five times as long on a CPU.
    """
    return jnp.einsum("bhwc,cd->bhwd", x, kernel[0, 0])


def _conv(x: jax.Array, kernel: jax.Array, rows: int) -> jax.Array:
    """With `rows` of zeros above and below."""
    padding = ((rows, rows), (1, 1))
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _in_strips(x: jax.Array, kernel: jax.Array, rows: int) -> jax.Array:
    """`_conv` with one row of zeros, `rows` at a time."""
    starts = range(0, x.shape[1], rows)
    x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
    return jnp.concatenate([_conv(x[:, i : i + rows + 2], kernel, 0) for i in starts], 1)


def depthwise(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """x [B, H, W, C] with each channel convolved by itself, kernel [k, k, 1, C], to [B, ceil(H / s), ceil(W / s), C].

    Zeros are around x so that this is the size (TensorFlow's "SAME"). On a CPU it is a sum over the k^2 shifts of x,
    which XLA makes one loop over channels: 4 to 40 times as fast as its convolution by groups.
    """
    return jax.lax.platform_dependent(
        x, kernel, cpu=partial(_shifted, stride=stride), default=partial(_grouped, stride=stride)
    )


def _grouped(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1], precision="highest",
    )  # fmt: skip


def _shifted(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    k, (_, height, width, _) = len(kernel), x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    pad = [max((out - 1) * stride + k - size, 0) for out, size in ((rows, height), (columns, width))]
    x = jnp.pad(x, ((0, 0), *((p // 2, p - p // 2) for p in pad), (0, 0)))
    down, right = stride * (rows - 1) + 1, stride * (columns - 1) + 1
    shifts = [
        x[:, i : i + down : stride, j : j + right : stride] * kernel[i : i + 1, j : j + 1]
        for i in range(k)
        for j in range(k)
    ]
    return sum(shifts[1:], shifts[0])
