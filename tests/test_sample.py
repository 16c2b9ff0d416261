"""Samplers against an exactly known case: data N(mean, scale^2) has a closed-form denoiser and a closed-form flow."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.grids import logsnr_grid, respaced_grid, shifted_grid, uniform_grid
from diffusion.guide import classifier_free, clip, interval
from diffusion.posterior import between
from diffusion.predict import Estimate, WithVariance, convert, target
from diffusion.process import VP, Cosine, Geometric, Linear, coefficients, expand, linear_betas
from diffusion.sample import (
    Sampler,
    ancestral,
    ddim,
    dpmpp_2m,
    heun,
    initial_noise,
    invert,
    normal,
    one_step,
    sample,
    sample_keys,
)
from tests.chains import FILES, close, load
from tests.test_process import PATHS

MEAN, SCALE = 0.7, 0.3
SAMPLERS = {
    "ddim": ddim(),
    "ddim half": ddim(eta=0.5),
    "ddim one": ddim(eta=1.0),
    "ancestral": ancestral(),
    "heun": heun(),
    "dpmpp_2m": dpmpp_2m(),
}


def exploding(t):
    """A variance-exploding path whose time is sigma."""
    return jnp.ones_like(t), t


def one(sampler, key, now, path, xt, t, s):
    """xs of one step of a sampler without memory, from a given estimate."""
    return sampler.step(key, lambda *_: now, path, xt, t, s, sampler.init(xt))[0]


def gaussian_denoiser(path, prediction):
    """E[x0 | xt] for x0 ~ N(MEAN, SCALE^2): linear in xt."""

    def denoise(xt, t, y=None):
        coef = coefficients(path, t)
        alpha, sigma = expand(coef.alpha, xt), expand(coef.sigma, xt)
        residual = xt - alpha * MEAN
        total = jnp.square(alpha * SCALE) + jnp.square(sigma)
        x0 = MEAN + alpha * SCALE**2 / total * residual
        return target(prediction, coef, x0, sigma / total * residual)

    return denoise


def exact_flow(path, x1):
    """Where the flow takes x1: every quantile of the start goes to the same quantile of the data."""
    alpha, sigma = (float(a) for a in path(jnp.float32(1)))
    return MEAN + SCALE * (x1 - alpha * MEAN) / np.sqrt((alpha * SCALE) ** 2 + sigma**2)


@pytest.mark.parametrize(
    ("name", "sampler", "prediction"),
    [("linear", sampler, "v") for sampler in SAMPLERS]
    + [(name, "ancestral", "v") for name in PATHS if name != "linear"]
    + [("vp cosine", "ddim", prediction) for prediction in ("x0", "eps", "flow")]
    + [
        pytest.param(name, sampler, "v", marks=pytest.mark.slow)
        for name in PATHS
        for sampler in SAMPLERS
        if name != "linear" and sampler != "ancestral"
    ],
)
def test_exact_gaussian_denoiser_recovers_mean_and_variance(key, name, sampler, prediction):
    path = PATHS[name]
    # At alpha = 0 the eps prediction does not determine x0: start just below.
    times = uniform_grid(300, start=0.999 if prediction == "eps" else 1.0)
    x1 = initial_noise(sample_keys(key, jnp.arange(4)), (4096, 1), path, times[0])
    run = jax.jit(partial(sample, prediction=prediction, sampler=SAMPLERS[sampler]), static_argnums=(1, 2))
    x0 = run(key, gaussian_denoiser(path, prediction), path, x1, times)
    # 16,384 samples: standard errors 0.0023 and 0.0017. First-order samplers add their step error.
    assert abs(x0.mean() - MEAN) < 0.02
    assert abs(x0.std() - SCALE) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_variance_exploding_path_recovers_mean_and_variance(key, sampler):
    """Time is sigma, up to 80; the start has that standard deviation, the grid is even in log SNR."""
    grid = logsnr_grid(exploding, 100, 2 * np.log(1 / 0.02), 2 * np.log(1 / 80), (0.0, 80.0))
    keys = sample_keys(key, jnp.arange(4))
    x1 = initial_noise(keys, (4096, 1), exploding, grid[0])
    np.testing.assert_allclose(x1, 80 * initial_noise(jax.random.clone(keys), (4096, 1)), rtol=1e-5)
    run = jax.jit(partial(sample, prediction="x0", sampler=SAMPLERS[sampler]), static_argnums=(1, 2))
    x0 = run(jax.random.clone(key), gaussian_denoiser(exploding, "x0"), exploding, x1, grid)
    assert abs(x0.mean() - MEAN) < 0.02
    assert abs(x0.std() - SCALE) < 0.02


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("heun", 2)])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_order_of_convergence(key, name, sampler, order):
    path = PATHS[name]
    with jax.enable_x64(True):
        x1 = jnp.linspace(-2, 2, 9).reshape(1, 9, 1)
        run = partial(sample, prediction="flow", sampler=SAMPLERS[sampler])
        errors = [
            jnp.abs(run(key, gaussian_denoiser(path, "flow"), path, x1, uniform_grid(n)) - exact_flow(path, x1)).max()
            for n in (40, 80, 160)
        ]
    orders = np.log2([errors[0] / errors[1], errors[1] / errors[2]])
    np.testing.assert_allclose(orders, order, atol=0.15)


@pytest.mark.slow
def test_dpmpp_2m_is_of_second_order_in_steps_of_log_snr(key):
    """Between two times inside the path, where log SNR is finite; the exact flow maps quantile to quantile."""
    path, errors = Cosine(), []
    with jax.enable_x64(True):
        x = jnp.linspace(-2, 2, 9).reshape(1, 9, 1)
        for n in (20, 40, 80):
            times = logsnr_grid(path, n + 1, 6.0, -6.0)[:-1]
            (a1, s1), (a0, s0) = (path(t) for t in jnp.asarray(times[[0, -1]]))
            exact = a0 * MEAN + jnp.sqrt(((a0 * SCALE) ** 2 + s0**2) / ((a1 * SCALE) ** 2 + s1**2)) * (x - a1 * MEAN)
            ours = sample(key, gaussian_denoiser(path, "v"), path, x, times, prediction="v", sampler=dpmpp_2m())
            errors.append(float(jnp.abs(ours - exact).max()))
    np.testing.assert_allclose(np.log2([errors[0] / errors[1], errors[1] / errors[2]]), 2, atol=0.25)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("prediction", "theirs"), [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
def test_dpmpp_2m_matches_diffusers(key, prediction, theirs):
    torch = pytest.importorskip("torch", reason="diffusers needs torch: pip install 'patch-diffusion[torch]'")
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        1000, 1e-4, 0.02, "linear", prediction_type=theirs, timestep_spacing="trailing", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(20)
    x1 = np.random.default_rng(0).standard_normal((2, 4, 4, 1)).astype(np.float32)
    expected = torch.tensor(x1)
    for i in scheduler.timesteps:
        expected = scheduler.step(torch.tanh(expected) * 0.9, i, expected).prev_sample
    run = partial(sample, key, lambda xt, t, y: jnp.tanh(xt) * 0.9, VP(linear_betas(1000)), prediction=prediction)
    close(run(x1, uniform_grid(20), sampler=dpmpp_2m()), expected.numpy(), 5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_grid_per_example_gives_what_each_example_gives_alone(key, sampler):
    """Also where there are as many channels as examples, and where one grid ends before the data."""
    path, keys = Cosine(), sample_keys(key, jnp.arange(3))
    grids = np.stack([uniform_grid(4, 0.9), shifted_grid(4, 3.0, 0.98), np.linspace(0.8, 0.1, 5)], 1)
    x1 = initial_noise(keys, (2, 2, 3))
    run = jax.jit(partial(sample, prediction="v", sampler=SAMPLERS[sampler]), static_argnums=(1, 2))
    together = run(keys, gaussian_denoiser(path, "v"), path, x1, grids)
    for i in range(3):
        alone = run(keys[i : i + 1], gaussian_denoiser(path, "v"), path, x1[i : i + 1], grids[:, i])
        np.testing.assert_allclose(together[i], alone[0], atol=1e-5)


@pytest.mark.slow
def test_eta_may_be_traced_and_one_per_example(key):
    path, times = Cosine(), uniform_grid(5, 0.95)
    keys = sample_keys(key, jnp.arange(3))
    x1, etas = initial_noise(keys, (2, 2, 3)), [0.0, 0.5, 1.0]

    @jax.jit
    def run(eta):
        return sample(keys, gaussian_denoiser(path, "v"), path, x1, times, prediction="v", sampler=ddim(eta))

    each = run(jnp.array(etas))
    for i, eta in enumerate(etas):
        known = sample(keys, gaussian_denoiser(path, "v"), path, x1, times, prediction="v", sampler=ddim(eta))
        np.testing.assert_allclose(each[i], known[i], atol=1e-5)
        np.testing.assert_allclose(run(jnp.float32(eta)), known, atol=1e-5)


@pytest.mark.slow
def test_conditions_are_pytrees(key):
    """Text with a mask, guided towards and away from a null of the same structure, on an exploding path's times."""
    keys = sample_keys(key, jnp.arange(3))
    y = {"text": jax.random.normal(key, (3, 4, 5)), "mask": jnp.arange(4)[None] < jnp.array([[1], [2], [4]])}
    null = {"text": 0.0, "mask": jnp.array([True, False, False, False])}

    def denoise(xt, t, y):
        shift = (y["text"] * y["mask"][..., None]).sum((1, 2))
        return jnp.tanh(xt) + expand(shift, xt)

    guided = classifier_free(denoise, null, interval(2.0, 0.5, 20.0))
    grid, x1 = np.array([40.0, 10.0, 1.0, 0.1, 0.0]), 40 * initial_noise(keys, (2, 2, 1))
    x0 = sample(keys, guided, exploding, x1, grid, y, prediction="x0")
    # The last step begins at 0.1, outside the interval: x0 is the conditional prediction there.
    by_hand = sample(keys, guided, exploding, x1, grid[:-1], y, prediction="x0")
    np.testing.assert_allclose(x0, denoise(by_hand, 0.1, y), atol=1e-4)
    alone = sample(keys[1:2], guided, exploding, x1[1:2], grid, jax.tree.map(lambda a: a[1:2], y), prediction="x0")
    np.testing.assert_allclose(x0[1], alone[0], atol=1e-4)
    assert np.abs(x0 - sample(keys, denoise, exploding, x1, grid, y, prediction="x0")).max() > 0.01


