"""The report: of real digits, of noise, of copies, with other features; errors before work starts."""

import numpy as np
import pytest

from diffusion import data
from diffusion.metrics import distances, moments
from diffusion.metrics import report as module
from diffusion.metrics.features import Extracted, Named, name_of
from diffusion.metrics.features.digits import digit_features
from diffusion.metrics.intervals import kernel_interval
from diffusion.metrics.neighbours import neighbourhoods
from diffusion.metrics.patches import patch_distance
from diffusion.metrics.report import (
    against,
    cautions,
    comparison,
    extract,
    lines,
    report,
    with_current_names,
)
from diffusion.metrics.sliced import sliced_distance

NUMBERS = {
    "feature_count",
    "distance",
    "reference",
    "ratio",
    "kernel_distance",
    "kernel_reference",
    "sliced_distance",
    "sliced_reference",
    "nearest_ratio",
    "patch_distance",
    "patch_reference",
}
DISTANCES = {"distance", "kernel_distance", "sliced_distance"}
NEIGHBOURS = {"precision", "recall", "density", "coverage"}
NUMBERS |= NEIGHBOURS | {f"{name}_reference" for name in NEIGHBOURS}
NUMBERS |= {f"{name}_{end}" for name in NEIGHBOURS | DISTANCES | {"nearest_ratio"} for end in ("low", "high")}
AGREEMENT = {"agreement", "agreement_low", "agreement_high"}
SCORES = {"class_score", "class_score_reference"}


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
    real = report(samples, labels, train, rest, features=features, patches=(7, None), resamples=20)
    expected = (
        NUMBERS
        | SCORES
        | AGREEMENT
        | {"seam", "seam_low", "seam_high", "seam_reference"}
        | {f"agreement_{c}" for c in range(10)}
    )
    assert real.keys() == expected
    assert all(type(value) is float for value in real.values())
    assert real["agreement"] > 0.97 and real["precision"] > 0.6 and real["recall"] > 0.6
    assert real["ratio"] == real["distance"] / real["reference"] < 3
    assert 0.9 < real["nearest_ratio"] < 1.1
    assert real["seam"] == pytest.approx(real["seam_reference"], abs=0.05)
    for name in NEIGHBOURS | {"sliced", "class_score"}:
        value = real["sliced_distance" if name == "sliced" else name]
        assert value == pytest.approx(real[f"{name}_reference"], rel=0.4), name
    for name in NEIGHBOURS | DISTANCES | {"agreement", "seam", "nearest_ratio"}:
        assert real[f"{name}_low"] <= real[name] <= real[f"{name}_high"], name
    assert real["agreement"] == pytest.approx(np.mean([real[f"agreement_{c}"] for c in range(10)]))

    noise = np.random.default_rng(0).integers(0, 256, samples.shape, dtype=np.uint8)
    other = report(noise, labels, train, rest, features=features, resamples=0)
    assert not [name for name in other if name.endswith(("_low", "_high"))]
    assert other["density"] < 0.1 and other["coverage"] < 0.1
    assert other["sliced_distance"] > 10 * other["sliced_reference"] == 10 * real["sliced_reference"]
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


def test_intervals_of_shares_stay_in_their_range():
    assert module._interval("coverage", module.Interval(-0.1, 1.1)) == {"coverage_low": 0.0, "coverage_high": 1.0}
    assert module._interval("density", module.Interval(-0.1, 1.1)) == {"density_low": -0.1, "density_high": 1.1}


