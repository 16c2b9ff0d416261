"""Bootstrap intervals: that they cover what they should, and the weights of the kernel distance."""

import numpy as np
import pytest

from diffusion.metrics import distances, intervals
from diffusion.metrics.moments import frechet, gaussian, moments


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_interval_of_a_mean_is_that_of_theory(rng):
    x = rng.normal(3, 2, size=400)
    low, high = intervals.bootstrap(lambda which: x[which].mean(), 400, resamples=2000)
    half = 1.96 * x.std() / 20
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.1 * half)
    narrow = intervals.bootstrap(lambda which: x[which].mean(), 400, resamples=2000, level=0.5)
    assert narrow.high - narrow.low == pytest.approx(0.6745 / 1.96 * (high - low), rel=0.1)


def test_interval_of_a_distance_covers_its_mean_over_sets_of_the_same_size(rng):
    """The percentiles alone would not: the distance of a resample is too large."""
    real = gaussian(moments(rng.normal(size=(500, 4))))
    sets = rng.normal(0.1, 1, size=(40, 60, 4))
    distance = lambda x: frechet(gaussian(moments(x)), real)  # noqa: E731
    expected = np.mean([distance(x) for x in sets])
    found = [intervals.bootstrap(lambda which, x=x: distance(x[which]), 60, resamples=60) for x in sets]
    assert np.mean([low <= expected <= high for low, high in found]) > 0.8
    plain = [np.mean([distance(x[rng.integers(0, 60, 60)]) for _ in range(20)]) for x in sets]
    assert np.mean(plain) > 1.3 * expected


def test_kernel_interval_is_the_bootstrap_without_pairs_of_copies(rng, monkeypatch):
    a, b = rng.normal(size=(12, 3)), rng.normal(0.5, 1, size=(10, 3))
    kernel = lambda x, y: (x @ y.T / 3 + 1) ** 3  # noqa: E731
    of_b = kernel(b, b)[~np.eye(10, dtype=bool)].mean()

    def loop(which):
        pairs = kernel(a[which], a[which])[which[:, None] != which]
        return pairs.mean() + of_b - 2 * kernel(a[which], b).mean()

    expected = intervals.bootstrap(loop, 12, resamples=30, seed=3)
    assert loop(np.arange(12)) == pytest.approx(distances.kernel_distance(a, b))
    assert intervals.kernel_interval(a, b, resamples=30, seed=3) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(intervals.blocks, "ROWS", 5)
    assert intervals.kernel_interval(a, b, resamples=30, seed=3) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_equal_distributions_is_0_within_its_interval(rng):
    hit = 0
    for _ in range(30):
        a, b = rng.normal(size=(2, 150, 3))
        low, high = intervals.kernel_interval(a, b, resamples=100)
        hit += low <= 0 <= high
    assert hit >= 20  # over the rows of a alone, so less often than 95 %
    low, _ = intervals.kernel_interval(a + 1, b)
    assert low > 0


def test_kernel_interval_of_few_rows_is_finite(rng):
    """Of two rows, half of the resamples hold one of them twice."""
    low, high = intervals.kernel_interval(*rng.normal(size=(2, 2, 3)))
    assert np.isfinite([low, high]).all() and low <= high


def test_seeds_and_ranges(rng):
    x = rng.normal(size=20)
    mean = lambda which: x[which].mean()  # noqa: E731
    same, again, other = (intervals.bootstrap(mean, 20, resamples=9, seed=seed) for seed in (0, 0, 1))
    assert same == again != other
    for given in ({"resamples": 1}, {"level": 1.0}, {"level": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(given))}="):
            intervals.bootstrap(mean, 20, **given)
        with pytest.raises(ValueError, match=f"{next(iter(given))}="):
            intervals.kernel_interval(x[:, None], x[:, None], **given)
