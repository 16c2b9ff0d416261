"""What a network predicts, and how to read x0 and eps out of it.

Every prediction is a row (u, w) over (x0, eps), and so is the noisy image itself:

    pred = u x0 + w eps,        xt = alpha x0 + sigma eps                                          (1)

    "x0"    (1, 0)
    "eps"   (0, 1)
    "v"     (-sigma, alpha)         Salimans & Ho 2022 (2202.00512)
    "flow"  (dalpha/dt, dsigma/dt)  the velocity dxt/dt, Lipman et al. 2022 (2210.02747)

Two rows are a 2x2 system in (x0, eps), so one solve decodes them all:

    det = alpha w - sigma u,    x0 = (w xt - sigma pred) / det,    eps = (alpha pred - u xt) / det  (2)

The same determinants convert errors: at fixed xt, an error in the coordinates of prediction a is det_a / det_b times
the error in those of b.                                                                           (3)

A prediction of x0 has det = -sigma, so that near the data the division amplifies its errors. With |det| in (2) kept
above a floor they are bounded, and x0 and eps no longer compose xt. On the linear path the velocity is then

    dalpha/dt x0 + dsigma/dt eps = (xt - pred) / max(t, floor / scale)                              (4)

as in JiT (Li & He 2025, 2511.13720), which takes 0.05 at scale 1. `convert` to "flow" with a floor makes it a
prediction that every sampler decodes without one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffusion.process import Coefficients, Path, coefficients, expand

Prediction = Literal["x0", "eps", "v", "flow"]


class WithVariance(NamedTuple):
    """A prediction with a learned variance, [B, *S, C] each.

    pred: the prediction.
    v: log var, interpolated between the two fixed variances, in the network's own convention (`posterior`).
    """

    pred: jax.Array
    v: jax.Array


class WithVelocity(NamedTuple):
    """The prediction of a mean-flow network (`meanflow`) and its second output, [B, *S, C] each, in the same form.

    pred: of the average velocity from t - (t - r) = r to t.
    v: of the instantaneous velocity at t, from an auxiliary head.
    """

    pred: jax.Array
    v: jax.Array


Output = jax.Array | WithVariance | WithVelocity
# (xt [B, *S, C], t [B], y) -> Output; y is any pytree of arrays with a leading axis B, or None. A network of two times
# takes t [B, 2].
Denoise = Callable[[jax.Array, jax.Array, Any], Output]


class Estimate(NamedTuple):
    """x0_hat and eps_hat at xt, [B, *S, C] each; v is that of a `WithVariance` output, or None."""

    x0: jax.Array
    eps: jax.Array
    v: jax.Array | None = None


# (xt [B, *S, C], t, [] or [B], or [B, 2] for a network of two times) -> estimate
Predict = Callable[[jax.Array, jax.Array], Estimate]

# Below this the system (2) is singular: pred and xt hold the same information.
_SINGULAR = 1e-6


def row(prediction: Prediction, coef: Coefficients) -> tuple[jax.Array, jax.Array]:
    """(u, w) of eq. (1), [B] each."""
    zero, one = jnp.zeros_like(coef.alpha), jnp.ones_like(coef.alpha)
    rows = {
        "x0": (one, zero),
        "eps": (zero, one),
        "v": (-coef.sigma, coef.alpha),
        "flow": (coef.dalpha, coef.dsigma),
    }
    if prediction not in rows:
        raise ValueError(f"prediction={prediction!r} is not one of {get_args(Prediction)}")
    return rows[prediction]


def determinant(prediction: Prediction, coef: Coefficients, floor: float = 0.0) -> jax.Array:
    """det of eq. (2), [B], with |det| kept above `floor`."""
    u, w = row(prediction, coef)
    det = coef.alpha * w - coef.sigma * u
    if not floor:
        return det
    # Where det is 0, at an end of the path, its sign is the one beside it: that of -sigma for x0, of alpha for eps.
    negative = jnp.where(det == 0, w - u, det) < 0
    return jnp.where(negative, -1, 1) * jnp.maximum(jnp.abs(det), floor)


def target(prediction: Prediction, coef: Coefficients, x0: jax.Array, eps: jax.Array) -> jax.Array:
    """What the network should predict, [B, ...], eq. (1)."""
    u, w = row(prediction, coef)
    return expand(u, x0) * x0 + expand(w, x0) * eps


def decode(
    prediction: Prediction, coef: Coefficients, xt: jax.Array, pred: jax.Array, floor: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """(x0_hat, eps_hat) [B, ...] from a prediction at xt, eq. (2), with |det| kept above `floor`.

    Where the two rows are parallel (x0 at sigma = 0, eps at alpha = 0) the system is singular, and the answer is its
    least-norm solution: the quantity that the rows determine is exact, the other is zero. That zero carries no
    information: to sample with the eps prediction on a path that reaches alpha = 0, start just below t = 1.
    """
    u, w = (expand(a, xt) for a in row(prediction, coef))
    det = expand(determinant(prediction, coef, floor), xt)
    alpha, sigma = expand(coef.alpha, xt), expand(coef.sigma, xt)
    if floor:
        return (w * xt - sigma * pred) / det, (alpha * pred - u * xt) / det
    singular = jnp.abs(det) < _SINGULAR
    safe = jnp.where(singular, 1, det)
    norm = alpha**2 + sigma**2 + u**2 + w**2
    x0 = jnp.where(singular, (alpha * xt + u * pred) / norm, (w * xt - sigma * pred) / safe)
    eps = jnp.where(singular, (sigma * xt + w * pred) / norm, (alpha * pred - u * xt) / safe)
    return x0, eps


def estimate(prediction: Prediction, coef: Coefficients, xt: jax.Array, output: Output) -> Estimate:
    """`decode` for an output with or without a learned variance."""
    v = output.v if isinstance(output, WithVariance) else None
    return Estimate(*decode(prediction, coef, xt, pred_of(output)), v)


def predictor(
    denoise: Denoise, path: Path, prediction: Prediction, y: Any = None, *, dtype: DTypeLike | None = None
) -> "Predictor":
    """What a sampler calls in each step: (xt [B, *S, C], t) -> `Estimate`, for the condition y.

    t is [] or [B]; or [B, 2] for a network of two times, whose first is that of xt. The denoiser is given xt in
    `dtype`, that of xt itself by default.
    """
    return Predictor(denoise, path, prediction, y, dtype)


@dataclass(frozen=True)
class Predictor:
    """A `predictor`, with what it was made of: for guidance, `dataclasses.replace` changes the condition."""

    denoise: Denoise
    path: Path
    prediction: Prediction
    y: Any
    dtype: DTypeLike | None

    def __call__(self, xt: jax.Array, t: jax.Array) -> Estimate:
        t = t if jnp.ndim(t) == 2 else jnp.broadcast_to(t, xt.shape[:1])
        output = self.denoise(xt if self.dtype is None else xt.astype(self.dtype), t, self.y)
        return estimate(self.prediction, coefficients(self.path, first_time(t)), xt, output)


def first_time(t: jax.Array) -> jax.Array:
    """The time [B] of xt: t itself, or the first of a network of two times, t [B, 2]."""
    return t if t.ndim == 1 else t[:, 0]


def pred_of(output: Output) -> jax.Array:
    """The prediction alone."""
    return output.pred if isinstance(output, WithVariance | WithVelocity) else output


def replace_pred(output: Output, pred: jax.Array) -> Output:
    """The output with another prediction and the same learned variance or velocity, if there is one."""
    return output._replace(pred=pred) if isinstance(output, WithVariance | WithVelocity) else pred


def convert(denoise: Denoise, path: Path, source: Prediction, to: Prediction, floor: float = 0.0) -> Denoise:
    """The same denoiser, predicting `to` where it predicted `source`, whose |det| is kept above `floor`, eq. (4).

    Raises:
      ValueError: the floor is negative.
    """
    if not floor >= 0:
        raise ValueError(f"floor={floor} must not be negative: it is the smallest divisor, 0 for no bound")

    def converted(xt: jax.Array, t: jax.Array, y: Any = None) -> Output:
        coef, output = coefficients(path, first_time(t)), denoise(xt, t, y)
        return replace_pred(output, target(to, coef, *decode(source, coef, xt, pred_of(output), floor)))

    return converted
