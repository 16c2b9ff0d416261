"""Precision, recall, density and coverage: against loops over the paper's definitions, and balls that are known."""

import numpy as np
import pytest

from diffusion.metrics import blocks, distances
from diffusion.metrics.neighbours import neighbourhoods


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def loop(real, fake, k):
    """The four numbers as they are defined, one pair at a time."""
    reach = lambda x: [sorted(np.linalg.norm(x - row, axis=1))[k] for row in x]  # noqa: E731
    of_real, of_fake = reach(real), reach(fake)
    inside = np.array([[np.linalg.norm(r - f) <= d for f in fake] for r, d in zip(real, of_real, strict=True)])
    within = np.array([[np.linalg.norm(r - f) <= d for r in real] for f, d in zip(fake, of_fake, strict=True)])
    return inside.any(0).mean(), within.any(0).mean(), inside.sum() / (k * len(fake)), inside.any(1).mean()


@pytest.mark.parametrize("rows", [3, 256])
def test_the_four_numbers_are_the_loop(rng, monkeypatch, rows):
    monkeypatch.setattr(blocks, "ROWS", rows)
    real, fake = rng.normal(size=(30, 2)), rng.normal(1.0, 1.2, size=(20, 2))
    for k in (1, 3, 5):
        near = neighbourhoods(real, fake, k)
        assert (near.precision, near.recall, near.density, near.coverage) == pytest.approx(loop(real, fake, k))
        assert (near.precision, near.recall) == distances.precision_recall(real, fake, k)


@pytest.mark.slow
def test_the_four_numbers_are_those_of_the_published_program(rng):
    prdc = pytest.importorskip("prdc")
    real, fake = rng.normal(size=(300, 8)).astype(np.float32), rng.normal(0.3, 1.1, size=(200, 8)).astype(np.float32)
    for k in (3, 5):
        expected, near = prdc.compute_prdc(real, fake, k), neighbourhoods(real, fake, k)
        assert {name: getattr(near, name) for name in expected} == pytest.approx(expected, abs=1e-12)


def test_samples_of_the_same_distribution_have_density_and_coverage_of_theory(rng):
    """Naeem et al., section 3.3: density 1, coverage 1 - (N-1)...(N-k) / ((N+M-1)...(N+M-k)), here 1 - 2^-k nearly."""
    real, fake = rng.normal(size=(2, 1500, 3))
    near = neighbourhoods(real, fake, 4)
    assert near.density == pytest.approx(1, abs=0.05)
    assert near.coverage == pytest.approx(1 - 2**-4, abs=0.02)


def test_a_shifted_ball_leaves_the_real_ones(rng):
    """Two balls of radius 1, d apart: the further, the lower all four, and 0 without contact."""
    x = rng.normal(size=(2, 400, 3))
    x = x / np.linalg.norm(x, axis=-1, keepdims=True) * rng.uniform(size=(2, 400, 1)) ** (1 / 3)
    values = []
    for d in (0.0, 0.7, 1.4, 4.0):
        near = neighbourhoods(x[0], x[1] + [d, 0, 0])
        values.append([near.precision, near.recall, near.density, near.coverage])
    assert (np.diff(values, axis=0) < 0).all() and values[-1] == [0, 0, 0, 0]
    assert min(values[0]) > 0.9


def test_an_outlier_raises_precision_and_not_density(rng):
    """The paper's figure 1: a real outlier has a ball that reaches to all fakes."""
    real, fake = rng.normal(size=(100, 2)), rng.normal(20, 1, size=(50, 2))
    outlier = np.concatenate([real, [[40.0, 40.0]]])
    assert neighbourhoods(real, fake).precision == 0
    near = neighbourhoods(outlier, fake)
    assert near.precision == 1 and near.density == pytest.approx(1 / 5)


def test_all_copies_of_one_image_are_not_covering(rng):
    real = rng.normal(size=(60, 4))
    near = neighbourhoods(real, np.repeat(real[:1], 30, 0))
    assert near.precision == 1 and near.coverage < 0.3 and near.recall == pytest.approx(1 / 60)
