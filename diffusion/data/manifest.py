"""Remembers which files were found to be images, so that they are not read again at every start.

A manifest is a file of one row per image, sorted by a key of 64 bits, the hash of the file's path, size and time of
change. A file that was changed has another key. Files that cannot be read have no row: they are tried again.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL

from diffusion.io.files import atomic_write

# `whole`: decoded, not only its header read.
ROW = np.dtype([("key", "<u8"), ("height", "<i4"), ("width", "<i4"), ("grey", "?"), ("whole", "?")])
VERSION = 1  # of the format and of what is checked


def path_of(folder: str | os.PathLike, root: Path) -> Path:
    """The file in `folder` that is the manifest of the images below `root`, as this version of Pillow reads them."""
    digest = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:16]
    return Path(os.path.expanduser(folder), f"{digest}-{VERSION}-pillow-{PIL.__version__}.npy")


def keys(files: Sequence[Path]) -> np.ndarray:
    """The key of each file, uint64 [N]; 0 for one that is not there."""
    return np.array([_key(file) for file in files], np.uint64)


def _key(file: Path) -> int:
    try:
        status = os.stat(file)
    except OSError:
        return 0
    text = os.fsencode(f"{status.st_size} {status.st_mtime_ns} {os.path.abspath(file)}")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) or 1


def read(path: Path) -> np.ndarray:
    """The rows of a manifest [M] in the order of their keys; none if there is no file, or another one."""
    try:
        rows = np.load(path)
    except (OSError, ValueError, EOFError):
        return np.empty(0, ROW)
    whole = (
        isinstance(rows, np.ndarray)
        and rows.dtype == ROW
        and rows.ndim == 1
        and (rows["key"][1:] > rows["key"][:-1]).all()
    )
    return rows if whole else np.empty(0, ROW)


def find(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each key the number of its row, int [N]; -1 where there is none."""
    if not len(rows):
        return np.full(len(wanted), -1)
    at = np.minimum(np.searchsorted(rows["key"], wanted), len(rows) - 1)
    return np.where(rows["key"][at] == wanted, at, -1)


def add(rows: np.ndarray, new: np.ndarray, current: np.ndarray) -> np.ndarray:
    """`rows` and `new`, which replace those of the same key; only rows whose key is in `current`."""
    merged = np.concatenate([new, rows])
    _, first = np.unique(merged["key"], return_index=True)
    merged = merged[first]
    return merged[np.isin(merged["key"], current) & (merged["key"] != 0)]


def write(path: Path, rows: np.ndarray) -> None:
    """Writes a manifest; where nothing can be written, nothing is remembered."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: np.save(file, rows))
    except OSError:
        return
