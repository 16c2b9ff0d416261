"""`folder:PATH`: the images below a folder; `diffusion.data.layout` says which split and class they have.

Every file whose suffix Pillow knows as that of an image is found, in all sub-folders; names that begin with a dot are
ignored. Links are followed, but for a folder that contains itself.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion.data import images, layout, manifest
from diffusion.data.batches import Opened, Source, checked_source
from diffusion.data.layout import Parts

COMMON = (".png", ".jpg", ".jpeg", ".webp")
# With bad_files="skip", one image of so many may be skipped, and one in any case.
ONE_OF = 20


class Options(NamedTuple):
    """How a folder is read; `diffusion.data.load` explains all of it."""

    class_names_in: str = "folders"
    bad_files: str = "raise"
    cache_dir: str | os.PathLike | None = None
    progress: images.Progress | None = None


def load(
    name: str,
    split: str,
    size: tuple[int, int] | None,
    crop: str,
    channels: int | None,
    memory_limit: int,
    options: Options,
) -> Source:
    """The images of a split of `name`, "folder:PATH"; `diffusion.data.load` documents the other arguments."""
    root = _root(name)
    files, passed = find(root)
    if not files:
        found = f"; there are {_counts(passed)}" if passed else ""
        raise ValueError(
            f"{name} contains no {', '.join(COMMON)} file or other image that Pillow reads, and neither do its "
            f"sub-folders{found}"
        )
    laid = layout.layout(name, files, lambda path: _text(root, path), options.class_names_in)
    parts = laid.splits.get(split) or laid.splits.get(split.casefold())
    if parts is None:
        raise ValueError(f"split={split!r} of {name} is not one of {tuple(laid.splits)}")
    rows = np.flatnonzero(np.isin(laid.part, parts))
    if not len(rows):
        raise ValueError(f"split={split!r} of {name} is empty: one image cannot be split; use split='train' or 'all'")
    if laid.classes is not None and (laid.classes[rows] < 0).any():
        raise ValueError(
            f"split={split!r} of {name} has images without labels, while training has {len(laid.class_names)} classes; "
            f"pass another split (--config.data.held_out) or {layout.NO_CLASSES}"
        )

    paths = [root.joinpath(*file) for file in laid.files]
    everything, skip, bad = _encoded(name, paths), options.bad_files == "skip", []
    if size is None or channels is None:  # found from all splits, so that they agree
        headers, bad = _inspected(root, everything, paths, range(len(paths)), skip, options)
        _refuse(everything, bad, len(paths), skip)
        present = [i for i, header in enumerate(headers) if header is not None]
        headers = [headers[i] for i in present]
        channels = channels or (1 if all(header.grey for header in headers) else 3)
        size = size or images.common_size(_encoded(name, [paths[i] for i in present]), headers)
    elif skip:
        _, bad = _inspected(root, everything, paths, rows.tolist(), True, options)
        _refuse(everything, bad, len(rows), skip)
    counts = Counter(laid.part) - Counter(laid.part[each.index] for each in bad)
    bad = [each for each in bad if laid.part[each.index] in parts]
    rows = np.setdiff1d(rows, [each.index for each in bad])
    encoded = _encoded(name, [paths[i] for i in rows])
    decoded = images.decode(encoded, size, crop, channels, memory_limit, options.progress)
    if not isinstance(decoded, np.ndarray) and not skip:  # now, not in the middle of a training
        _refuse(everything, _inspected(root, everything, paths, rows.tolist(), True, options)[1], len(rows), skip)
    opened = Opened(
        split=split,
        splits=tuple((part, counts[part]) for part in ("train", "validation", "test") if counts[part]),
        passed_over=tuple(passed),
        skipped=tuple(images.described(everything, bad)),
        notes=(*laid.notes, *images.notes(encoded, size, crop)),
    )
    return checked_source(name, decoded, None if laid.classes is None else laid.classes[rows], laid.class_names, opened)


def find(root: Path) -> tuple[list[Parts], list[tuple[str, int]]]:
    """The images below `root`, as sorted paths, and how many other files there are of each suffix, the most first."""
    found, passed = [], Counter()
    for file in _walk(root, (), ()):
        suffix = os.path.splitext(file[-1])[1].lower()
        if suffix in images.suffixes():
            found.append(file)
        else:
            passed[suffix or "without a suffix"] += 1
    return sorted(found), passed.most_common()


def _walk(root: Path, below: Parts, above: tuple[tuple[int, int], ...]) -> Iterator[Parts]:
    """The files in a folder and its sub-folders; `above` identifies the folders that lead to it."""
    folder = root.joinpath(*below)
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a folder that contains it
        return
    with os.scandir(folder) as entries:
        entries = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in entries:
        if _is_folder(entry):
            yield from _walk(root, (*below, entry.name), (*above, here))
        else:
            yield (*below, entry.name)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _root(name: str) -> Path:
    given = name.removeprefix("folder:")
    if not given.strip():
        raise ValueError(
            f"--config.data.name={name} names no folder: pass folder:PATH (a shell variable in it may not be set)"
        )
    root = Path(os.path.expanduser(given))
    if not root.is_dir():
        raise FileNotFoundError(f"{name}: there is no folder {root} (set by --config.data.name=folder:PATH)")
    return root


def _text(root: Path, path: Parts) -> str | None:
    """The text of a file, without a byte order mark; None if there is no such file."""
    file = root.joinpath(*path)
    return file.read_text(encoding="utf-8-sig") if file.is_file() else None


def _encoded(name: str, files: Sequence[Path]) -> images.Encoded:
    return images.Encoded(
        name,
        len(files),
        lambda ids: [files[i].read_bytes() for i in ids],
        lambda i: os.fspath(files[i]),
        "Repair or remove them, or pass --config.data.bad_files=skip",
    )


def _inspected(
    root: Path, encoded: images.Encoded, paths: Sequence[Path], ids: Sequence[int], whole: bool, options: Options
) -> tuple[list[images.Header | None], list[images.Bad]]:
    """`images.inspect` of the images `ids`, which reads only files that the manifest does not know."""
    if options.cache_dir is None:
        return images.inspect(encoded, ids, whole=whole, progress=options.progress)
    store = manifest.path_of(options.cache_dir, root)
    rows, keys = manifest.read(store), manifest.keys(paths)
    at = manifest.find(rows, keys[ids])
    known = (at >= 0) & (rows["whole"][at] | (not whole)) if len(rows) else np.zeros(len(ids), bool)
    unknown = np.flatnonzero(~known)
    found, bad = images.inspect(encoded, [ids[i] for i in unknown], whole=whole, progress=options.progress)
    headers = [images.Header(*rows[["height", "width", "grey"]][j].tolist()) if j >= 0 else None for j in at.tolist()]
    for i, header in zip(unknown.tolist(), found, strict=True):
        headers[i] = header
    new = [(keys[ids[i]], *header, whole) for i, header in zip(unknown, found, strict=True) if header is not None]
    if new:
        manifest.write(store, manifest.add(rows, np.array(new, manifest.ROW), keys))
    return headers, bad


def _refuse(encoded: images.Encoded, bad: Sequence[images.Bad], n: int, skip: bool) -> None:
    """Raises ValueError for images that cannot be read, where more are bad than may be skipped."""
    if not skip:
        images.refuse(encoded, bad, n)
    elif len(bad) > max(1, n // ONE_OF):
        images.refuse(encoded, bad, n, f"--config.data.bad_files=skip skips one image of {ONE_OF}, at most")


def _counts(passed: Sequence[tuple[str, int]]) -> str:
    return layout.listed(f"{count:,} {suffix}" for suffix, count in passed)
