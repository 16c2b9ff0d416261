"""Time samplers: ranges, distributions, and a history of losses that decides which times are sampled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import times
from diffusion.grids import respaced_grid

SAMPLERS = {
    "uniform": times.uniform_times,
    "antithetic": times.antithetic_times,
    "logit_normal": times.logit_normal_times(0.5, 0.7),
    "grid": times.grid_times(10),
    "listed": times.listed_times(np.array([1.0, 0.7, 0.1])),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_times_lie_in_the_unit_interval_and_depend_on_the_key(key, name):
    a, b = (SAMPLERS[name](k, 512) for k in jax.random.split(key))
    assert a.shape == (512,) and (a >= 0).all() and (a <= 1).all()
    assert (a != b).any()


@pytest.mark.slow
def test_time_samplers_have_their_distributions(key):
    a, b, c, d = jax.random.split(key, 4)
    np.testing.assert_allclose(jnp.quantile(times.uniform_times(a, 20000), 0.25), 0.25, atol=0.01)
    logit = jax.scipy.special.logit(times.logit_normal_times(0.5, 0.7)(b, 20000))
    np.testing.assert_allclose([logit.mean(), logit.std()], [0.5, 0.7], atol=0.02)
    counts = np.bincount(np.round(np.asarray(times.grid_times(10)(c, 22000)) * 10).astype(int))
    np.testing.assert_allclose(counts, 2000, rtol=0.1)
    assert len(counts) == 11
    ordered = jnp.sort(times.antithetic_times(d, 100))
    np.testing.assert_allclose(jnp.diff(ordered), 0.01, atol=1e-5)


def test_listed_times_are_the_list_and_nothing_else(key):
    t, counts = np.unique(times.listed_times(respaced_grid("ddim10", 1000)[:-1])(key, 10000), return_counts=True)
    np.testing.assert_array_equal(t, (np.arange(0, 1000, 100) + 1).astype(np.float32) / np.float32(1000))
    np.testing.assert_allclose(counts, 1000, rtol=0.15)


def filled(losses):
    """A history of one loss per step, recorded twice."""
    state = times.empty_history(len(losses), 2)
    t = (jnp.arange(len(losses)) + 1) / len(losses)
    for _ in range(2):
        state = times.remember(state, t, jnp.asarray(losses))
    return state


@pytest.mark.slow
def test_times_are_uniform_until_every_step_was_seen_often_enough(key):
    state = times.remember(
        times.empty_history(4, 2), jnp.array([0.25, 0.5, 0.75, 1.0]), jnp.array([1.0, 1.0, 1.0, 9.0])
    )
    t, weight = times.history_times(state)(key, 4000)
    np.testing.assert_array_equal(weight, 1)
    assert set(np.unique(t)) == {0.25, 0.5, 0.75, 1.0}
    np.testing.assert_allclose(np.unique(t, return_counts=True)[1], 1000, rtol=0.15)


def test_times_with_large_losses_are_sampled_in_proportion_and_weigh_less(key):
    t, weight = times.history_times(filled([1.0, 1.0, 2.0, 4.0]), uniform=0.2)(key, 20000)
    p = 0.8 * np.array([1, 1, 2, 4]) / 8 + 0.05
    np.testing.assert_allclose([(t == i / 4).mean() for i in range(1, 5)], p, atol=0.015)
    np.testing.assert_allclose(weight, 1 / (4 * p[np.round(np.asarray(t) * 4).astype(int) - 1]), rtol=1e-5)
    # Weighted, every function of t keeps its uniform mean.
    np.testing.assert_allclose((weight * t**2).mean(), np.mean((np.arange(1, 5) / 4) ** 2), rtol=0.03)


@pytest.mark.slow
def test_the_latest_losses_are_kept_also_from_one_batch():
    state = times.empty_history(3, 2)
    one = jax.jit(times.remember)(state, jnp.array([1 / 3, 1 / 3, 1.0, 1 / 3]), jnp.array([1.0, 2.0, 5.0, 3.0]))
    assert sorted(one.losses[0].tolist()) == [2, 3] and one.counts.tolist() == [3, 0, 1]
    for value in (1.0, 2.0, 3.0):
        state = times.remember(state, jnp.array([1 / 3]), jnp.array([value]))
    assert sorted(state.losses[0].tolist()) == [2, 3]
    assert state.losses[1].tolist() == [0, 0]


def test_every_step_of_a_long_chain_finds_its_row():
    t = (jnp.arange(1000) + 1) / 1000
    state = times.remember(times.empty_history(1000, 1), t, jnp.arange(1000.0))
    np.testing.assert_array_equal(state.losses[:, 0], np.arange(1000))


@pytest.mark.slow
def test_losses_of_zero_leave_the_times_uniform(key):
    _, weight = times.history_times(filled([0.0, 0.0]))(key, 5)
    np.testing.assert_array_equal(weight, 1)


@pytest.mark.parametrize("shape", [(0, 10), (10, 0)])
def test_impossible_histories_are_refused(shape):
    with pytest.raises(ValueError, match="must be at least 1"):
        times.empty_history(*shape)


@pytest.mark.parametrize(
    "make", [lambda: times.logit_normal_times(0.0, 0.0), lambda: times.grid_times(0), lambda: times.listed_times([])]
)
def test_impossible_time_samplers_are_refused(make):
    with pytest.raises(ValueError, match="must"):
        make()
