"""Moments of features in batches against NumPy; the Frechet distance against closed forms and SciPy."""

import numpy as np
import pytest
import scipy.linalg

from diffusion.metrics import blocks, distances, moments


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("sizes", [(40,), (1, 1, 38), (13, 27), (5,) * 8])
def test_moments_of_batches_are_those_of_all_rows(rng, sizes):
    """Also where the mean is large against the deviation, and whatever the type of the features."""
    x = (rng.normal(size=(40, 6)) + 1e6).astype(np.float32)
    total = moments.moments(batch for batch in np.split(x, np.cumsum(sizes)[:-1]))
    found = moments.gaussian(total)
    assert total.count == 40
    np.testing.assert_allclose(found.mean, x.astype(float).mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(x.astype(float), rowvar=False), rtol=1e-9, atol=1e-12)


def test_rows_are_converted_in_chunks(rng, monkeypatch):
    """Nothing of the size of all rows is made: one chunk is float64 at once."""
    x = rng.normal(size=(50, 3)).astype(np.float32)
    whole = moments.moments(x)
    seen = []
    of = moments._of
    monkeypatch.setattr(blocks, "CHUNK", 8)
    monkeypatch.setattr(moments, "_of", lambda rows: seen.append(len(rows)) or of(rows))
    np.testing.assert_allclose(moments.moments(x).m2, whole.m2, rtol=1e-12)
    assert seen == [8] * 6 + [2]


def test_merging_does_not_depend_on_order(rng):
    a, b, c = (moments.moments(rng.normal(i, 1 + i, size=(4 + i, 3))) for i in range(3))
    left, right = moments.merge(moments.merge(a, b), c), moments.merge(c, moments.merge(b, a))
    assert left.count == right.count == 15
    np.testing.assert_allclose(left.mean, right.mean, rtol=1e-13)
    np.testing.assert_allclose(left.m2, right.m2, rtol=1e-12, atol=1e-13)


def test_distance_of_gaussians_that_commute(rng):
    """|m - m'|^2 + sum_i (s_i - s'_i)^2 for covariances with the same axes, singular ones included."""
    axes, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    mean, other = rng.normal(size=(2, 5))
    s, z = np.array([3.0, 1.0, 0.5, 0.0, 0.0]), np.array([1.0, 2.0, 0.0, 0.5, 0.0])
    a, b = moments.Gaussian(mean, axes * s**2 @ axes.T), moments.Gaussian(other, axes * z**2 @ axes.T)
    expected = np.square(mean - other).sum() + np.square(s - z).sum()
    assert moments.frechet(a, b) == pytest.approx(expected, rel=1e-6)
    assert moments.frechet(a, b, moments.square_root(a.covariance)) == moments.frechet(a, b)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_distance_is_scipys(rng, scale):
    x, y = scale * rng.normal(size=(300, 20)), scale * rng.normal(0.5, 2, size=(200, 20)) @ rng.normal(size=(20, 20))
    a, b = (moments.gaussian(moments.moments(part)) for part in (x, y))
    cross = scipy.linalg.sqrtm(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False)).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a.covariance + b.covariance - 2 * cross)
    assert moments.frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert distances.frechet_distance(x, y) == moments.frechet(a, b)


def test_what_cannot_be_added_or_compared_is_refused(rng):
    x = rng.normal(size=(5, 3))
    with pytest.raises(ValueError, match="batches of 3 and of 2 features cannot be added"):
        moments.moments([x, x[:, :2]])
    with pytest.raises(ValueError, match="there are no features"):
        moments.moments([])
    with pytest.raises(ValueError, match=r"\[N, F\], not \(5,\)"):
        moments.moments(x[:, 0])
    with pytest.raises(ValueError, match="1 values that are NaN or infinite"):
        moments.moments([x, np.where(np.arange(15).reshape(5, 3) == 7, np.nan, x)])
    with pytest.raises(ValueError, match="at least 2 rows, not 1"):
        moments.gaussian(moments.moments(x[:1]))
    a, b = (moments.gaussian(moments.moments(part)) for part in (x, x[:, :2]))
    with pytest.raises(ValueError, match="3 and 2 features, so they come from different networks"):
        moments.frechet(a, b)
