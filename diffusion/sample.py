"""Samplers: from noise to data along a grid of times, in one `lax.scan`.

With (x0_hat, eps_hat) decoded at (xt, t), a step to a time s < t is one of

    ddim       xs = alpha_s x0_hat + sqrt(sigma_s^2 - eta^2 small) eps_hat + eta sqrt(small) z      (1)
    ancestral  xs = mean(x0_hat, xt) + sqrt(var) z, no noise where sigma_s = 0                      (2)
    heun       trapezoidal rule for dx/dt = alpha' x0_hat + sigma' eps_hat                          (3)

with small, mean and var of `variance`. (1) is Song et al. 2020 (2010.02502), written for any path; eta = 1 is (2) with
the fixed small variance. (2) is Ho et al. 2020 (2006.11239), algorithm 2. (3) is Karras et al. 2022 (2206.00364),
algorithm 1. A step is any function (key [B], predict, path, xt, t, s) -> xs; `predict(xt, t)` returns an `Estimate`.
The steps without noise also go up, from data to noise: `invert`.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.predict import Denoise, Estimate, Prediction, estimate
from diffusion.process import Path, coefficients, expand
from diffusion.variance import Variance, between, check_variance, reverse

Predict = Callable[[jax.Array, jax.Array], Estimate]
Step = Callable[[jax.Array, Predict, Path, jax.Array, jax.Array, jax.Array], jax.Array]


def sample(
    key: jax.Array,
    denoise: Denoise,
    path: Path,
    x1: jax.Array,
    times: np.ndarray | jax.Array,
    y: jax.Array | None = None,
    *,
    prediction: Prediction,
    step: Step | None = None,
    keep: int | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """x0 [B, *S, C] from x1 along `times` [T + 1], which fall. Memory does not grow with T.

    Args:
      key: one key, or one per sample [B] (`sample_keys`), so that a sample does not depend on its neighbours.
      x1: where to start, at time times[0]; usually `initial_noise`. The network sees its dtype, and x0 has it; what
        lies between is at least float32, as times are.
      step: default `ddim()`.
      keep: also return this many frames [keep, B, *S, C] of xt, evenly spaced, the first x1 and the last x0.

    Raises:
      ValueError: times do not fall, keep is not in 2..T + 1, or x1 is not of a floating type.
    """
    if not isinstance(times, jax.core.Tracer):
        times = np.asarray(times, np.float64)
        if times.ndim != 1 or len(times) < 2 or not (np.diff(times) < 0).all():
            raise ValueError("times must be a vector of at least two falling values, see `uniform_grid`")
    return _walk(key, denoise, path, x1, times, y, prediction, step or ddim(), keep)


def invert(
    denoise: Denoise,
    path: Path,
    x0: jax.Array,
    times: np.ndarray | jax.Array,
    y: jax.Array | None = None,
    *,
    prediction: Prediction,
    step: Step | None = None,
    keep: int | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The noise x1 [B, *S, C] that a sampler without noise turns into x0, along rising `times` [T + 1]; see `sample`.

    Exact in the limit of small steps. x0 is taken for xt at times[0], which should lie a little above 0: at 0 most
    predictions say nothing about eps. `step` is `ddim()`, the default, or `heun()`.

    Raises:
      ValueError: times do not rise, keep is not in 2..T + 1, or x0 is not of a floating type.
    """
    if not isinstance(times, jax.core.Tracer):
        times = np.asarray(times, np.float64)
        if times.ndim != 1 or len(times) < 2 or not (np.diff(times) > 0).all():
            raise ValueError("times must be a vector of at least two rising values, `uniform_grid(steps)[::-1]`")
    return _walk(jax.random.key(0), denoise, path, x0, times, y, prediction, step or ddim(), keep)


