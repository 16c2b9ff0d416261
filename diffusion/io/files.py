"""Files that are whole or not there, and directories proven writable before work starts."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def check_writable(directory: str | os.PathLike) -> None:
    """Creates `directory` and proves, by writing a file and removing it, that results can be kept there.

    Raises:
      OSError: they cannot (read-only or full disk, no permission, a file in the way).
    """
    directory = Path(directory)
    probe = directory / f".writable.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        atomic_write(probe, lambda file: file.write(b"\0" * 4096))
        probe.unlink()
    except OSError as e:
        raise OSError(
            e.errno, f"cannot write in {directory} ({type(e).__name__}: {e}); pass a directory that can be written"
        ) from e


def atomic_write(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write(file)` on a temporary neighbour of `path` and renames it: `path` is whole, new or as it was."""
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
