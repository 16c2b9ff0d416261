"""Folders of images, read at once or on demand, and the errors about files that cannot be read."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion import data
from diffusion.data import images


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


def test_links_are_followed_but_for_circles(tmp_path):
    """A folder that two links lead to is read twice: it is two classes. Only one that contains itself is a circle."""
    save(tmp_path / "real" / "a.png", grey(0))
    (tmp_path / "real" / "again").symlink_to(tmp_path / "real")
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "root").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert len(folder(tmp_path).images) == 1
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    source = folder(tmp_path)
    assert (source.class_names, source.labels.tolist()) == (("linked", "real"), [0, 1])


def test_classes_linked_from_a_store_keep_their_images(tmp_path):
    """train/cat and test/cat as links to one folder, in whichever order they are met."""
    save(tmp_path / "store" / "cat" / "a.png", grey(0))
    save(tmp_path / "store" / "dog" / "a.png", grey(0))
    for split in ("train", "test"):
        (tmp_path / "set" / split).mkdir(parents=True)
        for name in ("cat", "dog"):
            (tmp_path / "set" / split / name).symlink_to(tmp_path / "store" / name)
    for split in ("train", "test"):
        assert folder(tmp_path / "set", split).labels.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["folder:", "folder: "])
def test_a_folder_without_a_name_is_refused(name, tmp_path, monkeypatch):
    save(tmp_path / "a.png", grey(0))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="names no folder: pass folder:PATH .a shell variable"):
        data.load(name)
    assert len(data.load("folder:.").images) == 1


def test_a_home_folder_that_is_not_there_is_a_folder_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="there is no folder ~nobody-of-this-name/x"):
        data.load("folder:~nobody-of-this-name/x")


def test_dataset_json_with_a_byte_order_mark_is_read(tmp_path):
    for i in range(2):
        save(tmp_path / "00000" / f"img0000000{i}.png", grey(i))
    text = '{"labels": [["00000/img00000000.png", 1], ["00000/img00000001.png", 0]]}\n\n'
    (tmp_path / "dataset.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert folder(tmp_path).labels.tolist() == [1, 0]


def test_a_held_out_split_without_labels_is_refused_when_it_is_asked_for(tmp_path):
    for name in ("cat", "dog"):
        save(tmp_path / "train" / name / "a.png", grey(0))
    save(tmp_path / "val" / "a.png", grey(0))
    assert folder(tmp_path, "train").labels.tolist() == [0, 1]
    for split in ("val", "test", "all"):
        with pytest.raises(ValueError, match=rf"split='{split}' .*images without labels, while training has 2 classes"):
            folder(tmp_path, split)
    assert folder(tmp_path, "val", class_names_in="none").num_classes == 0


def test_the_folder_of_a_train_and_a_test_split_says_what_it_passed_over(tmp_path):
    save(tmp_path / "train" / "cat" / "a.png", grey(0))
    save(tmp_path / "test" / "cat" / "a.png", grey(0))
    for name in ("a.txt", "b.TXT", "c.heic", "LICENSE", ".hidden.txt"):
        (tmp_path / "train" / name).write_text("x")
    opened = folder(tmp_path, "train").opened
    assert opened.split == "train"
    assert dict(opened.splits) == {"train": 1, "test": 1}
    assert dict(opened.passed_over) == {".txt": 2, ".heic": 1, "without a suffix": 1}
    assert opened.passed_over[0] == (".txt", 2)


def test_a_folder_of_other_files_names_their_suffixes(tmp_path):
    (tmp_path / "a.heic").write_text("x")
    with pytest.raises(ValueError, match=r"contains no .png.*there are 1 \.heic"):
        folder(tmp_path)


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


@pytest.mark.parametrize("width", range(28, 60))
def test_the_cropped_box_lies_in_images_of_every_size(tmp_path, width):
    """Also where width / 28 * 28 is a little more than the width: 29."""
    save(tmp_path / "0.png", np.full((61, width), 9, np.uint8))
    assert (folder(tmp_path, size=(28, 28)).images == 9).all()


@pytest.mark.parametrize(("crop", "how"), [("center", "and cropped at the center"), ("resize", "each axis by itself")])
def test_that_images_are_scaled_is_said(tmp_path, crop, how):
    save(tmp_path / "0.png", np.zeros((6, 9), np.uint8))
    save(tmp_path / "1.png", np.zeros((4, 3), np.uint8))
    shown = data.describe(folder(tmp_path, size=(4, 3), crop=crop))
    assert f"images of 4x3 to 6x9 are scaled, {how}, to 4x3" in shown


def test_16_bit_images_with_values_of_12_bits_are_said(tmp_path):
    for i in range(20):
        save(tmp_path / f"{i:02d}.png", np.full((2, 2), 100 * i, np.uint16))
    assert "of 16 of them the largest value is 1900, so they are nearly black: multiply them by 32" in data.describe(
        folder(tmp_path)
    )
    save(tmp_path / "19.png", np.full((2, 2), 4096, np.uint16))
    assert not folder(tmp_path).opened.notes
    for i in range(20):
        save(tmp_path / f"{i:02d}.png", grey(1))
    assert not folder(tmp_path).opened.notes


def test_channels_are_common_or_as_requested(tmp_path):
    save(tmp_path / "0.png", grey(50))
    assert folder(tmp_path).images.shape[-1] == 1
    assert folder(tmp_path, channels=3).images[0, 0, 0].tolist() == [50, 50, 50]
    save(tmp_path / "1.png", coloured((255, 0, 0)))
    assert folder(tmp_path).images[:, 0, 0].tolist() == [[50, 50, 50], [255, 0, 0]]
    assert folder(tmp_path, channels=1).images[:, 0, 0].tolist() == [[50], [76]]  # ITU-R 601: 0.299 * 255


def test_transparency_is_kept_where_asked_for(tmp_path):
    pixels = np.array([[[200, 0, 0, 255], [0, 200, 0, 0], [0, 0, 200, 51]]], np.uint8)
    save(tmp_path / "0.png", pixels)
    save(tmp_path / "1.png", coloured((255, 0, 0), (1, 3)))
    source = folder(tmp_path, channels=4, split="all")
    assert source.images[0].tolist() == pixels.tolist()
    assert source.images[1].tolist() == [[[255, 0, 0, 255]] * 3]


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
    sizes = r"a.png is 6x6, .*b.png is 6x8; .*widths 6 to 8 \(median 8\).*--config\.data\.size"
    with pytest.raises(ValueError, match=sizes):
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


# Files of all kinds


KINDS = ("jfif", "jpe", "bmp", "dib", "tif", "tiff", "gif", "avif", "ppm", "pgm", "pnm", "tga", "jp2", "webp", "ico",
         "pcx", "sgi", "qoi", "apng")  # fmt: skip


@pytest.mark.parametrize("suffix", KINDS)
def test_every_raster_format_that_pillow_reads_is_found_by_its_suffix(tmp_path, suffix):
    try:
        save(tmp_path / f"a.{suffix}", coloured((200, 100, 50), (16, 16)))
    except (KeyError, OSError) as error:
        pytest.skip(f"this Pillow does not write it: {error}")
    for limit in (1 << 30, 1):
        source = folder(tmp_path, size=16, channels=3, memory_limit=limit)
        assert abs(source.images[:].astype(int) - [200, 100, 50]).max() <= 8


def test_what_is_no_image_is_not_opened(tmp_path):
    save(tmp_path / "a.png", grey(0))
    for suffix in ("pdf", "eps", "h5", "hdf", "mpg", "mpeg", "wmf", "grib", "txt"):
        (tmp_path / f"a.{suffix}").write_text("x")
    assert len(folder(tmp_path).images) == 1


def test_the_first_frame_of_an_animation_is_the_image(tmp_path):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert folder(tmp_path).images[0, 0, 0].tolist() == [255, 0, 0]


def test_floating_point_pixels_are_refused_rather_than_black(tmp_path):
    Image.fromarray(np.full((6, 6), 0.5, np.float32)).save(tmp_path / "a.tif")
    for limit in (1 << 30, 1):
        with pytest.raises(ValueError, match=r"a.tif \(its pixels are floating-point numbers"):
            folder(tmp_path, memory_limit=limit)


def damaged_exif():
    """EXIF whose table of tags points outside, after an orientation that rotates."""
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = exif.tobytes()
    return [whole[:16], b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", whole[:14] + b"\xff" * 4]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("exif", damaged_exif())
@pytest.mark.parametrize("limit", [1 << 30, 1])
def test_exif_that_cannot_be_read_is_no_exif(tmp_path, suffix, exif, limit):
    save(tmp_path / f"a.{suffix}", grey(77, (6, 8)), exif=exif)
    images = folder(tmp_path, memory_limit=limit).images[:]
    assert images.shape[:3] == (1, 6, 8)
    assert abs(images.astype(int) - 77).max() <= 2


def chunk(kind, content, checksum=None):
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"tEXt", b"Comment\0broken checksum", 1),
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 27))),  # more than Pillow unpacks
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(1 << 27))),
        chunk(b"pHYs", b"short"),
    ],
    ids=["checksum", "text", "profile", "size"],
)
def test_what_is_beside_the_pixels_of_a_png_never_stops_them(tmp_path, extra, at_end):
    save(tmp_path / "a.png", coloured((1, 2, 3)))
    content = (tmp_path / "a.png").read_bytes()
    at = len(content) - 12 if at_end else 33  # before IEND, after IHDR
    (tmp_path / "a.png").write_bytes(content[:at] + extra + content[at:])
    for limit in (1 << 30, 1):
        assert (folder(tmp_path, memory_limit=limit).images[:] == [1, 2, 3]).all()


@pytest.mark.parametrize("extra", [b"\xff\xe2\0\x0eICC_PROFILE\0", b"\xff\xed\0\x16Photoshop 3.0\0008BIM\3\4"])
def test_what_is_beside_the_pixels_of_a_jpeg_never_stops_them(tmp_path, extra):
    """Segments that Pillow takes for a profile, or for resources of Photoshop, and that end too soon."""
    save(tmp_path / "a.jpg", grey(90))
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[:2] + extra + content[2:])
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(io.BytesIO((tmp_path / "a.jpg").read_bytes()))
    for limit in (1 << 30, 1):
        assert abs(folder(tmp_path, memory_limit=limit).images[:].astype(int) - 90).max() <= 2


def half_png():
    """A PNG with whole chunks and checksums whose pixels end half-way."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in noise))
    header = struct.pack(">IIBBBBB", 64, 64, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels[:2000]) + chunk(b"IEND", b"")


