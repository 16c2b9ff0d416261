import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import process

PATHS = {
    "linear": process.Linear(),
    "cosine": process.Cosine(),
    "vp": process.VP(process.linear_betas(1000)),
    "vp cosine": process.VP(process.cosine_betas(50)),
    "geometric": process.Geometric(0.99, 500),
    "linear, scale 2": process.Linear(2.0),
}
VARIANCE_PRESERVING = ("cosine", "vp", "vp cosine")


@pytest.mark.parametrize("name", PATHS)
def test_path_runs_from_data_to_noise(name):
    alpha, sigma = PATHS[name](jnp.linspace(0, 1, 101))
    assert alpha[0] == 1 and sigma[0] == 0
    assert (jnp.diff(alpha) < 0).all() and (jnp.diff(sigma) > 0).all()
    assert alpha[-1] < 0.01 and sigma[-1] > 0.99


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_pure_noise_is_reached_exactly(name):
    alpha, sigma = PATHS[name](jnp.ones(1))
    assert alpha[0] == 0 and sigma[0] == 1


def test_the_noise_of_a_linear_path_has_its_scale_and_scale_1_computes_the_same_bits():
    t = jnp.linspace(0, 1, 7)
    alpha, sigma = process.Linear(2.0)(t)
    np.testing.assert_array_equal(alpha, 1 - t)
    np.testing.assert_array_equal(sigma, 2 * t)
    assert str(jax.make_jaxpr(process.Linear(1.0))(t)) == str(jax.make_jaxpr(lambda t: (1 - t, t))(t))
    assert process.Linear() == process.Linear(1.0)
    for scale in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"scale={scale} must be positive"):
            process.Linear(scale)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_variance_is_preserved_between_grid_times_too(name):
    alpha, sigma = PATHS[name](jnp.linspace(0, 1, 777))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-6)


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_match_central_differences(name):
    t, h = jnp.array([0.1234, 0.507, 0.8191]), 1e-3
    coef = process.coefficients(PATHS[name], t)
    (a1, s1), (a0, s0) = PATHS[name](t + h), PATHS[name](t - h)
    np.testing.assert_allclose(coef.dalpha, (a1 - a0) / (2 * h), rtol=0.03, atol=2e-3)
    np.testing.assert_allclose(coef.dsigma, (s1 - s0) / (2 * h), rtol=0.03, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
def test_derivatives_are_finite_at_both_ends(name):
    assert np.isfinite(np.stack(process.coefficients(PATHS[name], jnp.array([0.0, 1.0])))).all()


@pytest.mark.parametrize("betas", [process.linear_betas(1000), process.linear_betas(50), process.cosine_betas(1000)])
def test_vp_holds_the_cumulative_products_at_its_grid_times(betas):
    abar = np.concatenate([[1], np.cumprod(1 - betas)])
    alpha, sigma = process.VP(betas)(jnp.arange(len(betas) + 1) / len(betas))
    np.testing.assert_allclose(alpha, np.sqrt(abar), rtol=2e-5, atol=2e-7)
    np.testing.assert_allclose(sigma, np.sqrt(1 - abar), rtol=2e-5)


@pytest.mark.parametrize("kind", ["linear", "squaredcos_cap_v2"])
def test_betas_match_diffusers(kind):
    pytest.importorskip("torch", reason="diffusers needs torch: pip install 'patch-diffusion[torch]'")
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule=kind).betas.numpy()
    ours = process.linear_betas(1000) if kind == "linear" else process.cosine_betas(1000)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.slow
def test_variance_between_neighbours_of_a_long_chain_survives_float32():
    betas = process.linear_betas(1000)
    alpha, sigma = process.VP(betas)(jnp.arange(1, 1001) / 1000)
    ratio = (alpha[1:] * sigma[:-1] / (sigma[1:] * alpha[:-1])) ** 2
    np.testing.assert_allclose(sigma[1:] ** 2 * (1 - ratio), betas[1:], rtol=3e-4)


