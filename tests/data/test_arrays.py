"""Arrays in files: [N, *S, C] of any type with a stated range, mapped from .npy and .npz."""

import re

import numpy as np
import pytest

from diffusion import data
from diffusion.data import arrays


def load(path, split="train", **options):
    return data.load(f"array:{path}", split, **options)


def numbers(*shape, dtype=np.uint16):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype)


WHOLE = {"value_range": (0, 65535)}


def test_a_npy_is_mapped_with_all_of_its_precision_and_its_labels(tmp_path):
    images, labels = numbers(60, 6, 5, 13), np.arange(60) % 3
    np.save(tmp_path / "scenes.npy", images)
    np.save(tmp_path / "scenes_labels.npy", labels)
    source = load(tmp_path / "scenes.npy", "all", **WHOLE)
    assert (source.dtype, source.images.shape, len(source.images)) == (np.uint16, (60, 6, 5, 13), 60)
    assert (source.value_range, source.class_names) == ((0.0, 65535.0), ("0", "1", "2"))
    np.testing.assert_array_equal(source.images[:], images)
    np.testing.assert_array_equal(source.labels, labels)
    np.testing.assert_array_equal(source.images[7], images[7])
    np.testing.assert_array_equal(source.images[np.array([[5, 2]])], images[[[5, 2]]])
    assert isinstance(source.images._arrays[0], np.memmap)
    batch = data.batch(source, 0, 3, 8)
    assert batch["x"].dtype == np.uint16
    same = (batch["x"][:, None] == images).all((2, 3, 4)).argmax(1)
    np.testing.assert_array_equal(batch["y"], labels[same])


def test_a_tenth_is_held_out_whatever_is_appended(tmp_path):
    images = np.arange(400, dtype=np.uint16).reshape(400, 1, 1)
    np.save(tmp_path / "a.npy", images[:300])
    np.save(tmp_path / "b.npy", images)
    train, test = (load(tmp_path / "a.npy", split, **WHOLE).images[:].ravel() for split in ("train", "test"))
    assert sorted([*train, *test]) == [*range(300)] and 15 < len(test) < 45
    later = load(tmp_path / "b.npy", "test", **WHOLE)
    assert [i for i in later.images[:].ravel() if i < 300] == test.tolist()
    assert later.opened.splits == (("train", 400 - len(later.images)), ("test", len(later.images)))


@pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y"), ("arr_0", "arr_1")])
@pytest.mark.parametrize("order", "CF")
def test_a_stored_npz_is_mapped(tmp_path, keys, order):
    images, labels = np.asarray(numbers(12, 4, 3, 2, dtype=np.uint8), order=order), np.arange(12) % 2
    np.savez(tmp_path / "a.npz", **dict(zip(keys, (images, labels), strict=True)), class_names=["cat", "e\u0301clair"])
    source = load(tmp_path / "a.npz", "all")
    np.testing.assert_array_equal(source.images[:], images)
    assert source.labels.tolist() == labels.tolist() and source.class_names == ("cat", "\xe9clair")
    assert isinstance(source.images._arrays[0], np.memmap) and not source.opened.notes


def test_a_compressed_npz_is_read_and_says_so(tmp_path):
    images = numbers(12, 4, 3, 2, dtype=np.uint8)
    np.savez_compressed(tmp_path / "a.npz", images=images)
    source = load(tmp_path / "a.npz", "all")
    np.testing.assert_array_equal(source.images[:], images)
    assert source.num_classes == 0
    assert "a.npz is compressed, and read as a whole" in data.describe(source)
    assert np.shares_memory(load(tmp_path / "a.npz", "train").images._arrays[0], source.images._arrays[0])
    np.savez_compressed(tmp_path / "a.npz", images=255 - images)  # another file of this name
    np.testing.assert_array_equal(load(tmp_path / "a.npz", "all").images[:], 255 - images)


