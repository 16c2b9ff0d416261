from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import loss as losses
from diffusion.grids import respaced_grid
from diffusion.patch import patchify
from diffusion.predict import Prediction, WithVariance, convert, target
from diffusion.process import VP, Cosine, Linear, coefficients, linear_betas, noise
from diffusion.times import antithetic_times, grid_times
from diffusion.vlb import Vlb
from tests.chains import FILES, close, load


def oracle(path, prediction, x0, error=0.0):
    """Returns the target computed from x0 and xt, plus `error` in its own coordinates."""

    def denoise(xt, t, y):
        coef = coefficients(path, t)
        alpha, sigma = (a[:, None, None] for a in path(t))
        return target(prediction, coef, x0, (xt - alpha * x0) / sigma) + error

    return denoise


@pytest.fixture
def x0():
    return jax.random.normal(jax.random.key(1), (64, 6, 1))


@pytest.mark.parametrize("prediction", get_args(Prediction))
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
    """A network that answers in tokens, and one that answers in images, agree on the same error."""
    space = lambda x: patchify(x, 4, 2)  # noqa: E731
    pixels = oracle(Linear(), "eps", x0, 0.1)
    tokens = lambda xt, t, y: space(pixels(xt, t, y))  # noqa: E731
    value, _ = losses.loss(key, tokens, Linear(), x0, prediction="eps", space=space)
    np.testing.assert_allclose(value, 0.01, rtol=2e-2)
    with pytest.raises(ValueError, match="shape"):
        losses.loss(jax.random.key(2), pixels, Linear(), x0, prediction="eps", space=space)


def test_denoiser_sees_the_noised_image_and_its_label(key, x0):
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


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_published_losses(file):
    """Squared errors, weights and variational terms, added up as their configs say."""
    chain = load(file)
    v, (t, _) = chain.values, chain.now
    learned = chain.variance.startswith("learned")
    run = partial(
        losses.loss_at,
        denoise=chain.denoise,
        path=chain.path,
        prediction=chain.prediction,
        weight=losses.weighting(chain.weighting, chain.prediction) if chain.weighting else None,
        vlb=Vlb(chain.grid, chain.variance) if learned else None,
    )
    value, parts = jax.jit(lambda eps, x0: run(losses.Draw(t, eps), x0=x0))(v["eps"], v["x0"])
    close(value, v["loss"])
    close(value - parts["vlb"] if learned else value, v["mse"])
    if learned:
        close(parts["vlb"], v["vb"])


PUBLISHED = {
    "snr": lambda snr: snr,
    "snr+1": lambda snr: snr + 1,
    "truncated_snr": lambda snr: np.maximum(snr, 1),
    "sqrt_snr": np.sqrt,
    "p2": lambda snr: snr / np.sqrt(1 + snr),
    "min_snr": lambda snr: np.minimum(snr, 5),
}


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_weightings_are_published_functions_of_snr_on_the_error_of_x0(x0, prediction):
    path, t = VP(linear_betas(1000)), jnp.linspace(0.05, 0.9, 64)
    wrong = oracle(path, prediction, x0, 0.3)
    sampled = losses.Draw(t, jax.random.normal(jax.random.key(2), x0.shape))

    @jax.jit
    def run(sampled):
        ours = {
            name: losses.loss_at(
                sampled, wrong, path, x0, prediction=prediction, weight=losses.weighting(name, prediction)
            )[0]
            for name in PUBLISHED
        }
        as_x0 = convert(wrong, path, prediction, "x0")
        return ours, losses.loss_at(sampled, as_x0, path, x0, prediction="x0")[0], path(sampled.t)

    ours, direct, (alpha, sigma) = run(sampled)
    snr = (np.asarray(alpha, np.float64) / np.asarray(sigma, np.float64)) ** 2
    for name, published in PUBLISHED.items():
        np.testing.assert_allclose(ours[name], published(snr) * direct, rtol=2e-3, err_msg=name)


