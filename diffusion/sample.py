"""Samplers: from noise to data along a grid of times, in one `lax.scan`.

With (x0_hat, eps_hat) decoded at (xt, t), a step to a time s < t is one of

    ddim       xs = alpha_s x0_hat + sqrt(sigma_s^2 - eta^2 small) eps_hat + eta sqrt(small) z      (1)
    ancestral  xs = mean(x0_hat, xt) + sqrt(var) z, no noise where sigma_s = 0                      (2)
    heun       trapezoidal rule for dx/dt = alpha' x0_hat + sigma' eps_hat                          (3)
    dpmpp_2m   xs = sigma_s / sigma_t xt + (alpha_s - alpha_t sigma_s / sigma_t) D,
               D = x0_hat + h / (2 h') (x0_hat - x0_hat'),  h = log(alpha_s / sigma_s) - log(alpha_t / sigma_t)  (4)

with small, mean and var of `posterior`, and in (4) primes for the step before. (1) is Song et al. 2020 (2010.02502),
written for any path; eta = 1 is (2) with the fixed small variance. (2) is Ho et al. 2020 (2006.11239), algorithm 2.
(3) is Karras et al. 2022 (2206.00364), algorithm 1. (4) is DPM-Solver++(2M), Lu et al. 2022 (2211.01095), algorithm 2.
Euler's method, multistep methods of higher order and those that add noise on the way are in `solvers`.

A sampler is a pair of pure functions, like an optimiser of optax:

    init(xt) -> memory,    step(key [B], predict, path, xt, t, s, memory) -> (xs, memory)

`predict(xt, t)` returns an `Estimate`; t and s are scalars or [B]; a method without memory is made by `one_step`. The
samplers without noise also run from data to noise: `invert`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.posterior import Variance, between, check_variance, reverse
from diffusion.predict import Denoise, Predict, Prediction, predictor
from diffusion.process import Path, check_images, coefficients, expand

Memory = Any  # a pytree of arrays
Step = Callable[
    [jax.Array, Predict, Path, jax.Array, jax.Array, jax.Array, Memory],
    tuple[jax.Array, Memory],
]


class Sampler(NamedTuple):
    """A sampling method.

    init: xt [B, *S, C] -> memory, before the first step.
    step: (keys [B], predict, path, xt, t, s, memory) -> (xs, memory), from time t to time s.
    """

    init: Callable[[jax.Array], Memory]
    step: Step


@overload
def sample(
    key: jax.Array,
    denoise: Denoise,
    path: Path,
    x1: jax.Array,
    times: np.ndarray | jax.Array,
    y: Any = None,
    *,
    prediction: Prediction,
    sampler: Sampler | None = None,
    keep: None = None,
) -> jax.Array: ...


@overload
def sample(
    key: jax.Array,
    denoise: Denoise,
    path: Path,
    x1: jax.Array,
    times: np.ndarray | jax.Array,
    y: Any = None,
    *,
    prediction: Prediction,
    sampler: Sampler | None = None,
    keep: int,
) -> tuple[jax.Array, jax.Array]: ...


def sample(
    key: jax.Array,
    denoise: Denoise,
    path: Path,
    x1: jax.Array,
    times: np.ndarray | jax.Array,
    y: Any = None,
    *,
    prediction: Prediction,
    sampler: Sampler | None = None,
    keep: int | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """x0 [B, *S, C] from x1 along falling `times`, [T + 1] or one grid per example [T + 1, B].

    Memory does not grow with T.

    Args:
      key: one key, or one per sample [B] (`sample_keys`), so that a sample does not depend on the others of its batch.
      x1: the start, at time times[0]; usually `initial_noise`. The network is called in its dtype, and x0 has it; in
        between, xt and the times are at least float32.
      y: condition, any pytree of arrays with a leading axis B.
      sampler: default `ddim()`.
      keep: also return this many frames [keep, B, *S, C] of xt, evenly spaced, the first x1 and the last x0.

    Raises:
      ValueError: times do not fall, keep is not in 2..T + 1, or x1 is not of a floating type.
    """
    times = _checked(times, x1.shape[0], -1, "falling", "see `grids.uniform_grid`")
    return _walk(key, denoise, path, x1, times, y, prediction, sampler or ddim(), keep)


@overload
def invert(
    denoise: Denoise,
    path: Path,
    x0: jax.Array,
    times: np.ndarray | jax.Array,
    y: Any = None,
    *,
    prediction: Prediction,
    sampler: Sampler | None = None,
    keep: None = None,
) -> jax.Array: ...


@overload
def invert(
    denoise: Denoise,
    path: Path,
    x0: jax.Array,
    times: np.ndarray | jax.Array,
    y: Any = None,
    *,
    prediction: Prediction,
    sampler: Sampler | None = None,
    keep: int,
) -> tuple[jax.Array, jax.Array]: ...


def invert(
    denoise: Denoise,
    path: Path,
    x0: jax.Array,
    times: np.ndarray | jax.Array,
    y: Any = None,
    *,
    prediction: Prediction,
    sampler: Sampler | None = None,
    keep: int | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The noise x1 [B, *S, C] that a sampler without noise turns into x0, along rising `times`; see `sample`.

    Exact in the limit of small steps. x0 is taken for xt at times[0], which should lie a little above 0: at 0 most
    predictions do not determine eps. `sampler` is `ddim()`, the default, `heun()`, `dpmpp_2m()`, or of `solvers`
    `euler()`, `unipc()`, `adams_bashforth()` or `edm()` without churn.

    Raises:
      ValueError: times do not rise, keep is not in 2..T + 1, x0 is not of a floating type, or the sampler adds noise.
    """
    times = _checked(times, x0.shape[0], 1, "rising", "`uniform_grid(steps)[::-1]` with 0 replaced by 1e-3")
    return _walk(None, denoise, path, x0, times, y, prediction, sampler or ddim(), keep)


