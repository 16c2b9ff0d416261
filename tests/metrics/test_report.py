"""The report: of real digits, of noise, of copies, with other features; errors before work starts."""

import numpy as np
import pytest

from diffusion import data
from diffusion.metrics import distances
from diffusion.metrics.features import Extracted
from diffusion.metrics.features.digits import digit_features
from diffusion.metrics.report import report, with_current_names

NUMBERS = {
    "distance",
    "reference",
    "ratio",
    "kernel_distance",
    "kernel_reference",
    "precision",
    "recall",
    "nearest_ratio",
}


@pytest.fixture(scope="module")
def digits(mnist5k_splits):
    """600 training digits and 500 held-out ones: tables of pairs and features are what costs time here."""
    train, held_out = mnist5k_splits
    return train._replace(images=train.images[:600], labels=train.labels[:600]), held_out


@pytest.fixture(scope="module")
def features():
    """`digit_features`, computed once for the same images."""
    known = {}

    def extract(images):
        key = images.tobytes()
        if key not in known:
            known[key] = digit_features(images)
        return known[key]

    return extract


def pixels(images):
    """Features of 2 x 2 means; no logits."""
    n, h, w, c = images.shape
    x = images.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4)) / 255
    return Extracted(x.reshape(n, -1).astype(np.float32))


def test_report_of_real_digits_and_of_noise(digits, features):
    train, held_out = digits
    samples, labels = held_out.images[:200], held_out.labels[:200]
    rest = held_out._replace(images=held_out.images[200:], labels=held_out.labels[200:])
    real = report(samples, labels, train, rest, features=features)
    assert real.keys() == NUMBERS | {"agreement"} | {f"agreement_{c}" for c in range(10)}
    assert all(type(value) is float for value in real.values())
    assert real["agreement"] > 0.97 and real["precision"] > 0.6 and real["recall"] > 0.6
    assert real["ratio"] == real["distance"] / real["reference"] < 3
    assert 0.9 < real["nearest_ratio"] < 1.1
    assert real["agreement"] == pytest.approx(np.mean([real[f"agreement_{c}"] for c in range(10)]))

    noise = np.random.default_rng(0).integers(0, 256, samples.shape, dtype=np.uint8)
    other = report(noise, labels, train, rest, features=features)
    assert other["reference"] == real["reference"]
    assert other["ratio"] > 20 and other["kernel_distance"] > 10 * abs(real["kernel_distance"])
    assert other["kernel_reference"] == real["kernel_reference"] < other["kernel_distance"]
    assert other["agreement"] < 0.3 and other["precision"] < 0.1 and other["nearest_ratio"] > 1.2


def test_report_of_copies_with_some_wrong_labels(digits, features):
    train, held_out = digits
    labels = np.where(train.labels[:30] == 1, 0, train.labels[:30])
    copied = report(train.images[:30], labels, train, held_out, features=features)
    assert copied["nearest_ratio"] == 0
    assert copied["agreement"] == 0.9 and copied["agreement_0"] == 0.5 and "agreement_1" not in copied
    assert all(copied[f"agreement_{c}"] == 1 for c in range(2, 10))


def test_report_with_features_of_your_own_for_images_of_any_size_and_without_labels():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (90, 6, 4, 3), dtype=np.uint8)
    train, held_out = (data.from_arrays(x) for x in (images[:40], images[40:70]))
    for labels in (None, np.zeros(20, int)):
        real = report(images[70:], labels, train, held_out, features=pixels)
        assert real.keys() == NUMBERS  # no logits, no agreement
        assert real["ratio"] < 3
    dark = report(images[70:] // 4, None, train, held_out, features=pixels)
    assert dark["ratio"] > 3 and dark["reference"] == real["reference"]


def test_report_is_the_sum_of_its_parts():
    """Of unequal classes, so that an image with the label of another would change the numbers."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [30, 20])
    images = (rng.integers(0, 100, (50, 2, 2, 1)) + 150 * labels[:, None, None, None]).astype(np.uint8)
    train, held_out = data.from_arrays(images[:20], labels[:20], "ab"), data.from_arrays(images[20:], labels[20:], "ab")
    fakes = rng.integers(0, 256, (10, 2, 2, 1)).astype(np.uint8)
    values = report(fakes, None, train, held_out, features=pixels, repeats=2, seed=3)
    fake, real = pixels(fakes).features, pixels(images).features
    part, rest = distances.split_real(labels, 10, np.random.default_rng(3))
    distance, reference = distances.distance_and_reference(fake, real, labels, repeats=2, seed=3)
    assert values == {
        "distance": distance,
        "reference": reference,
        "ratio": distance / reference,
        "kernel_distance": distances.kernel_distance(fake, real[rest]),
        "kernel_reference": distances.kernel_distance(real[part], real[rest]),
        **dict(zip(("precision", "recall"), distances.precision_recall(real[part], fake), strict=True)),
        "nearest_ratio": distances.nearest_ratio(fakes, images[:20], images[20:]),
    }


def test_unlabelled_samples_have_no_agreement():
    images = np.random.default_rng(0).integers(0, 256, (30, 2, 2, 1), dtype=np.uint8)
    train, held_out = (data.from_arrays(x, np.arange(len(x)) % 2) for x in (images[:12], images[12:20]))
    both = lambda x: pixels(x)._replace(logits=np.stack([x[:, 0, 0, 0], x[:, 1, 0, 0]], 1))  # noqa: E731
    values = report(images[20:], None, train, held_out, features=both)
    assert values.keys() == NUMBERS
    values = report(images[20:], np.arange(10) % 2, train, held_out, features=both)
    assert values.keys() == NUMBERS | {"agreement", "agreement_0", "agreement_1"}


def test_report_checks_its_input_before_it_computes_features(digits):
    train, held_out = digits
    small = held_out._replace(images=held_out.images[:50], labels=held_out.labels[:50])
    for images, labels, real, message in (
        (held_out.images[:3], held_out.labels[:3], train, "at least 4 images"),
        (held_out.images, held_out.labels + 1, train, "outside 0 .. 9"),
        (held_out.images, held_out.labels[1:], train, r"\(499,\)"),
        (held_out.images, held_out.labels, small, "500 samples needs at least 502 real images"),
        (held_out.images, held_out.labels, train._replace(images=train.images[:, 2:]), "different shapes"),
        (held_out.images[..., 0], held_out.labels, train, r"images\[..., None\]"),
    ):
        with pytest.raises(ValueError, match=message):
            report(images, labels, real, small, features=lambda _: pytest.fail("computed features first"))
    other = small._replace(images=train.images[:50])
    with pytest.raises(TypeError, match="Extracted.* not ndarray"):
        report(held_out.images[:9], None, small, other, features=lambda images: images[:, 0, 0])


def test_reports_of_earlier_versions_are_read_under_todays_names():
    stored = {"distance": 3.0, "floor": 2.0, "kernel_floor": -1.0, "train_steps": 7}
    current = {"distance": 3.0, "reference": 2.0, "kernel_reference": -1.0, "train_steps": 7}
    assert with_current_names(stored) == with_current_names(current) == current
