"""Atomic writes, and a check that a directory is writable before work starts."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def check_writable(directory: str | os.PathLike) -> None:
    """Creates `directory` and checks that it is writable, by writing a file and removing it.

    Raises:
      OSError: it is not (read-only or full disk, no permission, a file of that name).
    """
    directory = Path(directory)
    probe = directory / f".writable.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        atomic_write(probe, lambda file: file.write(b"\0" * 4096))
        probe.unlink()
    except OSError as e:
        raise OSError(
            e.errno, f"cannot write in {directory} ({type(e).__name__}: {e}); pass a writable directory"
        ) from e


def atomic_write(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write(file)` on a temporary file next to `path` and renames it: `path` is never partly written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
