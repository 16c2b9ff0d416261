"""Variants of classifier-free guidance, each with the condition and without as one batch (`guide.paired`).

With c and u the predictions for y and for `null`, w the scale, and sums over all values of one example:

    rescale        g = u + w (c - u),    pred = phi std(c) / std(g) g + (1 - phi) g                (1)
    zero           pred = s u + w (c - s u),  s = <c, u> / <u, u>,  of velocities; 0 in the first steps  (2)
    apg            d = c - u + beta d',       of x0; primes for the step before
                   d <- d min(1, r / ||d||),  p = <d, c> / <c, c> c,
                   pred = c + (w - 1) (d - p + eta p)                                              (3)
    plus_plus      xs = alpha_s x0_hat(u + w (c - u)) + sigma_s eps_u                              (4)

(1) Lin et al. 2023 (2305.08891), section 3.4. (2) CFG-Zero*, Fan et al. 2025 (2503.18886). (3) adaptive projected
guidance, Sadat et al. 2024 (2410.02416): guidance without the part along c, which saturates images, with a bounded
length, and with a momentum beta < 0. (4) CFG++, Chung et al. 2024 (2406.08070).

(4) is `guide.classifier_free` with a scale that depends on the step. In eps, a step of DDIM with scale k is xs =
alpha_s / alpha_t xt + (sigma_s - alpha_s sigma_t / alpha_t) (eps_u + k (eps_c - eps_u)), and in (4) the last product is
(sigma_s - alpha_s sigma_t / alpha_t) eps_u - alpha_s sigma_t / alpha_t w (eps_c - eps_u). They are equal for

    k = w alpha_s sigma_t / (alpha_s sigma_t - alpha_t sigma_s)                                    (5)

Projections and deviations depend on what is predicted, unlike guidance itself: (1) acts on the network's own prediction
as published programs do, (2) on the velocity, (3) on x0, by conversion.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.guide import Scale, factor, null_like, paired
from diffusion.predict import Denoise, Estimate, Prediction, convert, predictor
from diffusion.process import Path, expand
from diffusion.sample import Memory, Sampler


def rescale(denoise: Denoise, null: Any, scale: Scale, *, phi: float = 0.7) -> Denoise:
    """Guidance whose result has the standard deviation of the conditional prediction, to the share `phi`, eq. (1).

    Raises:
      ValueError: phi lies outside [0, 1].
    """
    if not 0 <= phi <= 1:
        raise ValueError(f"phi={phi} must lie in [0, 1]")

    def combine(c: jax.Array, u: jax.Array, t: jax.Array) -> jax.Array:
        guided = u + factor(scale, t, c) * (c - u)
        ratio = c.std(_values(c), keepdims=True) / guided.std(_values(c), keepdims=True)
        return guided * (phi * ratio + (1 - phi))

    return paired(denoise, null, combine)


def zero(
    denoise: Denoise, null: Any, scale: Scale, path: Path, prediction: Prediction, *, still_above: float = np.inf
) -> Denoise:
    """CFG-Zero*, eq. (2): the unconditional velocity is first fitted to the conditional one.

    Args:
      prediction: of the denoiser, which is converted to the velocity and back.
      still_above: the velocity is 0 at times above this one: `grid[k]` for the first k steps of a grid.
    """

    def combine(c: jax.Array, u: jax.Array, t: jax.Array) -> jax.Array:
        u = _along(c, u)
        guided = u + factor(scale, t, c) * (c - u)
        return jnp.where(expand(t > still_above, c), 0, guided)

    return _through("flow", denoise, path, prediction, lambda velocity: paired(velocity, null, combine))


def apg(
    denoise: Denoise,
    null: Any,
    scale: Scale,
    path: Path,
    prediction: Prediction,
    *,
    eta: float = 0.0,
    radius: float | None = None,
) -> Denoise:
    """Adaptive projected guidance without momentum, eq. (3) with beta = 0.

    Args:
      prediction: of the denoiser, which is converted to x0 and back.
      eta: share of the part along the conditional prediction that is kept; 1 is classifier-free guidance.
      radius: r, the largest length of the difference of an example [*S, C] (2.5 to 15 in the paper); None for no bound.

    Raises:
      ValueError: the radius is not positive.
    """
    _check_radius(radius)

    def combine(c: jax.Array, u: jax.Array, t: jax.Array) -> jax.Array:
        return c + (factor(scale, t, c) - 1) * _projected(c - u, c, eta, radius)

    return _through("x0", denoise, path, prediction, lambda x0: paired(x0, null, combine))


def apg_momentum(
    sampler: Sampler,
    denoise: Denoise,
    null: Any,
    scale: Scale,
    prediction: Prediction,
    *,
    momentum: float = -0.75,
    eta: float = 0.0,
    radius: float | None = None,
) -> Sampler:
    """A sampler that guides by `apg` with momentum, eq. (3).

    A denoiser has no memory, so this guidance is a wrapper of the sampler, whose memory it extends by d', the
    difference at the start (xt, t) of the step before. Pass `sample` the denoiser without guidance, and here the same
    one:

        guided = apg_momentum(ddim(), denoise, null, 3.0, "x0")
        sample(key, denoise, path, x1, times, y, prediction="x0", sampler=guided)

    Each evaluation of the sampler calls the denoiser twice, with y and with `null`. A sampler with several evaluations
    a step (`heun`) uses one d' for all of them; one that does not begin at xt (`edm` with churn), or differentiates
    there (`edit.dps`), costs one more. A threshold around the denoiser acts before guidance.

    Raises:
      ValueError: the momentum is not above -1 and below 1, or the radius is not positive; in sampling, there is no
        condition y, or `null` does not fit it, see `guide.null_like`.
    """
    if not -1 < momentum < 1:
        raise ValueError(f"momentum={momentum} must lie between -1 and 1; negative in the paper")
    _check_radius(radius)

    def init(xt: jax.Array) -> Memory:
        return sampler.init(xt), jnp.zeros_like(xt)

    def step(key, predict, path, xt, t, s, memory):
        inner, before = memory
        nulls = null_like(predict.y, null)
        unconditional = predictor(denoise, path, prediction, nulls, dtype=predict.dtype)

        def compared(x: jax.Array, at: jax.Array) -> tuple[Estimate, jax.Array]:
            now = predict(x, at)
            return now, now.x0 - unconditional(x, at).x0 + momentum * before

        # Not taken from the sampler's own call, which may be inside a transformation, whose values must not leave it.
        first = compared(xt, t)

        def guided(x: jax.Array, at: jax.Array) -> Estimate:
            now, difference = first if x is xt and at is t else compared(x, at)
            times = jnp.broadcast_to(at, x.shape[:1])
            x0 = now.x0 + (factor(scale, times, x) - 1) * _projected(difference, now.x0, eta, radius)
            alpha, sigma = (expand(a, x) for a in path(at))
            gain = jnp.where(sigma == 0, 0, alpha / jnp.where(sigma == 0, 1, sigma))
            return now._replace(x0=x0, eps=now.eps + gain * (now.x0 - x0))

        xs, inner = sampler.step(key, guided, path, xt, t, s, inner)
        return xs, (inner, first[1])

    return Sampler(init, step)


def plus_plus(scale: float | jax.Array, path: Path, times: np.ndarray) -> Scale:
    """The scale with which `guide.classifier_free` is CFG++, eqs. (4) and (5), for steps of `ddim()` along `times`.

    Args:
      scale: w, from 0 to 1: 0 is unconditional, and at 1 the estimate of x0 is the conditional one.
      times: the grid [T + 1] that is sampled along; s is the time in it that follows t.

    Raises:
      ValueError: the times are not a vector of falling values.
    """
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or len(times) < 2 or not (np.diff(times) < 0).all():
        raise ValueError(f"times must be a vector of at least two falling values, got shape {times.shape}")

    def at(t: jax.Array) -> jax.Array:
        grid = jnp.asarray(times, t.dtype)
        s = grid[1:][jnp.abs(grid[None, :-1] - t[:, None]).argmin(1)]
        (alpha_t, sigma_t), (alpha_s, sigma_s) = path(t), path(s)
        return scale * alpha_s * sigma_t / (alpha_s * sigma_t - alpha_t * sigma_s)

    return at


def _through(
    space: Prediction, denoise: Denoise, path: Path, prediction: Prediction, guided: Callable[[Denoise], Denoise]
) -> Denoise:
    """guided(denoiser) with the denoiser predicting `space`, as a denoiser that predicts what it did before."""
    if prediction == space:
        return guided(denoise)
    return convert(guided(convert(denoise, path, prediction, space)), path, space, prediction)


def _projected(difference: jax.Array, c: jax.Array, eta: float, radius: float | None) -> jax.Array:
    """The last two lines of eq. (3): d bounded in length, and its part along c times eta."""
    if radius is not None:
        length = jnp.sqrt(_dot(difference, difference))
        difference = difference * jnp.minimum(1, radius / jnp.where(length > 0, length, radius))
    return difference + (eta - 1) * _along(difference, c)


def _along(a: jax.Array, b: jax.Array) -> jax.Array:
    """The projection of a on b, each example [*S, C] by itself; 0 where b is 0."""
    square = _dot(b, b)
    return _dot(a, b) / jnp.where(square > 0, square, 1) * b


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a * b).sum(_values(a), keepdims=True)


def _values(a: jax.Array) -> tuple[int, ...]:
    return tuple(range(1, a.ndim))


def _check_radius(radius: float | None) -> None:
    if radius is not None and not radius > 0:
        raise ValueError(f"radius={radius} must be positive, or None for no bound")