def half_jpeg():
    """A JPEG that ends after its small preview, which has an end marker of its own."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(noise).save(encoded, "jpeg")
    content, small = encoded.getvalue(), b"\xff\xd8 a preview \xff\xd9"
    segment = b"\xff\xfe" + struct.pack(">H", len(small) + 2) + small
    return content[:2] + segment + content[2:1200]


@pytest.mark.parametrize(("suffix", "content"), [("png", half_png()), ("jpg", half_jpeg())])
def test_what_the_check_accepts_the_decoder_accepts(tmp_path, suffix, content):
    (tmp_path / f"a.{suffix}").write_bytes(content)
    for limit in (1 << 30, 1):
        with pytest.raises(ValueError, match="cannot read 1 of 1 images"):
            folder(tmp_path, memory_limit=limit)


def test_a_wrong_size_is_not_read_as_one_without_metadata(tmp_path):
    """An image stored lying, which is 6x8 upright, is not 8x6 for want of its EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a.png", grey(0, (8, 6)), exif=exif)
    with pytest.raises(ValueError, match="it is 6x8, not 8x6, and crop is 'none'"):
        folder(tmp_path, size=(8, 6), crop="none")


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
        ({"channels": 5}, ValueError, "channels=5"),
        ({"name": ""}, ValueError, "name=''"),
    ],
)
def test_load_checks_its_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        data.load(**{"name": "folder:.", **arguments})


