"""Windows as views: nothing is copied, nothing outside the array is reachable, and what one does with windows."""

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.array_utils import byte_bounds
from numpy.lib.stride_tricks import sliding_window_view

from diffusion.patch import views
from diffusion.patch.views import fold, patchify, unpatchify, windows


@st.composite
def cuts(draw, rank: int | None = None):
    """Size, patch size and stride that tile, by construction: n = (g - 1) s + p."""
    axes = draw(st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=rank or 1, max_size=rank or 4))
    patch = [p for p, _, _ in axes]
    stride = [min(s, p) for p, s, _ in axes]
    size = [(g - 1) * s + p for (p, _, g), s in zip(axes, stride, strict=True)]
    return tuple(size), tuple(patch), tuple(stride)


@st.composite
def arrays(draw, shape, dtypes=("u1", "f4", ">f4", "f2", "i8", "c16", "?")):
    """An array of `shape` in any memory layout: permuted axes, steps of either sign, foreign byte order."""
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from((1, -1, 2, -2))) for _ in shape]
    store = np.zeros([shape[axis] * abs(steps[axis]) for axis in order], dtype)
    store = store.transpose(np.argsort(order))
    x = store[tuple(slice(None, None, step) for step in steps)][tuple(slice(0, n) for n in shape)]
    x[...] = np.random.default_rng(0).integers(0, 200, shape)
    return x


def test_examples_in_docstrings():
    result = doctest.testmod(views)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(st.data())
def test_windows_are_views_that_stay_inside(data):
    size, patch, stride = data.draw(cuts())
    x = data.draw(arrays((data.draw(st.integers(1, 3)), *size, data.draw(st.integers(1, 3)))))
    view = windows(x, patch, stride)
    assert view.dtype == x.dtype
    assert np.may_share_memory(view, x)
    assert not view.flags.writeable
    low, high = byte_bounds(x)
    assert byte_bounds(view) == (low, high), "the windows reach the first and the last byte, and no other"
    axes = tuple(range(1, x.ndim - 1))
    every = sliding_window_view(x, patch, axes)[(slice(None), *(slice(None, None, s) for s in stride))]
    np.testing.assert_array_equal(view, np.moveaxis(every, x.ndim - 1, -1))


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_patchify_does_not_care_how_the_array_lies_in_memory(data):
    size, patch, stride = data.draw(cuts())
    layout = data.draw(st.sampled_from(("hwc", "chw")))
    x = data.draw(arrays((2, *size, data.draw(st.integers(1, 3)))))
    tokens = patchify(x, patch, stride, layout=layout)
    assert tokens.flags.c_contiguous
    assert tokens.flags.writeable
    assert not np.may_share_memory(tokens, x)
    np.testing.assert_array_equal(tokens, patchify(np.ascontiguousarray(x), patch, stride, layout=layout))
    if x.dtype.kind in "fc":
        np.testing.assert_allclose(unpatchify(tokens, size, patch, stride, layout=layout), x, rtol=1e-2)


def test_a_window_cannot_be_written_through():
    view = windows(np.zeros((1, 4, 4, 1)), 2)
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0, 0, 0, 0, 0] = 1


def test_without_channels():
    x = np.arange(24).reshape(2, 12)
    np.testing.assert_array_equal(windows(x, 4, 2, channels=False), windows(x[..., None], 4, 2)[..., 0])
    assert np.shares_memory(windows(x, 4, 2, channels=False), x)


def test_subclasses_and_lists_become_plain_arrays():
    x = np.arange(16).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(patchify(x.tolist(), 2), patchify(x, 2))
    assert type(windows(x.view(np.recarray), 2)) is np.ndarray


def test_pooling_and_convolution_by_windows():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 8, 8, 3))
    pooled = windows(x, 2).mean((3, 4))
    np.testing.assert_allclose(pooled, (x[:, ::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, ::2] + x[:, 1::2, 1::2]) / 4)
    kernel = rng.standard_normal((3, 3, 3, 5))
    convolved = np.einsum("bijhwc,hwco->bijo", windows(x, 3, 1), kernel)
    loop = sum(np.einsum("bijc,co->bijo", x[:, u : u + 6, v : v + 6], kernel[u, v]) for u in range(3) for v in range(3))
    np.testing.assert_allclose(convolved, loop)


def test_chunks_of_sound():
    wave = np.sin(np.arange(1000.0))
    chunks = windows(wave[None], 100, 50, channels=False)[0]
    assert chunks.shape == (19, 100)
    np.testing.assert_array_equal(chunks[1, :50], chunks[0, 50:])


def test_an_empty_batch_or_no_channels():
    assert windows(np.zeros((0, 6, 6, 1)), 4, 2).shape == (0, 2, 2, 4, 4, 1)
    assert patchify(np.zeros((0, 6, 6, 1)), 4, 2).shape == (0, 4, 16)
    assert patchify(np.zeros((2, 6, 6, 0)), 4, 2).shape == (2, 4, 0)
    assert unpatchify(np.zeros((0, 4, 16)), (6, 6), 4, 2).shape == (0, 6, 6, 1)


def test_a_broadcast_array_is_cut_without_being_stored():
    x = np.broadcast_to(np.float32(3), (1000, 64, 64, 3))
    assert byte_bounds(windows(x, 8))[1] - byte_bounds(windows(x, 8))[0] == 4
    assert (patchify(x[:2], 8) == 3).all()


def test_fold_adds_in_the_stated_order():
    """1e8 - 1e8 + 1 is 1 from left to right and 0 from right to left in float32."""
    tokens = np.zeros((1, 3, 3), np.float32)
    tokens[0, 0, 2], tokens[0, 1, 1], tokens[0, 2, 0] = 1e8, -1e8, 1  # all three on the third element
    assert fold(tokens, (5,), 3, 1)[0, 2, 0] == 1
