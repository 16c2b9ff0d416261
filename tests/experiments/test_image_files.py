"""Grids, strips and animations hold the pixels that were put in."""

import numpy as np
import pytest
from PIL import Image

from experiments import image_files


def some(n, h, w, c):
    return np.random.default_rng(0).integers(0, 256, (n, h, w, c), np.uint8)


def cells(image, rows, columns, h, w, gap=2):
    """The cells [rows, columns, H, W, C] of a grid, and a mask of what lies between them."""
    pixels = np.asarray(image)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    assert pixels.shape[:2] == (rows * (h + gap) + gap, columns * (w + gap) + gap)
    between = np.ones(pixels.shape[:2], bool)
    found = np.empty((rows, columns, h, w, pixels.shape[2]), np.uint8)
    for row, column in np.ndindex(rows, columns):
        top, left = gap + row * (h + gap), gap + column * (w + gap)
        found[row, column] = pixels[top : top + h, left : left + w]
        between[top : top + h, left : left + w] = False
    return found, pixels[between]


@pytest.mark.parametrize("c", [1, 3])
def test_a_grid_holds_its_images_in_rows(c):
    images = some(5, 60, 70, c)
    found, between = cells(image_files.grid(images, 3, background=77), 2, 3, 60, 70)
    np.testing.assert_array_equal(found.reshape(6, 60, 70, c)[:5], images)
    assert (found[1, 2] == 77).all()
    assert (between == 77).all()


def test_small_images_are_enlarged_by_whole_pixels():
    images = some(2, 28, 20, 1)
    found, _ = cells(image_files.grid(images, 2), 1, 2, 56, 40)
    np.testing.assert_array_equal(found[0, :, ::2, ::2], images)
    np.testing.assert_array_equal(found[0, :, 1::2, 1::2], images)


@pytest.mark.parametrize(("channels", "shown"), [(2, 1), (4, 3), (13, 3)])
def test_of_channels_that_no_screen_has_the_first_are_shown(channels, shown):
    images = some(2, 60, 60, channels)
    found, _ = cells(image_files.grid(images, 2), 1, 2, 60, 60)
    np.testing.assert_array_equal(found[0], images[..., :shown])


def test_a_strip_reads_from_left_to_right():
    frames = some(6, 60, 60, 1).reshape(3, 2, 60, 60, 1)
    found, _ = cells(image_files.strip(frames), 2, 3, 60, 60)
    np.testing.assert_array_equal(found, frames.swapaxes(0, 1))


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_saved_images_are_what_was_saved(tmp_path, suffix):
    image = image_files.grid(some(2, 60, 60, 3), 2)
    path = tmp_path / f"grid.{suffix}"
    image_files.save(path, image)
    with Image.open(path) as opened:
        assert opened.format == suffix.upper()
        assert opened.size == image.size
        if suffix == "png":
            np.testing.assert_array_equal(opened, image)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_animation_shows_every_frame_and_rests_on_the_last(tmp_path):
    frames = [image_files.grid(frame, 2) for frame in some(6, 60, 60, 1).reshape(3, 2, 60, 60, 1)]
    path = tmp_path / "film.gif"
    image_files.save_animation(path, frames, milliseconds=50, hold=900)
    with Image.open(path) as film:
        assert (film.n_frames, film.info["loop"]) == (3, 0)
        durations = []
        for i, frame in enumerate(frames):
            film.seek(i)
            durations.append(film.info["duration"])
            np.testing.assert_array_equal(film.convert("L"), frame)
    assert durations == [50, 50, 900]


def test_frames_that_use_other_greys_than_their_neighbours_keep_their_own(tmp_path):
    noise = some(1, 60, 60, 1)[0, ..., 0]
    frames = [Image.fromarray(np.where(noise < limit, noise, 200).astype(np.uint8)) for limit in (256, 180, 120, 100)]
    image_files.save_animation(tmp_path / "film.gif", frames)
    with Image.open(tmp_path / "film.gif") as film:
        for i, frame in enumerate(frames):
            film.seek(i)
            np.testing.assert_array_equal(film.convert("L"), frame)


def test_samples_have_the_layout_of_the_evaluators(tmp_path):
    images, labels = some(3, 4, 5, 3), np.array([2, 0, 1])
    image_files.save_npz(tmp_path / "samples.npz", images, labels)
    with np.load(tmp_path / "samples.npz") as file:
        assert file.files == ["arr_0", "arr_1"]
        assert (file["arr_0"].dtype, file["arr_1"].dtype.kind) == (np.uint8, "i")
        np.testing.assert_array_equal(file["arr_0"], images)
        np.testing.assert_array_equal(file["arr_1"], labels)
