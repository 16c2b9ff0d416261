"""Distances against closed forms, SciPy and plain loops; the real-data reference; errors."""

import itertools

import numpy as np
import pytest
import scipy.linalg

from diffusion.metrics import blocks, distances


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
    np.testing.assert_allclose(distances.frechet_distance(a, b), expected, rtol=1e-9)


def test_frechet_distance_is_the_published_formula(rng):
    a = gaussian(rng, 50, rng.normal(size=6), covariance(rng, 6))
    b = gaussian(rng, 60, rng.normal(size=6), covariance(rng, 6))
    s, z = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s + z - 2 * scipy.linalg.sqrtm(s @ z).real)
    np.testing.assert_allclose(distances.frechet_distance(a, b), expected, rtol=1e-9)


def test_frechet_distance_is_a_distance(rng):
    a, b = rng.normal(size=(30, 8)), rng.normal(1, 2, size=(20, 8))
    assert distances.frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-10)
    assert distances.frechet_distance(a, b) == pytest.approx(distances.frechet_distance(b, a), rel=1e-10)
    turn, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    moved = distances.frechet_distance(a @ turn + 3, b @ turn + 3)
    assert moved == pytest.approx(distances.frechet_distance(a, b), rel=1e-9)


def test_frechet_distance_of_fewer_rows_than_features(rng):
    a, b = rng.normal(size=(4, 9)), rng.normal(size=(5, 9))
    with pytest.warns(UserWarning, match="4 images are too few for the Frechet distance in 9 features: .* rank 3"):
        swapped = distances.frechet_distance(b, a)
    with pytest.warns(UserWarning, match="too few"):
        assert 0 < distances.frechet_distance(a, b) == pytest.approx(swapped, rel=1e-6)
    assert distances.frechet_distance([[0.0], [2.0]], [[3.0], [5.0]]) == pytest.approx(9)


# Kernel distance


def test_kernel_distance_is_the_loop(rng):
    a, b = rng.normal(size=(5, 3)), rng.normal(1, 2, size=(4, 3))
    kernel = lambda x, y: (x @ y / 3 + 1) ** 3  # noqa: E731
    within = [np.mean([kernel(x[i], x[j]) for i, j in itertools.permutations(range(len(x)), 2)]) for x in (a, b)]
    expected = sum(within) - 2 * np.mean([kernel(x, y) for x in a for y in b])
    np.testing.assert_allclose(distances.kernel_distance(a, b), expected, rtol=1e-12)


def test_kernel_distance_has_no_bias(rng):
    """Over all ways to divide a population in two, its mean is 0."""
    x = rng.normal(size=(7, 2))
    values = [
        distances.kernel_distance(x[list(part)], np.delete(x, part, 0)) for part in itertools.combinations(range(7), 3)
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
        assert distances.precision_recall(real, fake, k) == pytest.approx(expected)
        assert 0 < min(expected) < max(expected) < 1


def test_a_missing_mode_lowers_recall_and_an_extra_one_precision(rng):
    left, right = rng.normal(size=(40, 3)), rng.normal(100, 1, size=(40, 3))
    both = np.concatenate([left, right])
    assert distances.precision_recall(both, left) == (1, 0.5)
    assert distances.precision_recall(left, both) == (0.5, 1)
    assert distances.precision_recall(left, right) == (0, 0)


# Nearest training image


def test_the_nearest_image_is_found_in_whichever_block_it_is(rng, monkeypatch):
    monkeypatch.setattr(distances.blocks, "ROWS", 7)
    samples, train = (rng.integers(0, 256, (n, 3, 3, 1), np.uint8) for n in (17, 40))
    gaps = np.sqrt(np.square(samples[:, None].astype(float) - train).sum((2, 3, 4)))
    which, distance = distances.nearest(samples, train)
    np.testing.assert_array_equal(which, gaps.argmin(1))
    np.testing.assert_allclose(distance, gaps.min(1), rtol=1e-12)
    for wrong in (train[:0], train[:, :2]):
        with pytest.raises(ValueError, match="images of one shape"):
            distances.nearest(samples, wrong)


def test_nearest_ratio_separates_copies_from_new_images(rng):
    images = rng.integers(0, 256, (90, 6, 6, 1), dtype=np.uint8)
    train, held_out, new = images[:50], images[50:70], images[70:]
    assert distances.nearest_ratio(train[:20], train, held_out) == 0
    assert distances.nearest_ratio(held_out[::-1], train, held_out) == 1
    gaps = lambda x: np.linalg.norm((x[:, None] - train.astype(float)).reshape(20, 50, -1), axis=-1).min(1)  # noqa: E731
    expected = np.median(gaps(new)) / np.median(gaps(held_out))
    assert distances.nearest_ratio(new, train, held_out) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="not used for training"):
        distances.nearest_ratio(new, train, train[:10])
    for name, given in {"samples": (new[:0], train, held_out), "train": (new, train[:0], held_out),
                        "held_out": (new, train, train[:0])}.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} must have at least one image"):
            distances.nearest_ratio(*given)


