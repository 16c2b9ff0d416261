"""Power-function averages and their reconstruction from stored ones, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import averages

GAMMAS = [averages.gamma_of(s) for s in (0.05, 0.1)]


def tracked(params, gamma):
    """Eq. (2) over params [n, D]: the average after each step, [n, D]."""
    average, found = np.zeros(params.shape[1]), []
    for i, now in enumerate(params):
        d = (1 - 1 / (i + 1)) ** (gamma + 1)
        average = d * average + (1 - d) * now
        found.append(average)
    return np.stack(found)


def walk(n, d=16):
    return 5 + np.cumsum(np.random.default_rng(0).normal(size=(n, d)), 0)


def reconstructed(params, every, step, gamma, gammas=GAMMAS):
    """The average of `gamma` after `step` from those of `gammas` stored every so many steps, and how far it is off,
    relative to how far the parameters move."""
    stored = [tracked(params, g) for g in gammas]
    steps = np.arange(every, len(params) + 1, every)
    x = averages.coefficients(np.repeat(steps, len(gammas)), np.tile(gammas, len(steps)), step, gamma)
    found = averages.combined(x, (each[n - 1] for n in steps for each in stored))
    return np.abs(found - tracked(params, gamma)[step - 1]).max() / params.std()


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_widths_and_powers_are_inverse(sigma_rel):
    assert averages.sigma_rel_of(averages.gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)


def test_published_powers():
    """Karras et al. 2023, section 3.2: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert averages.gamma_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert averages.gamma_of(0.10) == pytest.approx(6.94, abs=5e-3)
    assert averages.gamma_of(averages.sigma_rel_of(0)) == pytest.approx(0, abs=1e-6)


def test_the_width_is_the_standard_deviation_of_the_weights_relative_to_the_step():
    n, gamma = 20_000, averages.gamma_of(0.1)
    k = np.arange(1, n + 1.0)
    weights = (k / n) ** (gamma + 1) - ((k - 1) / n) ** (gamma + 1)
    mean = (weights * k).sum()
    assert weights.sum() == pytest.approx(1)
    assert np.sqrt((weights * (k - mean) ** 2).sum()) / n == pytest.approx(0.1, rel=1e-3)


def test_the_tracked_average_has_the_stated_weights():
    n, gamma = 50, GAMMAS[1]
    k = np.arange(1, n + 1.0)
    weights = (k / n) ** (gamma + 1) - ((k - 1) / n) ** (gamma + 1)
    params = walk(n)
    np.testing.assert_allclose(weights @ params, tracked(params, gamma)[-1], rtol=1e-12)
    with jax.enable_x64(True):
        found = [1 - float(averages.power_share(gamma, jnp.asarray(i))) for i in range(3)]
    assert found == pytest.approx([0, 0.5 ** (gamma + 1), (2 / 3) ** (gamma + 1)])
    assert float(averages.power_share(gamma, jnp.int32(10**7))) == pytest.approx((gamma + 1) * 1e-7, rel=1e-5)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.075, 0.15])
def test_a_reconstruction_is_the_tracked_average_where_snapshots_are_dense(sigma_rel):
    assert reconstructed(walk(200), 1, 200, averages.gamma_of(sigma_rel)) < 1e-6


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1])
def test_what_was_tracked_is_found_as_it_is_from_any_snapshots(sigma_rel):
    assert reconstructed(walk(400), 50, 400, averages.gamma_of(sigma_rel)) < 1e-12


# Of a random walk of 400 steps, relative to its standard deviation; measured 3e-4, 2e-5, 3e-5, 6e-3 for 40 snapshots,
# and 2e-2, 2e-3, 4e-3, 6e-2 for 8.
@pytest.mark.parametrize(("every", "bounds"), [(10, (6e-4, 4e-5, 6e-5, 1e-2)), (50, (4e-2, 4e-3, 8e-3, 0.1))])
def test_how_far_sparse_snapshots_are_off(every, bounds):
    for sigma_rel, bound in zip((0.03, 0.075, 0.15, 0.25), bounds, strict=True):
        assert reconstructed(walk(400), every, 400, averages.gamma_of(sigma_rel)) < bound


def test_an_average_at_an_earlier_step_is_made_of_earlier_snapshots():
    params = walk(400)
    assert reconstructed(params, 10, 200, averages.gamma_of(0.075)) < 1e-3
    found = averages.coefficients([100, 200, 300], [7.0] * 3, 200, 7.0)
    np.testing.assert_allclose(found, [0, 1, 0], atol=1e-9)


def test_coefficients_add_up_to_one_so_that_equal_parameters_stay():
    x = averages.coefficients(np.repeat([50, 100, 150], 2), GAMMAS * 3, 150, averages.gamma_of(0.2))
    assert x.sum() == pytest.approx(1, abs=1e-9)


def test_the_error_of_the_fit_is_that_of_the_weights():
    """Against sums over a fine grid of time."""
    steps, gammas, gamma = np.repeat([50, 100], 2), GAMMAS * 2, averages.gamma_of(0.2)
    t = (np.arange(200_000) + 0.5) / 2000
    profile = lambda n, g: np.where(t < n, (g + 1) * t**g / n ** (g + 1), 0)  # noqa: E731
    made = sum(
        x * profile(n, g)
        for x, n, g in zip(averages.coefficients(steps, gammas, 100, gamma), steps, gammas, strict=True)
    )
    wanted = profile(100, gamma)
    error = np.sqrt(np.square(made - wanted).sum() / np.square(wanted).sum())
    assert averages.fit_error(steps, gammas, 100, gamma) == pytest.approx(error, rel=1e-3)
    assert averages.fit_error(steps, gammas, 100, GAMMAS[0]) < 1e-6


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(ValueError, match=r"sigma_rel=0.3 must lie in \(0, 0.2886\]"):
        averages.gamma_of(0.3)
    assert averages.gamma_of(0.2886) > 0
    with pytest.raises(ValueError, match="at least one average"):
        averages.combined([], [])
    with pytest.raises(ValueError, match="an average stored at step 5 or before, not \\[10\\]"):
        averages.coefficients([10], [7.0], 5, 7.0)
