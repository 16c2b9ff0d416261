"""Sources, batches as a function of (seed, step), folders of pictures, TFDS data sets, and the errors of each."""

import http.server
import importlib.util
import io
import json
import os
import socket
import struct
import threading
import types
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion import data
from diffusion.data import batches, mnist5k
from diffusion.data import tfds as door


def numbered(n, size=(4, 6), channels=1):
    """n pictures of noise, labelled with their own numbers."""
    images = np.random.default_rng(0).integers(0, 256, (n, *size, channels), np.uint8)
    return data.from_arrays(images, np.arange(n))


# Batches


@given(st.integers(1, 20), st.integers(1, 50), st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=50)
def test_every_epoch_shows_every_picture_once(n, batch_size, seed):
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


def test_a_batch_is_the_same_in_any_order_of_asking():
    source = numbered(11)
    forward = [data.batch(source, 0, step, 4, flip=True, shift=1)["x"] for step in range(30)]
    batches._permutation.cache_clear()
    for step in reversed(range(30)):
        np.testing.assert_array_equal(data.batch(source, 0, step, 4, flip=True, shift=1)["x"], forward[step])


def test_pictures_keep_their_labels_and_types():
    source = numbered(50)
    batch = data.batch(source, 1, 2, 16)
    assert batch["x"].dtype == np.uint8
    assert batch["y"].dtype == np.int32
    np.testing.assert_array_equal(batch["x"], source.images[batch["y"]])


def test_seeds_and_epochs_have_their_own_order():
    source = numbered(100)
    orders = [tuple(data.batch(source, seed, step, 100)["y"]) for seed in (0, 1) for step in (0, 1)]
    assert len(set(orders)) == 4


def test_the_order_outlives_versions_of_numpy():
    """Runs made with other versions of NumPy continue with the same batches only while this holds."""
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
def test_prefetch_is_depth_steps_ahead_and_no_more(depth):
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
        (ZEROS[:0], None, (), ValueError, "no pictures"),
        (ZEROS, [0, -1], (), ValueError, "label -1 of picture 1"),
        (ZEROS, [0, 3], ("a", "b"), ValueError, r"label 3 of picture 1 of arrays is outside 0 .. 1 \(1 such"),
        (ZEROS, [0], (), ValueError, r"shape \(1,\), but there are 2"),
        (ZEROS, [0.0, 1.0], (), TypeError, "integers, not float64"),
        (ZEROS, None, ("a",), ValueError, "no labels"),
    ],
)
def test_from_arrays_refuses(images, labels, names, error, message):
    with pytest.raises(error, match=message):
        data.from_arrays(images, labels, names)


# Folders


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def grey(value, size=(6, 6)):
    return np.full(size, value, np.uint8)


def coloured(value, size=(6, 6)):
    return np.full((*size, 3), value, np.uint8)


def folder(path, split="all", **options):
    return data.load(f"folder:{path}", split, **options)


