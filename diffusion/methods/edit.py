"""Editing with a trained denoiser: image-to-image, inpainting, inversion, and images from linear measurements.

    sdedit    x_t = alpha x0 + sigma eps at a time t below the first one, then sampling from t       (1)
    repaint   after each step to s, known pixels become alpha_s x0 + sigma_s eps; and at times
              x_t = alpha_t / alpha_s xs + sqrt(large) z, back by `jump` steps, which are repeated    (2)
    dps       xs - scale grad_xt ||b - A x0_hat(xt)||    after each step                             (3)
    given     x0_hat + sigma^2 / alpha g,  eps_hat - sigma g,    g = grad_xt log p(b | xt)           (4)
              log p(b | xt) = log N(b; A x0_hat(xt), deviation^2 I + spread A A^T)                   (5)

(1) is SDEdit, Meng et al. 2021 (2108.01073). (2) is RePaint, Lugmayr et al. 2022 (2201.09865), with `large` of
`posterior`: a step that sees the known pixels only through their noise needs some repetitions to agree with them. (3)
and (4) sample from p(x0 | b) for a measurement b = A x0 + deviation z with a linear A. (3) is algorithm 1 of diffusion
posterior sampling, Chung et al. 2022 (2209.14687), a sampler from a sampler; (4) is Bayes' rule for the score, a
denoiser from a denoiser, and with spread = 0 their eq. (16). With the variance of x0 given xt for `spread`, as in
Song et al. 2023 ("Pseudoinverse-guided diffusion models for inverse problems", ICLR), (4) is exact for independent
normal data, see `gaussian_spread`.

Masks are arrays that broadcast to the images [B, *S, C], true where a pixel is known. Operators A are linear functions
[B, *S, C] -> [B, ...].
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.posterior import between
from diffusion.predict import Denoise, Output, Prediction, decode, pred_of, predictor, replace_pred, target
from diffusion.process import Path, coefficients, expand, noise
from diffusion.sample import Sampler, ancestral, heun, initial_noise, invert, keys_of, normal, root, sample

Operator = Callable[[jax.Array], jax.Array]  # linear, [B, *S, C] -> [B, ...]

# Uses of a step's key beside that of the sampler, which draws from the key itself.
_KNOWN, _AGAIN = 1, 2


def from_strength(times: np.ndarray, strength: float) -> np.ndarray:
    """The part of falling times [T + 1] from t = strength times[0] on, which is its first value.

    Raises:
      ValueError: the strength lies outside (0, 1].
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} must lie in (0, 1]: 1 leaves nothing of the image")
    start = strength * times[0]
    return np.append(start, times[times < start - 1e-9 * times[0]])  # not a time that is equal but for rounding


def sdedit(
    key: jax.Array,
    denoise: Denoise,
    path: Path,
    x0: jax.Array,
    times: np.ndarray | jax.Array,
    y: Any = None,
    *,
    prediction: Prediction,
    sampler: Sampler | None = None,
) -> jax.Array:
    """Images [B, *S, C] near x0, eq. (1): noised to times[0], and sampled from there along `times`, `from_strength`.

    Arguments and errors as in `sample.sample`. Where alpha(times[0]) = 0 it is sampling, whatever x0 is.
    """
    keys = keys_of(key, len(x0))
    eps = initial_noise(keys, x0.shape[1:]).astype(x0.dtype)
    xt = noise(path, x0, jnp.full(len(x0), times[0], jnp.promote_types(x0.dtype, jnp.float32)), eps).astype(x0.dtype)
    return sample(keys, denoise, path, xt, times, y, prediction=prediction, sampler=sampler)


def keeping(sampler: Sampler, known: jax.Array, mask: jax.Array) -> Sampler:
    """The sampler with the pixels of the images `known` where `mask` is true, noised to the time of each step, eq. (2).

    At t = 0 they are exactly those of `known`. A `sampler` without noise needs keys all the same.
    """

    def step(key, predict, path, xt, t, s, memory):
        xs, memory = sampler.step(key, predict, path, xt, t, s, memory)
        alpha, sigma = (expand(a, xt) for a in path(s))
        return jnp.where(mask, alpha * known + sigma * normal(_use(key, _KNOWN), xt), xs), memory

    return Sampler(sampler.init, step)


