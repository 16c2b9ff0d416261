"""The likelihood of data under a denoiser, by the ordinary differential equation of its flow; for every path.

    dx/dt = v(x, t) = alpha' x0_hat + sigma' eps_hat                                               (1)
    log p(x_t0) = log N(x_t1; 0, std^2 I) + integral over [t0, t1] of div v dt                     (2)
    div v = sum_k dv_k/dx_k,  or an unbiased estimate  z^T dv/dx z,  z of independent signs        (3)
    log p(x0) = log p(x_t0 = alpha(t0) x0) + D log alpha(t0)                                       (4)

Song et al. 2020 (2011.13456), section 4.3 and appendix D.2; (3) with signs (Rademacher's) is Hutchinson's estimate,
with the same z all along, so that the integrand is smooth. (1) and (2) are integrated together along a grid of times by
the classical Runge-Kutta method of fourth order or by Heun's of second. The start t0 must lie above 0, where most
predictions do not determine eps: (4) takes x0 with the noise of time t0 for x0, an error of order sigma(t0)^2.

Unlike `vlb` this is the density of a deterministic sampler in the limit of small steps. `bits_per_dim` applies it to
images in 256 levels, which are a grid of points and have no density, with uniform noise of the width of a level added:
its mean is an upper bound of the bits of the images themselves (Theis et al. 2015, 1511.01844).
"""

import math
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.predict import Denoise, Prediction, predictor
from diffusion.process import Path, coefficients
from diffusion.sample import keys_of

Solver = Literal["rk4", "heun"]
Rates = tuple[jax.Array, jax.Array]  # dalpha/dt and dsigma/dt

# Uses of an example's key.
_PROBES, _DEQUANTISATION = 1, 2
# How far before the end of a step, of its length, the path is differentiated, to extrapolate from there.
_INSIDE = 2.0**-11


class FlowLikelihood(NamedTuple):
    """log p(x0) in nats, or bits per dimension, and the parts whose sum it is."""

    total: jax.Array  # [B]
    prior: jax.Array  # [B], of x1 under the normal distribution from which sampling starts
    change: jax.Array  # [B], of the volume along the flow, the integral in eq. (2), and that of eq. (4)
    x1: jax.Array  # [B, *S, C], the noise that flows to x0


def log_density(
    key: jax.Array | None,
    denoise: Denoise,
    path: Path,
    x0: jax.Array,
    times: np.ndarray | jax.Array,
    y: Any = None,
    *,
    prediction: Prediction,
    probes: int | None = 1,
    solver: Solver = "rk4",
    prior_std: float | None = None,
) -> FlowLikelihood:
    """log p(x0), in nats, of x0 [B, *S, C], eqs. (1) to (4). Memory does not grow with the number of steps.

    Args:
      key: one key, or one per example [B]; None for an exact trace, which draws nothing.
      times: rising [T + 1], from a little above 0 to where sampling starts; see `rising_times`.
      probes: how many z of eq. (3) to average, a derivative each; None for the exact trace, D derivatives.
      prior_std: standard deviation of the noise from which sampling starts, sigma(times[-1]) by default.

    Raises:
      ValueError: times do not rise from above 0, or another argument is unknown or out of range.
    """
    times = times if isinstance(times, jax.core.Tracer) else np.asarray(times, np.float64)
    _check_times(times)
    if solver not in get_args(Solver):
        raise ValueError(f"solver={solver!r} is not one of {get_args(Solver)}")
    if probes is not None and (probes < 1 or key is None):
        raise ValueError(f"probes={probes} must be at least 1 and needs a key; None is the exact trace")
    b, dims = x0.shape[0], math.prod(x0.shape[1:])
    wide = jnp.promote_types(x0.dtype, jnp.float32)
    predict = predictor(denoise, path, prediction, y, dtype=x0.dtype)

    def velocity(x: jax.Array, t: jax.Array, rates: Rates) -> jax.Array:
        now = predict(x, t)
        return rates[0] * now.x0 + rates[1] * now.eps

    signs = None if probes is None else _signs(keys_of(key, b), probes, x0.shape[1:], wide)

    def slope(x: jax.Array, t: jax.Array, rates: Rates) -> tuple[jax.Array, jax.Array]:
        """v and div v at (x, t), eqs. (1) and (3), for the derivatives of the path there."""
        return _with_divergence(lambda x: velocity(x, t, rates), x, signs)

    def step(state, now):
        t, s = now
        return _runge_kutta(slope, partial(_rates, path), state, t, s, solver), None

    grid = jnp.asarray(times, wide)
    alpha = path(grid[0])[0]
    start = alpha * x0.astype(wide), jnp.zeros(b, wide)
    (x1, divergence), _ = jax.lax.scan(step, start, (grid[:-1], grid[1:]))
    std = path(grid[-1])[1] if prior_std is None else jnp.asarray(prior_std, wide)
    square = jnp.square(x1 / std).reshape(b, -1).sum(1)
    prior = -0.5 * square - dims * 0.5 * math.log(2 * math.pi) - dims * jnp.log(std)
    change = divergence + dims * jnp.log(alpha)
    return FlowLikelihood(prior + change, prior, change, x1)


