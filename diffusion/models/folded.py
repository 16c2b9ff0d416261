"""Convolutions for classifiers that are only applied: batch normalisation folded in, in full float32 precision.

    scale (conv(x, k) - mean) / sqrt(var + epsilon) + shift = conv(x, a k) + b,   a = scale / sqrt(var + epsilon)   (1)

Batch normalisation with stored statistics is an affine map of each channel, so (1) is exact. The precision is full,
since the reduced one that is the default on a GPU would change features, and so distances. Pools are computed from
shifted images: XLA's windows take a CPU three to five times as long.
"""

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion.cpu import conv

Params = Any


class Conv(nn.Module):
    """Convolution of x [B, H, W, C] with a kernel of `size` and a bias; of each channel by itself with `depthwise`."""

    features: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: Literal["SAME", "VALID"] = "SAME"  # as TensorFlow's
    depthwise: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = 1 if self.depthwise else x.shape[-1]
        kernel = self.param("kernel", nn.initializers.he_normal(), (*self.size, channels, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))[None, None, None]
        if self.depthwise:
            return conv.depthwise(x, kernel, self.stride) + bias
        if self.size == (1, 1) and self.stride == 1:
            return jnp.einsum("bhwc,cd->bhwd", x, kernel[0, 0], precision="highest") + bias
        dimensions = ("NHWC", "HWIO", "NHWC")
        strides = (self.stride, self.stride)
        y = jax.lax.conv_general_dilated(
            x, kernel, strides, self.padding, dimension_numbers=dimensions, precision="highest"
        )
        return y + bias


def max_pool(x: jax.Array, stride: int, padding: Literal["SAME", "VALID"] = "VALID") -> jax.Array:
    """Maxima of 3x3 windows of x [B, H, W, C]; "SAME" only with stride 1."""
    if padding == "SAME":
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    for axis in (1, 2):
        shifts = _shifts(x, axis, stride)
        x = jnp.maximum(jnp.maximum(shifts[0], shifts[1]), shifts[2])
    return x


def mean_pool(x: jax.Array) -> jax.Array:
    """Means of the 3x3 windows around each position of x [B, H, W, C], over the positions that lie in the image."""
    inside = np.pad(np.ones((1, *x.shape[1:3], 1), np.float32), ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for axis in (1, 2):
        x, inside = sum(_shifts(x, axis, 1)), sum(_shifts(inside, axis, 1))
    return x / inside


def _shifts(x: Any, axis: int, stride: int) -> list[Any]:
    """What windows of 3 see at their first, second and third place."""
    last = (x.shape[axis] - 3) // stride * stride + 1
    before = (slice(None),) * axis
    return [x[(*before, slice(i, i + last, stride))] for i in range(3)]


def from_torch(state: Mapping[str, np.ndarray], conv_name: str, norm: str, epsilon: float) -> dict[str, np.ndarray]:
    """`Conv`'s parameters from a convolution of PyTorch and the batch normalisation `norm` after it, eq. (1)."""
    scale = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + np.float32(epsilon))
    kernel = state[f"{conv_name}.weight"].transpose(2, 3, 1, 0) * scale
    return {"kernel": kernel, "bias": state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale}


def checked(params: Params, expected: Params, network: str) -> Params:
    """`params`, if all have the shapes of `expected`; ValueError names the first that has not."""
    for layer, arrays in expected.items():
        for name, array in arrays.items():
            if params[layer][name].shape != array.shape:
                raise ValueError(
                    f"{layer} of {network} has a {name} of shape {params[layer][name].shape}, not {array.shape}: "
                    "these are the weights of another network"
                )
    return params
