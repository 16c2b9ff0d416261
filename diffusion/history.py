"""Times that follow the loss: what was hard is drawn more often, and weighs less.

    p_i = (1 - u) rms(latest losses at t = i / T) / sum + u / T,    weight = 1 / (T p_i)            (1)

so that the weighted mean is the loss under uniform times with less variance: "loss-second-moment" of Nichol & Dhariwal
2021 (2102.09672), section 3.3. A history is a value: it goes into a step of training and a new one comes out.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion.loss import Times


class History(NamedTuple):
    """The latest losses at every step of a chain of T: losses [T, N], a ring; counts [T], how many there were."""

    losses: jax.Array
    counts: jax.Array


def empty(steps: int, length: int = 10) -> History:
    """No losses yet; `length` are remembered for each of `steps`."""
    if steps < 1 or length < 1:
        raise ValueError(f"steps={steps} and length={length} must be at least 1")
    return History(jnp.zeros((steps, length)), jnp.zeros(steps, jnp.int32))


def times(history: History, uniform: float = 0.001) -> Times:
    """Time sampler of eq. (1), u = `uniform`; uniform until every step was seen as often as is remembered."""
    steps, length = history.losses.shape
    moment = jnp.sqrt(jnp.square(history.losses).mean(1))
    total = moment.sum()
    ready = (history.counts >= length).all() & (total > 0)
    p = jnp.where(ready, (1 - uniform) * moment / jnp.where(ready, total, 1) + uniform / steps, 1 / steps)

    def draw(key: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
        i = jax.random.choice(key, steps, (n,), p=p)
        return (i + 1) / steps, 1 / (steps * p[i])

    return draw


def remember(history: History, t: jax.Array, losses: jax.Array) -> History:
    """The history after a batch's losses [B], without importance weights, at times t [B] (`loss_at`'s "t", "loss")."""
    steps, length = history.losses.shape
    i = jnp.clip(jnp.round(t * steps).astype(int) - 1, 0, steps - 1)
    same = i[:, None] == i[None]
    earlier, later = jnp.tril(same, -1).sum(1), jnp.triu(same, 1).sum(1)
    # Of one step's losses in this batch only the last `length` are written, so that no two want one slot.
    row = jnp.where(later < length, i, steps)
    slot = (history.counts[i] + earlier) % length
    return History(
        history.losses.at[row, slot].set(losses.astype(history.losses.dtype), mode="drop"),
        history.counts.at[i].add(1),
    )
