"""Guidance: functions from denoiser to denoiser, and their training half, dropping labels.

    pred = pred(null) + scale (pred(y) - pred(null))                                               (1)

Ho & Salimans 2022 (2207.12598). At a fixed xt every prediction is affine in every other, so (1) means the same for
all of them. The scale may be a function of t (an interval: Kynkäänniemi et al. 2024, 2404.07724).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion.predict import Denoise, Prediction, decode, target
from diffusion.process import Path, coefficients, expand

Scale = float | Callable[[jax.Array], jax.Array]


def drop_labels(key: jax.Array, y: jax.Array, null: int, rate: float) -> jax.Array:
    """Labels y [B] with each replaced by `null` with probability `rate`, so that the network learns pred(null)."""
    if not 0 <= rate <= 1:
        raise ValueError(f"rate={rate} must lie in [0, 1]")
    return jnp.where(jax.random.uniform(key, y.shape) < rate, null, y)


def classifier_free(denoise: Denoise, null: int, scale: Scale) -> Denoise:
    """Guided denoiser, eq. (1), every channel alike: scale 0 is unconditional, 1 conditional, more is sharper.

    Both halves run as one batch of 2B; the plain cases 0 and 1 run as one of B.
    """

    def guided(xt: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        if y is None:
            raise ValueError("guidance needs labels y [B]; for unconditional samples call the denoiser itself")
        nothing = jnp.full_like(y, null)
        if not callable(scale) and scale in (0, 1):
            return denoise(xt, t, y if scale else nothing)
        both = denoise(jnp.concatenate([xt, xt]), jnp.concatenate([t, t]), jnp.concatenate([y, nothing]))
        conditional, unconditional = jnp.split(both, 2)
        factor = expand(scale(t), xt) if callable(scale) else scale
        return unconditional + factor * (conditional - unconditional)

    return guided


def interval(scale: float, low: float, high: float) -> Scale:
    """`scale` for low <= t <= high and 1, no guidance, outside."""
    if not 0 <= low < high <= 1:
        raise ValueError(f"guidance interval [{low}, {high}] must satisfy 0 <= low < high <= 1")
    return scale if (low, high) == (0, 1) else lambda t: jnp.where((t >= low) & (t <= high), scale, 1.0)


def clip(denoise: Denoise, path: Path, prediction: Prediction, low: float = -1.0, high: float = 1.0) -> Denoise:
    """The denoiser with x0_hat kept inside [low, high] and eps_hat following, so that both still compose xt."""

    def clipped(xt: jax.Array, t: jax.Array, y: jax.Array | None = None) -> jax.Array:
        coef = coefficients(path, t)
        x0, eps = decode(prediction, coef, xt, denoise(xt, t, y))
        inside = jnp.clip(x0, low, high)
        # Where sigma vanishes xt is the picture itself and there is no noise to correct.
        gain = jnp.where(coef.sigma == 0, 0, coef.alpha / jnp.where(coef.sigma == 0, 1, coef.sigma))
        eps = eps + expand(gain, xt) * (x0 - inside)
        return target(prediction, coef, inside, eps)

    return clipped
