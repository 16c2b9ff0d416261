"""Sources, batches as a function of (seed, step), and prefetching."""

import threading
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion import data
from diffusion.data import batches


def numbered(n, size=(4, 6), channels=1):
    """n images of noise, labelled with their own numbers."""
    images = np.random.default_rng(0).integers(0, 256, (n, *size, channels), np.uint8)
    return data.from_arrays(images, np.arange(n))


# Batches


@given(st.integers(1, 20), st.integers(1, 50), st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=50)
def test_every_epoch_contains_every_image_once(n, batch_size, seed):
    source = numbered(n)
    steps = -(-3 * n // batch_size)
    seen = np.concatenate([data.batch(source, seed, step, batch_size)["y"] for step in range(steps)])
    for epoch in seen[: 3 * n].reshape(3, n):
        assert sorted(epoch) == list(range(n))


@given(st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None, max_examples=30)
def test_samples_and_their_augmentation_do_not_depend_on_the_batch_size(b1, b2):
    source = numbered(7, (5, 5), 3)
    total = b1 * b2
    one = [data.batch(source, 3, step, b1, flip=True, shift=2) for step in range(b2)]
    two = [data.batch(source, 3, step, b2, flip=True, shift=2) for step in range(b1)]
    for name in ("x", "y"):
        first, second = (np.concatenate([batch[name] for batch in batches]) for batches in (one, two))
        assert len(first) == total
        np.testing.assert_array_equal(first, second)


def test_batches_do_not_depend_on_the_order_of_steps():
    source = numbered(11)
    forward = [data.batch(source, 0, step, 4, flip=True, shift=1)["x"] for step in range(30)]
    batches._permutation.cache_clear()
    for step in reversed(range(30)):
        np.testing.assert_array_equal(data.batch(source, 0, step, 4, flip=True, shift=1)["x"], forward[step])


def test_images_keep_their_labels_and_types():
    source = numbered(50)
    batch = data.batch(source, 1, 2, 16)
    assert batch["x"].dtype == np.uint8
    assert batch["y"].dtype == np.int32
    np.testing.assert_array_equal(batch["x"], source.images[batch["y"]])


def test_the_order_differs_between_seeds_and_epochs():
    source = numbered(100)
    orders = [tuple(data.batch(source, seed, step, 100)["y"]) for seed in (0, 1) for step in (0, 1)]
    assert len(set(orders)) == 4


def test_the_order_is_the_same_with_every_version_of_numpy():
    """Otherwise a run that was started with another version of NumPy would resume with other batches."""
    assert data.batch(numbered(10), 7, 0, 10)["y"].tolist() == [8, 4, 1, 6, 3, 2, 7, 5, 9, 0]


def test_a_flip_mirrors_about_half_and_changes_nothing_else():
    source = numbered(400)
    batch = data.batch(source, 0, 0, 400, flip=True)
    plain = source.images[batch["y"]]
    same = (batch["x"] == plain).all((1, 2, 3))
    mirrored = (batch["x"] == plain[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250  # 5 standard deviations


def test_a_shift_moves_by_every_offset_and_repeats_the_edge():
    source = numbered(400)
    batch = data.batch(source, 0, 0, 400, shift=2)
    height, width = source.images.shape[1:3]
    counts = np.zeros((5, 5), int)
    for x, y in zip(batch["x"], batch["y"], strict=True):
        padded = np.pad(source.images[y], ((2, 2), (2, 2), (0, 0)), mode="edge")
        hits = [(i, j) for i in range(5) for j in range(5) if (padded[i : i + height, j : j + width] == x).all()]
        assert len(hits) == 1
        counts[hits[0]] += 1
    assert counts.min() > 0
    assert counts.max() < 40  # 16 expected


def test_a_shifted_digit_keeps_its_background():
    images = np.zeros((1, 8, 8, 1), np.uint8)
    images[0, 3:5, 3:5] = 255
    batch = data.batch(data.from_arrays(images), 0, 0, 64, shift=3)
    assert (batch["x"].sum((1, 2, 3), dtype=int) == 4 * 255).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"step": -1}, "step=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed="),
        ({"shift": 4}, "shift=4 must lie in 0 .. 3"),
        ({"shift": -1}, "shift=-1"),
    ],
)
def test_batch_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.batch(numbered(3), **{"seed": 0, "step": 0, "batch_size": 2, **arguments})


