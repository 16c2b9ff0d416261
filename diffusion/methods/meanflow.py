"""Mean-flow models: a network of the average velocity between two times, which samples in one evaluation.

    u(z, t, r) = 1 / (t - r) integral_r^t v(z_s, s) ds,      z_r = z_t - (t - r) u                  (1)
    u + (t - r) du/dt = v,    d/dt along the flow with r held: (dz, dt, dr) = (v, 1, 0)             (2)
    V = u + (t - r) sg(du/dt),    du/dt from `jax.jvp` of the network along (v_c, 1, 0)             (3)
    v_g = v_t + (1 - 1/w) (v_c - v_u),    w = 1 outside the guidance interval                       (4)
    L = adp(|V - v_g|^2) + adp(|v - v_g|^2) + c |F(z - t u) - F(x0)|^2                              (5)
    adp(l) = l / sg(l + 0.01)^p

sg stops the gradient. v_t is the velocity of the noised example; v, v_c and v_u are outputs of a second head of the
same network, the last two, under sg, for the condition and for none. (4) trains the network to be its own guided
version, for every scale w and every interval, which it is told as conditions: guidance costs no second evaluation. The
last term, of features F of the image that u points to, is optional and left out at times above a bound.

(1), (2): MeanFlow, Geng et al. 2025 (2505.13447). (3) to (5): improved MeanFlow, Geng et al. 2025 (2512.02012), and
with a network that predicts images, u = (z - x0_hat) / max(t, 0.05), the same group's pixel MeanFlow.

A mean-flow network is a denoiser of two times, t [B, 2], which hold t and t - r. Its condition is `Guided`; it returns
`WithVelocity`, predictions in one of the forms of `predict`, which loss and sampler turn into velocities.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion.guide import null_like
from diffusion.predict import Denoise, Prediction, WithVelocity, decode, determinant, pred_of, row
from diffusion.process import Coefficients, Path, check_images, coefficients, expand, noise
from diffusion.sample import Sampler, one_step
from diffusion.times import Times, uniform_times

SCALARS = 3  # numbers of a condition, beside the labels


class Guided(NamedTuple):
    """The condition of a mean-flow network.

    y: labels, or any pytree with a leading axis B; None for an unconditional network.
    scalars: [B, 3], in [0, 1]: 1 - 1/w of the guidance scale w, and both ends of the interval of times with guidance.
    """

    y: Any
    scalars: jax.Array


class Draw(NamedTuple):
    """What is random in the loss of a batch, [B] each, and eps [B, *S, C].

    t, r: times, t >= r.
    scale, low, high: guidance scale, at least 1, and the ends of its interval.
    dropped: whether the condition is dropped.
    """

    t: jax.Array
    r: jax.Array
    eps: jax.Array
    scale: jax.Array
    low: jax.Array
    high: jax.Array
    dropped: jax.Array


class Velocities(NamedTuple):
    """The terms of eq. (3) and (4), [B, *S, C] each; `guided` is v_g."""

    u: jax.Array
    du_dt: jax.Array
    V: jax.Array
    v: jax.Array
    guided: jax.Array


def guided(
    y: Any, scale: float | jax.Array, low: float | jax.Array, high: float | jax.Array, like: jax.Array
) -> Guided:
    """The condition y with a guidance scale w >= 1 and its interval [low, high], numbers or [B], for images `like`.

    Raises:
      ValueError: the scale is a number below 1.
    """
    if isinstance(scale, int | float) and not scale >= 1:
        raise ValueError(f"scale={scale} must be at least 1, which is no guidance: a mean-flow network knows no other")
    columns = (1 - 1 / jnp.asarray(scale, like.dtype), low, high)
    return Guided(y, jnp.stack([jnp.broadcast_to(jnp.asarray(a, like.dtype), like.shape[:1]) for a in columns], -1))


def draw(
    key: jax.Array,
    x0: jax.Array,
    times: Times | None = None,
    *,
    instant: float = 0.5,
    to_data: float = 0.0,
    scale_max: float = 8.0,
    scale_power: float = 1.0,
    drop: float = 0.1,
) -> Draw:
    """Times, noise, guidance scales and intervals for images x0 [B, *S, C].

    Args:
      times: sampler of t and r, which are put in order; default `times.uniform_times`.
      instant: share of the batch, its first examples, with r = t; their interval of guidance is [0, 1].
      to_data: share of the others, the last examples, with r = 0, as in sampling with one step.
      scale_max: the scales w have a density proportional to w^-scale_power on [1, scale_max].
      drop: share of dropped conditions.

    Raises:
      ValueError: x0 is not of a floating type, an argument is out of range, or the times have importance weights.
    """
    check_images(x0)
    if not all(0 <= share <= 1 for share in (instant, to_data, drop)):
        raise ValueError(f"instant={instant}, to_data={to_data} and drop={drop} must lie in [0, 1]")
    if not 1 <= scale_max < float("inf"):
        raise ValueError(f"scale_max={scale_max} must be at least 1, which is no guidance")
    b = len(x0)
    key_t, key_r, key_eps, key_scale, key_low, key_high, key_drop = jax.random.split(key, 7)
    both = [(times or uniform_times)(k, b) for k in (key_t, key_r)]
    if any(isinstance(t, tuple) for t in both):
        raise ValueError("the time sampler returns importance weights, which a mean-flow loss has no use for")
    t, r = jnp.maximum(*both), jnp.minimum(*both)
    place, first = jnp.arange(b), round(instant * b)
    equal = place < first
    r = jnp.where(place >= b - round(to_data * (b - first)), 0, r)
    return Draw(
        t,
        jnp.where(equal, t, r),
        jax.random.normal(key_eps, x0.shape, x0.dtype),
        _power_law(jax.random.uniform(key_scale, (b,)), scale_max, scale_power),
        jnp.where(equal, 0.0, jax.random.uniform(key_low, (b,), maxval=0.5)),
        jnp.where(equal, 1.0, jax.random.uniform(key_high, (b,), minval=0.5)),
        jax.random.uniform(key_drop, (b,)) < drop,
    )


def _power_law(quantile: jax.Array, largest: float, power: float) -> jax.Array:
    """Values in [1, largest] with a density proportional to value^-power, from their quantiles."""
    if abs(power - 1) < 1e-6:
        return jnp.asarray(largest) ** quantile
    return (1 + quantile * (largest ** (1 - power) - 1)) ** (1 / (1 - power))


def velocity(prediction: Prediction, coef: Coefficients, xt: jax.Array, pred: jax.Array, floor: float) -> jax.Array:
    """The velocity alpha' x0 + sigma' eps of a prediction at xt, [B, *S, C]; `floor` bounds the divisor from below.

    Of x0 the divisor is sigma: on the linear path the velocity is (xt - x0) / max(t, floor / scale).
    """
    u, w = row(prediction, coef)
    det = determinant(prediction, coef, floor)
    of_xt = (coef.dalpha * w - coef.dsigma * u) / det
    return expand(of_xt, xt) * xt + expand(determinant("flow", coef) / det, xt) * pred


def velocities(
    sampled: Draw,
    denoise: Denoise,
    path: Path,
    x0: jax.Array,
    y: Any = None,
    *,
    null: Any = None,
    prediction: Prediction,
    floor: float = 0.05,
) -> tuple[jax.Array, Velocities]:
    """(xt, the velocities of eq. (3) and (4)), at given times and noise.

    Args:
      denoise: a mean-flow network.
      y, null: the condition, and that of one example without one; y=None for an unconditional network.
      prediction: what the network predicts, with both outputs: x0 or flow.
      floor: of the divisor that turns x0 into a velocity, sigma, in the network's output as in v_t; of a path of
        another noise scale, the published 0.05 times the scale.

    Raises:
      ValueError: the network has no second output.
    """
    t, r, eps, scale, low, high, dropped = sampled
    xt = noise(path, x0, t, eps).astype(x0.dtype)
    coef = coefficients(path, t)

    def network(xt: jax.Array, t: jax.Array, r: jax.Array, y: Guided) -> tuple[jax.Array, jax.Array]:
        output = denoise(xt, jnp.stack([t, t - r], -1), y)
        if not isinstance(output, WithVelocity):
            raise ValueError("a mean-flow loss needs a network with a second output, Task(velocity=True), as ViT has")
        at = coefficients(path, t)
        return velocity(prediction, at, xt, output.pred, floor), velocity(prediction, at, xt, output.v, floor)

    plain = velocity("x0", coef, xt, x0, floor)
    if y is None:
        condition = guided(None, 1.0, 0.0, 1.0, xt)
        target, along = plain, network(xt, t, t, condition)[1]
    else:
        nothing = null_like(y, null)
        inside = jnp.where((t >= low) & (t <= high), scale, 1.0)
        # One batch of 2B: with the condition, and without.
        both = jax.tree.map(lambda a, n: jnp.concatenate([a, n]), y, nothing)
        twice = [jnp.concatenate([a, a]) for a in (xt, t)]
        ones = jnp.ones_like(scale)
        told = guided(both, jnp.concatenate([inside, ones]), 0.0, 1.0, twice[0])
        along, without = jnp.split(network(*twice, twice[1], told)[1], 2)
        target = plain + expand(1 - 1 / inside, xt) * (along - without)
        target = jnp.where(expand(dropped, xt), plain, target)
        kept = jax.tree.map(lambda a, n: jnp.where(expand(dropped, a), n, a), y, nothing)
        condition = guided(kept, scale, low, high, xt)
    target, along = jax.lax.stop_gradient((target, along))
    u, du_dt, v = jax.jvp(
        lambda xt, t, r: network(xt, t, r, condition),
        (xt, t, r),
        (along, jnp.ones_like(t), jnp.zeros_like(r)),
        has_aux=True,
    )
    du_dt = jax.lax.stop_gradient(du_dt)
    return xt, Velocities(u, du_dt, u + expand(t - r, xt) * du_dt, v, target)


def loss_at(
    sampled: Draw,
    denoise: Denoise,
    path: Path,
    x0: jax.Array,
    y: Any = None,
    *,
    null: Any = None,
    prediction: Prediction,
    floor: float = 0.05,
    power: float = 1.0,
    features: Callable[[jax.Array], jax.Array] | None = None,
    feature_weight: float = 0.4,
    feature_until: float = 0.8,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of each example [B], eq. (5), at given times, noise and guidance; otherwise as `velocities`.

    With power = 1 the loss is nearly constant, the number of its terms, and only its gradient matters. Returns also
    {"t", "loss", "mse", "velocity_mse"} [B]: "loss" and "mse" are the mean square of V - v_g, "velocity_mse" that of
    v - v_g.

    Args:
      power: p of the adaptive weight; 0 for plain squares, summed over pixels.
      features: images [B, *S, C] in the network's range of values -> [B, ...], for the last term, whose mean square is
        taken; None for none.
      feature_weight, feature_until: c of eq. (5), and the time from which on there is no such term.
    """
    xt, now = velocities(sampled, denoise, path, x0, y, null=null, prediction=prediction, floor=floor)
    axes = tuple(range(1, x0.ndim))
    average, instant = (jnp.square(a - now.guided) for a in (now.V, now.v))
    value = sum(_adaptive(square.sum(axes), power) for square in (average, instant))
    if features is not None:
        image = velocity_to_image(path, sampled.t, xt, now.u)
        error = jnp.square(features(image) - jax.lax.stop_gradient(features(x0)))
        error = error.mean(tuple(range(1, error.ndim)))
        value = value + feature_weight * jnp.where(sampled.t < feature_until, error, 0)
    mse = average.mean(axes)
    return value, {"t": sampled.t, "loss": mse, "mse": mse, "velocity_mse": instant.mean(axes)}


