"""EDM's preconditioning: table 1, unit variance in and out, the loss weight, and training with the loss as it is."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import loss
from diffusion.grids import karras_grid, rho_grid
from diffusion.methods import edm
from diffusion.predict import WithVariance, decode
from diffusion.process import Cosine, Linear, coefficients, noise
from diffusion.sample import heun, initial_noise, sample, sample_keys

SIGMAS = jnp.array([0.002, 0.1, 0.5, 3.0, 80.0])


def test_scalings_are_those_of_table_1():
    found = edm.scalings(edm.Exploding(), SIGMAS, 0.5)
    sigma, d = np.float64(SIGMAS), 0.5
    np.testing.assert_allclose(found.skip, d**2 / (sigma**2 + d**2), rtol=1e-5)
    np.testing.assert_allclose(found.out, sigma * d / np.sqrt(d**2 + sigma**2), rtol=1e-5)
    np.testing.assert_allclose(found.into, 1 / np.sqrt(sigma**2 + d**2), rtol=1e-5)
    np.testing.assert_allclose(found.noise, np.log(sigma) / 4, rtol=1e-5)
    weight = edm.weight(0.5)(coefficients(edm.Exploding(), SIGMAS))
    np.testing.assert_allclose(weight, (sigma**2 + d**2) / (sigma * d) ** 2, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("path", [edm.Exploding(), Linear(), Cosine()], ids=["exploding", "linear", "cosine"])
def test_the_network_sees_unit_variance_and_should_answer_with_it(key, path):
    """Data of deviation 0.3: the input of F, and its output for which D = x0, at every time; its loss has weight 1."""
    t = jnp.repeat(jnp.array([0.05, 0.3, 0.6, 0.95]), 2)
    keys = jax.random.split(key, 2)
    x0, eps = 0.3 * jax.random.normal(keys[0], (8, 20000)), jax.random.normal(keys[1], (8, 20000))
    xt, c = noise(path, x0, t, eps), edm.scalings(path, t, 0.3)
    inputs = []
    edm.preconditioned(lambda x, at, y: inputs.append((x, at)) or x, path, 0.3)(xt, t)
    np.testing.assert_allclose(inputs[0][0].std(1), 1, rtol=0.02)
    np.testing.assert_allclose(inputs[0][1], c.noise, rtol=1e-5)
    wanted = (x0 - c.skip[:, None] * xt) / c.out[:, None]
    np.testing.assert_allclose(wanted.std(1), 1, rtol=0.02)
    assert np.abs((np.asarray(wanted) * np.asarray(inputs[0][0])).mean(1)).max() < 0.03  # and nothing known of it
    out = edm.preconditioned(lambda x, at, y: wanted, path, 0.3)(xt, t)
    np.testing.assert_allclose(out, x0, atol=1e-4)
    values, _ = loss.loss_at(
        loss.Draw(t, eps),
        edm.preconditioned(lambda x, at, y: jnp.zeros_like(x), path, 0.3),
        path,
        x0,
        prediction="x0",
        weight=edm.weight(0.3),
    )
    np.testing.assert_allclose(values, np.square(wanted).mean(1), rtol=1e-3)


def test_one_network_serves_every_path_at_the_same_ratio_of_noise(key):
    """At equal sigma / alpha the denoiser is the same function of xt / alpha."""
    network = lambda x, at, y: jnp.tanh(x) + at[:, None]  # noqa: E731
    x, ratios = jax.random.normal(key, (3, 5)), np.array([9.0, 1.0, 0.2])
    expected = edm.preconditioned(network, edm.Exploding())(x, jnp.asarray(ratios, jnp.float32))
    for path in (Linear(), Cosine()):
        t = jnp.asarray(ratios / (1 + ratios) if path == Linear() else 2 / np.pi * np.arctan(ratios), jnp.float32)
        found = edm.preconditioned(network, path)(path(t)[0][:, None] * x, t)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_learned_variance_is_passed_on(key):
    x, t = jax.random.normal(key, (2, 5)), jnp.array([0.5, 2.0])
    both = edm.preconditioned(lambda x, at, y: WithVariance(x, x + 1), edm.Exploding())(x, t)
    alone = edm.preconditioned(lambda x, at, y: x, edm.Exploding())(x, t)
    np.testing.assert_array_equal(both.pred, alone)
    np.testing.assert_allclose(both.v, x * edm.scalings(edm.Exploding(), t).into[:, None] + 1)


def test_the_network_is_told_finite_times_at_both_ends_of_a_path(key):
    network = lambda x, at, y: jnp.cos(at)[:, None] * x  # noqa: E731
    c_noise = edm.scalings(Linear(), jnp.array([0.0, 1.0])).noise
    np.testing.assert_allclose(c_noise, [np.log(1e-6) / 4, -np.log(1e-6) / 4], rtol=1e-5)
    x1 = jax.random.normal(key, (2, 5))
    x0 = sample(key, edm.preconditioned(network, Linear()), Linear(), x1, np.linspace(1, 0, 4), prediction="x0")
    assert np.isfinite(x0).all()


@pytest.mark.slow
def test_sigmas_of_training_are_log_normal(key):
    logs = np.log(edm.log_normal_times(-1.2, 1.2)(key, 4000))
    assert (logs.mean(), logs.std()) == (pytest.approx(-1.2, abs=0.01), pytest.approx(1.2, abs=0.01))
    t = edm.log_normal_times()(jax.random.key(1), 3)
    assert np.isfinite(t).all() and (t > 0).all()


def test_the_path_is_that_of_karras_and_its_grid_that_of_the_paper():
    coef = coefficients(edm.Exploding(), SIGMAS)
    np.testing.assert_array_equal(coef.alpha, np.ones(5))
    np.testing.assert_array_equal(coef.sigma, SIGMAS)
    np.testing.assert_array_equal((coef.dalpha, coef.dsigma), (np.zeros(5), np.ones(5)))
    grid = rho_grid(edm.Exploding(), 18, span=(0.0, 100.0))
    np.testing.assert_allclose(grid, karras_grid(18, 80.0, 0.002), rtol=1e-5)
    x0, eps = decode("x0", coef, SIGMAS * 2 + 1, jnp.ones(5))
    np.testing.assert_allclose((x0, eps), (np.ones(5), np.full(5, 2.0)), rtol=1e-3)


def test_trained_with_the_loss_as_it_is_a_linear_network_becomes_the_exact_denoiser(key):
    """Data N(0, 0.5^2) in one pixel: F = 0 is exact, and what gradient descent finds from elsewhere; samples follow."""
    path, times = edm.Exploding(), edm.log_normal_times()

    def of(params):
        return edm.preconditioned(lambda x, at, y: params[0] * x + params[1] * at[:, None], path)

    def value(params, key):
        keys = jax.random.split(key)
        x0 = 0.5 * jax.random.normal(keys[0], (512, 1))
        return loss.loss(keys[1], of(params), path, x0, prediction="x0", weight=edm.weight(), times=times)[0].mean()

    def descend(params, i):
        return params - 0.2 * jax.grad(value)(params, jax.random.fold_in(key, i)), None

    params, _ = jax.lax.scan(descend, jnp.array([0.8, -0.5]), jnp.arange(200))
    np.testing.assert_allclose(params, 0, atol=0.05)
    keys = sample_keys(jax.random.key(1), jnp.arange(2))
    grid = karras_grid(18, 80.0, 0.002)
    x1 = initial_noise(keys, (4096,), path, grid[0])
    run = jax.jit(partial(sample, prediction="x0", sampler=heun()), static_argnums=(1, 2))
    x0 = run(keys, of(params), path, x1, grid)
    assert float(x0.std()) == pytest.approx(0.5, rel=0.08) and abs(float(x0.mean())) < 0.03


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: edm.preconditioned(None, edm.Exploding(), 0.0), "data_std=0.0, the standard deviation of the data"),
        (lambda: edm.weight(-1.0), "data_std=-1.0"),
        (lambda: edm.log_normal_times(std=0.0), "std=0.0 must be positive"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
