import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import guide
from diffusion.grids import respaced_grid
from diffusion.predict import WithVariance, convert, decode, target
from diffusion.process import VP, Cosine, Linear, coefficients, linear_betas
from diffusion.sample import sample

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


@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
def test_guiding_in_eps_space_is_guiding_in_the_predictions_own(inputs, prediction):
    """Patch Diffusion converts to eps, guides, and converts back."""
    path = Cosine()
    in_eps = guide.classifier_free(convert(denoise, path, prediction, "eps"), NULL, 3.0)
    twice = convert(in_eps, path, "eps", prediction)(*inputs)
    np.testing.assert_allclose(twice, guide.classifier_free(denoise, NULL, 3.0)(*inputs), rtol=1e-4, atol=1e-4)


def learned(xt, t, y):
    return WithVariance(denoise(xt, t, y), xt + y[:, None])


@pytest.mark.parametrize("scale", [1.0, 2.5, lambda t: 1 + t])
def test_a_learned_variance_is_that_of_the_conditional_pass(inputs, scale):
    xt, t, y = inputs
    guided = guide.classifier_free(learned, NULL, scale)(xt, t, y)
    np.testing.assert_array_equal(guided.pred, guide.classifier_free(denoise, NULL, scale)(xt, t, y))
    np.testing.assert_array_equal(guided.v, learned(xt, t, y).v)


def test_guidance_on_a_respaced_chain_sees_the_original_indices(inputs):
    """Also where the network's clock is not whole: indices rescaled to 1000, as on a chain of 300."""
    seen = []

    def clocked(xt, t, y):
        jax.debug.callback(lambda index: seen.append(index), (300 * t - 1) * 1000 / 300)
        return denoise(xt, t, y)

    xt, _, y = inputs
    guided = guide.classifier_free(clocked, NULL, 1.5)
    chain = respaced_grid("4", 300)
    x0 = sample(jax.random.key(1), guided, VP(linear_betas(300)), xt, chain, y, prediction="eps")
    jax.effects_barrier()
    expected = (np.round(chain[:-1] * 300) - 1) * 1000 / 300
    np.testing.assert_allclose(np.stack(seen), np.repeat(expected[:, None], 2 * len(y), 1), atol=1e-2)
    assert np.isfinite(x0).all()


def test_interval_guides_inside_only(inputs):
    xt, t, y = inputs
    guided = guide.classifier_free(denoise, NULL, guide.interval(2.0, 0.3, 0.7))(xt, t, y)
    full, plain = guide.classifier_free(denoise, NULL, 2.0)(xt, t, y), denoise(xt, t, y)
    np.testing.assert_allclose(guided[1:3], full[1:3], atol=1e-6)
    np.testing.assert_allclose(guided[jnp.array([0, 3])], plain[jnp.array([0, 3])], atol=1e-6)


def test_guidance_without_a_condition_is_refused(inputs):
    for scale in (0.0, 1.0, 2.0):
        with pytest.raises(ValueError, match="needs a condition y"):
            guide.classifier_free(denoise, NULL, scale)(inputs[0], inputs[1], None)


def test_impossible_intervals_are_refused():
    with pytest.raises(ValueError, match=r"\[0.5, 0.5\]: its low end must be below"):
        guide.interval(2.0, 0.5, 0.5)


def test_scales_and_ends_of_an_interval_may_be_traced_and_one_per_example(inputs):
    xt, t, y = inputs

    @jax.jit
    def guided(scale, low, high):
        return guide.classifier_free(denoise, NULL, guide.interval(scale, low, high))(xt, t, y)

    scales, low, high = jnp.array([0.0, 1.5, 3.0, 2.0]), jnp.array([0.0, 0.5, 0.5, 0.5]), jnp.full(4, 0.95)
    each = guided(scales, low, high)
    factor = [0.0, 1.0, 3.0, 2.0]  # the second time, 0.4, lies outside
    for i in range(4):
        alone = guide.classifier_free(denoise, NULL, factor[i])(xt[i : i + 1], t[i : i + 1], y[i : i + 1])
        np.testing.assert_allclose(each[i], alone[0], atol=1e-5)
    np.testing.assert_allclose(
        guided(2.0, 0.3, 0.7), guide.classifier_free(denoise, NULL, guide.interval(2.0, 0.3, 0.7))(xt, t, y), atol=1e-6
    )
    with pytest.raises(ValueError, match=r"one per example \(4,\), not \(3,\)"):
        guide.classifier_free(denoise, NULL, jnp.ones(3))(xt, t, y)


def test_an_interval_in_sigma(inputs):
    """Times of a variance-exploding path go beyond 1; a scale that is a function is guided inside as well."""
    scale = guide.interval(lambda t: t, 0.3, 30.0)
    np.testing.assert_array_equal(scale(jnp.array([0.1, 0.3, 20.0, 80.0])), np.float32([1, 0.3, 20, 1]))