def repaint_times(times: np.ndarray, jump: int = 10, resamples: int = 10) -> np.ndarray:
    """The times [M + 1] of `repaint`: falling `times` [T + 1] in which stretches of `jump` steps are made `resamples`
    times, each time after a rise to where the stretch began; M is about 2 T resamples, half of it evaluations.

    Raises:
      ValueError: `jump` or `resamples` is below 1.
    """
    if jump < 1 or resamples < 1:
        raise ValueError(f"jump={jump} and resamples={resamples} must be at least 1")
    steps = len(times) - 1
    left = dict.fromkeys(range(1, steps - jump + 1, jump), resamples - 1)
    level, levels = steps, [steps]  # counted from the data
    while level:
        level -= 1
        levels.append(level)
        if left.get(level, 0):
            left[level] -= 1
            levels.extend(range(level + 1, level + jump + 1))
            level += jump
    return np.asarray(times)[steps - np.array(levels)]


def repaint(
    key: jax.Array,
    denoise: Denoise,
    path: Path,
    known: jax.Array,
    mask: jax.Array,
    times: np.ndarray | jax.Array,
    y: Any = None,
    *,
    prediction: Prediction,
    sampler: Sampler | None = None,
) -> jax.Array:
    """Images [B, *S, C] that are `known` where `mask` is true and sampled elsewhere, eq. (2).

    Args:
      key: one key, or one per sample [B], as in `sample.sample`.
      known: images [B, *S, C]; what they hold where the mask is false is not used.
      mask: boolean, broadcasts to them.
      times: of `repaint_times`, or falling ones for no repetition; they begin with noise, of which sigma is all that
        there is, and end at 0.
      sampler: default `ancestral()`, as published.

    Raises:
      ValueError: the mask is not boolean, or does not broadcast to the images, or the times are no such vector.
    """
    check_mask(mask, known.shape)
    times = times if isinstance(times, jax.core.Tracer) else np.asarray(times, np.float64)
    _check_times(times)
    sampler = keeping(sampler or ancestral(), known, mask)
    keys = keys_of(key, len(known))
    wide = jnp.promote_types(known.dtype, jnp.float32)
    predict = predictor(denoise, path, prediction, y, dtype=known.dtype)

    def advance(carry, now):
        xt, memory = carry
        t, s, i = now
        step_keys = _use(keys, i)

        def fall():
            return sampler.step(step_keys, predict, path, xt, t, s, memory)

        def rise():
            xs = expand(path(s)[0] / path(t)[0], xt) * xt
            xs = xs + jnp.sqrt(expand(between(path, s, t).large, xt)) * normal(_use(step_keys, _AGAIN), xt)
            return xs, sampler.init(xs)

        return jax.lax.cond(s < t, fall, rise), None

    x1 = initial_noise(keys, known.shape[1:], path, times[0]).astype(known.dtype).astype(wide)
    times = jnp.asarray(times, wide)
    grid = (times[:-1], times[1:], jnp.arange(len(times) - 1))
    (x0, _), _ = jax.lax.scan(advance, (x1, sampler.init(x1)), grid)
    return jnp.where(mask, known, x0.astype(known.dtype))


def _check_times(times: np.ndarray | jax.Array) -> None:
    shaped = len(times.shape) == 1 and len(times) >= 2
    known = shaped and not isinstance(times, jax.core.Tracer)
    if not shaped or (known and not (times[-1] == 0 and times.max() <= times[0] and np.diff(times).all())):
        raise ValueError(
            "times must be a vector of two or more values, none above the first, that ends at 0, see `repaint_times`, "
            f"not of shape {tuple(times.shape)}{f' from {times[0]:g} to {times[-1]:g}' if known else ''}"
        )


