"""The training loss: one weighted squared error for every prediction, path, time sampler and space.

    L = E_{t, eps} w(t) || S pred - S target ||^2 / D                                              (1)

`space` S is linear (default: the identity). With S = patchify and a network that answers in tokens this is the loss on
overlapping patches. A time sampler is (key, B) -> t [B]; a weight is coefficients -> [B].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion.predict import Denoise, Prediction, determinant, target
from diffusion.process import Coefficients, Path, coefficients, noise

Times = Callable[[jax.Array, int], jax.Array]
Weight = Callable[[Coefficients], jax.Array]


def loss(
    key: jax.Array,
    denoise: Denoise,
    path: Path,
    x0: jax.Array,
    y: jax.Array | None = None,
    *,
    prediction: Prediction,
    times: Times | None = None,
    weight: Weight | None = None,
    space: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of each example [B], eq. (1), and {"t", "mse"} [B] for those who want to see it over time.

    Args:
      denoise: answers in `space`; sees xt [B, *S, C].
      times: time sampler, default `uniform_times`.
      weight: default 1.
      space: linear map from pictures to where the error is measured, default none.
    """
    key_t, key_eps = jax.random.split(key)
    t = (times or uniform_times)(key_t, x0.shape[0])
    eps = jax.random.normal(key_eps, x0.shape, x0.dtype)
    coef = coefficients(path, t)
    pred = denoise(noise(path, x0, t, eps), t, y)
    wanted = target(prediction, coef, *((x0, eps) if space is None else (space(x0), space(eps))))
    if pred.shape != wanted.shape:
        raise ValueError(f"denoise returned shape {pred.shape}, the loss compares it with {wanted.shape}")
    mse = jnp.square(pred - wanted).mean(range(1, pred.ndim))
    return mse if weight is None else weight(coef) * mse, {"t": t, "mse": mse}


def measured_in(space: Prediction, prediction: Prediction, floor: float = 0.05) -> Weight:
    """Weight that turns the squared error of `prediction` into that of `space`: (det_space / det_prediction)^2.

    E.g. `measured_in("flow", "x0")` predicts x0 and takes the loss on the velocity, as JiT does (Li & He 2025,
    2511.13720). |det_prediction| is kept above `floor`, JiT's clip of the denominator, since the weight has a pole.
    """

    def weight(coef: Coefficients) -> jax.Array:
        det = jnp.maximum(jnp.abs(determinant(prediction, coef)), floor)
        return jnp.square(determinant(space, coef) / det)

    return weight


def uniform_times(key: jax.Array, n: int) -> jax.Array:
    """Independent t ~ U[0, 1), [n]."""
    return jax.random.uniform(key, (n,))


def antithetic_times(key: jax.Array, n: int) -> jax.Array:
    """One t in each of n equal intervals, same offset: U[0, 1) with less variance (Kingma et al. 2021, 2107.00630).

    In random order, since neighbours in a batch may be one picture noised several times.
    """
    key_offset, key_order = jax.random.split(key)
    return jax.random.permutation(key_order, jnp.mod(jax.random.uniform(key_offset) + jnp.arange(n) / n, 1))


def logit_normal_times(mean: float = 0.0, std: float = 1.0) -> Times:
    """logit(t) ~ N(mean, std^2) (Esser et al. 2024, 2403.03206), stratified; a positive mean favours noise."""
    if not std > 0:
        raise ValueError(f"std={std} must be positive")

    def times(key: jax.Array, n: int) -> jax.Array:
        # The quantile is infinite at 0, which the antithetic draw can return.
        u = jnp.maximum(antithetic_times(key, n), 1e-6)
        return jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(u))

    return times


def grid_times(steps: int, first: int = 0) -> Times:
    """t uniform on {first, ..., steps} / steps. 0, clean data, belongs to the blog's chain; DDPM's begins at 1."""
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    return lambda key, n: jax.random.randint(key, (n,), first, steps + 1) / steps
