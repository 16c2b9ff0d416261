"""How well a chain codes pictures: an upper bound on -log2 p(x0) per dimension, with its parts.

    bits = prior + sum over the steps of the chain of bound_term(t, s),    eq. (5) of `variance`   (1)

Every step is evaluated at noise of its own: the bound is an estimate without bias. Lower is better; 8 is what storing
the values takes. Ho et al. 2020 (2006.11239); Nichol & Dhariwal 2021 (2102.09672).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.predict import Denoise, Prediction, estimate
from diffusion.process import Path, coefficients, noise
from diffusion.sample import sample_keys
from diffusion.variance import Variance, bound_term, check_variance, least_variance, prior_term


class Likelihood(NamedTuple):
    """Bits per dimension and where they come from; step 0 begins at chain[0], step T - 1 ends in the data."""

    total: jax.Array  # [B], the sum of the next two
    prior: jax.Array  # [B], what of the picture is left at chain[0]
    terms: jax.Array  # [T, B], of each step; the last one is the decoder's
    x0_mse: jax.Array  # [T, B], squared error of x0_hat
    eps_mse: jax.Array  # [T, B], and of eps_hat


def bits_per_dim(
    key: jax.Array,
    denoise: Denoise,
    path: Path,
    x0: jax.Array,
    chain: np.ndarray,
    y: jax.Array | None = None,
    *,
    prediction: Prediction,
    variance: Variance,
) -> Likelihood:
    """The bound (1) for pictures x0 [B, *S, C] in [-1, 1], in 256 levels. Memory does not grow with T.

    Guided, clipped or expert denoisers are denoisers. To clip like the published programs pass `guide.clip(...)`.

    Args:
      key: one key, or one per picture [B] (`sample_keys`), so that a picture's bits do not depend on its neighbours.
      chain: falling times [T + 1] that end at 0, all of the training chain's or some (`sample.respaced_grid`).
      variance: as trained; with a fixed one "fixed_small" is usually the tighter bound.

    Raises:
      ValueError: `chain` is not one, or the variance is unknown or missing.
    """
    check_variance(variance)
    least = least_variance(path, chain)
    b = x0.shape[0]
    keys = key if key.ndim else sample_keys(key, jnp.arange(b))
    # In bfloat16 neighbouring times would be one.
    times = jnp.asarray(chain, jnp.promote_types(x0.dtype, jnp.float32))

    def term(_, now):
        t, s, i = now
        t, s = jnp.broadcast_to(t, (b,)), jnp.broadcast_to(s, (b,))
        eps = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), x0.shape[1:], x0.dtype))(keys)
        xt, coef = noise(path, x0, t, eps), coefficients(path, t)
        model = estimate(prediction, coef, xt, denoise(xt.astype(x0.dtype), t, y))
        bits = bound_term(variance, path, x0, xt, t, s, model, least)
        axes = range(1, x0.ndim)
        return None, (bits, jnp.square(model.x0 - x0).mean(axes), jnp.square(model.eps - eps).mean(axes))

    _, (terms, x0_mse, eps_mse) = jax.lax.scan(term, None, (times[:-1], times[1:], jnp.arange(len(chain) - 1)))
    prior = prior_term(path, x0, jnp.broadcast_to(times[0], (b,)))
    return Likelihood(prior + terms.sum(0), prior, terms, x0_mse, eps_mse)
