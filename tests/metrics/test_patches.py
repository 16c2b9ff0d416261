"""Sliced distance of patches of pixels: where patches are cut, and what the distance finds."""

import numpy as np
import pytest

from diffusion.metrics.patches import COUNT, patch_distance, random_patches
from diffusion.metrics.sliced import sliced_distance


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("space", [(20,), (12, 9), (5, 12, 9)])
def test_patches_are_windows_of_their_images(rng, space):
    """Each value says where it is, so that neighbours in a patch must be neighbours in its image."""
    n, c = 6, 2
    images = np.arange(n * np.prod(space) * c, dtype=np.float64).reshape(n, *space, c)
    sides = [min(8, side) for side in space]
    found = random_patches(images, count=3) * 255
    assert found.shape == (3 * n, np.prod(sides) * c)
    starts = set()
    for i, patch in enumerate(found):
        first = np.unravel_index(round(patch[0]), images.shape)
        assert first[0] == i % n and first[-1] == 0
        window = tuple(slice(a, a + side) for a, side in zip(first[1:-1], sides, strict=True))
        np.testing.assert_allclose(patch.reshape(*sides, c), images[i % n][window], rtol=1e-12)
        starts.add(first[1:-1])
    assert len(starts) > 5


def test_every_place_is_reached(rng):
    image = np.zeros((2000, 10, 8, 1), np.uint8)
    image[:, :, 0, 0] = np.arange(10)
    starts = np.rint(random_patches(image, count=1)[:, 0] * 255)
    np.testing.assert_allclose(np.bincount(starts.astype(int)) / 2000, [1 / 3] * 3, atol=0.05)


def test_images_of_one_patch_have_the_sliced_distance_of_their_pixels(rng):
    a, b = (rng.integers(0, 256, (n, 4, 4, 3), np.uint8) for n in (30, 40))
    rows = [np.tile(x.reshape(len(x), -1) / 255, (COUNT, 1)) for x in (a, b)]
    expected = sliced_distance(*rows, directions=50, seed=3)
    np.testing.assert_allclose(patch_distance(a, b, directions=50, seed=3), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["noise", "blur", "brightness", "few"])
def test_it_worsens_with_damage_also_for_five_channels(rng, kind):
    """Of smooth random images, against others of them."""

    def smooth(n):
        x = rng.normal(size=(n, 20, 20, 5))
        for axis in (1, 2):
            x = sum(np.roll(x, i, axis) for i in range(3))
        return np.clip(128 + 20 * x, 0, 255)

    real, good, bad = smooth(300), smooth(300), smooth(300)
    if kind == "noise":
        bad = bad + rng.normal(0, 40, bad.shape)
    elif kind == "blur":
        bad = sum(np.roll(bad, i, 2) for i in range(5)) / 5
    elif kind == "brightness":
        bad = 0.8 * bad
    else:
        bad = bad[np.arange(300) % 3]
    assert patch_distance(bad, real) > 1.5 * patch_distance(good, real) > 0


def test_wrong_input_is_refused(rng):
    a = rng.integers(0, 256, (4, 8, 8, 3), np.uint8)
    for b in (a[:, :4], a[..., :1]):
        with pytest.raises(ValueError, match="must have one shape"):
            patch_distance(a, b)
    with pytest.raises(ValueError, match="must have one shape"):
        patch_distance(a.reshape(4, -1), a.reshape(4, -1))
    with pytest.raises(ValueError, match="1 values that are NaN"):
        patch_distance(np.where(np.arange(4 * 192).reshape(a.shape) == 5, np.nan, a), a)
    for wrong in ({"size": 0}, {"count": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            random_patches(a, **wrong)