def test_plain_errors_are_weightings():
    coef = coefficients(Cosine(), jnp.array([0.01, 0.4, 0.99]))
    np.testing.assert_allclose(losses.weighting("snr", "eps")(coef), 1, rtol=1e-5)
    np.testing.assert_allclose(losses.weighting("snr+1", "v")(coef), 1, rtol=1e-5)


@pytest.mark.slow
def test_min_snr_matches_diffusers():
    pytest.importorskip("torch", reason="diffusers needs torch: pip install 'patch-diffusion[torch]'")
    import torch
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    index = torch.arange(0, 1000, 37)
    snr = compute_snr(DDPMScheduler(1000, 1e-4, 0.02, "linear"), index).numpy()
    coef = coefficients(VP(linear_betas(1000)), (jnp.asarray(index.numpy()) + 1) / 1000)
    np.testing.assert_allclose(losses.weighting("min_snr", "eps")(coef), np.minimum(snr, 5) / snr, rtol=1e-3)
    np.testing.assert_allclose(
        losses.weighting("min_snr", "v", gamma=3.0)(coef), np.minimum(snr, 3) / (snr + 1), rtol=1e-3
    )


def test_the_sigmoid_weighting_does_not_depend_on_the_clock():
    """On a path run through at another speed the weight is the same per unit of log SNR."""
    slow = lambda t: Cosine()(t**2)  # noqa: E731
    weight, t = losses.weighting("sigmoid", "eps", bias=-1.0), jnp.array([0.3, 0.6, 0.8])
    here, there = weight(coefficients(slow, t)), weight(coefficients(Cosine(), t**2))
    np.testing.assert_allclose(here, 2 * t * there, rtol=1e-4)
    coef = coefficients(Cosine(), t)
    logsnr = 2 * np.log(coef.alpha / coef.sigma)
    speed = 2 * (coef.dsigma / coef.sigma - coef.dalpha / coef.alpha)
    np.testing.assert_allclose(weight(coef), speed / (1 + np.exp(logsnr + 1)), rtol=1e-4)


@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_weightings_are_finite_at_both_ends(prediction):
    coef = coefficients(Linear(), jnp.array([0.0, 1.0]))
    for name in (*PUBLISHED, "sigmoid"):
        assert np.isfinite(losses.weighting(name, prediction)(coef)).all(), name


def learner(params, xt, t, y):
    return WithVariance(params["pred"] * xt, params["v"] * xt)


def variational(params, x0, **options):
    vlb = Vlb(np.arange(20, -1, -1) / 20, "learned_range", **options)
    t = jnp.tile(jnp.array([0.05, 0.5, 0.9, 1.0]), 16)

    @jax.jit
    def run(params, x0):
        sampled = losses.Draw(t, jax.random.normal(jax.random.key(3), x0.shape))
        denoise = lambda xt, t, y: learner(params, xt, t, y)  # noqa: E731
        return losses.loss_at(sampled, denoise, VP(linear_betas(20)), x0 / 4, prediction="eps", vlb=vlb)

    return run(params, x0)


def test_the_variational_term_trains_the_variance_and_leaves_the_prediction_to_the_squared_error(x0):
    params = {"pred": jnp.float32(0.4), "v": jnp.float32(0.1)}
    grads = jax.jit(jax.grad(lambda p: variational(p, x0)[0].mean()))(params)
    plain = jax.jit(jax.grad(lambda p: variational(p, x0)[1]["mse"].mean()))(params)
    np.testing.assert_allclose(grads["pred"], plain["pred"], rtol=1e-5)
    assert grads["v"] != 0 and plain["v"] == 0


@pytest.mark.slow
def test_a_variational_term_has_a_weight_or_is_the_whole_loss(x0):
    params = {"pred": jnp.float32(0.4), "v": jnp.float32(0.1)}
    value, parts = variational(params, x0)
    np.testing.assert_allclose(value, parts["mse"] + parts["vlb"], rtol=1e-6)
    rescaled, _ = variational(params, x0, weight=20 / 1000)
    np.testing.assert_allclose(rescaled, parts["mse"] + 0.02 * parts["vlb"], rtol=1e-6)
    lone, _ = variational(params, x0, weight=20.0, only=True)
    np.testing.assert_allclose(lone, 20 * parts["vlb"], rtol=1e-6)
    assert jax.grad(lambda p: variational(p, x0, only=True)[0].mean())(params)["pred"] != 0


