"""Normal data of three correlated values, whose denoiser, flow and posteriors are known."""

import jax.numpy as jnp
import numpy as np

from diffusion.predict import target
from diffusion.process import coefficients, expand

MEAN = np.array([0.3, -0.5, 0.1])
ROOT = np.array([[0.6, 0.0, 0.0], [0.3, 0.4, 0.0], [-0.2, 0.1, 0.5]])
COVARIANCE = ROOT @ ROOT.T


def correlated(path, prediction, mean=MEAN, covariance=COVARIANCE):
    """The exact denoiser of images [B, D, 1] ~ N(mean, covariance)."""
    values, vectors = np.linalg.eigh(covariance)

    def denoise(xt, t, y=None):
        coef = coefficients(path, t)
        a, s = (expand(v, xt) for v in (coef.alpha, coef.sigma))
        v, m = jnp.asarray(vectors, xt.dtype), jnp.asarray(mean, xt.dtype)[None, :, None]
        along = jnp.asarray(values, xt.dtype)[None, :, None]
        solved = jnp.einsum("ji,bjk->bik", v, xt - a * m) / (jnp.square(a) * along + jnp.square(s))
        x0 = m + a * jnp.einsum("ij,bjk->bik", v, along * solved)
        return target(prediction, coef, x0, s * jnp.einsum("ij,bjk->bik", v, solved))

    return denoise
