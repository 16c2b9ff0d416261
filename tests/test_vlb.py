import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.experts import boundaries, experts
from diffusion.grids import respaced_grid
from diffusion.guide import classifier_free, clip
from diffusion.posterior import Gaussian, between
from diffusion.predict import Estimate, WithVariance, target
from diffusion.process import VP, coefficients, expand, linear_betas
from diffusion.sample import sample_keys
from diffusion.vlb import bits_per_dim, check_chain, decoder_nll, kl, least_variance, prior_term, vlb_term
from tests.chains import FILES, load

PATH = VP(linear_betas(200))
CHAIN = respaced_grid("", 200)
SCALE = 0.3
KIND = {"prediction": "eps", "variance": "fixed_small"}


def gaussian_denoiser(prediction):
    """The best denoiser of x0 ~ N(0, SCALE^2)."""

    def denoise(xt, t, y=None):
        coef = coefficients(PATH, t)
        alpha, sigma = expand(coef.alpha, xt), expand(coef.sigma, xt)
        total = jnp.square(alpha * SCALE) + jnp.square(sigma)
        return target(prediction, coef, alpha * SCALE**2 / total * xt, sigma / total * xt)

    return denoise


@pytest.fixture(scope="module")
def images():
    """Gaussian images in 256 levels."""
    x = SCALE * jax.random.normal(jax.random.key(9), (8, 16, 16, 3))
    return jnp.round((jnp.clip(x, -1, 1) + 1) * 127.5) / 127.5 - 1


@pytest.fixture(scope="module")
def exact(images):
    code = jax.jit(lambda x: bits_per_dim(jax.random.key(0), gaussian_denoiser("eps"), PATH, x, CHAIN, **KIND))
    return code(images)


@pytest.mark.slow
def test_terms_of_a_gaussian_are_those_in_closed_form(exact):
    """KL of two Gaussians of one variance: on average on_x0^2 Var(x0 | xt) / (2 var)."""
    t, s = jnp.asarray(CHAIN[:-2], jnp.float32), jnp.asarray(CHAIN[1:-1], jnp.float32)
    alpha, sigma = PATH(t)
    step = between(PATH, t, s)
    left = SCALE**2 * sigma**2 / ((alpha * SCALE) ** 2 + sigma**2)
    expected = step.on_x0**2 * left / (2 * step.small) / np.log(2)
    np.testing.assert_allclose(exact.terms[:-1].mean(1), expected, rtol=0.12)
    np.testing.assert_allclose(exact.terms[:-1].mean(1).sum(), expected.sum(), rtol=0.01)
    np.testing.assert_allclose(exact.x0_mse[:-1].mean(1), left, rtol=0.12)


@pytest.mark.slow
def test_bits_of_a_gaussian_are_its_entropy_if_the_variance_is_that_of_the_true_reverse_process(images):
    """Var(xs | xt) = small + on_x0^2 Var(x0 | xt): then every step is exact, and so is their sum."""
    least = least_variance(PATH, CHAIN)

    def denoise(xt, t, y=None):
        (alpha, sigma), step = PATH(t), between(PATH, t, t - 1 / 200)
        left = SCALE**2 * sigma**2 / ((alpha * SCALE) ** 2 + sigma**2)
        small = jnp.maximum(step.small, jnp.where(t < 1.5 / 200, least, 0))
        true = jnp.log(jnp.where(t < 1.5 / 200, 0, step.small) + step.on_x0**2 * left)
        v = 2 * (true - jnp.log(small)) / (jnp.log(step.large) - jnp.log(small)) - 1
        return WithVariance(gaussian_denoiser("eps")(xt, t), jnp.broadcast_to(expand(v, xt), xt.shape))

    code = jax.jit(
        lambda x: bits_per_dim(jax.random.key(0), denoise, PATH, x, CHAIN, prediction="eps", variance="learned_range")
    )
    edges = lambda x: jax.scipy.stats.norm.cdf(x / SCALE)  # noqa: E731
    mass = jnp.where(images > 0.999, 1.0, edges(images + 1 / 255))
    mass = mass - jnp.where(images < -0.999, 0.0, edges(images - 1 / 255))
    np.testing.assert_allclose(code(images).total.mean(), -jnp.log2(mass).mean(), atol=0.02)


