"""`array:PATH`: arrays [N, *S, C] of a file `.npy` or `.npz`, or of a folder that has one for each split.

    images.npy                                arrays, and beside it images_labels.npy, if there are labels
    images.npz                                images, x or arr_0; optionally labels, y or arr_1, and class_names
    folder/train.npy, folder/test.npy         or .npz, with the names of `layout.ROLES`; labels as above

A file alone is split by `layout`, eq. (1), with the number of an array, "0", "1", ..., as its path: a tenth is in
"test", and of more than some dozens, arrays that are appended later do not change the split of the others.

Arrays stay on disk, and those of a batch are read when it is needed. A compressed member of a `.npz`, which `savez`
does not write and `savez_compressed` does, has to be read as a whole, once in a process. Values are those of the file,
in its own type. Unless they are uint8 in 0 .. 255, all of them are read once in a process, when the file is opened, and
checked to lie within the stated range.
"""

import functools
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion.data import layout, values
from diffusion.data.batches import Opened, Source, checked_source
from diffusion.data.images import Progress

SUFFIXES = (".npy", ".npz")
LABELS = "_labels"  # after the name of a .npy
IMAGE_KEYS, LABEL_KEYS, NAMES_KEY = ("images", "x", "arr_0"), ("labels", "y", "arr_1"), "class_names"
# Arrays that tell the type and, in messages, the extent of the values; and bytes that are read at once to check all.
SAMPLE_ARRAYS, SAMPLE_BYTES = 64, 64 << 20


class File(NamedTuple):
    """The arrays of one file: images [N, *S, C], labels [N] and names of classes, where it has them."""

    path: Path
    images: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...]
    notes: tuple[str, ...]


class Mapped:
    """Arrays of one or several files, read when indexed: `arrays[indices]` is [B, *S, C], as for an array."""

    def __init__(self, arrays: Sequence[np.ndarray], rows: np.ndarray):
        self.shape = (len(rows), *arrays[0].shape[1:])
        self.dtype = arrays[0].dtype.newbyteorder("=")
        self._arrays, self._rows = arrays, rows
        self._starts = np.cumsum([0, *map(len, arrays)])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Any) -> np.ndarray:
        picked = self._rows[indices]
        found = np.empty((picked.size, *self.shape[1:]), self.dtype)
        which = np.searchsorted(self._starts, picked.ravel(), "right") - 1
        for i, array in enumerate(self._arrays):
            here = which == i
            if here.any():
                found[here] = array[picked.ravel()[here] - self._starts[i]]
        return found.reshape(*picked.shape, *self.shape[1:])


def load(
    name: str,
    split: str,
    size: tuple[int, int] | None,
    channels: int | None,
    value_range: Sequence[float] | None,
    progress: Progress | None = None,
) -> Source:
    """The arrays of a split of `name`, "array:PATH"; `diffusion.data.load` documents the other arguments."""
    path = _path(name)
    by_role = _folder(name, path) if path.is_dir() else {"": _read(name, path)}
    files = list(by_role.values())
    for file in files:
        values.check_shape(f"the arrays of {file.path}", file.images.shape, channels, "--config.data.channels")
    counts = {role: len(file.images) for role, file in by_role.items()}
    if path.is_dir():
        part = np.repeat(list(counts), list(counts.values()))
        splits = layout.folder_splits({file.path.stem: role for role, file in by_role.items()})
    else:
        part = np.array(layout.hashed_split([(str(i),) for i in range(counts[""])]))
        splits = {"train": ("train",), "test": ("test",), "all": ("train", "test")}
    parts = splits.get(split) or splits.get(split.casefold())
    if parts is None:
        raise ValueError(f"split={split!r} of {name} is not one of {tuple(splits)}")
    rows = np.flatnonzero(np.isin(part, parts))
    if not len(rows):
        raise ValueError(f"split={split!r} of {name} is empty: one array cannot be split; use split='train' or 'all'")
    first = files[0].images
    for file in files:
        if (file.images.shape[1:], file.images.dtype) != (first.shape[1:], first.dtype):
            raise ValueError(
                f"{name}: {files[0].path.name} has {first.dtype} {first.shape} and {file.path.name} "
                f"{file.images.dtype} {file.images.shape}; all splits must have one type and one shape"
            )
    if size is not None and size != first.shape[1:-1]:
        raise ValueError(
            f"--config.data.size={size}: the arrays of {name} have shape {first.shape[1:]}, and are read as they are; "
            "leave it out, or save them in that size"
        )
    sample = np.concatenate([_sample(file.images) for file in files])
    stated = values.checked_range(f"the arrays of {name}", sample, value_range, values.FLAG)
    _check_values(f"the arrays of {name}", files, stated, progress)
    labels, class_names = _labels(name, files)
    opened = Opened(
        split=split,
        splits=tuple((each, int((part == each).sum())) for each in ("train", "validation", "test") if each in part),
        notes=(
            *dict.fromkeys(note for file in files for note in file.notes),
            *values.span_notes(sample, stated, values.FLAG),
        ),
    )
    images = Mapped([file.images for file in files], rows)
    source = checked_source(name, images, None if labels is None else labels[rows], class_names, opened)
    return source._replace(value_range=stated)


