"""Image data sets as arrays of uint8, and batches that are a pure function of (seed, step).

    source = data.load("mnist5k")                       # or "cifar10", "folder:PATH", or data.from_arrays(images)
    data.batch(source, seed=0, step=17, batch_size=64)  # {"x": uint8 [64, 28, 28, 1], "y": int32 [64]}

`load` is the one door for all data sets; what it opens is a `Source`. Behind it are a module for folders (`folder`) and
one for the data sets of TFDS (`tfds`), among them our own digits (`mnist5k`); `pictures` decodes for both. TFDS and
Pillow are imported when a data set is opened, not before. Values stay uint8 here; the training step maps them to
floats, once, on the device.
"""

import os
from collections.abc import Sequence
from operator import index

from diffusion.data.batches import Source, batch, from_arrays, prefetch

__all__ = ["CROPS", "Source", "batch", "from_arrays", "load", "prefetch"]

CROPS = ("center", "resize", "none")


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

    `diffusion.data.tfds` says what TFDS needs and when, `diffusion.data.folder` how a folder is split and labelled.

    Args:
      split: "train", "test", or another name or slice of TFDS ("train[:10%]"); of a folder also "all".
      size: height and width (one integer: both) of the pictures; None keeps them, and then all must agree.
      crop: what happens to a picture of another size: "center" scales it until it covers `size` and cuts out the
        middle, "resize" scales both sides separately, "none" refuses it.
      channels: 1 or 3; None takes a TFDS data set as it is, and a folder as 1 if all its pictures are grey, else 3.
        Transparency is laid over white, 16-bit grey is scaled to 8 bits, the EXIF orientation is obeyed.
      data_dir: where TFDS keeps its data sets (default: TFDS_DATA_DIR, else ~/tensorflow_datasets).
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
        from diffusion.data import folder

        return folder.load(name, split, size, crop, channels, memory_limit)
    from diffusion.data import tfds

    return tfds.load(name, split, size, crop, channels, data_dir, memory_limit)


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
