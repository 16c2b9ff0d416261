"""The U-Net's convolutions are XLA's, in values and in gradients, however these are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.cpu import conv


def plain(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def pulled(f, x, kernel, down):
    y, back = jax.vjp(f, x, kernel)
    return y, *back(down)


@pytest.mark.parametrize(
    ("height", "positions", "strips"), [(1, 1, 100), (7, 1, 3), (16, 40, 16), (23, 30, 9), (9, 10**6, 1)]
)
def test_values_and_gradients_are_those_of_the_plain_convolution(key, monkeypatch, height, positions, strips):
    monkeypatch.setattr(conv, "POSITIONS", positions)
    monkeypatch.setattr(conv, "STRIPS", strips)
    keys = jax.random.split(key, 3)
    x, kernel = jax.random.normal(keys[0], (2, height, 5, 3)), jax.random.normal(keys[1], (3, 3, 3, 4))
    down = jax.random.normal(keys[2], (2, height, 5, 4))
    for got, wanted in zip(pulled(conv.conv3x3, x, kernel, down), pulled(plain, x, kernel, down), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_derivatives_go_forwards_and_twice(key, monkeypatch):
    monkeypatch.setattr(conv, "POSITIONS", 20)
    keys = jax.random.split(key, 2)
    at = jax.random.normal(keys[0], (2, 7, 5, 3)), jax.random.normal(keys[1], (3, 3, 3, 4))
    for f in (lambda c: c, lambda c: jax.grad(lambda x, k: jnp.sin(c(x, k)).sum(), (0, 1))):
        got, wanted = (jax.jvp(f(c), at, at) for c in (conv.conv3x3, plain))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-4), got, wanted)


def test_a_convolution_of_one_tap_is_a_matrix_product(key):
    keys = jax.random.split(key, 3)
    x, kernel = jax.random.normal(keys[0], (2, 4, 5, 3)), jax.random.normal(keys[1], (1, 1, 3, 4))
    down = jax.random.normal(keys[2], (2, 4, 5, 4))
    for got, wanted in zip(pulled(conv.conv1x1, x, kernel, down), pulled(plain, x, kernel, down), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_large_images_are_cut_on_a_cpu_only_and_small_ones_nowhere():
    def convolutions(size, platform):
        x, kernel = jax.ShapeDtypeStruct((2, size, size, 4), jnp.bfloat16), jnp.zeros((3, 3, 4, 4), jnp.bfloat16)
        gradient = jax.jit(jax.grad(lambda x, k: conv.conv3x3(x, k).sum().astype(float), 1))
        return gradient.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text().count("stablehlo.convolution")

    whole = convolutions(32, "cpu")
    assert convolutions(32, "cuda") == convolutions(256, "cuda") == whole
    assert convolutions(256, "cpu") == whole * conv.STRIPS


@pytest.mark.slow
@pytest.mark.parametrize(("size", "taps", "stride"), [((8, 8), 3, 1), ((7, 10), 3, 2), ((5, 4), 5, 1), ((9, 6), 5, 2)])
def test_each_channel_by_itself_is_the_convolution_by_groups(key, size, taps, stride):
    keys = jax.random.split(key)
    x, kernel = jax.random.normal(keys[0], (2, *size, 6)), jax.random.normal(keys[1], (taps, taps, 1, 6))
    wanted = conv._grouped(x, kernel, stride)
    np.testing.assert_allclose(conv.depthwise(x, kernel, stride), wanted, atol=1e-4)
    lowered = jax.jit(conv.depthwise, static_argnums=2).trace(x, kernel, stride)
    kinds = [lowered.lower(lowering_platforms=(p,)).as_text().count("stablehlo.convolution") for p in ("cpu", "cuda")]
    assert kinds == [0, 1]