def _path(name: str) -> Path:
    given = name.removeprefix("array:")
    if not given.strip():
        raise ValueError(f"--config.data.name={name} names no file: pass array:PATH, as in array:images.npy")
    path = Path(os.path.expanduser(given))
    if not path.exists():
        raise FileNotFoundError(f"{name}: there is no file {path} (set by --config.data.name=array:PATH)")
    if not path.is_dir() and path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{name}: {path.name} must be a .npy or .npz file, or a folder with train.npy and test.npy")
    return path


def _folder(name: str, path: Path) -> dict[str, File]:
    """The files of the splits in a folder, by the role of the split."""
    found: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        role = layout.ROLES.get(file.stem.casefold()) if file.suffix.lower() in SUFFIXES else None
        if role in found:
            raise ValueError(f"{name} has two files for one split, {found[role].name} and {file.name}; keep one")
        if role:
            found[role] = file
    if "train" not in found or len(found) < 2:
        raise ValueError(
            f"{name} must hold train.npy (or .npz) and test.npy or val.npy, but has "
            f"{layout.listed(file.name for file in found.values()) or 'none of them'}; a single file is "
            "--config.data.name=array:FILE"
        )
    return {role: _read(name, found[role]) for role in ("train", "validation", "test") if role in found}


def _read(name: str, path: Path) -> File:
    try:
        if path.suffix.lower() == ".npz":
            return _read_npz(path)
        beside = path.with_name(f"{path.stem}{LABELS}.npy")
        labels = np.load(beside, allow_pickle=False) if beside.exists() else None
        return File(path, np.load(path, mmap_mode="r", allow_pickle=False), labels, (), ())
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        if "allow_pickle" in reason or "objects in dtype" in reason:  # with and without a map to memory
            reason = "it holds objects of Python; save numbers, as in np.asarray(labels.tolist())"
        raise ValueError(f"{name}: {path} cannot be read: {reason}") from error


def _read_npz(path: Path) -> File:
    with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as arrays:
        found = {role: [key for key in keys if key in arrays.files] for role, keys in _ROLES.items()}
        if not found["images"]:
            raise ValueError(
                f"it holds {layout.listed(arrays.files)}; save the images as {' or '.join(IMAGE_KEYS)}, and labels as "
                f"{' or '.join(LABEL_KEYS)}"
            )
        key = found["images"][0]
        images, notes = _mapped(path, archive, key), ()
        if images is None:
            images = _inflated(path, key, _state(path))
            notes = (
                f"{path.name} is compressed, and read as a whole ({images.nbytes / 1e6:,.0f} MB); np.savez is not",
            )
        labels = arrays[found["labels"][0]] if found["labels"] else None
        names = arrays[NAMES_KEY].ravel().tolist() if NAMES_KEY in arrays.files else []
    names = [layout.nfc(each.decode() if isinstance(each, bytes) else str(each)) for each in names]
    return File(path, images, labels, tuple(names), notes)


