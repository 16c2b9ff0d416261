"""Parameters of layers in one array: both forms hold the same, and names say which layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import layers


def tree(names):
    rng = np.random.default_rng(0)
    return {name: {"out": {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}} for name in names}


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_stacked_and_unstacked_are_inverses(kind):
    plain = jax.tree.map(kind, tree(["head", "block_0", *(f"block_{i}" for i in range(1, 12)), "velocity_block_0"]))
    names = ["blocks_0_2", "blocks_2_11", "head"]
    found = layers.stacked(plain, names)
    assert set(found) == {"head", "blocks_0_2", "blocks_2_11", "block_11", "velocity_block_0"}
    assert found["blocks_2_11"]["out"]["kernel"].shape == (9, 3, 2)
    np.testing.assert_array_equal(found["blocks_2_11"]["out"]["bias"][8], plain["block_10"]["out"]["bias"])
    assert all(isinstance(leaf, type(kind(0.0)) | np.ndarray) for leaf in jax.tree.leaves(found))
    back = layers.unstacked(found)
    assert set(back) == set(plain)
    jax.tree.map(np.testing.assert_array_equal, back, plain)
    other = layers.stacked(layers.unstacked(found), ["blocks_1_12"])  # another form, from any
    assert set(other) == {"head", "block_0", "blocks_1_12", "velocity_block_0"}


def test_names_say_which_layers():
    assert layers.span("velocity_blocks_3_12") == layers.Span("velocity_block", 3, 12)
    assert layers.Span("block", 3, 12).name == "blocks_3_12"
    for name in ("block_3", "blocks_3", "head", "blocks_1_2_x", "middle_1_2"):
        assert layers.span(name) is None
    marked = jax.tree_util.tree_leaves_with_path({"blocks_0_2": {"out": [1, 2]}, "block_2": {"out": 3}})
    assert [layers.is_stacked(path) for path, _ in marked] == [False, True, True]


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="blocks_0_3 needs block_1, block_2, and the parameters have block_0, head"):
        layers.stacked(tree(["block_0", "head"]), ["blocks_0_3"])
