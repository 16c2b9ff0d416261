"""Variants of classifier-free guidance: the papers' formulas in NumPy, and what defines each of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import guide
from diffusion.grids import shifted_grid, uniform_grid
from diffusion.methods import edit, guidance
from diffusion.predict import WithVariance, convert
from diffusion.process import Cosine, Linear
from diffusion.sample import ddim, dpmpp_2m, heun, sample

NULL = 3


def denoise(xt, t, y):
    """Any function of its inputs in which the label matters."""
    return jnp.tanh(xt) * t[:, None, None] + y[:, None, None].astype(xt.dtype) * jnp.sin(xt)


def learned(xt, t, y):
    return WithVariance(denoise(xt, t, y), xt + y[:, None, None])


@pytest.fixture
def inputs(key):
    return jax.random.normal(key, (4, 3, 2)), jnp.array([0.15, 0.4, 0.6, 0.9]), jnp.array([0, 1, 2, 0])


@pytest.fixture
def pair(inputs):
    """The predictions with and without the condition, in NumPy."""
    xt, t, y = inputs
    return np.float64(denoise(xt, t, y)), np.float64(denoise(xt, t, jnp.full_like(y, NULL)))


KINDS = {
    "rescale": lambda scale, path, prediction, d=denoise: guidance.rescale(d, NULL, scale),
    "zero": lambda scale, path, prediction, d=denoise: guidance.zero(d, NULL, scale, path, prediction),
    "apg": lambda scale, path, prediction, d=denoise: guidance.apg(
        d, NULL, scale, path, prediction, eta=0.3, radius=0.7
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", ["x0", "flow", "v"])
def test_scale_1_is_conditional_and_a_learned_variance_is_that_of_the_conditional_pass(inputs, kind, prediction):
    path = Cosine()
    np.testing.assert_allclose(KINDS[kind](1.0, path, prediction)(*inputs), denoise(*inputs), rtol=1e-4, atol=1e-4)
    guided = KINDS[kind](2.0, path, prediction, learned)(*inputs)
    np.testing.assert_array_equal(guided.v, learned(*inputs).v)
    np.testing.assert_allclose(guided.pred, KINDS[kind](2.0, path, prediction)(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_scales_may_be_functions_and_one_per_example(inputs, kind):
    """An interval: outside it the conditional prediction. And each example by itself, whatever its neighbours."""
    xt, t, y = inputs
    path, scales = Linear(), jnp.array([1.5, 2.0, 3.0, 4.0])
    inside = KINDS[kind](guide.interval(2.0, 0.3, 0.7), path, "x0")(xt, t, y)
    whole, plain = KINDS[kind](2.0, path, "x0")(xt, t, y), denoise(xt, t, y)
    np.testing.assert_allclose(inside, jnp.concatenate([plain[:1], whole[1:3], plain[3:]]), atol=1e-5)
    each = KINDS[kind](scales, path, "x0")(xt, t, y)
    for i in range(4):
        alone = KINDS[kind](float(scales[i]), path, "x0")(xt[i : i + 1], t[i : i + 1], y[i : i + 1])
        np.testing.assert_allclose(each[i], alone[0], atol=1e-5)


def test_rescaling_is_the_papers_formula_and_gives_the_conditional_deviation(inputs, pair):
    positive, negative = pair
    guided = negative + 3.0 * (positive - negative)
    axes, keep = (1, 2), {"keepdims": True}
    rescaled = guided * positive.std(axes, **keep) / guided.std(axes, **keep)
    found = guidance.rescale(denoise, NULL, 3.0, phi=0.7)(*inputs)
    np.testing.assert_allclose(found, 0.7 * rescaled + 0.3 * guided, rtol=1e-4, atol=1e-5)
    whole = np.asarray(guidance.rescale(denoise, NULL, 3.0, phi=1.0)(*inputs))
    np.testing.assert_allclose(whole.std(axes), positive.std(axes), rtol=1e-4)
    np.testing.assert_allclose(
        guidance.rescale(denoise, NULL, 3.0, phi=0.0)(*inputs),
        guide.classifier_free(denoise, NULL, 3.0)(*inputs),
        atol=1e-5,
    )


def test_cfg_zero_is_the_papers_formula_on_velocities(inputs, pair):
    positive, negative = pair
    fitted = (positive * negative).sum((1, 2)) / (negative**2).sum((1, 2))
    fitted = fitted[:, None, None]
    expected = (1 - 2.5) * fitted * negative + 2.5 * positive
    found = guidance.zero(denoise, NULL, 2.5, Linear(), "flow")(*inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    # The fit leaves no part of the conditional velocity along the unconditional one.
    np.testing.assert_allclose(((positive - fitted * negative) * negative).sum((1, 2)), 0, atol=1e-9)
    # A network that predicts x0 is guided in its velocity too.
    other = convert(
        guidance.zero(convert(denoise, Linear(), "flow", "x0"), NULL, 2.5, Linear(), "x0"), Linear(), "x0", "flow"
    )
    np.testing.assert_allclose(other(*inputs), expected, rtol=1e-3, atol=1e-4)
    # Where the unconditional velocity is a multiple of the conditional one there is nothing to guide.
    parallel = lambda xt, t, y: xt * (1 + y[:, None, None])  # noqa: E731
    np.testing.assert_allclose(
        guidance.zero(parallel, NULL, 5.0, Linear(), "flow")(*inputs), parallel(*inputs), rtol=1e-4
    )


@pytest.mark.parametrize("prediction", ["x0", "flow"])
def test_cfg_zero_stands_still_in_the_first_steps(key, inputs, prediction):
    """At times above that of step 2 the velocity is 0: two steps return the noise itself."""
    xt, _, y = inputs
    grid = uniform_grid(5)
    guided = guidance.zero(denoise, NULL, 2.0, Linear(), prediction, still_above=grid[2])
    run = partial(sample, key, guided, Linear(), xt, y=y, prediction=prediction)
    np.testing.assert_allclose(run(times=grid[:3]), xt, atol=1e-6)
    assert np.abs(run(times=grid[:4]) - xt).max() > 0.01


def published_apg(c, u, w, eta, radius, momentum=0.0, before=0.0):
    """Sadat et al. 2024, algorithm 1, of one example in NumPy; also the running average."""
    average = c - u + momentum * before
    difference = average
    if radius is not None:
        difference = difference * min(1.0, radius / np.linalg.norm(difference))
    unit = c / np.linalg.norm(c)
    parallel = (difference * unit).sum() * unit
    return c + (w - 1) * (difference - parallel + eta * parallel), average


@pytest.mark.parametrize(("eta", "radius"), [(0.0, None), (0.4, 0.5), (1.0, 100.0)])
def test_apg_is_the_papers_algorithm(inputs, pair, eta, radius):
    found = guidance.apg(denoise, NULL, 4.0, Linear(), "x0", eta=eta, radius=radius)(*inputs)
    expected = np.stack([published_apg(c, u, 4.0, eta, radius)[0] for c, u in zip(*pair, strict=True)])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    if eta == 1.0:
        np.testing.assert_allclose(found, guide.classifier_free(denoise, NULL, 4.0)(*inputs), rtol=1e-4, atol=1e-5)
    # In x0, whatever the network predicts.
    other = convert(
        guidance.apg(convert(denoise, Linear(), "x0", "v"), NULL, 4.0, Linear(), "v", eta=eta, radius=radius),
        Linear(),
        "v",
        "x0",
    )
    np.testing.assert_allclose(other(*inputs), expected, rtol=1e-3, atol=1e-4)


def test_apg_changes_the_prediction_across_itself_and_no_further_than_the_radius(inputs, pair):
    positive, _ = pair
    change = np.asarray(guidance.apg(denoise, NULL, 3.0, Linear(), "x0", radius=0.5)(*inputs)) - positive
    np.testing.assert_allclose((change * positive).sum((1, 2)), 0, atol=1e-5)
    assert (np.linalg.norm(change.reshape(4, -1), axis=1) <= 2 * 0.5 + 1e-5).all()
    nothing = lambda xt, t, y: jnp.zeros_like(xt)  # noqa: E731
    assert (guidance.apg(nothing, NULL, 3.0, Linear(), "x0", radius=0.5)(*inputs) == 0).all()


def test_momentum_is_carried_from_step_to_step(key, inputs):
    """DDIM with the paper's running average, in NumPy, for labels of each example and a scale of each."""
    xt, _, y = inputs
    path, grid, options = Linear(), uniform_grid(5), {"eta": 0.2, "radius": 1.5}
    scales = np.array([2.0, 3.0, 4.0, 1.0])
    x, before = np.float64(xt), np.zeros(xt.shape)
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        times = jnp.full(4, t, jnp.float32)
        c, u = (np.float64(denoise(jnp.asarray(x, jnp.float32), times, n)) for n in (y, jnp.full_like(y, NULL)))
        made = [published_apg(c[i], u[i], scales[i], momentum=-0.6, before=before[i], **options) for i in range(4)]
        x0, before = (np.stack(each) for each in zip(*made, strict=True))
        x = (1 - s) * x0 + s * (x - (1 - t) * x0) / t
    guided = guidance.apg_momentum(
        ddim(), denoise, NULL, jnp.asarray(scales, jnp.float32), "x0", momentum=-0.6, **options
    )
    found = sample(key, denoise, path, xt, grid, y, prediction="x0", sampler=guided)
    np.testing.assert_allclose(found, x, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("make", [ddim, heun, dpmpp_2m])
def test_without_momentum_the_wrapped_sampler_is_apg(key, inputs, make):
    xt, _, y = inputs
    run = partial(sample, key, path=Cosine(), x1=xt, times=uniform_grid(4, 0.95), y=y, prediction="v")
    options = {"eta": 0.2, "radius": 0.8}
    wrapped = guidance.apg_momentum(make(), denoise, NULL, 3.0, "v", momentum=0.0, **options)
    found = jax.jit(lambda: run(denoise, sampler=wrapped))()
    expected = run(guidance.apg(denoise, NULL, 3.0, Cosine(), "v", **options), sampler=make())
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    moved = guidance.apg_momentum(make(), denoise, NULL, 3.0, "v", momentum=-0.75, **options)
    assert np.abs(run(denoise, sampler=moved) - expected).max() > 0.01


def test_momentum_guides_a_sampler_that_differentiates(key, inputs):
    """DPS of no effect, whose evaluations have a gradient taken, leaves the guided sampler as it is."""
    xt, _, y = inputs
    run = partial(sample, key, denoise, Linear(), xt, uniform_grid(4, 0.95), y, prediction="x0")
    guided = lambda sampler: guidance.apg_momentum(sampler, denoise, NULL, 3.0, "x0")  # noqa: E731
    same = guided(edit.dps(ddim(), lambda x: x, jnp.zeros_like(xt), 0.0))
    np.testing.assert_allclose(run(sampler=same), run(sampler=guided(ddim())), rtol=1e-5, atol=1e-5)


def test_both_passes_of_momentum_see_the_type_of_the_images_and_need_a_condition(key, inputs):
    xt, _, y = inputs
    seen = set()
    network = lambda xt, t, y: seen.add(xt.dtype) or 0.5 * xt  # noqa: E731
    guided = guidance.apg_momentum(ddim(), network, NULL, 3.0, "x0")
    run = partial(sample, key, network, Linear(), xt.astype(jnp.bfloat16), uniform_grid(3), prediction="x0")
    assert run(y, sampler=guided).dtype == jnp.bfloat16 and seen == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(ValueError, match="null must have the structure of the condition y"):
        run(None, sampler=guided)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("path", [Linear(), Cosine()], ids=["linear", "cosine"])
def test_cfg_plus_plus_is_the_papers_two_lines(key, inputs, path, scale):
    """x0_hat with the guided noise, and noised again with the unconditional one; on uneven times."""
    xt, _, y = inputs
    grid = shifted_grid(6, 2.0, 0.97)
    x = np.float64(xt)
    with jax.enable_x64(True):
        for t, s in zip(grid[:-1], grid[1:], strict=True):
            (alpha, sigma), (alpha_s, sigma_s) = ([float(a) for a in path(jnp.asarray(now))] for now in (t, s))
            c, u = (np.asarray(denoise(jnp.asarray(x), jnp.full(4, t), n)) for n in (y, jnp.full_like(y, NULL)))
            x0 = (x - sigma * (u + scale * (c - u))) / alpha
            x = alpha_s * x0 + sigma_s * u
        guided = guide.classifier_free(denoise, NULL, guidance.plus_plus(scale, path, grid))
        found = sample(key, guided, path, jnp.asarray(np.float64(xt)), grid, y, prediction="eps")
    np.testing.assert_allclose(found, x, rtol=1e-9, atol=1e-9)


def test_cfg_plus_plus_from_where_there_is_no_signal(inputs):
    """There, and on the step to the data, its scale is w itself; in short steps it is large."""
    scale = guidance.plus_plus(0.6, Linear(), np.array([1.0, 0.5, 0.45, 0.0]))
    np.testing.assert_allclose(scale(jnp.array([1.0, 0.45])), 0.6, rtol=1e-5)
    np.testing.assert_allclose(scale(jnp.array([0.5])), 0.6 * 0.55 * 0.5 / (0.55 * 0.5 - 0.5 * 0.45), rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: guidance.rescale(denoise, NULL, 2.0, phi=1.5), r"phi=1.5 must lie in \[0, 1\]"),
        (lambda: guidance.apg(denoise, NULL, 2.0, Linear(), "x0", radius=0.0), "radius=0.0 must be positive"),
        (
            lambda: guidance.apg_momentum(ddim(), denoise, NULL, 2.0, "x0", momentum=-1.0),
            "momentum=-1.0 must lie between",
        ),
        (lambda: guidance.plus_plus(0.5, Linear(), [0.0, 1.0]), r"at least two falling values, got shape \(2,\)"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
