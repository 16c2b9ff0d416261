"""TFDS data sets, with and without TensorFlow, prepared or not, online or not."""

import http.server
import importlib.util
import io
import json
import os
import socket
import struct
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from diffusion import data
from diffusion.data import mnist5k
from diffusion.data import tfds as module


def coloured(value, size=(6, 6)):
    return np.full((*size, 3), value, np.uint8)


def corrupt(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def png(array):
    content = io.BytesIO()
    Image.fromarray(array).save(content, "png")
    return content.getvalue()


class ToyImages(tfds.core.GeneratorBasedBuilder):
    """Twenty images of two sizes, and features that are not read."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "mask": tfds.features.Image(shape=(None, None, 1)),
                    "label": tfds.features.ClassLabel(names=["odd", "even"]),
                    "file": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(20), "secret": self._generate_examples(3)}

    def _generate_examples(self, n):
        for i in range(n):
            yield (
                i,
                {
                    "image": png(coloured((i, 0, 0), (6, 6 + i // 10))),
                    "mask": b"",
                    "label": -1 if n == 3 else i % 2,
                    "file": f"{i}.png",
                },
            )


class ByHand(tfds.core.GeneratorBasedBuilder):
    """Needs a file that nobody put there."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put images.tar there."

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(4, 4, 1))})
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(dl_manager.manual_dir)}

    def _generate_examples(self, path):
        yield 0, {"image": path.read_bytes()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    with mnist5k.quiet():
        ToyImages(data_dir=os.fspath(path)).download_and_prepare(file_format="array_record")
    return path


def to_tfrecord(root: Path, target: Path) -> Path:
    """A copy of the toy data set in TFDS's default format, written without TensorFlow."""
    home, copy = root / "toy_images" / "1.0.0", target / "toy_images" / "1.0.0"
    copy.mkdir(parents=True)
    info = json.loads((home / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    (copy / "dataset_info.json").write_text(json.dumps(info))
    (copy / "features.json").write_bytes((home / "features.json").read_bytes())
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    for split in ("train", "secret"):
        records = ToyImages(data_dir=os.fspath(root)).as_data_source(split, deserialize_method=raw)
        parts = [struct.pack("<QI", len(record), 0) + record + bytes(4) for record in records]
        (copy / f"toy_images-{split}.tfrecord-00000-of-00001").write_bytes(b"".join(parts))
    return target


@pytest.fixture(params=["array_record", "tfrecord"])
def prepared(request, root, tmp_path):
    return root if request.param == "array_record" else to_tfrecord(root, tmp_path)


def test_a_prepared_data_set_is_read_without_tensorflow(prepared):
    source = data.load("toy_images", data_dir=prepared, size=6)
    assert source.class_names == ("odd", "even")
    assert source.images[:, 3, 3].tolist() == [[i, 0, 0] for i in range(20)]
    assert source.labels.tolist() == [i % 2 for i in range(20)]
    part = data.load("toy_images:1.0.0", "train[25%:50%]", data_dir=prepared, size=6)
    assert part.images[:, 0, 0, 0].tolist() == [5, 6, 7, 8, 9]


def test_labels_of_minus_one_are_no_labels(prepared):
    source = data.load("toy_images", "secret", data_dir=prepared)
    assert (source.num_classes, source.labels.tolist()) == (0, [0, 0, 0])


def test_sizes_of_tfds_images_must_agree_too(prepared):
    with pytest.raises(ValueError, match="image 0 of toy_images/train is 6x6, image 10 of .* is 6x7"):
        data.load("toy_images", data_dir=prepared)


def test_a_tfds_data_set_larger_than_the_memory_limit_has_the_same_images(prepared):
    whole = data.load("toy_images", "train[3:]", data_dir=prepared, size=6)
    lazy = data.load("toy_images", "train[3:]", data_dir=prepared, size=6, memory_limit=1)
    assert not isinstance(lazy.images, np.ndarray)
    np.testing.assert_array_equal(lazy.labels, whole.labels)
    np.testing.assert_array_equal(lazy.images[np.arange(17)], whole.images)


def test_an_incomplete_tfrecord_is_named(root, tmp_path):
    place = to_tfrecord(root, tmp_path)
    corrupt(next(place.glob("*/*/*-train.tfrecord*")))
    with pytest.raises(ValueError, match="ends within a record"):
        data.load("toy_images", data_dir=place, size=6)


def test_a_damaged_dataset_info_is_named(root, tmp_path):
    place = to_tfrecord(root, tmp_path)
    corrupt(next(place.glob("*/*/dataset_info.json")))
    with pytest.raises(ValueError, match="TFDS cannot open toy_images"):
        data.load("toy_images", data_dir=place, size=6)


def test_a_missing_file_is_named(root, tmp_path):
    place = to_tfrecord(root, tmp_path)
    next(place.glob("*/*/*-train.tfrecord*")).unlink()
    with pytest.raises(FileNotFoundError, match="train.tfrecord.* is missing"):
        data.load("toy_images", data_dir=place, size=6)


@pytest.mark.parametrize("split", ["dev", "train[abc]", "train[:0]"])
def test_an_unknown_split_is_an_error(root, split):
    with pytest.raises(ValueError, match="split='.*train"):
        data.load("toy_images", split, data_dir=root, size=6)


@pytest.fixture
def tensorflow(monkeypatch):
    """Makes the library believe that TensorFlow is installed, or not."""
    find_spec = importlib.util.find_spec

    def set_installed(installed):
        answer = types.SimpleNamespace() if installed else None
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: answer if name == "tensorflow" else find_spec(name, *rest),
        )

    return set_installed


@pytest.fixture
def network(monkeypatch):
    def set_trouble(trouble):
        monkeypatch.setattr(module, "_unreachable", lambda url: trouble)

    return set_trouble


def test_without_tensorflow_the_commands_are_given(tmp_path, tensorflow, network, caplog):
    tensorflow(False)
    network("never asked")
    with pytest.raises(FileNotFoundError) as error:
        data.load("cifar10", data_dir=tmp_path)
    for part in (
        "pip install tensorflow-cpu",
        "tfds build cifar10 --file_format=array_record",
        str(tmp_path),
        "mnist5k",
    ):
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match="by hand, into .*: Put images.tar there"):
        data.load("by_hand", data_dir=tmp_path)
    assert not caplog.records  # nothing is logged besides the error


def test_without_a_network_it_says_so(tmp_path, tensorflow, network):
    tensorflow(True)
    network("example.org does not answer")
    with pytest.raises(ConnectionError, match="cifar10 is not prepared in .*: example.org does not answer.*mnist5k"):
        data.load("cifar10", data_dir=tmp_path)


def test_with_both_it_prepares_and_reads(tmp_path, tensorflow, network):
    tensorflow(True)
    network(None)
    assert data.load("toy_images", data_dir=tmp_path, size=6).images.shape == (20, 6, 6, 3)
    tensorflow(False)
    assert data.load("toy_images", data_dir=tmp_path, size=6).images.shape == (20, 6, 6, 3)


def test_files_to_be_fetched_by_hand_are_explained(tmp_path, tensorflow, network):
    tensorflow(True)
    network(None)
    with pytest.raises(FileNotFoundError, match="(?s)downloaded by hand.*Put images.tar there"):
        data.load("by_hand", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar11", "no data set named 'cifar11'.*nearest names: .*cifar10.*folder:PATH"),
        ("mnist5", "nearest names: .*mnist5k"),
        ("mnist:9.9.9", "TFDS cannot open mnist:9.9.9.*9.9.9"),
        ("mnist5k:9.9.9", "TFDS cannot open mnist5k:9.9.9.*only: 1.0.0"),
        ("ag_news_subset", "must have one image .*title"),
        ("huggingface:mnist", "community data set .*'huggingface'.*folder:PATH"),
        ("no such name", "'no such name'"),
    ],
)
def test_names_that_cannot_be_read(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        data.load(name, data_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_names_the_default_folder(root, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", os.fspath(root))
    assert len(data.load("toy_images", size=6).images) == 20


class Refusing(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_error(403)

    def log_message(self, *arguments):
        pass


def test_any_answer_of_a_server_means_there_is_a_network(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert module._unreachable(f"http://127.0.0.1:{server.server_port}/file") is None
        thread.join()


def test_a_closed_port_and_a_silent_server_are_no_network(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert "127.0.0.1" in module._unreachable(url, seconds=0.2)
    assert "127.0.0.1 does not answer" in module._unreachable(url)
