"""The training loss: one weighted squared error for every prediction, path, time sampler and space.

    L = E_{t, eps} w(t) || S pred - S target ||^2 / D  (+ c bound_term(t), see `Bound`)            (1)

`space` S is linear (default: the identity). With S = patchify and a network that answers in tokens this is the loss on
overlapping patches. A time sampler is (key, B) -> t [B], or t and importance weights [B]; a weight is coefficients
-> [B]. Published weights are functions of SNR = (alpha / sigma)^2 on the error of x0, whatever the network predicts;
`weighting` turns them into weights on the network's own error with eq. (3) of `predict`:

    "snr", "snr+1", "truncated_snr" = max(SNR, 1)        Salimans & Ho 2022 (2202.00512)
    "sqrt_snr"                                           Luhman & Luhman 2022 (2207.04316)
    "p2" = SNR / sqrt(1 + SNR)                           Choi et al. 2022 (2204.00227), k = 1, gamma = 1/2
    "min_snr" = min(SNR, gamma)                          Hang et al. 2023 (2303.09556)
    "sigmoid" = SNR sigmoid(bias - log SNR) |d log SNR / dt|   Kingma & Gao 2023 (2303.00848)      (2)
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.predict import Denoise, Learned, Prediction, determinant, estimate, pred_of, replace_pred, target
from diffusion.process import Coefficients, Path, coefficients, noise
from diffusion.variance import Variance, bound_term, least_variance

Times = Callable[[jax.Array, int], jax.Array | tuple[jax.Array, jax.Array]]
Weight = Callable[[Coefficients], jax.Array]
Weighting = Literal["snr", "snr+1", "truncated_snr", "sqrt_snr", "p2", "min_snr", "sigmoid"]


class Draw(NamedTuple):
    """What is random in the loss of a batch: times t [B], noise eps [B, *S, C], importance weights [B] or None."""

    t: jax.Array
    eps: jax.Array
    importance: jax.Array | None = None


class Bound(NamedTuple):
    """The variational term of eq. (1), Nichol & Dhariwal 2021 (2102.09672), in bits per dimension.

    chain: its falling times [T + 1], `sample.respaced_grid`; the time sampler must draw from them (`listed_times`).
    variance: which of `variance.Variance` the network learns or is given.
    scale: c of eq. (1); guided-diffusion's rescale_learned_sigmas is T / 1000, its use_kl is T with `alone`.
    alone: the bound is the whole loss. Otherwise it trains the variance only: the prediction is held fixed in it.
    """

    chain: np.ndarray
    variance: Variance
    scale: float = 1.0
    alone: bool = False


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
    bound: Bound | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`loss_at` times and noise from `draw`: the loss of each example [B], eq. (1), and what it is made of.

    Args:
      denoise: answers in `space`; sees xt [B, *S, C].
      times: time sampler, default `uniform_times`.
      weight: default 1.
      space: linear map from pictures to where the error is measured, default none.
      bound: the variational term, which a learned variance needs; pictures must then be in [-1, 1].
    """
    drawn = draw(key, x0, times)
    return loss_at(drawn, denoise, path, x0, y, prediction=prediction, weight=weight, space=space, bound=bound)


def draw(key: jax.Array, x0: jax.Array, times: Times | None = None) -> Draw:
    """Times and noise for pictures x0 [B, *S, C]."""
    key_t, key_eps = jax.random.split(key)
    t = (times or uniform_times)(key_t, x0.shape[0])
    t, importance = t if isinstance(t, tuple) else (t, None)
    return Draw(t, jax.random.normal(key_eps, x0.shape, x0.dtype), importance)