def test_any_combination_of_the_two_predictions_is_a_guidance(inputs):
    """`paired` with a combination of one's own: a mean, and one that depends on the time."""
    xt, t, y = inputs
    cond, uncond = denoise(xt, t, y), denoise(xt, t, jnp.full_like(y, NULL))
    mean = guide.paired(learned, NULL, lambda a, b, t: (a + b) / 2)(xt, t, y)
    np.testing.assert_allclose(mean.pred, (cond + uncond) / 2, atol=1e-6)
    np.testing.assert_array_equal(mean.v, learned(xt, t, y).v)
    timed = guide.paired(denoise, NULL, lambda a, b, t: jnp.where(t[:, None] > 0.5, a, b))(xt, t, y)
    np.testing.assert_allclose(timed, jnp.concatenate([uncond[:2], cond[2:]]), atol=1e-6)


@pytest.mark.parametrize("scale", [2.5, jnp.array([0.0, 1.0, 2.0, 3.0]), lambda t: 1 + t])
def test_autoguidance_extrapolates_from_the_weak_to_the_strong(inputs, scale):
    xt, t, y = inputs
    weak = lambda xt, t, y: 0.5 * xt  # noqa: E731
    factor = scale(t) if callable(scale) else scale
    factor = factor if jnp.ndim(factor) == 0 else factor[:, None]
    guided = guide.extrapolate(learned, weak, scale)(xt, t, y)
    np.testing.assert_allclose(guided.pred, 0.5 * xt + factor * (denoise(xt, t, y) - 0.5 * xt), atol=1e-5)
    np.testing.assert_array_equal(guided.v, learned(xt, t, y).v)


def test_conditions_are_dropped_at_the_given_rate_and_otherwise_kept(key):
    y = jnp.arange(20000) % 10
    a, b, c = jax.random.split(key, 3)
    dropped = guide.drop_condition(a, y, 10, 0.1)
    np.testing.assert_allclose((dropped == 10).mean(), 0.1, atol=0.01)
    np.testing.assert_array_equal(dropped[dropped != 10], y[dropped != 10])
    np.testing.assert_array_equal(guide.drop_condition(b, y, 10, 0.0), y)
    np.testing.assert_array_equal(guide.drop_condition(c, y, 10, 1.0), jnp.full_like(y, 10))
    with pytest.raises(ValueError, match="rate=1.5"):
        guide.drop_condition(jax.random.key(1), y, 10, 1.5)


TEXT = {"tokens": jnp.arange(24.0).reshape(4, 3, 2) + 1, "mask": jnp.ones((4, 3), bool)}
NO_TEXT = {"tokens": jnp.zeros(2), "mask": jnp.array([True, False, False])}


def test_whole_rows_of_a_condition_are_dropped_in_all_of_its_arrays(key):
    y = jax.tree.map(lambda a: jnp.repeat(a, 200, 0), TEXT)
    dropped = guide.drop_condition(key, y, NO_TEXT, 0.3)
    null = guide.null_like(y, NO_TEXT)
    rows = np.asarray((dropped["tokens"] == 0).all((1, 2)))
    assert 0.2 < rows.mean() < 0.4
    for name in y:
        assert dropped[name].dtype == y[name].dtype
        np.testing.assert_array_equal(dropped[name][rows], null[name][rows])
        np.testing.assert_array_equal(dropped[name][~rows], y[name][~rows])


def test_conditions_of_several_arrays_are_guided(inputs):
    xt, t, _ = inputs

    def network(xt, t, y):
        return xt * t[:, None] + (y["tokens"] * y["mask"][..., None]).sum((1, 2))[:, None]

    null = guide.null_like(TEXT, NO_TEXT)
    expected = network(xt, t, null) + 3 * (network(xt, t, TEXT) - network(xt, t, null))
    np.testing.assert_allclose(guide.classifier_free(network, NO_TEXT, 3.0)(xt, t, TEXT), expected, rtol=1e-5)
    np.testing.assert_array_equal(guide.classifier_free(network, NO_TEXT, 0)(xt, t, TEXT), network(xt, t, null))
    embedding = jnp.arange(20.0).reshape(4, 5)
    plain = lambda xt, t, y: xt + y  # noqa: E731
    guided = guide.classifier_free(plain, jnp.zeros(5), 2.0)(xt, t, embedding)
    np.testing.assert_allclose(guided, xt + 2 * embedding, rtol=1e-5)


@pytest.mark.parametrize(
    ("null", "message"),
    [
        (0, "null must have the structure of the condition y"),
        ({"tokens": jnp.zeros(3), "mask": True}, r"null of shape \(3,\) does not fit .*\(3, 2\)"),
        ({"tokens": 0.0, "mask": jnp.ones((4, 3))}, r"null of shape \(4, 3\) does not fit .*\(3,\)"),
    ],
)
def test_a_null_that_does_not_fit_is_refused(key, null, message):
    with pytest.raises(ValueError, match=message):
        guide.drop_condition(key, TEXT, null, 0.1)


