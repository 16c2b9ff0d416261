"""Guidance: functions from denoiser to denoiser, and dropping conditions in training, which it needs.

    pred = pred(null) + scale (pred(y) - pred(null))        classifier-free guidance               (1)
    pred = weak + scale (strong - weak)                     autoguidance                           (2)

(1) Ho & Salimans 2022 (2207.12598), (2) Karras et al. 2024 (2406.02507). At a fixed xt every prediction is affine in
every other, so (1) and (2) mean the same for all of them: guiding x0 or v is guiding eps. Both are one line on top of
`paired` and `extrapolate`, and so are methods of your own.

A condition y is a pytree of arrays with a leading axis B, such as labels [B], embeddings [B, D], or text with a mask;
`null` is the same pytree for one example, without that axis. A scale is a number, an array, [] or [B], traced or not,
or a function of t [B], of a network of two times that of the first.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.predict import Denoise, Output, Prediction, WithVariance, decode, pred_of, replace_pred, target
from diffusion.process import Path, coefficients, expand

Scale = float | jax.Array | Callable[[jax.Array], jax.Array]


def drop_condition(key: jax.Array, y: Any, null: Any, rate: float) -> Any:
    """The condition y with each example's replaced by `null` with probability `rate`, so that pred(null) is learned.

    Raises:
      ValueError: the rate lies outside [0, 1], or `null` does not fit y, see `null_like`.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate={rate} must lie in [0, 1]")
    rows = null_like(y, null)
    dropped = jax.random.uniform(key, (_batch(y),)) < rate
    return jax.tree.map(lambda a, n: jnp.where(expand(dropped, a), n, a), y, rows)


def null_like(y: Any, null: Any) -> Any:
    """The condition `null` of one example, repeated to the shape of y.

    Raises:
      ValueError: `null` has another structure than y, or a leaf is not a value of y's type or does not broadcast to
        one example of y's.
    """
    if jax.tree.structure(y) != jax.tree.structure(null):
        raise ValueError(
            f"null must have the structure of the condition y, {jax.tree.structure(y)}, not {jax.tree.structure(null)}"
        )

    def rows(a: jax.Array, n: Any) -> jax.Array:
        exact = jnp.issubdtype(a.dtype, jnp.integer) and not isinstance(n, jax.core.Tracer)
        if exact and not np.array_equal(n, np.asarray(n).astype(a.dtype)):
            raise ValueError(f"null={n} cannot be a value of the condition, which is {a.dtype}")
        n, row = jnp.asarray(n, a.dtype), a.shape[1:]
        if n.ndim > len(row) or any(m not in (1, k) for m, k in zip(n.shape[::-1], row[::-1], strict=False)):
            raise ValueError(f"null of shape {n.shape} does not fit one example of the condition, shape {row}")
        return jnp.broadcast_to(n.reshape((1,) * (a.ndim - n.ndim) + n.shape), a.shape)

    return jax.tree.map(rows, y, null)


def paired(denoise: Denoise, null: Any, combine: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]) -> Denoise:
    """The denoiser combine(conditional, unconditional, t): predictions [B, *S, C] for y and for `null`, and t [B].

    Both are computed as one batch of 2B. A learned variance is that of the conditional prediction.
    """

    def guided(xt: jax.Array, t: jax.Array, y: Any) -> Output:
        twice = jax.tree.map(lambda a, n: jnp.concatenate([a, n]), _given(y), null_like(y, null))
        both = denoise(jnp.concatenate([xt, xt]), jnp.concatenate([t, t]), twice)
        conditional, unconditional = jnp.split(pred_of(both), 2)
        pred = combine(conditional, unconditional, t)
        return WithVariance(pred, both.v[: len(xt)]) if isinstance(both, WithVariance) else pred

    return guided