def _walk(
    key: jax.Array,
    denoise: Denoise,
    path: Path,
    x1: jax.Array,
    times: np.ndarray | jax.Array,
    y: jax.Array | None,
    prediction: Prediction,
    step: Step,
    keep: int | None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    steps = len(times) - 1
    if not jnp.issubdtype(x1.dtype, jnp.floating):
        raise ValueError(f"pictures of {x1.dtype} cannot carry noise: pass floating-point ones, x / 127.5 - 1")
    if keep is not None and not 2 <= keep <= steps + 1:
        raise ValueError(f"keep={keep} frames must lie in 2..{steps + 1} for {steps} steps")
    b = x1.shape[0]
    keys = key if key.ndim else sample_keys(key, jnp.arange(b))
    if keys.shape != (b,) or not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        raise ValueError(f"key must be one typed key (jax.random.key) or {b} of them, not {keys.dtype} {keys.shape}")
    # In bfloat16 neighbouring times would be one, and rounding would add up over the steps.
    wide = jnp.promote_types(x1.dtype, jnp.float32)
    times = jnp.asarray(times, wide)

    def predict(xt: jax.Array, t: jax.Array) -> Estimate:
        t = jnp.broadcast_to(t, (b,))
        return estimate(prediction, coefficients(path, t), xt, denoise(xt.astype(x1.dtype), t, y))

    # Frame k is kept after step_of[k] steps; slot `keep` lies outside the buffer, and writes to it are dropped.
    slots = np.full(steps + 1, keep or 0)
    frames = None
    if keep is not None:
        slots[np.round(np.linspace(0, steps, keep)).astype(int)] = np.arange(keep)
        frames = jnp.zeros((keep, *x1.shape), x1.dtype).at[0].set(x1)

    def advance(carry, now):
        xt, frames = carry
        t, s, i, slot = now
        xs = step(jax.vmap(jax.random.fold_in, (0, None))(keys, i), predict, path, xt, t, s)
        if frames is not None:
            frames = frames.at[slot].set(xs.astype(x1.dtype), mode="drop")
        return (xs, frames), None

    grid = (times[:-1], times[1:], jnp.arange(steps), jnp.asarray(slots[1:]))
    (x0, frames), _ = jax.lax.scan(advance, (x1.astype(wide), frames), grid)
    x0 = x0.astype(x1.dtype)
    return x0 if keep is None else (x0, frames)


def sample_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """One key per sample [B] from sample numbers `index` [B]: sample i depends on (key, i) alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x1 [B, *shape] of standard normal values, one key per sample."""
    # Steps fold in their index 0, 1, ...; the start must not share their noise.
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 2**31 - 1), shape))(keys)


def uniform_grid(steps: int, start: float = 1.0, last: float | None = None) -> np.ndarray:
    """Times [steps + 1] from `start` to 0 in equal steps.

    With `last` they are equal down to there, and the last step leaps to 0: the data is then what the network guesses at
    time `last`. A network that saw few times near 0 in training guesses no better there.
    """
    return shifted_grid(steps, 1.0, start, last)


