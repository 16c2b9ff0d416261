"""Inception score and kernel distance of subsets: known answers."""

import numpy as np
import pytest

from diffusion.metrics import distances, scores


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("classes", [2, 7, 10])
def test_score_of_certain_predictions_of_all_classes_is_their_number(classes):
    logits = 200.0 * np.eye(classes)[np.arange(20 * classes) % classes]
    for splits in (1, 10):
        assert scores.inception_score(logits, splits) == pytest.approx((classes, 0), rel=1e-9, abs=1e-9)
    assert scores.inception_score(logits[logits[:, 0] > 0])[0] == pytest.approx(1)


def test_score_of_predictions_that_say_nothing_is_1(rng):
    logits = np.repeat(rng.normal(size=(1, 6)), 40, 0)
    assert scores.inception_score(logits) == pytest.approx((1, 0), abs=1e-9)
    shifted = rng.normal(size=(40, 6))
    assert scores.inception_score(shifted + rng.normal(size=(40, 1))) == pytest.approx(scores.inception_score(shifted))


def test_score_is_the_published_formula_over_splits(rng):
    logits = rng.normal(0, 3, size=(23, 5)).astype(np.float32)
    values = []
    for i in range(4):
        part = logits[i * 23 // 4 : (i + 1) * 23 // 4].astype(float)
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        values.append(np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), 1))))
    assert scores.inception_score(logits, 4) == pytest.approx((np.mean(values), np.std(values)), rel=1e-6)


def test_kernel_distance_of_subsets_of_equal_distributions_is_around_0(rng):
    a, b = rng.normal(size=(2, 400, 4))
    mean, deviation = scores.kernel_subsets(a, b, subsets=60, size=50)
    assert deviation > 0 and abs(mean) < deviation
    shifted, _ = scores.kernel_subsets(a + 1, b, subsets=60, size=50)
    assert shifted > 10 * deviation


def test_one_subset_of_everything_is_the_kernel_distance(rng):
    a, b = rng.normal(size=(30, 3)), rng.normal(0.3, 1, size=(30, 3))
    mean, deviation = scores.kernel_subsets(a, b, subsets=3)
    assert mean == pytest.approx(distances.kernel_distance(a, b), rel=1e-9) and deviation < 1e-9
    drawn = [scores.kernel_subsets(a, b, subsets=2, size=9, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_has_no_score_is_refused(rng):
    logits = rng.normal(size=(9, 3))
    for splits in (0, 10):
        with pytest.raises(ValueError, match=f"splits={splits} must lie in 1 .. 9"):
            scores.inception_score(logits, splits)
    with pytest.raises(ValueError, match=r"logits must be \[N, K\], not \(9,\)"):
        scores.inception_score(logits[:, 0])
    with pytest.raises(ValueError, match="logits contain 1 values that are NaN"):
        scores.inception_score(np.where(np.arange(27).reshape(9, 3) == 4, np.nan, logits))
    for given in ({"subsets": 0}, {"size": 1}):
        with pytest.raises(ValueError, match="must be at least"):
            scores.kernel_subsets(logits, logits, **given)
