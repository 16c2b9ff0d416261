"""Inception-v3 as the Frechet Inception distance uses it, used by `metrics.features.inception`. No diffusion model.

The network of Szegedy et al. 2016 (1512.00567) as TensorFlow's graph of 2015-12-05 has it: 1,008 logits; means of 3x3
windows count positions inside the image only; and the last block (7c) pools by the maximum. Every convolution is
followed by batch normalisation, folded into it (`folded`), and a ReLU. Names are those of the published PyTorch files.

    a block = the outputs of its branches, side by side in the channels                                       (1)
    mean_pool, then a convolution of one tap = the convolution, then mean_pool                                   (2)

Both sides of (2) are the same linear map; the right one pools a fraction of the channels.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion.models import folded
from diffusion.models.folded import Conv

SIZE = 299
FEATURES = 2048
CLASSES = 1008
SPATIAL = 7  # channels of 17 x 17 positions: 2,023 features
EPSILON = 1e-3  # of the batch normalisation

Params = Any


class Taps(NamedTuple):
    """Values of the network on the way. The first three are means over positions.

    pool_64, pool_192, pool_768: [B, 64], [B, 192], [B, 768], after the first and second maximum pool and block 6e.
    spatial: [B, 2023], the first 7 channels of block 6d, "mixed_6/conv" of the graph, by row, column and channel.
    pool: [B, 2048], the features of FID.
    logits: [B, 1008], of the Inception score: without the bias of the last layer.
    """

    pool_64: jax.Array
    pool_192: jax.Array
    pool_768: jax.Array
    spatial: jax.Array
    pool: jax.Array
    logits: jax.Array


def apply(params: Params, x: jax.Array) -> Taps:
    """Taps of x float32 [B, 299, 299, 3], (pixel - 128) / 128."""
    return _Inception().apply({"params": params}, x)


def shapes() -> Params:
    """The shape of every parameter, as `jax.ShapeDtypeStruct`."""
    x = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    return jax.eval_shape(_Inception().init, jax.random.key(0), x)["params"]


def from_torch(state: Mapping[str, np.ndarray]) -> Params:
    """Parameters from the state dict of pytorch-fid or torch-fidelity, batch normalisation folded.

    Raises:
      ValueError: an entry is missing, or has another shape.
    """
    expected = shapes()
    try:
        params = {
            layer: folded.from_torch(state, f"{_published(layer)}.conv", f"{_published(layer)}.bn", EPSILON)
            for layer in expected
            if layer != "logits"
        }
        params["logits"] = {"kernel": state["fc.weight"].T}
    except KeyError as e:
        raise ValueError(f"the weights of Inception-v3 lack the entry {e}") from None
    return folded.checked(params, expected, "Inception-v3")


def _published(layer: str) -> str:
    """Mixed_5b_branch1x1 -> Mixed_5b.branch1x1."""
    return layer.replace("_branch", ".branch")


class _Inception(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> Taps:
        def conv(name: str, x: jax.Array, features: int, *size: int, stride: int = 1, padding: str = "SAME"):
            kernel = size if len(size) == 2 else (size or (1,)) * 2
            return nn.relu(Conv(features, kernel, stride, padding, name=name)(x))

        def pooled(block: str, x: jax.Array, features: int) -> jax.Array:
            """Eq. (2)."""
            return nn.relu(folded.mean_pool(Conv(features, name=f"{block}_branch_pool")(x)))

        def chain(block: str, branch: str, x: jax.Array, *layers: tuple[int, ...]) -> jax.Array:
            """Convolutions one after another, each (features, height, width), named branch_1, branch_2, ..."""
            for i, (features, *size) in enumerate(layers, 1):
                x = conv(f"{block}_{branch}_{i}", x, features, *size)
            return x

        def side_by_side(*branches: jax.Array) -> jax.Array:
            return jnp.concatenate(branches, -1)

        def block_a(name: str, x: jax.Array, pool: int) -> jax.Array:
            return side_by_side(
                conv(f"{name}_branch1x1", x, 64),
                chain(name, "branch5x5", x, (48,), (64, 5)),
                chain(name, "branch3x3dbl", x, (64,), (96, 3), (96, 3)),
                pooled(name, x, pool),
            )

        def block_c(name: str, x: jax.Array, c: int) -> jax.Array:
            return side_by_side(
                conv(f"{name}_branch1x1", x, 192),
                chain(name, "branch7x7", x, (c,), (c, 1, 7), (192, 7, 1)),
                chain(name, "branch7x7dbl", x, (c,), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7)),
                pooled(name, x, 192),
            )

        def block_e(name: str, x: jax.Array, maximum: bool) -> jax.Array:
            three = chain(name, "branch3x3", x, (384,))
            double = chain(name, "branch3x3dbl", x, (448,), (384, 3))
            return side_by_side(
                conv(f"{name}_branch1x1", x, 320),
                conv(f"{name}_branch3x3_2a", three, 384, 1, 3),
                conv(f"{name}_branch3x3_2b", three, 384, 3, 1),
                conv(f"{name}_branch3x3dbl_3a", double, 384, 1, 3),
                conv(f"{name}_branch3x3dbl_3b", double, 384, 3, 1),
                conv(f"{name}_branch_pool", folded.max_pool(x, 1, "SAME"), 192) if maximum else pooled(name, x, 192),
            )

        half = {"stride": 2, "padding": "VALID"}
        h = conv("Conv2d_1a_3x3", x, 32, 3, **half)  # (B, 149, 149, 32)
        h = conv("Conv2d_2a_3x3", h, 32, 3, padding="VALID")
        h = conv("Conv2d_2b_3x3", h, 64, 3)  # (B, 147, 147, 64)
        pool_64 = h = folded.max_pool(h, 2)  # (B, 73, 73, 64)
        h = conv("Conv2d_3b_1x1", h, 80)
        h = conv("Conv2d_4a_3x3", h, 192, 3, padding="VALID")
        pool_192 = h = folded.max_pool(h, 2)  # (B, 35, 35, 192)
        for name, pool in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            h = block_a(name, h, pool)  # (B, 35, 35, 288)
        double = chain("Mixed_6a", "branch3x3dbl", h, (64,), (96, 3))
        h = side_by_side(
            conv("Mixed_6a_branch3x3", h, 384, 3, **half),
            conv("Mixed_6a_branch3x3dbl_3", double, 96, 3, **half),
            folded.max_pool(h, 2),
        )  # (B, 17, 17, 768)
        h = block_c("Mixed_6c", block_c("Mixed_6b", h, 128), 160)
        h = block_c("Mixed_6d", h, 160)
        spatial = h[..., :SPATIAL].reshape(len(h), -1)
        pool_768 = h = block_c("Mixed_6e", h, 192)
        three = chain("Mixed_7a", "branch3x3", h, (192,))
        seven = chain("Mixed_7a", "branch7x7x3", h, (192,), (192, 1, 7), (192, 7, 1))
        h = side_by_side(
            conv("Mixed_7a_branch3x3_2", three, 320, 3, **half),
            conv("Mixed_7a_branch7x7x3_4", seven, 192, 3, **half),
            folded.max_pool(h, 2),
        )  # (B, 8, 8, 1280)
        h = block_e("Mixed_7c", block_e("Mixed_7b", h, maximum=False), maximum=True)  # (B, 8, 8, 2048)
        pool = h.mean((1, 2))
        logits = nn.Dense(CLASSES, use_bias=False, precision="highest", name="logits")(pool)
        means = (tap.mean((1, 2)) for tap in (pool_64, pool_192, pool_768))
        return Taps(*means, spatial, pool, logits)