# Prefetch


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetch_yields_every_step_in_order_and_ends_its_thread():
    assert list(data.prefetch(lambda step: step**2, 3, 8)) == [(step, step**2) for step in range(3, 8)]
    assert list(data.prefetch(lambda step: step, 3, 3)) == []
    assert not prefetch_threads()


def test_prefetch_stops_with_its_consumer():
    with closing(data.prefetch(lambda step: step, 0, 10**9)) as batches:
        assert next(batches) == (0, 0)
        assert len(prefetch_threads()) == 1
    assert not prefetch_threads()


@pytest.mark.parametrize("depth", [1, 3])
def test_prefetch_is_exactly_depth_steps_ahead(depth):
    made, ready = [], threading.Semaphore(0)

    def make(step):
        made.append(step)
        ready.release()

    with closing(data.prefetch(make, 0, 100, depth)) as batches:
        next(batches)
        for _ in range(depth + 1):
            assert ready.acquire(timeout=10)
        assert not ready.acquire(timeout=0.05)
        assert made == list(range(depth + 1))


def test_prefetch_raises_what_make_batch_raises_after_the_batches_before_it():
    def make(step):
        if step == 2:
            raise RuntimeError("no more")
        return step

    got = []
    with pytest.raises(RuntimeError, match="no more"):
        got.extend(data.prefetch(make, 0, 5))
    batches = data.prefetch(make, 0, 5)
    assert [next(batches), next(batches)] == [(0, 0), (1, 1)]
    with pytest.raises(RuntimeError, match="no more"):
        next(batches)
    assert not prefetch_threads()


def test_prefetch_refuses_no_depth():
    with pytest.raises(ValueError, match="depth=0"):
        data.prefetch(lambda step: step, 0, 1, 0)


# Arrays


def test_arrays_without_labels_have_no_classes():
    source = data.from_arrays(np.zeros((3, 2, 2, 1), np.uint8))
    assert source.num_classes == 0
    assert source.labels.tolist() == [0, 0, 0]


def test_arrays_with_names():
    source = data.from_arrays(np.zeros((2, 2, 2, 3), np.uint8), [1, 0], ("cat", "dog", "cow"))
    assert (source.num_classes, source.labels.dtype) == (3, np.int32)


ZEROS = np.zeros((2, 4, 4, 1), np.uint8)
HOLE = np.zeros((2, 4, 4, 1), np.float32)
HOLE[1, 2, 3, 0] = np.nan


@pytest.mark.parametrize(
    ("images", "labels", "names", "error", "message"),
    [
        (HOLE, None, (), ValueError, r"1 values that are NaN or infinite, the first at index \(1, 2, 3, 0\)"),
        (ZEROS.astype(np.float32), None, (), TypeError, r"not float32: pass np.rint\(images \* 255\)"),
        (ZEROS.astype(np.int64), None, (), TypeError, r"not int64: pass images.astype\(np.uint8\)"),
        (ZEROS[..., 0], None, (), ValueError, r"images\[..., None\]"),
        (ZEROS[:0], None, (), ValueError, r"N >= 1, not \(0, 4, 4, 1\)"),
        (ZEROS, [0, -1], (), ValueError, "label -1 of image 1 of arrays is negative"),
        (ZEROS, [0, 3], ("a", "b"), ValueError, r"label 3 of image 1 of arrays is outside 0 .. 1 \(1 such"),
        (ZEROS, [0], (), ValueError, r"labels of arrays have shape \(1,\), but there are 2 images"),
        (ZEROS, [0.0, 1.0], (), TypeError, "integers, not float64"),
        (ZEROS, None, ("a",), ValueError, "no labels"),
        (ZEROS, [0, 1], ("\xe9", "b", "e\u0301"), ValueError, "arrays has two classes of one name: 0 and 2"),
    ],
)
def test_from_arrays_refuses(images, labels, names, error, message):
    with pytest.raises(error, match=message):
        data.from_arrays(images, labels, names)
