import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.guide import clip
from diffusion.predict import Estimate, convert, estimate
from diffusion.process import VP, Linear, coefficients, linear_betas, noise
from diffusion.posterior import Gaussian, between, posterior, reverse
from diffusion.vlb import vlb_term, check_chain, decoder_nll, kl, least_variance, prior_term
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
        step = between(chain.path, t, s)
        close(chain.path(t)[0] ** 2, chain.values["alphas_cumprod"], tolerance)
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


def test_published_prior(chain):
    start = jnp.full(4, chain.grid[0])
    bits = prior_term(chain.path, jnp.asarray(chain.values["x0"]), start)
    # The published program adds and subtracts 1 in float32: its last digits are those of 1.
    np.testing.assert_allclose(bits, chain.values["prior_bpd"], rtol=1e-5, atol=6e-8)


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


def test_divergence_matches_torch(key):
    torch = pytest.importorskip("torch", reason="pip install 'patch-diffusion[torch]'")
    values = np.asarray(jax.random.normal(key, (4, 50)))
    p, q = Gaussian(*values[:2]), Gaussian(*values[2:])
    normal = lambda g: torch.distributions.Normal(torch.tensor(g.mean), torch.tensor(np.exp(g.log_var / 2)))  # noqa: E731
    np.testing.assert_allclose(kl(p, q), torch.distributions.kl_divergence(normal(p), normal(q)), rtol=1e-4, atol=1e-6)
    assert (kl(p, p) == 0).all()


def test_divergence_of_nearly_equal_variances_is_not_lost_to_rounding():
    p, q = Gaussian(jnp.zeros(1), jnp.full(1, 1e-4)), Gaussian(jnp.zeros(1), jnp.zeros(1))
    np.testing.assert_allclose(kl(p, q), 1e-8 / 4, rtol=1e-2)


@pytest.mark.parametrize(("mean", "deviation"), [(0.1, 0.3), (-0.97, 0.02), (0.5, 2.0)])
def test_the_decoder_gives_all_256_levels_a_mass_of_one(mean, deviation):
    levels = jnp.linspace(-1, 1, 256)
    p = Gaussian(jnp.full(256, mean), jnp.full(256, 2 * np.log(deviation)))
    mass = jnp.exp(-decoder_nll(p, levels))
    np.testing.assert_allclose(mass.sum(), 1, atol=1e-5)
    if deviation < 1:
        assert abs(levels[jnp.argmax(mass)] - mean) < 0.03 + 1 / 255


def test_bound_terms_and_their_gradients_are_finite_at_both_ends_of_the_chain(key):
    path, grid = VP(linear_betas(20)), np.arange(20, -1, -1) / 20
    x0 = jnp.clip(jax.random.normal(key, (2, 3, 4)), -1, 1)
    t, s = jnp.array([1.0, 0.05]), jnp.array([0.95, 0.0])

    def total(x0_hat, v):
        model = Estimate(x0_hat, x0_hat, v)
        return bound_term("learned_range", path, x0, x0, t, s, model, least_variance(path, grid)).sum()

    value, grads = jax.value_and_grad(total, (0, 1))(jnp.zeros_like(x0), jnp.zeros_like(x0))
    assert np.isfinite(value) and all(np.isfinite(g).all() and (g != 0).any() for g in grads)


def test_posterior_and_a_model_that_knows_x0_agree(key):
    a, b = jax.random.split(key)
    x0, xt = jax.random.normal(a, (2, 3)), jax.random.normal(b, (2, 3))
    t, s = jnp.array([0.7, 0.4]), jnp.array([0.5, 0.1])
    model = reverse("fixed_small", Linear(), Estimate(x0, x0), xt, t, s)
    assert (kl(posterior(Linear(), x0, xt, t, s), model) == 0).all()


@pytest.mark.parametrize(
    "times", [[1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.5, 0.1], [1.0, 1.0, 0.0], [[1.0, 0.5, 0.0]], []]
)
def test_impossible_chains_are_refused(times):
    with pytest.raises(ValueError, match="falling times that ends at 0"):
        check_chain(np.array(times))


def test_missing_and_unknown_variances_are_named():
    x, t = jnp.zeros((1, 2)), jnp.ones(1)
    with pytest.raises(ValueError, match="'learned_range' needs a network that returns Learned"):
        reverse("learned_range", Linear(), Estimate(x, x), x, t, t / 2)
    with pytest.raises(ValueError, match="'small' is not one of"):
        reverse("small", Linear(), Estimate(x, x), x, t, t / 2)