def test_the_nearest_are_searched_in_all_training_images_but_not_in_too_many(monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 4, 4, 1), dtype=np.uint8)
    train, held_out, samples = data.from_arrays(images[:20]), data.from_arrays(images[40:]), images[20:30]
    apart = report(samples, None, train, held_out, features=None)
    assert 0.7 < apart["nearest_ratio_low"] < apart["nearest_ratio"] < apart["nearest_ratio_high"] < 1.3
    copies = report(samples, None, train, held_out, features=None, training=images[:40])
    assert copies["nearest_ratio"] == 0
    monkeypatch.setattr(module, "MOST_SEARCHED", 39)
    left_out = report(samples, None, train, held_out, features=None, training=images[:40])
    assert {name for name in copies if name not in left_out} == {
        "nearest_ratio",
        "nearest_ratio_low",
        "nearest_ratio_high",
    }


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
    others = real[np.random.default_rng(3).permutation(rest)[:10]]
    near, other = (neighbourhoods(real[part], x, 5) for x in (fake, others))
    expected = {
        "feature_count": 1.0,
        "distance": distance,
        "reference": reference,
        "ratio": distance / reference,
        "kernel_distance": distances.kernel_distance(fake, real[rest]),
        "kernel_reference": distances.kernel_distance(real[part], real[rest]),
        **dict(zip(("precision", "recall"), distances.precision_recall(real[part], fake), strict=True)),
        "precision_reference": distances.precision_recall(real[part], others)[0],
        "recall_reference": distances.precision_recall(real[part], others)[1],
        "density": near.density,
        "density_reference": other.density,
        "coverage": near.coverage,
        "coverage_reference": other.coverage,
        "sliced_distance": sliced_distance(fake, others, seed=3),
        "sliced_reference": sliced_distance(real[part], others, seed=3),
        "nearest_ratio": distances.nearest_ratio(fakes, images[:20], images[20:]),
        "patch_distance": patch_distance(fakes, images[np.random.default_rng(3).permutation(rest)[:10]], seed=3),
        "patch_reference": patch_distance(
            images[part], images[np.random.default_rng(3).permutation(rest)[:10]], seed=3
        ),
    }
    pixels_alone = report(fakes, None, train, held_out, features=None, repeats=2, seed=3)
    shown = ("nearest_ratio", "nearest_ratio_low", "nearest_ratio_high", "patch_distance", "patch_reference")
    assert pixels_alone == {name: values[name] for name in shown}
    for name in ("patch_distance", "patch_reference"):  # sums in another order
        np.testing.assert_allclose(values.pop(name), expected.pop(name), rtol=1e-12)
    ends = {f"{name}_{end}" for name in expected for end in ("low", "high")}
    assert {name: value for name, value in values.items() if name not in ends} == expected
    assert {name for name in values if name in ends} == {name for name in NUMBERS if name in ends}
    of_kernel = kernel_interval(fake, real[rest], resamples=100, seed=3)
    assert (values["kernel_distance_low"], values["kernel_distance_high"]) == of_kernel


def test_unlabelled_samples_have_no_agreement():
    images = np.random.default_rng(0).integers(0, 256, (30, 2, 2, 1), dtype=np.uint8)
    train, held_out = (data.from_arrays(x, np.arange(len(x)) % 2) for x in (images[:12], images[12:20]))
    both = lambda x: pixels(x)._replace(logits=np.stack([x[:, 0, 0, 0], x[:, 1, 0, 0]], 1))  # noqa: E731
    values = report(images[20:], None, train, held_out, features=both)
    assert values.keys() == NUMBERS | SCORES
    values = report(images[20:], np.arange(10) % 2, train, held_out, features=both)
    assert values.keys() == NUMBERS | SCORES | AGREEMENT | {"agreement_0", "agreement_1"}


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


