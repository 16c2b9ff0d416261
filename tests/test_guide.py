import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import guide
from diffusion.predict import convert, decode, target
from diffusion.process import Linear, coefficients

NULL = 3


def denoise(xt, t, y):
    """Any function of its inputs in which the label matters."""
    return jnp.tanh(xt) * t[:, None] + y[:, None].astype(xt.dtype) * jnp.sin(xt)


@pytest.fixture
def inputs(key):
    return jax.random.normal(key, (4, 5)), jnp.array([0.1, 0.4, 0.6, 0.9]), jnp.array([0, 1, 2, 0])


def test_scale_1_is_conditional_and_scale_0_unconditional(inputs):
    xt, t, y = inputs
    np.testing.assert_array_equal(guide.classifier_free(denoise, NULL, 1.0)(xt, t, y), denoise(xt, t, y))
    null = jnp.full_like(y, NULL)
    np.testing.assert_array_equal(guide.classifier_free(denoise, NULL, 0.0)(xt, t, y), denoise(xt, t, null))


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_scale_as_a_function_agrees_with_the_plain_cases(inputs, scale):
    plain = guide.classifier_free(denoise, NULL, scale)(*inputs)
    general = guide.classifier_free(denoise, NULL, lambda t: jnp.full_like(t, scale))(*inputs)
    np.testing.assert_allclose(general, plain, atol=1e-6)


def test_scale_extrapolates_along_the_difference(inputs):
    xt, t, y = inputs
    conditional, null = denoise(xt, t, y), denoise(xt, t, jnp.full_like(y, NULL))
    guided = guide.classifier_free(denoise, NULL, 2.5)(xt, t, y)
    np.testing.assert_allclose(guided, null + 2.5 * (conditional - null), rtol=1e-5, atol=1e-5)


def test_guidance_means_the_same_for_every_prediction(inputs):
    path = Linear()
    guided = guide.classifier_free(denoise, NULL, 2.0)
    as_flow = guide.classifier_free(convert(denoise, path, "x0", "flow"), NULL, 2.0)
    np.testing.assert_allclose(convert(guided, path, "x0", "flow")(*inputs), as_flow(*inputs), rtol=1e-4, atol=1e-4)


def test_interval_guides_inside_only(inputs):
    xt, t, y = inputs
    guided = guide.classifier_free(denoise, NULL, guide.interval(2.0, 0.3, 0.7))(xt, t, y)
    full, plain = guide.classifier_free(denoise, NULL, 2.0)(xt, t, y), denoise(xt, t, y)
    np.testing.assert_allclose(guided[1:3], full[1:3], atol=1e-6)
    np.testing.assert_allclose(guided[jnp.array([0, 3])], plain[jnp.array([0, 3])], atol=1e-6)


def test_guidance_without_labels_is_refused(inputs):
    with pytest.raises(ValueError, match="labels"):
        guide.classifier_free(denoise, NULL, 2.0)(inputs[0], inputs[1], None)


@pytest.mark.parametrize("bounds", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1)])
def test_impossible_intervals_are_refused(bounds):
    with pytest.raises(ValueError, match="must satisfy"):
        guide.interval(2.0, *bounds)


def test_labels_are_dropped_at_the_given_rate_and_otherwise_kept(key):
    y = jnp.arange(20000) % 10
    a, b, c = jax.random.split(key, 3)
    dropped = guide.drop_labels(a, y, 10, 0.1)
    np.testing.assert_allclose((dropped == 10).mean(), 0.1, atol=0.01)
    np.testing.assert_array_equal(dropped[dropped != 10], y[dropped != 10])
    np.testing.assert_array_equal(guide.drop_labels(b, y, 10, 0.0), y)
    np.testing.assert_array_equal(guide.drop_labels(c, y, 10, 1.0), jnp.full_like(y, 10))
    with pytest.raises(ValueError, match="rate=1.5"):
        guide.drop_labels(jax.random.key(1), y, 10, 1.5)


@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "flow"])
def test_clip_bounds_x0_and_still_composes_xt(key, prediction):
    path, t = Linear(), jnp.array([0.2, 0.8])
    xt = 3 * jax.random.normal(key, (2, 50))
    coef = coefficients(path, t)
    wild = lambda xt, t, y: target(prediction, coef, 2 * xt, -xt)  # noqa: E731
    x0, eps = decode(prediction, coef, xt, guide.clip(wild, path, prediction)(xt, t))
    assert jnp.abs(x0).max() <= 1 + 1e-5
    np.testing.assert_allclose(coef.alpha[:, None] * x0 + coef.sigma[:, None] * eps, xt, rtol=1e-3, atol=1e-3)


def test_clip_changes_nothing_inside_and_is_finite_without_noise(key):
    xt = jax.random.uniform(key, (2, 9), minval=-1, maxval=1)
    t = jnp.array([0.0, 0.5])
    clipped = guide.clip(lambda xt, t, y: xt, Linear(), "x0")
    np.testing.assert_allclose(clipped(xt, t), xt, atol=1e-6)
