"""Distances against closed forms, SciPy and plain loops; the shipped classifier; floors; refusals."""

import hashlib
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from diffusion import data, evaluate
from diffusion.models import classifier as network
from experiments import classifier


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Training and held-out digits."""
    folder = tmp_path_factory.mktemp("tfds")
    return [data.load("mnist5k", split, data_dir=folder) for split in ("train", "test")]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def gaussian(rng, n, mean, cov):
    """n rows whose mean and covariance are exactly these."""
    x = rng.normal(size=(n, len(mean)))
    x = np.linalg.solve(np.linalg.cholesky(np.cov(x, rowvar=False)), (x - x.mean(0)).T).T
    return x @ np.linalg.cholesky(cov).T + mean


def covariance(rng, f):
    root = rng.normal(size=(f, f))
    return root @ root.T + 0.1 * np.eye(f)


# Frechet distance


def test_frechet_distance_of_gaussians_in_closed_form(rng):
    axes, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    deviations, others = rng.uniform(0.1, 3, (2, 5))
    mean, other = rng.normal(size=(2, 5))
    a = gaussian(rng, 40, mean, axes * deviations**2 @ axes.T)
    b = gaussian(rng, 30, other, axes * others**2 @ axes.T)
    expected = np.square(mean - other).sum() + np.square(deviations - others).sum()
    np.testing.assert_allclose(evaluate.frechet_distance(a, b), expected, rtol=1e-9)


def test_frechet_distance_is_the_published_formula(rng):
    a = gaussian(rng, 50, rng.normal(size=6), covariance(rng, 6))
    b = gaussian(rng, 60, rng.normal(size=6), covariance(rng, 6))
    s, z = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s + z - 2 * scipy.linalg.sqrtm(s @ z).real)
    np.testing.assert_allclose(evaluate.frechet_distance(a, b), expected, rtol=1e-9)


def test_frechet_distance_is_a_distance(rng):
    a, b = rng.normal(size=(30, 8)), rng.normal(1, 2, size=(20, 8))
    assert evaluate.frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-10)
    assert evaluate.frechet_distance(a, b) == pytest.approx(evaluate.frechet_distance(b, a), rel=1e-10)
    turn, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    moved = evaluate.frechet_distance(a @ turn + 3, b @ turn + 3)
    assert moved == pytest.approx(evaluate.frechet_distance(a, b), rel=1e-9)


def test_frechet_distance_of_fewer_rows_than_features(rng):
    a, b = rng.normal(size=(4, 9)), rng.normal(size=(5, 9))
    swapped = evaluate.frechet_distance(b, a)
    assert 0 < evaluate.frechet_distance(a, b) == pytest.approx(swapped, rel=1e-6)
    assert evaluate.frechet_distance([[0.0], [2.0]], [[3.0], [5.0]]) == pytest.approx(9)


# Kernel distance


def test_kernel_distance_is_the_loop(rng):
    a, b = rng.normal(size=(5, 3)), rng.normal(1, 2, size=(4, 3))
    kernel = lambda x, y: (x @ y / 3 + 1) ** 3  # noqa: E731
    within = [np.mean([kernel(x[i], x[j]) for i, j in itertools.permutations(range(len(x)), 2)]) for x in (a, b)]
    expected = sum(within) - 2 * np.mean([kernel(x, y) for x in a for y in b])
    np.testing.assert_allclose(evaluate.kernel_distance(a, b), expected, rtol=1e-12)


def test_kernel_distance_has_no_bias(rng):
    """Over all ways to divide a population in two, its mean is 0."""
    x = rng.normal(size=(7, 2))
    values = [
        evaluate.kernel_distance(x[list(part)], np.delete(x, part, 0)) for part in itertools.combinations(range(7), 3)
    ]
    assert min(values) < 0 < max(values)
    np.testing.assert_allclose(np.mean(values), 0, atol=1e-12)


# Precision and recall


def test_precision_recall_is_the_loop(rng):
    real, fake = rng.normal(size=(30, 2)), rng.normal(1.5, 1.0, size=(20, 2))

    def covered(x, centres, k):
        gaps = np.linalg.norm(centres[:, None] - centres, axis=-1)
        radii = [sorted(np.delete(row, i))[k - 1] for i, row in enumerate(gaps)]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in x])

    for k in (1, 3):
        expected = covered(fake, real, k), covered(real, fake, k)
        assert evaluate.precision_recall(real, fake, k) == pytest.approx(expected)
        assert 0 < min(expected) < max(expected) < 1


def test_a_forgotten_mode_costs_recall_and_a_foreign_one_precision(rng):
    left, right = rng.normal(size=(40, 3)), rng.normal(100, 1, size=(40, 3))
    both = np.concatenate([left, right])
    assert evaluate.precision_recall(both, left) == (1, 0.5)
    assert evaluate.precision_recall(left, both) == (0.5, 1)
    assert evaluate.precision_recall(left, right) == (0, 0)


# Nearest training picture


def test_nearest_ratio_tells_copies_from_new_pictures(rng):
    pictures = rng.integers(0, 256, (90, 6, 6, 1), dtype=np.uint8)
    train, held_out, new = pictures[:50], pictures[50:70], pictures[70:]
    assert evaluate.nearest_ratio(train[:20], train, held_out) == 0
    assert evaluate.nearest_ratio(held_out[::-1], train, held_out) == 1
    gaps = lambda x: np.linalg.norm((x[:, None] - train.astype(float)).reshape(20, 50, -1), axis=-1).min(1)  # noqa: E731
    expected = np.median(gaps(new)) / np.median(gaps(held_out))
    assert evaluate.nearest_ratio(new, train, held_out) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="never saw"):
        evaluate.nearest_ratio(new, train, train[:10])


def test_tables_in_pieces_give_the_same(rng, monkeypatch):
    a, b = rng.normal(size=(20, 3)), rng.normal(size=(30, 3))

    def measured():
        return evaluate.kernel_distance(a, b), *evaluate.precision_recall(a, b), evaluate.nearest_ratio(a, b, a + 1)

    whole = measured()
    monkeypatch.setattr(evaluate, "ROWS", 7)
    assert measured() == pytest.approx(whole, rel=1e-12)


# Distance and its floor


def test_samples_from_the_real_distribution_stand_at_the_floor(rng):
    cov = covariance(rng, 4)
    real, samples = (rng.multivariate_normal(np.zeros(4), cov, n) for n in (1000, 200))
    labels = np.arange(1000) % 10
    distance, floor = evaluate.distance_and_floor(samples, real, labels, repeats=20)
    assert 0.4 < distance / floor < 2.5
    shifted, same = evaluate.distance_and_floor(samples + 1, real, labels, repeats=20)
    assert shifted > 10 * floor and same == floor


def test_the_floor_is_that_of_real_pictures_in_the_place_of_samples(rng):
    real, labels = rng.normal(size=(50, 3)), np.arange(50) % 2
    seen = []
    for seed in range(3):
        part, rest = evaluate._divide(labels, 20, np.random.default_rng(seed))
        assert np.bincount(labels[part]).tolist() == [10, 10]
        assert sorted([*part, *rest]) == list(range(50))
        # The very pictures taken as samples stand at the floor itself.
        distance, floor = evaluate.distance_and_floor(real[part], real, labels, repeats=1, seed=seed)
        assert distance == pytest.approx(floor, rel=1e-12)
        assert floor == pytest.approx(evaluate.frechet_distance(real[part], real[rest]), rel=1e-12)
        seen.append(floor)
    assert len(set(seen)) == 3
    _, averaged = evaluate.distance_and_floor(real[:20], real, labels, repeats=2, seed=0)
    assert averaged != seen[0]


def test_a_floor_falls_with_the_number_of_pictures(rng):
    real, labels = rng.normal(size=(1000, 5)), np.arange(1000) % 10
    floors = [evaluate.distance_and_floor(real[:n], real, labels)[1] for n in (20, 100, 400)]
    assert floors[0] > 2 * floors[1] > 4 * floors[2] > 0


@pytest.mark.parametrize("n", [2, 17, 63])
def test_shares_of_classes_differ_by_at_most_one(n, rng):
    labels = np.repeat(np.arange(10), 8)
    part, _ = evaluate._divide(labels, n, rng)
    counts = np.bincount(labels[part], minlength=10)
    assert len(part) == n and counts.max() - counts.min() <= 1


def test_floors_that_cannot_be_had_are_refused(rng):
    real, labels = rng.normal(size=(20, 2)), np.arange(20) % 2
    with pytest.raises(ValueError, match="19 samples need at least 21 real pictures"):
        evaluate.distance_and_floor(real[:19], real, labels)
    with pytest.raises(ValueError, match="need 6 real pictures of class 1, there are 4"):
        evaluate.distance_and_floor(real[:12], real, np.arange(20) % 5 // 4)
    with pytest.raises(ValueError, match="repeats=0"):
        evaluate.distance_and_floor(real[:4], real, labels, repeats=0)
    with pytest.raises(ValueError, match=r"labels have shape \(19,\)"):
        evaluate.distance_and_floor(real[:4], real, labels[1:])


# Refusals


@pytest.mark.parametrize("distance", [evaluate.frechet_distance, evaluate.kernel_distance, evaluate.precision_recall])
def test_features_that_cannot_be_compared_are_refused(distance):
    good = np.ones((5, 3))
    for bad in (np.ones((1, 3)), np.ones((5, 4)), np.ones(5)):
        with pytest.raises(ValueError, match=r"\[N, F\] and \[M, F\]"):
            distance(good, bad)
    for value in (np.nan, np.inf):
        bad = good.copy()
        bad[2, 1] = value
        with pytest.raises(ValueError, match="1 values that are NaN or infinite"):
            distance(good, bad)
    with pytest.raises(ValueError, match="empty"):
        distance(np.ones((0, 3)), good)


def test_more_neighbours_than_pictures_are_refused():
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k={k} must lie in 1 .. 3"):
            evaluate.precision_recall(np.ones((4, 2)), np.ones((9, 2)), k)


def test_pictures_that_are_no_digits_are_refused():
    with pytest.raises(TypeError, match="float64"):
        evaluate.digit_features(np.zeros((2, 28, 28, 1)))
    for shape in ((28, 28, 1), (2, 28, 28), (2, 32, 32, 1), (2, 28, 28, 3), (0, 28, 28, 1)):
        with pytest.raises(ValueError, match="28, 28, 1"):
            evaluate.digit_features(np.zeros(shape, np.uint8))


def test_labels_that_do_not_belong_are_refused():
    logits = np.eye(10)[:4]
    assert evaluate.agreement(logits, [0, 1, 2, 0]) == 0.75
    for labels, error, message in (
        ([0, 1, 2], ValueError, r"\(3,\)"),
        ([0, 1, 2, 10], ValueError, "outside 0 .. 9"),
        ([-1, 1, 2, 3], ValueError, "outside 0 .. 9"),
        ([0.0, 1.0, 2.0, 3.0], TypeError, "float64"),
    ):
        with pytest.raises(error, match=message):
            evaluate.agreement(logits, labels)
    with pytest.raises(ValueError, match="N >= 1"):
        evaluate.agreement(logits[:0], np.zeros(0, int))


# The classifier


def test_the_shipped_classifier_reads_held_out_digits(digits):
    _, held_out = digits
    logits, features = evaluate.digit_features(held_out.images)
    assert logits.shape == (500, 10) and features.shape == (500, 64)
    assert logits.dtype == features.dtype == np.float32
    assert evaluate.agreement(logits, held_out.labels) >= 0.99
    assert np.linalg.matrix_rank(np.cov(features, rowvar=False)) == 64  # else distances ignore directions


def test_features_do_not_depend_on_the_other_pictures(digits):
    images = digits[1].images[:260]  # more than one batch
    together = evaluate.digit_features(images)
    for i in (0, 100, 259):
        for whole, alone in zip(together, evaluate.digit_features(images[i : i + 1]), strict=True):
            np.testing.assert_array_equal(whole[i], alone[0])


def test_a_flipped_byte_of_the_weights_is_noticed(tmp_path):
    file = bytearray(evaluate.WEIGHTS.read_bytes())
    assert len(file) < 1_500_000
    path = tmp_path / "weights.safetensors"
    path.write_bytes(file)
    assert evaluate.load_classifier(path)["logits"]["bias"].shape == (10,)
    file[-1] ^= 1
    path.write_bytes(file)
    with pytest.raises(ValueError, match=hashlib.sha256(file).hexdigest()):
        evaluate.load_classifier(path)
    with pytest.raises(FileNotFoundError, match="experiments.classifier"):
        evaluate.load_classifier(tmp_path / "none")


def test_weights_survive_their_file(key, tmp_path, rng):
    shapes = jax.eval_shape(network.init, key)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    file = network.to_bytes(params)
    (tmp_path / "mine").write_bytes(file)
    again = evaluate.load_classifier(tmp_path / "mine", hashlib.sha256(file).hexdigest())
    jax.tree.map(np.testing.assert_array_equal, params, again)


# Report


def test_report_of_real_digits_and_of_noise(digits, rng):
    train, held_out = digits
    samples, labels = held_out.images[:200], held_out.labels[:200]
    rest = held_out._replace(images=held_out.images[200:], labels=held_out.labels[200:])
    real = evaluate.report(samples, labels, train, rest)
    numbers = {
        "distance",
        "floor",
        "ratio",
        "kernel_distance",
        "kernel_floor",
        "precision",
        "recall",
        "nearest_ratio",
        "agreement",
    }
    assert real.keys() == numbers | {f"agreement_{c}" for c in range(10)}
    assert all(type(value) is float for value in real.values())
    assert real["agreement"] > 0.97 and real["precision"] > 0.6 and real["recall"] > 0.6
    assert real["ratio"] == real["distance"] / real["floor"] < 3
    assert 0.9 < real["nearest_ratio"] < 1.1
    assert real["agreement"] == pytest.approx(np.mean([real[f"agreement_{c}"] for c in range(10)]))

    noise = rng.integers(0, 256, samples.shape, dtype=np.uint8)
    foreign = evaluate.report(noise, labels, train, rest)
    assert foreign["floor"] == real["floor"]
    assert foreign["ratio"] > 20 and foreign["kernel_distance"] > 10 * abs(real["kernel_distance"])
    assert foreign["kernel_floor"] == real["kernel_floor"] < foreign["kernel_distance"]
    assert foreign["agreement"] < 0.3 and foreign["precision"] < 0.1 and foreign["nearest_ratio"] > 1.2


def test_report_of_copies_with_some_wrong_labels(digits):
    train, held_out = digits
    labels = np.where(train.labels[:30] == 1, 0, train.labels[:30])
    copied = evaluate.report(train.images[:30], labels, train, held_out)
    assert copied["nearest_ratio"] == 0
    assert copied["agreement"] == 0.9 and copied["agreement_0"] == 0.5 and "agreement_1" not in copied
    assert all(copied[f"agreement_{c}"] == 1 for c in range(2, 10))


def test_report_refuses_before_it_works(digits, monkeypatch):
    train, held_out = digits
    monkeypatch.setattr(evaluate, "digit_features", lambda *_: pytest.fail("worked first"))
    small = held_out._replace(images=held_out.images[:50], labels=held_out.labels[:50])
    for images, labels, real, message in (
        (held_out.images[:3], held_out.labels[:3], train, "too few"),
        (held_out.images, held_out.labels + 1, train, "outside 0 .. 9"),
        (held_out.images, held_out.labels[1:], train, r"\(499,\)"),
        (held_out.images, held_out.labels, small, "500 samples need at least 502 real pictures"),
        (held_out.images, held_out.labels, train._replace(images=train.images[:, 2:]), "28, 28, 1"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.report(images, labels, real, small)


# The command that trains it


def test_training_depends_on_its_seed_alone(digits):
    files = [network.to_bytes(classifier.train(digits[0], seed=seed, steps=2)) for seed in (0, 0, 1)]
    assert files[0] == files[1] != files[2]


def test_warps_move_digits_and_nothing_else(key, monkeypatch, rng):
    x = jnp.asarray(rng.uniform(size=(3, 28, 28, 1)), jnp.float32)
    for name in ("ROTATION", "SCALE", "SHEAR", "SHIFT"):
        monkeypatch.setattr(classifier, name, 0.0)
    np.testing.assert_allclose(classifier.warp(key, x), x, atol=1e-4)
    monkeypatch.setattr(classifier, "ROTATION", np.pi / 2)
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, minval: jnp.ones(shape))
    np.testing.assert_allclose(classifier.warp(key, x)[..., 0], np.rot90(x[..., 0], 1, (2, 1)), atol=1e-4)


def test_a_file_is_not_replaced_unasked(tmp_path):
    path = tmp_path / "weights"
    path.write_text("mine")
    command = [sys.executable, "-m", "experiments.classifier", f"--out={path}", "--steps=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "--overwrite" in done.stderr and "Traceback" not in done.stderr
    assert path.read_text() == "mine"