def test_a_sampler_carries_its_memory_from_step_to_step(key):
    """A sampler that counts: what `init` makes, each step receives from the one before."""
    counting = Sampler(
        lambda xt: jnp.zeros((), xt.dtype), lambda key, predict, path, xt, t, s, n: (xt + 10.0**-n, n + 1)
    )
    x0 = sample(key, None, Linear(), jnp.zeros((2, 1)), uniform_grid(3), prediction="x0", sampler=counting)
    np.testing.assert_allclose(x0, 1.11, rtol=1e-6)


def test_ddim_matches_diffusers():
    torch = pytest.importorskip("torch", reason="diffusers needs torch: pip install 'patch-diffusion[torch]'")
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        1000, 1e-4, 0.02, "linear", clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(20)
    x1 = np.random.default_rng(0).standard_normal((2, 4, 4, 1)).astype(np.float32)
    theirs = torch.tensor(x1)
    for i in scheduler.timesteps:
        theirs = scheduler.step(torch.tanh(theirs) * 0.9, i, theirs, eta=0.0).prev_sample
    path = VP(linear_betas(1000))
    ours = sample(jax.random.key(0), lambda xt, t, y: jnp.tanh(xt) * 0.9, path, x1, uniform_grid(20), prediction="eps")
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5 * np.abs(theirs.numpy()).max())


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_noisy_ddim_steps_match_diffusers(monkeypatch, eta):
    torch = pytest.importorskip("torch", reason="diffusers needs torch: pip install 'patch-diffusion[torch]'")
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        1000, 1e-4, 0.02, "linear", clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(20)
    xt, eps, z = np.random.default_rng(0).standard_normal((3, 2, 4, 4, 1)).astype(np.float32)
    monkeypatch.setattr("diffusion.sample.normal", lambda key, like: jnp.asarray(z))
    for index in (999, 499, 49):
        theirs = scheduler.step(torch.tensor(eps), index, torch.tensor(xt), eta=eta, variance_noise=torch.tensor(z))
        t, s = jnp.float32((index + 1) / 1000), jnp.float32((index - 49) / 1000)
        path = VP(linear_betas(1000))
        coef = coefficients(path, t)
        now = Estimate((xt - coef.sigma * eps) / coef.alpha, jnp.asarray(eps))
        ours = one(ddim(eta), None, now, path, jnp.asarray(xt), t, s)
        close(ours, theirs.prev_sample.numpy(), 2e-5)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_published_ddim_runs_with_clipping(file):
    chain = load(file)
    denoise = clip(convert(chain.denoise, chain.path, chain.prediction, "x0"), chain.path, "x0")
    x0 = sample(jax.random.key(0), denoise, chain.path, jnp.asarray(chain.values["xT"]), chain.grid, prediction="x0")
    close(x0, chain.values["ddim"])
    np.testing.assert_array_equal(np.round(chain.grid[-2::-1] * 1000) - 1, chain.values["use_timesteps"])


