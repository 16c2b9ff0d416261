"""Time grids: ends, spacing, and arguments that cannot be met."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.grids import karras_grid, logsnr_grid, respaced_grid, rho_grid, shifted_grid, uniform_grid
from diffusion.process import VP, Cosine, Linear, linear_betas, logsnr, times_of_snr


def exploding(t):
    """A variance-exploding path whose time is sigma."""
    return jnp.ones_like(t), t


@pytest.mark.parametrize(
    ("spec", "steps", "index"),
    [
        ("", 5, [0, 1, 2, 3, 4]),
        ("1", 10, [0]),
        ("3", 10, [0, 4, 9]),
        ("ddim5", 10, [0, 2, 4, 6, 8]),
        ("ddim1", 10, [0]),
        ("2,1,3", 11, [0, 3, 4, 8, 9, 10]),
        ("2, 2", 4, [0, 1, 2, 3]),
    ],
)
def test_respacing_keeps_these_steps(spec, steps, index):
    grid = respaced_grid(spec, steps)
    np.testing.assert_allclose(grid, np.append((np.array(index)[::-1] + 1) / steps, 0), rtol=1e-12)


@pytest.mark.parametrize("spec", ["11", "6,5", "ddim7", "ddim", "ddim0", "ten", "5,", "0", "-3", "2.5"])
def test_impossible_respacing_is_named(spec):
    with pytest.raises(ValueError, match=f"respacing='{spec}'"):
        respaced_grid(spec, 10)


def test_a_shifted_grid_keeps_its_ends_and_takes_more_steps_at_high_noise():
    grid = shifted_grid(10, 3.0)
    assert grid[0] == 1 and grid[-1] == 0 and (np.diff(grid) < 0).all()
    assert grid[5] == pytest.approx(0.75)


def test_the_last_step_can_jump_to_0():
    np.testing.assert_allclose(uniform_grid(5, last=0.2), [1, 0.8, 0.6, 0.4, 0.2, 0])
    shifted = shifted_grid(5, 3.0, 0.9, last=0.2)
    assert len(shifted) == 6 and shifted[-2] == pytest.approx(0.2) and shifted[-1] == 0
    assert shifted[0] == shifted_grid(5, 3.0, 0.9)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "high", "low", "span"),
    [
        (Cosine(), 9.0, -9.0, (0.0, 1.0)),
        (VP(linear_betas(1000)), 8.0, -9.0, (0.0, 1.0)),
        (exploding, 2 * np.log(1 / 0.002), 2 * np.log(1 / 80), (0.0, 80.0)),
    ],
    ids=["cosine", "vp", "exploding"],
)
def test_a_grid_even_in_log_snr_has_equal_differences_of_it_and_ends_at_0(path, high, low, span):
    grid = logsnr_grid(path, 10, high, low, span)
    assert grid.shape == (11,) and grid.dtype == np.float64 and grid[-1] == 0 and (np.diff(grid) < 0).all()
    np.testing.assert_allclose(logsnr(path, jnp.asarray(grid[:-1], jnp.float32)), np.linspace(low, high, 10), rtol=1e-3)


def test_the_exploding_grid_even_in_log_snr_is_geometric_in_sigma():
    grid = logsnr_grid(exploding, 5, 2 * np.log(1 / 0.01), 2 * np.log(1 / 100), (0.0, 200.0))
    np.testing.assert_allclose(grid[:-1], [100, 10, 1, 0.1, 0.01], rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Linear(), 1, 5.0, -5.0), "steps=1 must be at least 2"),
        ((Linear(), 5, -5.0, 5.0), "low=5.0 must be below high=-5.0"),
        ((VP(linear_betas(1000)), 5, 5.0, -20.0), "low=-20.0 .* stays above 2.06115e-09 up to t=1"),
        (
            (exploding, 5, 20.0, -5.0, (0.01, 80.0)),
            "high=20.0: .* is below 936589 from the start, t=0.01",
        ),
        ((Linear(), 100, 5.0, 5.0 - 1e-6), "take fewer steps, or a larger range"),
    ],
)
def test_impossible_grids_in_log_snr_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        logsnr_grid(*arguments)


def test_times_of_snr_are_where_the_snr_has_fallen_to_it():
    np.testing.assert_allclose(times_of_snr(Linear(), [4.0, 1.0, 0.25]), [1 / 3, 1 / 2, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(times_of_snr(exploding, [1e4, 1e-3], (0.0, 80.0)), [0.01, 1000**0.5], rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: uniform_grid(0),
        lambda: uniform_grid(5, start=0.0),
        lambda: shifted_grid(5, 0.0),
        lambda: uniform_grid(5, last=0.0),
        lambda: uniform_grid(5, start=0.5, last=0.5),
        lambda: uniform_grid(1, last=0.5),
        lambda: shifted_grid(5, start=80.0),
        lambda: karras_grid(1, 80.0, 0.002),
        lambda: karras_grid(5, 1.0, 1.0),
        lambda: karras_grid(5, 1.0, 0.1, rho=0.0),
    ],
)
def test_impossible_grids_are_refused(make):
    with pytest.raises(ValueError, match="="):
        make()


def test_edms_grid():
    """Eq. 5 of Karras et al. 2022."""
    grid = karras_grid(18, 80.0, 0.002)
    i = np.arange(18)
    edm = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(grid, np.append(edm, 0), rtol=1e-12)
    np.testing.assert_allclose(grid[[0, 17, 18]], [80, 0.002, 0], rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "span"), [(Linear(), (0.0, 1.0)), (VP(linear_betas(1000)), (0.0, 1.0)), (exploding, (0.0, 99.0))]
)
def test_edms_grid_on_any_path_has_the_same_ratios_of_noise(path, span):
    grid = rho_grid(path, 12, 80.0, 0.02, 5.0, span)
    alpha, sigma = path(jnp.asarray(grid[:-1], jnp.float32))
    np.testing.assert_allclose(sigma / alpha, karras_grid(12, 80.0, 0.02, 5.0)[:-1], rtol=1e-3)
    assert grid[-1] == 0 and grid.dtype == np.float64


def test_a_grid_that_a_path_does_not_reach_is_refused():
    with pytest.raises(ValueError, match=r"sigma / alpha from high=100.0 to low=0.1: .* stays above 0.0001 up to t=1"):
        rho_grid(exploding, 5, 100.0, 0.1)
    with pytest.raises(ValueError, match="low=2.0 must lie between 0 and high=1.0"):
        rho_grid(Linear(), 5, 1.0, 2.0)


def test_a_uniform_grid_may_begin_beyond_1():
    np.testing.assert_allclose(uniform_grid(4, start=80.0), [80, 60, 40, 20, 0])
    np.testing.assert_allclose(uniform_grid(4, start=80.0, last=20.0), [80, 60, 40, 20, 0])
