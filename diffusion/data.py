"""Image data sets as arrays of uint8, and batches that are a pure function of (seed, step).

A `Source` is N pictures of one shape with a label each. Sample number n of a run, n = 0, 1, 2, ..., is picture

    pi_e[n mod N],   e = floor(n / N),                                                             (1)

where pi_e is a permutation of 0 .. N-1 drawn by the counter-based generator Philox with key (seed, e). Batch number
`step` holds samples step * B .. step * B + B - 1, so each epoch shows every picture once, whatever B is, and a run is
continued by its step number alone. Sample n is mirrored and moved by the n-th block of Philox with key
(seed, 2^64 - 1): its augmentation does not depend on B either. Only raw generator words are used, which NumPy promises
not to change.

Values stay uint8 here; the training step maps them to floats, once, on the device. TFDS and Pillow are imported when a
data set is opened, not before.
"""

import contextlib
import difflib
import functools
import hashlib
import importlib.util
import io
import os
import queue
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import index
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")

CROPS = ("center", "resize", "none")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TEST_FOLDERS = ("test", "val", "validation")
AUGMENTATION = 2**64 - 1  # Philox key word no epoch reaches
WORKERS = min(8, os.cpu_count() or 1)


class Source(NamedTuple):
    """N pictures of one shape: `images` uint8 [N, H, W, C], `labels` int32 [N], the name of each class.

    `images` is an array, or an object that decodes on demand with the same contract: `images[indices]`, `shape`, `len`.
    Without labels `class_names` is empty and every label is 0.
    """

    name: str
    images: Any
    labels: np.ndarray
    class_names: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for a data set without labels."""
        return len(self.class_names)


def from_arrays(
    images: np.ndarray, labels: Sequence[int] | np.ndarray | None = None, class_names: Sequence[str] = ()
) -> Source:
    """A source of your own arrays: images uint8 [N, H, W, C], labels [N] integers or None, names "0", "1", ... if none.

    Raises:
      TypeError: images are not uint8, or labels are not integers; the message says how to convert.
      ValueError: wrong shape, no pictures, NaN or infinite values, or labels outside 0 .. number of classes - 1.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8:
        if images.dtype.kind == "f" and not (finite := np.isfinite(images)).all():
            where = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise ValueError(
                f"images hold {(~finite).sum()} values that are NaN or infinite, the first at index {where}"
            )
        remedy = (
            "np.rint(images * 255).astype(np.uint8) if they lie in [0, 1]"
            if images.dtype.kind == "f"
            else ("images.astype(np.uint8) if they lie in 0 .. 255")
        )
        raise TypeError(f"images must be uint8, not {images.dtype}: pass {remedy}")
    if images.ndim != 4:
        remedy = ": pass images[..., None] for grey pictures [N, H, W]" if images.ndim == 3 else ""
        raise ValueError(f"images must have shape [N, H, W, C], not {images.shape}{remedy}")
    return _source("arrays", images, labels, class_names)


def load(
    name: str,
    split: str = "train",
    *,
    size: int | tuple[int, int] | None = None,
    crop: str = "center",
    channels: int | None = None,
    data_dir: str | os.PathLike | None = None,
    memory_limit: int = 4 << 30,
) -> Source:
    """Opens a data set: "mnist5k", any image data set of TFDS ("cifar10", "name/config:version"), or "folder:PATH".

    A TFDS data set is read from `data_dir` (default: the environment's TFDS_DATA_DIR, else ~/tensorflow_datasets) and
    needs TensorFlow only to be prepared there once; "mnist5k" needs neither TensorFlow nor a network. `split` is TFDS's
    ("train", "test", "train[:10%]").

    A folder is searched through all its sub-folders for PNG, JPEG and WebP files. Names that begin with a dot are
    passed over. The first sub-folder below PATH names the class; files directly in PATH have no label. If PATH holds
    "train" and one of "test", "val" or "validation", these are the splits. If not, a file is in "test" when the SHA-256
    of its path below PATH falls in the lowest tenth, else in "train" (each gets at least one file); "all" is both.

    Args:
      size: height and width (one integer: both) of the pictures; None keeps them, and then all must agree.
      crop: what happens to a picture of another size: "center" scales it until it covers `size` and cuts out the
        middle, "resize" scales both sides separately, "none" refuses it.
      channels: 1 or 3; None takes a TFDS data set as it is, and a folder as 1 if all its pictures are grey, else 3.
        Transparency is laid over white, 16-bit grey is scaled to 8 bits, the EXIF orientation is obeyed.
      memory_limit: bytes of pixels up to which a data set is decoded into memory; a larger one is decoded when used.

    Raises:
      ValueError: unknown name or split, pictures that differ in size or cannot be read, labels out of range.
      OSError: nothing at this path, or a TFDS data set that is not prepared, with the commands that prepare it.
    """
    size = _size(size)
    if crop not in CROPS:
        raise ValueError(f"crop={crop!r} is not one of {CROPS}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels={channels!r} must be 1, 3 or None")
    if not isinstance(name, str) or not name:
        raise ValueError(f"name={name!r} must be 'mnist5k', the name of a TFDS data set, or 'folder:PATH'")
    if name.startswith("folder:"):
        return _load_folder(name, split, size, crop, channels, memory_limit)
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    return _load_tfds(name, split, size, crop, channels, root, memory_limit)


