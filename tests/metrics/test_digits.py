"""The digit classifier and its features: accuracy, independence of the other images, its file, errors."""

import hashlib

import jax
import numpy as np
import pytest

from diffusion.metrics import distances
from diffusion.metrics.features import Extracted, digits
from diffusion.models import classifier


def test_the_classifier_of_the_package_reads_held_out_digits(mnist5k_splits):
    _, held_out = mnist5k_splits
    extracted = digits.digit_features(held_out.images)
    assert isinstance(extracted, Extracted)
    features, logits, _ = extracted
    assert logits.shape == (500, 10) and features.shape == (500, 64)
    assert logits.dtype == features.dtype == np.float32
    assert distances.agreement(logits, held_out.labels) >= 0.99
    assert np.linalg.matrix_rank(np.cov(features, rowvar=False)) == 64  # otherwise distances ignore directions


def test_features_do_not_depend_on_the_other_images(mnist5k_splits):
    images = mnist5k_splits[1].images[:260]  # more than one batch
    together = digits.digit_features(images)
    for i in (0, 100, 259):
        for all_images, alone in zip(together[:2], digits.digit_features(images[i : i + 1])[:2], strict=True):
            np.testing.assert_array_equal(all_images[i], alone[0])


def test_images_that_are_not_digits_are_an_error():
    with pytest.raises(TypeError, match="float64"):
        digits.digit_features(np.zeros((2, 28, 28, 1)))
    for shape, message in (
        ((28, 28, 1), r"\[N, H, W, C\]"),
        ((0, 28, 28, 1), "N >= 1"),
        ((2, 32, 32, 1), "28, 28, 1.* another feature function"),
        ((2, 28, 28, 3), "28, 28, 1.* another feature function"),
    ):
        with pytest.raises(ValueError, match=message):
            digits.digit_features(np.zeros(shape, np.uint8))


def test_a_flipped_byte_of_the_weights_is_detected(tmp_path):
    file = bytearray(digits.WEIGHTS.read_bytes())
    assert len(file) < 1_500_000
    path = tmp_path / "weights.safetensors"
    path.write_bytes(file)
    assert digits.load_classifier(path)["logits"]["bias"].shape == (10,)
    file[-1] ^= 1
    path.write_bytes(file)
    with pytest.raises(ValueError, match=hashlib.sha256(file).hexdigest()):
        digits.load_classifier(path)
    with pytest.raises(FileNotFoundError, match="experiments.classifier"):
        digits.load_classifier(tmp_path / "none")


def test_weights_round_trip_through_their_file(key, tmp_path):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(classifier.init, key)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    file = classifier.to_bytes(params)
    (tmp_path / "mine").write_bytes(file)
    again = digits.load_classifier(tmp_path / "mine", hashlib.sha256(file).hexdigest())
    jax.tree.map(np.testing.assert_array_equal, params, again)
