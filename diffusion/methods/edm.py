"""Preconditioning of Karras et al. 2022 (2206.00364), EDM: a network of unit input and output that predicts x0.

    D(x, sigma) = c_skip x + c_out F(c_in x, c_noise)                                              (1)

    c_skip  = data_std^2 / (sigma^2 + data_std^2)          c_out   = sigma data_std / sqrt(sigma^2 + data_std^2)
    c_in    = 1 / sqrt(sigma^2 + data_std^2)               c_noise = log(sigma) / 4              (2)

    L = E w(sigma) ||D(x0 + sigma eps, sigma) - x0||^2,    w = 1 / c_out^2,    log sigma ~ N(mean, std^2)  (3)

(1) is eq. 7, (2) table 1, (3) eqs. 2 and 8 with table 1. With data of deviation data_std, input and target of F have
unit variance at every sigma, and w makes the loss of F the same everywhere. The paper's path is `Exploding`, whose time
is sigma; on any other path x is xt / alpha and sigma is sigma / alpha in (2), so that one network serves all paths.

    denoise = edm.preconditioned(partial(model.apply, params), edm.Exploding())
    loss.loss(key, denoise, edm.Exploding(), x0, y, prediction="x0", weight=edm.weight(), times=edm.log_normal_times())
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion.loss import Weight
from diffusion.predict import Denoise, Output, pred_of, replace_pred
from diffusion.process import Coefficients, Path, expand
from diffusion.times import Times, antithetic_times

# Keeps c_noise finite at the ends of a path.
_LEAST = 1e-6


@dataclass(frozen=True)
class Exploding:
    """The variance-exploding path: alpha = 1, and time is sigma, from 0 on without an end.

    Sampling starts at a large sigma, 80 in the paper, from noise of that scale (`sample.initial_noise` with a path).
    """

    def __call__(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.ones_like(t), t


class Scalings(NamedTuple):
    """Eq. (2) at each time, [B] each; skip and into multiply xt, not xt / alpha."""

    skip: jax.Array
    out: jax.Array
    into: jax.Array
    noise: jax.Array


def scalings(path: Path, t: jax.Array, data_std: float = 0.5) -> Scalings:
    """c_skip, c_out, c_in and c_noise at times t [B], eq. (2)."""
    alpha, sigma = path(t)
    total = jnp.square(sigma) + jnp.square(alpha * data_std)
    return Scalings(
        skip=alpha * data_std**2 / total,
        out=sigma * data_std / jnp.sqrt(total),
        into=1 / jnp.sqrt(total),
        noise=(jnp.log(jnp.maximum(sigma, _LEAST)) - jnp.log(jnp.maximum(alpha, _LEAST))) / 4,
    )


def preconditioned(network: Denoise, path: Path, data_std: float = 0.5) -> Denoise:
    """The denoiser of eq. (1), which predicts x0 [B, *S, C], from a raw network F.

    F receives c_in xt and, in the place of t, c_noise [B], with sigma and alpha kept above 1e-6 in its logarithm: at
    both ends of a path it is finite, but far from what F was trained with, unless sampling goes from and to where
    training goes (`log_normal_times`, `grids.rho_grid`). A learned variance is passed on.

    Raises:
      ValueError: data_std is not positive.
    """
    _check(data_std)

    def denoise(xt: jax.Array, t: jax.Array, y: Any = None) -> Output:
        c = scalings(path, t, data_std)
        output = network((expand(c.into, xt) * xt).astype(xt.dtype), c.noise, y)
        return replace_pred(output, expand(c.skip, xt) * xt + expand(c.out, xt) * pred_of(output))

    return denoise


def weight(data_std: float = 0.5) -> Weight:
    """w of eq. (3) on the squared error of x0, 1 / c_out^2, as a function of the coefficients of a path.

    Raises:
      ValueError: data_std is not positive.
    """
    _check(data_std)

    def at(coef: Coefficients) -> jax.Array:
        total = jnp.square(coef.sigma) + jnp.square(coef.alpha * data_std)
        return total / jnp.square(coef.sigma * data_std)

    return at


def log_normal_times(mean: float = -1.2, std: float = 1.2) -> Times:
    """Time sampler log sigma ~ N(mean, std^2) of eq. (3), stratified, for `Exploding`, whose time is sigma.

    Raises:
      ValueError: std is not positive.
    """
    if not std > 0:
        raise ValueError(f"std={std} must be positive")

    def times(key: jax.Array, n: int) -> jax.Array:
        # The quantile is infinite at 0, which antithetic_times can return.
        return jnp.exp(mean + std * jax.scipy.special.ndtri(jnp.maximum(antithetic_times(key, n), 1e-6)))

    return times


def _check(data_std: float) -> None:
    if not data_std > 0:
        raise ValueError(f"data_std={data_std}, the standard deviation of the data, must be positive")
