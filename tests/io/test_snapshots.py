"""Snapshots of averages: what is read is what was saved, and damage is noticed."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.io import snapshots


def test_averages_are_read_one_by_one(tmp_path):
    trees = [
        {"a": {"w": np.arange(3.0), "b": np.float32(2)}, "c": np.ones((2, 2), np.float32)},
        {"a": {"w": np.zeros(2)}},
    ]
    for step in (20, 5):
        snapshots.save(tmp_path / "averages", step, trees)
    assert snapshots.steps(tmp_path / "averages") == [5, 20] and snapshots.steps(tmp_path / "none") == []
    for i, tree in enumerate(trees):
        found = snapshots.read(tmp_path / "averages", 20, i)
        assert found.keys() == tree.keys()
        np.testing.assert_array_equal(found["a"]["w"], tree["a"]["w"])
    assert snapshots.read(tmp_path / "averages", 5, 0)["c"].dtype == np.float32
    assert {p.name for p in (tmp_path / "averages").iterdir()} == {"0000005.npz", "0000020.npz"}


def test_damaged_and_missing_ones_are_named(tmp_path):
    snapshots.save(tmp_path, 3, [{"w": np.arange(1000.0)}])
    with pytest.raises(FileNotFoundError, match=r"0000004.npz; there are those of the steps \[3\]"):
        snapshots.read(tmp_path, 4, 0)
    with pytest.raises(ValueError, match="has no average number 1"):
        snapshots.read(tmp_path, 3, 1)
    path = tmp_path / "0000003.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="0000003.npz is damaged .*: delete it"):
        snapshots.read(tmp_path, 3, 0)
    path.write_bytes(data[:100])
    with pytest.raises(ValueError, match="is damaged"):
        snapshots.read(tmp_path, 3, 0)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a/b": np.ones(1)}, "has a slash in it"),
        ({"a": [np.ones(1)]}, r"the parameter \['a'\]\[0\] must be in nested dicts with names for keys"),
        ({"a": {0: np.ones(1)}}, r"the parameter \['a'\]\[0\] must be in nested dicts"),
        (np.ones(1), "must be in nested dicts"),
        ({"a": jnp.ones(1, "bfloat16")}, "cannot hold the average 0/a of type bfloat16: cast it to float32"),
    ],
)
def test_what_would_not_be_read_as_it_was_is_refused(tmp_path, tree, message):
    with pytest.raises(ValueError, match=message):
        snapshots.save(tmp_path, 4, [tree])
