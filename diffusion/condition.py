"""Super-resolution: a smaller picture of the same thing, which the network sees beside the noisy one.

    xt -> [xt, enlarge(low + level z), level]    along the channels                                (1)

Saharia et al. 2021 (2104.07636); Dhariwal & Nichol 2021 (2105.05233) upsample so. In a cascade `low` is a sample of
another network; noise of deviation `level` on it, of which the network is told, hides the flaws of that sample
(conditioning augmentation, Ho et al. 2021, 2106.15282). Without a level the last channel is left out.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from diffusion.predict import Denoise, Output


def shrink(x: jax.Array, size: Sequence[int]) -> jax.Array:
    """Pictures [B, H, W, C] at a smaller size (h, w), by averages over H/h x W/w pixels.

    Raises:
      ValueError: h or w does not divide H or W.
    """
    b, height, width, channels = x.shape
    h, w = size
    if h < 1 or w < 1 or height % h or width % w:
        raise ValueError(f"size={tuple(size)} must divide the pictures' {(height, width)}")
    return x.reshape(b, h, height // h, w, width // w, channels).mean((2, 4))


def enlarge(low: jax.Array, size: Sequence[int]) -> jax.Array:
    """Pictures [B, h, w, C] at a larger size (H, W), bilinear between the centres of pixels."""
    return jax.image.resize(low, (low.shape[0], *size, low.shape[-1]), "bilinear")


def planes(low: jax.Array, size: Sequence[int], level: jax.Array | None = None) -> jax.Array:
    """What eq. (1) puts beside xt, [B, *size, C] or, with the levels [B] of the noise on `low`, [B, *size, C + 1]."""
    seen = enlarge(low, size)
    if level is None:
        return seen
    return jnp.concatenate([seen, jnp.broadcast_to(level[:, None, None, None], (*seen.shape[:-1], 1))], -1)


def conditioned(denoise: Denoise, planes: jax.Array) -> Denoise:
    """The denoiser of xt alone, from one that sees [xt, planes]; its prediction has the channels of xt.

    A batch that is a multiple of the planes', as guidance makes it, sees them again and again.
    """

    def denoise_xt(xt: jax.Array, t: jax.Array, y: jax.Array | None = None) -> Output:
        if xt.shape[0] % planes.shape[0]:
            raise ValueError(f"a batch of {xt.shape[0]} is no multiple of the {planes.shape[0]} pictures beside it")
        beside = jnp.tile(planes, (xt.shape[0] // planes.shape[0], 1, 1, 1))
        return denoise(jnp.concatenate([xt, beside], -1), t, y)

    return denoise_xt