def extrapolate(strong: Denoise, weak: Denoise, scale: Scale) -> Denoise:
    """Autoguidance, eq. (2): away from a weaker model. A learned variance is that of the strong one."""

    def guided(xt: jax.Array, t: jax.Array, y: Any = None) -> Output:
        output = strong(xt, t, y)
        a, b = pred_of(output), pred_of(weak(xt, t, y))
        return replace_pred(output, b + factor(scale, t, xt) * (a - b))

    return guided


def classifier_free(denoise: Denoise, null: Any, scale: Scale) -> Denoise:
    """Classifier-free guidance, eq. (1): scale 0 is unconditional, 1 conditional, more is stronger.

    The plain numbers 0 and 1 need one batch of B instead of 2B, and a learned variance at 0 is the unconditional one.
    """
    if isinstance(scale, int | float) and scale in (0, 1):
        return lambda xt, t, y: denoise(xt, t, _given(y) if scale else null_like(_given(y), null))
    return paired(denoise, null, lambda cond, uncond, t: uncond + factor(scale, t, cond) * (cond - uncond))


def interval(scale: Scale, low: float | jax.Array, high: float | jax.Array) -> Scale:
    """`scale` for low <= t <= high and 1, no guidance, outside (Kynkäänniemi et al. 2024, 2404.07724).

    Raises:
      ValueError: low is not below high.
    """
    if isinstance(low, int | float) and isinstance(high, int | float) and not low < high:
        raise ValueError(f"guidance interval [{low}, {high}]: its low end must be below its high end")
    return lambda t: jnp.where((t >= low) & (t <= high), scale(t) if callable(scale) else scale, 1.0)


def clip(denoise: Denoise, path: Path, prediction: Prediction, low: float = -1.0, high: float = 1.0) -> Denoise:
    """The denoiser with x0_hat kept inside [low, high]; see `corrected`.

    Raises:
      ValueError: low is not below high.
    """
    if not low < high:
        raise ValueError(f"low={low} must be below high={high}")
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

    Raises:
      ValueError: the quantile lies outside (0, 1], or low is not below high.
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
    """The denoiser with fix(x0_hat) in place of x0_hat and eps_hat changed with it, so that both still compose xt.

    A prediction of eps holds x0 only to the rounding of eps times sigma / alpha; `convert` it to x0 first where that
    matters (guided sampling from t near 1).
    """

    def after(xt: jax.Array, t: jax.Array, y: Any = None) -> Output:
        coef, output = coefficients(path, t), denoise(xt, t, y)
        x0, eps = decode(prediction, coef, xt, pred_of(output))
        fixed = fix(x0)
        # Where sigma is 0, xt is the image itself and there is no noise to correct.
        gain = jnp.where(coef.sigma == 0, 0, coef.alpha / jnp.where(coef.sigma == 0, 1, coef.sigma))
        eps = eps + expand(gain, xt) * (x0 - fixed)
        return replace_pred(output, target(prediction, coef, fixed, eps))

    return after


def factor(scale: Scale, t: jax.Array, like: jax.Array) -> float | jax.Array:
    """The scale at times t, [B] or [B, 2], ready to multiply `like` [B, ...]."""
    value = scale(t if t.ndim == 1 else t[:, 0]) if callable(scale) else scale
    if jnp.ndim(value) == 0:
        return value
    if jnp.shape(value) != like.shape[:1]:
        raise ValueError(
            f"a guidance scale must be a number or one per example {like.shape[:1]}, not {jnp.shape(value)}"
        )
    return expand(jnp.asarray(value), like)


def _given(y: Any) -> Any:
    if y is None:
        raise ValueError("guidance needs a condition y; for unconditional samples call the denoiser itself")
    return y


def _batch(y: Any) -> int:
    leaves = jax.tree.leaves(y)
    sizes = {len(a) for a in leaves}
    if len(sizes) != 1:
        raise ValueError(
            f"the arrays of a condition must share their first axis, got shapes {[a.shape for a in leaves]}"
        )
    return sizes.pop()
