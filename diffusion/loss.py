"""The training loss: one weighted squared error for every prediction, path, time sampler and space.

    L = E_{t, eps} w(t) || S pred - S target ||^2 / D  (+ c vlb_term(t), see `vlb.Vlb`)            (1)

`space` S is linear (default: the identity). With S = patchify and a network that returns tokens this is the loss on
overlapping patches. Time samplers are in `times`; a weight is a function of the coefficients, to [B]. Published weights
are functions of SNR = (alpha / sigma)^2 on the error of x0, whatever the network predicts; `weighting` turns them into
weights on the network's own error with eq. (3) of `predict`:

    "snr", "snr+1", "truncated_snr" = max(SNR, 1)        Salimans & Ho 2022 (2202.00512)
    "sqrt_snr"                                           Luhman & Luhman 2022 (2207.04316)
    "p2" = SNR / sqrt(1 + SNR)                           Choi et al. 2022 (2204.00227), k = 1, gamma = 1/2
    "min_snr" = min(SNR, gamma)                          Hang et al. 2023 (2303.09556)
    "sigmoid" = SNR sigmoid(bias - log SNR) |d log SNR / dt|   Kingma & Gao 2023 (2303.00848)      (2)
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.predict import Denoise, Prediction, WithVariance, determinant, estimate, pred_of, replace_pred, target
from diffusion.process import Coefficients, Path, check_images, coefficients, noise
from diffusion.times import Times, listed_times, uniform_times
from diffusion.vlb import Vlb, least_variance, vlb_term

Weight = Callable[[Coefficients], jax.Array]
Weighting = Literal["snr", "snr+1", "truncated_snr", "sqrt_snr", "p2", "min_snr", "sigmoid"]


class Draw(NamedTuple):
    """What is random in the loss of a batch: times t [B], noise eps [B, *S, C], importance weights [B] or None."""

    t: jax.Array
    eps: jax.Array
    importance: jax.Array | None = None


def loss(
    key: jax.Array,
    denoise: Denoise,
    path: Path,
    x0: jax.Array,
    y: Any = None,
    *,
    prediction: Prediction,
    times: Times | None = None,
    weight: Weight | None = None,
    space: Callable[[jax.Array], jax.Array] | None = None,
    vlb: Vlb | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`loss_at` at times and noise from `draw`: the loss of each example [B], eq. (1), and its parts.

    Args:
      denoise: xt [B, *S, C] to a prediction in `space`.
      times: time sampler, default `times.uniform_times`; with `vlb` those of its chain.
      weight: default 1.
      space: linear map from images to where the error is measured, default none.
      vlb: the variational term, which a learned variance needs; images must then be in [-1, 1].
    """
    if times is None and vlb is not None:
        times = listed_times(vlb.chain[:-1])
    sampled = draw(key, x0, times)
    return loss_at(sampled, denoise, path, x0, y, prediction=prediction, weight=weight, space=space, vlb=vlb)


def draw(key: jax.Array, x0: jax.Array, times: Times | None = None) -> Draw:
    """Times and noise for images x0 [B, *S, C].

    Raises:
      ValueError: x0 is not of a floating type, or the time sampler did not return one time per example.
    """
    check_images(x0)
    key_t, key_eps = jax.random.split(key)
    t = (times or uniform_times)(key_t, x0.shape[0])
    t, importance = t if isinstance(t, tuple) else (t, None)
    for name, value in (("times", t), ("weights", importance)):
        if value is not None and jnp.shape(value) != x0.shape[:1]:
            raise ValueError(
                f"the time sampler returned {name} of shape {jnp.shape(value)}; a batch of {len(x0)} needs ({len(x0)},)"
            )
    return Draw(t, jax.random.normal(key_eps, x0.shape, x0.dtype), importance)


def loss_at(
    sampled: Draw,
    denoise: Denoise,
    path: Path,
    x0: jax.Array,
    y: Any = None,
    *,
    prediction: Prediction,
    weight: Weight | None = None,
    space: Callable[[jax.Array], jax.Array] | None = None,
    vlb: Vlb | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of each example [B], eq. (1), at given times and noise; nothing here is random, so a batch may be cut.

    Returns also {"t", "mse", "loss"} [B], and "vlb" if there is one; this "loss" is without importance weights.

    Raises:
      ValueError: the prediction or the weight has another shape than expected; the denoiser learns a variance and there
        is no `vlb`, or the other way round; `vlb` is combined with `space`; x0 or t are of the wrong type.
    """
    t, eps, importance = sampled
    xt = noise(path, x0, t, eps)
    coef = coefficients(path, t)
    output = denoise(xt.astype(x0.dtype), t, y)
    pred = pred_of(output)
    wanted = target(prediction, coef, *((x0, eps) if space is None else (space(x0), space(eps))))
    if pred.shape != wanted.shape:
        raise ValueError(f"denoise returned shape {pred.shape}, the loss compares it with {wanted.shape}")
    mse = jnp.square(pred - wanted).mean(range(1, pred.ndim))
    value = mse if weight is None else _checked_weight(weight(coef), mse) * mse
    parts = {"t": t, "mse": mse}
    if vlb is None:
        if isinstance(output, WithVariance):
            raise ValueError("the denoiser returned a learned variance, which nothing would train: pass vlb=Vlb(...)")
    else:
        if space is not None:
            raise ValueError("the variational term is measured on images: vlb cannot be combined with space")
        if not vlb.only and not isinstance(output, WithVariance):
            raise ValueError(
                "the denoiser returned no variance for the variational term to train; only=True trains the prediction"
            )
        constant = output if vlb.only else replace_pred(output, jax.lax.stop_gradient(pred))
        term = vlb_term(
            vlb.variance,
            path,
            x0,
            xt,
            t,
            _next_time(vlb.chain, t),
            estimate(prediction, coef, xt, constant),
            least_variance(path, vlb.chain),
        )
        value = vlb.weight * term + (0 if vlb.only else value)
        parts["vlb"] = term
    parts["loss"] = value
    return value if importance is None else importance * value, parts


def _checked_weight(weight: jax.Array, mse: jax.Array) -> jax.Array:
    if jnp.shape(weight) not in ((), mse.shape):
        raise ValueError(f"the weight has shape {jnp.shape(weight)}; it must have one number per example, {mse.shape}")
    return weight


def _next_time(chain: np.ndarray, t: jax.Array) -> jax.Array:
    """The time in the chain that follows the one nearest to t."""
    times = jnp.asarray(chain, t.dtype)
    return times[1:][jnp.abs(times[None, :-1] - t[:, None]).argmin(1)]


def weighting(
    name: Weighting, prediction: Prediction, *, gamma: float = 5.0, bias: float = 2.0, floor: float = 1e-3
) -> Weight:
    """Weight on the squared error of `prediction` that is the published weight `name`, eq. (2), on that of x0.

    `gamma` belongs to min_snr and `bias` to sigmoid, whose last factor makes it independent of how the path
    parametrises time. Where a weight has a pole (most do, at t = 0, for a network that predicts x0) it is bounded by
    the `floor` under alpha and sigma. snr is constant for eps, snr+1 for v on a variance-preserving path.

    Raises:
      ValueError: the name is unknown, or gamma is not positive.
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