def batch(
    source: Source, seed: int, step: int, batch_size: int, *, flip: bool = False, shift: int = 0
) -> dict[str, np.ndarray]:
    """Batch number `step` of the run `seed`, eq. (1): {"x": uint8 [B, H, W, C], "y": int32 [B]}.

    `flip` mirrors every other sample on average; `shift` moves each by -shift .. shift pixels down and across,
    repeating its edge pixels into the space left free (a constant background stays itself).

    Raises:
      ValueError: batch_size < 1, step < 0, seed outside 0 .. 2^64 - 1, or shift not within 0 .. the shorter side - 1.
    """
    n = len(source.labels)
    seed, step, batch_size, shift = index(seed), index(step), index(batch_size), index(shift)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if step < 0 or not 0 <= seed < 2**64:
        raise ValueError(f"step={step} must not be negative and seed={seed} must lie in 0 .. 2^64 - 1")
    _, height, width, _ = source.images.shape
    if not 0 <= shift < min(height, width):
        raise ValueError(f"shift={shift} must lie in 0 .. {min(height, width) - 1} for pictures {height}x{width}")
    first = step * batch_size
    epoch, place = np.divmod(np.arange(first, first + batch_size), n)
    picked = np.empty(batch_size, np.int64)
    for e in range(int(epoch[0]), int(epoch[-1]) + 1):
        within = epoch == e
        picked[within] = _permutation(n, seed, e)[place[within]]
    x, y = source.images[picked], source.labels[picked]
    if flip or shift:
        x = _augment(x, seed, first, flip, shift)
    return {"x": x, "y": y}


def prefetch(make_batch: Callable[[int], T], start: int, stop: int, depth: int = 2) -> Iterator[tuple[int, T]]:
    """Yields (step, make_batch(step)) for start <= step < stop, computed up to `depth` ahead by one thread.

    An exception of `make_batch` is raised here, after the batches before it. The thread ends with the iterator: at its
    end, when it is closed, or when it is dropped.

    Raises:
      ValueError: depth < 1.
    """
    if depth < 1:
        raise ValueError(f"depth={depth} must be at least 1")
    return _prefetch(make_batch, range(start, stop), depth)


def _prefetch(make_batch, steps, depth):
    done, slots, stopped = queue.SimpleQueue(), threading.Semaphore(depth), threading.Event()

    def work():
        for step in steps:
            slots.acquire()
            if stopped.is_set():
                return
            try:
                done.put((step, make_batch(step), None))
            except BaseException as error:  # noqa: B036 - handed to the consumer, whatever it is
                done.put((step, None, error))
                return

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in steps:
            step, value, error = done.get()
            if error is not None:
                raise error
            slots.release()
            yield step, value
            del value
    finally:
        stopped.set()
        slots.release()
        if threading.current_thread() is not thread:  # the garbage collector may end an iterator anywhere
            thread.join()


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False  # shared by every batch of the epoch
    return order