def test_a_folder_has_a_file_for_each_split(tmp_path):
    images = numbers(20, 4, 4, 1)
    np.savez(tmp_path / "train.npz", images=images[:15], labels=np.arange(15) % 3)
    np.save(tmp_path / "val.npy", images[15:])
    np.save(tmp_path / "val_labels.npy", np.arange(5) % 3)
    for split, expected in {"train": images[:15], "test": images[15:], "val": images[15:], "all": images}.items():
        source = load(tmp_path, split, **WHOLE)
        np.testing.assert_array_equal(source.images[:], expected)
        assert source.num_classes == 3 and len(source.labels) == len(expected)
    assert source.labels.tolist() == [*(np.arange(15) % 3), *(np.arange(5) % 3)]
    np.testing.assert_array_equal(source.images[[19, 3, 16]], images[[19, 3, 16]])
    np.save(tmp_path / "val_labels.npy", np.full(5, 3))
    with pytest.raises(ValueError, match=r"label 3 of image 0 of array:.* is outside 0 \.\. 2"):
        load(tmp_path, "test", **WHOLE)


def test_types_of_other_machines_become_those_of_this_one(tmp_path):
    images = numbers(9, 4, 1).astype(">u2")
    np.save(tmp_path / "a.npy", images)
    source = load(tmp_path / "a.npy", "all", **WHOLE)
    assert source.images[:].dtype == source.dtype == np.dtype(np.uint16) and source.dtype.isnative
    np.testing.assert_array_equal(source.images[:], images)


def test_every_rank_is_described(tmp_path):
    for shape, words in {
        (9, 32, 2): "sequences of 32, 2 channels, uint16 from 0 to 65535",
        (9, 8, 6, 13): "images of 8x6, 13 channels, uint16",
        (9, 4, 5, 6, 1): "volumes of 4x5x6, 1 channel, uint16",
    }.items():
        np.save(tmp_path / "a.npy", numbers(*shape))
        assert f"split all: 9 {words}" in data.describe(load(tmp_path / "a.npy", "all", **WHOLE))


def test_uint8_needs_no_range_and_may_have_one(tmp_path):
    np.save(tmp_path / "masks.npy", numbers(40, 6, 5, 1, dtype=np.uint8) % 2)
    assert load(tmp_path / "masks.npy").value_range == (0, 255)
    assert "from 0 to 1" in data.describe(load(tmp_path / "masks.npy", value_range=(0, 1)))


