"""The seam metric: known answers, and what it must not see."""

import numpy as np
import pytest

from diffusion.metrics import seams as module
from diffusion.metrics.seams import seams


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def smooth(n=8, size=32):
    y, x = np.mgrid[:size, :size] / size
    waves = [np.sin(6.3 * (x * i + y * (n - i)) / n) + np.cos(5 * x * y + i) for i in range(n)]
    return np.round(60 * np.array(waves)[..., None] + 128).astype(np.uint8)


def blocks_of(rng, patch, n=8, size=32):
    """A constant for each patch."""
    values = rng.integers(0, 40, size=(n, size // patch, size // patch, 1))
    return values.repeat(patch, 1).repeat(patch, 2).astype(np.uint8)


@pytest.mark.parametrize(("patch", "stride"), [(4, None), (8, None), (16, None), (2, None), (8, 4), (12, 4), (20, 6)])
def test_no_grid_is_visible_in_white_noise(rng, patch, stride):
    noise = rng.integers(0, 256, size=(64, 32, 32, 3), dtype=np.uint8)
    assert seams(noise, patch, stride).ratio == pytest.approx(1, abs=0.03)


def test_no_grid_is_visible_in_smooth_images():
    for patch in (4, 8, 16):
        assert seams(smooth(), patch).ratio == pytest.approx(1, abs=0.1)


def test_offset_blocks_are_seen_at_their_own_patch_size(rng):
    """Blocks alone have nothing inside; over smooth images or noise the ratio is what the offsets add."""
    blocks = blocks_of(rng, 8)
    assert seams(blocks, 8).ratio == float("inf")
    assert seams((smooth() // 2 + blocks), 8).ratio > 5
    noise = rng.normal(0, 10, size=(400, 32, 32, 1))
    offsets = rng.normal(0, 5, size=(400, 4, 4, 1)).repeat(8, 1).repeat(8, 2)
    assert seams(noise + offsets, 8).ratio == pytest.approx((2 * 100 + 2 * 25) / (2 * 100), abs=0.03)
    assert seams(noise + offsets, 16).ratio == pytest.approx(1.25, abs=0.04)  # its borders are borders of these too


def test_blurred_borders_are_below_1(rng):
    x = rng.normal(size=(100, 16, 16, 1))
    x[:, 8] = x[:, 7]
    x[:, :, 8] = x[:, :, 7]
    assert seams(x, 8).ratio < 0.2


def test_detail_in_the_middle_is_no_seam(rng):
    """Images of a centred object: the middle row, a border of 14-pixel patches, has most detail."""
    y = np.exp(-np.square(np.arange(28) - 13.5) / 30)
    x = rng.normal(size=(300, 28, 28, 1)) * (y[:, None] * y)[..., None]
    found = seams(x, 14)
    assert found.ratio == pytest.approx(1, abs=0.1)
    assert found.energy[14].mean() > 2 * np.delete(found.energy, [0, 14], 0).mean()


def test_the_map_shows_where(rng):
    found = seams(blocks_of(rng, 8), 8)
    assert found.energy.shape == (32, 32)
    on = np.zeros((32, 32), bool)
    on[8::8] = on[:, 8::8] = True
    assert (found.energy[on] > 0).all() and (found.energy[~on] == 0).all()


def test_units_sizes_and_blocks_do_not_matter(rng, monkeypatch):
    x = rng.integers(0, 256, size=(20, 12, 18, 2), dtype=np.uint8)
    whole = seams(x, 6)
    assert seams(x / 255, 6).ratio == pytest.approx(whole.ratio)
    assert seams(x.swapaxes(1, 2), 6).ratio == pytest.approx(whole.ratio)
    monkeypatch.setattr(module, "ROWS", 7)
    np.testing.assert_allclose(seams(x, 6).energy, whole.energy)


def test_images_of_one_value_have_no_seams():
    assert seams(np.full((3, 8, 8, 1), 9, np.uint8), 4).ratio == 1


def test_patches_without_seams_are_refused():
    x = np.zeros((2, 12, 12, 1), np.uint8)
    for patch, stride, message in (
        (5, None, "patch_size=5 with stride=5 do not tile 12 pixels"),
        (4, 5, "do not tile"),
        (12, None, "leave no border in 12"),
        (1, None, "leave nothing but borders in 12"),
        (3, 1, "leave nothing but borders"),
    ):
        with pytest.raises(ValueError, match=message):
            seams(x, patch, stride)
    with pytest.raises(ValueError, match=r"\[N, H, W, C\]"):
        seams(x[..., 0], 4)
    with pytest.raises(ValueError, match="NaN"):
        seams(x * np.nan, 4)


def test_ratio_is_the_loop_over_the_ends_of_overlapping_patches(rng):
    """Patches of 10 every 6 of 28 pixels begin at 0, 6, 12, 18 and end at 10, 16, 22, 28."""
    x = rng.normal(size=(3, 28, 28, 2)) * np.linspace(1, 4, 28)[:, None, None]
    border = beside = 0
    for axis in (1, 2):
        change = np.square(np.diff(x, axis=axis)).mean(tuple({0, 1, 2, 3} - {axis}))  # of i and i + 1
        for i in (6, 10, 12, 16, 18, 22):
            border += change[i - 1]
            beside += (change[i - 2] + change[i]) / 2  # no two borders are neighbours
    assert seams(x, 10, 6).ratio == pytest.approx(border / beside, rel=1e-9)


def test_sums_of_each_image_are_those_of_all(rng):
    x = rng.normal(size=(5, 16, 16, 2))
    found = seams(x, 4)
    border, beside = found.sums.sum(0)
    assert found.ratio == pytest.approx(border / beside)
    for image, (on, off) in zip(x, found.sums, strict=True):
        assert seams(image[None], 4).ratio == pytest.approx(on / off)
