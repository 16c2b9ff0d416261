"""Images larger than the training's by overlapping windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.grids import uniform_grid
from diffusion.methods.windows import windows
from diffusion.models.vit import vit
from diffusion.predict import WithVariance
from diffusion.process import Linear
from diffusion.sample import ddim, sample

SIZES = {1: ((8,), (4,), (20,)), 2: ((4, 6), (2, 3), (8, 12)), 3: ((4, 2, 4), (2, 1, 4), (6, 3, 8))}


def mixing(xt, t, y=None):
    """A denoiser whose every output depends on the place and on all values of its window, on t and on y."""
    total = jnp.sin(xt.sum(tuple(range(1, xt.ndim)), keepdims=True))
    place = jnp.arange(xt[0].size, dtype=xt.dtype).reshape(xt[:1].shape)
    label = 0 if y is None else y.reshape((-1,) + (1,) * (xt.ndim - 1))
    return xt**2 + place * total + t.reshape(total.shape) + label


@pytest.mark.slow
@pytest.mark.parametrize("rank", SIZES)
def test_at_the_size_of_the_training_it_is_the_denoiser_bit_for_bit(key, rank):
    size, stride, _ = SIZES[rank]
    xt, t, y = jax.random.normal(key, (3, *size, 2)), jnp.array([0.1, 0.5, 0.9]), jnp.arange(3.0)
    np.testing.assert_array_equal(windows(mixing, size, stride)(xt, t, y), mixing(xt, t, y))


@pytest.mark.slow
def test_a_network_and_a_whole_sampling_are_the_same_bit_for_bit_at_the_size_of_the_training(key):
    model = vit(patch_size=4, width=8, depth=1, heads=2, num_classes=3)
    xt, t, y = jax.random.normal(key, (2, 8, 8, 1)), jnp.full(2, 0.5), jnp.array([0, 2])
    params = jax.tree.map(lambda p: p + 0.1, model.init(jax.random.key(1), xt, t, y))
    denoisers = [lambda xt, t, y: model.apply(params, xt, t, y)]
    denoisers.append(windows(denoisers[0], (8, 8), 4))
    x0 = [sample(jax.random.key(2), d, Linear(), xt, uniform_grid(3), y, prediction="x0") for d in denoisers]
    np.testing.assert_array_equal(*x0)


@pytest.mark.parametrize("rank", SIZES)
def test_windows_are_averaged_where_they_overlap(key, rank):
    """Against a loop over windows."""
    size, stride, whole = SIZES[rank]
    xt, t, y = jax.random.normal(key, (2, *whole, 2)), jnp.array([0.3, 0.6]), jnp.array([0.0, 5.0])
    total, count = np.zeros(xt.shape), np.zeros(xt.shape)
    for start in np.ndindex(*((n - p) // s + 1 for n, p, s in zip(whole, size, stride, strict=True))):
        cut = (slice(None), *(slice(i * s, i * s + p) for i, s, p in zip(start, stride, size, strict=True)))
        total[cut] += mixing(xt[cut], t, y)
        count[cut] += 1
    np.testing.assert_allclose(windows(mixing, size, stride)(xt, t, y), total / count, rtol=2e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rank", SIZES)
def test_a_shift_by_the_stride_shifts_what_does_not_see_the_border(key, rank):
    size, stride, whole = SIZES[rank]
    longer = (whole[0] + stride[0], *whole[1:])
    xt, t = jax.random.normal(key, (2, *longer, 1)), jnp.array([0.3, 0.6])
    denoise = windows(mixing, size, stride)
    first, second = denoise(xt[:, : whole[0]], t), denoise(xt[:, stride[0] :], t)
    border = size[0]
    np.testing.assert_allclose(
        first[:, border + stride[0] : -border or None][:, : whole[0] - 2 * border],
        second[:, border : whole[0] - border - stride[0]],
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.slow
def test_an_image_that_repeats_at_the_stride_stays_one(key):
    """What is independent between windows of one content stays the same for all of them."""
    tile = jax.random.normal(key, (1, 2, 1))
    found = windows(mixing, (8,), 2)(jnp.tile(tile, (1, 12, 1)), jnp.array([0.5]))[0, 6:-6, 0].reshape(-1, 2)
    np.testing.assert_allclose(found, jnp.broadcast_to(found[:1], found.shape), rtol=1e-5)


@pytest.mark.slow
def test_a_denoiser_without_context_is_itself_at_any_size(key):
    xt, t = jax.random.normal(key, (2, 11, 9, 3)), jnp.array([0.3, 0.6])
    denoise = lambda xt, t, y=None: jnp.tanh(xt) * t[:, None, None, None]  # noqa: E731
    np.testing.assert_allclose(windows(denoise, (5, 3), (3, 2))(xt, t), denoise(xt, t), rtol=1e-6)


def test_conditions_learned_variances_and_channels_of_a_condition_pass(key):
    xt, t = jax.random.normal(key, (2, 6, 4)), jnp.array([0.3, 0.6])
    y = {"text": jnp.arange(6.0).reshape(2, 3)}

    def denoise(xt, t, y):
        assert xt.shape == (4, 4, 4) and y["text"].shape == (4, 3)
        return WithVariance(xt[..., :1] + y["text"][:, :1, None], 2 * xt[..., 1:2])

    output = windows(denoise, (4,), 2)(xt, t, y)
    np.testing.assert_allclose(output.pred, xt[..., :1] + y["text"][:, :1, None], rtol=1e-6)
    np.testing.assert_allclose(output.v, 2 * xt[..., 1:2], rtol=1e-6)


@pytest.mark.slow
def test_the_mean_step_of_all_windows_is_the_step_of_the_mean_prediction(key):
    """As MultiDiffusion states it: one DDIM step of each window, averaged."""
    path, t = Linear(), jnp.array([0.7])
    xt = jax.random.normal(key, (1, 12, 1))

    def step(denoise, xt):
        x0 = denoise(xt, t)
        return sample(jax.random.key(0), denoise, path, xt, np.array([0.7, 0.6]), prediction="x0", sampler=ddim()), x0

    whole, _ = step(windows(mixing, (8,), 2), xt)
    parts = [step(mixing, xt[:, i : i + 8])[0] for i in (0, 2, 4)]
    total = sum(jnp.zeros(xt.shape).at[:, i : i + 8].add(part) for i, part in zip((0, 2, 4), parts, strict=True))
    count = sum(jnp.zeros(xt.shape).at[:, i : i + 8].add(1) for i in (0, 2, 4))
    np.testing.assert_allclose(whole, total / count, rtol=1e-5, atol=1e-5)


def test_windows_that_do_not_tile_are_refused(key):
    with pytest.raises(TypeError, match=r"size=4 must be a sequence of integers, .* as \(4, 4\)"):
        windows(mixing, 4, 2)
    with pytest.raises(ValueError, match="patch_size=8 with stride=3 does not tile spatial axis 0 of length 12"):
        windows(mixing, (8,), 3)(jnp.zeros((1, 12, 1)), jnp.zeros(1))