def _augment(x: np.ndarray, seed: int, first: int, flip: bool, shift: int) -> np.ndarray:
    b, height, width, _ = x.shape
    philox = np.random.Philox(key=np.array([seed, AUGMENTATION], np.uint64), counter=first)
    words = philox.random_raw(4 * b).reshape(b, 4)  # one block of four words per sample number
    down, across = (words[:, 1:3] % np.uint64(2 * shift + 1)).astype(np.int64).T - shift
    rows = np.clip(np.arange(height) - down[:, None], 0, height - 1)
    columns = np.clip(np.arange(width) - across[:, None], 0, width - 1)
    if flip:
        mirrored = (words[:, 0] >> np.uint64(63)).astype(bool)
        columns = np.where(mirrored[:, None], width - 1 - columns, columns)
    moved = np.empty_like(x)
    for i in range(b):  # two takes per sample: four times faster than one gather over the batch at 256x256x3
        np.take(x[i].take(rows[i], 0), columns[i], 1, out=moved[i], mode="clip")  # "clip" only spares a buffer
    return moved


def _source(name: str, images: Any, labels: Sequence[int] | np.ndarray | None, class_names: Sequence[str]) -> Source:
    n = len(images)
    if n == 0 or 0 in images.shape:
        raise ValueError(f"{name} holds no pictures: its shape is {tuple(images.shape)}")
    if labels is None:
        if len(class_names):
            raise ValueError(f"{name} has class_names={tuple(class_names)} but no labels")
        return Source(name, images, np.zeros(n, np.int32))
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels of {name} must be integers, not {labels.dtype}")
    if labels.shape != (n,):
        raise ValueError(f"labels of {name} have shape {labels.shape}, but there are {n} pictures: expected ({n},)")
    class_names = tuple(class_names) or tuple(str(i) for i in range(int(labels.max()) + 1))
    wrong = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if len(wrong):
        raise ValueError(
            f"label {labels[wrong[0]]} of picture {wrong[0]} of {name} is outside 0 .. {len(class_names) - 1} "
            f"({len(wrong)} such labels)"
        )
    return Source(name, images, labels.astype(np.int32), class_names)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: encoded bytes to uint8 [H, W, C]


class _Encoded(NamedTuple):
    """N encoded pictures: `read` gives the bytes of some, `describe` names one in messages."""

    n: int
    read: Callable[[Sequence[int]], list[bytes]]
    describe: Callable[[int], str]


class _Lazy:
    """Pictures decoded by a few threads when indexed: `images[indices]` is uint8 [B, H, W, C]."""

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, encoded: _Encoded, size: tuple[int, int], crop: str, channels: int):
        self.shape = (encoded.n, *size, channels)
        self._encoded, self._crop = encoded, crop
        self._order = np.arange(encoded.n)
        self._pool = ThreadPoolExecutor(WORKERS, "decode")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices) -> np.ndarray:
        picked = self._order[indices]
        flat = np.atleast_1d(picked).ravel()
        x = np.empty((len(flat), *self.shape[1:]), np.uint8)
        if len(flat):
            parts = np.array_split(np.arange(len(flat)), min(WORKERS, len(flat)))
            list(self._pool.map(lambda part: self._decode(flat, part, x), parts))
        return x.reshape(*np.shape(picked), *self.shape[1:])

    def _decode(self, indices: np.ndarray, part: np.ndarray, x: np.ndarray) -> None:
        _, *size, channels = self.shape
        picked = [int(i) for i in indices[part]]
        for row, i, data in zip(part, picked, self._encoded.read(picked), strict=True):
            try:
                x[row] = _decode(data, tuple(size), self._crop, channels)
            except Exception as error:
                raise ValueError(f"cannot read {self._encoded.describe(i)}: {_reason(error)}") from error


def _images(name: str, encoded: _Encoded, size: tuple[int, int], crop: str, channels: int, limit: int) -> Any:
    shape = (encoded.n, *size, channels)
    if np.prod(shape, dtype=object) > limit:
        return _Lazy(encoded, size, crop, channels)
    x = np.empty(shape, np.uint8)

    def decode(i: int, data: bytes) -> None:
        x[i] = _decode(data, size, crop, channels)

    _each(name, encoded, decode)
    return x


