"""Inception-v3: the numbers of torch-fidelity at five places, TensorFlow 1's resizing, images by themselves, errors.

The weights of the vector are made from the names of the parameters, by the rule in its `config`.
"""

import hashlib
import json
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion.metrics.features import inception
from diffusion.models import inception as network
from diffusion.pretrained import layouts

VECTOR = Path(__file__).parents[1] / "data" / "inception_48x64.npz"
TAPS = {
    "pool_64": "64",
    "pool_192": "192",
    "pool_768": "768",
    "pool": "2048",
    "logits": "logits_unbiased",
}


@pytest.fixture(scope="module")
def vector():
    with np.load(VECTOR) as file:
        return dict(file)


@pytest.fixture(scope="module")
def state(vector):
    """A state dict as the published file has it."""

    def value(name, shape):
        r = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        if len(shape) > 1:
            return r * np.sqrt(2 / np.prod(shape[1:]))
        if name.endswith("running_var"):
            return 1 + 0.1 * np.abs(r)
        return 1 + 0.1 * r if name.endswith("weight") else 0.1 * r

    return {name: value(name, shape).astype(np.float32) for name, shape in json.loads(str(vector["params"]))}


@pytest.fixture(scope="module")
def params(state):
    return jax.device_put(network.from_torch(state))


@pytest.fixture
def small_batches(compiled_once, monkeypatch):
    monkeypatch.setattr(inception, "BATCH_SIZE", 2)


@pytest.mark.slow
def test_every_tap_is_that_of_the_published_program(vector, params, compiled_once):
    found = inception._forward(params, vector["x_nchw"].transpose(0, 2, 3, 1))
    for tap, name in TAPS.items():
        expected = vector[f"out_{name}"]
        assert getattr(found, tap).shape == expected.shape and getattr(found, tap).dtype == np.float32
        assert np.abs(getattr(found, tap) - expected).max() < 1e-5 * np.abs(expected).max(), tap


def test_features_do_not_depend_on_the_other_images(vector, params, small_batches):
    """Nor on the place in the batch; a batch that is not full is filled up."""
    images = vector["x_nchw"].transpose(0, 2, 3, 1)[[1, 0, 1]]
    told = []
    found = inception.inception_features(images, params, told.append)
    assert [x.shape for x in found] == [(3, 2048), (3, 1008), (3, 2023)] and told == [2, 1]
    for x in found:
        np.testing.assert_allclose(x[0], x[2], rtol=0, atol=1e-6 * np.abs(x).max())
        assert np.abs(x[0] - x[1]).max() > 0.01 * np.abs(x).max()
    np.testing.assert_allclose(found.features[1], vector["out_2048"][0], atol=1e-4)


def tensorflow_1(image):
    """Bilinear resizing of [H, W] to [299, 299] as `tf.image.resize_bilinear` did it, a pixel after the other."""
    (h, w), found = image.shape, np.zeros((299, 299))
    for i in range(299):
        for j in range(299):
            y, x = i * h / 299, j * w / 299
            top, left = int(y), int(x)
            bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
            above = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
            below = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
            found[i, j] = above + (below - above) * (y - top)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", [(512, 301), (17, 600), (299, 298), (1, 45)])
def test_images_of_any_size_are_resized_as_tensorflow_1_does(size):
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 1)).astype(np.uint8)
    found = np.asarray(inception.resized(images))
    assert found.shape == (2, 299, 299, 3) and (found == found[..., :1]).all()
    np.testing.assert_allclose(found[1, ..., 0], tensorflow_1(images[1, ..., 0].astype(float)), atol=0.02)


def test_images_of_the_network_s_size_stay():
    images = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3)).astype(np.uint8)
    np.testing.assert_array_equal(inception.resized(images), images)


def test_the_file_must_be_the_published_one(tmp_path, state, monkeypatch):
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    with pytest.raises(FileNotFoundError, match="no file .*6726825d.pth: download the weights .* from https://github"):
        inception.load_weights(path)
    path.write_bytes(b"cut off")
    digest = hashlib.sha256(b"cut off").hexdigest()
    with pytest.raises(ValueError, match=rf"has SHA-256 {digest[:8]}\.\.\., not 6726825d\.\.\. .* is no FID"):
        inception.load_weights(path)
    with pytest.raises(ValueError, match=r"6726825d\.pth is not a file of torch\.save"):
        inception.load_weights(path, sha256=None)
    monkeypatch.setattr(layouts, "read", lambda _: state)
    found = inception.load_weights(path, sha256=digest)
    np.testing.assert_array_equal(found["logits"]["kernel"], state["fc.weight"].T)


def test_weights_of_another_network_are_an_error(state):
    with pytest.raises(ValueError, match=r"lack the entry 'Mixed_7c.branch_pool.bn.running_var'"):
        network.from_torch({k: v for k, v in state.items() if k != "Mixed_7c.branch_pool.bn.running_var"})
    with pytest.raises(
        ValueError, match=r"logits of Inception-v3 has a kernel of shape \(2048, 1000\), not \(2048, 1008\)"
    ):
        network.from_torch(state | {"fc.weight": state["fc.weight"][:1000]})


def test_images_of_other_formats_are_an_error(params):
    with pytest.raises(TypeError, match="float64"):
        inception.inception_features(np.zeros((2, 8, 8, 3)), params)
    with pytest.raises(ValueError, match="Inception-v3 takes images with 1 or 3 channels, not 2"):
        inception.inception_features(np.zeros((2, 8, 8, 2), np.uint8), params)
