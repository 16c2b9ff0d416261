"""The exact denoiser of a finite data set: E[x0 | xt] where x0 is one of N images, each as likely as the others.

With xt = alpha x0 + sigma eps the posterior over the images x_1 .. x_N is a softmax over distances,

    p_i = exp(l_i) / sum_j exp(l_j),    l_i = -|xt - alpha x_i|^2 / (2 sigma^2)                    (1)
    E[x0 | xt] = sum_i p_i x_i,         entropy = -sum_i p_i log p_i                               (2)

It minimises the training loss of every prediction, path and weight, and a sampler that follows it reproduces the data:
what a trained network adds is how it generalises. At little noise one image has all of the posterior: for an xt that
was made from an image outside the data, (2) is then a wrong image, which the entropy, near 0, does not tell.

(1) and (2) are computed over blocks of images with a running maximum m of l, as in a softmax over more values than fit
in memory: what earlier blocks summed is scaled by exp(m_before - m_after). Only a block of floats, [block, D], and the
sums [B, D] are kept beside the data themselves, which may stay uint8.                             (3)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion.predict import Denoise
from diffusion.process import Path

# Keeps (1) finite at sigma = 0, where the nearest image has all of the posterior.
_LEAST = 1e-20


class DataPosterior(NamedTuple):
    """The mean [B, *S, C] of the posterior over a data set, and its entropy [B] in nats, eq. (2)."""

    mean: jax.Array
    entropy: jax.Array


def ideal_denoiser(
    path: Path,
    data: jax.Array,
    labels: jax.Array | None = None,
    *,
    null: int | None = None,
    decode: Callable[[jax.Array], jax.Array] | None = None,
    block_size: int = 1024,
) -> Denoise:
    """Denoiser of the images `data` [N, *S, C] that predicts x0, eq. (2), in the type of xt; inside float32 at least.

    Inside `jax.jit` pass the data as an argument, as parameters are: a constant would be copied into the program.

    Args:
      labels: [N]; the denoiser then takes labels y [B], and only images of this label count. NaN where there is none.
      null: the label for which all images count.
      decode: block of `data` to floats, such as `lambda x: x / 127.5 - 1` for uint8; by default only the type changes.
      block_size: images at a time.

    Raises:
      ValueError: on a call, the labels are not [N], xt has another shape than the images, labels or y are missing, or
        the blocks are of no image.
    """

    def denoise(xt: jax.Array, t: jax.Array, y: jax.Array | None = None) -> jax.Array:
        alpha, sigma = path(t)
        given = dict(labels=labels, y=y, null=null, decode=decode, block_size=block_size)
        return data_posterior(data, xt, alpha, sigma, **given).mean

    return denoise


def data_posterior(
    data: jax.Array,
    xt: jax.Array,
    alpha: jax.Array,
    sigma: jax.Array,
    *,
    labels: jax.Array | None = None,
    y: jax.Array | None = None,
    null: int | None = None,
    decode: Callable[[jax.Array], jax.Array] | None = None,
    block_size: int = 1024,
) -> DataPosterior:
    """The posterior over images `data` [N, *S, C] given xt [B, *S, C] at alpha and sigma [B], eqs. (1) to (3).

    The other arguments, and the errors, are those of `ideal_denoiser`.
    """
    n, b = len(data), len(xt)
    if data.shape[1:] != xt.shape[1:]:
        raise ValueError(f"xt has images of shape {xt.shape[1:]}, the data has {data.shape[1:]}")
    if (labels is None) != (y is None):
        raise ValueError("a class-conditional posterior needs both the labels of the data and y; pass both or neither")
    if labels is not None and jnp.shape(labels) != (n,):
        raise ValueError(f"labels must have one value for each of the {n} images, not shape {jnp.shape(labels)}")
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1")
    block, wide = min(block_size, n), jnp.promote_types(xt.dtype, jnp.float32)
    flat, alpha, sigma = xt.reshape(b, -1).astype(wide), alpha.astype(wide), sigma.astype(wide)
    precision = 1 / jnp.maximum(jnp.square(sigma), _LEAST)[:, None]

    def body(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        peak, total, moment, mean = carry
        # The last block begins earlier, so that all have one size; what it repeats does not count.
        first = jnp.minimum(number * block, n - block)
        images = jax.lax.dynamic_slice_in_dim(data, first, block)
        x = (images if decode is None else decode(images)).reshape(block, -1).astype(wide)
        inner = jnp.matmul(flat, x.T, precision=jax.lax.Precision.HIGHEST)
        scores = alpha[:, None] * (inner - alpha[:, None] * jnp.square(x).sum(1)[None] / 2)  # sigma^2 l + const(xt)
        # Rounded once for the maximum and for the weights, which small differences over a small sigma^2 would change.
        scores = jax.lax.optimization_barrier(scores)
        counts = (first + jnp.arange(block) >= number * block)[None]
        if labels is not None:
            own = jax.lax.dynamic_slice_in_dim(jnp.asarray(labels), first, block)[None] == y[:, None]
            counts = counts & (own if null is None else own | (y == null)[:, None])
        highest = jnp.maximum(peak, jnp.max(scores, 1, where=counts, initial=-jnp.inf))
        centre = jnp.where(jnp.isfinite(highest), highest, 0)  # -inf until an image counts
        gap = precision * jnp.where(counts, scores - centre[:, None], 0)
        weight = jnp.where(counts, jnp.exp(gap), 0)
        shift = precision[:, 0] * jnp.where(jnp.isfinite(peak), peak - centre, 0)
        earlier = jnp.where(jnp.isfinite(peak), jnp.exp(shift), 0)
        return (
            highest,
            earlier * total + weight.sum(1),
            earlier * (moment + shift * total) + (weight * gap).sum(1),
            earlier[:, None] * mean + jnp.matmul(weight, x, precision=jax.lax.Precision.HIGHEST),
        )

    zeros = jnp.zeros_like(flat[:, 0])
    start = (zeros - jnp.inf, zeros, zeros, jnp.zeros_like(flat))
    _, total, moment, mean = jax.lax.fori_loop(0, -(-n // block), body, start)
    # The weights are exp(l - m): moment is the sum of weight (l - m).
    mean = (mean / total[:, None]).reshape(xt.shape).astype(xt.dtype)
    return DataPosterior(mean, jnp.log(total) - moment / total)