def test_all_values_are_checked_when_a_file_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "SAMPLE_BYTES", 3 * 24)  # blocks of three arrays
    images, seen = np.zeros((40, 3, 2, 1), np.float32), []
    for value, message in {
        1.5: r"values from 0\.0 to 1\.5, outside the stated range 0 to 1",
        np.nan: "hold NaN, 1 in",
    }.items():
        images[20, 1, 1, 0] = value
        np.save(tmp_path / "a.npy", images)
        for _ in range(2):  # what was found bad once is not taken for good
            with pytest.raises(ValueError, match=f"the arrays of array:.*{message}"):
                load(tmp_path / "a.npy", "all", value_range=(0, 1))
    images[20] = 1
    np.save(tmp_path / "a.npy", images)
    told = {"progress": lambda *state: seen.append(state)}
    load(tmp_path / "a.npy", "all", value_range=(0, 1), **told)
    assert seen[0] == ("checking values", 3, 40) and seen[-1] == ("checking values", 40, 40)
    seen.clear()
    load(tmp_path / "a.npy", "train", value_range=(0, 1), **told)
    assert not seen  # once in a process
    with pytest.raises(ValueError, match="outside the stated range 0 to 0.5"):
        load(tmp_path / "a.npy", "all", value_range=(0, 0.5))


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (
            np.linspace(-2, 3, 60).reshape(10, 3, 2, 1),
            {},
            ValueError,
            r'are float64, of unknown range: .* smallest is -2\.0 and the largest 3\.0.*data\.range="\(-2\.0, 3\.0\)"',
        ),
        (
            np.full((9, 3, 2, 1), 7, np.uint16),
            {},
            ValueError,
            r'uint16, of unknown range: .*is 7 and the largest 7.*range="\(7, 8\)"',
        ),
        (np.zeros((9, 3, 2, 1)), {"value_range": (1, 1)}, ValueError, r"data\.range=\(1, 1\) must be the smallest and"),
        (
            np.zeros((9, 3, 2, 1)),
            {"value_range": (1,)},
            ValueError,
            r"range=\(1,\) must be .* as in --.*=\"\(0\.0, 1\.0\)\"",
        ),
        (np.zeros((9, 3, 2, 1), np.int64), {"value_range": (0, 1 << 25)}, ValueError, "not exact in float32"),
        (np.zeros((9, 3, 2, 1), np.int16), {"value_range": (0, 70000)}, ValueError, "more than int16 can hold"),
        (np.zeros((9, 3, 2, 1), np.int16), {"value_range": (0, 0.5)}, ValueError, "must be integers"),
        (np.zeros((9, 3, 2, 1), bool), {}, TypeError, r"are bool, .* pass array\.astype\(np\.uint8\)"),
        (np.zeros((9, 3, 2, 1), complex), {}, TypeError, "complex128"),
        (
            np.zeros((9, 28, 28), np.uint8),
            {},
            ValueError,
            r"\[N, H, W\], add a channel axis: pass images\[\.\.\., None\]",
        ),
        (np.zeros((9, 32, 28), np.uint8), {}, ValueError, r"so: --config\.data\.channels=28"),
        (np.zeros((9, 3, 8, 8), np.uint8), {}, ValueError, r"or np\.moveaxis\(images, 1, -1\) where channels come"),
        (np.zeros((9, 8), np.uint8), {}, ValueError, r"not \(9, 8\); a single channel is an axis too"),
        (np.zeros((2, 2, 2, 2, 2, 2), np.uint8), {}, ValueError, r"\[N, D, H, W, C\] with N >= 1, not \(2, 2, 2"),
        (np.zeros((9, 3, 2, 5), np.uint8), {"channels": 3}, ValueError, r"data\.channels=3, but .* have 5 channels"),
        (
            np.zeros((9, 3, 2, 1), np.uint8),
            {"size": (2, 2)},
            ValueError,
            r"size=\(2, 2\): the arrays of .* leave it out",
        ),
        (np.zeros((9, 3, 2, 1), np.uint8), {"split": "val"}, ValueError, r"split='val' of .* not one of \('train', "),
        (np.zeros((9, 3, 2, 1), np.uint8), {"class_names_in": "none"}, ValueError, "is for folder:PATH"),
        (np.array([None] * 9), {}, ValueError, r"a\.npy cannot be read: it holds objects of Python; save numbers"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_remedy(tmp_path, images, options, error, message):
    np.save(tmp_path / "a.npy", images)
    with pytest.raises(error, match=message):
        load(tmp_path / "a.npy", **options)


def test_labels_that_are_objects_are_refused_with_a_remedy(tmp_path):
    np.savez(tmp_path / "a.npz", images=numbers(9, 3, 2, 1), labels=np.array([None] * 9))
    with pytest.raises(ValueError, match=r"a\.npz cannot be read: it holds objects of Python; .*labels\.tolist"):
        load(tmp_path / "a.npz", **WHOLE)


@pytest.mark.parametrize(
    ("images", "value_range", "note"),
    [
        (np.arange(2, dtype=np.uint8).repeat(18).reshape(9, 2, 2, 1), None, r'from 0 to 1 only, .*range="\(0, 1\)"'),
        (np.linspace(0, 1, 36).reshape(9, 2, 2, 1), (-100.0, 100.0), r"from 0 to 1 only, of -100 to 100"),
        (np.linspace(0, 1, 36).reshape(9, 2, 2, 1), (-0.5, 1.5), None),
        (np.arange(36, dtype=np.uint8).reshape(9, 2, 2, 1) * 7, None, None),
    ],
)
def test_values_that_take_little_of_their_range_are_said(tmp_path, images, value_range, note):
    np.save(tmp_path / "a.npy", images)
    shown = data.describe(load(tmp_path / "a.npy", value_range=value_range))
    assert re.search(note, shown) if note else "only" not in shown


def test_the_last_axis_holds_channels_where_one_says_so(tmp_path):
    np.save(tmp_path / "a.npy", numbers(9, 28, 28))
    assert load(tmp_path / "a.npy", "all", channels=28, **WHOLE).images.shape == (9, 28, 28)


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.npy"):
        load(tmp_path / "nothing.npy")
    with pytest.raises(ValueError, match="must hold train.npy .* none of them"):
        load(tmp_path)
    (tmp_path / "a.png").write_text("x")
    with pytest.raises(ValueError, match=r"a\.png must be a \.npy or \.npz file"):
        load(tmp_path / "a.png")
    for name in ("a.npy", "a.npz"):
        (tmp_path / name).write_text("no array")
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            load(tmp_path / name)
    np.save(tmp_path / "a.npy", numbers(50, 3, 2, 1))
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"a\.npy cannot be read"):
        load(tmp_path / "a.npy", **WHOLE)
    np.savez(tmp_path / "a.npz", pictures=numbers(5, 2, 2, 1))
    with pytest.raises(ValueError, match=r"it holds pictures; save the images as images or x or arr_0, and labels"):
        load(tmp_path / "a.npz")
    np.save(tmp_path / "train.npy", numbers(5, 3, 2, 1))
    np.save(tmp_path / "test.npy", numbers(5, 2, 2, 1))
    with pytest.raises(ValueError, match=r"train\.npy has uint16 \(5, 3, 2, 1\) and test\.npy uint16 \(5, 2, 2, 1\)"):
        load(tmp_path, **WHOLE)
    with pytest.raises(ValueError, match=r"value_range=\(0, 1\) is for array:PATH"):
        data.load("mnist5k", value_range=(0, 1))


