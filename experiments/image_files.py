"""Images out of arrays: grids, film strips, animations. uint8 [N, H, W, C] in, files out, written atomically."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion.io.files import atomic_write

# Small images are enlarged until they reach this many pixels, so that a grid of digits can be looked at.
_READABLE = 56


def grid(images: np.ndarray, columns: int, *, gap: int = 2, background: int = 255) -> Image.Image:
    """Images [N, H, W, C] in rows of `columns`: of more than three channels the first three, of two the first."""
    images = images[..., : 3 if images.shape[-1] >= 3 else 1]
    n, h, w, c = images.shape
    scale = max(1, _READABLE // max(h, w))
    images = images.repeat(scale, 1).repeat(scale, 2)
    h, w = h * scale, w * scale
    rows = -(-n // columns)
    canvas = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), background, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        canvas[top : top + h, left : left + w] = image
    return Image.fromarray(canvas[..., 0] if c == 1 else canvas)


def strip(frames: np.ndarray) -> Image.Image:
    """Frames [K, N, H, W, C] as N rows that read from noise on the left to image on the right."""
    k, n = frames.shape[:2]
    return grid(frames.swapaxes(0, 1).reshape(n * k, *frames.shape[2:]), k)


def save(path: Path, image: Image.Image) -> None:
    """Writes an image in the format of the path's suffix."""
    atomic_write(path, lambda file: image.save(file, format=path.suffix[1:].upper()))


def save_animation(path: Path, frames: Sequence[Image.Image], *, milliseconds: int = 80, hold: int = 1500) -> None:
    """Writes frames as a looping GIF or WebP that rests on the last one."""
    durations = [milliseconds] * (len(frames) - 1) + [hold]
    # Pillow's optimised GIFs drop grey levels that a frame does not use, and then mix up those of its neighbours.
    options = {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0, "optimize": False}
    atomic_write(path, lambda file: frames[0].save(file, format=path.suffix[1:].upper(), **options))


def save_npz(path: Path, images: np.ndarray, labels: np.ndarray | None) -> None:
    """Writes arr_0 [N, ...] and, if any, labels arr_1 [N]: the layout of guided-diffusion's evaluator."""
    atomic_write(path, lambda file: np.savez(file, *(a for a in (images, labels) if a is not None)))


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Images arr_0 [N, ...] and labels arr_1 [N], or None where the file has none.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds no arr_0, or is not an npz.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; experiments.train and experiments.sample write samples.npz")
    try:
        with zipfile.ZipFile(path), np.load(path) as arrays:  # the first because NumPy leaves what is no zip open
            found = {name: np.atleast_1d(arrays[name]) for name in arrays.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(f"{path} is not a whole npz file: {e}") from e
    if "arr_0" not in found:
        raise ValueError(f"{path} holds {sorted(found)}, but no arr_0, the images")
    return found["arr_0"], found.get("arr_1")