def loss_at(
    drawn: Draw,
    denoise: Denoise,
    path: Path,
    x0: jax.Array,
    y: jax.Array | None = None,
    *,
    prediction: Prediction,
    weight: Weight | None = None,
    space: Callable[[jax.Array], jax.Array] | None = None,
    bound: Bound | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of each example [B], eq. (1), at given times and noise; nothing here is random, so a batch may be cut.

    Returns also {"t", "mse", "loss"} [B] for those who want to see it over time, and "bound" if there is one: "loss"
    is the loss without importance weights.

    Raises:
      ValueError: the denoiser's shape is not that of the target; it learns a variance and there is no bound, or the
        other way round; `bound` is combined with `space`.
    """
    t, eps, importance = drawn
    coef = coefficients(path, t)
    xt = noise(path, x0, t, eps)
    output = denoise(xt, t, y)
    pred = pred_of(output)
    wanted = target(prediction, coef, *((x0, eps) if space is None else (space(x0), space(eps))))
    if pred.shape != wanted.shape:
        raise ValueError(f"denoise returned shape {pred.shape}, the loss compares it with {wanted.shape}")
    mse = jnp.square(pred - wanted).mean(range(1, pred.ndim))
    value = mse if weight is None else weight(coef) * mse
    parts = {"t": t, "mse": mse}
    if bound is None:
        if isinstance(output, Learned):
            raise ValueError("denoise returned a learned variance, which nothing would train: pass bound=Bound(...)")
    else:
        if space is not None:
            raise ValueError("a bound is measured on pictures: it cannot be combined with space")
        if not bound.alone and not isinstance(output, Learned):
            raise ValueError(
                "the denoiser returns no variance for the bound to train; alone=True trains the prediction"
            )
        held = output if bound.alone else replace_pred(output, jax.lax.stop_gradient(pred))
        term = bound_term(
            bound.variance,
            path,
            x0,
            xt,
            t,
            _next_time(bound.chain, t),
            estimate(prediction, coef, xt, held),
            least_variance(path, bound.chain),
        )
        value = bound.scale * term + (0 if bound.alone else value)
        parts["bound"] = term
    parts["loss"] = value
    return value if importance is None else importance * value, parts


def _next_time(chain: np.ndarray, t: jax.Array) -> jax.Array:
    """The time in the chain that follows the one nearest to t."""
    chain = jnp.asarray(chain, t.dtype)
    return chain[1:][jnp.abs(chain[None, :-1] - t[:, None]).argmin(1)]


def by_quartile(t: jax.Array, values: jax.Array, name: str = "loss") -> dict[str, jax.Array]:
    """Means of `values` [B] whose times t [B] lie in (0, 1/4], (1/4, 1/2], ...: {"loss_q0": [], ..., "loss_q3": []}.

    NaN for a quartile without examples. On a chain of T steps, t = i / T, these are quarters of its steps.
    """
    quartile = jnp.clip(jnp.ceil(4 * t) - 1, 0, 3)
    return {f"{name}_q{i}": jnp.mean(values, where=quartile == i) for i in range(4)}


def weighting(
    name: Weighting, prediction: Prediction, *, gamma: float = 5.0, bias: float = 2.0, floor: float = 1e-3
) -> Weight:
    """Weight on the squared error of `prediction` that is the published weight `name`, eq. (2), on that of x0.

    `gamma` belongs to min_snr and `bias` to sigmoid, whose last factor makes it independent of the path's clock. Where
    a weight has a pole (most do, at t = 0, for a network that predicts x0) it is bounded by the `floor` under alpha and
    sigma. snr is constant for eps, snr+1 for v on a variance-preserving path.
    """
    if name not in get_args(Weighting):
        raise ValueError(f"weighting={name!r} is not one of {get_args(Weighting)}")
    if not gamma > 0:
        raise ValueError(f"gamma={gamma} must be positive")

    def weight(coef: Coefficients) -> jax.Array:
        alpha, sigma, signal, power = coef.alpha, coef.sigma, jnp.square(coef.alpha), jnp.square(coef.sigma)
        # Times sigma^2 every weight is finite everywhere, and det_x0^2 = sigma^2.
        scaled = {
            "snr": lambda: signal,
            "snr+1": lambda: signal + power,
            "truncated_snr": lambda: jnp.maximum(signal, power),
            "sqrt_snr": lambda: alpha * sigma,
            "p2": lambda: signal * sigma / jnp.sqrt(signal + power),
            "min_snr": lambda: jnp.minimum(signal, gamma * power),
            "sigmoid": lambda: 2 * alpha * sigma * determinant("flow", coef) / (power + math.exp(-bias) * signal),
        }
        return scaled[name]() / jnp.square(jnp.maximum(jnp.abs(determinant(prediction, coef)), floor))

    return weight


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


def listed_times(listed: np.ndarray) -> Times:
    """t uniform on a list, such as the `chain[:-1]` of a respaced chain."""
    listed = np.asarray(listed, np.float64)
    if listed.ndim != 1 or not listed.size:
        raise ValueError(f"the times to draw from must be a vector with at least one, got shape {listed.shape}")
    return lambda key, n: jax.random.choice(key, jnp.asarray(listed), (n,))
