"""Time samplers: at which times a batch is noised in training.

A time sampler is (key, B) -> t [B], or (t, weights) [B] each, importance weights that keep the loss unbiased. They are
uniform, stratified, logit-normal, on a grid, or follow the loss: times with a large loss are sampled more often,

    p_i = (1 - u) rms(latest losses at t = i / T) / sum + u / T,    weight = 1 / (T p_i)            (1)

so that the weighted mean is the loss under uniform times with less variance: "loss-second-moment" of Nichol & Dhariwal
2021 (2102.09672), section 3.3. Its `History` is a value: it goes into a training step and a new one comes out.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Times = Callable[[jax.Array, int], jax.Array | tuple[jax.Array, jax.Array]]


def uniform_times(key: jax.Array, n: int) -> jax.Array:
    """Independent t ~ U[0, 1), [n]."""
    return jax.random.uniform(key, (n,))


def antithetic_times(key: jax.Array, n: int) -> jax.Array:
    """One t in each of n equal intervals, same offset: U[0, 1) with less variance (Kingma et al. 2021, 2107.00630).

    In random order, since neighbours in a batch may be one image noised several times.
    """
    key_offset, key_order = jax.random.split(key)
    return jax.random.permutation(key_order, jnp.mod(jax.random.uniform(key_offset) + jnp.arange(n) / n, 1))


def logit_normal_times(mean: float = 0.0, std: float = 1.0) -> Times:
    """logit(t) ~ N(mean, std^2) (Esser et al. 2024, 2403.03206), stratified; a positive mean favours high noise."""
    if not std > 0:
        raise ValueError(f"std={std} must be positive")

    def times(key: jax.Array, n: int) -> jax.Array:
        # The quantile is infinite at 0, which antithetic_times can return.
        u = jnp.maximum(antithetic_times(key, n), 1e-6)
        return jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(u))

    return times


def grid_times(steps: int, first: int = 0) -> Times:
    """t uniform on {first, ..., steps} / steps. The blog's chain begins at 0, clean data; DDPM's at 1."""
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    return lambda key, n: jax.random.randint(key, (n,), first, steps + 1) / steps


def listed_times(listed: np.ndarray) -> Times:
    """t uniform on a list, such as the `chain[:-1]` of a respaced chain."""
    listed = np.asarray(listed, np.float64)
    if listed.ndim != 1 or not listed.size:
        raise ValueError(f"the listed times must be a vector of at least one, got shape {listed.shape}")
    return lambda key, n: jax.random.choice(key, jnp.asarray(listed), (n,))


class History(NamedTuple):
    """The latest losses at every step of a chain of T: a ring buffer [T, N]; counts [T], how many there were."""

    losses: jax.Array
    counts: jax.Array


def empty_history(steps: int, length: int = 10) -> History:
    """A history without losses; `length` are kept for each of `steps`."""
    if steps < 1 or length < 1:
        raise ValueError(f"steps={steps} and length={length} must be at least 1")
    return History(jnp.zeros((steps, length)), jnp.zeros(steps, jnp.int32))


def history_times(history: History, uniform: float = 0.001) -> Times:
    """Time sampler of eq. (1), u = `uniform`; uniform until every step has as many losses as are kept."""
    steps, length = history.losses.shape
    moment = jnp.sqrt(jnp.square(history.losses).mean(1))
    total = moment.sum()
    ready = (history.counts >= length).all() & (total > 0)
    p = jnp.where(ready, (1 - uniform) * moment / jnp.where(ready, total, 1) + uniform / steps, 1 / steps)

    def times(key: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
        i = jax.random.choice(key, steps, (n,), p=p)
        return (i + 1) / steps, 1 / (steps * p[i])

    return times


def remember(history: History, t: jax.Array, losses: jax.Array) -> History:
    """The history after a batch's losses [B], without importance weights, at times t [B] (`loss_at`'s "t", "loss")."""
    steps, length = history.losses.shape
    i = jnp.clip(jnp.round(t * steps).astype(int) - 1, 0, steps - 1)
    same = i[:, None] == i[None]
    earlier, later = jnp.tril(same, -1).sum(1), jnp.triu(same, 1).sum(1)
    # Of one step's losses in this batch only the last `length` are written, so that no two are written to one slot.
    row = jnp.where(later < length, i, steps)
    slot = (history.counts[i] + earlier) % length
    return History(
        history.losses.at[row, slot].set(losses.astype(history.losses.dtype), mode="drop"),
        history.counts.at[i].add(1),
    )
