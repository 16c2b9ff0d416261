"""Folders of images, read at once or on demand, and the errors about files that cannot be read."""

import numpy as np
import pytest
from PIL import Image

from diffusion import data


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
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
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


def test_a_mix_of_files_with_and_without_a_class_is_an_error(tmp_path):
    save(tmp_path / "cover.png", grey(0))
    save(tmp_path / "cat" / "a.png", grey(0))
    with pytest.raises(ValueError, match=r"cat/a.png is in a sub-folder, cover.png is not \(1 such"):
        folder(tmp_path)


def test_a_circular_link_is_followed_once(tmp_path):
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


def test_the_hashed_split_is_a_tenth_and_does_not_depend_on_other_files(tmp_path):
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


def test_one_image_cannot_be_split(tmp_path):
    save(tmp_path / "a.png", grey(0))
    assert len(folder(tmp_path, "train").images) == 1
    with pytest.raises(ValueError, match="split='test'.*one image cannot be split"):
        folder(tmp_path, "test")
    with pytest.raises(ValueError, match="split='dev'.*'train', 'test', 'all'"):
        folder(tmp_path, "dev")


def test_transparency_is_blended_with_white(tmp_path):
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


def test_channels_are_common_or_as_requested(tmp_path):
    save(tmp_path / "0.png", grey(50))
    assert folder(tmp_path).images.shape[-1] == 1
    assert folder(tmp_path, channels=3).images[0, 0, 0].tolist() == [50, 50, 50]
    save(tmp_path / "1.png", coloured((255, 0, 0)))
    assert folder(tmp_path).images[:, 0, 0].tolist() == [[50, 50, 50], [255, 0, 0]]
    assert folder(tmp_path, channels=1).images[:, 0, 0].tolist() == [[50], [76]]  # ITU-R 601: 0.299 * 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(tmp_path, orientation):
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


def test_images_that_differ_in_size_are_an_error_that_names_two_of_them_and_the_flag(tmp_path):
    save(tmp_path / "a.png", grey(0, (6, 6)))
    save(tmp_path / "b.png", grey(0, (6, 8)))
    with pytest.raises(ValueError, match=r"a.png is 6x6, .*b.png is 6x8.*--config\.data\.size"):
        folder(tmp_path)
    with pytest.raises(ValueError, match=r"b.png \(it is 6x8, not 6x6, and crop is 'none'\)"):
        folder(tmp_path, size=6, crop="none")
    assert folder(tmp_path, size=(6, 8)).images.shape == (2, 6, 8, 1)


def test_center_crops_and_resize_stretches(tmp_path):
    stripes = np.repeat(np.array([0, 100, 200], np.uint8), 60)[None].repeat(60, 0)  # 60 x 180: three squares
    save(tmp_path / "wide.png", stripes)
    save(tmp_path / "tall.png", stripes.T)
    tall, wide = folder(tmp_path, size=20).images[..., 0]
    assert (tall[4:16] == 100).all()  # the filter blurs the cut, over fewer than four pixels
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
    image = (127.5 + 100 * np.outer(waves, waves)).round().astype(np.uint8)
    save(tmp_path / "a.png", image)
    save(tmp_path / "b.jpg", image, quality=100)
    png, jpg = folder(tmp_path, size=100).images.astype(int)
    assert png.std() > 30
    assert abs(png - jpg).max() <= 12


def test_an_image_of_the_right_size_is_not_resampled(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    save(tmp_path / "a.png", noise)
    for crop in data.CROPS:
        np.testing.assert_array_equal(folder(tmp_path, size=32, crop=crop).images[0], noise)


def corrupt(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("memory_limit", [1 << 30, 1])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_incomplete_files_are_named_before_training(tmp_path, suffix, memory_limit):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for i in range(3):
        save(tmp_path / f"{i}.{suffix}", noise)
    corrupt(tmp_path / f"1.{suffix}")
    with pytest.raises(ValueError, match=rf"1 of 3 images of folder:.*1\.{suffix} \("):
        folder(tmp_path, memory_limit=memory_limit)


def test_up_to_five_unreadable_files_are_listed(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.png").write_text("not an image")
    save(tmp_path / "8.png", grey(0))
    with pytest.raises(ValueError, match=r"8 of 9 images .*/0\.png \(not an image format.*/4\.png \([^/]*and 3 more"):
        folder(tmp_path)


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(ValueError, match="contains no .png, .jpg, .jpeg, .webp file"):
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
def test_load_checks_its_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        data.load(**{"name": "folder:.", **arguments})


# On demand


def test_a_data_set_larger_than_the_memory_limit_has_the_same_images(tmp_path):
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


def test_a_file_that_is_overwritten_during_training_is_named(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png", grey(i))
    source = folder(tmp_path, memory_limit=1)
    (tmp_path / "2.png").write_text("overwritten")
    with pytest.raises(ValueError, match=r"cannot read .*/2\.png"):
        source.images[np.arange(4)]
