"""Image data sets of TFDS, read from a folder where they were prepared once.

Reading needs neither TensorFlow nor a network, and nor does preparing our own `mnist5k`. TFDS prepares other data sets
with TensorFlow and a network; if one of these is missing, an error says so within seconds, before TFDS retries for
minutes. Records are read by random access in both formats of TFDS: array_record, and its default, tfrecord.
"""

import difflib
import importlib.util
import os
import queue
import struct
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from diffusion.data import images, mnist5k
from diffusion.data.batches import Opened, Source, checked_source

Reader = Callable[[Sequence[int]], list[bytes]]


def load(
    name: str,
    split: str,
    size: tuple[int, int] | None,
    crop: str,
    channels: int | None,
    data_dir: str | os.PathLike | None,
    memory_limit: int,
) -> Source:
    """A split of the data set `name`, prepared first if need be; `diffusion.data.load` documents the arguments."""
    root = Path(os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))
    with mnist5k.quiet():
        builder = _open(name, root)
        features = builder.info.features
        image_key, label_key = _keys(name, features)
        prepared = builder.is_prepared()
    if not prepared:
        _prepare(name, builder, root)
    n, read_records = _records(name, builder, split)

    def parser(key: str, **options) -> Callable[[bytes], dict]:
        parse = tfds.features.FeaturesDict({key: features[key]}).deserialize_example_np
        return lambda record: parse(record, **options)[key]

    parse_image = parser(image_key, decoders={image_key: tfds.decode.SkipDecoding()})
    encoded = images.Encoded(
        name, n, lambda ids: list(map(parse_image, read_records(ids))), lambda i: f"image {i} of {name}/{split}"
    )
    *fixed, found = features[image_key].shape
    if channels is None and found not in (None, 1, 3):
        raise ValueError(f"{name} has {found} channels: pass --config.data.channels=1 or 3, or 4 to keep transparency")
    channels = channels or found or 3
    if size is None:
        size = tuple(fixed) if None not in fixed else images.common_size(encoded, images.headers(encoded))
    decoded = images.decode(encoded, size, crop, channels, memory_limit)
    splits = tuple((key, value.num_examples) for key, value in builder.info.splits.items())
    opened = Opened(split, splits, notes=images.notes(encoded, size, crop))
    if label_key is None:
        return checked_source(name, decoded, None, (), opened)
    parse_label, labels = parser(label_key), np.empty(n, np.int32)
    for start in range(0, n, 1024):
        ids = range(start, min(start + 1024, n))
        labels[start : ids.stop] = [parse_label(record) for record in read_records(ids)]
    if (labels == -1).all():  # a test split whose labels were not published
        return checked_source(name, decoded, None, (), opened)
    return checked_source(name, decoded, labels, features[label_key].names, opened)


def _open(name: str, root: Path) -> tfds.core.DatasetBuilder:
    try:
        reference, options = tfds.core.naming.parse_builder_name_kwargs(name)
    except ValueError:
        raise _unknown(name) from None
    if reference.namespace:
        raise ValueError(
            f"{name} is a community data set (of {reference.namespace!r}); only TFDS's own can be read. Save its "
            "images as files and pass --config.data.name=folder:PATH"
        )
    ours = mnist5k.Mnist5k
    if reference.name == ours.name and ours.VERSION.match(options.get("version", "*.*.*")):
        mnist5k.prepare(root)
    try:
        return tfds.builder(name, data_dir=os.fspath(root))
    except tfds.core.registered.DatasetNotFoundError:
        raise _unknown(name) from None
    except Exception as error:  # TFDS raises many types here, for an unknown version or a damaged folder
        raise ValueError(f"TFDS cannot open {name}: {images.reason(error)}") from error


def _unknown(name: str) -> ValueError:
    base = name.split("/")[0].split(":")[0]
    if not base or base in (".", "..", "~"):
        return ValueError(
            f"{name!r} is not the name of a data set; a folder of images is --config.data.name=folder:{name}"
        )
    near = difflib.get_close_matches(base, tfds.list_builders(with_community_datasets=False), 3, 0.5)
    hint = f"nearest names: {', '.join(near)}; " if near else ""
    return ValueError(
        f"TFDS has no data set named {base!r} ({hint}for your own images: --config.data.name=folder:PATH)"
    )