def test_tables_computed_in_parts_give_the_same(rng, monkeypatch):
    a, b = rng.normal(size=(20, 3)), rng.normal(size=(30, 3))

    def measured():
        return distances.kernel_distance(a, b), *distances.precision_recall(a, b), distances.nearest_ratio(a, b, a + 1)

    whole = measured()
    monkeypatch.setattr(blocks, "ROWS", 7)
    assert measured() == pytest.approx(whole, rel=1e-12)


# The distance and its real-data reference


def test_samples_from_the_real_distribution_reach_the_reference(rng):
    cov = covariance(rng, 4)
    real, samples = (rng.multivariate_normal(np.zeros(4), cov, n) for n in (1000, 200))
    labels = np.arange(1000) % 10
    distance, reference = distances.distance_and_reference(samples, real, labels, repeats=20)
    assert 0.4 < distance / reference < 2.5
    shifted, same = distances.distance_and_reference(samples + 1, real, labels, repeats=20)
    assert shifted > 10 * reference and same == reference


def test_the_reference_is_the_distance_of_real_images_in_the_place_of_samples(rng):
    real, labels = rng.normal(size=(50, 3)), np.arange(50) % 2
    references = []
    for seed in range(3):
        part, rest = distances.split_real(labels, 20, np.random.default_rng(seed))
        assert np.bincount(labels[part]).tolist() == [10, 10]
        assert sorted([*part, *rest]) == list(range(50))
        # If the samples are these same images, their distance equals the reference.
        distance, reference = distances.distance_and_reference(real[part], real, labels, repeats=1, seed=seed)
        assert distance == pytest.approx(reference, rel=1e-12)
        assert reference == pytest.approx(distances.frechet_distance(real[part], real[rest]), rel=1e-12)
        references.append(reference)
    assert len(set(references)) == 3
    _, averaged = distances.distance_and_reference(real[:20], real, labels, repeats=2, seed=0)
    assert averaged != references[0]


def test_the_reference_decreases_with_the_number_of_images(rng):
    real, labels = rng.normal(size=(1000, 5)), np.arange(1000) % 10
    references = [distances.distance_and_reference(real[:n], real, labels)[1] for n in (20, 100, 400)]
    assert references[0] > 2 * references[1] > 4 * references[2] > 0


@pytest.mark.parametrize("n", [2, 17, 63])
def test_both_parts_have_the_shares_of_all_real_images(n, rng):
    labels = np.repeat([0, 1, 2, 5], [50, 30, 15, 5])
    part, rest = distances.split_real(labels, n, rng)
    assert sorted([*part, *rest]) == list(range(100))
    exact = n * np.array([50, 30, 15, 5]) / 100
    assert (np.abs(np.bincount(labels[part], minlength=6)[[0, 1, 2, 5]] - exact) < 1).all()