def test_ancestral_steps_have_the_variances_of_the_chain(key):
    """Many equal pixels: their spread after one step is the deviation asked for, their mean the posterior's."""
    path, t, s = Cosine(), jnp.float32(0.6), jnp.float32(0.4)
    step, x = between(path, t, s), jnp.full((2, 20000), 0.7)
    now = Estimate(jnp.full_like(x, 0.2), x, jnp.full_like(x, 0.25))
    expected = {
        "fixed_small": step.small,
        "fixed_large": step.large,
        "learned_sigmoid": step.small**0.25 * step.large**0.75,
        "learned_range": step.small**0.375 * step.large**0.625,
    }
    keys = sample_keys(key, jnp.arange(2))
    for variance, var in expected.items():
        xs = one(ancestral(variance), jax.random.clone(keys), now, path, x, t, s)
        np.testing.assert_allclose(xs.std(), np.sqrt(var), rtol=0.02)
        np.testing.assert_allclose(xs.mean(), step.on_x0 * 0.2 + step.on_xt * 0.7, atol=0.01)
        assert np.abs(np.corrcoef(xs)[0, 1]) < 0.03
        last = one(ancestral(variance), jax.random.clone(keys), now, path, x, t, jnp.float32(0.0))
        np.testing.assert_allclose(last, 0.2, atol=1e-6)  # no noise in the last step


