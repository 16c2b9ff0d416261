"""Sources of images, and batches of them that are a pure function of (seed, step).

A `Source` is N images of one shape with a label each, or N sequences or volumes, of which the same holds. Sample number
n of a run, n = 0, 1, 2, ..., is image

    pi_e[n mod N],   e = floor(n / N),                                                             (1)

where pi_e is a random permutation of 0 .. N-1 from the counter-based generator Philox with key (seed, e). Batch number
`step` holds samples step * B .. step * B + B - 1. So each epoch contains every image once for any B, and a run resumes
from its step number alone. The n-th block of Philox with key (seed, 2^64 - 1) decides how sample n is flipped and
shifted, so its augmentation does not depend on B either. Only raw generator words are used, because NumPy guarantees
that these stay the same in later versions.
"""

import functools
import queue
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from operator import index
from typing import Any, NamedTuple, TypeVar

import numpy as np

from diffusion.data import values

T = TypeVar("T")

AUGMENTATION = 2**64 - 1  # a Philox key word that no epoch reaches


class Opened(NamedTuple):
    """What was found where a source was opened, to be shown; nothing is computed from it."""

    split: str = ""
    splits: tuple[tuple[str, int], ...] = ()  # every split and its number of images
    passed_over: tuple[tuple[str, int], ...] = ()  # suffixes of the files that are no images, and their numbers
    skipped: tuple[str, ...] = ()  # images that cannot be read, with the reason
    notes: tuple[str, ...] = ()


class Source(NamedTuple):
    """N images of one shape: `images` [N, *S, C], `labels` int32 [N], the name of each class.

    `images` is an array, or an object that reads on demand with the same interface: `images[indices]`, `shape`, `len`
    and, unless it is uint8, `dtype`. Its values lie within `value_range`, 0 to 255 of uint8. Without labels
    `class_names` is empty and every label is 0.
    """

    name: str
    images: Any
    labels: np.ndarray
    class_names: tuple[str, ...] = ()
    opened: Opened = Opened()
    value_range: tuple[float, float] = values.PLAIN

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for a data set without labels."""
        return len(self.class_names)

    @property
    def dtype(self) -> np.dtype:
        """The type of the images."""
        return np.dtype(getattr(self.images, "dtype", np.uint8))


def from_arrays(
    images: np.ndarray,
    labels: Sequence[int] | np.ndarray | None = None,
    class_names: Sequence[str] = (),
    *,
    value_range: tuple[float, float] | None = None,
    channels: int | None = None,
) -> Source:
    """A source of images [N, H, W, C], sequences [N, L, C] or volumes [N, D, H, W, C], and labels [N], from memory.

    Labels are integers, or None; class names default to "0", "1", ...

    Args:
      value_range: the smallest and the largest value that there can be; 0 and 255 of uint8, to be stated of all else.
      channels: C, which needs to be said only where the last axis may be another one.

    Raises:
      TypeError: images are not uint8 and of no stated range, or labels are not integers; the message says what to do.
      ValueError: wrong shape, no images, values that are NaN, infinite or outside the range, or labels outside
        0 .. number of classes - 1.
    """
    images = np.asarray(images)
    if value_range is None and images.dtype != np.uint8:
        try:
            checked_images(images)  # which says how to convert
        except TypeError as e:
            raise TypeError(f"{e}, or keep them and state their range, as in value_range=(0.0, 1.0)") from None
    values.check_shape("images", images.shape, channels)
    stated = values.checked_range("images", images, value_range, "value_range")
    values.check_values("images", images, stated, "value_range")
    return checked_source("arrays", images, labels, class_names)._replace(value_range=stated)


def checked_source(
    name: str,
    images: Any,
    labels: Sequence[int] | np.ndarray | None,
    class_names: Sequence[str],
    opened: Opened = Opened(),  # noqa: B008 - it cannot be changed
) -> Source:
    """A source of `images` whose labels were checked against the number of images and the classes."""
    n = len(images)
    check_class_names(name, class_names)
    if labels is None:
        if len(class_names):
            raise ValueError(f"{name} has class_names={tuple(class_names)} but no labels; pass both or neither")
        return Source(name, images, np.zeros(n, np.int32), (), opened)
    labels = checked_labels(labels, n, len(class_names) or None, f"of {name} ")
    class_names = tuple(class_names) or tuple(str(i) for i in range(int(labels.max()) + 1))
    return Source(name, images, labels.astype(np.int32), class_names, opened)


def check_class_names(owner: str, class_names: Sequence[str]) -> None:
    """Raises ValueError if two of the names are the same, once both are in Unicode's form NFC."""
    first: dict[str, int] = {}
    for i, class_name in enumerate(class_names):
        earlier = first.setdefault(unicodedata.normalize("NFC", class_name), i)
        if earlier != i:
            raise ValueError(f"{owner} has two classes of one name: {earlier} and {i} are both {class_name!r}")


def checked_images(images: np.ndarray) -> np.ndarray:
    """`images` as an array, if it is uint8 [N, H, W, C] with N >= 1.

    Raises:
      TypeError: another dtype; the message says how to convert.
      ValueError: another shape, no images, or float values that are NaN or infinite.
    """
    images = np.asarray(images)
    remedy = "images.astype(np.uint8) if they lie in 0 .. 255"
    if images.dtype.kind == "f":
        if not (finite := np.isfinite(images)).all():
            where = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise ValueError(
                f"images contain {(~finite).sum()} values that are NaN or infinite, the first at index {where}"
            )
        remedy = "np.rint(images * 255).astype(np.uint8) if they lie in [0, 1]"
    if images.dtype != np.uint8:
        raise TypeError(f"images must be uint8, not {images.dtype}: pass {remedy}")
    if images.ndim != 4 or not images.size:
        remedy = ": pass images[..., None] for grey images [N, H, W]" if images.ndim == 3 else ""
        raise ValueError(f"images must have shape [N, H, W, C] with N >= 1, not {images.shape}{remedy}")
    return images