def bits_per_dim(
    key: jax.Array,
    denoise: Denoise,
    path: Path,
    x0: jax.Array,
    times: np.ndarray | jax.Array,
    y: Any = None,
    *,
    prediction: Prediction,
    probes: int | None = 1,
    solver: Solver = "rk4",
    prior_std: float | None = None,
    levels: int = 256,
) -> FlowLikelihood:
    """Bits per dimension of images x0 [B, *S, C] in [-1, 1], in `levels` equal levels, with uniform noise on them.

    The noise is that of the key: the same key, the same noise. Arguments and errors as in `log_density`.

    Raises:
      ValueError: there are fewer than 2 levels.
    """
    if levels < 2:
        raise ValueError(f"levels={levels} must be at least 2")
    keys, width = keys_of(key, x0.shape[0]), 2 / (levels - 1)
    uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, _DEQUANTISATION), x0.shape[1:], x0.dtype))
    x0 = x0 + width * (uniform(keys) - 0.5)
    options = {"prediction": prediction, "probes": probes, "solver": solver, "prior_std": prior_std}
    found = log_density(keys, denoise, path, x0, times, y, **options)
    scale = -1 / (math.prod(x0.shape[1:]) * math.log(2))
    level = -math.log2(width)  # from a density to the mass of a level
    return FlowLikelihood(scale * found.total + level, scale * found.prior, scale * found.change + level, found.x1)


def rising_times(steps: int, first: float = 1e-3, start: float = 1.0, sharpness: float = 1e-3) -> np.ndarray:
    """Times [steps + 1] from `first` to `start`, in float64, closer at both ends, where the flow changes fastest.

    They are even in log(t / (1 + sharpness - t)), with t in units of `start`.

    Raises:
      ValueError: an argument is out of range.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    if not 0 < first < start:
        raise ValueError(f"first={first} must lie between 0 and start={start}")
    if not sharpness > 0:
        raise ValueError(f"sharpness={sharpness} must be positive; large values give even times in log t")
    ends = np.array([first / start, 1.0])
    low, high = np.log(ends) - np.log1p(sharpness - ends)
    t = (1 + sharpness) / (1 + np.exp(-np.linspace(low, high, steps + 1)))
    t[[0, -1]] = ends
    return start * t


def _check_times(times: np.ndarray | jax.Array) -> None:
    risen = isinstance(times, jax.core.Tracer) or (times.size and times.flat[0] > 0 and (np.diff(times) > 0).all())
    if times.ndim != 1 or len(times) < 2 or not risen:
        raise ValueError(
            f"times must be a vector of two or more values that rise from above 0, see `rising_times`, not of shape "
            f"{times.shape}{f' from {times.flat[0]}' if times.size and risen is not True else ''}"
        )


def _signs(keys: jax.Array, probes: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Independent signs [probes, B, *shape]."""
    draw = jax.vmap(lambda k: jax.random.rademacher(jax.random.fold_in(k, _PROBES), (probes, *shape), dtype))
    return jnp.moveaxis(draw(keys), 0, 1)


def _with_divergence(velocity: Any, x: jax.Array, signs: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """velocity(x) [B, *S, C] and its divergence [B], eq. (3): exact, or by signs [probes, B, *S, C]."""
    v, derivative = jax.linearize(velocity, x)
    b, dims = x.shape[0], math.prod(x.shape[1:])
    if signs is not None:
        along = jax.lax.map(lambda z: (z * derivative(z)).reshape(b, -1).sum(1), signs)
        return v, along.mean(0)

    def element(k: jax.Array) -> jax.Array:
        one = jnp.zeros((b, dims), x.dtype).at[:, k].set(1)
        return derivative(one.reshape(x.shape)).reshape(b, dims)[:, k]

    return v, jax.lax.map(element, jnp.arange(dims)).sum(0)


def _rates(path: Path, t: jax.Array) -> Rates:
    coef = coefficients(path, t)
    return coef.dalpha, coef.dsigma


def _runge_kutta(slope: Any, rates: Any, state: Any, t: jax.Array, s: jax.Array, solver: Solver) -> Any:
    """The state (x, log volume) at time s from that at t: the slope does not depend on the second."""
    h, half = s - t, (t + s) / 2
    start, middle, near = rates(t), rates(half), rates(s - h * _INSIDE)
    # A chain has kinks at its times: the end of a step needs the derivative of this step, not that of the next one.
    end = jax.tree.map(lambda a, b: a + _INSIDE / (0.5 - _INSIDE) * (a - b), near, middle)

    def at(time: jax.Array, length: jax.Array, along: Any, rates: Rates) -> Any:
        return slope(state[0] + length * along[0], time, rates)

    first = slope(state[0], t, start)
    if solver == "heun":
        weighted = [(1 / 2, first), (1 / 2, at(s, h, first, end))]
    else:
        second = at(half, h / 2, first, middle)
        third = at(half, h / 2, second, middle)
        weighted = [(1 / 6, first), (1 / 3, second), (1 / 3, third), (1 / 6, at(s, h, third, end))]
    return tuple(a + h * sum(w * k[i] for w, k in weighted) for i, a in enumerate(state))
