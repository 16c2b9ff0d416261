"""Guidance: functions from denoiser to denoiser, and their training half, dropping labels.

    pred = pred(null) + scale (pred(y) - pred(null))                                               (1)

Ho & Salimans 2022 (2207.12598). At a fixed xt every prediction is affine in every other, so (1) means the same for
all of them: guiding x0 or v is guiding eps. A learned variance is that of the conditional pass. The scale may be a
function of t (an interval: Kynkäänniemi et al. 2024, 2404.07724).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion.predict import Denoise, Learned, Output, Prediction, decode, pred_of, replace_pred, target
from diffusion.process import Path, coefficients, expand

Scale = float | Callable[[jax.Array], jax.Array]


def drop_labels(key: jax.Array, y: jax.Array, null: int, rate: float) -> jax.Array:
    """Labels y [B] with each replaced by `null` with probability `rate`, so that the network learns pred(null)."""
    if not 0 <= rate <= 1:
        raise ValueError(f"rate={rate} must lie in [0, 1]")
    return jnp.where(jax.random.uniform(key, y.shape) < rate, null, y)


def classifier_free(denoise: Denoise, null: int, scale: Scale) -> Denoise:
    """Guided denoiser, eq. (1), every channel alike: scale 0 is unconditional, 1 conditional, more is sharper.

    Both halves run as one batch of 2B; the plain cases 0 and 1 run as one of B (and at 0 the variance is that one's).
    """

    def guided(xt: jax.Array, t: jax.Array, y: jax.Array) -> Output:
        if y is None:
            raise ValueError("guidance needs labels y [B]; for unconditional samples call the denoiser itself")
        nothing = jnp.full_like(y, null)
        if not callable(scale) and scale in (0, 1):
            return denoise(xt, t, y if scale else nothing)
        both = denoise(jnp.concatenate([xt, xt]), jnp.concatenate([t, t]), jnp.concatenate([y, nothing]))
        conditional, unconditional = jnp.split(pred_of(both), 2)
        factor = expand(scale(t), xt) if callable(scale) else scale
        pred = unconditional + factor * (conditional - unconditional)
        return Learned(pred, both.v[: len(y)]) if isinstance(both, Learned) else pred

    return guided


def interval(scale: float, low: float, high: float) -> Scale:
    """`scale` for low <= t <= high and 1, no guidance, outside."""
    if not 0 <= low < high <= 1:
        raise ValueError(f"guidance interval [{low}, {high}] must satisfy 0 <= low < high <= 1")
    return scale if (low, high) == (0, 1) else lambda t: jnp.where((t >= low) & (t <= high), scale, 1.0)


def clip(denoise: Denoise, path: Path, prediction: Prediction, low: float = -1.0, high: float = 1.0) -> Denoise:
    """The denoiser with x0_hat kept inside [low, high]; see `corrected`."""
    return corrected(denoise, path, prediction, lambda x0: jnp.clip(x0, low, high))


def dynamic_threshold(
    denoise: Denoise,
    path: Path,
    prediction: Prediction,
    quantile: float = 0.995,
    low: float = -1.0,
    high: float = 1.0,
) -> Denoise:
    """The denoiser with each x0_hat clipped at its own `quantile` and scaled back into [low, high]; see `corrected`.

    Saharia et al. 2022 (2205.11487), section 2.3: strong guidance pushes x0_hat out of the range, and clipping alone
    saturates it. Where the quantile lies inside the range nothing is scaled, and only what lies beyond is clipped.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile={quantile} must lie in (0, 1]")
    if not low < high:
        raise ValueError(f"low={low} must be below high={high}")
    centre, radius = (low + high) / 2, (high - low) / 2

    def fix(x0: jax.Array) -> jax.Array:
        offset = (x0 - centre) / radius
        reach = jnp.quantile(jnp.abs(offset).reshape(len(x0), -1), quantile, axis=1)
        reach = expand(jnp.maximum(reach, 1), x0)
        return centre + radius * jnp.clip(offset, -reach, reach) / reach

    return corrected(denoise, path, prediction, fix)


def corrected(denoise: Denoise, path: Path, prediction: Prediction, fix: Callable[[jax.Array], jax.Array]) -> Denoise:
    """The denoiser with fix(x0_hat) in place of x0_hat and eps_hat following, so that both still compose xt.

    A prediction of eps holds x0 only to the rounding of eps times sigma / alpha; `convert` it to x0 first where that
    matters (guided sampling from t near 1).
    """

    def after(xt: jax.Array, t: jax.Array, y: jax.Array | None = None) -> Output:
        coef, output = coefficients(path, t), denoise(xt, t, y)
        x0, eps = decode(prediction, coef, xt, pred_of(output))
        fixed = fix(x0)
        # Where sigma vanishes xt is the picture itself and there is no noise to correct.
        gain = jnp.where(coef.sigma == 0, 0, coef.alpha / jnp.where(coef.sigma == 0, 1, coef.sigma))
        eps = eps + expand(gain, xt) * (x0 - fixed)
        return replace_pred(output, target(prediction, coef, fixed, eps))

    return after