def shifted_grid(steps: int, shift: float = 1.0, start: float = 1.0, last: float | None = None) -> np.ndarray:
    """`uniform_grid` bent: t -> shift t / (1 + (shift - 1) t) (Esser et al. 2024, 2403.03206): > 1 dwells in noise.

    `start` is where it starts before it is bent, `last` is a time itself.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    if not 0 < start <= 1:
        raise ValueError(f"start={start} must lie in (0, 1]")
    if not shift > 0:
        raise ValueError(f"shift={shift} must be positive")
    end = 0.0
    if last is not None:
        end = last / (shift - (shift - 1) * last)
        if not 0 < end < start:
            raise ValueError(f"last={last} must lie between 0 and where the times start")
        if steps == 1:
            raise ValueError(f"steps=1 go from start={start} to 0 at once: leave out last={last}")
    t = np.linspace(start, end, steps + (last is None))
    t = shift * t / (1 + (shift - 1) * t)
    return t if last is None else np.append(t, 0.0)


def respaced_grid(spec: str, steps: int) -> np.ndarray:
    """Falling times that keep some of the `steps` of a chain, i / steps, and end at 0; `sample` then takes these steps.

    "250" keeps 250 evenly spaced ones; "10,15,20" cuts the chain, from data to noise, into equal sections and keeps so
    many of each (Nichol & Dhariwal 2021, 2102.09672); "ddim25" keeps 25 at one integer stride (Song et al. 2020,
    2010.02502); "" keeps all.

    Raises:
      ValueError: that many steps cannot be kept.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    if spec.startswith("ddim"):
        wanted = spec.removeprefix("ddim")
        strides = [n for n in range(1, steps + 1) if str(-(-steps // n)) == wanted]
        if not strides:
            raise ValueError(f"respacing={spec!r}: no integer stride keeps {wanted!r} of {steps} steps")
        kept = np.arange(0, steps, strides[0])
    else:
        counts = spec.split(",") if spec else [str(steps)]
        if not all(count.strip().isdecimal() and int(count) for count in counts):
            raise ValueError(f"respacing={spec!r} is neither counts as in '250' or '10,15,20' nor 'ddim25'")
        sizes = [steps // len(counts) + (i < steps % len(counts)) for i in range(len(counts))]
        kept = [
            start + _spread(int(count), size, spec)
            for start, size, count in zip(itertools.accumulate(sizes, initial=0), sizes, counts, strict=False)
        ]
        kept = np.concatenate(kept)
    return np.append((kept[::-1] + 1) / steps, 0.0)


def _spread(count: int, size: int, spec: str) -> np.ndarray:
    """`count` of 0..size - 1 from end to end, as evenly as whole numbers can be."""
    if count > size:
        raise ValueError(f"respacing={spec!r} keeps {count} of a section of {size} steps")
    stride = (size - 1) / (count - 1) if count > 1 else 1.0
    return np.round(np.cumsum([0.0] + [stride] * (count - 1))).astype(int)


def ddim(eta: float = 0.0, overstep: float = 1.0) -> Step:
    """DDIM, eq. (1): deterministic for eta = 0, ancestral for eta = 1.

    `overstep` is the blog's step size: the picture moves to t - overstep (t - s) while the clock moves to s. The last
    step may then land at a time below 0, for which the path must be defined.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must lie in [0, 1]")
    if not overstep > 0:
        raise ValueError(f"overstep={overstep} must be positive")
    if eta and overstep != 1:
        raise ValueError(f"eta={eta} with overstep={overstep}: overstepping is defined for the deterministic sampler")

    def step(key, predict, path, xt, t, s):
        now = predict(xt, t)
        alpha, sigma = path(t - overstep * (t - s) if overstep != 1 else s)
        if not eta:
            return alpha * now.x0 + sigma * now.eps
        small = between(path, t, s).small
        # Rounding can push the difference just below zero.
        rest = jnp.sqrt(jnp.maximum(jnp.square(sigma) - eta**2 * small, 0))
        return alpha * now.x0 + rest * now.eps + eta * jnp.sqrt(jnp.maximum(small, 0)) * _normal(key, xt)

    return step


def ancestral(variance: Variance = "fixed_small") -> Step:
    """Sampling from the chain's own conditionals, eq. (2), with a variance of `variance`; it needs s < t."""
    check_variance(variance)

    def step(key, predict, path, xt, t, s):
        model = reverse(variance, path, predict(xt, t), xt, t, s)
        deviation = jnp.where(expand(path(s)[1] > 0, xt), jnp.exp(model.log_var / 2), 0)
        return model.mean + deviation * _normal(key, xt)

    return step


def _normal(keys: jax.Array, like: jax.Array) -> jax.Array:
    return jax.vmap(lambda k: jax.random.normal(k, like.shape[1:], like.dtype))(keys)


def heun() -> Step:
    """Heun's second-order method, eq. (3): two evaluations a step, one (Euler's) on a step to where sigma = 0."""

    def step(key, predict, path, xt, t, s):
        del key

        def velocity(x: jax.Array, at: jax.Array) -> jax.Array:
            now, coef = predict(x, at), coefficients(path, at)
            return coef.dalpha * now.x0 + coef.dsigma * now.eps

        here = velocity(xt, t)
        euler = xt + (s - t) * here
        # At sigma = 0 a network that predicts x0 says nothing about eps, so the slope there is unknown.
        return jax.lax.cond(path(s)[1] <= 0, lambda: euler, lambda: xt + (s - t) * (here + velocity(euler, s)) / 2)

    return step
