"""The exact denoiser of a finite data set, against the definition in float64 and properties of posteriors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import grids, predict, process, sample
from diffusion.methods import ideal

PATH = process.Linear()


@pytest.fixture
def data():
    return jax.random.normal(jax.random.key(1), (23, 3, 2, 1))


def noised(key, data, t):
    return process.noise(PATH, data, t, jax.random.normal(key, data.shape))


def by_definition(data, xt, alpha, sigma, counts):
    """Eqs. (1) and (2) of the module, one image at a time, in float64."""
    means, entropies = [], []
    for x, a, s, own in zip(*(np.asarray(each, np.float64) for each in (xt, alpha, sigma)), counts, strict=True):
        images = np.asarray(data, np.float64)[own]
        logits = np.array([-np.square(x - a * image).sum() / (2 * s**2) for image in images])
        p = np.exp(logits - logits.max())
        p /= p.sum()
        means.append((p.reshape(-1, 1, 1, 1) * images).sum(0))
        entropies.append(-(p[p > 0] * np.log(p[p > 0])).sum())
    return np.stack(means), np.array(entropies)


@pytest.mark.parametrize("block_size", [1, 4, 23, 1000])
def test_mean_and_entropy_are_those_of_the_definition_for_any_blocks(key, data, block_size):
    """4 does not divide 23: the last block repeats images, which must not count twice."""
    t = jnp.linspace(0.2, 1.0, 7)
    xt, (alpha, sigma) = noised(key, data[:7], t), PATH(t)
    found = ideal.data_posterior(data, xt, alpha, sigma, block_size=block_size)
    mean, entropy = by_definition(data, xt, alpha, sigma, np.ones((7, 23), bool))
    np.testing.assert_allclose(found.mean, mean, atol=2e-5)
    np.testing.assert_allclose(found.entropy, entropy, atol=2e-4)


@pytest.mark.slow
def test_images_in_few_bits_are_compared_in_float32(key, data):
    t, dtype = jnp.full(3, 0.5), jnp.bfloat16
    xt, denoise = noised(key, data[:3], t).astype(dtype), ideal.ideal_denoiser(PATH, data, block_size=5)
    assert denoise(xt, t).dtype == dtype
    np.testing.assert_array_equal(denoise(xt, t), denoise(xt.astype("float32"), t).astype(dtype))


def test_classes_are_data_sets_of_their_own_and_null_is_all_of_them(key, data):
    labels = jnp.arange(23) // 12  # the first blocks of 5 have no image of class 1
    t, y = jnp.full(3, 0.8), jnp.array([0, 1, 2])
    xt, (alpha, sigma) = noised(key, data[:3], t), PATH(t)
    found = ideal.ideal_denoiser(PATH, data, labels, null=2, block_size=5)(xt, t, y)
    counts = [np.arange(23) < 12, np.arange(23) >= 12, np.ones(23, bool)]
    np.testing.assert_allclose(found, by_definition(data, xt, alpha, sigma, counts)[0], atol=2e-5)


def test_it_is_the_score_of_the_mixture(key, data):
    """Tweedie: grad log p(xt) = (alpha E[x0 | xt] - xt) / sigma^2."""
    t = jnp.full(4, 0.6)
    xt, (alpha, sigma) = noised(key, data[:4], t), PATH(t)

    a, s = float(alpha[0]), float(sigma[0])
    images, x = np.asarray(data, np.float64).reshape(23, -1), np.asarray(xt, np.float64).reshape(4, -1)

    def log_density(x):
        return np.log(np.exp(-np.square(x[:, None] - a * images).sum(2) / (2 * s**2)).sum(1))

    step = 1e-5 * np.eye(x.shape[1])
    gradient = np.stack([(log_density(x + h) - log_density(x - h)) / 2e-5 for h in step], 1)
    mean = np.asarray(ideal.ideal_denoiser(PATH, data)(xt, t)).reshape(4, -1)
    np.testing.assert_allclose(gradient, (a * mean - x) / s**2, atol=1e-4)


def test_ends_of_the_path_are_the_image_itself_and_the_mean_of_the_data(key, data):
    xt = jnp.concatenate([data[:2], jax.random.normal(key, (2, 3, 2, 1))])
    alpha, sigma = PATH(jnp.array([0.0, 0.0, 1.0, 1.0]))
    found = ideal.data_posterior(data, xt, alpha, sigma, block_size=4)
    np.testing.assert_allclose(found.mean[:2], data[:2], atol=1e-6)
    np.testing.assert_allclose(found.mean[2:], np.broadcast_to(data.mean(0), (2, 3, 2, 1)), atol=1e-6)
    np.testing.assert_allclose(found.entropy, [0, 0, np.log(23), np.log(23)], atol=1e-5)


@pytest.mark.slow
def test_many_samples_of_a_gaussian_give_its_linear_denoiser(key):
    """x0 ~ N(1, 4): E[x0 | xt] = 1 + 4 alpha (xt - alpha) / (4 alpha^2 + sigma^2)."""
    data = 1 + 2 * jax.scipy.special.ndtri((jnp.arange(4000) + 0.5) / 4000).reshape(-1, 1, 1)
    t, xt = jnp.full(5, 0.5), jnp.linspace(-1, 2, 5).reshape(5, 1, 1)
    exact = 1 + 4 * 0.5 * (xt - 0.5) / (4 * 0.25 + 0.25)
    np.testing.assert_allclose(ideal.ideal_denoiser(PATH, data)(xt, t), exact, atol=2e-3)


@pytest.mark.slow
def test_uint8_is_decoded_block_by_block(key):
    data = jax.random.randint(jax.random.key(1), (9, 2, 2, 1), 0, 256).astype(jnp.uint8)
    decode = lambda x: x / 127.5 - 1  # noqa: E731
    t = jnp.full(9, 0.3)
    xt = noised(key, decode(data), t)
    found = ideal.ideal_denoiser(PATH, data, decode=decode, block_size=2)(xt, t)
    np.testing.assert_allclose(found, ideal.ideal_denoiser(PATH, decode(data))(xt, t), atol=1e-5)


def test_a_sampler_that_follows_it_reproduces_the_data(key, data):
    keys = sample.sample_keys(key, jnp.arange(6))
    made = sample.sample(
        keys,
        ideal.ideal_denoiser(PATH, data),
        PATH,
        sample.initial_noise(keys, data.shape[1:]),
        grids.uniform_grid(50),
        prediction="x0",
        sampler=sample.ddim(),
    )
    distance = jnp.abs(made[:, None] - data[None]).max((2, 3, 4)).min(1)
    assert float(distance.max()) < 1e-4


@pytest.mark.slow
def test_it_converts_to_every_prediction(key, data):
    t = jnp.full(5, 0.4)
    xt, denoise = noised(key, data[:5], t), ideal.ideal_denoiser(PATH, data)
    flow = predict.convert(denoise, PATH, "x0", "flow")(xt, t)
    np.testing.assert_allclose(flow, (xt - denoise(xt, t)) / 0.4, atol=1e-4)


def test_errors_name_what_is_missing(key, data):
    xt, one = data[:2], jnp.ones(2)
    with pytest.raises(ValueError, match=r"xt has images of shape \(3, 1, 1\), the data has \(3, 2, 1\)"):
        ideal.data_posterior(data, xt[:, :, :1], one, one)
    with pytest.raises(ValueError, match="block_size=0 must be at least 1"):
        ideal.data_posterior(data, xt, one, one, block_size=0)
    with pytest.raises(ValueError, match="needs both the labels of the data and y"):
        ideal.ideal_denoiser(PATH, data)(xt, one, jnp.zeros(2, int))
    with pytest.raises(ValueError, match=r"each of the 23 images, not shape \(2,\)"):
        ideal.data_posterior(data, xt, one, one, labels=jnp.zeros(2, int), y=jnp.zeros(2, int))
