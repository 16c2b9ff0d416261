import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.experts import boundaries, expert_of, expert_times, experts
from diffusion.grids import respaced_grid, uniform_grid
from diffusion.guide import classifier_free
from diffusion.predict import WithVariance
from diffusion.process import VP, Cosine, Linear, linear_betas
from diffusion.sample import sample

CHAIN = respaced_grid("", 1000)


def constant(value, calls=None):
    """A denoiser that predicts `value`, and notes when it runs."""

    def denoise(xt, t, y=None):
        if calls is not None:
            jax.debug.callback(lambda: calls.append(value))
        return jnp.full_like(xt, value)

    return denoise


def test_boundary_of_the_published_experts():
    """Splitting DDPM's chain at SNR 1/4 gives the noisy expert the steps from index 396 on."""
    path = VP(linear_betas(1000))
    index = np.round(CHAIN[:-1] * 1000).astype(int) - 1
    owner = np.asarray(expert_of(boundaries(path, [0.25]), jnp.asarray(CHAIN[:-1])))
    assert index[owner == 1].min() == 396 and index[owner == 0].max() == 395


@pytest.mark.slow
@pytest.mark.parametrize("path", [Linear(), Cosine(), VP(linear_betas(1000))])
@pytest.mark.parametrize("splits", [[0.25], [4.0, 1.0, 0.1]])
def test_every_time_belongs_to_the_expert_of_its_snr(path, splits):
    t = jnp.linspace(0, 1, 4001)
    alpha, sigma = (np.asarray(a, np.float64) for a in path(t))
    owner = np.asarray(expert_of(boundaries(path, splits), t))
    expected = (alpha[:, None] ** 2 <= np.array(splits) * sigma[:, None] ** 2).sum(1)
    assert (owner != expected).sum() <= len(splits)  # a time may lie on a boundary to rounding
    assert owner[0] == 0 and owner[-1] == len(splits) and (np.diff(owner) >= 0).all()


def test_clean_data_and_pure_noise_have_experts():
    """SNR infinity and SNR 0, which a chain with zero terminal SNR reaches."""
    pick = experts([constant(0.0), constant(1.0)], boundaries(Linear(), [1.0]))
    np.testing.assert_array_equal(pick(jnp.ones((2, 3)), jnp.array([0.0, 1.0])), [[0] * 3, [1] * 3])


@pytest.mark.parametrize("spec", [None, "", "25"])
def test_training_times_are_those_that_sampling_gives_the_same_expert(spec):
    path, chain = VP(linear_betas(1000)), spec if spec is None else respaced_grid(spec, 1000)
    bounds = boundaries(path, [9.0, 0.25])
    pick = experts([constant(float(k)) for k in range(3)], bounds)
    for k in range(3):
        t = expert_times(bounds, k, chain)(jax.random.key(k), 5000)
        np.testing.assert_array_equal(pick(jnp.zeros((5000, 1)), t)[:, 0], k)
        if chain is not None:
            assert np.isin(np.asarray(t), chain.astype(np.float32)).all()


def test_training_times_fill_an_experts_range():
    bounds = boundaries(Linear(), [4.0, 0.25])  # t = 1/3 and 2/3
    np.testing.assert_allclose(bounds, [1 / 3, 2 / 3], rtol=1e-6)
    t = expert_times(bounds, 1)(jax.random.key(0), 20000)
    np.testing.assert_allclose([t.min(), t.mean(), t.max()], [1 / 3, 0.5, 2 / 3], atol=3e-3)
    own = expert_times(bounds, 2, respaced_grid("10", 10))(jax.random.key(0), 4000)
    np.testing.assert_array_equal(np.unique(own), np.array([0.7, 0.8, 0.9, 1.0], np.float32))


def test_a_boundary_belongs_to_the_noisier_expert():
    bounds = boundaries(Linear(), [4.0, 0.25])
    assert expert_of(bounds, jnp.asarray(bounds)).tolist() == [1, 2]
    assert expert_of(bounds, jnp.nextafter(jnp.asarray(bounds), 0.0)).tolist() == [0, 1]


def test_times_at_an_experts_edge_stay_its_own(monkeypatch):
    """Where rounding would carry the largest sample over the boundary: in a narrow range far from 0."""
    largest = lambda key, n: jnp.full((n,), np.nextafter(np.float32(1), np.float32(0)))  # noqa: E731
    monkeypatch.setattr("diffusion.experts.uniform_times", largest)
    bounds = boundaries(Linear(), [(0.4 / 0.6) ** 2, (0.39 / 0.61) ** 2])
    for k in range(3):
        assert expert_of(bounds, expert_times(bounds, k)(jax.random.key(0), 1))[0] == k


