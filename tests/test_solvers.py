"""Samplers of `solvers`: against diffusers' numbers, their order on an exact mixture, moments of those with noise."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from diffusion import sample as sampling
from diffusion import solvers
from diffusion.grids import karras_grid, logsnr_grid, rho_grid, uniform_grid
from diffusion.methods import edm as karras
from diffusion.predict import Estimate, predictor
from diffusion.process import VP, Cosine, Linear, expand, linear_betas
from diffusion.sample import ddim, dpmpp_2m, heun, initial_noise, invert, sample, sample_keys
from diffusion.solvers import adams_bashforth, dpmpp_2m_sde, edm, euler, unipc
from tests.chains import close
from tests.sampler_references import FILE, STEPS, network, raw, scaled
from tests.test_sample import MEAN, SCALE, exact_flow, gaussian_denoiser

SAMPLERS = {
    "euler": euler(),
    "adams_bashforth": adams_bashforth(3),
    "unipc": unipc(3),
    "dpmpp_2m_sde": dpmpp_2m_sde(),
    "edm": edm(),
    "edm with churn": edm(0.2, noise=1.0),
}
NOISELESS = ("euler", "adams_bashforth", "unipc", "edm")
MEANS, STDS, SHARES = np.array([-1.2, 0.3, 1.1]), np.array([0.4, 0.25, 0.3]), np.array([0.3, 0.3, 0.4])


@pytest.fixture(scope="module")
def stored():
    with np.load(FILE) as file:
        return {name: file[name] for name in file.files}


def mixture_denoiser(xp, x, alpha, sigma):
    """E[x0 | xt] of the mixture of Gaussians MEANS, STDS, SHARES in every pixel, in JAX or NumPy."""
    means, stds, shares = (a.reshape((1,) * x.ndim + (3,)) for a in (MEANS, STDS, SHARES))
    total = (alpha * stds) ** 2 + sigma**2
    residual = x[..., None] - alpha * means
    log_p = np.log(shares) - residual**2 / total / 2 - xp.log(total) / 2
    p = xp.exp(log_p - log_p.max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True)
    return (p * (means + alpha * stds**2 / total * residual)).sum(-1)


def mixture(path):
    def denoise(xt, t, y=None):
        return mixture_denoiser(jnp, xt, *(expand(a, xt)[..., None] for a in path(t)))

    return denoise


def exact_mixture_flow(name, x, start, end):
    """Where the flow takes x from time `start` to `end`, by SciPy."""
    coefficients = {
        "linear": lambda t: (1 - t, t, -1.0, 1.0),
        "cosine": lambda t: (
            np.cos(np.pi * t / 2),
            np.sin(np.pi * t / 2),
            -np.pi / 2 * np.sin(np.pi * t / 2),
            np.pi / 2 * np.cos(np.pi * t / 2),
        ),
    }[name]

    def velocity(t, x):
        alpha, sigma, dalpha, dsigma = coefficients(t)
        x0 = mixture_denoiser(np, x, alpha, sigma)
        return dalpha * x0 + dsigma * (x - alpha * x0) / sigma

    return solve_ivp(velocity, (start, end), x, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]


def short_start(steps):
    """Equal steps of which the first is cut into ones of doubling length: the error of a low order there is small."""
    grid = np.linspace(0.95, 0.05, steps + 1)
    cuts = np.geomspace(1 / steps, 1, int(np.log2(steps)) + 1)
    return np.concatenate([grid[:1], grid[0] - cuts * (grid[0] - grid[1]), grid[2:]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "path", "grid", "order"),
    [
        (euler, "linear", lambda n: np.linspace(0.95, 0.05, n + 1), 1),
        (lambda: adams_bashforth(2), "cosine", lambda n: np.linspace(0.95, 0.05, n + 1), 2),
        (lambda: adams_bashforth(3), "linear", short_start, 3),
        (lambda: adams_bashforth(4), "cosine", short_start, 4),
        (dpmpp_2m, "linear", lambda n: logsnr_grid(Linear(), n + 1, 6.0, -6.0)[:-1], 2),
        (lambda: unipc(1), "linear", lambda n: logsnr_grid(Linear(), n + 1, 6.0, -6.0)[:-1], 2),
        (lambda: unipc(2), "linear", lambda n: logsnr_grid(Linear(), n + 1, 6.0, -6.0)[:-1], 3),
        (lambda: unipc(3), "cosine", lambda n: logsnr_grid(Cosine(), n + 1, 6.0, -6.0)[:-1], 4),
        (heun, "linear", lambda n: np.linspace(0.95, 0.05, n + 1), 2),
        (edm, "linear", lambda n: rho_grid(Linear(), n + 1, 20.0, 0.05)[:-1], 2),
    ],
    ids=["euler", "ab2", "ab3", "ab4", "dpmpp_2m", "unipc1", "unipc2", "unipc3", "heun", "edm"],
)
def test_order_of_convergence_on_an_exact_mixture(key, make, path, grid, order):
    """The slope of log error over log steps; UniPC of order p, with its correction, converges with p + 1."""
    found, x = {"linear": Linear(), "cosine": Cosine()}[path], np.linspace(-1.8, 1.8, 7)
    steps, errors = (32, 64, 128), []
    with jax.enable_x64(True):
        run = jax.jit(partial(sample, key, mixture(found), found, prediction="x0", sampler=make()))
        for n in steps:
            times = grid(n)
            exact = exact_mixture_flow(path, x, times[0], times[-1])
            errors.append(np.abs(run(jnp.asarray(x).reshape(1, 7, 1), times)[0, :, 0] - exact).max())
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order - 0.25 < slope < order + 0.7, errors


def given_noise(monkeypatch, z):
    """Makes z[i] the noise of step i of a sampler; keys are the numbers of steps, as in `walk`."""
    for module in (sampling, solvers):
        monkeypatch.setattr(module, "normal", lambda key, like: jnp.asarray(z)[key])


def walk(sampler, predict, path, x, times):
    """Every state after a step [T, ...], with the number of a step as its key."""

    def advance(carry, now):
        (x, memory), (i, t, s) = carry, now
        x, memory = sampler.step(i, predict, path, x, t, s, memory)
        return (x, memory), x

    times = jnp.asarray(times, float)
    grid = jnp.arange(len(times) - 1), times[:-1], times[1:]
    return np.asarray(jax.lax.scan(advance, (x, sampler.init(x)), grid)[1])


CHAIN = {
    "ddim": ddim(),
    "ddim_half": ddim(0.5),
    "dpmpp_2m": dpmpp_2m(),
    "dpmpp_2m_sde": dpmpp_2m_sde(),
    "unipc_1": unipc(1),
    "unipc_2": unipc(2),
    "unipc_3": unipc(3),
}


@pytest.mark.parametrize("name", CHAIN)
def test_every_step_on_a_chain_matches_diffusers(stored, monkeypatch, name):
    path = VP(linear_betas(1000))
    given_noise(monkeypatch, stored["z"])
    times = uniform_grid(STEPS)
    if name == "unipc_3":
        times = uniform_grid(STEPS, last=0.001)[: STEPS + 1]
        times[:-1] = uniform_grid(STEPS)[:-1]
        times[-1] = 0.001  # "sigma_min", the first of the chain
    predict = predictor(lambda xt, t, y: network(jnp, xt), path, "eps")
    ours = walk(CHAIN[name], predict, path, jnp.asarray(stored["x1"]), times)
    for mine, theirs in zip(ours, stored[name], strict=True):
        close(mine, theirs, 1e-4 if name == "unipc_3" else 5e-5)


def test_heun_in_sigma_matches_diffusers(stored):
    path, sigmas = karras.Exploding(), stored["heun_sigmas"]
    denoise = lambda xt, t, y: scaled(jnp, xt, expand(t, xt))  # noqa: E731
    x1 = stored["x1"] * np.float32(sigmas[0])
    close(sample(jax.random.key(0), denoise, path, x1, sigmas, prediction="eps", sampler=edm()), stored["heun"], 2e-5)


@pytest.mark.parametrize(("name", "make"), [("edm_euler", ddim), ("edm_dpmpp_2m", dpmpp_2m), ("edm_euler", euler)])
def test_a_preconditioned_network_on_edms_grid_matches_diffusers(stored, name, make):
    """Scaling of input and output, c_noise, the grid and the steps."""
    path, grid = karras.Exploding(), karras_grid(STEPS, 80.0, 0.002)
    np.testing.assert_allclose(grid, stored["edm_sigmas"], rtol=1e-5)
    denoise = karras.preconditioned(lambda xt, c, y: raw(jnp, xt, expand(c, xt)), path)
    predict = predictor(denoise, path, "x0")
    for mine, theirs in zip(
        walk(make(), predict, path, jnp.asarray(stored["x1"]) * grid[0].astype(np.float32), grid),
        stored[name],
        strict=True,
    ):
        close(mine, theirs, 5e-5)


def test_a_step_with_churn_matches_diffusers(stored, monkeypatch):
    """A last step, which is one of Euler, after noise is added: 2.4 over 8 steps, S_noise 1.007."""
    path = karras.Exploding()
    given_noise(monkeypatch, stored["churned_z"][None])
    denoise = lambda xt, t, y: 0.5 * xt + 0.1 * expand(t, xt)  # noqa: E731
    sampler = edm(2.4 / STEPS, noise=1.007, span=(0.0, 80.0))
    ours = walk(sampler, predictor(denoise, path, "x0"), path, jnp.zeros_like(stored["x1"]), [0.002, 0.0])
    close(ours[0], stored["churned"], 1e-5)


def algorithm_2(denoise, x, sigmas, z, churn, low, high, noise):
    """Karras et al. 2022, algorithm 2, in NumPy."""
    n = len(sigmas) - 1
    for i in range(n):
        gamma = min(churn / n, np.sqrt(2) - 1) if low <= sigmas[i] <= high else 0
        raised = sigmas[i] * (1 + gamma)
        x = x + np.sqrt(raised**2 - sigmas[i] ** 2) * noise * z[i]
        d = (x - denoise(x, raised)) / raised
        after = x + (sigmas[i + 1] - raised) * d
        if sigmas[i + 1]:
            x = x + (sigmas[i + 1] - raised) * (d + (after - denoise(after, sigmas[i + 1])) / sigmas[i + 1]) / 2
        else:
            x = after
    return x


@pytest.mark.parametrize("name", ["exploding", "linear", "cosine"])
def test_edms_sampler_is_algorithm_2_on_every_path(monkeypatch, name):
    """On another path the same numbers at xt / alpha, from a grid of the same sigma / alpha."""
    path, end = {"exploding": (karras.Exploding(), 99.0), "linear": (Linear(), 1.0), "cosine": (Cosine(), 1.0)}[name]
    span = (0.0, end)
    sigmas, z = karras_grid(6, 20.0, 0.05), np.random.default_rng(0).standard_normal((6, 2, 5))
    options = {"low": 0.3, "high": 10.0, "noise": 1.01}
    given_noise(monkeypatch, z)
    x, denoise = 20 * np.linspace(-2, 2, 10).reshape(2, 5), lambda x, sigma: mixture_denoiser(np, x, 1.0, sigma)
    expected = algorithm_2(denoise, x, sigmas, z, 3.0, **options)
    with jax.enable_x64(True):
        times = rho_grid(path, 6, 20.0, 0.05, span=span)
        x = path(jnp.asarray(times[0]))[0] * x
        sampler = edm(3.0 / 6, **options, span=span)
        found = walk(sampler, predictor(mixture(path), path, "x0"), path, x, times)
        np.testing.assert_allclose(found[-1], expected, atol=1e-5)  # times are those of float32
        plain = walk(edm(), predictor(mixture(path), path, "x0"), path, x, times)
    assert np.abs(plain[-1] - expected).max() > 0.01


@pytest.mark.slow
def test_noise_beyond_the_end_of_a_path_is_what_its_last_time_has(monkeypatch):
    path, x = Cosine(), jnp.ones((1, 3))
    given_noise(monkeypatch, np.ones((1, 1, 3), np.float32))
    seen = []
    predict = lambda xt, t: seen.append((xt, t)) or Estimate(xt, xt)  # noqa: E731
    edm(0.4, span=(0.0, 0.92)).step(0, predict, path, x, jnp.float32(0.9), jnp.float32(0.0), ())
    xt, t = seen[0]
    (alpha, sigma), (alpha_t, sigma_t) = path(jnp.float32(0.92)), path(jnp.float32(0.9))
    assert t == pytest.approx(0.92, abs=1e-6)
    np.testing.assert_allclose(xt, alpha / alpha_t + np.sqrt(sigma**2 - (alpha / alpha_t * sigma_t) ** 2), rtol=1e-4)
    seen.clear()
    edm(0.4).step(0, predict, Linear(), x, jnp.float32(1.0), jnp.float32(0.5), ())
    assert seen[0][1] == 1 and (seen[0][0] == x).all()  # alpha = 0: nothing can be added


def response(sampler, path, times):
    """How samples of an affine sampler on a Gaussian depend on their start, and their mean and variance: exactly."""
    n = len(times) - 1
    alpha, sigma = path(jnp.asarray(times[0]))
    start = jnp.zeros((n + 2, 1)).at[-1].set(1.0) * jnp.sqrt((alpha * SCALE) ** 2 + sigma**2) + alpha * MEAN
    z = np.zeros((n, n + 2, 1))
    z[np.arange(n), np.arange(n) + 1] = 1
    with pytest.MonkeyPatch.context() as patched:
        given_noise(patched, z)
        last = walk(sampler, predictor(gaussian_denoiser(path, "x0"), path, "x0"), path, start, times)[-1]
    return float(last[-1, 0] - last[0, 0]), float(last[0, 0]), float(np.square(last[1:, 0] - last[0, 0]).sum())


@pytest.mark.slow
@pytest.mark.parametrize(("make", "order"), [(dpmpp_2m_sde, 2), (lambda: dpmpp_2m_sde(0.3), 2), (lambda: ddim(1.0), 1)])
def test_weak_order_of_samplers_with_noise(make, order):
    """Of the variance of samples, without sampling error."""
    path, errors = Linear(), []
    with jax.enable_x64(True):
        for n in (64, 128):
            times = logsnr_grid(path, n + 1, 5.0, -6.0)[:-1]
            alpha, sigma = (float(a) for a in path(jnp.asarray(times[-1])))
            errors.append(abs(response(make(), path, times)[2] - (alpha * SCALE) ** 2 - sigma**2))
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), order, atol=0.2)


def test_the_reverse_sde_forgets_its_start_as_the_forward_process_does():
    """At eta = 1 the covariance of both ends is that of the chain, alpha_1 / alpha_0 var(x_0), for any steps."""
    path = Linear()
    with jax.enable_x64(True):
        times = logsnr_grid(path, 7, 5.0, -4.0)[:-1]
        (a1, s1), (a0, s0) = ((float(a) for a in path(jnp.asarray(times[i]))) for i in (0, -1))
        found = response(dpmpp_2m_sde(), path, times)[0]
    exact = a1 / a0 * ((a0 * SCALE) ** 2 + s0**2) / np.sqrt((a1 * SCALE) ** 2 + s1**2)
    np.testing.assert_allclose(found, exact, rtol=1e-9)


@pytest.mark.slow
def test_edm_with_churn_converges_to_the_distribution_of_the_data():
    """For the same S_churn in more steps, with second order."""
    path, errors = Linear(), []
    with jax.enable_x64(True):
        for n in (40, 80):
            _, mean, found = response(edm(4.0 / n), path, rho_grid(path, n))
            errors.append(abs(np.sqrt(found) - SCALE))
            assert mean == pytest.approx(MEAN, abs=2e-3)
        wider = response(edm(4.0 / n, noise=1.05), path, rho_grid(path, n))[2]
    assert errors[1] < 2e-3 and errors[1] < errors[0] / 3 and wider > found + 1e-4


@pytest.mark.slow
def test_little_noise_is_dpmpp_2m(key):
    path, x1, times = Cosine(), jnp.linspace(-2, 2, 9).reshape(1, 9, 1), uniform_grid(6, 0.95)
    run = partial(sample, key, gaussian_denoiser(path, "v"), path, x1, times, prediction="v")
    np.testing.assert_allclose(run(sampler=dpmpp_2m_sde(1e-8)), run(sampler=dpmpp_2m()), atol=1e-3)


def test_adams_bashforth_has_the_published_coefficients():
    """On equal steps; on others, exact for polynomials of one degree less than its order."""
    for order, expected in (
        (2, [3 / 2, -1 / 2]),
        (3, [23 / 12, -16 / 12, 5 / 12]),
        (4, np.array([55, -59, 37, -9]) / 24),
    ):
        points = [(jnp.float32(-k), jnp.asarray(True)) for k in range(order)]
        weights = solvers._integral(points, lambda n: [1 / (i + 1) for i in range(n)])
        np.testing.assert_allclose(weights, expected, rtol=1e-5)
    times = np.array([1.0, 0.93, 0.7, 0.45, 0.4, 0.1])

    def of(t):  # a path along which x0 = 0 and eps = 1 move the image with velocity 1 + 3 t^2
        return jnp.ones_like(t), t + t**3

    with jax.enable_x64(True):
        predict = lambda xt, t: Estimate(jnp.zeros_like(xt), jnp.ones_like(xt))  # noqa: E731
        found = walk(adams_bashforth(3), predict, of, jnp.zeros((1, 1)), times)[:, 0, 0]
    exact = times + times**3
    np.testing.assert_allclose(np.diff(found)[1:], np.diff(exact[1:])[1:], rtol=1e-12)
    assert abs(found[0] - (exact[1] - exact[0])) > 1e-3  # the first step is Euler's


@pytest.mark.slow
def test_means_under_the_exponential_are_its_integrals():
    """Against numerical quadrature, for short, long and negative steps, where one formula goes over into the other."""
    nodes, w = np.polynomial.legendre.leggauss(40)
    tau, w = (nodes + 1) / 2, w / 2
    with jax.enable_x64(True):
        for h in (-3.0, -0.3, 1e-6, 0.1, 0.4999, 0.5001, 2.0, 8.0):
            p = w * np.exp(h * (tau - 1))
            expected = [(p * tau**i).sum() / p.sum() for i in range(4)]
            np.testing.assert_allclose(solvers._exponential(jnp.asarray(h), 4), expected, rtol=1e-10)


@pytest.mark.slow
def test_methods_that_are_one_another(key):
    """Euler is DDIM on the linear path and Adams-Bashforth of order 1 on all; UniP of order 2 is DPM-Solver++(2M)."""
    x1, times = jnp.linspace(-2, 2, 9).reshape(1, 9, 1), uniform_grid(7)
    for path in (Linear(), Cosine()):
        run = partial(sample, key, gaussian_denoiser(path, "v"), path, x1, times, prediction="v")
        np.testing.assert_allclose(run(sampler=adams_bashforth(1)), run(sampler=euler()), atol=1e-5)
        alike = np.allclose(run(sampler=euler()), run(sampler=ddim()), atol=1e-5)
        assert alike == (path == Linear())
    # Two steps, and before the second a memory in which D is what the first one took it for: nothing is corrected.
    predict, (t, s, last) = predictor(gaussian_denoiser(Linear(), "x0"), Linear(), "x0"), jnp.array([0.9, 0.6, 0.2])
    found = []
    for sampler in (unipc(2), dpmpp_2m()):
        x, memory = sampler.step(None, predict, Linear(), x1, t, s, sampler.init(x1))
        if len(memory) == 4:
            before, logs, _, scales = memory
            memory = before, logs, (before[0] + predict(x, s).x0) / 2, scales
        found.append(sampler.step(None, predict, Linear(), x, s, last, memory)[0])
    np.testing.assert_allclose(*found, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_exact_gaussian_denoiser_recovers_mean_and_variance(key, sampler):
    path = Linear()
    x1 = initial_noise(sample_keys(key, jnp.arange(4)), (4096, 1))
    run = jax.jit(partial(sample, prediction="v", sampler=SAMPLERS[sampler]), static_argnums=(1, 2))
    x0 = run(key, gaussian_denoiser(path, "v"), path, x1, uniform_grid(100))
    assert abs(x0.mean() - MEAN) < 0.02 and abs(x0.std() - SCALE) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_grid_per_example_gives_what_each_example_gives_alone(key, sampler):
    """Also where there are as many channels as examples; where a grid begins without signal or ends before the data."""
    path, keys = Cosine(), sample_keys(key, jnp.arange(3))
    grids = np.stack([uniform_grid(5, 1.0), uniform_grid(5, 0.98), np.linspace(0.8, 0.1, 6)], 1)
    x1 = initial_noise(keys, (2, 2, 3))
    run = jax.jit(partial(sample, prediction="v", sampler=SAMPLERS[sampler]), static_argnums=(1, 2))
    together = run(keys, gaussian_denoiser(path, "v"), path, x1, grids)
    for i in range(3):
        alone = run(keys[i : i + 1], gaussian_denoiser(path, "v"), path, x1[i : i + 1], grids[:, i])
        np.testing.assert_allclose(together[i], alone[0], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_in_bfloat16_are_sampled_at_times_in_float32(key, sampler):
    path, x1 = Linear(), jax.random.normal(key, (500, 1), jnp.bfloat16)
    denoise = lambda xt, t, y: gaussian_denoiser(path, "x0")(xt, t).astype(xt.dtype)  # noqa: E731
    x0 = sample(key, denoise, path, x1, uniform_grid(200), prediction="x0", sampler=SAMPLERS[sampler])
    assert x0.dtype == jnp.bfloat16
    assert float(x0.mean(dtype=jnp.float32)) == pytest.approx(MEAN, abs=0.05)
    assert float(x0.std(dtype=jnp.float32)) == pytest.approx(SCALE, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", NOISELESS)
def test_inversion_finds_the_noise_of_the_exact_flow(sampler):
    path, x1 = Cosine(), jnp.linspace(-2, 2, 9).reshape(1, 9, 1)
    times = np.linspace(0.001, 1, 401)
    denoise = gaussian_denoiser(path, "v")
    found = invert(denoise, path, exact_flow(path, x1), times, prediction="v", sampler=SAMPLERS[sampler])
    np.testing.assert_allclose(found, x1, atol=0.02)


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - set(NOISELESS)))
def test_an_inversion_with_noise_is_refused(sampler):
    denoise, x0 = gaussian_denoiser(Cosine(), "v"), jnp.zeros((1, 2, 1))
    with pytest.raises(ValueError, match="adds noise, which cannot be inverted"):
        invert(denoise, Cosine(), x0, np.linspace(0.01, 1, 3), prediction="v", sampler=SAMPLERS[sampler])


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ("unipc", "edm with churn"))) for name in SAMPLERS],
)
def test_gradients_are_finite_and_those_of_finite_differences(key, sampler):
    """With respect to inner times, from where alpha is 0 to where sigma is 0."""
    path, keys = Cosine(), sample_keys(key, jnp.arange(2))
    with jax.enable_x64(True):
        x1, times = jnp.asarray(initial_noise(keys, (2, 1)), jnp.float64), jnp.asarray(uniform_grid(4))

        @jax.jit
        def total(inner):
            grid = jnp.concatenate([times[:1], inner, times[-1:]])
            run = partial(sample, keys, gaussian_denoiser(path, "v"), path, x1, grid, prediction="v")
            return jnp.square(run(sampler=SAMPLERS[sampler])).sum()

        inner, h = times[1:-1], 1e-5
        slopes = jax.jit(jax.jacfwd(total))(inner)
        assert np.isfinite(slopes).all()
        if "churn" not in sampler:  # which searches the time to go back to, and has no derivative there
            step = h * jnp.eye(3)
            expected = [(total(inner + e) - total(inner - e)) / (2 * h) for e in step]
            np.testing.assert_allclose(slopes, expected, rtol=1e-4)


@pytest.mark.slow
def test_places_that_are_not_known_yet_give_no_nan():
    """On a grid that halves the time the place before is -2, which the one before that, unknown, must not be."""

    def weights(t):
        points = solvers._points(t, -t / 2, (2 * t, jnp.inf + 0 * t))
        return jnp.stack(solvers._integral(points, lambda n: [1 / (i + 1) for i in range(n)]))

    slope = jax.jacrev(lambda t: weights(t)[:2].sum() + weights(t)[2])(jnp.float32(0.24))
    assert np.isfinite(slope)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adams_bashforth(5), r"order=5 must be a whole number in 1\.\.4"),
        (lambda: unipc(0), r"order=0 must be a whole number in 1\.\.3"),
        (lambda: dpmpp_2m_sde(0.0), r"eta=0.0 must be positive: without noise this is dpmpp_2m\(\)"),
        (lambda: edm(-1.0), "churn=-1.0 must not be negative"),
        (lambda: edm(low=2.0, high=1.0), "low=2.0 must lie between 0 and high=1.0"),
        (lambda: edm(noise=0.0), "noise=0.0 must be positive"),
        (
            lambda: edm(0.2).step(None, None, karras.Exploding(), jnp.ones((1, 1)), jnp.float32(5), jnp.float32(2), ()),
            r"does not end at t=1, where sigma=1 and alpha=1.*: pass edm\(churn, span=\(0, last\)\)",
        ),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
