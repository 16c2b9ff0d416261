"""What every network refuses when it is traced: wrong images, times and labels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models.base import clock_of, from_module
from diffusion.models.unet import unet
from diffusion.models.vit import vit
from tests.models.networks import ready

FIELDS = {
    vit: {"patch_size": 4, "width": 8, "depth": 1, "heads": 2},
    unet: {"patch_size": 4, "num_channels": 4, "channel_mult": (1,), "num_res_blocks": 1, "num_heads": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("network", FIELDS)
def test_wrong_inputs_are_refused(network):
    model, unconditional = network(**FIELDS[network], num_classes=3), network(**FIELDS[network])
    params, xt, t, y = ready(model, (2, 8, 8, 1), 3)
    image = jax.ShapeDtypeStruct((2, 8, 8, 1), np.float32)
    for wrong, message in (
        ((xt, 0.5, y), r"t must be a floating-point array of shape \(2,\), not 0\.5"),
        ((xt, jnp.float32(0.5), y), r"t must be .* of shape \(2,\), not float32 \(\)"),
        ((xt, jnp.ones(3), y), r"t must be .* of shape \(2,\), not float32 \(3,\)"),
        ((xt, jnp.ones((2, 1)), y), r"t must be .* not float32 \(2, 1\)"),
        ((xt, jnp.ones(2, int), y), r"t must be .* not int32 \(2,\)"),
        ((xt.astype(np.uint8), t, y), r"images must be floating-point, not uint8: convert them first"),
        ((xt, t, jnp.array([0, 4])), r"labels y lie in 0\.\.4, outside 0\.\.3"),
        ((xt, t, np.array([-1, 2])), r"labels y lie in -1\.\.2, outside 0\.\.3"),
        ((xt, t, jnp.zeros(2)), r"labels y must be an array of integers of shape \(2,\), not float32 \(2,\)"),
        ((xt, t, [0, 1]), r"labels y must be an array of integers of shape \(2,\), not \[0, 1\]"),
        ((xt, t, jnp.zeros((2, 1), int)), r"labels y must be an array of integers of shape \(2,\), not int32 \(2, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda params, wrong=wrong: model.apply(params, *wrong), params)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda key, wrong=wrong: model.init(key, *wrong), jax.random.key(0))
    params, *_ = ready(unconditional, (2, 8, 8, 1))
    with pytest.raises(ValueError, match=r"this network is unconditional \(num_classes=0\): call it without labels y"):
        jax.eval_shape(unconditional.apply, params, image, t, y)
    assert jax.eval_shape(unconditional.apply, params, image, t).shape == (2, 8, 8, 1)


def test_a_network_without_further_numbers_says_so():
    with pytest.raises(ValueError, match="scalars=3, velocity=True: UNet has neither, mean-flow models need ViT"):
        unet(**FIELDS[unet], scalars=3, velocity=True)


def test_the_null_label_and_traced_labels_pass():
    model = vit(**FIELDS[vit], num_classes=3)
    params, xt, t, _ = ready(model, (2, 8, 8, 1), 3)
    null = jnp.array([3, 3])
    assert jax.eval_shape(lambda params: model.apply(params, xt, t, null), params).shape == xt.shape
    assert jax.eval_shape(model.apply, params, xt, t, null + 1).shape == xt.shape  # its values are unknown


def test_a_module_without_labels_of_its_own_takes_any_condition():
    """Embeddings, text with a mask: what they are is the module's affair."""

    class Text(nn.Module):
        @nn.compact
        def __call__(self, xt, t, y, train):
            return xt + nn.Dense(1, name="text")((y["tokens"] * y["mask"][..., None]).mean(1))[:, None, None]

    y = {"tokens": jnp.ones((2, 5, 3)), "mask": jnp.ones((2, 5))}
    model, xt, t = from_module(Text()), jnp.ones((2, 4, 4, 1)), jnp.ones(2)
    params = model.init(jax.random.key(0), xt, t, y)
    assert model.apply(params, xt, t, y).shape == xt.shape


def test_clocks_are_those_of_the_papers():
    t = jnp.array([0.25, 1.0])
    assert clock_of("1000 t", None)(t).tolist() == [250, 1000]
    assert clock_of("1 - t", None)(t).tolist() == [0.75, 0]
    assert clock_of("index", 8)(t).tolist() == [1, 7]
    assert clock_of(jnp.sqrt, None)(t).tolist() == [0.5, 1]
