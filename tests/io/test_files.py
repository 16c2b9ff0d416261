"""Atomic writes; errors that name a directory that is not writable."""

import errno
from pathlib import Path

import numpy as np
import pytest

from diffusion.io.files import atomic_write, check_writable


def test_check_writable_creates_the_directory_and_nothing_else(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "b"]


def test_check_writable_names_a_file_of_that_name(tmp_path):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=f"cannot write in {path} .*; pass a writable directory"):
            check_writable(path)
    assert (tmp_path / "file").read_text() == "kept"


def test_check_writable_names_a_read_only_disk(tmp_path, monkeypatch):
    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(OSError, match=f"cannot write in {tmp_path} .*Read-only file system") as error:
        check_writable(tmp_path)
    assert error.value.errno == errno.EROFS


def test_atomic_write_is_all_or_nothing(tmp_path):
    path = tmp_path / "samples.npz"
    atomic_write(path, lambda file: np.savez(file, np.arange(3)))

    def stops_half_way(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, stops_half_way)
    assert np.load(path)["arr_0"].tolist() == [0, 1, 2]
    with path.open("rb") as reader:  # a reader that opened the old file still reads the whole old file
        atomic_write(path, lambda file: file.write(b"new"))
        assert np.load(reader)["arr_0"].tolist() == [0, 1, 2]
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
