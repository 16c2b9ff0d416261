"""The chain between two times, backwards: its posterior, its variances, and the variational bound.

For s < t and r = alpha_t sigma_s / (alpha_s sigma_t), so that r^2 = SNR_t / SNR_s,

    q(xt | xs)     = N(alpha_t / alpha_s xs, large),    large = sigma_t^2 (1 - r^2)                (1)
    q(xs | xt, x0) = N(mean, small),                    small = sigma_s^2 (1 - r^2)
    mean           = alpha_s (1 - r^2) x0 + r sigma_s / sigma_t xt                                 (2)

on any path, Ho et al. 2020 (2006.11239) eqs. 2 and 7, Kingma et al. 2021 (2107.00630) eq. 22: on DDPM's chain large
is beta and small is beta tilde. The model draws xs from N(mean with x0_hat, var), with var one of

    "fixed_small"      small
    "fixed_large"      large
    "learned_range"    log var = f log large + (1 - f) log small,  f = (v + 1) / 2                 (3)
    "learned_sigmoid"  log var = v log small + (1 - v) log large,  v in [0, 1]                     (4)

(3) is Nichol & Dhariwal 2021 (2102.09672), v unbounded; (4) is Patch Diffusion, Luhman & Luhman 2022 (2207.04316),
where the network ends in a sigmoid: the range differs and so does the direction. At s = 0, where small is 0, all of
these but the large end of (3) and (4) are the small of the chain's step before, `least_variance`. The bound is

    -log p(x0) <= KL(q(x1 | x0) || N(0, I)) + sum_s KL(q(xs | xt, x0) || p(xs | xt)) - E log p(x0 | xt at s = 0)  (5)

A chain is a grid of falling times [T + 1] that ends at 0, as `sample` takes it.
"""

import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

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
    """What lies between two times, [B] each: the variances of eqs. (1) and (2), and mean = on_x0 x0 + on_xt xt."""

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
            raise ValueError(f"variance={variance!r} needs a network that returns Learned(pred, v), with its variance")
        to_large = (estimate.v + 1) / 2 if variance == "learned_range" else 1 - estimate.v
        log_small, log_large = expand(jnp.log(small), xt), expand(jnp.log(step.large), xt)
        log_var = to_large * log_large + (1 - to_large) * log_small
    return Gaussian(_mean(step, estimate.x0, xt), log_var)


def check_variance(variance: str) -> None:
    """Raises ValueError if there is no such variance."""
    if variance not in get_args(Variance):
        raise ValueError(f"variance={variance!r} is not one of {get_args(Variance)}")


def kl(p: Gaussian, q: Gaussian) -> jax.Array:
    """KL(p || q) of each value, in nats."""
    difference = p.log_var - q.log_var
    # expm1 keeps nearly equal variances apart from rounding: e^d - 1 - d is of second order in d.
    return 0.5 * (jnp.expm1(difference) - difference + jnp.square(p.mean - q.mean) * jnp.exp(-q.log_var))


def decoder_nll(p: Gaussian, x0: jax.Array) -> jax.Array:
    """-log of the mass of each value's bin, in nats: x0 in [-1, 1] in 256 levels, the outer bins open.

    With DDPM's tanh for the normal distribution function and its floor of 1e-12, which published numbers contain.
    """
    inverse, centred = jnp.exp(-0.5 * p.log_var), x0 - p.mean
    above, below = _normal_cdf(inverse * (centred + 1 / 255)), _normal_cdf(inverse * (centred - 1 / 255))
    mass = jnp.where(x0 < -0.999, above, jnp.where(x0 > 0.999, 1 - below, above - below))
    return -jnp.log(jnp.maximum(mass, 1e-12))


def bound_term(
    variance: Variance,
    path: Path,
    x0: jax.Array,
    xt: jax.Array,
    t: jax.Array,
    s: jax.Array,
    estimate: Estimate,
    least: float | jax.Array,
) -> jax.Array:
    """The term of eq. (5) for the steps from t to s < t [B], in bits per dimension [B]; at s = 0 it is the decoder's.

    `least` is the chain's `least_variance`; x0 in [-1, 1] in 256 levels.
    """
    model = reverse(variance, path, estimate, xt, t, s, least)
    divergence = kl(posterior(path, x0, xt, t, s, least), model)
    last = expand(path(s)[1] <= 0, xt)
    return bits(jnp.where(last, decoder_nll(model, x0), divergence))


def prior_term(path: Path, x0: jax.Array, t: jax.Array) -> jax.Array:
    """KL(q(xt | x0) || N(0, I)) for t [B], the chain's start, in bits per dimension [B]."""
    alpha, sigma = path(t)
    excess = jnp.square(sigma) - 1
    # x - log(1 + x) with log1p: both are near zero where little of the data is left.
    return bits(0.5 * (expand(excess - jnp.log1p(excess), x0) + jnp.square(expand(alpha, x0) * x0)))


def least_variance(path: Path, chain: np.ndarray | jax.Array) -> jax.Array:
    """The small variance, [], of the last step but one of a chain, which stands in for the 0 of its last step.

    Raises:
      ValueError: `chain` is not two or more falling steps to 0.
    """
    check_chain(chain)
    return between(path, jnp.asarray(chain[-3], float), jnp.asarray(chain[-2], float)).small


def check_chain(chain: np.ndarray | jax.Array) -> None:
    """Raises ValueError if `chain` is not two or more falling steps to 0."""
    if isinstance(chain, jax.core.Tracer):
        return
    chain = np.asarray(chain)
    if chain.ndim != 1 or len(chain) < 3 or not (np.diff(chain) < 0).all() or chain[-1] != 0:
        raise ValueError(
            f"a chain must be a vector of three or more falling times that ends at 0, see `sample.respaced_grid`, not "
            f"{chain.shape} from {chain.flat[0] if chain.size else None} to {chain.flat[-1] if chain.size else None}"
        )


def bits(nats: jax.Array) -> jax.Array:
    """Mean of each example [B, ...] in bits, [B]."""
    return nats.mean(range(1, nats.ndim)) / math.log(2)


def _mean(step: Between, x0: jax.Array, xt: jax.Array) -> jax.Array:
    return expand(step.on_x0, xt) * x0 + expand(step.on_xt, xt) * xt


def _above(small: jax.Array, least: float | jax.Array) -> jax.Array:
    return jnp.where(small > 0, small, least)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