def _each(name: str, encoded: _Encoded, use: Callable[[int, bytes], None]) -> None:
    """Calls use(i, bytes) for every picture, on a few threads. Raises ValueError naming those it fails for."""
    bad: list[tuple[int, str]] = []

    def part(start: int) -> None:
        picked = range(start, min(start + 64, encoded.n))
        for i, data in zip(picked, encoded.read(picked), strict=True):
            try:
                use(i, data)
            except Exception as error:
                bad.append((i, f"{encoded.describe(i)} ({_reason(error)})"))

    pool = ThreadPoolExecutor(WORKERS)
    try:
        for _ in pool.map(part, range(0, encoded.n, 64)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the pictures not yet begun
    if bad:
        shown = "; ".join(text for _, text in sorted(bad)[:5])
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            f"{len(bad)} of {encoded.n} pictures of {name} cannot be used: {shown}{more}. Repair or remove them"
        )


def _decode(data: bytes, size: tuple[int, int] | None, crop: str, channels: int) -> np.ndarray:
    """uint8 [H, W, C] of an encoded picture, upright and brought to `size`."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data)) as picture:
        if size is not None and crop != "none":
            # JPEG decodes at 1/2, 1/4 or 1/8 for free; keep twice the pixels that the filter below will ask for.
            picture.draft(None, (2 * max(size), 2 * max(size)))
        picture = _plain(ImageOps.exif_transpose(picture), channels)
        width, height = picture.size
        if size is not None and (height, width) != size:
            box = (0.0, 0.0, width, height)
            if crop == "none":
                raise ValueError(f"it is {height}x{width}, not {size[0]}x{size[1]}, and crop is 'none'")
            if crop == "center":
                scale = min(width / size[1], height / size[0])
                left, top = (width - scale * size[1]) / 2, (height - scale * size[0]) / 2
                box = (left, top, width - left, height - top)
            picture = picture.resize(size[::-1], Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
        return np.asarray(picture, np.uint8).reshape(*picture.size[::-1], channels)


def _plain(picture, channels: int):
    """A PIL image in mode "L" (1 channel) or "RGB" (3)."""
    from PIL import Image

    if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion cuts at 255 instead of scaling
        wide = np.asarray(picture).astype(np.int64).clip(0, 65535)
        picture = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("L" if channels == 1 else "RGB")


class _Header(NamedTuple):
    height: int
    width: int
    grey: bool


def _header(data: bytes) -> _Header:
    """Upright size of an encoded picture and whether it is grey, from its first bytes alone."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        width, height = picture.size
        if picture.getexif().get(0x0112, 1) >= 5:  # orientations 5 to 8 lie on their side
            width, height = height, width
        return _Header(height, width, picture.mode in ("1", "L", "LA") or picture.mode.startswith("I"))


def _headers(name: str, encoded: _Encoded, whole: bool = False) -> list[_Header]:
    """The header of every picture; `whole` also looks for files that end too early without decoding them."""
    headers: list[_Header | None] = [None] * encoded.n

    def look(i: int, data: bytes) -> None:
        headers[i] = _header(data)
        if whole:
            _verify(data)

    _each(name, encoded, look)
    return headers


def _verify(data: bytes) -> None:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        if picture.format == "JPEG":  # has no checksums: a file with its end marker is taken as whole
            if b"\xff\xd9" not in data[-4096:]:
                picture.load()
        elif picture.format == "PNG":
            picture.verify()
        else:
            picture.load()


def _common_size(name: str, headers: Sequence[_Header], encoded: _Encoded) -> tuple[int, int]:
    first = headers[0][:2]
    for i, header in enumerate(headers):
        if header[:2] != first:
            raise ValueError(
                f"pictures of {name} differ in size: {encoded.describe(0)} is {first[0]}x{first[1]}, "
                f"{encoded.describe(i)} is {header.height}x{header.width}. Set one size: --config.data.size=64, "
                "with --config.data.crop=center or resize"
            )
    return first


def _size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    try:
        size = tuple(index(s) for s in size) if isinstance(size, Sequence) else (index(size),) * 2
    except TypeError:
        raise TypeError(f"size={size!r} must be an integer or a pair (height, width)") from None
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size={size} must be a positive integer or a pair (height, width) of them")
    return size