@pytest.mark.slow
def test_the_variational_term_of_a_respaced_chain_steps_to_the_next_time_kept(x0):
    """Steps by their own indices: with the whole chain's next time the term would be another."""
    path, chain = VP(linear_betas(100)), respaced_grid("5", 100)
    t = jnp.full(64, chain[2])
    sampled = losses.Draw(t, jax.random.normal(jax.random.key(3), x0.shape))

    def term(grid):
        vlb = Vlb(grid, "fixed_large", only=True)
        denoise = lambda xt, t, y: 0.5 * xt  # noqa: E731
        return losses.loss_at(sampled, denoise, path, x0 / 4, prediction="x0", vlb=vlb)[0]

    np.testing.assert_array_equal(term(chain), term(np.array([1.0, chain[2], chain[3], 0.0])))
    assert (term(chain) > 5 * term(respaced_grid("", 100))).all()


def test_what_a_variational_term_cannot_do_is_refused(x0):
    learned = lambda xt, t, y: WithVariance(xt, xt)  # noqa: E731
    plain = lambda xt, t, y: xt  # noqa: E731
    sampled = losses.Draw(jnp.full(64, 0.5), x0)
    vlb = Vlb(np.array([1.0, 0.5, 0.0]), "learned_range")
    for denoise, options, message in (
        (learned, {}, "nothing would train"),
        (plain, {"vlb": vlb}, "no variance for the variational term"),
        (plain, {"vlb": vlb._replace(only=True)}, "'learned_range' needs a network"),
        (learned, {"vlb": vlb, "space": lambda x: x}, "cannot be combined with space"),
        (learned, {"vlb": vlb._replace(chain=np.array([1.0, 0.5]))}, "ends at 0"),
    ):
        with pytest.raises(ValueError, match=message):
            losses.loss_at(sampled, denoise, Linear(), x0, prediction="x0", **options)


def test_a_batch_can_be_cut_after_drawing(key, x0):
    denoise = lambda xt, t, y: jnp.tanh(xt) * t[:, None, None]  # noqa: E731
    sampled = losses.draw(key, x0, antithetic_times)
    whole, _ = losses.loss_at(sampled, denoise, Linear(), x0, prediction="v")
    parts = [
        losses.loss_at(jax.tree.map(lambda a, i=i: a[i::4], sampled), denoise, Linear(), x0[i::4], prediction="v")[0]
        for i in range(4)
    ]
    np.testing.assert_allclose(jnp.stack(parts, 1).reshape(-1), whole, rtol=1e-6)


def test_loss_is_a_draw_and_its_value_there(x0):
    denoise = lambda xt, t, y: jnp.tanh(xt)  # noqa: E731
    value, _ = losses.loss(jax.random.key(5), denoise, Linear(), x0, prediction="x0", times=grid_times(10))
    sampled = losses.draw(jax.random.key(5), x0, grid_times(10))
    np.testing.assert_array_equal(value, losses.loss_at(sampled, denoise, Linear(), x0, prediction="x0")[0])


def test_importance_weights_multiply_the_loss_but_not_what_is_reported(x0):
    times = lambda key, n: (jnp.full(n, 0.5), jnp.arange(float(n)))  # noqa: E731
    value, parts = losses.loss(jax.random.key(5), lambda xt, t, y: xt, Linear(), x0, prediction="x0", times=times)
    np.testing.assert_array_equal(value, jnp.arange(64.0) * parts["loss"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": lambda coef: jnp.ones((64, 1))}, r"the weight has shape \(64, 1\); it must have one .* \(64,\)"),
        ({"weight": lambda coef: jnp.ones(1)}, r"the weight has shape \(1,\)"),
        ({"times": lambda key, n: 0.5}, r"times of shape \(\); a batch of 64 needs \(64,\)"),
        ({"times": lambda key, n: jnp.full((n, 1), 0.5)}, r"times of shape \(64, 1\)"),
        ({"times": lambda key, n: (jnp.full(n, 0.5), jnp.ones(()))}, r"weights of shape \(\)"),
        ({"times": lambda key, n: jnp.ones(n, int)}, r"t must be a floating-point array \[64\], .* not int32 \(64,\)"),
        ({"x0": jnp.zeros((64, 6, 1), jnp.uint8)}, "images must be floating-point, not uint8"),
    ],
)
def test_wrong_shapes_and_types_are_refused_at_trace_time(options, message):
    options = {"x0": jnp.zeros((64, 6, 1)), **options}
    run = lambda key: losses.loss(key, lambda xt, t, y: xt, Linear(), prediction="x0", **options)  # noqa: E731
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, jax.random.key(0))


