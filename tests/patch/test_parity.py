"""One contract, three implementations: JAX, NumPy and Numba agree with a naive loop to the bit, and fail alike."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.patch import arrays as jax_arrays
from diffusion.patch import compiled, views
from diffusion.patch.geometry import coverage
from tests.patch.test_views import arrays, cuts

MODULES = (jax_arrays, views, compiled)
LAYOUTS = ("hwc", "chw")


def naive_patchify(x, size, patch_size, stride, layout):
    """Window by window, value by value, as the definition says."""
    grid = [(n - p) // s + 1 for n, p, s in zip(size, patch_size, stride, strict=True)]
    tokens = []
    for image in x:
        for window in np.ndindex(*grid):
            cut = image[tuple(slice(i * s, i * s + p) for i, s, p in zip(window, stride, patch_size, strict=True))]
            tokens.append(list((np.moveaxis(cut, -1, 0) if layout == "chw" else cut).flat))
    return np.array(tokens, x.dtype).reshape(len(x), prod(grid), prod(patch_size) * x.shape[-1])


def naive_fold(split, stride):
    """Sums [*grid, *patch, C] window by window: for each place along an axis, earlier windows of that axis first."""
    if not stride:
        return split
    rank = len(stride)
    g, p, s = split.shape[0], split.shape[rank], stride[0]
    rows = [[naive_fold(np.take(split[i], u, rank - 1), stride[1:]) for u in range(p)] for i in range(g)]
    total = np.zeros(((g - 1) * s + p, *rows[0][0].shape), split.dtype)
    for i in range(g):
        for u in range(p):
            total[i * s + u] += rows[i][u]
    return total


def bits(a):
    raw = a.reshape(-1, 1).view(np.uint8)
    return (raw[:, :10] if a.dtype == np.longdouble and raw.shape[1] == 16 else raw).tobytes()  # the rest is padding


def same_bits(a, b):
    """Equal shape, dtype and bits; adding zero makes the two zeros one, which XLA does not tell apart in sums."""
    a, b = np.asarray(a), np.asarray(b)
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    if a.dtype.kind != "b":
        a, b = a + a.dtype.type(0), b + b.dtype.type(0)
    np.testing.assert_array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))


def check_patchify(data):
    size, p, s = data.draw(cuts())
    layout = data.draw(st.sampled_from(LAYOUTS))
    dtypes = ("?", "u1", "i2", ">i4", "u8", "f2", "f4", ">f8", "g", "c8", "c16")
    x = data.draw(arrays((data.draw(st.integers(1, 3)), *size, data.draw(st.integers(1, 3))), dtypes))
    if x.dtype.kind == "f":
        x[..., 0].flat[0] = np.nan
        x[..., 0].flat[-1] = -0.0
    expected = naive_patchify(x, size, p, s, layout)
    for module in (views, compiled):
        tokens = module.patchify(x, p, s, layout=layout)
        assert (tokens.dtype, tokens.shape) == (x.dtype, expected.shape)
        assert bits(tokens) == bits(expected)
    narrow = {"i8": "i4", "u8": "u4", "f8": "f4", "c16": "c8", "g": "f4"}  # what JAX has no 64-bit mode for here
    dtype = x.dtype.newbyteorder("=")
    dtype = np.dtype(narrow.get(dtype.str[1:], "f4" if dtype == np.longdouble else dtype))
    tokens = jax.jit(lambda x: jax_arrays.patchify(x, p, s, layout=layout))(jnp.asarray(x.astype(dtype)))
    assert bits(np.asarray(tokens)) == bits(expected.astype(dtype))


@settings(deadline=None, max_examples=5, derandomize=True)
@given(st.data())
def test_patchify_is_the_naive_loop(data):
    check_patchify(data)


@pytest.mark.slow
@settings(deadline=None, max_examples=12)
@given(st.data())
def test_patchify_is_the_naive_loop_for_more_arrays(data):
    check_patchify(data)


@settings(deadline=None, max_examples=6, derandomize=True)
@given(st.data())
def test_fold_and_unpatchify_are_the_naive_sum(data):
    size, p, s = data.draw(cuts())
    layout = data.draw(st.sampled_from(LAYOUTS))
    grid = [(n - q) // t + 1 for n, q, t in zip(size, p, s, strict=True)]
    b, c = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    dtype = data.draw(st.sampled_from(("f4", "f4", "f2", "c8")))
    values = np.random.default_rng(data.draw(st.integers(0, 9))).standard_normal((2, b, prod(grid), prod(p) * c))
    tokens = (values[0] + (1j * values[1] if dtype == "c8" else 0)).astype(dtype)
    split = tokens.reshape(b, *grid, *((c, *p) if layout == "chw" else (*p, c)))
    split = np.moveaxis(split, 1 + len(size), -1) if layout == "chw" else split
    expected = np.stack([naive_fold(one, s) for one in split])
    weight = (1 / coverage(size, p, s)).astype(dtype)[..., None]
    for module in MODULES:
        run = jax.jit if module is jax_arrays else lambda f: f
        same_bits(run(lambda t, m=module: m.fold(t, size, p, s, layout=layout))(tokens), expected)
        same_bits(run(lambda t, m=module: m.unpatchify(t, size, p, s, layout=layout))(tokens), expected * weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size,p,s", [((28, 28), (18, 18), (10, 10)), ((4, 6, 5), (2, 4, 3), (2, 1, 1))])
def test_fold_is_the_adjoint(size, p, s, layout):
    """<P x, y> = <x, P^T y> exactly: whole numbers are summed without rounding."""
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 9, (2, *size, 3)).astype(np.float64)
    for module in (views, compiled):
        tokens = module.patchify(x, p, s, layout=layout)
        y = rng.integers(-9, 9, tokens.shape).astype(np.float64)
        assert (tokens * y).sum() == (x * module.fold(y, size, p, s, layout=layout)).sum()


BAD_ARRAYS = {
    "no tiling": (np.zeros((1, 28, 28, 1)), 10, None),
    "no tiling with a stride": (np.zeros((1, 28, 28, 1)), 18, 7),
    "window too large": (np.zeros((1, 8, 28, 1)), 10, None),
    "stride too large": (np.zeros((1, 28, 28, 1)), 7, 14),
    "zero patch": (np.zeros((1, 28, 28, 1)), 0, None),
    "negative stride": (np.zeros((1, 28, 28, 1)), 7, -7),
    "too many lengths": (np.zeros((1, 28, 28, 1)), (7, 7, 7), None),
    "fraction": (np.zeros((1, 28, 28, 1)), 3.5, None),
    "not a number": (np.zeros((1, 28, 28, 1)), float("nan"), None),
    "no axis": (np.zeros((28, 28)), 7, None),
    "scalar": (np.zeros(()), 7, None),
    "empty axis": (np.zeros((1, 0, 28, 1)), 7, None),
    "strings": (np.full((1, 4, 4, 1), "a"), 2, None),
    "objects": (np.full((1, 4, 4, 1), None), 2, None),
    "dates": (np.zeros((1, 4, 4, 1), "M8[s]"), 2, None),
    "records": (np.zeros((1, 4, 4, 1), [("a", "f4")]), 2, None),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_patchify_fails_alike(case):
    x, p, s = BAD_ARRAYS[case]
    fail_alike(lambda module: module.patchify(x, p, s))


BAD_TOKENS = {
    "wrong count": (np.zeros((1, 5, 49)), (28, 28), 7, None),
    "wrong width": (np.zeros((1, 16, 50)), (28, 28), 7, None),
    "no width": (np.zeros((1, 16, 0)), (28, 28), 7, None),
    "wrong rank": (np.zeros((16, 49)), (28, 28), 7, None),
    "no tiling": (np.zeros((1, 16, 49)), (28, 28), 10, None),
    "size of one number": (np.zeros((1, 4, 7)), 28, 7, None),
    "size of fractions": (np.zeros((1, 4, 7)), (28.0,), 7, None),
    "no size": (np.zeros((1, 4, 7)), (), 7, None),
    "overlapping integers": (np.zeros((1, 4, 4), int), (10,), 4, 2),
    "strings": (np.full((1, 4, 7), "a"), (28,), 7, None),
}


@pytest.mark.parametrize("name", ["fold", "unpatchify"])
@pytest.mark.parametrize("case", BAD_TOKENS)
def test_fold_and_unpatchify_fail_alike(case, name):
    tokens, size, p, s = BAD_TOKENS[case]
    fail_alike(lambda module: getattr(module, name)(tokens, size, p, s))


def test_layouts_and_whole_numbers_fail_alike():
    x, tokens = np.zeros((1, 4, 4, 1)), np.zeros((1, 4, 4))
    fail_alike(lambda module: module.patchify(x, 2, layout="HWC"))
    fail_alike(lambda module: module.unpatchify(tokens, (4, 4), 2, layout="cwh"))
    fail_alike(lambda module: module.fold(tokens.astype(np.int32), (4, 4), 2))


def fail_alike(call):
    messages = []
    for module in MODULES:
        with pytest.raises((ValueError, TypeError)) as caught:
            call(module)
        messages.append((caught.type, str(caught.value)))
    assert messages[0] == messages[1] == messages[2]
    assert type(caught.value).__module__ == "builtins"