@pytest.mark.parametrize("limit", [1 << 30, 1])
@pytest.mark.parametrize("size", [None, 6])
def test_bad_files_are_skipped_where_asked_for_up_to_one_of_twenty(tmp_path, limit, size):
    for i in range(40):
        save(tmp_path / "cat" / f"{i:02}.png", grey(i))
        save(tmp_path / "dog" / f"{i:02}.png", grey(100 + i))
    (tmp_path / "cat" / "03.png").write_text("not an image")
    corrupt(tmp_path / "dog" / "07.png")
    (tmp_path / "dog" / "50.png").symlink_to("nowhere")
    options = {"size": size, "channels": size and 1, "memory_limit": limit}
    with pytest.raises(ValueError, match="cannot read . of 81 images .*03.png.*or pass --config.data.bad_files=skip"):
        folder(tmp_path, **options)
    source = folder(tmp_path, bad_files="skip", **options)
    values = [i for i in range(40) if i != 3] + [100 + i for i in range(40) if i != 7]
    assert source.images[:][:, 0, 0, 0].tolist() == values
    assert source.labels.tolist() == [0] * 39 + [1] * 39
    assert sum(count for _, count in source.opened.splits) == len(source.labels) == 78
    assert [("03.png" in text, "07.png" in text, "50.png" in text) for text in source.opened.skipped] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    for i in range(8, 10):
        (tmp_path / "cat" / f"{i:02}.png").write_text("not an image")
    with pytest.raises(ValueError, match="cannot read 5 of 81 images .*skips one image of 20, at most"):
        folder(tmp_path, bad_files="skip", **options)


