"""Data sets as arrays, and batches that are a pure function of (seed, step).

    source = data.load("mnist5k")       # or "cifar10", "folder:PATH", "array:PATH", or data.from_arrays(images)
    data.batch(source, seed=0, step=17, batch_size=64)  # {"x": uint8 [64, 28, 28, 1], "y": int32 [64]}

`load` reads every data set and returns a `Source`; `describe` says in words what it holds. `load` calls `folder` for
"folder:PATH", `arrays` for "array:PATH", `parquet` for "datasets:PATH" and `tfds` for the data sets of TFDS, which
include the digits that this package builds itself (`mnist5k`); `images` decodes files of images, to uint8; `values`
says what arrays may hold. TFDS and Pillow are imported by the first call of `load`. Values keep their type; the
training step converts them to floats, on the device.
"""

import os
from collections.abc import Callable, Sequence
from operator import index

from diffusion.data.batches import Opened, Source, batch, check_augmentation, check_class_names, from_arrays, prefetch
from diffusion.data.description import describe
from diffusion.data.layout import CLASS_NAMES_IN, listed, nfc

__all__ = ["BAD_FILES", "CLASS_NAMES_IN", "CROPS", "Opened", "Source"]
__all__ += ["batch", "check_augmentation", "check_class_names", "describe", "from_arrays", "listed", "load", "nfc"]
__all__ += ["prefetch"]

CROPS = ("center", "resize", "none")
BAD_FILES = ("raise", "skip")


def load(
    name: str,
    split: str = "train",
    *,
    size: int | tuple[int, int] | None = None,
    crop: str = "center",
    channels: int | None = None,
    data_dir: str | os.PathLike | None = None,
    memory_limit: int = 4 << 30,
    class_names_in: str = "folders",
    bad_files: str = "raise",
    cache_dir: str | os.PathLike | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    value_range: Sequence[float] | None = None,
) -> Source:
    """Loads a data set as a `Source` of N images, uint8 [N, H, W, C], or of arrays [N, *S, C] as they are in a file.

    `name` is "mnist5k", any image data set of TFDS ("cifar10", "name/config:version"), "folder:PATH", "array:PATH" or
    "datasets:PATH". `diffusion.data.tfds` documents what TFDS needs, `diffusion.data.layout` how a folder is split and
    labelled, `diffusion.data.arrays` the files of arrays, and `diffusion.data.parquet` those of the Hugging Face Hub.

    Args:
      split: "train", "test", or another name or slice of TFDS ("train[:10%]"); for folders and arrays also "all", and
        "validation" if there is one.
      size: height and width of the images (one integer: both). None keeps their size, which must then be the same.
      crop: what to do with an image of another size. "center" scales it to cover `size` and cuts out the middle,
        "resize" scales both sides separately, "none" raises an error.
      channels: 1, 3, or 4, which keeps transparency (RGBA). None keeps 1 or 3 of a TFDS data set, and gives a folder 1
        if all its images are grey, else 3. With 1 and 3 transparent pixels are blended with white; 16-bit grey is
        scaled to 8 bits, the EXIF orientation is applied. Of arrays any number, that of the file, which needs to be
        said only where the last axis may be another one.
      data_dir: where TFDS keeps its data sets (default: TFDS_DATA_DIR, else ~/tensorflow_datasets).
      memory_limit: bytes. Pixels up to this limit are decoded into memory at once; more are decoded when indexed.
      class_names_in: of a folder: "folders"; "names", as "airplane" in airplane_00001.png; "none", for no classes.
      bad_files: of a folder: what to do with files that cannot be read. "raise" an error that names them, or "skip" up
        to one image of twenty, which are listed in `Source.opened`.
      cache_dir: where to remember which files of a folder were checked, so that they are not read again at the next
        start. None remembers nothing.
      progress: called now and then while files are read or checked: what is done, images done so far, all images.
      value_range: of arrays: the smallest and the largest value that there can be. None is 0 to 255 of uint8; any other
        type needs it.

    Raises:
      ValueError: unknown name or split, images that differ in size or cannot be read, labels out of range, classes that
        only a held-out split has, arrays whose range is missing or exceeded.
      OSError: nothing at this path, or a TFDS data set that is not prepared; the message gives the commands.
    """
    size = _size(size)
    if crop not in CROPS:
        raise ValueError(f"crop={crop!r} is not one of {CROPS}")
    is_array = isinstance(name, str) and name.startswith("array:")
    if channels not in (None, 1, 3, 4) and not (is_array and isinstance(channels, int) and channels > 0):
        raise ValueError(f"channels={channels!r} must be 1, 3, 4 or None; of array:PATH any number")
    if class_names_in not in CLASS_NAMES_IN:
        raise ValueError(f"class_names_in={class_names_in!r} is not one of {CLASS_NAMES_IN}")
    if bad_files not in BAD_FILES:
        raise ValueError(f"bad_files={bad_files!r} is not one of {BAD_FILES}")
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"name={name!r} must be 'mnist5k', the name of a TFDS data set, 'folder:PATH', 'array:PATH' or "
            "'datasets:PATH'"
        )
    if value_range is not None and not is_array:
        raise ValueError(f"value_range={tuple(value_range)} is for array:PATH; leave it at None for {name}, 0 to 255")
    if name.startswith("folder:"):
        from diffusion.data import folder

        options = folder.Options(class_names_in, bad_files, cache_dir, progress)
        return folder.load(name, split, size, crop, channels, memory_limit, options)
    for field, value, default in (("class_names_in", class_names_in, "folders"), ("bad_files", bad_files, "raise")):
        if value != default:
            raise ValueError(f"{field}={value!r} is for folder:PATH; leave it at {default!r} for {name}")
    if name.startswith("datasets:"):
        from diffusion.data import parquet

        return parquet.load(name, split, size, crop, channels, memory_limit, progress)
    if is_array:
        from diffusion.data import arrays

        return arrays.load(name, split, size, channels, value_range, progress)
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
