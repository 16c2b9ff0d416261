"""Training: a state, one pure step, and averages of the parameters.

    params <- params - optimizer(grad L)
    ema    <- d ema + (1 - d) params,    d = min(decay, (1 + step) / (10 + step))                   (1)

The average follows the *new* parameters, and its horizon grows with the step so that it soon forgets the initial
parameters; without this warm-up d = decay. `averages` has others, whose horizon is chosen after training. `step` is
pure: the caller jits it, donates the state and places the arrays.

An update with a non-finite loss or gradient is skipped: parameters, averages and optimiser stay as they were. In
float16 a gradient may overflow, which is expected: the loss is multiplied by 2^floor(log2_scale) before it is
differentiated, log2_scale falls by one at an overflow and grows slowly otherwise (as in guided-diffusion). (2)
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffusion.averages import power_share

Params = Any


class State(NamedTuple):
    """Everything that training carries from one step to the next.

    step: counts the steps, those skipped for an overflow in float16 included, those skipped for a non-finite loss or
      gradient not: if step < number of batches, an update was skipped.
    ema: the averaged parameters; a tuple of them for a list of decays.
    log2_scale: of the loss, eq. (2); None for no scaling.
    carry: what the loss keeps between steps, such as a `times.History`; None for nothing.
    power: the averages of `averages`, one for each gamma.
    """

    step: jax.Array
    params: Params
    ema: Params | tuple[Params, ...]
    opt: optax.OptState
    log2_scale: jax.Array | None = None
    carry: Any = None
    power: tuple[Params, ...] = ()


LossFn = Callable[[Params, jax.Array, Any], tuple[jax.Array, Any]]
DrawFn = Callable[[jax.Array, Any, State], Any]
ReportFn = Callable[[Any, Any], tuple[dict[str, jax.Array], Any]]
StepFn = Callable[[jax.Array, State, Any], tuple[State, dict[str, jax.Array]]]


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float | Sequence[float] = 0.999,
    log2_scale: float | None = None,
    carry: Any = None,
    gammas: Sequence[float] = (),
) -> State:
    """State before the first step; every average starts at the parameters, in float32 if they are in less.

    Args:
      ema_decay: that of `make_step`; here only the number of averages matters.
      log2_scale: where loss scaling begins, for networks that compute in float16: 20 is usual. None for no scaling.
      carry: see `State`.
      gammas: those of `make_step`; here only their number matters.
    """
    averages = tuple(jax.tree.map(_average, params) for _ in _listed(ema_decay))
    ema = averages[0] if _is_one(ema_decay) else averages
    scale = None if log2_scale is None else jnp.asarray(log2_scale, jnp.float32)
    power = tuple(jax.tree.map(_average, params) for _ in gammas)
    return State(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params), scale, carry, power)


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float | Sequence[float] = 0.999,
    ema_warmup: bool = True,
    draw: DrawFn | None = None,
    report: ReportFn | None = None,
    microbatch: int | None = None,
    scale_growth: float = 1e-3,
    gammas: Sequence[float] = (),
) -> StepFn:
    """step(key, state, batch) -> (state, metrics) for loss_fn(params, key, batch) -> (scalar, aux).

    Randomness is fold_in(key, state.step): give every step the same key. A skipped update shows in `State.step`.

    Args:
      ema_decay: one, or a list for as many averages.
      ema_warmup: whether the decay grows at first, eq. (1); most published programs have it constant.
      draw: (key, batch, state) -> batch; its result is passed to loss_fn in place of the batch: times and noise for the
        whole batch, for example, so that microbatches do not change them. It may use the averages or the carry of the
        state. The loss's own key differs between microbatches.
      report: (aux, carry) -> (metrics, carry), of the whole batch; by default aux are the metrics. "loss" and
        "grad_norm" are those of the step, whatever aux has under these names.
      microbatch: examples to differentiate at a time; gradients are added up. Scalars of aux are averaged, arrays, one
        value per example, are put together again.
      scale_growth: of log2_scale per step, eq. (2), if the state has one.
      gammas: powers of averages to track in `State.power`, see `averages`.

    Raises:
      ValueError: an argument is out of range; on a call, the batch is not a multiple of `microbatch`, or the state
        has another number of averages.
    """
    decays = _listed(ema_decay)
    if not decays or not all(0 <= decay < 1 for decay in decays):
        raise ValueError(f"ema_decay={ema_decay} must lie in [0, 1), each one of a list")
    if microbatch is not None and microbatch < 1:
        raise ValueError(f"microbatch={microbatch} must be at least 1")
    if not all(gamma >= 0 for gamma in gammas):
        raise ValueError(f"gammas={gammas} must not be negative; see `averages.gamma_of`")
    if not scale_growth >= 0:
        raise ValueError(f"scale_growth={scale_growth} must not be negative")

    def step(key: jax.Array, state: State, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, state.step)
        if draw is not None:
            key_draw, key = jax.random.split(key)
            batch = draw(key_draw, batch, state)
        scaled = state.log2_scale is not None
        factor = jnp.ldexp(jnp.float32(1), jnp.floor(state.log2_scale).astype(int)) if scaled else None

        def differentiate(key: jax.Array, batch: Any) -> tuple[tuple[jax.Array, Any], Params]:
            def scaled_loss(params: Params) -> tuple[jax.Array, tuple[jax.Array, Any]]:
                value, aux = loss_fn(params, key, batch)
                return value * factor if scaled else value, (value, aux)

            (_, found), grads = jax.value_and_grad(scaled_loss, has_aux=True)(state.params)
            return found, jax.tree.map(lambda g: g / factor, grads) if scaled else grads

        (value, aux), grads = accumulated(differentiate, key, batch, microbatch)
        averages = (state.ema,) if _is_one(ema_decay) else state.ema
        if [jax.tree.structure(ema) for ema in averages] != [jax.tree.structure(state.params)] * len(decays):
            raise ValueError(f"the averages of the state are not those of ema_decay={ema_decay}; see `init_state`")
        if len(state.power) != len(gammas):
            raise ValueError(f"the state has {len(state.power)} averages for gammas={gammas}; see `init_state`")
        metrics, carry = (aux, state.carry) if report is None else report(aux, state.carry)

        def take() -> tuple[Any, ...]:
            updates, opt = optimizer.update(grads, state.opt, state.params)
            params = optax.apply_updates(state.params, updates)
            after = tuple(
                optax.incremental_update(params, ema, 1 - (warm_decay(decay, state.step) if ema_warmup else decay))
                for ema, decay in zip(averages, decays, strict=True)
            )
            power = tuple(
                optax.incremental_update(params, average, power_share(gamma, state.step))
                for average, gamma in zip(state.power, gammas, strict=True)
            )
            return params, after[0] if _is_one(ema_decay) else after, opt, carry, power

        norm = optax.tree.norm(grads)
        usable = jnp.isfinite(value) & jnp.isfinite(norm)
        # A branch, not jnp.where: that would read and write every parameter once more.
        params, ema, opt, carry, power = jax.lax.cond(
            usable, take, lambda: (state.params, state.ema, state.opt, state.carry, state.power)
        )
        # Of the whole batch; aux may have another "loss", one per example.
        own = {"loss": value, "grad_norm": norm}
        metrics = own | metrics | own
        taken, scale = usable, None
        if scaled:
            # At a scale of 1 the loss itself overflows.
            overflow = jnp.isfinite(value) & ~jnp.isfinite(norm) & (state.log2_scale > 0)
            scale = state.log2_scale + jnp.where(usable, scale_growth, jnp.where(overflow, -1.0, 0.0))
            metrics["log2_scale"] = scale
            taken |= overflow
        return State(state.step + taken.astype(state.step.dtype), params, ema, opt, scale, carry, power), metrics

    return step


def accumulated(
    differentiate: Callable[[jax.Array, Any], Any], key: jax.Array, batch: Any, microbatch: int | None
) -> tuple[tuple[jax.Array, Any], Params]:
    """differentiate(key, batch) -> ((value, aux), grads) of the whole batch, `microbatch` examples at a time.

    Raises:
      ValueError: the batch is not a multiple of `microbatch`.
    """
    b = len(jax.tree.leaves(batch)[0])
    if microbatch is None or microbatch >= b:
        return differentiate(key, batch)
    if b % microbatch:
        raise ValueError(f"the batch of {b} is not a multiple of microbatch={microbatch}")
    n = b // microbatch
    # Every n-th example, so that each microbatch of a batch split over devices still lies on all of them.
    cut = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(microbatch, n, *x.shape[1:]), 1, 0), batch)

    def add(total, now):
        i, examples = now
        (value, aux), grads = differentiate(jax.random.fold_in(key, i), examples)
        return jax.tree.map(jnp.add, total, (value, grads)), aux

    def whole(x: jax.Array) -> jax.Array:
        return x.mean(0) if x.ndim == 1 else jnp.moveaxis(x, 0, 1).reshape(b, *x.shape[2:])

    first = jax.tree.map(lambda x: x[0], cut)
    (value, _), grads = jax.eval_shape(differentiate, key, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (value, grads))
    (value, grads), aux = jax.lax.scan(add, zeros, (jnp.arange(n), cut))
    return (value / n, jax.tree.map(whole, aux)), jax.tree.map(lambda g: g / n, grads)


def _is_one(ema_decay: float | Sequence[float]) -> bool:
    return not isinstance(ema_decay, Sequence)


def _average(p: jax.Array) -> jax.Array:
    """The first value of an average: in bfloat16 the small changes of a step would be lost to rounding."""
    return jnp.array(p, jnp.promote_types(p.dtype, jnp.float32) if jnp.issubdtype(p.dtype, jnp.floating) else p.dtype)


def _listed(ema_decay: float | Sequence[float]) -> tuple[float, ...]:
    return (ema_decay,) if _is_one(ema_decay) else tuple(ema_decay)


def warm_decay(decay: float, step: jax.Array) -> jax.Array:
    """Decay of the average at `step`, eq. (1)."""
    return jnp.minimum(decay, (1 + step) / (10 + step))
