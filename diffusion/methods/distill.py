"""Distillation: a network that samples in few steps learns from one that needs many.

Progressive distillation (Salimans & Ho 2022, 2202.00512): one DDIM step of the student, t to s, is two of the teacher.

    z' = ddim(z, t -> (t + s) / 2),   z'' = ddim(z', (t + s) / 2 -> s)                              (1)
    z = alpha_t x + sigma_t e,   z'' = alpha_s x + sigma_s e                                        (2)

The pair (x, e) that solves (2) replaces image and noise in the ordinary loss (`loss.loss_at`), for any prediction and
weight; it composes the same z. A student of T / 2 steps is the teacher of the next one.

Consistency distillation (Song et al. 2023, 2303.01469; with the distance, weight and schedule of Song & Dhariwal 2023,
2310.14189): the same image is predicted from all points of a path of the teacher, whose end is that image.

    L = d(f(z, t), sg f(z_s, s)) / (t - s),   z_s = one step of the teacher from z at t to s        (3)
    f(z, t) = c z / alpha + (1 - c) x0_hat,   c = d^2 / (d^2 + (sigma / alpha)^2),   f(z, 0) = z     (4)
    d(a, b) = sqrt(|a - b|^2 + c^2) - c,   c = 0.00054 sqrt(D)                                      (5)
    t = i / N,  s = (i - 1) / N,   N = min(first 2^floor(k / K'), last) at training step k of K,
    K' = floor(K / (floor(log2(last / first)) + 1))                                                 (6)

d is about the standard deviation of the data. Without (4) a network that predicts x0 could be constant. The student of
(3) is the trained network itself, without an average. A teacher is a `Predict`: guided or not.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.predict import (
    Denoise,
    Estimate,
    Output,
    Predict,
    Prediction,
    decode,
    pred_of,
    predictor,
    replace_pred,
    target,
)
from diffusion.process import Path, coefficients, expand
from diffusion.sample import Sampler, ddim, heun, normal, one_step


def two_steps(teacher: Predict, path: Path, xt: jax.Array, t: jax.Array, s: jax.Array) -> Estimate:
    """The (x, e) of eq. (2) for xt, [B, *S, C] each: one DDIM step with them from t to s, [B], is two of the teacher.

    The path must have different ratios alpha / sigma at t and s.
    """
    middle = (t + s) / 2
    xs = _moved(ddim(), teacher, path, _moved(ddim(), teacher, path, xt, t, middle), middle, s)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (tuple(expand(a, xt) for a in path(time)) for time in (t, s))
    det = alpha_s * sigma_t - alpha_t * sigma_s
    return Estimate((sigma_t * xs - sigma_s * xt) / det, (alpha_s * xt - alpha_t * xs) / det)


def anchored(denoise: Denoise, path: Path, prediction: Prediction, *, data_std: float = 0.5) -> Denoise:
    """The denoiser whose x0_hat is f of eq. (4), which is xt itself at t = 0 whatever the network says.

    Raises:
      ValueError: the prediction is eps, or data_std, d of eq. (4), is not positive.
    """
    if prediction == "eps":
        raise ValueError(
            "prediction='eps' does not determine x0 at t = 1, where consistency models start to sample: take x0, v or "
            "flow, also for the teacher"
        )
    if not data_std > 0:
        raise ValueError(f"data_std={data_std}, the standard deviation of the data, must be positive")

    def f(xt: jax.Array, t: jax.Array, y: Any = None) -> Output:
        coef, output = coefficients(path, t), denoise(xt, t, y)
        x0, _ = decode(prediction, coef, xt, pred_of(output))
        alpha, sigma = expand(coef.alpha, xt), expand(coef.sigma, xt)
        signal, power = jnp.square(data_std * alpha), jnp.square(sigma)
        x0 = (data_std**2 * alpha * xt + power * x0) / (signal + power)
        eps = jnp.where(sigma > 0, (xt - alpha * x0) / jnp.where(sigma > 0, sigma, 1), 0)
        return replace_pred(output, target(prediction, coef, x0, eps))

    return f


def consistency_target(
    teacher: Predict,
    student: Predict,
    path: Path,
    xt: jax.Array,
    t: jax.Array,
    s: jax.Array,
    *,
    solver: Sampler | None = None,
) -> jax.Array:
    """sg f(z_s, s) of eq. (3), [B, *S, C], for z = xt at times t and s, [B]; of s = 0 it is the teacher's own image.

    `student` is that of an `anchored` denoiser; `solver`, default `sample.heun()`, steps the teacher, without noise.

    Raises:
      ValueError: the solver adds noise.
    """
    xs = _moved(solver or heun(), teacher, path, xt, t, s)
    x0 = jnp.where(expand(s > 0, xt), student(xs, s).x0, xs)
    return jax.lax.stop_gradient(x0)


def consistency_loss_at(
    denoise: Denoise,
    path: Path,
    xt: jax.Array,
    t: jax.Array,
    s: jax.Array,
    wanted: jax.Array,
    y: Any = None,
    *,
    prediction: Prediction,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of each example [B], eq. (3), for xt at times t [B] and the `wanted` images of `consistency_target`.

    `denoise` is `anchored`, as it is in sampling, or a prediction that determines x0 at t = 0 by itself.

    Returns also {"t", "loss", "mse"} [B].
    """
    x0 = predictor(denoise, path, prediction, y)(xt, t).x0
    axes = tuple(range(1, x0.ndim))
    square = jnp.square(x0 - wanted).sum(axes)
    c = 0.00054 * math.sqrt(math.prod(x0.shape[1:]))
    value = (jnp.sqrt(square + c**2) - c) / (t - s)
    return value, {"t": t, "loss": value, "mse": square / math.prod(x0.shape[1:])}


def consistency_times(
    step: jax.Array, t: jax.Array, *, steps: int, first: int = 10, last: int = 1280
) -> tuple[jax.Array, jax.Array]:
    """Times (t, s) [B] on the grid of eq. (6) at training step `step` of `steps`: t are those given, rounded up.

    Raises:
      ValueError: not 1 <= first <= last.
    """
    if not 1 <= first <= last:
        raise ValueError(f"first={first} must be at least 1 and at most last={last}")
    length = max(steps // (math.floor(math.log2(last / first)) + 1), 1)
    n = jnp.minimum(first * 2.0 ** (step // length), last).astype(t.dtype)
    i = jnp.clip(jnp.ceil(t * n), 1, n)
    return i / n, (i - 1) / n


def consistency() -> Sampler:
    """Sampling from a consistency model: xs = alpha_s f(xt, t) + sigma_s z, new noise z (2303.01469, algorithm 1)."""

    def step(key, predict, path, xt, t, s):
        alpha, sigma = (expand(a, xt) for a in path(s))
        return alpha * predict(xt, t).x0 + sigma * normal(key, xt)

    return one_step(step)


def _moved(sampler: Sampler, predict: Predict, path: Path, xt: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
    """xs after one step of a sampler without noise."""
    return sampler.step(None, predict, path, xt, t, s, sampler.init(xt))[0]