def _reason(error: Exception) -> str:
    text = str(error).split("\n")[0]
    return "not a picture that Pillow knows" if "cannot identify image" in text else text or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# Folders of pictures


def _load_folder(name: str, split: str, size, crop: str, channels: int | None, limit: int) -> Source:
    root = Path(name.removeprefix("folder:")).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{name}: there is no folder {root} (set by --config.data.name=folder:PATH)")
    files = _find(root)
    if not files:
        raise ValueError(f"{name} holds no {', '.join(SUFFIXES)} file, not in any sub-folder either")
    tops = {file.parts[0] for file in files if len(file.parts) > 1}
    held_out = next((folder for folder in TEST_FOLDERS if folder in tops), None)
    if "train" in tops and held_out:
        parts = {"train": ["train"], "test": [held_out], "all": ["train", held_out], held_out: [held_out]}
        chosen = _pick(name, split, parts)
        files = [file for file in files if file.parts[0] in ("train", held_out)]
        member = [file.parts[0] in chosen for file in files]
        below = [file.parts[1:] for file in files]
    else:
        hashes = [int.from_bytes(hashlib.sha256(os.fsencode(file.as_posix())).digest()[:8]) for file in files]
        tenth, highest = max(2**64 // 10, min(hashes)), max(hashes)
        is_test = [value <= tenth and value < highest for value in hashes]
        parts = {"train": [False], "test": [True], "all": [False, True]}
        chosen = _pick(name, split, parts)
        member = [test in chosen for test in is_test]
        below = [file.parts for file in files]
    class_names, classes = _classes(name, files, below)
    if not any(member):
        raise ValueError(f"split={split!r} of {name} is empty: {len(files)} picture is too few to hold one out")

    everything = _Encoded(
        len(files), lambda ids: [(root / files[i]).read_bytes() for i in ids], lambda i: str(root / files[i])
    )
    rows = [i for i, wanted in enumerate(member) if wanted]
    encoded = _Encoded(
        len(rows), lambda ids: everything.read([rows[i] for i in ids]), lambda i: everything.describe(rows[i])
    )
    if size is None or channels is None:
        headers = _headers(name, everything)
        channels = channels or (1 if all(header.grey for header in headers) else 3)
        size = size or _common_size(name, headers, everything)
    images = _images(name, encoded, size, crop, channels, limit)
    if isinstance(images, _Lazy):
        _headers(name, encoded, whole=True)
    return _source(name, images, None if classes is None else [classes[i] for i in rows], class_names)


def _find(root: Path) -> list[Path]:
    """Picture files below `root`, as sorted relative paths; links to folders are followed, each folder once."""
    files, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_raise):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        files += [
            Path(folder, f).relative_to(root) for f in names if f.lower().endswith(SUFFIXES) and not f.startswith(".")
        ]
    return sorted(files, key=lambda file: file.parts)


def _raise(error: OSError) -> None:
    raise error


def _classes(name: str, files: list[Path], below: list[tuple[str, ...]]) -> tuple[tuple[str, ...], list[int] | None]:
    """Sorted names of the first folders, and the class of each file; ((), None) when all files lie at the top."""
    loose = [file for file, parts in zip(files, below, strict=True) if len(parts) == 1]
    if len(loose) == len(files):
        return (), None
    if loose:
        labelled = next(file for file, parts in zip(files, below, strict=True) if len(parts) > 1)
        raise ValueError(
            f"{name} mixes files with and without a class: {labelled} lies in a sub-folder, {loose[0]} does not "
            f"({len(loose)} such files). Move them into sub-folders, one per class, or all into one folder"
        )
    names = tuple(sorted({parts[0] for parts in below}))
    number = {name: i for i, name in enumerate(names)}
    return names, [number[parts[0]] for parts in below]


def _pick(name: str, split: str, parts: dict[str, list]) -> list:
    if split not in parts:
        raise ValueError(f"split={split!r} of {name} is not one of {tuple(parts)}")
    return parts[split]


# ---------------------------------------------------------------------------------------------------------------------
# TFDS


