"""Sliced Wasserstein distance: against SciPy's transport in one dimension, and answers that are known."""

import numpy as np
import pytest
import scipy.optimize

from diffusion.metrics.sliced import sliced_distance


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_shifted_features_have_the_distance_of_the_shift(rng):
    """(u . s)^2 is |s|^2 / F on average."""
    x, shift = rng.normal(size=(20, 6)), np.array([1.0, -2.0, 0.5, 0, 0, 1])
    found = sliced_distance(x, x[::-1] + shift, directions=4000)
    assert found == pytest.approx(3 * np.square(shift).sum(), rel=0.05)


def test_scaled_gaussians_have_the_distance_of_their_deviations(rng):
    """W_2 of N(0, s^2) and N(0, z^2) is |s - z| in each direction: 3 F (s - z)^2."""
    x, y = rng.normal(size=(2, 6000, 3))
    assert sliced_distance(x, 3 * y, directions=50) == pytest.approx(3 * 3 * 4, rel=0.05)


@pytest.mark.parametrize(("n", "m"), [(6, 6), (4, 6), (7, 5), (2, 9)])
def test_in_one_dimension_it_is_the_best_transport(rng, n, m):
    a, b = rng.normal(size=(n, 1)), rng.normal(1, 2, size=(m, 1))
    cost, masses = np.square(a - b.T), []
    for i in range(n):
        masses.append(np.eye(n)[i].repeat(m))
    for j in range(m):
        masses.append(np.tile(np.eye(m)[j], n))
    amounts = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    best = scipy.optimize.linprog(cost.ravel(), A_eq=np.array(masses), b_eq=amounts).fun
    assert sliced_distance(a, b, directions=2) == pytest.approx(3 * best, rel=1e-9)


def test_of_equal_sizes_it_is_the_published_formula(rng):
    """MIND: 3 F times the mean over directions of the mean square difference of sorted projections."""
    a, b = rng.normal(size=(30, 4)).astype(np.float32), rng.normal(0.5, 2, size=(30, 4)).astype(np.float32)
    u = np.random.default_rng(7).normal(size=(20, 4))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    gaps = np.sort(a @ u.T, 0) - np.sort(b @ u.T, 0)
    assert sliced_distance(a, b, directions=20, seed=7) == pytest.approx(3 * 4 * np.mean(gaps**2), rel=1e-6)


def test_it_sees_what_moments_do_not(rng):
    """Two distributions with the same mean and covariance, a Gaussian and a sign, differ."""
    x, same = rng.normal(size=(2, 2000, 1))
    sign = np.repeat([[-1.0], [1.0]], 1000, 0)
    assert sliced_distance(x, sign, directions=1) > 30 * sliced_distance(x, same, directions=1)


def test_many_directions_are_those_of_few_at_a_time(rng, monkeypatch):
    import diffusion.metrics.sliced as module

    a, b = rng.normal(size=(8, 3)), rng.normal(size=(9, 3))
    whole = sliced_distance(a, b, directions=20)
    monkeypatch.setattr(module, "AT_ONCE", 3)
    assert sliced_distance(a, b, directions=20) == pytest.approx(whole, rel=1e-12)
    with pytest.raises(ValueError, match="directions=0 must be at least 1"):
        sliced_distance(a, b, directions=0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        sliced_distance(a, b * np.inf)
