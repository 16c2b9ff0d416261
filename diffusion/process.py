"""Noising processes: the scale of the data and of the noise at time t.

    xt = alpha(t) x0 + sigma(t) eps,    eps ~ N(0, I),    t = 0: data, larger t: more noise        (1)
    logsnr(t) = 2 log(alpha / sigma)                                                               (2)

A path is a function t [B] -> (alpha [B], sigma [B]); derivatives come from `jax.jvp`, so a path of your own is one
function. Times are continuous; the discrete chains of the literature are grids of them. The paths here run from 0 to 1;
a variance-exploding path whose time is sigma, `lambda t: (jnp.ones_like(t), t)`, works just as well.

    Linear      alpha = 1 - t            sigma = scale t            flow matching, Lipman et al. 2022 (2210.02747)
    Cosine      alpha = cos(pi t / 2)    sigma = sin(pi t / 2)      Salimans & Ho 2022 (2202.00512)
    VP          alpha^2 = prod(1 - beta) sigma^2 = 1 - alpha^2      DDPM, Ho et al. 2020 (2006.11239)
    Geometric   alpha = a^(n t)          sigma = 1 - alpha          Piantedosi, piantedosi.github.io/diffusion_model

Geometric is Linear with another parametrisation of time: both have alpha + sigma = 1, at a scale of 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Path = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


class Coefficients(NamedTuple):
    """alpha, sigma and their time derivatives, [B] each."""

    alpha: jax.Array
    sigma: jax.Array
    dalpha: jax.Array
    dsigma: jax.Array


@dataclass(frozen=True)
class Linear:
    """Linear interpolation between data and noise of standard deviation `scale`.

    JiT takes scale = image size / 256 (Li & He 2025, 2511.13720): neighbouring pixels of larger images are more alike,
    so that the same noise hides less of them.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale={self.scale} must be positive: it is the standard deviation of the noise at t = 1")

    def __call__(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        return 1 - t, t if self.scale == 1 else self.scale * t


@dataclass(frozen=True)
class Cosine:
    """alpha^2 + sigma^2 = 1; written with sines so that both end points are exact."""

    def __call__(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sin(math.pi / 2 * (1 - t)), jnp.sin(math.pi / 2 * t)


@dataclass(frozen=True)
class Geometric:
    """The blog's path: `steps` times xt <- rate xt + (1 - rate) eps. Defined for t < 0 too: its sampler may overstep.

    At t = 1 alpha is rate^steps (0.0066 for the published 0.99 and 500), not 0.
    """

    rate: float = 0.99
    steps: int = 500

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"rate={self.rate} must lie between 0 and 1")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")

    def __call__(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        decay = self.steps * math.log(self.rate) * t
        return jnp.exp(decay), -jnp.expm1(decay)


@dataclass(frozen=True, eq=False)
class VP:
    """The variance-preserving chain of `betas` [T], exact at its grid times t = i / T, i = 0..T, smooth between them.

    alpha = cos(phi), sigma = sin(phi) with the angle phi interpolated linearly between grid times. Index i of DDPM's
    tables (0-based) is time (i + 1) / T.
    """

    betas: np.ndarray

    def __post_init__(self) -> None:
        betas = np.asarray(self.betas, np.float64)
        if betas.ndim != 1 or not betas.size or not ((betas > 0) & (betas <= 1)).all():
            worst = f", values {betas.min():g} to {betas.max():g}" if betas.size else ""
            raise ValueError(f"betas must be a vector of values in (0, 1], got shape {betas.shape}{worst}")
        abar = np.concatenate([[1.0], np.cumprod(1 - betas)])
        object.__setattr__(self, "betas", betas)
        # The angle from either end, so that neither a small sigma nor a small alpha loses digits to rounding.
        object.__setattr__(self, "_phi", np.arctan2(np.sqrt(1 - abar), np.sqrt(abar)))
        object.__setattr__(self, "_psi", np.arctan2(np.sqrt(abar), np.sqrt(1 - abar)))

    def __call__(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        position = jnp.asarray(t) * len(self.betas)
        # i / T rounded to the dtype is still step i: the variance between neighbours is a difference of near equals.
        off = jnp.round(position) - position
        near = jnp.abs(off) < 2 * jnp.finfo(position.dtype).eps * len(self.betas)
        position = position + jax.lax.stop_gradient(jnp.where(near, off, 0))
        low = jnp.clip(jnp.floor(position), 0, len(self.betas) - 1).astype(int)
        fraction = position - low

        def at(table: np.ndarray) -> jax.Array:
            values = jnp.asarray(table, position.dtype)
            return values[low] * (1 - fraction) + values[low + 1] * fraction

        return jnp.sin(at(self._psi)), jnp.sin(at(self._phi))


def named_betas(name: str, steps: int = 1000) -> np.ndarray:
    """Betas [steps] by their published names: "linear", "linear0.025" (ending at that beta) or "cosine".

    Raises:
      ValueError: there is no such schedule, or `steps` are too few for it.
    """
    if name == "cosine":
        return cosine_betas(steps)
    if name == "linear":
        return linear_betas(steps)
    try:
        high = float(name.removeprefix("linear")) if name.startswith("linear") else math.nan
    except ValueError:
        high = math.nan
    if not 1e-4 < high <= 1:
        raise ValueError(
            f"betas={name!r} are not one of linear, linear<beta_max> (linear0.025, above 1e-4 and up to 1), cosine"
        )
    return linear_betas(steps, high=high)


def linear_betas(steps: int = 1000, low: float = 1e-4, high: float = 0.02) -> np.ndarray:
    """DDPM's linear betas [steps] in float64, stretched so that `steps` span the same noise (2006.11239)."""
    _check_steps(steps)
    if high * 1000 / steps > 1:
        raise ValueError(f"steps={steps} stretches beta={high} above 1; it must be at least {math.ceil(high * 1000)}")
    return np.linspace(low, high, steps) * (1000 / steps)


def cosine_betas(steps: int = 1000, highest: float = 0.999) -> np.ndarray:
    """Betas [steps] in float64 of abar = cos^2 with offset 0.008, Nichol & Dhariwal 2021 (2102.09672), eq. 17."""
    _check_steps(steps)
    abar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - abar[1:] / abar[:-1], highest)


def coefficients(path: Path, t: jax.Array) -> Coefficients:
    """alpha, sigma and their derivatives at t, [] or [B]."""
    (alpha, sigma), (dalpha, dsigma) = jax.jvp(path, (t,), (jnp.ones_like(t),))
    return Coefficients(alpha, sigma, dalpha, dsigma)


def logsnr(path: Path, t: jax.Array) -> jax.Array:
    """2 log(alpha / sigma), eq. (2), [B]; infinite where one of them is 0."""
    alpha, sigma = path(t)
    return 2 * (jnp.log(alpha) - jnp.log(sigma))


def noise(path: Path, x0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """xt [B, ...] at times t [B] for data x0 and noise eps of the same shape, eq. (1).

    Raises:
      ValueError: x0 is not of a floating type, or t is not [B].
    """
    check_images(x0)
    check_times(t, len(x0))
    alpha, sigma = path(t)
    return expand(alpha, x0) * x0 + expand(sigma, x0) * eps


def expand(a: jax.Array, like: jax.Array) -> jax.Array:
    """a, [] or [B], with trailing axes of length 1, to multiply `like` [B, ...]."""
    return a.reshape(a.shape + (1,) * (like.ndim - a.ndim))


def times_of_snr(path: Path, snr: Sequence[float] | np.ndarray, span: tuple[float, float] = (0.0, 1.0)) -> np.ndarray:
    """The first times [n], in float32, at which the SNR (alpha / sigma)^2 has fallen to each of `snr` [n].

    The SNR must fall with t inside `span`, where the times are found by bisection.

    Raises:
      ValueError: the SNR does not fall to one of `snr` inside the span.
    """
    snr = np.asarray(snr, np.float64)

    def reached(t: np.ndarray) -> np.ndarray:
        with jax.ensure_compile_time_eval():
            alpha, sigma = (np.asarray(a, np.float64) for a in path(jnp.asarray(t, jnp.float32)))
        return alpha**2 <= snr * sigma**2

    low, high = (np.full(len(snr), t, np.float32) for t in span)
    if reached(low).any():
        raise ValueError(f"the path's SNR is below {snr[reached(low)][0]:g} from the start, t={span[0]:g}")
    if not reached(high).all():
        raise ValueError(f"the path's SNR stays above {snr[~reached(high)][0]:g} up to t={span[1]:g}")
    while (np.nextafter(low, np.float32(np.inf)) < high).any():
        middle = (low + high) / 2
        fallen = reached(middle)
        low, high = np.where(fallen, low, middle), np.where(fallen, middle, high)
    return high


def check_images(x: jax.Array) -> None:
    """Raises ValueError unless x, [B, *S, C], is of a floating type."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"images must be floating-point, not {x.dtype}: convert them first, x / 127.5 - 1")


def check_times(t: jax.Array, batch: int) -> None:
    """Raises ValueError unless t is an array [B] of a floating type."""
    if jnp.shape(t) != (batch,) or not hasattr(t, "dtype") or not jnp.issubdtype(t.dtype, jnp.floating):
        given = f"{t.dtype} {tuple(t.shape)}" if hasattr(t, "dtype") else repr(t)
        raise ValueError(f"t must be a floating-point array [{batch}], one time per example, not {given}")


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