@pytest.mark.slow
def test_the_decoder_of_a_gaussian_is_that_in_closed_form(images):
    """Its variance is the posterior's of the step before, its bins are narrow beside it."""
    chain = np.array([1.0, 0.5, 0.25, 0.0])
    ours = bits_per_dim(
        jax.random.key(0), gaussian_denoiser("x0"), PATH, images, chain, prediction="x0", variance="fixed_small"
    )
    var = float(between(PATH, jnp.float32(0.5), jnp.float32(0.25)).small)
    alpha, sigma = (float(a) for a in PATH(jnp.float32(0.25)))
    left = SCALE**2 * sigma**2 / ((alpha * SCALE) ** 2 + sigma**2)
    expected = 0.5 * np.log2(2 * np.pi * var) + left / (2 * var) / np.log(2) - np.log2(2 / 255)
    np.testing.assert_allclose(ours.terms[-1].mean(), expected, rtol=0.01)


def test_parts_add_up(images, exact):
    assert exact.terms.shape == exact.x0_mse.shape == exact.eps_mse.shape == (200, 8)
    assert (exact.prior > 0).all() and (exact.prior < 1e-3).all() and exact.terms[-1].mean() > 1
    # From halfway much of an image is left, and coding that is the prior's part.
    half = bits_per_dim(jax.random.key(0), gaussian_denoiser("eps"), PATH, images, np.array([0.5, 0.2, 0.0]), **KIND)
    np.testing.assert_allclose(half.total, half.prior + half.terms.sum(0), rtol=1e-5)
    alpha, sigma = (float(a) for a in PATH(jnp.float32(0.5)))
    expected = 0.5 * (sigma**2 - 1 - np.log(sigma**2) + alpha**2 * (images**2).mean((1, 2, 3))) / np.log(2)
    np.testing.assert_allclose(half.prior, expected, rtol=1e-3)


@pytest.mark.slow
def test_an_image_is_coded_alike_among_others(images):
    keys, denoise = sample_keys(jax.random.key(1), jnp.arange(4)), gaussian_denoiser("x0")
    chain, kind = respaced_grid("5", 200), {"prediction": "x0", "variance": "fixed_large"}
    together = bits_per_dim(keys, denoise, PATH, images[:4], chain, **kind).total
    alone = bits_per_dim(keys[2:3], denoise, PATH, images[2:3], chain, **kind).total
    np.testing.assert_allclose(alone[0], together[2], rtol=1e-5)
    one_key = bits_per_dim(jax.random.key(1), denoise, PATH, images[:4], chain, **kind).total
    np.testing.assert_allclose(one_key, together, rtol=1e-6)


def test_a_respaced_chain_codes_worse(images, exact):
    few = bits_per_dim(jax.random.key(0), gaussian_denoiser("eps"), PATH, images, respaced_grid("10", 200), **KIND)
    assert few.terms.shape == (10, 8) and (few.total > exact.total + 0.1).all()


@pytest.mark.slow
def test_experts_guidance_clipping_and_learned_variance_are_denoisers_here_too(images):
    """Two experts that are the same network, guided at scale 1, code as that network does."""
    plain = gaussian_denoiser("x0")
    learned = lambda xt, t, y: WithVariance(plain(xt, t), -jnp.ones_like(xt))  # noqa: E731
    pick = clip(classifier_free(experts([learned, learned], boundaries(PATH, [0.25])), 0, 1.0), PATH, "x0")
    y, chain, key = jnp.zeros(8, int), respaced_grid("6", 200), jax.random.key(3)
    ours = bits_per_dim(key, pick, PATH, images, chain, y, prediction="x0", variance="learned_range")
    # v = -1 is the small end, at the decoder's step too.
    small = bits_per_dim(key, clip(plain, PATH, "x0"), PATH, images, chain, prediction="x0", variance="fixed_small")
    np.testing.assert_allclose(ours.total, small.total, rtol=1e-4)
    wrong = experts([learned, lambda xt, t, y: WithVariance(0 * xt + 1, -jnp.ones_like(xt))], boundaries(PATH, [0.25]))
    other = bits_per_dim(key, wrong, PATH, images, chain, y, prediction="x0", variance="learned_range")
    noisy = np.asarray(PATH(jnp.asarray(chain[:-1]))[0] ** 2 <= 0.25 * PATH(jnp.asarray(chain[:-1]))[1] ** 2)
    assert 0 < noisy.sum() < 6
    assert ((np.abs(other.terms - ours.terms) > 1e-4).all(1) == noisy).all()


