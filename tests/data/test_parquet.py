"""Images in Parquet files, in the form in which the Hugging Face Hub has them."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from diffusion import data

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ["cat", "dog", "cow"]


def png(value, size=(6, 4), channels=3):
    file = io.BytesIO()
    Image.fromarray(np.full((*size, channels), value, np.uint8).squeeze()).save(file, "png")
    return file.getvalue()


def write(path, values, labels=None, *, column="image", names=True, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {column: [{"bytes": png(value, **options), "path": None} for value in values]}
    columns |= {} if labels is None else {"label": pa.array(labels, pa.int64())}
    table = pa.table(columns)
    features = {"label": {"names": NAMES, "_type": "ClassLabel"}}
    if names:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=2)


def load(path, split="train", **options):
    return data.load(f"datasets:{path}", split, **options)


def first(source):
    return source.images[:][:, 0, 0, 0].tolist()


@pytest.mark.parametrize("limit", [1 << 30, 1])
def test_files_are_read_in_order_with_their_splits_and_class_names(tmp_path, limit):
    write(tmp_path / "data" / "train-00000-of-00002.parquet", range(5), [0, 1, 2, 0, 1])
    write(tmp_path / "data" / "train-00001-of-00002.parquet", range(5, 8), [2, 0, 1])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", range(100, 103), [2, 2, 0])
    train, test = (load(tmp_path, split, memory_limit=limit) for split in ("train", "test"))
    assert first(train) == [*range(8)] and train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert first(test) == [100, 101, 102] and test.labels.tolist() == [2, 2, 0]
    assert train.class_names == test.class_names == tuple(NAMES)
    assert (train.images.shape, train.dtype) == ((8, 6, 4, 3), np.uint8)
    assert train.opened.splits == (("train", 8), ("test", 3))
    assert train.images[[6, 2]][:, 0, 0, 0].tolist() == [6, 2]
    assert first(load(tmp_path, "all")) == [*range(8), 100, 101, 102]


def test_without_a_held_out_split_a_tenth_of_the_rows_is_one(tmp_path):
    write(tmp_path / "default" / "train" / "0000.parquet", range(200), channels=1, column="picture", names=False)
    train, test = load(tmp_path), load(tmp_path, "test")
    assert sorted([*first(train), *first(test)]) == [*range(200)] and 8 < len(test.images) < 35
    assert train.images.shape[-1] == 1 and train.num_classes == 0
    write(tmp_path / "default" / "validation" / "0000.parquet", [7, 8], channels=1, column="picture", names=False)
    assert first(load(tmp_path)) == [*range(200)] and first(load(tmp_path, "test")) == [7, 8]


def test_labels_without_names_are_numbered_and_hidden_ones_are_none(tmp_path):
    write(tmp_path / "train.parquet", range(3), [0, 3, 1], names=False)
    write(tmp_path / "test.parquet", range(3), [-1, -1, -1], names=False)
    assert load(tmp_path).class_names == ("0", "1", "2", "3")
    assert load(tmp_path, "test").num_classes == 0


def test_without_pyarrow_its_installation_is_named(tmp_path, monkeypatch):
    write(tmp_path / "train.parquet", range(3))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[parquet\]'"):
        load(tmp_path)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match=r"contains no \.parquet file; .*hf download NAME"):
        load(tmp_path)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"needs a column image or img .* it has \['text'\]"):
        load(tmp_path)
    write(tmp_path / "train.parquet", range(3), [0, 1, 2])
    with pytest.raises(ValueError, match="split='val' of datasets"):
        load(tmp_path, "val")
    write(tmp_path / "test.parquet", range(3))
    with pytest.raises(ValueError, match=r"test\.parquet has no column 'label', as train\.parquet has; it has \['ima"):
        load(tmp_path)
    write(tmp_path / "test.parquet", range(3), [0, None, 1])
    with pytest.raises(ValueError, match=r"test\.parquet has 1 rows without a 'label'"):
        load(tmp_path)
    (tmp_path / "test.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"test\.parquet cannot be read: .*; download it again"):
        load(tmp_path)
    pq.write_table(pa.table({"image": [png(1), b"none"], "label": [0, 1]}), tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=r"cannot read 1 of 5 images .*row 1 of .*test\.parquet \(not an image"):
        load(tmp_path, "all")
