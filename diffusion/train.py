"""Training: a state, one pure step, and an average of the parameters.

    params <- params - optimizer(grad L)
    ema    <- d ema + (1 - d) params,    d = min(decay, (1 + step) / (10 + step))                   (1)

The average follows the *new* parameters, and its horizon grows with the step so that early samples are not the
initial noise. `step` is pure: the caller jits it, donates the state and places the arrays.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Params = Any


class State(NamedTuple):
    """Everything that training carries from one step to the next."""

    step: jax.Array
    params: Params
    ema: Params
    opt: optax.OptState


LossFn = Callable[[Params, jax.Array, Any], tuple[jax.Array, dict[str, jax.Array]]]
StepFn = Callable[[jax.Array, State, Any], tuple[State, dict[str, jax.Array]]]


def init_state(params: Params, optimizer: optax.GradientTransformation) -> State:
    """State before the first step; the average starts at the parameters."""
    return State(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def make_step(loss_fn: LossFn, optimizer: optax.GradientTransformation, *, ema_decay: float = 0.999) -> StepFn:
    """step(key, state, batch) -> (state, metrics) for loss_fn(params, key, batch) -> (scalar, metrics).

    Randomness is fold_in(key, state.step): give every step the same key.
    """
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay={ema_decay} must lie in [0, 1)")

    def step(key: jax.Array, state: State, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, state.step)
        (value, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, key, batch)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = warm_decay(ema_decay, state.step)
        ema = optax.incremental_update(params, state.ema, 1 - decay)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), **metrics}
        return State(state.step + 1, params, ema, opt), metrics

    return step


def warm_decay(decay: float, step: jax.Array) -> jax.Array:
    """Decay of the average at `step`, eq. (1)."""
    return jnp.minimum(decay, (1 + step) / (10 + step))


def adamw(
    learning_rate: float,
    steps: int,
    *,
    warmup: int = 0,
    schedule: str = "cosine",
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | None = None,
) -> optax.GradientTransformation:
    """AdamW with linear warm-up, then a cosine to zero at `steps` or a constant; gradients clipped to a global norm.

    Weight decay acts on what `decayed` marks.
    """
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"schedule={schedule!r} is not one of ('cosine', 'constant')")
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup={warmup} must lie in [0, steps={steps})")
    decay = optax.cosine_decay_schedule(learning_rate, steps - warmup)
    after = decay if schedule == "cosine" else optax.constant_schedule(learning_rate)
    rate = optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup), after], [warmup])
    optimizer = optax.adamw(rate, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed)
    return optimizer if clip is None else optax.chain(optax.clip_by_global_norm(clip), optimizer)


def decayed(params: Params) -> Params:
    """Which parameters weight decay acts on: matrices and tables, not vectors and not biases, which may have axes."""

    def is_decayed(path: tuple, p: jax.Array) -> bool:
        return p.ndim > 1 and getattr(path[-1], "key", None) != "bias"

    return jax.tree_util.tree_map_with_path(is_decayed, params)
