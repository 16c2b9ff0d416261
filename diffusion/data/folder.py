"""`folder:PATH`: the images below a folder, their classes and their splits.

PNG, JPEG and WebP files are found in all sub-folders; names that begin with a dot are ignored. The first sub-folder
below PATH is the class; files directly in PATH have no label. If PATH contains "train" and one of "test", "val" or
"validation", these are the splits, and the classes are the folders below them. If not, with h the SHA-256 of the file's
path below PATH, as a fraction of its largest value,

    a file is in "test" when h <= 1/10, else in "train",                                           (1)

except that each split gets at least one file. Whether a file is held out does not depend on the other files. "all" is
both splits.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffusion.data import images
from diffusion.data.batches import Source, checked_source

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TEST_FOLDERS = ("test", "val", "validation")


def load(
    name: str, split: str, size: tuple[int, int] | None, crop: str, channels: int | None, memory_limit: int
) -> Source:
    """The images of a split of `name`, "folder:PATH"; `diffusion.data.load` documents the other arguments."""
    root = Path(name.removeprefix("folder:")).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{name}: there is no folder {root} (set by --config.data.name=folder:PATH)")
    files = _find(root)
    if not files:
        raise ValueError(f"{name} contains no {', '.join(SUFFIXES)} file, and neither do its sub-folders")
    tops = {file.parts[0] for file in files if len(file.parts) > 1}
    held_out = next((folder for folder in TEST_FOLDERS if folder in tops), None)
    if "train" in tops and held_out:
        files = [file for file in files if file.parts[0] in ("train", held_out)]
        below = [file.parts[1:] for file in files]
        part = [file.parts[0] for file in files]
        splits = {"train": ("train",), "test": (held_out,), "all": ("train", held_out), held_out: (held_out,)}
    else:
        below = [file.parts for file in files]
        part = _hashed_split(files)
        splits = {"train": ("train",), "test": ("test",), "all": ("train", "test")}
    class_names, classes = _classes(name, files, below)
    if split not in splits:
        raise ValueError(f"split={split!r} of {name} is not one of {tuple(splits)}")
    rows = [i for i, which in enumerate(part) if which in splits[split]]
    if not rows:
        raise ValueError(f"split={split!r} of {name} is empty: one image cannot be split; use split='train' or 'all'")

    if size is None or channels is None:  # found from all splits, so that they agree
        everything = _encoded(name, [root / file for file in files])
        headers = images.headers(everything)
        channels = channels or (1 if all(header.grey for header in headers) else 3)
        size = size or images.common_size(everything, headers)
    encoded = _encoded(name, [root / files[i] for i in rows])
    decoded = images.decode(encoded, size, crop, channels, memory_limit)
    if not isinstance(decoded, np.ndarray):
        images.verify(encoded)  # now, not in the middle of a training
    return checked_source(name, decoded, classes and [classes[i] for i in rows], class_names)


def _encoded(name: str, files: Sequence[Path]) -> images.Encoded:
    return images.Encoded(
        name, len(files), lambda ids: [files[i].read_bytes() for i in ids], lambda i: os.fspath(files[i])
    )


def _find(root: Path) -> list[Path]:
    """Image files below `root`, as sorted relative paths; links to folders are followed, each folder once."""
    files, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_raise):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        files += [
            Path(folder, f).relative_to(root) for f in names if f.lower().endswith(SUFFIXES) and not f.startswith(".")
        ]
    return sorted(files, key=lambda file: file.parts)


def _raise(error: OSError) -> None:
    raise error


def _hashed_split(files: Sequence[Path]) -> list[str]:
    """ "train" or "test" for each file, eq. (1)."""
    hashes = [int.from_bytes(hashlib.sha256(os.fsencode(file.as_posix())).digest()[:8]) for file in files]
    tenth, highest = max(2**64 // 10, min(hashes)), max(hashes)
    return ["test" if value <= tenth and value < highest else "train" for value in hashes]


def _classes(
    name: str, files: Sequence[Path], below: Sequence[tuple[str, ...]]
) -> tuple[tuple[str, ...], list[int] | None]:
    """Sorted names of the first folders, and the class of each file; ((), None) if all files are directly in PATH."""
    loose = [file for file, parts in zip(files, below, strict=True) if len(parts) == 1]
    if len(loose) == len(files):
        return (), None
    if loose:
        labelled = next(file for file, parts in zip(files, below, strict=True) if len(parts) > 1)
        raise ValueError(
            f"{name} mixes files with and without a class: {labelled} is in a sub-folder, {loose[0]} is not "
            f"({len(loose)} such files). Move them into sub-folders, one per class, or all into one folder"
        )
    class_names = tuple(sorted({parts[0] for parts in below}))
    number = {class_name: i for i, class_name in enumerate(class_names)}
    return class_names, [number[parts[0]] for parts in below]
