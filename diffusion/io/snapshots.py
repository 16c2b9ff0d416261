"""Snapshots of averaged parameters, many small files beside the checkpoints: directory/<step>.npz.

One file holds the averages of one step, a sequence of nested dicts, as arrays "<number>/<name>/<name>/...". The zip
format has a checksum of every array, so a damaged file is noticed when it is read. Only what it gives back as it was is
stored: dicts with names for keys, and types that NumPy has, which bfloat16 is not.
"""

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion import sharding
from diffusion.io.files import atomic_write


def save(directory: str | os.PathLike, step: int, averages: Sequence[Any]) -> None:
    """Writes averages, nested dicts of arrays, as those of `step`; replaces those of the same step.

    If several JAX processes train together, each calls it, and the first one writes.

    Raises:
      ValueError: a node is not a dict, a name is not a string or has a slash in it, or NumPy lacks a leaf's type.
      OSError: the file cannot be written.
    """
    arrays = {f"{i}/{name}": leaf for i, tree in enumerate(averages) for name, leaf in _flat(tree).items()}
    for name, leaf in arrays.items():
        if np.dtype(leaf.dtype).kind not in "biufc":
            raise ValueError(f"a snapshot cannot hold the average {name} of type {leaf.dtype}: cast it to float32")
    arrays = sharding.gathered(arrays)
    if jax.process_index():
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    atomic_write(directory / f"{step:07d}.npz", lambda file: np.savez(file, **arrays))


def steps(directory: str | os.PathLike) -> list[int]:
    """The steps that have a snapshot, ascending; empty where there is no such directory."""
    return sorted(int(p.stem) for p in Path(directory).glob("*.npz") if p.stem.isdecimal())


def read(directory: str | os.PathLike, step: int, number: int) -> Any:
    """The average `number` of the snapshot of `step`, nested dicts of NumPy arrays.

    Raises:
      FileNotFoundError: there is no snapshot of that step.
      ValueError: the file is damaged, or has no such average.
    """
    path = Path(directory) / f"{step:07d}.npz"
    if not path.is_file():
        raise FileNotFoundError(f"there is no snapshot {path}; there are those of the steps {steps(directory)}")
    try:
        with zipfile.ZipFile(path), np.load(path) as file:  # the first because NumPy leaves what is no zip open
            found = {name: file[name] for name in file.files if name.startswith(f"{number}/")}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(f"{path} is damaged ({e}): delete it, and other snapshots take its place") from e
    if not found:
        raise ValueError(f"{path} has no average number {number}")
    tree: dict[str, Any] = {}
    for name, array in found.items():
        _, *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return tree


def _flat(tree: Any) -> dict[str, Any]:
    named = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = [key.key if isinstance(key, jax.tree_util.DictKey) else None for key in path]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"the parameter {jax.tree_util.keystr(path)} must be in nested dicts with names for keys")
        if any("/" in name for name in names):
            raise ValueError(f"the name of the parameter {names} has a slash in it, which a snapshot cannot hold")
        named["/".join(names)] = leaf
    return named
