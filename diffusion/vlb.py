"""The variational bound on -log p(x0): a term of a training loss, and the bits per dimension of a trained network.

    -log p(x0) <= KL(q(x1 | x0) || N(0, std^2)) + sum_s KL(q(xs | xt, x0) || p(xs | xt)) - E log p(x0 | xt at s = 0) (1)

with the posterior q and the reverse step p of `posterior`: Ho et al. 2020 (2006.11239), Nichol & Dhariwal 2021
(2102.09672). In bits per dimension lower is better; 8 is the cost of storing the values. A chain is a grid of falling
times [T + 1] that ends at 0, as `sample` takes it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.posterior import Gaussian, Variance, between, check_variance, posterior, reverse
from diffusion.predict import Denoise, Estimate, Prediction, estimate
from diffusion.process import Path, coefficients, expand, noise
from diffusion.sample import keys_of, normal


class Vlb(NamedTuple):
    """The variational term of `loss`, Nichol & Dhariwal 2021 (2102.09672), in bits per dimension.

    chain: its falling times [T + 1], `grids.respaced_grid`; the time sampler must sample from them (`listed_times`).
    variance: one of `posterior.Variance`, which the network learns or is given.
    weight: c of eq. (1) of `loss`; guided-diffusion's rescale_learned_sigmas is T / 1000, its use_kl is T with `only`.
    only: the variational term is the whole loss. Otherwise it trains the variance alone: no gradient flows to the
      prediction.
    """

    chain: np.ndarray
    variance: Variance
    weight: float = 1.0
    only: bool = False


class Likelihood(NamedTuple):
    """Bits per dimension and their parts; step 0 begins at chain[0], step T - 1 ends at the data."""

    total: jax.Array  # [B], the sum of the next two
    prior: jax.Array  # [B], of the start of the chain, chain[0]
    terms: jax.Array  # [T, B], of each step; the last one is the decoder's
    x0_mse: jax.Array  # [T, B], squared error of x0_hat
    eps_mse: jax.Array  # [T, B], and of eps_hat


def bits_per_dim(
    key: jax.Array,
    denoise: Denoise,
    path: Path,
    x0: jax.Array,
    chain: np.ndarray,
    y: Any = None,
    *,
    prediction: Prediction,
    variance: Variance,
    prior_std: float = 1.0,
) -> Likelihood:
    """The bound (1) for images x0 [B, *S, C] in [-1, 1], in 256 levels. Memory does not grow with T.

    The denoiser may be guided, clipped or made of experts. To clip as published programs do, pass `guide.clip(...)`.

    Args:
      key: one key, or one per image [B] (`sample_keys`), so that the bits of an image do not depend on its batch.
      chain: falling times [T + 1] that end at 0, all of the training chain's or some (`grids.respaced_grid`).
      variance: as trained; with a fixed one "fixed_small" is usually the tighter bound.
      prior_std: standard deviation of the noise from which sampling starts: sigma(chain[0]) if that is not 1.

    Raises:
      ValueError: `chain` is not one, or the variance is unknown or missing.
    """
    check_variance(variance)
    least = least_variance(path, chain)
    b = x0.shape[0]
    keys = keys_of(key, b)
    # In bfloat16 neighbouring times would be equal.
    times = jnp.asarray(chain, jnp.promote_types(x0.dtype, jnp.float32))

    def term(_, now):
        t, s, i = now
        t, s = jnp.broadcast_to(t, (b,)), jnp.broadcast_to(s, (b,))
        eps = normal(jax.vmap(jax.random.fold_in, (0, None))(keys, i), x0)
        xt, coef = noise(path, x0, t, eps), coefficients(path, t)
        model = estimate(prediction, coef, xt, denoise(xt.astype(x0.dtype), t, y))
        bits = vlb_term(variance, path, x0, xt, t, s, model, least)
        axes = range(1, x0.ndim)
        return None, (bits, jnp.square(model.x0 - x0).mean(axes), jnp.square(model.eps - eps).mean(axes))

    _, (terms, x0_mse, eps_mse) = jax.lax.scan(term, None, (times[:-1], times[1:], jnp.arange(len(chain) - 1)))
    prior = prior_term(path, x0, jnp.broadcast_to(times[0], (b,)), prior_std)
    return Likelihood(prior + terms.sum(0), prior, terms, x0_mse, eps_mse)


def vlb_term(
    variance: Variance,
    path: Path,
    x0: jax.Array,
    xt: jax.Array,
    t: jax.Array,
    s: jax.Array,
    estimate: Estimate,
    least: float | jax.Array,
) -> jax.Array:
    """The term of eq. (1) for the steps from t to s < t [B], in bits per dimension [B]; at s = 0 it is the decoder's.

    `least` is the chain's `least_variance`; x0 in [-1, 1] in 256 levels.
    """
    model = reverse(variance, path, estimate, xt, t, s, least)
    divergence = kl(posterior(path, x0, xt, t, s, least), model)
    last = expand(path(s)[1] <= 0, xt)
    return bits(jnp.where(last, decoder_nll(model, x0), divergence))


def prior_term(path: Path, x0: jax.Array, t: jax.Array, std: float = 1.0) -> jax.Array:
    """KL(q(xt | x0) || N(0, std^2 I)) for t [B], the start of the chain, in bits per dimension [B]."""
    alpha, sigma = (a / std for a in path(t))
    excess = jnp.square(sigma) - 1
    # x - log(1 + x) with log1p: both are near zero where alpha is small.
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
            f"a chain must be a vector of three or more falling times that ends at 0, see `grids.respaced_grid`, not "
            f"{chain.shape} from {chain.flat[0] if chain.size else None} to {chain.flat[-1] if chain.size else None}"
        )


def bits(nats: jax.Array) -> jax.Array:
    """Mean of each example [B, ...] in bits, [B]."""
    return nats.mean(range(1, nats.ndim)) / math.log(2)


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


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
