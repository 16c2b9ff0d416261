import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import loss as losses
from diffusion.patch import patchify
from diffusion.predict import convert, target
from diffusion.process import Cosine, Linear, coefficients, noise


def oracle(path, prediction, x0, error=0.0):
    """Knows x0, reads eps off xt, and is wrong by `error` in its own coordinates."""

    def denoise(xt, t, y):
        coef = coefficients(path, t)
        alpha, sigma = (a[:, None, None] for a in path(t))
        return target(prediction, coef, x0, (xt - alpha * x0) / sigma) + error

    return denoise


@pytest.fixture
def x0():
    return jax.random.normal(jax.random.key(1), (64, 6, 1))


@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "flow"])
def test_a_perfect_denoiser_has_no_loss_and_a_wrong_one_its_squared_error(key, x0, prediction):
    a, b = jax.random.split(key)
    perfect, _ = losses.loss(a, oracle(Cosine(), prediction, x0), Cosine(), x0, prediction=prediction)
    wrong, aux = losses.loss(b, oracle(Cosine(), prediction, x0, 0.5), Cosine(), x0, prediction=prediction)
    np.testing.assert_allclose(perfect, 0, atol=1e-3)
    np.testing.assert_allclose(wrong, 0.25, atol=2e-2)
    assert wrong.shape == aux["t"].shape == (64,)


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_measured_in_is_the_error_of_the_other_prediction(x0, prediction):
    """The x0 network's loss measured in flow equals the flow loss of the same network, converted."""
    path, times = Linear(), lambda key, n: jax.random.uniform(key, (n,), minval=0.1, maxval=0.9)
    here = oracle(path, prediction, x0, 0.3)

    def as_flow(xt, t, y):
        return convert(here, path, prediction, "flow")(xt, t)

    weight = losses.measured_in("flow", prediction)
    ours, _ = losses.loss(jax.random.key(2), here, path, x0, prediction=prediction, times=times, weight=weight)
    direct, _ = losses.loss(jax.random.key(2), as_flow, path, x0, prediction="flow", times=times)
    np.testing.assert_allclose(ours, direct, rtol=1e-3)


def test_measured_in_stays_finite_at_the_data():
    weight = losses.measured_in("flow", "x0", floor=0.05)(coefficients(Linear(), jnp.array([0.0, 0.5])))
    np.testing.assert_allclose(weight, [400, 4], rtol=1e-5)


def test_space_measures_on_patches(key, x0):
    """A network that answers in tokens, and one that answers in pictures, agree on the same error."""
    space = lambda x: patchify(x, 4, 2)  # noqa: E731
    pixels = oracle(Linear(), "eps", x0, 0.1)
    tokens = lambda xt, t, y: space(pixels(xt, t, y))  # noqa: E731
    value, _ = losses.loss(key, tokens, Linear(), x0, prediction="eps", space=space)
    np.testing.assert_allclose(value, 0.01, rtol=2e-2)
    with pytest.raises(ValueError, match="shape"):
        losses.loss(jax.random.key(2), pixels, Linear(), x0, prediction="eps", space=space)


def test_denoiser_sees_the_noised_picture_and_its_label(key, x0):
    seen = {}

    def denoise(xt, t, y):
        seen.update(xt=xt, t=t, y=y)
        return xt

    labels = jnp.arange(64)
    _, aux = losses.loss(key, denoise, Linear(), x0, labels, prediction="eps")
    eps = (seen["xt"] - (1 - aux["t"])[:, None, None] * x0) / aux["t"][:, None, None]
    np.testing.assert_allclose(noise(Linear(), x0, aux["t"], eps), seen["xt"], atol=1e-5)
    assert abs(eps.mean()) < 0.2 and abs(eps.std() - 1) < 0.15
    np.testing.assert_array_equal(seen["y"], labels)


SAMPLERS = {
    "uniform": losses.uniform_times,
    "antithetic": losses.antithetic_times,
    "logit_normal": losses.logit_normal_times(0.5, 0.7),
    "grid": losses.grid_times(10),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_times_lie_in_the_unit_interval_and_depend_on_the_key(key, name):
    a, b = (SAMPLERS[name](k, 512) for k in jax.random.split(key))
    assert a.shape == (512,) and (a >= 0).all() and (a <= 1).all()
    assert (a != b).any()


def test_time_samplers_have_their_distributions(key):
    a, b, c, d = jax.random.split(key, 4)
    np.testing.assert_allclose(jnp.quantile(losses.uniform_times(a, 20000), 0.25), 0.25, atol=0.01)
    logit = jax.scipy.special.logit(losses.logit_normal_times(0.5, 0.7)(b, 20000))
    np.testing.assert_allclose([logit.mean(), logit.std()], [0.5, 0.7], atol=0.02)
    counts = np.bincount(np.round(np.asarray(losses.grid_times(10)(c, 22000)) * 10).astype(int))
    np.testing.assert_allclose(counts, 2000, rtol=0.1)
    assert len(counts) == 11
    ordered = jnp.sort(losses.antithetic_times(d, 100))
    np.testing.assert_allclose(jnp.diff(ordered), 0.01, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: losses.logit_normal_times(0.0, 0.0), lambda: losses.grid_times(0)])
def test_impossible_time_samplers_are_refused(make):
    with pytest.raises(ValueError, match="must"):
        make()