def _load_tfds(name: str, split: str, size, crop: str, channels: int | None, root: Path, limit: int) -> Source:
    import tensorflow_datasets as tfds

    builder = _builder(name, root)
    features = builder.info.features
    image_key, label_key = _keys(name, features)
    image = features[image_key]
    wanted = {key: features[key] for key in (image_key, label_key) if key is not None}
    parse = tfds.features.FeaturesDict(wanted).deserialize_example_np
    encoded_images = {image_key: tfds.decode.SkipDecoding()}

    n, read_records = _records(name, builder, split)

    def examples(ids: Sequence[int]) -> list[dict]:
        return [parse(record, decoders=encoded_images) for record in read_records(ids)]

    labels = np.zeros(n, np.int32)

    def read(ids: Sequence[int]) -> list[bytes]:
        found = examples(ids)
        if label_key is not None:
            labels[np.asarray(ids, np.int64)] = [example[label_key] for example in found]
        return [example[image_key] for example in found]

    encoded = _Encoded(n, read, lambda i: f"picture {i} of {name}/{split}")
    channels = channels or image.shape[-1] or 3
    if channels not in (1, 3):
        raise ValueError(f"{name} has {channels} channels: set --config.data.channels=1 or 3")
    if size is None:
        fixed = image.shape[:2]
        size = fixed if None not in fixed else _common_size(name, _headers(name, encoded), encoded)
    images = _images(name, encoded, size, crop, channels, limit)
    if isinstance(images, _Lazy) and label_key is not None:
        labels = _cached_labels(Path(builder.data_dir), split, labels, encoded)
    if label_key is None or (labels == -1).all():  # -1 throughout: a split whose labels are kept secret
        return _source(name, images, None, ())
    return _source(name, images, labels, tuple(features[label_key].names))


def _cached_labels(folder: Path, split: str, labels: np.ndarray, encoded: _Encoded) -> np.ndarray:
    """Labels of a data set too large for memory: all records are read once for them, and they are kept in a file."""
    file = folder / f"labels.{hashlib.sha256(split.encode()).hexdigest()[:16]}.npy"
    with contextlib.suppress(OSError, ValueError):
        kept = np.load(file)
        if kept.shape == labels.shape:
            return kept
    for start in range(0, encoded.n, 1024):
        encoded.read(range(start, min(start + 1024, encoded.n)))  # fills `labels`
    with contextlib.suppress(OSError):  # a data set that may only be read is read again next time
        unfinished = folder / f"incomplete.{os.getpid()}.labels.npy"
        np.save(unfinished, labels)
        unfinished.replace(file)
    return labels


def _builder(name: str, root: Path):
    import tensorflow_datasets as tfds

    from diffusion import mnist5k

    if name == "mnist5k":
        return mnist5k.prepare(root)
    with mnist5k.quiet():
        try:
            namespace = tfds.core.naming.parse_builder_name_kwargs(name)[0].namespace
        except ValueError:
            raise ValueError(_unknown(name, tfds.list_builders(with_community_datasets=False))) from None
        if namespace:
            raise ValueError(f"{name} belongs to the community data sets of {namespace!r}; only TFDS's own can be read")
        try:
            builder = tfds.builder(name, data_dir=os.fspath(root))
        except tfds.core.registered.DatasetNotFoundError:
            raise ValueError(_unknown(name, tfds.list_builders(with_community_datasets=False))) from None
        except Exception as error:  # TFDS raises many types here, for an unknown version or a damaged folder
            raise ValueError(f"TFDS cannot open {name}: {_reason(error)}") from error
        _keys(name, builder.info.features)  # refuse what holds no pictures before anything is downloaded
        prepared = builder.is_prepared()
    if not prepared:
        _prepare(name, builder, root)
    return builder


def _unknown(name: str, known: Sequence[str]) -> str:
    base = name.split("/")[0].split(":")[0]
    near = difflib.get_close_matches(base, [*known, "mnist5k"], 3, 0.5)
    hint = f"nearest names: {', '.join(near)}; " if near else ""
    return f"TFDS has no data set named {base!r} ({hint}pictures of your own: --config.data.name=folder:PATH)"


