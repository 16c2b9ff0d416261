"""Super-resolution: a low-resolution image, enlarged, as extra input channels of the network.

    xt -> [xt, enlarge(low + level z), level]    along the channels                                (1)

Saharia et al. 2021 (2104.07636); Dhariwal & Nichol 2021 (2105.05233) upsample in this way. In a cascade `low` is a
sample of another network; noise of standard deviation `level` on it, which is an input too, makes the network robust to
the errors of that sample (conditioning augmentation, Ho et al. 2021, 2106.15282). Without a level the last channel is
left out.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.predict import Denoise, Output


def shrink(x: jax.Array, size: Sequence[int]) -> jax.Array:
    """Images [B, H, W, C] at a smaller size (h, w), by averages over H/h x W/w pixels.

    Raises:
      ValueError: h or w does not divide H or W.
    """
    b, height, width, channels = x.shape
    h, w = size
    if h < 1 or w < 1 or height % h or width % w:
        raise ValueError(f"size={tuple(size)} must divide the images' {(height, width)}")
    return x.reshape(b, h, height // h, w, width // w, channels).mean((2, 4))


def enlarge(low: jax.Array, size: Sequence[int]) -> jax.Array:
    """Images [B, h, w, C] at a larger size (H, W), bilinear between the centres of pixels."""
    return jax.image.resize(low, (low.shape[0], *size, low.shape[-1]), "bilinear")


def conditioning(low: jax.Array, size: Sequence[int], level: jax.Array | None = None) -> jax.Array:
    """The extra channels of eq. (1), [B, *size, C] or, with the levels [B] of the noise on `low`, [B, *size, C + 1]."""
    enlarged = enlarge(low, size)
    if level is None:
        return enlarged
    return jnp.concatenate([enlarged, jnp.broadcast_to(level[:, None, None, None], (*enlarged.shape[:-1], 1))], -1)


def conditioned(denoise: Denoise, channels: jax.Array) -> Denoise:
    """The denoiser of xt alone, from a network of [xt, channels]; its prediction has the channels of xt.

    For a batch that is a multiple of that of `channels`, as guidance makes it, they are repeated.
    """

    def denoise_xt(xt: jax.Array, t: jax.Array, y: Any = None) -> Output:
        if xt.shape[0] % channels.shape[0]:
            raise ValueError(
                f"a batch of {xt.shape[0]} is not a multiple of the {channels.shape[0]} conditioning images"
            )
        repeated = jnp.tile(channels, (xt.shape[0] // channels.shape[0], 1, 1, 1))
        return denoise(jnp.concatenate([xt, repeated], -1), t, y)

    return denoise_xt