def test_skipping_changes_no_other_image_of_a_split(tmp_path):
    for i in range(60):
        save(tmp_path / f"{i:02}.png", grey(i))
    before = {split: folder(tmp_path, split).images[:, 0, 0, 0].tolist() for split in ("train", "test")}
    (tmp_path / "05.png").write_text("not an image")
    for split, values in before.items():
        after = folder(tmp_path, split, bad_files="skip").images[:, 0, 0, 0].tolist()
        assert after == [value for value in values if value != 5]


def test_options_of_folders_are_refused_for_other_data_sets():
    with pytest.raises(ValueError, match="class_names_in='names' is for folder:PATH; leave it at 'folders'"):
        data.load("mnist5k", class_names_in="names")
    with pytest.raises(ValueError, match="bad_files='skip' is for folder:PATH"):
        data.load("mnist5k", bad_files="skip")


# What was checked is remembered


def counted(monkeypatch):
    """Names of the files that are read from now on."""
    read, opened = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda self: opened.append(self.name) or read(self))
    return opened


def test_a_second_start_reads_no_file_that_was_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "SAMPLED", 0)  # but for some that tell how many bits their values have
    for i in range(10):
        save(tmp_path / "images" / f"{i}.png", coloured(i, (6, 8)))
    options = {"cache_dir": tmp_path / "cache", "memory_limit": 1}
    load = lambda split="all", **more: folder(tmp_path / "images", split, **options, **more)  # noqa: E731
    first, opened = load(), counted(monkeypatch)
    assert load("train").images.shape[1:] == first.images.shape[1:] == (6, 8, 3)
    assert opened == []
    before = os.stat(tmp_path / "images" / "4.png")
    save(tmp_path / "images" / "4.png", np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8))
    os.utime(tmp_path / "images" / "4.png", ns=(before.st_atime_ns, before.st_mtime_ns))  # of another size
    os.utime(tmp_path / "images" / "7.png", (1, 1))
    load()
    assert set(opened) == {"4.png", "7.png"}
    opened.clear()
    (tmp_path / "images" / "4.png").write_text("not an image")
    for _ in range(2):  # a bad file is found again at every start
        with pytest.raises(ValueError, match=r"1 of 10 images .*4.png \(not an image"):
            load()
    assert set(opened) == {"4.png"}
    assert len(load(bad_files="skip").images) == 9
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_header_that_was_read_is_not_a_file_that_was_checked(tmp_path):
    save(tmp_path / "images" / "a.png", np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))
    save(tmp_path / "images" / "b.png", grey(0, (64, 64)))
    corrupt(tmp_path / "images" / "a.png")
    with pytest.raises(ValueError, match="1 of 2 images"):  # its header is whole
        folder(tmp_path / "images", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="1 of 2 images"):
        folder(tmp_path / "images", cache_dir=tmp_path / "cache", memory_limit=1)


@pytest.mark.parametrize("content", [b"", b"not a manifest", b"\x93NUMPY\x01\x00"])
def test_a_damaged_manifest_and_a_read_only_cache_stop_nothing(tmp_path, content):
    save(tmp_path / "images" / "a.png", grey(3))
    cache = tmp_path / "cache"
    folder(tmp_path / "images", cache_dir=cache)
    (file,) = cache.iterdir()
    file.write_bytes(content)
    assert folder(tmp_path / "images", cache_dir=cache).images.shape == (1, 6, 6, 1)
    assert file.stat().st_size > 100
    assert len(folder(tmp_path / "images", cache_dir=file / "below").images) == 1


def test_progress_is_told_of_every_image(tmp_path):
    for i in range(5):
        save(tmp_path / f"{i}.png", grey(i))
    told = []
    folder(tmp_path, memory_limit=1, progress=lambda *each: told.append(each))
    assert told[-1] == ("checking images", 5, 5)
    folder(tmp_path, progress=lambda *each: told.append(each))
    assert told[-1] == ("reading images", 5, 5)


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
