import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import times


def filled(losses):
    """A times of one loss per step, remembered twice."""
    state = times.empty(len(losses), 2)
    t = (jnp.arange(len(losses)) + 1) / len(losses)
    for _ in range(2):
        state = times.remember(state, t, jnp.asarray(losses))
    return state


def test_times_are_uniform_until_every_step_was_seen_often_enough(key):
    state = times.remember(times.empty(4, 2), jnp.array([0.25, 0.5, 0.75, 1.0]), jnp.array([1.0, 1.0, 1.0, 9.0]))
    t, weight = times.times(state)(key, 4000)
    np.testing.assert_array_equal(weight, 1)
    assert set(np.unique(t)) == {0.25, 0.5, 0.75, 1.0}
    np.testing.assert_allclose(np.unique(t, return_counts=True)[1], 1000, rtol=0.15)


def test_hard_times_are_drawn_in_proportion_and_weigh_less(key):
    t, weight = times.times(filled([1.0, 1.0, 2.0, 4.0]), uniform=0.2)(key, 20000)
    p = 0.8 * np.array([1, 1, 2, 4]) / 8 + 0.05
    np.testing.assert_allclose([(t == i / 4).mean() for i in range(1, 5)], p, atol=0.015)
    np.testing.assert_allclose(weight, 1 / (4 * p[np.round(np.asarray(t) * 4).astype(int) - 1]), rtol=1e-5)
    # Weighted, every function of t keeps its uniform mean.
    np.testing.assert_allclose((weight * t**2).mean(), np.mean((np.arange(1, 5) / 4) ** 2), rtol=0.03)


def test_the_latest_losses_are_remembered_also_from_one_batch():
    state = times.empty(3, 2)
    one = jax.jit(times.remember)(state, jnp.array([1 / 3, 1 / 3, 1.0, 1 / 3]), jnp.array([1.0, 2.0, 5.0, 3.0]))
    assert sorted(one.losses[0].tolist()) == [2, 3] and one.counts.tolist() == [3, 0, 1]
    for value in (1.0, 2.0, 3.0):
        state = times.remember(state, jnp.array([1 / 3]), jnp.array([value]))
    assert sorted(state.losses[0].tolist()) == [2, 3]
    assert state.losses[1].tolist() == [0, 0]


def test_every_step_of_a_long_chain_finds_its_row():
    t = (jnp.arange(1000) + 1) / 1000
    state = times.remember(times.empty(1000, 1), t, jnp.arange(1000.0))
    np.testing.assert_array_equal(state.losses[:, 0], np.arange(1000))


def test_losses_of_zero_leave_the_times_uniform(key):
    _, weight = times.times(filled([0.0, 0.0]))(key, 5)
    np.testing.assert_array_equal(weight, 1)


@pytest.mark.parametrize("shape", [(0, 10), (10, 0)])
def test_impossible_histories_are_refused(shape):
    with pytest.raises(ValueError, match="must be at least 1"):
        times.empty(*shape)