def test_images_are_read_and_extracted_in_blocks(monkeypatch):
    """Also those that are decoded when indexed; the numbers are those of the whole."""

    class Decoded:
        def __init__(self, images):
            self.images, self.shape, self.most, self.read = images, images.shape, 0, 0

        def __len__(self):
            return len(self.images)

        def __getitem__(self, which):
            found = self.images[which]
            self.most, self.read = max(self.most, len(found)), self.read + len(found)
            return found

    images = np.random.default_rng(0).integers(0, 256, (90, 6, 4, 3), dtype=np.uint8)
    train, held_out = (data.from_arrays(x) for x in (images[:40], images[40:70]))
    whole = report(images[70:], None, train, held_out, features=pixels, patches=(2, None))
    monkeypatch.setattr(module, "AT_ONCE", 7)
    monkeypatch.setattr(module.nearest_ratios.__globals__["blocks"], "ROWS", 9)
    decoded = Decoded(train.images)
    parts = report(
        images[70:], None, train._replace(images=decoded), held_out, features=pixels, patches=(2, None), resamples=0
    )
    assert decoded.most <= 20  # the real images of the seam metric
    assert decoded.read <= 2 * 40 + 2 * 20  # once for pixels, once for features; those in place of samples, and others
    assert parts == pytest.approx({name: value for name, value in whole.items() if name in parts}, rel=1e-9)
    np.testing.assert_array_equal(extract(pixels, images).features, pixels(images).features)


def test_without_enough_real_images_in_their_place_there_is_no_reference():
    rng = np.random.default_rng(0)
    fake, real = Extracted(rng.normal(size=(8, 2))), Extracted(rng.normal(size=(13, 2)))
    few = comparison(fake, real, np.zeros(13, int), resamples=2)
    assert not [name for name in few if name.endswith("_reference") and name != "kernel_reference"]
    assert {"density", "sliced_distance"} <= few.keys()
    many = comparison(fake, Extracted(rng.normal(size=(16, 2))), np.zeros(16, int), resamples=2)
    assert {"density_reference", "sliced_reference"} <= many.keys()


def test_statistics_alone_give_a_distance(monkeypatch):
    rng = np.random.default_rng(0)
    fake, real = rng.normal(size=(50, 4)), rng.normal(0.2, 1, size=(80, 4))
    values = against(Extracted(fake, rng.normal(size=(50, 3))), moments.gaussian(moments.moments(real)))
    assert values.keys() == {"feature_count", "distance", "distance_low", "distance_high", "class_score"}
    assert values["distance"] == distances.frechet_distance(fake, real)
    assert values["distance_low"] < values["distance"] < values["distance_high"]
    monkeypatch.setattr(module, "MOST_RESAMPLED", 3)
    assert "distance_low" not in against(Extracted(fake), moments.gaussian(moments.moments(real)))


def test_spatial_features_have_a_distance_of_their_own():
    rng = np.random.default_rng(0)
    fake, real = (Extracted(rng.normal(size=(n, 3)), None, rng.normal(i, 1, (n, 5))) for i, n in enumerate((20, 60)))
    labels = np.zeros(60, int)
    values = comparison(fake, real, labels, resamples=0, seed=4)
    part, rest = distances.split_real(labels, 20, np.random.default_rng(4))
    assert values["spatial_distance"] == distances.frechet_distance(fake.spatial, real.spatial[rest])
    assert values["spatial_reference"] == distances.frechet_distance(real.spatial[part], real.spatial[rest])
    assert values["spatial_distance"] > 4 > values["spatial_reference"]
    pooled, spatial = (moments.gaussian(moments.moments(x)) for x in (real.features, real.spatial))
    values = against(fake, pooled, spatial, resamples=0)
    assert values["spatial_distance"] == distances.frechet_distance(fake.spatial, real.spatial)
    for one, other in ((fake._replace(spatial=None), spatial), (fake, None)):
        assert "spatial_distance" not in against(one, pooled, other, resamples=0)
    assert "spatial_distance" not in comparison(fake, real._replace(spatial=None), labels, resamples=0)


