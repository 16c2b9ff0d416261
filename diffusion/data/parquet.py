"""`datasets:PATH`: images in Parquet files, as the data sets of the Hugging Face Hub are stored.

All files `.parquet` below the folder are read, such as `data/train-00000-of-00002.parquet` and
`default/train/0000.parquet`. The split of a file is the part of its name before the first "-", or a folder on its path,
if that is one of `layout.ROLES`; otherwise "train". Without a held-out split the rows are split by `layout`, eq. (1),
with their numbers as paths.

A row has an image, encoded bytes or {bytes, path}, in the column "image" or "img", or else the only such column; its
label is an integer in "label" or "labels", whose names are those that the package `datasets` wrote into the schema. The
files are read with pyarrow, and the encoded images stay in memory.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.data import images, layout
from diffusion.data.batches import Opened, Source, checked_source

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels")
ROLES = ("train", "validation", "test")


def load(
    name: str,
    split: str,
    size: tuple[int, int] | None,
    crop: str,
    channels: int | None,
    memory_limit: int,
    progress: images.Progress | None,
) -> Source:
    """The images of a split of `name`, "datasets:PATH"; `diffusion.data.load` documents the other arguments."""
    files, roles_of_files = _files(name)
    schemas = [_opened(file, "read_schema") for file in files]
    image, label = _columns(name, schemas[0])
    wanted = [image] if label is None else [image, label]
    for file, schema in zip(files, schemas, strict=True):
        if missing := sorted(set(wanted) - set(schema.names)):
            raise ValueError(f"{file} has no column {missing[0]!r}, as {files[0].name} has; it has {schema.names}")
    tables = [_opened(file, "read_table", columns=wanted, partitioning=None) for file in files]
    roles = of_files = np.repeat(roles_of_files, [table.num_rows for table in tables])
    columns = [_encoded_images(table.column(image)) for table in tables]
    starts = np.cumsum([0, *map(len, columns)])
    if set(roles) != {"train"}:
        splits = layout.folder_splits({str(role): str(role) for role in np.unique(roles)})
    else:
        roles = np.array(layout.hashed_split([(str(i),) for i in range(len(roles))]))
        splits = {"train": ("train",), "test": ("test",), "all": ("train", "test")}
    parts = splits.get(split)
    if parts is None or not np.isin(roles, parts).any():
        raise ValueError(f"split={split!r} of {name} is not one of {tuple(splits)}, or has no rows")

    def encoded(rows: np.ndarray) -> images.Encoded:
        def place(i: int) -> tuple[int, int]:
            at = int(np.searchsorted(starts, rows[i], "right")) - 1
            return at, int(rows[i] - starts[at])

        def read(ids: Sequence[int]) -> list[bytes]:
            return [columns[at][row].as_py() or b"" for at, row in map(place, ids)]

        def described(i: int) -> str:
            at, row = place(i)
            return f"row {row} of {files[at]}"

        return images.Encoded(name, len(rows), read, described)

    if size is None or channels is None:  # found from all splits, so that they agree
        everything = encoded(np.arange(len(roles)))
        headers = images.headers(everything)
        channels = channels or (1 if all(header.grey for header in headers) else 3)
        size = size or images.common_size(everything, headers)
    rows = np.flatnonzero(np.isin(roles, parts))
    chosen = encoded(rows)
    decoded = images.decode(chosen, size, crop, channels, memory_limit, progress)
    counts = tuple((role, int((roles == role).sum())) for role in ROLES if role in roles)
    opened = Opened(split, counts, notes=images.notes(chosen, size, crop))
    if label is None:
        return checked_source(name, decoded, None, (), opened)
    labels = np.concatenate([_labels(table, file, label) for table, file in zip(tables, files, strict=True)])
    if (labels[rows] == -1).all():  # a test split whose labels were not published
        return checked_source(name, decoded, None, (), opened)
    most = int(labels[of_files == of_files[0]].max())  # of training, if there is such a split
    names = _class_names(schemas[0], label) or tuple(map(str, range(most + 1)))
    return checked_source(name, decoded, labels[rows], names, opened)


def _files(name: str) -> tuple[list[Path], list[str]]:
    """The files of a data set and their splits, those of training first."""
    given = name.removeprefix("datasets:")
    root = Path(os.path.expanduser(given))
    if not given.strip() or not root.is_dir():
        raise FileNotFoundError(f"{name}: there is no folder {given!r} (set by --config.data.name=datasets:PATH)")
    files = sorted(path for path in root.rglob("*.parquet") if not path.name.startswith("."))
    if not files:
        raise ValueError(
            f"{name} contains no .parquet file; a data set of the Hub is downloaded with "
            "`hf download NAME --repo-type=dataset --local-dir=PATH`"
        )
    roles = {file: _role(file.relative_to(root)) for file in files}
    files = sorted(files, key=lambda file: (ROLES.index(roles[file]), file))
    return files, [roles[file] for file in files]


def _opened(path: Path, function: str, **options: Any) -> Any:
    """pyarrow.parquet's function of a file."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ModuleNotFoundError(
            "Parquet files are read with pyarrow, which is not installed: `pip install -e '.[parquet]'`"
        ) from None
    try:
        return getattr(parquet, function)(path, **options)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {images.reason(error)}; download it again") from error


def _role(path: Path) -> str:
    """The split that a file belongs to."""
    found = [layout.ROLES.get(part.casefold()) for part in (path.name.split("-")[0].split(".")[0], *path.parts[:-1])]
    return next((role for role in found if role), "train")


def _columns(name: str, schema: Any) -> tuple[str, str | None]:
    """The columns of images and of labels."""
    from pyarrow import types

    def is_image(field: Any) -> bool:
        if types.is_struct(field.type):
            return field.type.get_field_index("bytes") >= 0
        return types.is_binary(field.type) or types.is_large_binary(field.type)

    found = [field.name for field in schema if is_image(field)]
    named = [column for column in IMAGE_COLUMNS if column in found] or (found if len(found) == 1 else [])
    if not named:
        raise ValueError(f"{name} needs a column {' or '.join(IMAGE_COLUMNS)} of encoded images; it has {schema.names}")
    integer = [field.name for field in schema if types.is_integer(field.type)]
    return named[0], next((column for column in LABEL_COLUMNS if column in integer), None)


def _encoded_images(column: Any) -> Any:
    """A column of bytes, or the bytes of {bytes, path}."""
    from pyarrow import compute, types

    return compute.struct_field(column, "bytes") if types.is_struct(column.type) else column


def _labels(table: Any, path: Path, column: str) -> np.ndarray:
    found = table.column(column)
    if found.null_count:
        raise ValueError(f"{path} has {found.null_count} rows without a {column!r}: pass a data set that has them all")
    return found.to_numpy().astype(np.int64)


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    """The names of the classes, as `datasets` stores them in the schema; () without."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(layout.nfc(str(each)) for each in features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()