def _checked(times: np.ndarray | jax.Array, b: int, sign: int, direction: str, hint: str) -> np.ndarray | jax.Array:
    times = times if isinstance(times, jax.core.Tracer) else np.asarray(times, np.float64)
    shaped = len(times.shape) in (1, 2) and times.shape[0] >= 2 and times.shape[1:] in ((), (b,))
    if not shaped or not (isinstance(times, jax.core.Tracer) or (sign * np.diff(times, axis=0) > 0).all()):
        raise ValueError(
            f"times must be a vector of at least two {direction} values, {hint}, or one for each of {b} examples "
            f"[T + 1, {b}]; got shape {tuple(times.shape)}"
        )
    return times


def _walk(
    key: jax.Array | None,
    denoise: Denoise,
    path: Path,
    x1: jax.Array,
    times: np.ndarray | jax.Array,
    y: Any,
    prediction: Prediction,
    sampler: Sampler,
    keep: int | None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    steps = len(times) - 1
    check_images(x1)
    if keep is not None and not 2 <= keep <= steps + 1:
        raise ValueError(f"keep={keep} frames must lie in 2..{steps + 1} for {steps} steps")
    b = x1.shape[0]
    keys = None if key is None else keys_of(key, b)
    # In bfloat16 neighbouring times would be equal, and rounding would accumulate over the steps.
    wide = jnp.promote_types(x1.dtype, jnp.float32)
    times = jnp.asarray(times, wide)
    predict = predictor(denoise, path, prediction, y, dtype=x1.dtype)

    # Frame k is kept after step_of[k] steps; slot `keep` lies outside the buffer, and writes to it are dropped.
    slots = np.full(steps + 1, keep or 0)
    frames = None
    if keep is not None:
        slots[np.round(np.linspace(0, steps, keep)).astype(int)] = np.arange(keep)
        frames = jnp.zeros((keep, *x1.shape), x1.dtype).at[0].set(x1)

    def advance(carry, now):
        xt, memory, frames = carry
        t, s, i, slot = now
        step_keys = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        xs, memory = sampler.step(step_keys, predict, path, xt, t, s, memory)
        if frames is not None:
            frames = frames.at[slot].set(xs.astype(x1.dtype), mode="drop")
        return (xs, memory, frames), None

    start = x1.astype(wide)
    grid = (times[:-1], times[1:], jnp.arange(steps), jnp.asarray(slots[1:]))
    (x0, _, frames), _ = jax.lax.scan(advance, (start, sampler.init(start), frames), grid)
    x0 = x0.astype(x1.dtype)
    return x0 if frames is None else (x0, frames)


def sample_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """One key per sample [B] from sample numbers `index` [B]: sample i depends on (key, i) alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def keys_of(key: jax.Array, b: int) -> jax.Array:
    """The keys of b samples: `key` if it is b of them already, else `sample_keys` of the numbers 0..b - 1.

    Raises:
      ValueError: `key` is neither one typed key nor b of them.
    """
    keys = key if key.ndim else sample_keys(key, jnp.arange(b))
    if keys.shape != (b,) or not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        raise ValueError(f"key must be one typed key (jax.random.key) or {b} of them, not {keys.dtype} {keys.shape}")
    return keys


def normal(keys: jax.Array | None, like: jax.Array) -> jax.Array:
    """Standard normal noise of the shape and dtype of `like` [B, ...], one key per example [B].

    Raises:
      ValueError: there are no keys, as in `invert` and for the teacher of `methods.distill`.
    """
    if keys is None:
        raise ValueError(
            "this sampler adds noise, which cannot be inverted or distilled: use ddim(), heun() or dpmpp_2m(), or one "
            "of `solvers` without noise"
        )
    return jax.vmap(lambda k: jax.random.normal(k, like.shape[1:], like.dtype))(keys)


def initial_noise(
    keys: jax.Array, shape: tuple[int, ...], path: Path | None = None, t: float | jax.Array | None = None
) -> jax.Array:
    """x1 [B, *shape] of standard normal values, one key per sample.

    Pass a `path` whose noise does not end at unit scale (variance-exploding ones, JiT's noise scale), and the time t,
    [] or [B], at which sampling starts: x1 is then sigma(t) times normal noise.

    Raises:
      ValueError: only one of path and t is given.
    """
    if (path is None) != (t is None):
        raise ValueError(f"path={path} and t={t} belong together: noise of the scale sigma(t), or of unit scale")
    # Steps fold in their index 0, 1, ...; the start must not share their noise.
    x1 = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 2**31 - 1), shape))(keys)
    return x1 if path is None else expand(path(jnp.asarray(t, x1.dtype))[1], x1) * x1


def one_step(step: Callable[..., jax.Array]) -> Sampler:
    """The sampler of a method without memory: step(keys, predict, path, xt, t, s) -> xs."""

    def whole(key, predict, path, xt, t, s, memory):
        return step(key, predict, path, xt, t, s), memory

    return Sampler(lambda xt: (), whole)


def ddim(eta: float | jax.Array = 0.0, overstep: float = 1.0) -> Sampler:
    """DDIM, eq. (1): deterministic for eta = 0, ancestral for eta = 1. eta may be traced, or one per example [B].

    `overstep` is the blog's step size: the image moves to t - overstep (t - s) and is then taken for one at time s. The
    last step may end at a time below 0, for which the path must be defined.

    Raises:
      ValueError: eta or overstep is out of range, or both are used.
    """
    known = isinstance(eta, int | float)
    if known and not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must lie in [0, 1]")
    if not overstep > 0:
        raise ValueError(f"overstep={overstep} must be positive")
    if overstep != 1 and not (known and not eta):
        raise ValueError(f"eta={eta} with overstep={overstep}: overstepping is defined for the deterministic sampler")

    def step(key, predict, path, xt, t, s):
        now = predict(xt, t)
        alpha, sigma = path(t - overstep * (t - s) if overstep != 1 else s)
        alpha, sigma = expand(alpha, xt), expand(sigma, xt)
        if known and not eta:
            return alpha * now.x0 + sigma * now.eps
        small = expand(between(path, t, s).small, xt)
        scale = eta if known else expand(jnp.asarray(eta), xt)
        rest = root(jnp.square(sigma) - scale**2 * small)
        return alpha * now.x0 + rest * now.eps + scale * root(small) * normal(key, xt)

    return one_step(step)


def ancestral(variance: Variance = "fixed_small") -> Sampler:
    """Sampling from the chain's own conditionals, eq. (2), with a variance of `posterior`; it needs s < t."""
    check_variance(variance)

    def step(key, predict, path, xt, t, s):
        model = reverse(variance, path, predict(xt, t), xt, t, s)
        deviation = jnp.where(expand(path(s)[1] > 0, xt), jnp.exp(model.log_var / 2), 0)
        return model.mean + deviation * normal(key, xt)

    return one_step(step)


def heun() -> Sampler:
    """Heun's second-order method, eq. (3): two evaluations a step, one (Euler's) on a step to where sigma = 0."""

    def step(key, predict, path, xt, t, s):
        del key
        here, h = velocity(predict, path, xt, t), expand(s - t, xt)
        euler = xt + h * here
        # At sigma = 0 a network that predicts x0 does not determine eps, so the slope there is unknown.
        ends = path(s)[1] <= 0
        return unless(ends, euler, lambda: xt + h * (here + velocity(predict, path, euler, s)) / 2)

    return one_step(step)


def velocity(predict: Predict, path: Path, xt: jax.Array, t: jax.Array) -> jax.Array:
    """The slope dx/dt of the probability-flow ODE at xt [B, *S, C], eq. (3)."""
    now, coef = predict(xt, t), coefficients(path, t)
    return expand(coef.dalpha, xt) * now.x0 + expand(coef.dsigma, xt) * now.eps


def unless(ends: jax.Array, first: jax.Array, second: Callable[[], jax.Array]) -> jax.Array:
    """`first` [B, *S, C] where `ends`, [] or [B], holds, else second(), which is computed only if it is needed."""
    if not ends.ndim:
        return jax.lax.cond(ends, lambda: first, second)
    return jax.lax.cond(ends.all(), lambda: first, lambda: jnp.where(expand(ends, first), first, second()))


def dpmpp_2m() -> Sampler:
    """DPM-Solver++(2M), eq. (4): second order with one evaluation a step, from the x0_hat of the step before.

    First order on the first step, on one to or from where h is infinite, alpha or sigma = 0, and on the one after.
    """

    def init(xt: jax.Array) -> Memory:
        # x0_hat [B, *S, C] and log(alpha / sigma) [B] of the step before.
        return jnp.zeros_like(xt), jnp.full_like(xt, -jnp.inf, shape=len(xt))

    def step(key, predict, path, xt, t, s, memory):
        del key
        x0_before, log_before = memory
        now = predict(xt, t)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = path(t), path(s)
        log_t, log_s = log_ratio(alpha_t, sigma_t), log_ratio(alpha_s, sigma_s)
        log_t = per_example(log_t, xt)
        h, before = log_s - log_t, log_t - log_before
        second = jnp.isfinite(h) & jnp.isfinite(before)
        weight = jnp.where(second, h / jnp.where(second, 2 * before, 1), 0)
        slope = expand(weight, xt) * (now.x0 - x0_before)
        ratio = sigma_s / sigma_t
        xs = expand(ratio, xt) * xt + expand(alpha_s - alpha_t * ratio, xt) * (now.x0 + slope)
        return xs, (now.x0, log_t)

    return Sampler(init, step)


def per_example(a: jax.Array, xt: jax.Array) -> jax.Array:
    """a, [] or [B], as [B], to be kept in the memory of a sampler of xt [B, *S, C]."""
    # A sum, not a broadcast: inside `shard_map` the memory varies over the mesh, and times may not.
    return jnp.zeros_like(xt, shape=len(xt)) + a


def root(x: jax.Array) -> jax.Array:
    """The root of x, 0 where rounding has made it negative; with the gradient 0, not infinity, where it is 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def log_ratio(alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """log(alpha / sigma), infinite where one of them is 0, without a gradient there."""
    finite = (alpha > 0) & (sigma > 0)
    log_alpha, log_sigma = (jnp.log(jnp.where(finite, value, 1)) for value in (alpha, sigma))
    return jnp.where(finite, log_alpha - log_sigma, jnp.where(sigma > 0, -jnp.inf, jnp.inf))