@pytest.mark.parametrize("t", [0.5, jnp.float32(0.5), jnp.full((64, 1), 0.5), jnp.ones(64, int)])
def test_a_time_that_is_not_one_per_example_is_refused(x0, t):
    with pytest.raises(ValueError, match=r"t must be a floating-point array \[64\], one time per example, not"):
        losses.loss_at(losses.Draw(t, x0), lambda xt, t, y: xt, Linear(), x0, prediction="x0")


def test_a_constant_weight_may_be_a_scalar(key, x0):
    run = partial(losses.loss, denoise=lambda xt, t, y: xt, path=Linear(), x0=x0, prediction="x0")
    np.testing.assert_allclose(
        run(key, weight=lambda coef: jnp.float32(2.0))[0], 2 * run(jax.random.clone(key))[0], rtol=1e-6
    )


@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_times_may_be_noise_levels_beyond_1(x0, prediction):
    """A variance-exploding path whose time is sigma, and times of Karras et al. 2022: log sigma is normal."""
    exploding = lambda t: (jnp.ones_like(t), t)  # noqa: E731
    times = lambda key, n: jnp.exp(-1.2 + 1.2 * jax.random.normal(key, (n,))).at[0].set(80.0)  # noqa: E731
    denoise = oracle(exploding, prediction, x0, 0.5)
    value, parts = losses.loss(jax.random.key(3), denoise, exploding, x0, prediction=prediction, times=times)
    assert parts["t"].max() == 80
    np.testing.assert_allclose(value, 0.25, rtol=0.02)
    weight = losses.measured_in("eps", prediction, floor=1e-6)
    coef = coefficients(exploding, parts["t"])
    scale = {"x0": coef.sigma, "v": jnp.sqrt(1 + jnp.square(coef.sigma)) ** 2}.get(prediction, 1.0)
    np.testing.assert_allclose(weight(coef), 1 / jnp.square(scale) * jnp.ones(64), rtol=1e-4)


def test_unknown_weightings_are_named():
    with pytest.raises(ValueError, match="weighting='p3' is not one of"):
        losses.weighting("p3", "eps")


@pytest.mark.parametrize(
    "make",
    [
        lambda: losses.weighting("min_snr", "x0", gamma=0.0),
    ],
)
def test_impossible_time_samplers_are_refused(make):
    with pytest.raises(ValueError, match="must"):
        make()


@pytest.mark.slow
def test_without_times_a_variational_term_is_measured_at_those_of_its_chain(key):
    chain, x0 = respaced_grid("", 20), jnp.zeros((400, 2, 1))
    _, found = losses.loss(
        key,
        lambda xt, t, y: xt,
        VP(linear_betas(20)),
        x0,
        prediction="eps",
        vlb=Vlb(chain, "fixed_small", only=True),
    )
    np.testing.assert_allclose(np.unique(found["t"]), chain[:-1][::-1], rtol=1e-6)


def test_a_network_is_called_in_the_dtype_of_the_images(key):
    seen = []
    x0 = jnp.zeros((2, 2, 1), jnp.bfloat16)
    losses.loss(key, lambda xt, t, y: seen.append((xt.dtype, t.dtype)) or xt, Linear(), x0, prediction="x0")
    assert seen == [(jnp.bfloat16, jnp.float32)]