def velocity_to_image(path: Path, t: jax.Array, xt: jax.Array, u: jax.Array) -> jax.Array:
    """The x0 [B, *S, C] whose velocity at xt is u: xt - t u on the linear path."""
    return decode("flow", coefficients(path, t), xt, u)[0]


def _adaptive(value: jax.Array, power: float) -> jax.Array:
    return value / jax.lax.stop_gradient((value + 0.01) ** power)


def sampler() -> Sampler:
    """Steps of eq. (1) with a mean-flow network, of any length: one from t = 1 to 0, or several."""

    def step(key, predict, path, xt, t, s):
        del key
        t, s = (jnp.broadcast_to(a, xt.shape[:1]) for a in (t, s))
        now, coef = predict(xt, jnp.stack([t, t - s], -1)), coefficients(path, t)
        u = expand(coef.dalpha, xt) * now.x0 + expand(coef.dsigma, xt) * now.eps
        return xt - expand(t - s, xt) * u

    return one_step(step)


def told(
    denoise: Denoise, scale: float | jax.Array = 1.0, low: float | jax.Array = 0.0, high: float | jax.Array = 1.0
) -> Denoise:
    """A mean-flow network as a denoiser of plain conditions, told the guidance scale and its interval.

    It also takes one time, t [B], and then predicts the instantaneous velocity: any other sampler works with it. A
    condition that is `Guided` is passed on as it is.
    """

    def plain(xt: jax.Array, t: jax.Array, y: Any = None) -> jax.Array:
        t = jnp.stack([t, jnp.zeros_like(t)], -1) if t.ndim == 1 else t
        return pred_of(denoise(xt, t, y if isinstance(y, Guided) else guided(y, scale, low, high, xt)))

    return plain
