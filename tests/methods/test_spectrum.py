"""Frequencies of images, and what of them patches lose, on signals whose spectrum is known."""

import numpy as np
import pytest
import scipy.fft

from diffusion.methods import spectrum


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_coefficients_are_those_of_scipy(rng):
    x = rng.normal(0, 1, (2, 4, 6, 3))
    np.testing.assert_allclose(spectrum.cosines(x), scipy.fft.dctn(x, axes=(1, 2), norm="ortho"), atol=1e-12)
    np.testing.assert_allclose(spectrum.images(spectrum.cosines(x)), x, atol=1e-12)


def test_white_noise_has_power_1_in_every_band_and_a_cosine_in_its_own(rng):
    np.testing.assert_allclose(spectrum.power(rng.normal(0, 1, (4000, 4, 8, 1))), 1, atol=0.05)
    row = np.cos(np.pi * 6 * (np.arange(8) + 0.5) / 8)  # coefficient 6 of 8, which is band 3 of 4
    energy = spectrum.power(np.broadcast_to(row[None, None, :, None], (1, 4, 8, 1)))
    assert energy[3] > 0 and np.abs(energy[:3]).max() < 1e-10


@pytest.mark.parametrize("size", [(8, 8), (4, 8), (12,), (4, 6, 8)])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_bands_below_the_limit_are_the_coefficients_of_a_grid_of_patches(size, patch_size):
    """As many as there are patches: those with k < side / P along every axis."""
    kept = spectrum.bands(size) < min(size) // patch_size
    expected = np.zeros(size, bool)
    expected[tuple(slice(s // patch_size) for s in size)] = True
    np.testing.assert_array_equal(kept, expected)


def test_images_repeated_from_a_coarser_grid_of_cosines_lose_nothing_and_a_checkerboard_all(rng):
    coarse = np.pad(rng.normal(0, 1, (5, 4, 4, 1)), ((0, 0), (0, 4), (0, 4), (0, 0)))
    smooth = scipy.fft.idctn(coarse, axes=(1, 2), norm="ortho")
    energy = spectrum.recoverable(spectrum.moments(smooth, [smooth]))
    assert spectrum.lost(energy, 2) < 1e-6 < spectrum.lost(energy, 4)
    board = np.broadcast_to(
        ((np.arange(8)[:, None] + np.arange(8)[None]) % 2 * 2.0 - 1)[None, :, :, None], (1, 8, 8, 1)
    )
    assert spectrum.lost(spectrum.recoverable(spectrum.moments(board, [board])), 2) > 0.99


def gaussian(rng, n=30000, noise=0.7):
    """Images whose coefficients are independent, with variance 4^-band, and the same with noise."""
    variance = 4.0 ** -spectrum.bands((4, 4))[..., None]
    x0 = scipy.fft.idctn(np.sqrt(variance) * rng.normal(0, 1, (n, 4, 4, 1)), axes=(1, 2), norm="ortho")
    xt = x0 + noise * rng.normal(0, 1, x0.shape)
    counts = np.array([1, 3, 5, 7])
    s = 4.0 ** -np.arange(4)
    return x0, xt, counts * s**2 / (s + noise**2)


def test_of_a_gaussian_the_noised_image_explains_what_can_be_recovered(rng):
    """The posterior mean of each coefficient is s / (s + n^2) times the noised one: energy s^2 / (s + n^2)."""
    x0, xt, exact = gaussian(rng)
    found = spectrum.moments(x0, [xt])
    np.testing.assert_allclose(spectrum.recoverable(found), exact, rtol=0.08)
    np.testing.assert_allclose(spectrum.gains(found)[:, 0], [1 / 1.49, 0.25 / 0.74, 0.0625 / 0.5525, 0.0308], rtol=0.1)
    error = np.square(spectrum.combined(spectrum.gains(found), [xt]) - x0).sum((1, 2, 3)).mean()
    explained = found.energy.sum() / found.count - spectrum.recoverable(found).sum()
    np.testing.assert_allclose(error, explained, rtol=1e-4)


def test_a_second_estimate_never_explains_less_and_a_useless_one_no_more(rng):
    x0, xt, exact = gaussian(rng)
    alone = spectrum.recoverable(spectrum.moments(x0, [xt]))
    random = spectrum.recoverable(spectrum.moments(x0, [xt, rng.normal(0, 1, x0.shape)]))
    twice = spectrum.recoverable(spectrum.moments(x0, [xt, 2 * xt]))
    truth = spectrum.moments(x0, [xt, x0])
    assert (random >= alone - 1e-9).all() and random.sum() < 1.02 * alone.sum()
    np.testing.assert_allclose(twice, alone, rtol=1e-5)
    np.testing.assert_allclose(spectrum.recoverable(truth), truth.energy / truth.count, rtol=1e-5)


def test_batches_add_up(rng):
    x0, xt, _ = gaussian(rng, 40)
    whole = spectrum.moments(x0, [xt])
    parts = spectrum.moments(x0[:10], [xt[:10]]) + spectrum.moments(x0[10:], [xt[10:]])
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


def test_what_is_lost_begins_at_the_band_of_the_limit():
    """Of 8 bands, patches of 2 carry the first 4 and patches of 4 the first 2; patches of 1 carry all."""
    recovered, energy = np.arange(8.0), np.full(8, 7.0)
    assert [spectrum.lost(recovered, p) for p in (1, 2, 4, 8)] == [0, 22 / 28, 27 / 28, 1]
    assert spectrum.lost(recovered, 4, energy) == 27 / 56


def test_a_patch_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="patch_size=3 must divide the shortest side, 8"):
        spectrum.lost(np.ones(8), 3)