# From memory


def test_arrays_in_memory_have_their_range():
    images = np.linspace(-1, 1, 48, dtype=np.float32).reshape(2, 3, 2, 4, 1)
    source = data.from_arrays(images, value_range=(-1, 1))
    assert (source.dtype, source.value_range) == (np.float32, (-1.0, 1.0))
    np.testing.assert_array_equal(data.batch(source, 0, 0, 2)["x"].sum(0), images.sum(0))
    with pytest.raises(ValueError, match="outside the stated range 0 to 1: state one that holds them all, value_range"):
        data.from_arrays(images, value_range=(0, 1))
    with pytest.raises(TypeError, match=r"pass np\.rint.*or keep them and state their range, as in value_range="):
        data.from_arrays(images)


def test_only_images_are_mirrored_and_moved():
    source = data.from_arrays(np.zeros((2, 8, 1), np.uint8))
    assert data.batch(source, 0, 0, 2)["x"].shape == (2, 8, 1)
    for options in ({"flip": True}, {"shift": 1}):
        with pytest.raises(ValueError, match=r"not sequences of shape \(8, 1\): leave them at False and 0"):
            data.batch(source, 0, 0, 2, **options)


def test_ranges_that_float32_cannot_resolve_are_refused(tmp_path):
    values = 1.7e9 + np.arange(120.0).reshape(10, 12, 1)
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ValueError, match="float32, which all is computed in, cannot tell such values apart: subtract"):
        data.load(f"array:{tmp_path / 'a.npy'}", value_range=(1.7e9, 1.7e9 + 119))
    np.save(tmp_path / "a.npy", values - 1.7e9)
    assert len(data.load(f"array:{tmp_path / 'a.npy'}", "all", value_range=(0.0, 119.0)).labels) == 10


def test_a_range_that_is_suggested_holds_the_values(tmp_path):
    np.save(tmp_path / "a.npy", np.linspace(-0.1234567891, 31415928.3, 30).reshape(10, 3, 1))
    with pytest.raises(ValueError) as e:
        data.load(f"array:{tmp_path / 'a.npy'}")
    first, last = (float(x) for x in str(e.value).split('="(')[1].split(")")[0].split(", "))
    assert data.load(f"array:{tmp_path / 'a.npy'}", value_range=(first, last)).value_range == (first, last)


@pytest.mark.parametrize("shape", [(10, 3, 16, 12), (10, 1, 8, 16, 12)])
def test_channels_that_come_first_are_refused(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="are the last 12 values channels.*channels=12"):
        data.load(f"array:{tmp_path / 'a.npy'}")
    assert data.load(f"array:{tmp_path / 'a.npy'}", "all", channels=12).images.shape == shape
