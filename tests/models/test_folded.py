"""Layers of classifiers that are only applied: pools as those of Flax, convolutions with batch normalisation inside."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models import folded


@pytest.mark.slow
@pytest.mark.parametrize("size", [(7, 10), (8, 3), (3, 5)])
def test_pools_are_those_of_flax(key, size):
    x = jax.random.normal(key, (2, *size, 3)) - 3
    window = (3, 3)
    for stride in (1, 2):
        wanted = nn.max_pool(x, window, (stride, stride))
        np.testing.assert_array_equal(folded.max_pool(x, stride), wanted)
    np.testing.assert_array_equal(folded.max_pool(x, 1, "SAME"), nn.max_pool(x, window, padding="SAME"))
    wanted = nn.avg_pool(x, window, padding="SAME", count_include_pad=False)
    np.testing.assert_allclose(folded.mean_pool(x), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "stride", "padding", "depthwise"),
    [((1, 1), 1, "SAME", False), ((1, 1), 2, "SAME", False), ((1, 3), 1, "SAME", False), ((3, 3), 2, "VALID", False),
     ((3, 3), 2, "SAME", True)],
)  # fmt: skip
def test_batch_normalisation_is_folded_in(key, size, stride, padding, depthwise):
    rng = np.random.default_rng(0)
    x, (ins, outs) = jax.random.normal(key, (2, 8, 7, 6)), (6, 6 if depthwise else 5)
    state = {f"bn.{name}": rng.normal(size=outs).astype(np.float32) for name in ("weight", "bias", "running_mean")}
    state["bn.running_var"] = rng.uniform(0.1, 2, outs).astype(np.float32)
    state["conv.weight"] = rng.normal(size=(outs, 1 if depthwise else ins, *size)).astype(np.float32)
    params = folded.from_torch(state, "conv", "bn", 1e-3)
    found = folded.Conv(outs, size, stride, padding, depthwise).apply({"params": params}, x)
    plain = nn.Conv(outs, size, stride, padding, feature_group_count=ins if depthwise else 1, use_bias=False)
    y = plain.apply({"params": {"kernel": jnp.asarray(state["conv.weight"].transpose(2, 3, 1, 0))}}, x)
    values = (y - state["bn.running_mean"][None, None, None]) / np.sqrt(state["bn.running_var"] + 1e-3)[
        None, None, None
    ]
    wanted = values * state["bn.weight"][None, None, None] + state["bn.bias"][None, None, None]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