def test_classes_are_sorted_first_sub_folders(tmp_path):
    save(tmp_path / "dog" / "young" / "x.PNG", grey(20))
    save(tmp_path / "cat" / "b.JPeG", grey(10))
    save(tmp_path / "cat" / "a.webp", coloured((1, 2, 3)), lossless=True)
    save(tmp_path / "cat" / ".hidden.png", grey(30))
    save(tmp_path / ".thumbnails" / "a.png", grey(30))
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    source = folder(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [0, 0, 1]
    assert source.images[:, 0, 0].tolist() == [[1, 2, 3], [10, 10, 10], [20, 20, 20]]


def test_files_at_the_top_have_no_label(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", grey(i))
    source = folder(tmp_path)
    assert (source.num_classes, source.images.shape) == (0, (3, 6, 6, 1))
    assert source.images[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_files_with_and_without_a_class_are_refused(tmp_path):
    save(tmp_path / "cover.png", grey(0))
    save(tmp_path / "cat" / "a.png", grey(0))
    with pytest.raises(ValueError, match=r"cat/a.png lies in a sub-folder, cover.png does not \(1 such"):
        folder(tmp_path)


def test_a_link_in_a_circle_is_walked_once(tmp_path):
    save(tmp_path / "real" / "a.png", grey(0))
    (tmp_path / "real" / "again").symlink_to(tmp_path / "real")
    assert len(folder(tmp_path).images) == 1


@pytest.mark.parametrize("held_out", ["test", "val", "validation"])
def test_train_and_test_folders_are_the_splits(tmp_path, held_out):
    save(tmp_path / "train" / "cat" / "a.png", grey(1))
    save(tmp_path / "train" / "dog" / "a.png", grey(2))
    save(tmp_path / held_out / "dog" / "b.png", grey(3))
    save(tmp_path / "extra" / "cow" / "c.png", grey(4))  # in neither
    train, test = folder(tmp_path, "train"), folder(tmp_path, "test")
    assert train.images[:, 0, 0, 0].tolist() == [1, 2]
    assert test.images[:, 0, 0, 0].tolist() == [3]
    assert test.labels.tolist() == [1]  # "dog", though there is no cat
    assert train.class_names == test.class_names == ("cat", "dog")
    assert len(folder(tmp_path, "all").images) == 3


def test_the_hashed_split_is_a_tenth_and_does_not_move(tmp_path):
    for i in range(300):
        save(tmp_path / "few" / f"{i}.png", np.array([[i % 256, i // 256]], np.uint8))

    def members(split):
        images = folder(tmp_path, split).images.astype(int)
        return set(images[:, 0, 0, 0] + 256 * images[:, 0, 1, 0])

    train, test = members("train"), members("test")
    assert not train & test
    assert train | test == set(range(300))
    assert 12 <= len(test) <= 50
    for i in range(50):
        (tmp_path / "few" / f"{i}.png").unlink()
    assert members("test") == {i for i in test if i >= 50}


@pytest.mark.parametrize(("n", "stem"), [(2, "a"), (2, "b"), (2, "c"), (3, "a"), (5, "a")])
def test_the_hashed_split_leaves_neither_side_empty(tmp_path, n, stem):
    for i in range(n):
        save(tmp_path / f"{stem}{i}.png", grey(i))
    sizes = [len(folder(tmp_path, split).images) for split in ("train", "test")]
    assert min(sizes) >= 1
    assert sum(sizes) == n


def test_one_picture_cannot_be_split(tmp_path):
    save(tmp_path / "a.png", grey(0))
    assert len(folder(tmp_path, "train").images) == 1
    with pytest.raises(ValueError, match="split='test'.*too few"):
        folder(tmp_path, "test")
    with pytest.raises(ValueError, match="split='dev'.*'train', 'test', 'all'"):
        folder(tmp_path, "dev")


def test_transparency_is_laid_over_white(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]
    save(tmp_path / "0.png", rgba)
    palette = Image.new("P", (3, 1))
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    palette.putdata([0, 1, 2])
    palette.save(tmp_path / "1.png", transparency=1)
    palette.save(tmp_path / "2.png")
    Image.merge("LA", [Image.new("L", (3, 1), 40), Image.new("L", (3, 1), 0)]).save(tmp_path / "3.png")
    assert folder(tmp_path).images[:, 0].tolist() == [
        [[200, 0, 0], [255, 255, 255], [244, 204, 204]],
        [[200, 0, 0], [255, 255, 255], [0, 0, 200]],
        [[200, 0, 0], [0, 200, 0], [0, 0, 200]],
        [[255, 255, 255]] * 3,
    ]


def test_16_bit_and_1_bit_grey_are_scaled(tmp_path):
    save(tmp_path / "0.png", np.array([[0, 255, 32896, 65535]], np.uint16))
    Image.fromarray(np.array([[False, True, False, True]])).save(tmp_path / "1.png")
    assert folder(tmp_path).images[:, 0, :, 0].tolist() == [[0, 1, 128, 255], [0, 255, 0, 255]]


def test_channels_are_common_or_as_asked(tmp_path):
    save(tmp_path / "0.png", grey(50))
    assert folder(tmp_path).images.shape[-1] == 1
    assert folder(tmp_path, channels=3).images[0, 0, 0].tolist() == [50, 50, 50]
    save(tmp_path / "1.png", coloured((255, 0, 0)))
    assert folder(tmp_path).images[:, 0, 0].tolist() == [[50, 50, 50], [255, 0, 0]]
    assert folder(tmp_path, channels=1).images[:, 0, 0].tolist() == [[50], [76]]  # ITU-R 601: 0.299 * 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_obeyed(tmp_path, orientation):
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    # What a camera held in this way stores, from the definition of the tag: (0th row, 0th column) of the file is ...
    stored = {
        1: upright,  # (top, left)
        2: upright[:, ::-1],  # (top, right)
        3: upright[::-1, ::-1],  # (bottom, right)
        4: upright[::-1],  # (bottom, left)
        5: upright.T,  # (left, top)
        6: upright.T[::-1],  # (right, top)
        7: upright[::-1, ::-1].T,  # (right, bottom)
        8: upright.T[:, ::-1],  # (left, bottom)
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "a.png", stored, exif=exif)
    save(tmp_path / "b.png", upright)  # of the size that the other one has when upright
    images = folder(tmp_path).images[..., 0]
    np.testing.assert_array_equal(images[0], images[1])


def test_pictures_that_differ_in_size_name_two_of_them_and_the_flag(tmp_path):
    save(tmp_path / "a.png", grey(0, (6, 6)))
    save(tmp_path / "b.png", grey(0, (6, 8)))
    with pytest.raises(ValueError, match=r"a.png is 6x6, .*b.png is 6x8.*--config\.data\.size"):
        folder(tmp_path)
    with pytest.raises(ValueError, match=r"b.png \(it is 6x8, not 6x6, and crop is 'none'\)"):
        folder(tmp_path, size=6, crop="none")
    assert folder(tmp_path, size=(6, 8)).images.shape == (2, 6, 8, 1)


def test_center_cuts_and_resize_squashes(tmp_path):
    stripes = np.repeat(np.array([0, 100, 200], np.uint8), 60)[None].repeat(60, 0)  # 60 x 180: three squares
    save(tmp_path / "wide.png", stripes)
    save(tmp_path / "tall.png", stripes.T)
    tall, wide = folder(tmp_path, size=20).images[..., 0]
    assert (tall[4:16] == 100).all()  # the filter reaches over the cut, not over four pixels
    assert (wide[:, 4:16] == 100).all()
    tall, wide = folder(tmp_path, size=30, crop="resize").images[..., 0]
    assert tall[[4, 15, 25]].tolist() == [[0] * 30, [100] * 30, [200] * 30]
    assert wide[:, [4, 15, 25]].T.tolist() == [[0] * 30, [100] * 30, [200] * 30]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_downsampling_averages_instead_of_skipping(tmp_path, suffix):
    """A checkerboard of single pixels becomes its mean, also on the path that decodes a JPEG at reduced size."""
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    save(tmp_path / f"a.{suffix}", board, **({"quality": 100} if suffix == "jpg" else {}))
    small = folder(tmp_path, size=16).images.astype(int)
    assert abs(small - 127.5).max() <= 3


def test_a_jpeg_decoded_at_reduced_size_keeps_its_detail(tmp_path):
    waves = np.sin(np.arange(512) * 2 * np.pi / 16)  # 3.1 pixels each after scaling to 100
    picture = (127.5 + 100 * np.outer(waves, waves)).round().astype(np.uint8)
    save(tmp_path / "a.png", picture)
    save(tmp_path / "b.jpg", picture, quality=100)
    png, jpg = folder(tmp_path, size=100).images.astype(int)
    assert png.std() > 30
    assert abs(png - jpg).max() <= 12


def test_a_picture_of_the_right_size_is_not_resampled(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    save(tmp_path / "a.png", noise)
    for crop in data.CROPS:
        np.testing.assert_array_equal(folder(tmp_path, size=32, crop=crop).images[0], noise)


def corrupt(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("memory_limit", [1 << 30, 1])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_files_that_end_too_early_are_named_before_training(tmp_path, suffix, memory_limit):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for i in range(3):
        save(tmp_path / f"{i}.{suffix}", noise)
    corrupt(tmp_path / f"1.{suffix}")
    with pytest.raises(ValueError, match=rf"1 of 3 pictures of folder:.*1\.{suffix} \("):
        folder(tmp_path, memory_limit=memory_limit)


def test_up_to_five_unreadable_files_are_listed(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.png").write_text("no picture")
    save(tmp_path / "8.png", grey(0))
    with pytest.raises(ValueError, match=r"8 of 9 .*/0\.png \(not a picture.*/4\.png \([^/]*and 3 more"):
        folder(tmp_path)


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(ValueError, match="holds no .png, .jpg, .jpeg, .webp file"):
        folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, ValueError, "size=\\(0, 0\\)"),
        ({"size": (1, 2, 3)}, ValueError, "size="),
        ({"size": 1.5}, TypeError, "size=1.5"),
        ({"crop": "centre"}, ValueError, "crop='centre'"),
        ({"channels": 4}, ValueError, "channels=4"),
        ({"name": ""}, ValueError, "name=''"),
    ],
)
def test_load_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        data.load(**{"name": "folder:.", **arguments})


# On demand


def test_a_data_set_beyond_memory_is_the_same_data_set(tmp_path):
    for i in range(20):
        noise = np.random.default_rng(i).integers(0, 256, (9, 12, 3), np.uint8)
        save(tmp_path / f"{i % 3}" / f"{i}.png", noise)
    kept, lazy = (folder(tmp_path, size=8, memory_limit=limit) for limit in (1 << 30, 100))
    assert isinstance(kept.images, np.ndarray)
    assert not isinstance(lazy.images, np.ndarray)
    assert lazy.images.shape == kept.images.shape
    assert len(lazy.images) == 20
    for indices in (np.array([3, 3, 19]), slice(2, 9), -1, np.array([], int), np.array([[0, 1], [2, 3]])):
        np.testing.assert_array_equal(lazy.images[indices], kept.images[indices])
    with pytest.raises(IndexError):
        lazy.images[np.array([20])]
    for name in ("x", "y"):
        one, two = (data.batch(source, 0, 4, 7, flip=True, shift=2)[name] for source in (kept, lazy))
        np.testing.assert_array_equal(one, two)


def test_a_file_that_vanishes_while_training_is_named(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png", grey(i))
    source = folder(tmp_path, memory_limit=1)
    (tmp_path / "2.png").write_text("overwritten")
    with pytest.raises(ValueError, match=r"cannot read .*/2\.png"):
        source.images[np.arange(4)]


# TFDS


def png(array):
    content = io.BytesIO()
    Image.fromarray(array).save(content, "png")
    return content.getvalue()


class ToyPictures(tfds.core.GeneratorBasedBuilder):
    """Twenty pictures of two sizes beside features that are of no interest here."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "mask": tfds.features.Image(shape=(None, None, 1)),
                    "label": tfds.features.ClassLabel(names=["odd", "even"]),
                    "file": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(20), "secret": self._generate_examples(3)}

    def _generate_examples(self, n):
        for i in range(n):
            yield (
                i,
                {
                    "image": png(coloured((i, 0, 0), (6, 6 + i // 10))),
                    "mask": b"",
                    "label": -1 if n == 3 else i % 2,
                    "file": f"{i}.png",
                },
            )


class ByHand(tfds.core.GeneratorBasedBuilder):
    """Needs a file that nobody put there."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put pictures.tar there."

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(4, 4, 1))})
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(dl_manager.manual_dir)}

    def _generate_examples(self, path):
        yield 0, {"image": path.read_bytes()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    with mnist5k.quiet():
        ToyPictures(data_dir=os.fspath(path)).download_and_prepare(file_format="array_record")
    return path


def to_tfrecord(root: Path, target: Path) -> Path:
    """A copy of the toy data set in TFDS's default format, written without TensorFlow."""
    home, copy = root / "toy_pictures" / "1.0.0", target / "toy_pictures" / "1.0.0"
    copy.mkdir(parents=True)
    info = json.loads((home / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    (copy / "dataset_info.json").write_text(json.dumps(info))
    (copy / "features.json").write_bytes((home / "features.json").read_bytes())
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    for split in ("train", "secret"):
        records = ToyPictures(data_dir=os.fspath(root)).as_data_source(split, deserialize_method=raw)
        parts = [struct.pack("<QI", len(record), 0) + record + bytes(4) for record in records]
        (copy / f"toy_pictures-{split}.tfrecord-00000-of-00001").write_bytes(b"".join(parts))
    return target


@pytest.fixture(params=["array_record", "tfrecord"])
def prepared(request, root, tmp_path):
    return root if request.param == "array_record" else to_tfrecord(root, tmp_path)


def test_a_prepared_data_set_is_read_without_tensorflow(prepared):
    source = data.load("toy_pictures", data_dir=prepared, size=6)
    assert source.class_names == ("odd", "even")
    assert source.images[:, 3, 3].tolist() == [[i, 0, 0] for i in range(20)]
    assert source.labels.tolist() == [i % 2 for i in range(20)]
    part = data.load("toy_pictures:1.0.0", "train[25%:50%]", data_dir=prepared, size=6)
    assert part.images[:, 0, 0, 0].tolist() == [5, 6, 7, 8, 9]


def test_labels_of_minus_one_are_no_labels(prepared):
    source = data.load("toy_pictures", "secret", data_dir=prepared)
    assert (source.num_classes, source.labels.tolist()) == (0, [0, 0, 0])


def test_sizes_of_tfds_pictures_must_agree_too(prepared):
    with pytest.raises(ValueError, match="picture 0 of toy_pictures/train is 6x6, picture 10 of .* is 6x7"):
        data.load("toy_pictures", data_dir=prepared)


def test_tfds_beyond_memory_is_the_same_data_set(prepared):
    whole = data.load("toy_pictures", "train[3:]", data_dir=prepared, size=6)
    lazy = data.load("toy_pictures", "train[3:]", data_dir=prepared, size=6, memory_limit=1)
    assert not isinstance(lazy.images, np.ndarray)
    np.testing.assert_array_equal(lazy.labels, whole.labels)
    np.testing.assert_array_equal(lazy.images[np.arange(17)], whole.images)


def test_a_tfrecord_that_ends_too_early_is_named(root, tmp_path):
    place = to_tfrecord(root, tmp_path)
    corrupt(next(place.glob("*/*/*-train.tfrecord*")))
    with pytest.raises(ValueError, match="ends within a record"):
        data.load("toy_pictures", data_dir=place, size=6)


def test_a_damaged_description_is_named(root, tmp_path):
    place = to_tfrecord(root, tmp_path)
    corrupt(next(place.glob("*/*/dataset_info.json")))
    with pytest.raises(ValueError, match="TFDS cannot open toy_pictures"):
        data.load("toy_pictures", data_dir=place, size=6)


def test_a_missing_file_is_named(root, tmp_path):
    place = to_tfrecord(root, tmp_path)
    next(place.glob("*/*/*-train.tfrecord*")).unlink()
    with pytest.raises(FileNotFoundError, match="train.tfrecord.* is missing"):
        data.load("toy_pictures", data_dir=place, size=6)


@pytest.mark.parametrize("split", ["dev", "train[abc]", "train[:0]"])
def test_unknown_splits_are_refused(root, split):
    with pytest.raises(ValueError, match="split='.*train"):
        data.load("toy_pictures", split, data_dir=root, size=6)


@pytest.fixture
def tensorflow(monkeypatch):
    """Makes the library believe that TensorFlow is installed, or not."""
    find_spec = importlib.util.find_spec

    def set_installed(installed):
        answer = types.SimpleNamespace() if installed else None
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: answer if name == "tensorflow" else find_spec(name, *rest),
        )

    return set_installed


@pytest.fixture
def network(monkeypatch):
    def set_trouble(trouble):
        monkeypatch.setattr(door, "_unreachable", lambda url: trouble)

    return set_trouble


def test_without_tensorflow_the_commands_are_given(tmp_path, tensorflow, network, caplog):
    tensorflow(False)
    network("never asked")
    with pytest.raises(FileNotFoundError) as error:
        data.load("cifar10", data_dir=tmp_path)
    for part in (
        "pip install tensorflow-cpu",
        "tfds build cifar10 --file_format=array_record",
        str(tmp_path),
        "mnist5k",
    ):
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match="by hand, into .*: Put pictures.tar there"):
        data.load("by_hand", data_dir=tmp_path)
    assert not caplog.records  # the message is all that is said


def test_without_a_network_it_says_so(tmp_path, tensorflow, network):
    tensorflow(True)
    network("example.org does not answer")
    with pytest.raises(ConnectionError, match="cifar10 is not prepared in .*: example.org does not answer.*mnist5k"):
        data.load("cifar10", data_dir=tmp_path)


def test_with_both_it_prepares_and_reads(tmp_path, tensorflow, network):
    tensorflow(True)
    network(None)
    assert data.load("toy_pictures", data_dir=tmp_path, size=6).images.shape == (20, 6, 6, 3)
    tensorflow(False)
    assert data.load("toy_pictures", data_dir=tmp_path, size=6).images.shape == (20, 6, 6, 3)


def test_files_to_be_fetched_by_hand_are_explained(tmp_path, tensorflow, network):
    tensorflow(True)
    network(None)
    with pytest.raises(FileNotFoundError, match="(?s)downloaded by hand.*Put pictures.tar there"):
        data.load("by_hand", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar11", "no data set named 'cifar11'.*nearest names: .*cifar10.*folder:PATH"),
        ("mnist5", "nearest names: .*mnist5k"),
        ("mnist:9.9.9", "TFDS cannot open mnist:9.9.9.*9.9.9"),
        ("mnist5k:9.9.9", "TFDS cannot open mnist5k:9.9.9.*only: 1.0.0"),
        ("ag_news_subset", "no data set of single pictures.*title"),
        ("huggingface:mnist", "community data sets of 'huggingface'"),
        ("no such name", "'no such name'"),
    ],
)
def test_names_that_cannot_be_read(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        data.load(name, data_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_names_the_default_folder(root, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", os.fspath(root))
    assert len(data.load("toy_pictures", size=6).images) == 20


class Refusing(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_error(403)

    def log_message(self, *arguments):
        pass


def test_any_answer_of_a_server_means_there_is_a_network(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert door._unreachable(f"http://127.0.0.1:{server.server_port}/file") is None
        thread.join()


def test_a_closed_port_and_a_silent_server_are_no_network(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert "127.0.0.1" in door._unreachable(url, seconds=0.2)
    assert "127.0.0.1 does not answer" in door._unreachable(url)
