"""More samplers: Euler's method, multistep methods, and methods that add noise on the way.

With lambda = log(alpha / sigma), h = lambda_s - lambda_t, D = x0_hat and v = alpha' x0_hat + sigma' eps_hat at (xt, t),
and primes for the step before, a step from t to s is one of

    euler            xs = xt + (s - t) v                                                           (1)
    adams_bashforth  xs = xt + (s - t) int_0^1 V(tau) dtau                                         (2)
    unipc            xs = r xt + (alpha_s - alpha_t r) int_0^1 p(tau) X(tau) dtau,
                          r = sigma_s / sigma_t,  p(tau) proportional to e^(h tau)                 (3)
    dpmpp_2m_sde     xs = sigma_s / sigma_t e^(-eta h) xt + alpha_s (1 - e^(-(1 + eta) h)) (D + h / (2 h') (D - D'))
                          + sigma_s sqrt(1 - e^(-2 eta h)) z                                       (4)
    edm              xu = alpha_u / alpha_t xt + sqrt(sigma_u^2 - (alpha_u sigma_t / alpha_t)^2) S_noise z,
                     xs = alpha_s / alpha_u xu
                          + (sigma_s - alpha_s sigma_u / alpha_u) (eps_hat(xu, u) + eps_hat(xs', s)) / 2  (5)

In (2), V is the polynomial through v here and at the times before, tau = 0 at t and 1 at s, whatever the spacing of the
times. In (3), X is the same of D over lambda: the variation of constants formula for the flow, exact in its linear
part. (3) is the predictor; the D that is evaluated at s then serves twice, for the next step and for a correction of
this one, by (3) with X through that D too. With two points, the mean of tau under p is taken as 1 / 2, which is Zhao et
al.'s B_2(h); the predictor of order 2 is then `sample.dpmpp_2m`. In (5), u > t has
sigma_u / alpha_u = (1 + gamma) sigma_t / alpha_t, and xs' is Euler's xs, with eps_hat(xu, u) in place of the mean.

(2) is Bashforth & Adams 1883; for the flow of diffusion models Liu et al. 2022 (2202.09778), Zhang & Chen 2022
(2204.13902). (3) is UniPC, Zhao et al. 2023 (2302.04867), in its form that predicts data. (4) is the SDE version of
DPM-Solver++(2M), Lu et al. 2022 (2211.01095), for eta = 1. (5) is Karras et al. 2022 (2206.00364), algorithm 2, where
alpha = 1 and sigma = t, for any path.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from diffusion.process import Path, expand
from diffusion.sample import Memory, Sampler, log_ratio, normal, one_step, per_example, root, unless, velocity


def euler() -> Sampler:
    """Euler's method for the probability-flow ODE in t, eq. (1): first order, one evaluation a step.

    On the linear path this is `sample.ddim()`.
    """

    def step(key, predict, path, xt, t, s):
        del key
        return xt + expand(s - t, xt) * velocity(predict, path, xt, t)

    return one_step(step)


def adams_bashforth(order: int = 2) -> Sampler:
    """Adams-Bashforth, eq. (2), of `order` 1 to 4 with one evaluation a step.

    The first steps have the order that the evaluations so far allow.

    Raises:
      ValueError: the order is out of range.
    """
    _check_order(order, 4)

    def init(xt: jax.Array) -> Memory:
        # v [B, *S, C] and t [B] of the steps before, the latest first; infinite before there are any.
        return (jnp.zeros_like(xt),) * (order - 1), (jnp.full_like(xt, jnp.inf, shape=len(xt)),) * (order - 1)

    def step(key, predict, path, xt, t, s, memory):
        del key
        before, times = memory
        now = velocity(predict, path, xt, t)
        points = _points(t, s - t, times)
        weights = _integral(points, lambda n: [1 / (i + 1) for i in range(n)])
        xs = xt + expand(s - t, xt) * _weighted(weights, (now, *before))
        return xs, ((now, *before)[: order - 1], (per_example(t, xt), *times)[: order - 1])

    return Sampler(init, step)


def unipc(order: int = 2) -> Sampler:
    """UniPC, eq. (3), of `order` 1 to 3 with one evaluation a step: the variant bh2 of published programs.

    The result of the last step is not evaluated and not corrected. As for `dpmpp_2m`, steps to or from where h is
    infinite are of first order, and the first steps have the order that the evaluations so far allow.

    Raises:
      ValueError: the order is out of range.
    """
    _check_order(order, 3)

    def init(xt: jax.Array) -> Memory:
        # Of the steps before, the latest first: D [B, *S, C] and lambda [B]; of the last one, the mean of X in (3), and
        # alpha and sigma [B].
        one = jnp.ones_like(xt, shape=len(xt))
        return (jnp.zeros_like(xt),) * order, (-jnp.inf * one,) * order, jnp.zeros_like(xt), (one, one)

    def step(key, predict, path, xt, t, s, memory):
        del key
        before, logs, guess, (alpha_before, sigma_before) = memory
        now = predict(xt, t).x0
        (alpha_t, sigma_t), (alpha_s, sigma_s) = path(t), path(s)
        log_t, log_s = per_example(log_ratio(alpha_t, sigma_t), xt), log_ratio(alpha_s, sigma_s)

        known = jnp.isfinite(log_t) & jnp.isfinite(logs[0])
        h = jnp.where(known, log_t - logs[0], 1)
        (origin, *earlier) = _points(logs[0], h, logs[1:], known)
        arrived = (jnp.ones_like(h), known)
        weights = _integral((origin, arrived, *earlier), partial(_exponential, h))
        mean, ratio = _weighted(weights, (before[0], now, *before[1:])), sigma_t / sigma_before
        # What is given, rather than the step again: between steps it may have been changed, as by `edit.dps`.
        corrected = xt + expand(alpha_t - alpha_before * ratio, xt) * (mean - guess)
        xt = jnp.where(expand(known, xt), corrected, xt)

        h = log_s - log_t
        weights = _integral(_points(log_t, h, logs[: order - 1]), partial(_exponential, h))
        mean, ratio = _weighted(weights, (now, *before[: order - 1])), sigma_s / sigma_t
        xs = expand(ratio, xt) * xt + expand(alpha_s - alpha_t * ratio, xt) * mean
        scales = (per_example(alpha_t, xt), per_example(sigma_t, xt))
        return xs, ((now, *before)[:order], (log_t, *logs)[:order], mean, scales)

    return Sampler(init, step)


def dpmpp_2m_sde(eta: float = 1.0) -> Sampler:
    """SDE-DPM-Solver++(2M), eq. (4): one evaluation a step, with noise; `eta` near 0 is `sample.dpmpp_2m`.

    eta = 1 is the reverse SDE of the paper. First order on the steps where that is; it needs s < t.

    Raises:
      ValueError: eta is not positive.
    """
    if not eta > 0:
        raise ValueError(f"eta={eta} must be positive: without noise this is dpmpp_2m()")

    def init(xt: jax.Array) -> Memory:
        # D [B, *S, C] and lambda [B] of the step before.
        return jnp.zeros_like(xt), jnp.full_like(xt, -jnp.inf, shape=len(xt))

    def step(key, predict, path, xt, t, s, memory):
        x0_before, log_before = memory
        now = predict(xt, t).x0
        (alpha_t, sigma_t), (alpha_s, sigma_s) = path(t), path(s)
        log_t = per_example(log_ratio(alpha_t, sigma_t), xt)
        h, before = log_ratio(alpha_s, sigma_s) - log_t, log_t - log_before
        second = jnp.isfinite(h) & jnp.isfinite(before)
        weight = jnp.where(second, h / jnp.where(second, 2 * before, 1), 0)
        estimate = now + expand(weight, xt) * (now - x0_before)
        kept, gain = sigma_s / sigma_t * jnp.exp(-eta * h), -alpha_s * jnp.expm1(-(1 + eta) * h)
        deviation = sigma_s * root(-jnp.expm1(-2 * eta * h))
        xs = expand(kept, xt) * xt + expand(gain, xt) * estimate + expand(deviation, xt) * normal(key, xt)
        return xs, (now, log_t)

    return Sampler(init, step)


def edm(
    churn: float = 0.0,
    *,
    low: float = 0.0,
    high: float = math.inf,
    noise: float = 1.0,
    span: tuple[float, float] = (0.0, 1.0),
) -> Sampler:
    """EDM's sampler, eq. (5): Heun's method in sigma / alpha, two evaluations a step, after a step back into the noise.

    The step back is to where sigma / alpha is 1 + gamma times as large, gamma = min(churn, sqrt(2) - 1), or to the last
    time of the path. It is left out where alpha = 0. Euler's method alone, which is `sample.ddim()`, on a step from
    where alpha = 0 or to where sigma = 0. The grid of the paper is `grids.rho_grid`.

    Args:
      churn: S_churn / N of the paper, for N steps: 0, the default, adds no noise, 40 / 256 is the published value for
        ImageNet at 64x64.
      low, high: S_min and S_max, sigma / alpha between which noise is added.
      noise: S_noise, standard deviation of the noise that is added, relative to what sigma says.
      span: the range of times of the path; sigma / alpha must rise with t there, to above 1.

    Raises:
      ValueError: an argument is out of range, or in sampling with churn, the path does not end with `span`.
    """
    if not churn >= 0:
        raise ValueError(f"churn={churn} must not be negative: it is S_churn / N of N steps")
    if not 0 <= low < high:
        raise ValueError(f"low={low} must lie between 0 and high={high}")
    if not noise > 0:
        raise ValueError(f"noise={noise} must be positive")
    gamma = min(churn, math.sqrt(2) - 1)

    def step(key, predict, path, xt, t, s):
        if gamma:
            _check_end(path, span[1])
            u = _noisier(path, t, gamma, low, high, span[1])
            (alpha_t, sigma_t), (alpha, sigma) = path(t), path(u)
            ratio = jnp.where(alpha_t > 0, alpha / jnp.where(alpha_t > 0, alpha_t, 1), 1)
            added = root(sigma - ratio * sigma_t) * root(sigma + ratio * sigma_t)
            xt, t = expand(ratio, xt) * xt + noise * expand(added, xt) * normal(key, xt), u
        now = predict(xt, t)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = path(t), path(s)
        first = expand(alpha_s, xt) * now.x0 + expand(sigma_s, xt) * now.eps
        slope = sigma_s - alpha_s * sigma_t / jnp.where(alpha_t > 0, alpha_t, 1)

        def second() -> jax.Array:
            return first + expand(slope, xt) * (predict(first, s).eps - now.eps) / 2

        return unless((alpha_t <= 0) | (sigma_s <= 0), first, second)

    return one_step(step)


def _check_end(path: Path, end: float) -> None:
    """Raises ValueError if there is not yet more noise than data at the time `end`, where the path should end."""
    with jax.ensure_compile_time_eval():
        alpha, sigma = path(jnp.float32(end))
    if isinstance(alpha, jax.core.Tracer) or isinstance(sigma, jax.core.Tracer) or float(sigma) > float(alpha):
        return
    raise ValueError(
        f"the path does not end at t={end:g}, where sigma={float(sigma):g} and alpha={float(alpha):g}, and noise would "
        "be added up to there only: pass edm(churn, span=(0, last)) with the largest time that the network knows"
    )


def _noisier(path: Path, t: jax.Array, gamma: float, low: float, high: float, end: float) -> jax.Array:
    """The time at which sigma / alpha is 1 + gamma times that at t, at most `end`; t if that is not in [low, high]."""
    alpha, sigma = path(t)
    wanted = (1 + gamma) * sigma

    def halve(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        below, above = bracket
        middle = (below + above) / 2
        there, deviation = path(middle)
        beyond = deviation * alpha >= wanted * there
        return jnp.where(beyond, below, middle), jnp.where(beyond, middle, above)

    bits = jnp.finfo(t.dtype).nmant + 16
    _, found = jax.lax.fori_loop(0, bits, halve, (t, jnp.full_like(t, end)))
    inside = (alpha > 0) & (sigma >= low * alpha) & ((sigma <= high * alpha) | math.isinf(high)) & (t < end)
    return jnp.where(inside, found, t)


# A point of a polynomial: its place tau [B], and whether it is known [B]; an unknown one has a place all the same.
_Point = tuple[jax.Array, jax.Array]


def _points(
    origin: jax.Array, h: jax.Array, before: Sequence[jax.Array], known: jax.Array | bool = True
) -> list[_Point]:
    """tau = 0 at `origin`, and tau of the places `before`, the latest first, where `origin` + h is tau = 1.

    A place is known if it, all later ones and h are finite.
    """
    known = known & jnp.isfinite(origin) & jnp.isfinite(h)
    points = [(jnp.zeros_like(origin), jnp.ones_like(known))]
    for place in before:
        known = known & jnp.isfinite(place)
        # An unknown place is another one than all known ones, or the polynomial, unused, has gradients that are NaN.
        beyond = points[-1][0] - 1
        points.append((jnp.where(known, (place - origin) / jnp.where(known, h, 1), beyond), known))
    return points


def _integral(
    points: Sequence[_Point], moments: Callable[[int], Sequence[jax.Array | float]]
) -> list[jax.Array | float]:
    """Weights, one for the value at each point, in the integral of the polynomial through the known points.

    The known ones come first. moments(n) are the integrals of 1, tau, ..., tau^(n - 1).
    """
    weights = [moments(1)[0], *[0.0] * (len(points) - 1)]
    for n in range(2, len(points) + 1):
        places, known = [place for place, _ in points[:n]], points[n - 1][1]
        here = [sum(c * m for c, m in zip(_lagrange(places, k), moments(n), strict=True)) for k in range(n)]
        here += [0.0] * (len(points) - n)
        weights = [jnp.where(known, a, b) for a, b in zip(here, weights, strict=True)]
    return weights


def _lagrange(places: Sequence[jax.Array], k: int) -> list[jax.Array | float]:
    """Coefficients, of 1, tau, ..., of the polynomial that is 1 at place k and 0 at the others."""
    polynomial, scale = [1.0], 1.0
    for j, place in enumerate(places):
        if j != k:
            polynomial = [a - place * b for a, b in zip([0.0, *polynomial], [*polynomial, 0.0], strict=True)]
            scale = scale * (places[k] - place)
    return [c / scale for c in polynomial]


def _exponential(h: jax.Array, n: int) -> list[jax.Array | float]:
    """The means of tau^i, i < n, over [0, 1] with weights proportional to e^(h tau); for n = 2, 1 / 2 as in B_2(h).

    With m_i the integral of h e^(h (tau - 1)) tau^i they are m_i / m_0. By parts, m_i = 1 - i / h m_(i-1); near h = 0,
    where that cancels, from the series of the exponential function.
    """
    if n <= 2:
        return [1.0, 0.5][:n]
    small = jnp.abs(h) < 0.5
    near, far = jnp.where(small, h, 0.1), jnp.where(small, 1, h)
    moments = [-jnp.expm1(-h)]
    for i in range(1, n):
        series = sum(math.factorial(i) / math.factorial(i + k + 1) * near * (-near) ** k for k in range(12))
        moments.append(jnp.where(small, series, 1 - i / far * moments[-1]))
    return [1.0, *(m / moments[0] for m in moments[1:])]


def _weighted(weights: Sequence[jax.Array | float], values: Sequence[jax.Array]) -> jax.Array:
    """The sum of values [B, *S, C] with weights, [] or [B]."""
    return sum(expand(jnp.asarray(w), value) * value for w, value in zip(weights, values, strict=True))


def _check_order(order: int, most: int) -> None:
    if order not in range(1, most + 1):
        raise ValueError(f"order={order} must be a whole number in 1..{most}")
