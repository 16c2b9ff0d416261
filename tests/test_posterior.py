import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.guide import clip
from diffusion.posterior import between, posterior, reverse
from diffusion.predict import Estimate, convert, estimate
from diffusion.process import VP, Linear, coefficients, linear_betas, noise
from diffusion.vlb import kl, least_variance
from tests.chains import FILES, close, load
from tests.test_process import PATHS


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def chain(request):
    return load(request.param)


def test_files_are_there():
    assert len(FILES) == 4


@pytest.mark.parametrize(("x64", "tolerance"), [(False, 1e-5), (True, 1e-12)])
def test_published_tables_of_respaced_chains(chain, x64, tolerance):
    with jax.enable_x64(x64):
        t, s = (jnp.asarray(times, float) for times in (chain.grid[-2::-1], chain.grid[:0:-1]))
        step, (alpha, _) = jax.jit(lambda t, s: (between(chain.path, t, s), chain.path(t)))(t, s)
        close(alpha**2, chain.values["alphas_cumprod"], tolerance)
        close(step.large, chain.values["betas"], tolerance)
        close(step.small, chain.values["posterior_variance"], tolerance)
        close(step.on_x0, chain.values["posterior_mean_coef1"], tolerance)
        close(step.on_xt, chain.values["posterior_mean_coef2"], tolerance)


def test_published_reverse_steps(chain):
    v, (t, s) = chain.values, chain.now
    xt = noise(chain.path, v["x0"], t, v["eps"])
    close(xt, v["xt"])
    denoise = clip(convert(chain.denoise, chain.path, chain.prediction, "x0"), chain.path, "x0")
    model = estimate("x0", coefficients(chain.path, t), xt, denoise(xt, t))
    step = reverse(chain.variance, chain.path, model, xt, t, s, least_variance(chain.path, chain.grid))
    close(model.x0, v["p_x0"])
    close(step.mean, v["p_mean"])
    close(jnp.broadcast_to(step.log_var, xt.shape), v["p_log_variance"])


@pytest.mark.parametrize("name", PATHS)
def test_posterior_undoes_noising_between_any_times(name):
    """q(xs | x0) must come out of q(xt | x0) and the posterior, and q(xt | x0) out of q(xs | x0) and one more step."""
    path, t, s = PATHS[name], jnp.array([0.9, 0.6, 0.51, 0.02]), jnp.array([0.2, 0.59, 0.5, 0.0])
    (alpha_t, sigma_t), (alpha_s, sigma_s), step = path(t), path(s), between(path, t, s)
    np.testing.assert_allclose(step.on_x0 + step.on_xt * alpha_t, alpha_s, rtol=1e-5)
    np.testing.assert_allclose(step.small + (step.on_xt * sigma_t) ** 2, sigma_s**2, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(step.large + (alpha_t / alpha_s * sigma_s) ** 2, sigma_t**2, rtol=1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_steps_match_diffusers(variance):
    torch = pytest.importorskip("torch", reason="diffusers needs torch: pip install 'patch-diffusion[torch]'")
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(1000, 1e-4, 0.02, "linear", variance_type=variance, clip_sample=False)
    kept = [999, 700, 350, 100, 99, 0]
    theirs.set_timesteps(timesteps=kept)
    path, rng = VP(linear_betas(1000)), np.random.default_rng(0)
    for index, following in zip(kept, [*kept[1:], -1], strict=True):
        xt, eps, z = rng.standard_normal((3, 2, 3, 4, 4)).astype(np.float32)
        v = rng.uniform(-1, 1, xt.shape).astype(np.float32)
        output = np.concatenate([eps, v], 1) if variance == "learned_range" else eps
        drawn = [
            theirs.step(torch.tensor(output), index, torch.tensor(xt), generator=torch.manual_seed(seed)).prev_sample
            for seed in (0, 1)
        ]
        z = [torch.randn(xt.shape, generator=torch.manual_seed(seed)).numpy() for seed in (0, 1)]
        t, s = jnp.full(2, (index + 1) / 1000), jnp.full(2, (following + 1) / 1000)
        model = estimate("eps", coefficients(path, t), xt, jnp.asarray(eps))._replace(v=v)
        step = reverse(variance, path, model, xt, t, s)
        for sample, noises in zip(drawn, z, strict=True):
            noises = noises if following >= 0 else 0
            close(step.mean + jnp.exp(step.log_var / 2) * noises, sample.numpy(), 2e-5)


def test_the_two_learned_conventions_run_in_opposite_directions():
    path, t, s = Linear(), jnp.array([0.5]), jnp.array([0.4])
    small, large, *_ = between(path, t, s)
    x = jnp.zeros((1, 2))

    def variance(kind, v):
        return jnp.exp(reverse(kind, path, Estimate(x, x, jnp.full_like(x, v)), x, t, s).log_var[0])

    np.testing.assert_allclose(variance("learned_sigmoid", 1), small[0], rtol=1e-5)
    np.testing.assert_allclose(variance("learned_sigmoid", 0), large[0], rtol=1e-5)
    np.testing.assert_allclose(variance("learned_range", -1), small[0], rtol=1e-5)
    np.testing.assert_allclose(variance("learned_range", 1), large[0], rtol=1e-5)


def test_posterior_and_a_model_that_knows_x0_agree(key):
    a, b = jax.random.split(key)
    x0, xt = jax.random.normal(a, (2, 3)), jax.random.normal(b, (2, 3))
    t, s = jnp.array([0.7, 0.4]), jnp.array([0.5, 0.1])
    model = reverse("fixed_small", Linear(), Estimate(x0, x0), xt, t, s)
    assert (kl(posterior(Linear(), x0, xt, t, s), model) == 0).all()


def test_missing_and_unknown_variances_are_named():
    x, t = jnp.zeros((1, 2)), jnp.ones(1)
    with pytest.raises(ValueError, match="'learned_range' needs a network that returns WithVariance"):
        reverse("learned_range", Linear(), Estimate(x, x), x, t, t / 2)
    with pytest.raises(ValueError, match="'small' is not one of"):
        reverse("small", Linear(), Estimate(x, x), x, t, t / 2)