def checked_labels(
    labels: Sequence[int] | np.ndarray, n: int, classes: int | None = None, owner: str = ""
) -> np.ndarray:
    """`labels` as an array, if they are n integers in 0 .. classes - 1 (None: not negative).

    `owner` names where they come from, in messages: "of mnist5k ".

    Raises:
      TypeError: labels are not integers.
      ValueError: another shape than [n], or a label outside the range.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels {owner}must be integers, not {labels.dtype}")
    if labels.shape != (n,):
        raise ValueError(f"labels {owner}have shape {labels.shape}, but there are {n} images: expected ({n},)")
    wrong = np.flatnonzero((labels < 0) | (labels >= (np.inf if classes is None else classes)))
    if len(wrong):
        allowed = "negative" if classes is None else f"outside 0 .. {classes - 1}"
        raise ValueError(f"label {labels[wrong[0]]} of image {wrong[0]} {owner}is {allowed} ({len(wrong)} such labels)")
    return labels


def batch(
    source: Source,
    seed: int,
    step: int,
    batch_size: int,
    *,
    flip: bool = False,
    shift: int = 0,
    rows: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Batch number `step` of the run `seed`, eq. (1): {"x": [B, *S, C] of the source's type, "y": int32 [B]}.

    With `rows`, integers in 0 .. B - 1, only these examples of it, as a process reads of a batch that several share.

    `flip` mirrors each image left to right with probability 1/2. `shift` moves each by -shift .. shift pixels
    vertically and horizontally, and fills the free space by repeating the edge pixels.

    Raises:
      ValueError: batch_size < 1, step < 0, seed outside 0 .. 2^64 - 1, shift not within 0 .. the shorter side - 1, or
        flip or shift of what are no images [H, W, C].
    """
    n = len(source.labels)
    seed, step, batch_size, shift = index(seed), index(step), index(batch_size), index(shift)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if step < 0 or not 0 <= seed < 2**64:
        raise ValueError(f"step={step} must be at least 0 and seed={seed} must lie in 0 .. 2^64 - 1")
    if flip or shift:
        check_augmentation(source.images.shape[1:], flip, shift)
    numbers = step * batch_size + (np.arange(batch_size) if rows is None else np.asarray(rows, np.int64))
    epoch, place = np.divmod(numbers, n)
    picked = np.empty(len(numbers), np.int64)
    for e in np.unique(epoch).tolist():
        within = epoch == e
        picked[within] = _permutation(n, seed, e)[place[within]]
    x, y = source.images[picked], source.labels[picked]
    if flip or shift:
        x = _augment(x, seed, numbers, flip, shift)
    return {"x": x, "y": y}


def check_augmentation(shape: Sequence[int], flip: bool, shift: int) -> None:
    """Raises ValueError unless arrays of `shape` can be mirrored and shifted: images [H, W, C] larger than `shift`."""
    if len(shape) != 3:
        raise ValueError(
            f"flip={flip} and shift={shift} mirror and move images [H, W, C], not {values.KINDS[len(shape) - 1]} of "
            f"shape {tuple(shape)}: leave them at False and 0"
        )
    height, width, _ = shape
    if not 0 <= shift < min(height, width):
        raise ValueError(f"shift={shift} must lie in 0 .. {min(height, width) - 1} for images of {height}x{width}")


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False  # the cached array is shared by all batches of the epoch
    return order


def _augment(x: np.ndarray, seed: int, numbers: np.ndarray, flip: bool, shift: int) -> np.ndarray:
    b, height, width, _ = x.shape
    first, last = int(numbers.min()), int(numbers.max())
    philox = np.random.Philox(key=np.array([seed, AUGMENTATION], np.uint64), counter=first)
    # One block of four words per sample number, those between a process's own included.
    words = philox.random_raw(4 * (last - first + 1)).reshape(-1, 4)[numbers - first]
    down, across = (words[:, 1:3] % np.uint64(2 * shift + 1)).astype(np.int64).T - shift
    rows = np.clip(np.arange(height) - down[:, None], 0, height - 1)
    columns = np.clip(np.arange(width) - across[:, None], 0, width - 1)
    if flip:
        mirrored = (words[:, 0] >> np.uint64(63)).astype(bool)
        columns = np.where(mirrored[:, None], width - 1 - columns, columns)
    moved = np.empty_like(x)
    for i in range(b):  # two takes per sample: four times faster than one gather over the batch at 256x256x3
        np.take(x[i].take(rows[i], 0), columns[i], 1, out=moved[i], mode="clip")  # mode="clip" avoids a buffer
    return moved


def prefetch(make_batch: Callable[[int], T], start: int, stop: int, depth: int = 2) -> Iterator[tuple[int, T]]:
    """Yields (step, make_batch(step)) for start <= step < stop, computed up to `depth` steps ahead by one thread.

    An exception of `make_batch` is raised here, after the batches before it. The thread ends with the iterator: when it
    is exhausted, closed, or garbage collected.

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
            except BaseException as error:  # noqa: B036 - passed to the consumer, which raises it
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
