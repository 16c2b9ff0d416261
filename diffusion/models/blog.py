"""The blog's transformer: attention alone, on raw patches, with the noise level as one more token.

    z0 = [patchify(xt); alpha 1] + E,   z_{l+1} = MHA_l(z_l) + z0,   pred = z_L without its last token    (1)

Piantedosi, "Diffusion model" (piantedosi.github.io/diffusion_model). As published, the residual is always taken from
z0, there is no norm and no MLP, and the network predicts per patch (compare `recomposed`). Initialisation is Keras's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion.models.base import DEFAULT_TASK, Model, Task, check_names, from_fields, from_module
from diffusion.patch import patchify
from diffusion.process import Path


@dataclass(kw_only=True)
class Blog:
    """Arguments of the network of eq. (1): xt [B, *S, C] -> tokens [B, N, D]; 7.8 M parameters as published.

    It is unconditional, and its last token holds alpha(t) of the path of its `Task`.
    """

    conditional: ClassVar[bool] = False
    variances: ClassVar[tuple[str, ...]] = ("none",)
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    returns_tokens: ClassVar[bool] = True

    patch_size: int = 18
    stride: int | None = 10
    depth: int = 3
    heads: int = 20
    head_dim: int = 100

    def model(self, task: Task = DEFAULT_TASK) -> Model:
        """The network for a task, which must have a path.

        Raises:
          ValueError: the task has no path, has classes, or asks for a learned variance.
        """
        check_names(self, task)
        if task.path is None:
            raise ValueError("path=None: the last token of this network is alpha(t) of a path; pass one")
        return from_module(_Blog(replace(self), lambda t: task.path(t)[0]), num_classes=0)


def blog(path: Path, **fields: Any) -> Model:
    """The network of eq. (1) for a path, from the fields of `Blog`."""
    return from_fields(Blog, {"path": path, **fields})


class _Blog(nn.Module):
    net: Blog
    level: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, xt: jax.Array, t: jax.Array, y: jax.Array | None, train: bool) -> jax.Array:
        del y, train
        net = self.net
        tokens = patchify(xt, net.patch_size, net.stride)  # (B, N, D)
        b, n, d = tokens.shape
        level = jnp.broadcast_to(self.level(t)[:, None, None], (b, 1, d)).astype(tokens.dtype)
        positions = self.param("positions", _keras_uniform, (n + 1, d))
        start = jnp.concatenate([tokens, level], 1) + positions[None]
        z = start
        for layer in range(net.depth):
            # The last layer's output for the level token is not part of the prediction.
            used = n if layer == net.depth - 1 else n + 1
            z = start[:, :used] + _Attention(net.heads, net.head_dim, name=f"attention_{layer}")(z[:, :used], z)
        return z


def _keras_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Keras's initial embedding."""
    return jax.random.uniform(key, shape, minval=-0.05, maxval=0.05)


def _keras_glorot(fan_in: int, fan_out: int) -> Callable[..., jax.Array]:
    """Glorot's uniform with Keras's fans, which take a kernel of three axes for that of a convolution."""
    limit = math.sqrt(6 / (fan_in + fan_out))
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


class _Attention(nn.Module):
    heads: int
    head_dim: int

    @nn.compact
    def __call__(self, queries: jax.Array, z: jax.Array) -> jax.Array:
        d, shape = z.shape[-1], (self.heads, self.head_dim)
        inward = _keras_glorot(d * self.heads, d * self.head_dim)
        outward = _keras_glorot(self.heads * self.head_dim, self.heads * d)
        inputs = {"query": queries, "key": z, "value": z}
        q, k, v = (nn.DenseGeneral(shape, kernel_init=inward, name=name)(a) for name, a in inputs.items())
        return nn.DenseGeneral(d, (-2, -1), kernel_init=outward, name="out")(jax.nn.dot_product_attention(q, k, v))