_ROLES: Mapping[str, tuple[str, ...]] = {"images": IMAGE_KEYS, "labels": LABEL_KEYS}


def _mapped(path: Path, archive: zipfile.ZipFile, key: str) -> np.ndarray | None:
    """A member that is stored as it is, mapped to memory; None for one that is compressed."""
    member = archive.getinfo(f"{key}.npy" if f"{key}.npy" in archive.namelist() else key)
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        return None
    with archive.open(member) as file:  # positioned by the member's own header in the file
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            return None
        shape, fortran, dtype = read(file)
        header = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{key} holds objects of Python; save numbers, as in np.stack(images)")
    if not np.prod(shape, dtype=object):
        return np.empty(shape, dtype)  # nothing can be mapped
    with path.open("rb") as file:
        file.seek(member.header_offset)
        local = file.read(30)
    # The lengths of the name and of the extra field, which may differ from those in the archive's table.
    begin = member.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    return np.memmap(path, dtype, "r", begin + header, shape, "F" if fortran else "C")


def _state(path: Path) -> tuple[int, int]:
    """What changes when a file is written again: its time in nanoseconds, and its size."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=2)  # a run opens a file once for each of its splits: training and held-out
def _inflated(path: Path, key: str, state: tuple[int, int]) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
        images = arrays[key]
    images.flags.writeable = False  # shared by all sources of this file
    return images


_CHECKED: set[tuple[Any, ...]] = set()  # files and ranges whose values were found to fit


def _check_values(
    owner: str, files: Sequence[File], value_range: tuple[float, float], progress: Progress | None
) -> None:
    """Raises ValueError if some value of some file lies outside the range, or is NaN."""
    if values.is_plain(files[0].images.dtype, value_range):
        return
    new = [(file.images, (file.path, *_state(file.path), value_range)) for file in files]
    new = [each for each in new if each[1] not in _CHECKED]
    done, total = 0, sum(len(images) for images, _ in new)
    for images, identity in new:
        at_once = max(SAMPLE_BYTES // max(images[0].nbytes, 1), 1)
        for i in range(0, len(images), at_once):
            block = images[i : i + at_once]
            values.check_values(owner, block, value_range, values.FLAG)
            done += len(block)
            if progress:
                progress("checking values", done, total)
        _CHECKED.add(identity)


def _sample(images: np.ndarray) -> np.ndarray:
    """Some of the arrays, evenly chosen."""
    most = max(min(len(images), SAMPLE_ARRAYS, SAMPLE_BYTES // max(images[0].nbytes, 1)), 1)
    picked = images[np.unique(np.linspace(0, len(images) - 1, most).astype(int))]
    return picked.astype(images.dtype.newbyteorder("="), copy=False)


def _labels(name: str, files: Sequence[File]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels of all arrays, and the names of the classes, those of the first file: of training."""
    without = [file.path.name for file in files if file.labels is None]
    names = files[0].class_names
    if len(without) == len(files):
        if names:
            raise ValueError(f"{name} has class_names, but no labels: add {' or '.join(LABEL_KEYS)}, or leave both out")
        return None, ()
    if without:
        raise ValueError(f"{name}: {without[0]} has no labels, while others have: add them, or remove those")
    for file in files:
        labels = file.labels
        if labels.dtype.kind not in "iu":
            raise TypeError(f"labels of {file.path} must be integers, not {labels.dtype}")
        if labels.shape != (len(file.images),):
            raise ValueError(
                f"labels of {file.path} have shape {labels.shape}, but there are {len(file.images)} arrays: expected "
                f"({len(file.images)},)"
            )
        if names and file.class_names not in ((), names):
            raise ValueError(f"{name}: {file.path.name} has other class_names than {files[0].path.name}")
    most = int(files[0].labels.max())
    return np.concatenate([file.labels.astype(np.int64) for file in files]), names or tuple(map(str, range(most + 1)))
