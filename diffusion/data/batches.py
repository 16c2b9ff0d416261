"""Sources of pictures, and batches of them that are a pure function of (seed, step).

A `Source` is N pictures of one shape with a label each. Sample number n of a run, n = 0, 1, 2, ..., is picture

    pi_e[n mod N],   e = floor(n / N),                                                             (1)

where pi_e is a permutation of 0 .. N-1 drawn by the counter-based generator Philox with key (seed, e). Batch number
`step` holds samples step * B .. step * B + B - 1, so each epoch shows every picture once, whatever B is, and a run is
continued by its step number alone. Sample n is mirrored and moved by the n-th block of Philox with key
(seed, 2^64 - 1): its augmentation does not depend on B either. Only raw generator words are used, which NumPy promises
not to change.
"""

import functools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from operator import index
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")

AUGMENTATION = 2**64 - 1  # Philox key word no epoch reaches


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
    remedy = "images.astype(np.uint8) if they lie in 0 .. 255"
    if images.dtype.kind == "f":
        if not (finite := np.isfinite(images)).all():
            where = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise ValueError(
                f"images hold {(~finite).sum()} values that are NaN or infinite, the first at index {where}"
            )
        remedy = "np.rint(images * 255).astype(np.uint8) if they lie in [0, 1]"
    if images.dtype != np.uint8:
        raise TypeError(f"images must be uint8, not {images.dtype}: pass {remedy}")
    if images.ndim != 4:
        remedy = ": pass images[..., None] for grey pictures [N, H, W]" if images.ndim == 3 else ""
        raise ValueError(f"images must have shape [N, H, W, C], not {images.shape}{remedy}")
    return checked_source("arrays", images, labels, class_names)


def checked_source(
    name: str, images: Any, labels: Sequence[int] | np.ndarray | None, class_names: Sequence[str]
) -> Source:
    """A source whose labels fit its pictures and its classes, or the error that says which do not."""
    n = len(images)
    if 0 in images.shape:
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