def _keys(name: str, features: tfds.features.FeatureConnector) -> tuple[str, str | None]:
    """Names of the image and of the label among the features of a data set."""
    items = dict(features.items()) if hasattr(features, "items") else {}
    image_keys = [key for key, feature in items.items() if type(feature) is tfds.features.Image]
    label_keys = [key for key, feature in items.items() if type(feature) is tfds.features.ClassLabel]
    if not image_keys or (len(image_keys) > 1 and "image" not in image_keys):
        raise ValueError(
            f"{name} cannot be used: an example must have one image (or one named 'image'), and its features are "
            f"{sorted(items) or features}"
        )
    image = "image" if "image" in image_keys else image_keys[0]
    if items[image].np_dtype != np.uint8:
        raise ValueError(f"images of {name} are {np.dtype(items[image].np_dtype)}; only uint8 can be read")
    label = "label" if "label" in label_keys else label_keys[0] if len(label_keys) == 1 else None
    return image, label


def _prepare(name: str, builder: tfds.core.DatasetBuilder, root: Path) -> None:
    """Downloads and prepares a data set of TFDS, or raises within seconds an error that names what is missing."""
    other = "--config.data.name=mnist5k and folder:PATH need neither network nor TensorFlow"
    subject = f"{name} is not prepared in {root} (--config.data.data_dir)"
    manual = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    by_hand = f". First download by hand, into {root}/downloads/manual: {' '.join(manual.split())}" if manual else ""
    if importlib.util.find_spec("tensorflow") is None:
        raise FileNotFoundError(
            f"{subject}, and TFDS prepares it with TensorFlow, which is not installed. Run once, with a network:\n"
            f"  pip install tensorflow-cpu\n"
            f"  tfds build {name} --file_format=array_record --data_dir={root}\n"
            f"TensorFlow is not needed after that; {other}{by_hand}"
        )
    urls = [url for url in (builder.url_infos or {}) if url.startswith("http")]
    problem = _unreachable(urls[0]) if urls else None
    if problem:
        raise ConnectionError(f"{subject} and cannot be downloaded from here: {problem}; {other}")
    try:
        builder.download_and_prepare(
            file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except AssertionError as error:  # TFDS raises this for missing files that only a person may download
        if not manual:
            raise
        raise FileNotFoundError(f"{subject} and its files must be downloaded by hand: {error}") from error


def _unreachable(url: str, seconds: float = 4.0) -> str | None:
    """Why `url` does not answer within `seconds`, or None if it does (an HTTP error is an answer too)."""
    found = queue.SimpleQueue()
    host = urllib.parse.urlsplit(url).hostname

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
                found.put(None)
        except urllib.error.HTTPError:
            found.put(None)
        except Exception as error:
            found.put(f"{host} does not answer ({error})")

    # A name look-up has no time limit of its own, so the request runs in a thread that may be abandoned.
    threading.Thread(target=ask, name="reachable", daemon=True).start()
    try:
        return found.get(timeout=seconds)
    except queue.Empty:
        return f"{host} did not answer within {seconds:g} s"


def _records(name: str, builder: tfds.core.DatasetBuilder, split: str) -> tuple[int, Reader]:
    """Number of records of a split, and a function that reads some of them."""
    try:
        shards = builder.info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"split={split!r} of {name} is not one of {tuple(builder.info.splits)} or a slice such as 'train[:10%]'"
        ) from error
    if not shards:
        counts = {key: value.num_examples for key, value in builder.info.splits.items()}
        raise ValueError(f"split={split!r} of {name} is empty; the splits have {counts} images")
    missing = [shard.filename for shard in shards if not os.path.exists(shard.filename)]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]} is missing ({len(missing)} such files): delete {builder.data_dir} and prepare it again"
        )
    kind = builder.info.file_format.value
    if kind == "array_record":
        records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        return len(records), lambda ids: list(records.__getitems__(list(ids)))
    if kind == "tfrecord":
        return _tfrecords(shards)
    raise ValueError(f"{name} is stored as {kind} in {builder.data_dir}; array_record or tfrecord is needed")


def _tfrecords(shards: Sequence) -> tuple[int, Reader]:
    """Random access to TFRecord files. A record is: length uint64, its CRC, the bytes, their CRC."""
    places: list[tuple[str, int, int]] = []
    for shard in shards:
        end, offset, spans = os.path.getsize(shard.filename), 0, []
        with open(shard.filename, "rb") as file:
            while offset < end:
                file.seek(offset)
                head = file.read(8)
                length = struct.unpack("<Q", head)[0] if len(head) == 8 else end
                if offset + length + 16 > end:
                    raise ValueError(f"{shard.filename} ends within a record: delete its folder and prepare it again")
                spans.append((shard.filename, offset + 12, length))
                offset += length + 16
        places += spans[shard.skip : shard.skip + shard.take]

    def read(ids: Sequence[int]) -> list[bytes]:
        found = []
        for i in ids:
            path, offset, length = places[i]
            with open(path, "rb") as file:
                file.seek(offset)
                found.append(file.read(length))
        return found

    return len(places), read