def test_experts_of_a_variance_exploding_path():
    """Time is sigma up to 80: SNR = 1 / t^2."""
    exploding, span = lambda t: (jnp.ones_like(t), t), (0.0, 80.0)
    bounds = boundaries(exploding, [1.0, 0.01], span)
    np.testing.assert_allclose(bounds, [1, 10], rtol=1e-6)
    for k, (low, high) in enumerate([(0, 1), (1, 10), (10, 80)]):
        t = expert_times(bounds, k, span=span)(jax.random.key(k), 2000)
        assert (expert_of(bounds, t) == k).all()
        np.testing.assert_allclose([t.min(), t.max()], [low, high], atol=0.01 * high)
    with pytest.raises(ValueError, match=r"snr_splits=\[0.0001\]: .* stays above 0.0001 up to t=80"):
        boundaries(exploding, [1e-4], span)


def test_more_than_ten_experts():
    splits = 2.0 ** np.arange(6, -7, -1)
    bounds = boundaries(Cosine(), splits)
    t = expert_times(bounds, 12)(jax.random.key(0), 100)
    assert (expert_of(bounds, t) == 12).all()


def test_one_expert_runs_at_a_time_in_sampling(key):
    calls = []
    pick = experts([constant(0.1, calls), constant(0.2, calls)], boundaries(Linear(), [1.0]))
    draw = jax.jit(lambda x: sample(key, pick, Linear(), x, uniform_grid(8), prediction="x0"))
    x0 = jax.block_until_ready(draw(jnp.ones((3, 2))))
    jax.effects_barrier()
    # t = 1, 7/8, .. 1/2 are noise, SNR <= 1; then 3/8, 1/4, 1/8.
    assert calls == [0.2] * 5 + [0.1] * 3
    np.testing.assert_allclose(x0, 0.1, atol=1e-6)


def test_a_batch_with_several_times_runs_every_expert_for_its_own(key):
    calls = []
    pick = experts([constant(float(k), calls) for k in range(3)], boundaries(Linear(), [4.0, 0.25]))
    t = jnp.array([0.1, 0.9, 0.2, 0.8])
    out = jax.jit(pick)(jnp.zeros((4, 2, 1)), t)
    jax.effects_barrier()
    np.testing.assert_array_equal(out[:, 0, 0], [0, 2, 0, 2])
    assert sorted(calls) == [0, 2]


@pytest.mark.slow
def test_experts_of_one_structure_with_labels_guidance_and_variance(key):
    """Parameters stacked on a first axis, as training the experts leaves them."""
    stack = {"w": jnp.array([1.0, 10.0])}

    def apply(params, xt, t, y):
        return WithVariance(params["w"] * xt * y.reshape(-1, 1), xt + params["w"])

    def denoiser(k):
        params = jax.tree.map(lambda p: p[k], stack)
        return lambda xt, t, y: apply(params, xt, t, y)

    pick = experts([denoiser(0), denoiser(1)], boundaries(Linear(), [1.0]))
    xt, t, y = jnp.ones((2, 3)), jnp.array([0.25, 0.75]), jnp.array([2, 3])
    guided = classifier_free(pick, 0, 2.0)(xt, t, y)
    np.testing.assert_allclose(guided.pred[:, 0], [4, 60])
    np.testing.assert_allclose(guided.v[:, 0], [2, 11])


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([0.25, 1.0], "must fall"),
        ([1.0, 1.0], "must fall"),
        ([], "one or more positive"),
        ([1.0, 0.0], "positive"),
        ([np.inf], "positive"),
        ([1e-9], "stays above 1e-09"),
        ([1.0 + 1e-9, 1.0], "two thresholds are reached at the same time"),
    ],
)
def test_impossible_splits_are_refused(splits, message):
    with pytest.raises(ValueError, match=f"snr_splits=.*{message}"):
        boundaries(VP(linear_betas(1000)), splits)


def test_experts_without_times_and_wrong_numbers_are_refused():
    bounds = boundaries(VP(linear_betas(1000)), [1e9, 0.25])
    with pytest.raises(ValueError, match="expert=0 has none of the 1000 times"):
        expert_times(bounds, 0, CHAIN)
    with pytest.raises(ValueError, match=r"expert=3 must lie in 0..2"):
        expert_times(bounds, 3)
    with pytest.raises(ValueError, match="2 thresholds need 3 experts, not 2"):
        experts([constant(0.0)] * 2, bounds)