@pytest.mark.slow
def test_ancestral_sampling_is_ddim_with_eta_1(key):
    path, x1, grid = VP(linear_betas(100)), jnp.full((2, 8), 0.5), respaced_grid("10,5", 100)
    denoise = gaussian_denoiser(path, "eps")
    run = partial(sample, key, denoise, path, x1, grid, prediction="eps")
    np.testing.assert_allclose(run(sampler=ancestral()), run(sampler=ddim(eta=1.0)), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("step", [ddim(), ddim(0.5), heun(), ancestral("fixed_large")])
def test_steps_that_do_not_ask_for_a_learned_variance_ignore_it(key, step):
    path, x1 = VP(linear_betas(100)), jnp.full((2, 8), 0.5)
    plain = gaussian_denoiser(path, "v")
    learned = lambda xt, t, y: WithVariance(plain(xt, t), xt)  # noqa: E731
    run = partial(sample, key, path=path, x1=x1, times=uniform_grid(5), prediction="v", sampler=step)
    np.testing.assert_array_equal(run(learned), run(plain))


@pytest.mark.slow
def test_ancestral_sampling_with_a_learned_variance(key):
    """A network that always answers with the large end is the fixed large variance."""
    path, x1, grid = VP(linear_betas(100)), jnp.full((2, 8), 0.5), respaced_grid("7", 100)
    plain = gaussian_denoiser(path, "v")
    learned = lambda xt, t, y: WithVariance(plain(xt, t), jnp.ones_like(xt))  # noqa: E731
    run = partial(sample, key, path=path, x1=x1, times=grid, prediction="v")
    wide = run(plain, sampler=ancestral("fixed_large"))
    np.testing.assert_allclose(run(learned, sampler=ancestral("learned_range")), wide, atol=1e-5)
    assert jnp.abs(run(learned, sampler=ancestral("learned_sigmoid")) - wide).max() > 1e-2
    with pytest.raises(ValueError, match="needs a network that returns WithVariance"):
        run(plain, sampler=ancestral("learned_range"))


def test_inversion_matches_diffusers():
    torch = pytest.importorskip("torch", reason="diffusers needs torch: pip install 'patch-diffusion[torch]'")
    from diffusers import DDIMInverseScheduler

    scheduler = DDIMInverseScheduler(1000, 1e-4, 0.02, "linear", clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    x0 = np.random.default_rng(0).standard_normal((2, 4, 4, 1)).astype(np.float32)
    theirs = torch.tensor(x0)
    for i in scheduler.timesteps:
        theirs = scheduler.step(torch.tanh(theirs) * 0.9, i, theirs).prev_sample
    path, rising = VP(linear_betas(1000)), uniform_grid(20)[::-1]
    ours = invert(lambda xt, t, y: jnp.tanh(xt) * 0.9, path, x0, rising, prediction="eps")
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5 * np.abs(theirs.numpy()).max())


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "flow"])
def test_inversion_and_sampling_return_the_data(key, prediction):
    """For a linear denoiser both follow one flow; the error is that of the steps, and falls with their square."""
    path, x = Cosine(), MEAN + SCALE * jax.random.normal(key, (2, 9, 1))
    denoise, errors = gaussian_denoiser(path, prediction), []
    with jax.enable_x64(True):
        x = jnp.asarray(x, jnp.float64)
        for n in (50, 100):
            rising = np.linspace(0.02, 0.98, n + 1)
            x1 = invert(denoise, path, x, rising, prediction=prediction, sampler=heun())
            back = sample(key, denoise, path, x1, rising[::-1], prediction=prediction, sampler=heun())
            errors.append(float(jnp.abs(back - x).max()))
            assert abs(float(x1.std()) - 1) < 0.5
    assert errors[1] < 1e-3 and errors[1] < errors[0] / 3