def _prepare(name: str, builder, root: Path) -> None:
    """Downloads and prepares a data set of TFDS, or says within seconds what is missing for it."""
    import tensorflow_datasets as tfds

    other = "--config.data.name=mnist5k and folder:PATH need neither network nor TensorFlow"
    subject = f"{name} is not prepared in {root} (--config.data.data_dir)"
    manual = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    by_hand = f". Before, by hand, into {root}/downloads/manual: {' '.join(manual.split())}" if manual else ""
    if importlib.util.find_spec("tensorflow") is None:
        raise FileNotFoundError(
            f"{subject}, and TFDS prepares it with TensorFlow, which is not installed. Once, with a network:\n"
            f"  pip install tensorflow-cpu\n"
            f"  tfds build {name} --file_format=array_record --data_dir={root}\n"
            f"after that TensorFlow is not needed any more; {other}{by_hand}"
        )
    urls = [url for url in (builder.url_infos or {}) if url.startswith("http")]
    trouble = _unreachable(urls[0]) if urls else None
    if trouble:
        raise ConnectionError(f"{subject} and cannot be downloaded from here: {trouble}; {other}")
    try:
        builder.download_and_prepare(
            file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except AssertionError as error:  # how TFDS reports files behind a licence that are not there
        if not manual:
            raise
        raise FileNotFoundError(f"{subject} and its files must be downloaded by hand: {error}") from error


def _unreachable(url: str, seconds: float = 4.0) -> str | None:
    """Why `url` does not answer within `seconds`, or None if it does (an HTTP error is an answer too)."""
    found = queue.SimpleQueue()

    import urllib.error
    import urllib.parse
    import urllib.request

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
                found.put(None)
        except urllib.error.HTTPError:
            found.put(None)
        except Exception as error:
            found.put(f"{urllib.parse.urlsplit(url).hostname} does not answer ({error})")

    # Looking up a name has no time limit of its own, so the question is asked in a thread that may be left behind.
    threading.Thread(target=ask, name="reachable", daemon=True).start()
    try:
        return found.get(timeout=seconds)
    except queue.Empty:
        return f"{urllib.parse.urlsplit(url).hostname} did not answer within {seconds:g} s"


def _keys(name: str, features) -> tuple[str, str | None]:
    """Names of the image and of the label among the features of a TFDS data set."""
    import tensorflow_datasets as tfds

    items = dict(features.items()) if hasattr(features, "items") else {}
    images = [key for key, feature in items.items() if type(feature) is tfds.features.Image]
    labels = [key for key, feature in items.items() if type(feature) is tfds.features.ClassLabel]
    if not images or (len(images) > 1 and "image" not in images):
        raise ValueError(f"{name} is no data set of single pictures: its features are {sorted(items) or features}")
    image = "image" if "image" in images else images[0]
    if items[image].np_dtype != np.uint8:
        raise ValueError(f"pictures of {name} are {np.dtype(items[image].np_dtype)}; only uint8 can be read")
    label = "label" if "label" in labels else labels[0] if len(labels) == 1 else None
    return image, label


def _records(name: str, builder, split: str) -> tuple[int, Callable[[Sequence[int]], list[bytes]]]:
    """Number of records of a split, and a function that reads some of them."""
    import tensorflow_datasets as tfds

    try:
        shards = builder.info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"split={split!r} of {name} is not one of {tuple(builder.info.splits)} or a slice such as 'train[:10%]'"
        ) from error
    if not shards:
        counts = {key: value.num_examples for key, value in builder.info.splits.items()}
        raise ValueError(f"split={split!r} of {name} is empty; there are {counts} pictures")
    missing = [shard.filename for shard in shards if not os.path.exists(shard.filename)]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]} is missing ({len(missing)} files): delete {builder.data_dir}, prepare again"
        )
    kind = builder.info.file_format.value
    if kind == "array_record":
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        records = builder.as_data_source(split, deserialize_method=raw)
        return len(records), lambda ids: list(records.__getitems__(list(ids)))
    if kind == "tfrecord":
        return _tfrecords(shards)
    raise ValueError(f"{name} is stored as {kind} in {builder.data_dir}; array_record or tfrecord is needed")


def _tfrecords(shards) -> tuple[int, Callable[[Sequence[int]], list[bytes]]]:
    """Random access to TFRecord files, each record being: length uint64, its CRC, the bytes, their CRC."""
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