def check_mask(mask: jax.Array, shape: Sequence[int]) -> None:
    """Raises ValueError unless `mask` is boolean and broadcasts to images of `shape` [B, *S, C]."""
    if mask.dtype != bool:
        raise ValueError(f"mask must be boolean, true where a pixel is known, not {mask.dtype}")
    try:
        fits = np.broadcast_shapes(mask.shape, tuple(shape)) == tuple(shape) and mask.ndim == len(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"mask of shape {mask.shape} must broadcast to images {tuple(shape)}: [1, *S, 1] for one mask")


def round_trip(
    denoise: Denoise,
    path: Path,
    x0: jax.Array,
    times: np.ndarray | jax.Array,
    y: Any = None,
    *,
    prediction: Prediction,
    sampler: Sampler | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(x1, x0 again), [B, *S, C] each: the noise of images by `sample.invert`, and what sampling makes of it.

    `times` fall to a time a little above 0, at which x0 is taken for xt both ways: what differs between x0 and the
    second result is the error of the sampler, default `heun()`.
    """
    options = {"prediction": prediction, "sampler": sampler or heun()}
    x1 = invert(denoise, path, x0, np.asarray(times)[::-1], y, **options)
    # No step draws from the key: one that does has been refused by `invert`.
    return x1, sample(jax.random.key(0), denoise, path, x1, times, y, **options)


def dps(sampler: Sampler, operator: Operator, measured: jax.Array, scale: float = 1.0) -> Sampler:
    """The sampler with a step down the gradient of the residual after each of its own, eq. (3).

    The published scale is 0.3 to 1 with 1,000 steps of ancestral sampling; fewer steps need more. It costs a
    differentiation of the network in each step.

    Args:
      operator: linear, images [B, *S, C] -> measurements like `measured` [B, ...].
    """

    def step(key, predict, path, xt, t, s, memory):
        def distance(x: jax.Array) -> jax.Array:
            square = jnp.square(measured - operator(predict(x, t).x0)).reshape(len(x), -1).sum(1)
            return root(square).sum()

        slope = jax.grad(distance)(xt)
        xs, memory = sampler.step(key, predict, path, xt, t, s, memory)
        return xs - scale * slope, memory

    return Sampler(sampler.init, step)


def given(
    denoise: Denoise,
    path: Path,
    prediction: Prediction,
    operator: Operator,
    measured: jax.Array,
    *,
    deviation: float,
    spread: Callable[[jax.Array], jax.Array] | None = None,
    iterations: int = 8,
) -> Denoise:
    """The denoiser of images given measurements b = A x0 + deviation z, eqs. (4) and (5).

    At alpha = 0, where (4) is a limit, the denoiser is left as it is: begin to sample just below.

    Args:
      operator: linear, images [B, *S, C] -> measurements [B, ...].
      measured: b.
      deviation: the standard deviation of its noise.
      spread: t [B] -> the variance [B] of a pixel of x0 given xt; see `gaussian_spread`. None is 0.
      iterations: of conjugate gradients, which solve (5); one is enough if A A^T is a multiple of the identity, as it
        is for `downscale` and for a mask on what is not masked.

    Raises:
      ValueError: the deviation is not positive.
    """
    if not deviation > 0:
        raise ValueError(f"deviation={deviation} must be positive; for an exact measurement take a little, as 0.01")

    def denoise_given(xt: jax.Array, t: jax.Array, y: Any = None) -> Output:
        coef = coefficients(path, t)

        def x0_hat(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Output]]:
            output = denoise(x, t, y)
            x0, eps = decode(prediction, coef, x, pred_of(output))
            return x0, (eps, output)

        x0, pull, (eps, output) = jax.vjp(x0_hat, xt, has_aux=True)
        transpose = jax.linear_transpose(operator, x0)
        variance = jnp.zeros_like(t) if spread is None else spread(t)

        def covariance(u: jax.Array) -> jax.Array:
            return deviation**2 * u + expand(variance, u) * operator(transpose(u)[0])

        residual = measured - operator(x0)
        solved = residual / deviation**2 if spread is None else _conjugate_gradients(covariance, residual, iterations)
        (slope,) = pull(transpose(solved)[0])
        alpha, sigma = expand(coef.alpha, xt), expand(coef.sigma, xt)
        slope = jnp.where(alpha == 0, 0, slope)
        x0 = x0 + jnp.square(sigma) / jnp.where(alpha == 0, 1, alpha) * slope
        return replace_pred(output, target(prediction, coef, x0, eps - sigma * slope))

    return denoise_given


def gaussian_spread(path: Path, variance: float = 1.0) -> Callable[[jax.Array], jax.Array]:
    """The variance of x0 given xt, t [B] -> [B], for data of independent normal values of this variance."""

    def spread(t: jax.Array) -> jax.Array:
        alpha, sigma = path(t)
        return variance * jnp.square(sigma) / (jnp.square(alpha) * variance + jnp.square(sigma))

    return spread


def masked(mask: jax.Array) -> Operator:
    """The operator that sets to 0 what is not known, where `mask` is false."""
    return lambda x: jnp.where(mask, x, 0)


def downscale(factor: int) -> Operator:
    """The operator that averages over blocks of `factor` pixels along each spatial axis.

    Raises:
      ValueError: on a call, if the factor does not divide an axis.
    """

    def apply(x: jax.Array) -> jax.Array:
        b, *size, c = x.shape
        if factor < 1 or any(n % factor for n in size):
            raise ValueError(f"factor={factor} must divide the images' size {tuple(size)}")
        blocks = [length for n in size for length in (n // factor, factor)]
        return x.reshape(b, *blocks, c).mean(tuple(range(2, 2 + 2 * len(size), 2)))

    return apply


def blur(deviation: float, truncate: float = 4.0) -> Operator:
    """The operator of Gaussian blur, of a standard deviation in pixels, mirrored at the edges, cut at `truncate` of it.

    Raises:
      ValueError: the deviation is not positive.
    """
    if not deviation > 0:
        raise ValueError(f"deviation={deviation} must be positive")

    def matrix(n: int) -> np.ndarray:
        reach = int(truncate * deviation + 0.5)
        offsets = np.arange(-reach, reach + 1)
        kernel = np.exp(-0.5 * np.square(offsets / deviation))
        source = (np.arange(n)[:, None] + offsets) % (2 * n)  # (d c b a | a b c d | d c b a), with period 2 n
        source = np.minimum(source, 2 * n - 1 - source)
        weights = np.zeros((n, n))
        np.add.at(weights, (np.arange(n)[:, None], source), kernel / kernel.sum())
        return weights

    def apply(x: jax.Array) -> jax.Array:
        for axis in range(1, x.ndim - 1):
            x = jnp.moveaxis(jnp.tensordot(jnp.asarray(matrix(x.shape[axis]), x.dtype), x, (1, axis)), 0, axis)
        return x

    return apply


def _conjugate_gradients(matrix: Operator, b: jax.Array, iterations: int) -> jax.Array:
    """u [B, ...] with matrix(u) = b, for each example by itself, so that none depends on the others of its batch."""

    def dot(u: jax.Array, v: jax.Array) -> jax.Array:
        return (u * v).reshape(len(u), -1).sum(1)

    def ratio(a: jax.Array, b: jax.Array, like: jax.Array) -> jax.Array:
        return expand(jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0), like)  # 0 / 0 where the solution is reached

    def improve(_, state):
        u, residual, direction, square = state
        image = matrix(direction)
        length = ratio(square, dot(direction, image), b)
        u, residual = u + length * direction, residual - length * image
        after = dot(residual, residual)
        return u, residual, residual + ratio(after, square, b) * direction, after

    return jax.lax.fori_loop(0, iterations, improve, (jnp.zeros_like(b), b, b, dot(b, b)))[0]


def _use(keys: jax.Array | None, number: int | jax.Array) -> jax.Array | None:
    """Keys [B] for another use of keys [B]."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)