def test_inversion_finds_the_noise_of_the_exact_flow():
    path, x1 = Cosine(), jnp.linspace(-2, 2, 9).reshape(1, 9, 1)
    times = np.linspace(0.001, 1, 401)
    x0 = exact_flow(path, x1)
    for sampler in (ddim(), dpmpp_2m()):
        found = invert(gaussian_denoiser(path, "v"), path, x0, times, prediction="v", sampler=sampler)
        np.testing.assert_allclose(found, x1, atol=0.02)


def test_samples_do_not_depend_on_their_neighbours(key):
    path, times = Linear(), uniform_grid(10)
    denoise = gaussian_denoiser(path, "x0")

    def run(index):
        keys = sample_keys(key, jnp.asarray(index))
        x1 = initial_noise(keys, (8, 8, 1))
        return np.asarray(sample(keys, denoise, path, x1, times, prediction="x0", sampler=ddim(eta=1.0)))

    together = run(range(5))
    np.testing.assert_allclose(np.concatenate([run([0, 1]), run([2]), run([3, 4])]), together, atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.1


@pytest.mark.slow
def test_the_start_and_the_steps_use_different_noise(key):
    """A step that returns its own noise: it must not be that of the start, nor that of the step before."""
    keys = sample_keys(key, jnp.arange(2))
    x1 = initial_noise(keys, (200,))
    own = lambda key, predict, path, xt, t, s: normal(key, xt)  # noqa: E731
    run = partial(sample, denoise=None, path=Linear(), x1=x1, prediction="x0", sampler=one_step(own))
    noises = [x1, run(keys, times=uniform_grid(1)), run(keys, times=uniform_grid(2))]
    assert np.abs(np.corrcoef(np.concatenate(noises)) - np.eye(6)).max() < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("step", SAMPLERS.values(), ids=SAMPLERS)
def test_images_in_bfloat16_are_sampled_at_times_in_float32(key, step):
    """At 400 steps neighbouring times are one bfloat16: no step would be left between them."""
    path, seen = PATHS["linear"], []

    def denoise(xt, t, y=None):
        seen.append((xt.dtype, t.dtype))
        return gaussian_denoiser(path, "x0")(xt, t).astype(xt.dtype)

    x1 = jax.random.normal(key, (2000, 1), jnp.bfloat16)
    x0 = sample(key, denoise, path, x1, uniform_grid(400), prediction="x0", sampler=step)
    assert x0.dtype == jnp.bfloat16
    assert {(x.name, t.name) for x, t in seen} == {("bfloat16", "float32")}
    assert float(x0.mean(dtype=jnp.float32)) == pytest.approx(MEAN, abs=0.03)
    assert float(x0.std(dtype=jnp.float32)) == pytest.approx(SCALE, rel=0.1)


def test_images_of_whole_numbers_are_refused(key):
    x, path = jnp.zeros((2, 1), jnp.uint8), PATHS["linear"]
    with pytest.raises(ValueError, match="images must be floating-point, not uint8"):
        sample(key, gaussian_denoiser(path, "x0"), path, x, uniform_grid(2), prediction="x0")
    with pytest.raises(ValueError, match="images must be floating-point, not uint8"):
        invert(gaussian_denoiser(path, "x0"), path, x, uniform_grid(2)[::-1], prediction="x0")


def test_legacy_keys_are_refused():
    with pytest.raises(ValueError, match="typed key"):
        sample(jax.random.PRNGKey(0), None, Linear(), jnp.zeros((2, 2)), uniform_grid(2), prediction="x0")


def test_kept_frames_run_from_noise_to_image(key):
    path, times = Linear(), uniform_grid(7)
    x1 = jax.random.normal(key, (2, 5, 1))
    denoise = gaussian_denoiser(path, "flow")
    x0, frames = sample(key, denoise, path, x1, times, prediction="flow", keep=4)
    np.testing.assert_array_equal(frames[0], x1)
    np.testing.assert_array_equal(frames[-1], x0)
    # Frame 1 of 4 over 7 steps is the state after 2 of them.
    early = sample(key, denoise, path, x1, times[:3], prediction="flow")
    np.testing.assert_allclose(frames[1], early, atol=1e-6)


@pytest.mark.parametrize("keep", [None, 5])
def test_memory_does_not_grow_with_the_number_of_steps(key, keep):
    def temporary(steps):
        run = jax.jit(
            lambda x1: sample(
                key, gaussian_denoiser(Linear(), "x0"), Linear(), x1, uniform_grid(steps), prediction="x0", keep=keep
            )
        )
        return run.lower(jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.float32)).compile().memory_analysis()

    few, many = temporary(10), temporary(1000)
    # The grid of times itself is the only thing that grows: a few numbers a step.
    image = 4 * 64 * 64 * 3 * 4
    assert many.temp_size_in_bytes - few.temp_size_in_bytes < image / 4
    assert many.output_size_in_bytes == few.output_size_in_bytes