def test_lines_name_what_was_computed():
    """Every number has a line; names of published metrics are those of the published network alone."""
    values = {line.key: 0.5 for line in module.LINES}
    values |= {"distance_low": 0.25, "distance_high": 0.75, "agreement_3": 1.0}
    others, published = lines(values, "digit features"), lines(values, "Inception-v3")
    assert len(others) == len(published) == len(module.LINES) + 1
    assert others[0].split() == ["Frechet", "distance", "0.50", "0.25", "..", "0.75", "lower", "is", "better"]
    assert [row.split()[0] for row in published[:6] if "of real" not in row] == ["FID", "ratio", "sFID", "KID"]
    assert others[-1].split() == ["of", "3", "100.0%"]
    assert not [row for row in others if any(name in row for name in ("FID", "KID", "MIND", "Inception"))]
    assert lines({"distance": 1.0}, "x") == [f"{'Frechet distance':<18}{'1.00':>10}{'':<23}lower is better"]
    numbers = NUMBERS | SCORES | {"seam", "seam_reference", "agreement", "spatial_distance", "spatial_reference"}
    ends = {name for name in numbers if name.endswith(("_low", "_high"))}
    assert numbers - ends - {"feature_count"} == {line.key for line in module.LINES}
    assert name_of(digit_features) == "digit_features"
    assert name_of(Named("Inception-v3", digit_features)) == "Inception-v3"


def test_cautions_say_why_numbers_mislead():
    images = np.random.default_rng(0).integers(0, 256, (9, 2, 2, 1), dtype=np.uint8)
    assert cautions(images, {"feature_count": 8.0}) == cautions(images, {}) == []
    assert "9 images are too few for the Frechet distance in 9 features" in cautions(images, {"feature_count": 9.0})[0]
    assert "all pixel values are 0 or 1, where 0 .. 255 are meant" in cautions(images // 128, {})[0]
    assert "all pixel values are 0, where" in cautions(images * 0, {})[0]


# What each number does when images get worse


def patterns(n, seed):
    """Images of four classes, 12x12: a bright stripe in one of two directions, in the upper left or lower right."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 4
    y, x = np.mgrid[:12, :12]
    place = rng.normal(np.where(labels < 2, 3, 8), 0.8)[:, None, None]
    width = rng.uniform(1, 2, n)[:, None, None]
    along = np.where((labels % 2 == 0)[:, None, None], y, x)
    light = 200 * np.exp(-np.square((along - place) / width)) + rng.normal(20, 4, (n, 12, 12))
    return np.clip(light, 0, 255)[..., None], labels


def worse(kind, x, labels):
    rng = np.random.default_rng(9)
    if kind == "noise":
        return x + rng.normal(0, 80, x.shape)
    if kind == "blur":
        return sum(np.roll(x, (i, j), (1, 2)) for i in range(-2, 3) for j in range(-2, 3)) / 25
    if kind == "shift":
        return np.roll(x, 2, 2)
    if kind == "dropped class":
        return x[labels != 3][np.arange(len(x)) % (labels != 3).sum()]
    return x[np.arange(len(x)) % 10]  # duplicates of ten images


@pytest.mark.parametrize("kind", ["noise", "blur", "shift", "dropped class", "duplicates"])
def test_every_distance_worsens_with_damage(kind):
    """On means of 3 x 3 pixels; where a number says nothing about a damage, it is left out."""
    real, real_labels = patterns(400, 0)
    good, labels = patterns(160, 1)
    means = lambda x: Extracted((x.reshape(len(x), 4, 3, 4, 3).mean((2, 4)).reshape(len(x), -1) - 60) / 30)  # noqa: E731
    before = comparison(means(good), means(real), real_labels, resamples=50)
    after = comparison(means(worse(kind, good, labels)), means(real), real_labels, resamples=50)
    assert after["distance"] > 1.5 * before["distance"] and after["distance_low"] > before["distance_high"]
    assert after["sliced_distance"] > 1.5 * before["sliced_distance"]
    assert after["coverage"] < before["coverage"] - 0.1
    if kind != "noise":  # it changes no mean, and its large balls hold all real images
        assert after["kernel_distance_low"] > before["kernel_distance_high"]
        assert after["recall"] < before["recall"] - 0.1
    if kind in ("noise", "blur", "shift"):  # all images of the others are good ones
        assert after["precision"] < before["precision"] - 0.1 and after["density"] < before["density"] - 0.1
    assert after["reference"] == before["reference"]
