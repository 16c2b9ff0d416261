import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.predict import Prediction, WithVariance, convert, decode, determinant, estimate, predictor, target
from diffusion.process import Linear, coefficients, noise
from tests.test_process import PATHS

PREDICTIONS = get_args(Prediction)


def draw(key, n):
    a, b = jax.random.split(key)
    return jax.random.normal(a, (n, 4, 3)), jax.random.normal(b, (n, 4, 3))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prediction"), list(itertools.product(PATHS, PREDICTIONS)))
def test_decode_inverts_target_inside(key, name, prediction):
    t = jnp.array([0.05, 0.3, 0.5, 0.7, 0.95])
    x0, eps = draw(key, len(t))
    coef = coefficients(PATHS[name], t)
    got = decode(prediction, coef, noise(PATHS[name], x0, t, eps), target(prediction, coef, x0, eps))
    np.testing.assert_allclose(got[0], x0, atol=2e-3)
    np.testing.assert_allclose(got[1], eps, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prediction"), list(itertools.product(PATHS, PREDICTIONS)))
def test_decode_at_the_end_points_is_exact_where_the_system_is_regular_and_finite_elsewhere(key, name, prediction):
    t = jnp.array([0.0, 1.0])
    x0, eps = draw(key, 2)
    coef = coefficients(PATHS[name], t)
    xt = noise(PATHS[name], x0, t, eps)
    x0_hat, eps_hat = decode(prediction, coef, xt, target(prediction, coef, x0, eps))
    # The image at t = 0 and the noise at t = 1 are what xt itself shows: never lost.
    np.testing.assert_allclose(x0_hat[0], x0[0], atol=1e-5)
    np.testing.assert_allclose(eps_hat[1], eps[1], atol=1e-2 if name == "vp cosine" else 1e-4)
    # The other one can only be known if the prediction is not xt once more.
    eps_known, x0_known = prediction != "x0", not (prediction == "eps" and float(coef.alpha[1]) < 1e-6)
    np.testing.assert_allclose(eps_hat[0], eps[0] if eps_known else 0 * eps[0], atol=1e-4)
    if x0_known:
        np.testing.assert_allclose(x0_hat[1], x0[1], atol=5e-2)
    else:
        np.testing.assert_array_equal(x0_hat[1], 0 * x0[1])


def test_decode_reads_xt_where_a_path_stands_still(key):
    """A path whose derivatives vanish at the end: the flow is zero there, xt determines the noise."""
    path = lambda t: (jnp.cos(jnp.pi / 2 * t) ** 2, jnp.sin(jnp.pi / 2 * t) ** 2)  # noqa: E731
    coef, xt = coefficients(path, jnp.ones(1)), jax.random.normal(key, (1, 4))
    x0_hat, eps_hat = decode("flow", coef, xt, jnp.zeros((1, 4)))
    np.testing.assert_allclose(eps_hat, xt, rtol=1e-5)
    np.testing.assert_allclose(x0_hat, 0, atol=1e-5)


def test_gradients_through_decode_are_finite_at_the_end_points():
    coef = coefficients(PATHS["linear"], jnp.array([0.0, 1.0]))
    for prediction in PREDICTIONS:
        grad = jax.grad(lambda p, kind=prediction: sum(a.sum() for a in decode(kind, coef, p, p)))(jnp.ones((2, 3)))
        assert np.isfinite(grad).all()


@pytest.mark.parametrize(("source", "to"), list(itertools.permutations(PREDICTIONS, 2)))
def test_convert_gives_the_same_denoiser(key, source, to):
    path, t = PATHS["cosine"], jnp.array([0.2, 0.6])
    x0, eps = draw(key, 2)
    coef, xt = coefficients(path, t), noise(path, x0, t, eps)
    oracle = lambda xt, t, y: target(source, coef, x0, eps)  # noqa: E731
    np.testing.assert_allclose(convert(oracle, path, source, to)(xt, t), target(to, coef, x0, eps), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_floor_bounds_the_divisor_of_the_velocity(key, scale):
    """Eq. (4) at all times, the ends included; above the floor nothing changes."""
    path, t = Linear(scale), jnp.array([0.0, 0.01, 0.04, 0.06, 0.5, 1.0])
    x0, eps = draw(key, len(t))
    pred, xt = 0.9 * x0, noise(path, x0, t, eps)
    velocity = convert(lambda xt, t, y: pred, path, "x0", "flow", 0.05 * scale)(xt, t)
    np.testing.assert_allclose(velocity, (xt - pred) / jnp.maximum(t, 0.05)[:, None, None], rtol=1e-4, atol=1e-5)
    exact = convert(lambda xt, t, y: pred, path, "x0", "flow")(xt, t)
    np.testing.assert_array_equal(velocity[3:], exact[3:])
    # As a prediction of the velocity it decodes to a pair that composes xt, which the bounded solution does not.
    coef = coefficients(path, t)
    x0_hat, eps_hat = decode("flow", coef, xt, velocity)
    np.testing.assert_allclose(noise(path, x0_hat, t, eps_hat), xt, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prediction"), list(itertools.product(PATHS, PREDICTIONS)))
def test_a_floor_is_felt_only_near_a_pole(key, name, prediction):
    t = jnp.array([0.0, 0.3, 0.6, 1.0])
    x0, eps = draw(key, len(t))
    coef = coefficients(PATHS[name], t)
    det, xt = determinant(prediction, coef), noise(PATHS[name], x0, t, eps)
    exact, bounded = (decode(prediction, coef, xt, eps, floor) for floor in (0.0, 0.1))
    for a, b in zip(exact, bounded, strict=True):
        np.testing.assert_array_equal(a[jnp.abs(det) > 0.1], b[jnp.abs(det) > 0.1])
        assert np.isfinite(b).all()
    # At the pole the bounded solution is the limit from inside the path: no jump, no change of sign.
    near = jnp.clip(t, 1e-5, 1 - 1e-5)
    for a, b in zip(bounded, decode(prediction, coefficients(PATHS[name], near), xt, eps, 0.1), strict=True):
        np.testing.assert_allclose(a, b, atol=0.3)


def test_a_negative_floor_is_refused():
    with pytest.raises(ValueError, match="floor=-0.1 must not be negative"):
        convert(lambda xt, t, y: xt, PATHS["linear"], "x0", "flow", -0.1)


def test_flow_is_the_velocity_of_xt(key):
    x0, eps = draw(key, 2)
    path, t = PATHS["vp"], jnp.array([0.31, 0.77])
    _, velocity = jax.jvp(lambda t: noise(path, x0, t, eps), (t,), (jnp.ones(2),))
    np.testing.assert_allclose(target("flow", coefficients(path, t), x0, eps), velocity, rtol=1e-4, atol=1e-4)


def test_a_learned_variance_is_kept_with_the_prediction(key):
    path, t = PATHS["cosine"], jnp.array([0.2, 0.6])
    x0, eps = draw(key, 2)
    coef, xt, v = coefficients(path, t), noise(path, x0, t, eps), x0 * eps
    plain = lambda xt, t, y: target("eps", coef, x0, eps)  # noqa: E731
    learned = lambda xt, t, y: WithVariance(plain(xt, t, y), v)  # noqa: E731
    converted = convert(learned, path, "eps", "v")(xt, t)
    np.testing.assert_array_equal(converted.pred, convert(plain, path, "eps", "v")(xt, t))
    np.testing.assert_array_equal(converted.v, v)
    np.testing.assert_array_equal(estimate("v", coef, xt, converted).v, v)
    np.testing.assert_allclose(estimate("v", coef, xt, converted).x0, x0, atol=1e-5)
    assert estimate("eps", coef, xt, plain(xt, t, None)).v is None


def test_a_predictor_evaluates_a_denoiser_at_one_time_or_one_per_example(key):
    path, t = PATHS["cosine"], jnp.array([0.2, 0.6])
    x0, eps = draw(key, 2)
    y = {"a": x0, "b": eps}
    predict = predictor(lambda xt, t, y: target("v", coefficients(path, t), y["a"], y["b"]), path, "v", y)
    at_each, at_one = predict(noise(path, x0, t, eps), t), predict(noise(path, x0, t[:1].repeat(2), eps), t[0])
    for found in (at_each, at_one):
        np.testing.assert_allclose(found.x0, x0, atol=1e-5)
        np.testing.assert_allclose(found.eps, eps, atol=1e-5)


def test_unknown_prediction_is_named():
    with pytest.raises(ValueError, match="'epsilon' is not one of"):
        target("epsilon", coefficients(PATHS["linear"], jnp.zeros(1)), jnp.zeros((1, 1)), jnp.zeros((1, 1)))
