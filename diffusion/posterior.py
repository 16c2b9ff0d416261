"""The posterior between two times, and the variances that a reverse step can have.

For s < t and r = alpha_t sigma_s / (alpha_s sigma_t), so that r^2 = SNR_t / SNR_s,

    q(xt | xs)     = N(alpha_t / alpha_s xs, large),    large = sigma_t^2 (1 - r^2)                (1)
    q(xs | xt, x0) = N(mean, small),                    small = sigma_s^2 (1 - r^2)
    mean           = alpha_s (1 - r^2) x0 + r sigma_s / sigma_t xt                                 (2)

on any path, Ho et al. 2020 (2006.11239) eqs. 2 and 7, Kingma et al. 2021 (2107.00630) eq. 22: on DDPM's chain large
is beta and small is beta tilde. The model samples xs from N(mean with x0_hat, var), with var one of

    "fixed_small"      small
    "fixed_large"      large
    "learned_range"    log var = f log large + (1 - f) log small,  f = (v + 1) / 2                 (3)
    "learned_sigmoid"  log var = v log small + (1 - v) log large,  v in [0, 1]                     (4)

(3) is Nichol & Dhariwal 2021 (2102.09672), v unbounded; (4) is Patch Diffusion, Luhman & Luhman 2022 (2207.04316),
where the network ends in a sigmoid: both the range and the direction differ. At s = 0, where small is 0, all of these
but the large end of (3) and (4) are the small variance of the chain's step before, `vlb.least_variance`. Times t and s
are [] or [B].
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from diffusion.predict import Estimate
from diffusion.process import Path, expand

Variance = Literal["fixed_small", "fixed_large", "learned_range", "learned_sigmoid"]

# Stands in for `least_variance` where the last step's variance is not used, as in sampling: there it adds no noise.
_LEAST = 1e-20


class Gaussian(NamedTuple):
    """Independent normal values: mean [B, *S, C], log_var [B, ...] that broadcasts to it."""

    mean: jax.Array
    log_var: jax.Array


class Between(NamedTuple):
    """The variances of eqs. (1) and (2), and the mean = on_x0 x0 + on_xt xt, [] or [B] each."""

    small: jax.Array
    large: jax.Array
    on_x0: jax.Array
    on_xt: jax.Array


def between(path: Path, t: jax.Array, s: jax.Array) -> Between:
    """Eqs. (1) and (2) for s < t."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = path(s), path(t)
    r = alpha_t * sigma_s / (alpha_s * sigma_t)
    gap = (1 - r) * (1 + r)
    return Between(jnp.square(sigma_s) * gap, jnp.square(sigma_t) * gap, alpha_s * gap, r * sigma_s / sigma_t)


def posterior(
    path: Path, x0: jax.Array, xt: jax.Array, t: jax.Array, s: jax.Array, least: float | jax.Array = _LEAST
) -> Gaussian:
    """q(xs | xt, x0), eq. (2), for times s < t [B]; its variance at s = 0 is `least`."""
    step = between(path, t, s)
    return Gaussian(_mean(step, x0, xt), expand(jnp.log(_above(step.small, least)), xt))


def reverse(
    variance: Variance,
    path: Path,
    estimate: Estimate,
    xt: jax.Array,
    t: jax.Array,
    s: jax.Array,
    least: float | jax.Array = _LEAST,
) -> Gaussian:
    """p(xs | xt), the model's step from t to s < t [B], from its estimate at xt, eqs. (2) to (4).

    Raises:
      ValueError: the variance is unknown, or it is learned and the network returned none.
    """
    check_variance(variance)
    step = between(path, t, s)
    small = _above(step.small, least)
    if variance == "fixed_small":
        log_var = expand(jnp.log(small), xt)
    elif variance == "fixed_large":
        log_var = expand(jnp.log(jnp.where(step.small > 0, step.large, small)), xt)
    else:
        if estimate.v is None:
            raise ValueError(f"variance={variance!r} needs a network that returns WithVariance(pred, v)")
        to_large = (estimate.v + 1) / 2 if variance == "learned_range" else 1 - estimate.v
        log_small, log_large = expand(jnp.log(small), xt), expand(jnp.log(step.large), xt)
        log_var = to_large * log_large + (1 - to_large) * log_small
    return Gaussian(_mean(step, estimate.x0, xt), log_var)


def check_variance(variance: str) -> None:
    """Raises ValueError if there is no such variance."""
    if variance not in get_args(Variance):
        raise ValueError(f"variance={variance!r} is not one of {get_args(Variance)}")


def _mean(step: Between, x0: jax.Array, xt: jax.Array) -> jax.Array:
    return expand(step.on_x0, xt) * x0 + expand(step.on_xt, xt) * xt


def _above(small: jax.Array, least: float | jax.Array) -> jax.Array:
    return jnp.where(small > 0, small, least)
