"""Figures beyond the samples: nearest training images, and where seams are."""

import numpy as np

from diffusion.data import Source
from experiments import figures, image_files


def source(images):
    return Source("made", images, np.zeros(len(images), np.int32), ("a",))


def test_copies_come_first_above_what_they_copy():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 256, (40, 8, 8, 3), np.uint8)
    samples = rng.integers(0, 256, (30, 8, 8, 3), np.uint8)
    samples[17], samples[4] = train[33], train[2]
    samples[17, 0, 0, 0] ^= 1
    shown = np.asarray(figures.nearest_pairs(samples, source(train)))
    expected = np.concatenate([samples[[4, 17]], train[[2, 33]]])
    np.testing.assert_array_equal(shown[:, : 2 + 2 * (56 + 2)], np.asarray(image_files.grid(expected, 2)))
    assert shown.shape[1] == 2 + figures.PAIRS * (56 + 2)


class Decoded:
    """Images that are decoded when they are read, counted."""

    def __init__(self, images):
        self._images, self.shape, self.read = images, images.shape, 0

    def __len__(self):
        return len(self._images)

    def __getitem__(self, rows):
        found = self._images[rows]
        self.read += len(found)
        return found


def test_of_images_that_are_decoded_some_are_searched(monkeypatch):
    monkeypatch.setattr(figures, "SEARCHED", 10)
    images = Decoded(np.random.default_rng(0).integers(0, 256, (100, 4, 4, 1), np.uint8))
    figures.nearest_pairs(images._images[:5], source(images))
    assert images.read == 10


def test_the_maps_are_those_of_samples_and_of_as_many_real_images(monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures.charts, "heat_maps", lambda *given: drawn.update(given=given))
    rng = np.random.default_rng(0)
    cut = np.kron(rng.integers(0, 256, (20, 4, 4, 1), np.uint8), np.ones((1, 4, 4, 1), np.uint8))
    cut[:, 1::2] ^= 1
    figures.seam_maps(cut, source(np.full((50, 16, 16, 1), 100, np.uint8)), (4, None))
    (samples, real), titles = drawn["given"]
    borders = samples[[4, 8, 12]]
    assert borders.min() > 100 * samples[[1, 2, 3, 5, 6, 7]][:, [1, 2, 3]].max() and not real.any()
    assert titles[1] == "real images, seam 1.000" and float(titles[0].split()[-1]) > 100


def test_maps_share_a_scale():
    """The darkest and the brightest pixel of the second map are those of its values on the scale of the first."""
    image = np.asarray(figures.charts.heat_maps([np.full((4, 4), 10.0), np.full((4, 4), 0.0)], ["a", "b"]), float)
    middle = image[image.shape[0] // 2].sum(1)
    third = image.shape[1] // 3
    assert middle[third // 2] > 600 and middle[third + third // 2] < 60