def test_arrays_of_different_batches_are_refused(key):
    with pytest.raises(ValueError, match="must share their first axis"):
        guide.drop_condition(key, (jnp.zeros(3), jnp.zeros(4)), (0, 0), 0.1)


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


@pytest.mark.slow
def test_dynamic_thresholding_matches_diffusers(key):
    torch = pytest.importorskip("torch", reason="diffusers needs torch: pip install 'patch-diffusion[torch]'")
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.995, sample_max_value=1e9)
    x0 = np.array(jax.random.normal(key, (3, 8, 8, 3))) * np.array([0.1, 1.0, 4.0], np.float32).reshape(3, 1, 1, 1)
    theirs = scheduler._threshold_sample(torch.tensor(x0)).numpy()
    fixed = guide.dynamic_threshold(lambda xt, t, y: xt, Cosine(), "x0")(jnp.asarray(x0), jnp.full(3, 0.5))
    np.testing.assert_allclose(fixed, theirs, atol=1e-5)
    np.testing.assert_allclose(fixed[0], x0[0], atol=1e-6)  # nothing there reaches the range's end


def test_dynamic_thresholding_in_another_range(key):
    """In [0, 1] as in [-1, 1], scaled; and noise follows."""
    xt, t = 3 * jax.random.normal(key, (2, 50)), jnp.array([0.3, 0.7])
    here = guide.dynamic_threshold(lambda xt, t, y: (xt + 1) / 2, Linear(), "x0", low=0.0, high=1.0)(xt, t)
    there = guide.dynamic_threshold(lambda xt, t, y: xt, Linear(), "x0")(xt, t)
    np.testing.assert_allclose(2 * here - 1, there, atol=1e-5)
    as_eps = guide.dynamic_threshold(convert(lambda xt, t, y: xt, Linear(), "x0", "eps"), Linear(), "eps")
    np.testing.assert_allclose(convert(as_eps, Linear(), "eps", "x0")(xt, t), there, atol=1e-4)


def test_dynamic_thresholding_has_no_largest_batch():
    """Twelve images of 1024 x 1024: more values than a 24-bit index counts."""
    fix = guide.dynamic_threshold(lambda xt, t, y: xt, Linear(), "x0")
    x = jax.ShapeDtypeStruct((12, 1024, 1024, 3), jnp.float32)
    assert jax.jit(fix).lower(x, jax.ShapeDtypeStruct((12,), jnp.float32)).compile().memory_analysis() is not None


def test_corrections_keep_the_learned_variance(inputs):
    xt, t, y = inputs
    for correct in (guide.clip, guide.dynamic_threshold):
        both, alone = correct(learned, Linear(), "x0")(xt, t, y), correct(denoise, Linear(), "x0")(xt, t, y)
        np.testing.assert_array_equal(both.pred, alone)
        np.testing.assert_array_equal(both.v, learned(xt, t, y).v)


@pytest.mark.parametrize("options", [{"quantile": 0.0}, {"quantile": 1.1}, {"low": 1.0}])
def test_impossible_thresholds_are_refused(options):
    with pytest.raises(ValueError, match="must"):
        guide.dynamic_threshold(denoise, Linear(), "x0", **options)


def test_a_network_of_two_times_is_guided_by_the_first():
    """Images of two rows, so that a factor of shape [B, 2] would broadcast."""
    xt, t = jnp.zeros((2, 2, 2, 1)), jnp.array([[0.9, 0.1], [0.3, 0.2]])

    def denoise(xt, t, y):
        assert t.shape[1:] == (2,)
        return jnp.ones_like(xt) * y[:, None, None, None]

    y = jnp.array([1, 1])
    whole = guide.classifier_free(denoise, 0, jnp.array([2.0, 3.0]))(xt, t, y)
    np.testing.assert_array_equal(whole, jnp.ones_like(xt) * jnp.array([2.0, 3.0])[:, None, None, None])
    inside = guide.classifier_free(denoise, 0, guide.interval(2.0, 0.5, 1.0))(xt, t, y)
    np.testing.assert_array_equal(inside, jnp.ones_like(xt) * jnp.array([2.0, 1.0])[:, None, None, None])


@pytest.mark.parametrize(("y", "null"), [(np.array([1, 2], np.uint8), 256), (jnp.array([1, 2]), 10.7)])
def test_a_null_that_is_no_value_of_the_condition_is_refused(key, y, null):
    with pytest.raises(ValueError, match=f"null={null} cannot be a value of the condition"):
        guide.drop_condition(key, y, null, 0.5)


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match="low=1 must be below high=-1"):
        guide.clip(lambda xt, t, y: xt, Linear(), "x0", low=1, high=-1)
