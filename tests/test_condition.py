"""Smaller pictures as conditions: the resizing of other programs, and a denoiser of xt alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import guide, superres
from diffusion.predict import WithVariance


def test_sizes_change_as_in_pytorch():
    functional = pytest.importorskip("torch.nn.functional")
    from torch import from_numpy

    x = np.random.default_rng(0).normal(size=(2, 3, 12, 8)).astype(np.float32)
    ours = jnp.moveaxis(jnp.asarray(x), 1, -1)
    small = functional.interpolate(from_numpy(x), (4, 4), mode="area")
    np.testing.assert_allclose(jnp.moveaxis(superres.shrink(ours, (4, 4)), -1, 1), small, atol=1e-6)
    large = functional.interpolate(from_numpy(x), (24, 24), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(jnp.moveaxis(superres.enlarge(ours, (24, 24)), -1, 1), large, atol=1e-5)


def test_planes_tell_how_noisy_they_are():
    low = jax.random.normal(jax.random.key(0), (2, 2, 3, 1))
    plain, told = superres.planes(low, (4, 6)), superres.planes(low, (4, 6), jnp.array([0.0, 0.5]))
    assert (plain.shape, told.shape) == ((2, 4, 6, 1), (2, 4, 6, 2))
    np.testing.assert_array_equal(told[..., :1], plain)
    np.testing.assert_array_equal(told[..., 1], np.broadcast_to([[[0.0]], [[0.5]]], (2, 4, 6)))


def test_a_conditioned_denoiser_sees_the_planes_of_its_own_picture():
    planes = jnp.arange(2.0)[:, None, None, None] * jnp.ones((2, 4, 4, 1))

    def network(x, t, y):
        return WithVariance(x[..., :1] + x[..., 1:], x[..., 1:])

    output = superres.conditioned(network, planes)(10 * jnp.ones((2, 4, 4, 1)), jnp.zeros(2), None)
    np.testing.assert_array_equal(output.pred[:, 0, 0, 0], [10, 11])
    np.testing.assert_array_equal(output.v[:, 0, 0, 0], [0, 1])


def test_guidance_keeps_every_picture_with_its_planes():
    planes = jnp.arange(3.0)[:, None, None, None] * jnp.ones((3, 2, 2, 1))

    def network(x, t, y):
        return x[..., 1:] + 100.0 * y[:, None, None, None]

    guided = guide.classifier_free(superres.conditioned(network, planes), 1, 3.0)
    np.testing.assert_array_equal(guided(planes, jnp.zeros(3), jnp.zeros(3, int))[:, 0, 0, 0], [-200, -199, -198])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"size=\(3, 4\) must divide the pictures' \(4, 4\)"):
        superres.shrink(jnp.zeros((1, 4, 4, 1)), (3, 4))
    denoise = superres.conditioned(lambda x, t, y: x, jnp.zeros((2, 4, 4, 1)))
    with pytest.raises(ValueError, match="a batch of 3 is no multiple of the 2 pictures"):
        denoise(jnp.zeros((3, 4, 4, 1)), jnp.zeros(3))