def test_grid_times_are_exact_however_they_are_rounded():
    """i / 1000 from three roundings is one step, and a time between two steps is not pulled to either."""
    path, t = process.VP(process.linear_betas(1000)), jnp.arange(1, 1000) / 1000
    alpha, _ = path(t)
    for other in (jnp.nextafter(t, 2.0), jnp.nextafter(t, -1.0)):
        np.testing.assert_array_equal(path(other)[0], alpha)
    between = path(t + 1e-5)[0]
    assert (between < alpha).all()


@pytest.mark.parametrize(("name", "last"), [("linear", 0.02), ("linear0.025", 0.025), ("linear0.5", 0.5)])
@pytest.mark.parametrize("steps", [500, 1000, 4000])
def test_linear_schedules_end_at_their_beta_stretched_to_the_steps(name, last, steps):
    betas = process.named_betas(name, steps)
    assert betas.shape == (steps,) and betas.dtype == np.float64
    np.testing.assert_allclose([betas[0], betas[-1]], [1e-4 * 1000 / steps, last * 1000 / steps], rtol=1e-12)


def test_the_cosine_schedule_has_a_name():
    np.testing.assert_array_equal(process.named_betas("cosine", 50), process.cosine_betas(50))


@pytest.mark.parametrize(
    "name", ["", "sqrt", "linear-1", "linearly", "linear1.5", "linear0.00001", "linear0.02x", "linearnan"]
)
def test_unknown_schedules_are_named(name):
    with pytest.raises(ValueError, match=f"betas='{name}' are not one of linear, linear<beta_max>"):
        process.named_betas(name)


def test_geometric_is_the_limit_of_repeated_noising():
    rate, n = 0.99, 37
    x = 1.0
    for _ in range(n):
        x = rate * x
    alpha, sigma = process.Geometric(rate, 500)(jnp.array([n / 500]))
    np.testing.assert_allclose(alpha, x, rtol=1e-6)
    np.testing.assert_allclose(sigma, 1 - x, rtol=1e-6)


def test_logsnr_falls_and_matches_its_definition():
    t = jnp.linspace(0.01, 0.99, 9)
    np.testing.assert_allclose(process.logsnr(process.Linear(), t), 2 * np.log((1 - t) / t), rtol=1e-5, atol=1e-5)


def test_noise_mixes_each_example_at_its_own_time(key):
    a, b = jax.random.split(key)
    x0, eps = jax.random.normal(a, (3, 4, 5, 2)), jax.random.normal(b, (3, 4, 5, 2))
    xt = process.noise(process.Linear(), x0, jnp.array([0.0, 0.25, 1.0]), eps)
    np.testing.assert_array_equal(xt[0], x0[0])
    np.testing.assert_allclose(xt[1], 0.75 * x0[1] + 0.25 * eps[1], rtol=1e-6)
    np.testing.assert_array_equal(xt[2], eps[2])


def test_images_of_integers_and_times_that_are_not_one_per_example_are_refused():
    x, t = jnp.zeros((2, 3)), jnp.full(2, 0.5)
    with pytest.raises(ValueError, match="must be floating-point, not uint8: convert them first, x / 127.5 - 1"):
        process.noise(process.Linear(), x.astype(jnp.uint8), t, x)
    with pytest.raises(ValueError, match=r"array \[2\], one time per example, not 0.5"):
        process.noise(process.Linear(), x, 0.5, x)


@pytest.mark.slow
def test_a_path_of_a_scalar_time_is_that_of_a_vector():
    for path in PATHS.values():
        alone, vector = process.coefficients(path, jnp.float32(0.3)), process.coefficients(path, jnp.full(2, 0.3))
        for a, b in zip(alone, vector, strict=True):
            assert a.shape == ()
            np.testing.assert_allclose(a, b[0], rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: process.Geometric(1.0, 500),
        lambda: process.Geometric(0.9, 0),
        lambda: process.VP(np.array([0.1, -0.1])),
        lambda: process.VP(np.zeros((0,))),
        lambda: process.linear_betas(0),
        lambda: process.named_betas("linear0.5", 100),
    ],
)
def test_impossible_processes_are_refused(make):
    with pytest.raises(ValueError, match="must"):
        make()
