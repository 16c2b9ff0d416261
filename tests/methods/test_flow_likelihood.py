"""The likelihood by the flow's equation, against normal data, whose density and flow are known."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.methods.flow_likelihood import bits_per_dim, log_density, rising_times
from diffusion.process import Linear
from diffusion.sample import sample_keys
from tests.gaussians import COVARIANCE, MEAN, ROOT, correlated
from tests.test_process import PATHS


def exact(path, x0, first):
    """log p of x0 [B, 3] under N(0, sigma(1)^2) moved by the flow from t = 1 to `first`, where xt / alpha is x0."""
    with jax.enable_x64(True):
        (a0, s0), (a1, s1) = (tuple(float(v) for v in path(jnp.float64(t))) for t in (first, 1))
    values, vectors = np.linalg.eigh(COVARIANCE)
    deviations = [np.sqrt(a**2 * values + s**2) for a, s in ((a0, s0), (a1, s1))]
    # Every quantile goes to the same quantile.
    x1 = a1 * MEAN @ vectors + a0 * (x0 - MEAN) @ vectors * deviations[1] / deviations[0]
    prior = -0.5 * np.square(x1 / s1).sum(1) - 1.5 * math.log(2 * math.pi) - 3 * math.log(s1)
    return prior + np.log(deviations[1] / deviations[0]).sum() + 3 * math.log(a0)


@pytest.fixture
def x0(key):
    return MEAN + np.asarray(jax.random.normal(key, (5, 3)), np.float64) @ ROOT.T


def measured(key, path, x0, grid, prediction="x0", **options):
    """log_density of x0 [B, 3] in float64, as NumPy."""
    with jax.enable_x64(True):
        run = partial(log_density, prediction=prediction, **options)
        x0 = jnp.asarray(x0, jnp.float64)[..., None]
        found = jax.jit(run, static_argnums=(1, 2))(key, correlated(path, prediction), path, x0, grid)
        return jax.tree.map(np.asarray, found)


GRIDS = {
    "linear": rising_times(100),
    "linear, scale 2": rising_times(100),
    "cosine": rising_times(100),
    "geometric": rising_times(200),
    # Chains have kinks between their steps: steps of the solver are theirs, or parts of them.
    "vp": np.arange(1, 1001) / 1000,
    "vp cosine": np.arange(8, 401) / 400,
}


@pytest.mark.parametrize("name", PATHS)
def test_it_is_exact_on_normal_data_for_every_path(x0, name):
    found = measured(None, PATHS[name], x0, GRIDS[name], probes=None)
    np.testing.assert_allclose(found.total, exact(PATHS[name], x0, GRIDS[name][0]), atol=1e-4)
    np.testing.assert_allclose(found.total, found.prior + found.change)


def test_the_density_is_that_of_the_data_but_for_the_noise_at_the_start(x0):
    found = measured(None, Linear(), x0, rising_times(100, first=1e-4), "flow", probes=None)
    residual = np.linalg.solve(ROOT, (x0 - MEAN).T)
    density = -0.5 * np.square(residual).sum(0) - 1.5 * math.log(2 * math.pi) - np.log(np.diag(ROOT)).sum()
    np.testing.assert_allclose(found.total, density, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("probes", [1, 4])
def test_the_estimate_of_the_trace_is_unbiased_and_more_probes_are_closer(key, x0, probes):
    same = np.repeat(x0[:1], 2000, 0)
    found = measured(key, Linear(), same, rising_times(10), probes=probes).total
    whole = measured(None, Linear(), x0[:1], rising_times(10), probes=None).total
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean() - whole[0]) < 3.5 * error
    # The variance is 2 times the squares off the diagonal, over the number of probes.
    assert 0.5 < found.std() * math.sqrt(probes) < 2, "the estimate has the spread of random signs"


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("rk4", 4)])
def test_order_of_the_solvers(x0, solver, order):
    path, grids = PATHS["cosine"], [rising_times(n) for n in (20, 80)]
    found = [measured(None, path, x0, grid, probes=None, solver=solver).total for grid in grids]
    errors = [np.abs(total - exact(path, x0, grids[0][0])).max() for total in found]
    assert np.log2(errors[0] / errors[1]) / 2 > order - 0.3


@pytest.mark.slow
def test_values_that_are_equally_likely_need_eight_bits(key):
    """Images of independent values, each of the 256 equally often, with uniform noise: uniform on an interval."""
    path, edge = Linear(), 256 / 255

    def denoise(xt, t, y=None):
        alpha, sigma = (a[:, None, None] for a in path(t))
        mean, deviation = xt / jnp.maximum(alpha, 1e-3), sigma / jnp.maximum(alpha, 1e-3)
        low, high = (-edge - mean) / deviation, (edge - mean) / deviation
        pdf, cdf = jax.scipy.stats.norm.pdf, jax.scipy.stats.norm.cdf
        return mean + deviation * (pdf(low) - pdf(high)) / (cdf(high) - cdf(low))

    x0 = jnp.asarray(np.random.default_rng(0).integers(3, 253, (16, 4, 1)) / 127.5 - 1, jnp.float32)
    with jax.enable_x64(True):
        found = bits_per_dim(
            key, denoise, path, x0.astype(jnp.float64), rising_times(100), prediction="x0", probes=None
        )
    np.testing.assert_allclose(found.total, 8, atol=2e-3)


@pytest.mark.slow
def test_the_likelihood_of_an_image_does_not_depend_on_its_batch(key, x0):
    path, images = Linear(), jnp.asarray(x0, jnp.float32)[..., None]
    run = partial(bits_per_dim, denoise=correlated(path, "x0"), path=path, times=rising_times(5), prediction="x0")
    run = jax.jit(partial(run, solver="heun"))
    keys = sample_keys(key, jnp.arange(5))
    together, alone = run(keys, x0=images), run(keys[3:4], x0=images[3:4])
    np.testing.assert_allclose(together.total[3], alone.total[0], rtol=1e-6)
    assert len(set(np.asarray(run(keys, x0=images[:1].repeat(5, 0)).total).tolist())) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": np.array([0.0, 1.0])}, r"times must be .* rise from above 0, see `rising_times`.* from 0\.0"),
        ({"times": np.array([1.0, 0.5])}, "must be a vector of two or more values that rise"),
        ({"times": np.array([0.5])}, "must be a vector of two or more values"),
        ({"solver": "euler"}, "solver='euler' is not one of"),
        ({"probes": 0}, "probes=0 must be at least 1"),
        ({"key": None}, "probes=1 must be at least 1 and needs a key"),
    ],
)
def test_arguments_out_of_range_are_named(key, change, message):
    given = {"key": key, "times": rising_times(2), "path": Linear(), "denoise": None, "prediction": "x0"}
    with pytest.raises(ValueError, match=message):
        log_density(x0=jnp.zeros((1, 3, 1)), **(given | change))
    with pytest.raises(ValueError, match=r"first=0 must lie between 0 and start=1\.0"):
        rising_times(3, first=0)
    with pytest.raises(ValueError, match=r"sharpness=0\.0 must be positive"):
        rising_times(3, sharpness=0.0)
    with pytest.raises(ValueError, match="levels=1 must be at least 2"):
        bits_per_dim(x0=jnp.zeros((1, 3, 1)), levels=1, **(given | {"key": key}))
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        rising_times(0)
