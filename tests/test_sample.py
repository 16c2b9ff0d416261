"""Samplers against an exactly known case: data N(mean, scale^2) has a closed-form denoiser and a closed-form flow."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.guide import clip
from diffusion.predict import Estimate, WithVariance, convert, target
from diffusion.process import VP, Cosine, Geometric, Linear, coefficients, expand, linear_betas
from diffusion.sample import ancestral, ddim, heun, initial_noise, invert, sample, sample_keys
from diffusion.grids import respaced_grid, shifted_grid, uniform_grid
from diffusion.posterior import between
from tests.chains import FILES, close, load
from tests.test_process import PATHS

MEAN, SCALE = 0.7, 0.3
SAMPLERS = {"ddim": ddim(), "ancestral": ddim(eta=1.0), "half": ddim(eta=0.5), "heun": heun()}


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


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "flow"])
def test_exact_gaussian_denoiser_recovers_mean_and_variance(key, name, sampler, prediction):
    path = PATHS[name]
    # From pure noise the eps prediction knows nothing of x0: start just below where alpha is zero.
    times = uniform_grid(300, start=0.999 if prediction == "eps" else 1.0)
    x1 = initial_noise(sample_keys(key, jnp.arange(4)), (4096, 1))
    draw = jax.jit(partial(sample, prediction=prediction, step=SAMPLERS[sampler]), static_argnums=(1, 2))
    x0 = draw(key, gaussian_denoiser(path, prediction), path, x1, times)
    # 16,384 draws: standard errors 0.0023 and 0.0017. First-order samplers add their step error.
    assert abs(x0.mean() - MEAN) < 0.02
    assert abs(x0.std() - SCALE) < 0.02


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("heun", 2)])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_order_of_convergence(key, name, sampler, order):
    path = PATHS[name]
    with jax.enable_x64(True):
        x1 = jnp.linspace(-2, 2, 9).reshape(1, 9, 1)
        draw = partial(sample, prediction="flow", step=SAMPLERS[sampler])
        errors = [
            jnp.abs(draw(key, gaussian_denoiser(path, "flow"), path, x1, uniform_grid(n)) - exact_flow(path, x1)).max()
            for n in (40, 80, 160)
        ]
    orders = np.log2([errors[0] / errors[1], errors[1] / errors[2]])
    np.testing.assert_allclose(orders, order, atol=0.15)


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


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_noisy_ddim_steps_match_diffusers(monkeypatch, eta):
    torch = pytest.importorskip("torch", reason="diffusers needs torch: pip install 'patch-diffusion[torch]'")
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        1000, 1e-4, 0.02, "linear", clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(20)
    xt, eps, z = np.random.default_rng(0).standard_normal((3, 2, 4, 4, 1)).astype(np.float32)
    monkeypatch.setattr("diffusion.sample._normal", lambda key, like: jnp.asarray(z))
    for index in (999, 499, 49):
        theirs = scheduler.step(torch.tensor(eps), index, torch.tensor(xt), eta=eta, variance_noise=torch.tensor(z))
        t, s = jnp.float32((index + 1) / 1000), jnp.float32((index - 49) / 1000)
        path = VP(linear_betas(1000))
        coef = coefficients(path, t)
        now = Estimate((xt - coef.sigma * eps) / coef.alpha, jnp.asarray(eps))
        ours = ddim(eta)(None, lambda *_, now=now: now, path, jnp.asarray(xt), t, s)
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
        xs = ancestral(variance)(jax.random.clone(keys), lambda *_: now, path, x, t, s)
        np.testing.assert_allclose(xs.std(), np.sqrt(var), rtol=0.02)
        np.testing.assert_allclose(xs.mean(), step.on_x0 * 0.2 + step.on_xt * 0.7, atol=0.01)
        assert np.abs(np.corrcoef(xs)[0, 1]) < 0.03
        last = ancestral(variance)(jax.random.clone(keys), lambda *_: now, path, x, t, jnp.float32(0.0))
        np.testing.assert_allclose(last, 0.2, atol=1e-6)  # no noise in the last step


def test_ancestral_sampling_is_ddim_with_eta_1(key):
    path, x1, grid = VP(linear_betas(100)), jnp.full((2, 8), 0.5), respaced_grid("10,5", 100)
    denoise = gaussian_denoiser(path, "eps")
    draw = partial(sample, key, denoise, path, x1, grid, prediction="eps")
    np.testing.assert_allclose(draw(step=ancestral()), draw(step=ddim(eta=1.0)), atol=2e-5)


@pytest.mark.parametrize("step", [ddim(), ddim(0.5), heun(), ancestral("fixed_large")])
def test_steps_that_do_not_ask_for_a_learned_variance_ignore_it(key, step):
    path, x1 = VP(linear_betas(100)), jnp.full((2, 8), 0.5)
    plain = gaussian_denoiser(path, "v")
    learned = lambda xt, t, y: WithVariance(plain(xt, t), xt)  # noqa: E731
    draw = partial(sample, key, path=path, x1=x1, times=uniform_grid(5), prediction="v", step=step)
    np.testing.assert_array_equal(draw(learned), draw(plain))


def test_ancestral_sampling_with_a_learned_variance(key):
    """A network that always answers with the large end is the fixed large variance."""
    path, x1, grid = VP(linear_betas(100)), jnp.full((2, 8), 0.5), respaced_grid("7", 100)
    plain = gaussian_denoiser(path, "v")
    learned = lambda xt, t, y: WithVariance(plain(xt, t), jnp.ones_like(xt))  # noqa: E731
    draw = partial(sample, key, path=path, x1=x1, times=grid, prediction="v")
    wide = draw(plain, step=ancestral("fixed_large"))
    np.testing.assert_allclose(draw(learned, step=ancestral("learned_range")), wide, atol=1e-5)
    assert jnp.abs(draw(learned, step=ancestral("learned_sigmoid")) - wide).max() > 1e-2
    with pytest.raises(ValueError, match="needs a network that returns WithVariance"):
        draw(plain, step=ancestral("learned_range"))


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


@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "flow"])
def test_inversion_and_sampling_return_the_data(key, prediction):
    """For a linear denoiser both follow one flow; the error is that of the steps, and falls with their square."""
    path, x = Cosine(), MEAN + SCALE * jax.random.normal(key, (2, 9, 1))
    denoise, errors = gaussian_denoiser(path, prediction), []
    with jax.enable_x64(True):
        x = jnp.asarray(x, jnp.float64)
        for n in (50, 100):
            rising = np.linspace(0.02, 0.98, n + 1)
            x1 = invert(denoise, path, x, rising, prediction=prediction, step=heun())
            back = sample(key, denoise, path, x1, rising[::-1], prediction=prediction, step=heun())
            errors.append(float(jnp.abs(back - x).max()))
            assert abs(float(x1.std()) - 1) < 0.5
    assert errors[1] < 1e-3 and errors[1] < errors[0] / 3


def test_inversion_finds_the_noise_of_the_exact_flow():
    path, x1 = Cosine(), jnp.linspace(-2, 2, 9).reshape(1, 9, 1)
    times = np.linspace(0.001, 1, 401)
    x0 = exact_flow(path, x1)
    np.testing.assert_allclose(invert(gaussian_denoiser(path, "v"), path, x0, times, prediction="v"), x1, atol=0.02)


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


def test_samples_do_not_depend_on_their_neighbours(key):
    path, times = Linear(), uniform_grid(10)
    denoise = gaussian_denoiser(path, "x0")

    def draw(index):
        keys = sample_keys(key, jnp.asarray(index))
        x1 = initial_noise(keys, (8, 8, 1))
        return np.asarray(sample(keys, denoise, path, x1, times, prediction="x0", step=ddim(eta=1.0)))

    together = draw(range(5))
    np.testing.assert_allclose(np.concatenate([draw([0, 1]), draw([2]), draw([3, 4])]), together, atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_start_and_steps_draw_different_noise(key):
    """A step that returns its own noise: it must not be that of the start, nor that of the step before."""
    keys = sample_keys(key, jnp.arange(2))
    x1 = initial_noise(keys, (200,))
    own = lambda key, *_: jax.vmap(lambda k: jax.random.normal(k, (200,)))(key)  # noqa: E731
    draw = partial(sample, denoise=None, path=Linear(), x1=x1, prediction="x0", step=own)
    noises = [x1, draw(keys, times=uniform_grid(1)), draw(keys, times=uniform_grid(2))]
    assert np.abs(np.corrcoef(np.concatenate(noises)) - np.eye(6)).max() < 0.5


@pytest.mark.parametrize("step", SAMPLERS.values(), ids=SAMPLERS)
def test_pictures_in_bfloat16_are_drawn_at_times_in_float32(key, step):
    """At 400 steps neighbouring times are one bfloat16: no step would be left between them."""
    path, seen = PATHS["linear"], []

    def denoise(xt, t, y=None):
        seen.append((xt.dtype, t.dtype))
        return gaussian_denoiser(path, "x0")(xt, t).astype(xt.dtype)

    x1 = jax.random.normal(key, (2000, 1), jnp.bfloat16)
    x0 = sample(key, denoise, path, x1, uniform_grid(400), prediction="x0", step=step)
    assert x0.dtype == jnp.bfloat16
    assert {(x.name, t.name) for x, t in seen} == {("bfloat16", "float32")}
    assert float(x0.mean(dtype=jnp.float32)) == pytest.approx(MEAN, abs=0.03)
    assert float(x0.std(dtype=jnp.float32)) == pytest.approx(SCALE, rel=0.1)


def test_pictures_of_whole_numbers_are_refused(key):
    x, path = jnp.zeros((2, 1), jnp.uint8), PATHS["linear"]
    with pytest.raises(ValueError, match="pictures of uint8 cannot carry noise"):
        sample(key, gaussian_denoiser(path, "x0"), path, x, uniform_grid(2), prediction="x0")
    with pytest.raises(ValueError, match="pictures of uint8 cannot carry noise"):
        invert(gaussian_denoiser(path, "x0"), path, x, uniform_grid(2)[::-1], prediction="x0")


def test_legacy_keys_are_refused():
    with pytest.raises(ValueError, match="typed key"):
        sample(jax.random.PRNGKey(0), None, Linear(), jnp.zeros((2, 2)), uniform_grid(2), prediction="x0")


def test_kept_frames_run_from_noise_to_picture(key):
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
        draw = jax.jit(
            lambda x1: sample(
                key, gaussian_denoiser(Linear(), "x0"), Linear(), x1, uniform_grid(steps), prediction="x0", keep=keep
            )
        )
        return draw.lower(jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.float32)).compile().memory_analysis()

    few, many = temporary(10), temporary(1000)
    # The grid of times itself is the only thing that grows: a few numbers a step.
    picture = 4 * 64 * 64 * 3 * 4
    assert many.temp_size_in_bytes - few.temp_size_in_bytes < picture / 4
    assert many.output_size_in_bytes == few.output_size_in_bytes


def test_overstep_moves_the_picture_past_the_clock():
    path = Geometric(0.99, 500)
    x = jnp.full((1, 3), 0.4)
    noise_hat = jnp.full((1, 3), -0.2)
    step = ddim(overstep=1.5)
    alpha, _ = path(jnp.float32(0.2))
    x0_hat = (x - (1 - alpha) * noise_hat) / alpha
    xs = step(None, lambda xt, t: Estimate(x0_hat, noise_hat), path, x, jnp.float32(0.2), jnp.float32(0.198))
    np.testing.assert_allclose(xs, (x - noise_hat * (1 - 0.99**1.5)) / 0.99**1.5, rtol=1e-5)


def test_shifted_grid_keeps_its_ends_and_dwells_in_noise():
    grid = shifted_grid(10, 3.0)
    assert grid[0] == 1 and grid[-1] == 0 and (np.diff(grid) < 0).all()
    assert grid[5] == pytest.approx(0.75)


def test_the_last_step_can_leap_to_the_data():
    np.testing.assert_allclose(uniform_grid(5, last=0.2), [1, 0.8, 0.6, 0.4, 0.2, 0])
    bent = shifted_grid(5, 3.0, 0.9, last=0.2)
    assert len(bent) == 6 and bent[-2] == pytest.approx(0.2) and bent[-1] == 0
    assert bent[0] == shifted_grid(5, 3.0, 0.9)[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: uniform_grid(0),
        lambda: uniform_grid(5, start=0.0),
        lambda: shifted_grid(5, 0.0),
        lambda: uniform_grid(5, last=0.0),
        lambda: uniform_grid(5, start=0.5, last=0.5),
        lambda: uniform_grid(1, last=0.5),
        lambda: ddim(eta=2.0),
        lambda: ddim(overstep=0.0),
        lambda: ddim(eta=1.0, overstep=1.5),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(ValueError, match="="):
        make()


@pytest.mark.parametrize(
    "times", [np.array([1.0]), np.array([0.5, 0.5]), jnp.array([0.0, 1.0]), [0.0, 1.0], [1.0, np.nan]]
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
