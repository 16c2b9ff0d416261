"""experiments.metric_figure: what is done to images, and that the figure has every metric and damage."""

import numpy as np
import pytest

from experiments import metric_figure
from experiments.metric_figure import DAMAGES, ROWS


@pytest.fixture
def digits():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (40, 28, 28, 1), np.uint8), np.arange(40) % 10


@pytest.mark.parametrize(("damage", "levels"), [(damage, levels) for damage, _, levels in DAMAGES])
def test_damages_begin_at_none_and_grow(digits, damage, levels):
    """In what they change: pixels, or how many different images are left."""
    x, y = digits
    more = (x[::-1] ^ 1, y[::-1]) if damage is metric_figure.dropped_classes else ()
    made = [damage(x, y, np.random.default_rng(0), level, *more) for level in levels]
    assert {(each.dtype, each.shape) for each in made} == {(x.dtype, x.shape)}
    assert sorted(each.tobytes() for each in made[0]) == sorted(each.tobytes() for each in x)
    if damage in (metric_figure.noise, metric_figure.blur):
        changed = [np.abs(each.astype(float) - x).mean() for each in made]
    elif damage is metric_figure.shift:
        changed = [int(np.flatnonzero([(np.roll(x, n, 2) == each).all() for n in range(28)])[0]) for each in made]
        assert changed == list(levels)
    elif damage is metric_figure.dropped_classes:
        changed = [(each.reshape(40, 1, -1) != x.reshape(1, 40, -1)).any(2).all(1).sum() for each in made]
    else:
        changed = [-len(np.unique(each.reshape(len(x), -1), axis=0)) for each in made]
    assert changed == sorted(set(changed))


def test_dropped_classes_are_gone(digits):
    x, y = digits
    spare = x[::-1] ^ 1
    left = metric_figure.dropped_classes(x, y, np.random.default_rng(0), 3, spare, y[::-1])
    known = {each.tobytes(): c for each, c in zip([*x, *spare], [*y, *y[::-1]], strict=True)}
    assert min(known[each.tobytes()] for each in left) == 3 and len({each.tobytes() for each in left}) == 40


@pytest.mark.slow
def test_the_figure_has_every_metric_and_damage():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (160, 28, 28, 1), np.uint8), np.arange(160) % 10
    found = metric_figure.measure(images, labels, 40, 2)
    figure = metric_figure.plot(found)
    assert len(figure.axes) == len(ROWS) * len(DAMAGES)
    for axes, names in zip(figure.axes[:: len(DAMAGES)], ROWS, strict=True):
        (line, *_) = axes.lines
        expected = np.mean([[numbers[names[0]] for numbers in seed[0]] for seed in found], 0)
        np.testing.assert_allclose(line.get_ydata(), expected)