def test_overstep_moves_the_image_past_the_clock():
    path = Geometric(0.99, 500)
    x = jnp.full((1, 3), 0.4)
    noise_hat = jnp.full((1, 3), -0.2)
    alpha, _ = path(jnp.float32(0.2))
    x0_hat = (x - (1 - alpha) * noise_hat) / alpha
    t, s = jnp.float32(0.2), jnp.float32(0.198)
    xs = one(ddim(overstep=1.5), None, Estimate(x0_hat, noise_hat), path, x, t, s)
    np.testing.assert_allclose(xs, (x - noise_hat * (1 - 0.99**1.5)) / 0.99**1.5, rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ddim(eta=2.0),
        lambda: ddim(overstep=0.0),
        lambda: ddim(eta=1.0, overstep=1.5),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(ValueError, match="="):
        make()


@pytest.mark.parametrize(
    "times",
    [[1.0], np.array([0.5, 0.5]), jnp.array([0.0, 1.0]), [1.0, np.nan], [[1.0, 1.0], [0.5, 0.0]], [[1.0], [1.0]]],
)
def test_times_must_fall(key, times):
    with pytest.raises(ValueError, match="falling"):
        sample(key, lambda xt, t, y: xt, Linear(), jnp.zeros((1, 2)), times, prediction="x0")


@pytest.mark.parametrize("times", [[0.0, 0.0], [1.0, 0.0], [0.5]])
def test_times_of_an_inversion_must_rise(times):
    with pytest.raises(ValueError, match="rising"):
        invert(lambda xt, t, y: xt, Linear(), jnp.zeros((1, 2)), times, prediction="x0")


def test_unknown_variances_are_named_before_sampling():
    with pytest.raises(ValueError, match="variance='large' is not one of"):
        ancestral("large")


def test_too_many_frames_are_refused(key):
    with pytest.raises(ValueError, match="keep=5"):
        sample(key, lambda xt, t, y: xt, Linear(), jnp.zeros((1, 2)), uniform_grid(3), prediction="x0", keep=5)


def test_initial_noise_has_the_scale_of_each_examples_time(key):
    """Also where there are as many channels as examples."""
    keys, times = sample_keys(key, jnp.arange(3)), jnp.array([1.0, 10.0, 100.0])
    x1 = initial_noise(keys, (40, 40, 3), exploding, times)
    np.testing.assert_allclose(np.asarray(x1).std((1, 2, 3)), times, rtol=0.05)
    assert initial_noise(keys, (4, 4, 1), exploding, times).shape == (3, 4, 4, 1)
    for half in ({"path": exploding}, {"t": 80.0}):
        with pytest.raises(ValueError, match="belong together"):
            initial_noise(keys, (4, 4, 1), **half)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [
        lambda eta: ddim(eta),
        *(pytest.param(make, marks=pytest.mark.slow) for make in (lambda eta: ancestral(), lambda eta: dpmpp_2m())),
    ],
)
def test_gradients_with_respect_to_eta_and_times_are_those_of_finite_differences(key, sampler):
    path, keys = Cosine(), sample_keys(key, jnp.arange(2))
    with jax.enable_x64(True):
        x1, times = jnp.asarray(initial_noise(keys, (2, 2, 1)), jnp.float64), jnp.asarray(uniform_grid(4, 0.9))

        def of(eta, grid):
            denoise = gaussian_denoiser(path, "v")
            return jnp.square(sample(keys, denoise, path, x1, grid, prediction="v", sampler=sampler(eta))).sum()

        @jax.jit
        def total(eta, inner):
            return of(eta, jnp.concatenate([times[:1], inner, times[-1:]]))

        eta, inner, h = jnp.float64(0.5), times[1:-1], 1e-5
        for_eta, for_times = jax.jit(jax.grad(total, (0, 1)))(eta, inner)
        ends = jax.jit(jax.grad(lambda times: of(eta, times)))(times)
        assert np.isfinite(ends).all() and np.abs(ends).min() > 0
        np.testing.assert_allclose(ends[1:-1], for_times, rtol=1e-10)
        np.testing.assert_allclose(for_eta, (total(eta + h, inner) - total(eta - h, inner)) / (2 * h), rtol=1e-5)
        for i in range(3):
            step = h * jnp.eye(3)[i]
            slope = (total(eta, inner + step) - total(eta, inner - step)) / (2 * h)
            np.testing.assert_allclose(for_times[i], slope, rtol=1e-5)


@pytest.mark.parametrize("sampler", [ancestral(), ddim(1.0), ddim(jnp.float32(0.5))])
def test_an_inversion_with_noise_is_refused(sampler):
    with pytest.raises(ValueError, match=r"cannot be inverted or distilled: use ddim\(\), heun\(\) or dpmpp_2m"):
        invert(
            gaussian_denoiser(Cosine(), "v"),
            Cosine(),
            jnp.zeros((1, 2, 1)),
            np.linspace(0.01, 1, 5),
            prediction="v",
            sampler=sampler,
        )


def test_a_step_takes_its_arguments_by_name(key):
    xt, t, s = jnp.ones((1, 2, 1)), jnp.float32(0.5), jnp.float32(0.25)
    predict = lambda xt, t: Estimate(xt, xt, None)  # noqa: E731
    for sampler in (ddim(), heun(), dpmpp_2m()):
        xs, _ = sampler.step(key=key[None], predict=predict, path=Linear(), xt=xt, t=t, s=s, memory=sampler.init(xt))
        assert xs.shape == xt.shape