def test_real_images_in_place_of_labelled_samples_have_their_classes(rng):
    labels, like = np.repeat([0, 1, 2], [50, 30, 20]), np.repeat([2, 0], [15, 6])
    part, _ = distances.split_real(labels, 21, rng, like)
    assert np.bincount(labels[part], minlength=3).tolist() == [6, 0, 15]
    with pytest.raises(ValueError, match="needs 21 real images of class 2, there are 20: measure fewer samples"):
        distances.split_real(labels, 21, rng, np.full(21, 2))
    with pytest.raises(ValueError, match="samples of class 4 cannot be compared: there is no real image of it"):
        distances.split_real(labels, 21, rng, np.full(21, 4))


@pytest.mark.parametrize("n", [30, 60])
def test_other_real_images_of_unequal_classes_are_as_good_as_the_reference(n, rng):
    """Classes apart from each other, and of unequal sizes: what is left must have the shares of what was taken."""
    labels = np.repeat([0, 1, 2], [100, 60, 20])
    make = lambda y: rng.normal(size=(len(y), 2)) + 10 * np.stack([y == 1, y == 2], 1)  # noqa: E731
    fresh = labels[:: len(labels) // n]
    ratios = [np.divide(*distances.distance_and_reference(make(fresh), make(labels), labels)) for _ in range(10)]
    assert 0.5 < np.median(ratios) < 2


def test_too_few_real_images_are_an_error(rng):
    real, labels = rng.normal(size=(20, 2)), np.arange(20) % 2
    with pytest.raises(ValueError, match="comparing 19 samples needs at least 21 real images, there are 20"):
        distances.distance_and_reference(real[:19], real, labels)
    with pytest.raises(ValueError, match="comparing 12 samples needs 6 real images of class 1, there are 4"):
        distances.distance_and_reference(real[:12], real, np.arange(20) % 5 // 4, labels=np.arange(12) % 2)
    with pytest.raises(ValueError, match="repeats=0"):
        distances.distance_and_reference(real[:4], real, labels, repeats=0)
    with pytest.raises(ValueError, match=r"labels of the real features have shape \(19,\)"):
        distances.distance_and_reference(real[:4], real, labels[1:])


# Errors


@pytest.mark.parametrize(
    "distance", [distances.frechet_distance, distances.kernel_distance, distances.precision_recall]
)
def test_features_that_cannot_be_compared_are_an_error(distance):
    good = np.ones((5, 3))
    for bad in (np.ones((1, 3)), np.ones((5, 4)), np.ones(5)):
        with pytest.raises(ValueError, match=r"\[N, F\] and \[M, F\]"):
            distance(good, bad)
    for value in (np.nan, np.inf):
        bad = good.copy()
        bad[2, 1] = value
        with pytest.raises(ValueError, match="1 values that are NaN or infinite"):
            distance(good, bad)
    with pytest.raises(ValueError, match="at least one row"):
        distance(np.ones((0, 3)), good)


def test_more_neighbours_than_images_are_an_error():
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k={k} must lie in 1 .. 3"):
            distances.precision_recall(np.ones((4, 2)), np.ones((9, 2)), k)


def test_agreement_checks_its_labels():
    logits = np.eye(10)[:4]
    assert distances.agreement(logits, [0, 1, 2, 0]) == 0.75
    for labels, error, message in (
        ([0, 1, 2], ValueError, r"\(3,\)"),
        ([0, 1, 2, 10], ValueError, "outside 0 .. 9"),
        ([-1, 1, 2, 3], ValueError, "label -1 of image 0 is outside 0 .. 9"),
        ([0.0, 1.0, 2.0, 3.0], TypeError, "float64"),
    ):
        with pytest.raises(error, match=message):
            distances.agreement(logits, labels)
    with pytest.raises(ValueError, match="N >= 1"):
        distances.agreement(logits[:0], np.zeros(0, int))
