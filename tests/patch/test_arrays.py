"""Patches in JAX: adjoint, inverse, transformations, static checks, and the gradients that follow from linearity."""

import doctest
import re
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.patch import arrays, fold, geometry, patchify, unpatchify
from diffusion.patch.geometry import coverage

CUTS = [
    ((10,), 4, 2),
    ((12,), (4,), None),
    ((8, 12), (4, 6), None),
    ((28, 28), 18, 10),
    ((7, 9), (3, 5), (2, 1)),
    ((11, 5), (5, 5), (2, 3)),
    ((4, 6, 5), (2, 4, 3), (2, 1, 1)),
]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("module", [geometry, arrays])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("layout", ["hwc", "chw"])
@pytest.mark.parametrize("size,p,s", CUTS)
def test_fold_is_the_adjoint_and_unpatchify_the_inverse(rng, size, p, s, layout):
    cut = geometry.geometry(size, p, s)
    x = rng.standard_normal((2, *size, 3), np.float32)
    y = rng.standard_normal((2, prod(cut.grid), prod(cut.patch) * 3), np.float32)

    @jax.jit  # one program: eager, each of the many small operations would be compiled by itself
    def run(x, y):
        tokens = patchify(x, p, s, layout=layout)
        folded = fold(jnp.concatenate([y, jnp.ones_like(y[:1])]), size, p, s, layout=layout)
        return tokens, folded[:2], folded[2, ..., 0], unpatchify(tokens, size, p, s, layout=layout)

    tokens, folded, ones, back = (np.asarray(value) for value in run(x, y))
    np.testing.assert_allclose(np.vdot(tokens, y), np.vdot(x, folded), rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(ones, coverage(size, p, s))
    np.testing.assert_allclose(back, x, rtol=1e-6)
    if not set(np.unique(coverage(size, p, s))) - {1, 2, 4}:
        np.testing.assert_array_equal(back, x)


@pytest.mark.slow
def test_eager_jit_and_vmap_agree_to_the_bit(rng):
    def f(tokens):
        return unpatchify(tokens, (5, 7), 3, (2, 1), layout="chw")

    tokens = rng.standard_normal((3, 10, 9), np.float32)
    eager = f(tokens)
    np.testing.assert_array_equal(jax.jit(f)(tokens), eager)
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda v: f(v[None])[0]))(tokens), eager)


def test_the_gradient_of_patchify_is_fold(rng):
    x = rng.standard_normal((1, 7, 2), np.float32)
    weight = rng.standard_normal((1, 3, 6), np.float32)
    gradient = jax.jit(jax.grad(lambda x: (patchify(x, 3, 2) * weight).sum()))(x)
    np.testing.assert_array_equal(gradient, fold(weight, (7,), 3, 2))


def test_derivatives_are_sums_of_slices_in_both_directions(rng):
    x, direction = rng.standard_normal((2, 2, 28, 28, 1), np.float32)
    value, tangent = jax.jit(lambda x, v: jax.jvp(lambda x: patchify(x, 18, 10), (x,), (v,)))(x, direction)
    np.testing.assert_array_equal(value, patchify(x, 18, 10))
    np.testing.assert_array_equal(tangent, patchify(direction, 18, 10))
    gradient = jax.jit(jax.grad(lambda x: (patchify(x, 18, 10) ** 2).sum()))
    assert "scatter" not in gradient.lower(x).as_text()
    np.testing.assert_array_equal(gradient(x), fold(2 * patchify(x, 18, 10), (28, 28), 18, 10))


@pytest.mark.parametrize("most", [0, 64], ids=["axis by axis", "nested"])
@pytest.mark.parametrize("layout", ["hwc", "chw"])
@pytest.mark.parametrize("size,p,s", CUTS)
def test_slices_are_the_lookup(rng, monkeypatch, size, p, s, layout, most):
    """What accelerators run and what derivatives come from, against what a CPU runs."""
    monkeypatch.setattr(arrays, "_BLOCKS", most)
    x = rng.standard_normal((2, *size, 3), np.float32)
    slices = jax.jit(lambda x: arrays._slices(x, geometry.geometry(size, p, s), layout))
    assert "gather" not in slices.lower(x).as_text()
    np.testing.assert_array_equal(slices(x), patchify(x, p, s, layout=layout))


def test_layouts_hold_the_same_values_in_another_order(rng):
    x = rng.standard_normal((2, 6, 4, 3), np.float32)
    hwc, chw = np.asarray(patchify(x, 2)), np.asarray(patchify(x, 2, layout="chw"))
    np.testing.assert_array_equal(hwc.reshape(2, 6, 4, 3).transpose(0, 1, 3, 2), chw.reshape(2, 6, 3, 4))
    np.testing.assert_array_equal(hwc[0, 1], x[0, :2, 2:].reshape(-1))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8, jnp.bool_, jnp.complex64])
def test_dtypes_survive(rng, dtype):
    x = rng.integers(0, 100, (1, 4, 1)).astype(dtype)
    tokens = patchify(x, 2)
    assert tokens.dtype == dtype
    np.testing.assert_array_equal(unpatchify(tokens, (4,), 2), x)


def test_an_empty_batch_gives_no_tokens():
    assert patchify(jnp.zeros((0, 6, 6, 1)), 4, 2).shape == (0, 4, 16)
    assert unpatchify(jnp.zeros((0, 4, 16)), (6, 6), 4, 2).shape == (0, 6, 6, 1)


@pytest.mark.parametrize("n", range(1, 13))
def test_the_nearest_choice_in_a_message_is_valid(n):
    """Whatever does not tile, the patch size and stride that the error proposes do."""
    for p in range(1, n + 1):
        for s in range(1, n + 3):
            try:
                geometry.geometry((n,), p, s)
            except ValueError as error:
                strides = re.findall(r"stride=(\d+)", str(error))
                geometry.geometry((n,), p, int(strides[-1]))
                if "without overlap" in str(error):
                    geometry.geometry((n,), int(re.findall(r"patch_size=(\d+)", str(error))[-1]))
            else:
                assert coverage((n,), p, s).min() > 0