@pytest.mark.slow
def test_images_in_bfloat16_are_coded_at_times_in_float32(images, exact):
    """Neighbouring times of 200 are one bfloat16 near 1: the step between them would have no length."""
    seen = []

    def denoise(xt, t, y=None):
        seen.append((xt.dtype.name, t.dtype.name))
        return gaussian_denoiser("eps")(xt, t).astype(xt.dtype)

    rough = bits_per_dim(jax.random.key(0), denoise, PATH, images.astype(jnp.bfloat16), CHAIN, **KIND)
    assert set(seen) == {("bfloat16", "float32")}
    np.testing.assert_allclose(rough.terms[:-1].mean(1).sum(), exact.terms[:-1].mean(1).sum(), rtol=0.05)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_steps():
    def temporary(steps):
        path, chain = VP(linear_betas(steps)), respaced_grid("", steps)
        denoise = lambda xt, t, y: jnp.tanh(xt)  # noqa: E731
        code = jax.jit(lambda x: bits_per_dim(jax.random.key(0), denoise, path, x, chain, **KIND).total)
        compiled = code.lower(jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(1000) - temporary(50) < 4 * 64 * 64 * 3 * 4 / 4


def test_impossible_likelihoods_are_refused_at_once(images):
    code = lambda chain, variance: bits_per_dim(  # noqa: E731
        jax.random.key(0), None, PATH, images, np.array(chain), prediction="eps", variance=variance
    )
    with pytest.raises(ValueError, match="ends at 0"):
        code([1.0, 0.5, 0.2], "fixed_small")
    with pytest.raises(ValueError, match="variance='best'"):
        code([1.0, 0.5, 0.0], "best")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_published_prior(file):
    chain = load(file)
    start = jnp.full(4, chain.grid[0])
    bits = prior_term(chain.path, jnp.asarray(chain.values["x0"]), start)
    # The published program adds and subtracts 1 in float32: its last digits are those of 1.
    np.testing.assert_allclose(bits, chain.values["prior_bpd"], rtol=1e-5, atol=6e-8)


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


@pytest.mark.slow
def test_terms_and_their_gradients_are_finite_at_both_ends_of_the_chain(key):
    path, grid = VP(linear_betas(20)), np.arange(20, -1, -1) / 20
    x0 = jnp.clip(jax.random.normal(key, (2, 3, 4)), -1, 1)
    t, s = jnp.array([1.0, 0.05]), jnp.array([0.95, 0.0])

    def total(x0_hat, v):
        model = Estimate(x0_hat, x0_hat, v)
        return vlb_term("learned_range", path, x0, x0, t, s, model, least_variance(path, grid)).sum()

    value, grads = jax.value_and_grad(total, (0, 1))(jnp.zeros_like(x0), jnp.zeros_like(x0))
    assert np.isfinite(value) and all(np.isfinite(g).all() and (g != 0).any() for g in grads)


@pytest.mark.parametrize(
    "times", [[1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.5, 0.1], [1.0, 1.0, 0.0], [[1.0, 0.5, 0.0]], []]
)
def test_impossible_chains_are_refused(times):
    with pytest.raises(ValueError, match="falling times that ends at 0"):
        check_chain(np.array(times))


def test_the_prior_may_have_another_scale():
    """On an exploding path the noise of sampling is N(0, sigma^2); the divergence is that of two normal variables."""
    exploding = lambda t: (jnp.ones_like(t), t)  # noqa: E731
    x0, sigma, std = jnp.array([[0.5], [-1.0]]), 80.0, 82.0
    ours = prior_term(exploding, x0, jnp.full(2, sigma), std)
    expected = np.log(std / sigma) + (sigma**2 + np.square(x0[:, 0])) / (2 * std**2) - 0.5
    np.testing.assert_allclose(ours, expected / np.log(2), rtol=1e-3)
    assert prior_term(exploding, x0, jnp.full(2, sigma)).min() > 1000
