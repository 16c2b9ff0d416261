"""Images to train on when none are given, and a grid of images as a PNG; neither needs more than NumPy."""

import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from diffusion.io.files import atomic_write

KINDS = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue")
PATCH_SIZE = 4  # of the network that is trained on them
NUM_CLASSES = len(KINDS) * len(COLOURS)  # label = kind * 3 + colour


def load(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Images uint8 [N, H, W, 3] and labels int32 [N], or None, of an npz file: its arr_0 and arr_1.

    Raises:
      ValueError: the file is no npz, or its arr_0 is not such an array, or its labels do not fit.
    """
    if not Path(path).is_file():
        raise ValueError(f"--images={path}: there is no such file")
    try:
        with np.load(path) as file:
            images, labels = file["arr_0"], file.get("arr_1")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as e:
        why = "it is no npz file, or holds objects" if "allow_pickle" in str(e) else e
        raise ValueError(f"--images={path}: no npz file with an array arr_0 can be read there ({why})") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(f"--images={path}: arr_0 must be uint8 [N, H, W, 3], not {images.dtype} {images.shape}")
    if any(side % PATCH_SIZE for side in images.shape[1:3]):
        sides = "x".join(map(str, images.shape[1:3]))
        raise ValueError(f"--images={path}: sides must be multiples of {PATCH_SIZE}, the patch size, not {sides}")
    if labels is not None:
        given = f"--images={path}: arr_1 must be {len(images)} integers from 0 on, the labels, not"
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{given} {labels.dtype} {labels.shape}")
        if labels.min() < 0:
            raise ValueError(f"{given} {labels.min()}")
    return images, None if labels is None else labels.astype(np.int32)


def made(count: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Coloured shapes on shaded grounds, uint8 [N, size, size, 3], and labels int32 [N] of shape and colour."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, NUM_CLASSES, count).astype(np.int32)
    images = np.empty((count, size, size, 3), np.uint8)
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    y, x = axis[None, :, None], axis[None, None, :]
    for start in range(0, count, 512):
        kind, colour = labels[start : start + 512] // len(COLOURS), labels[start : start + 512] % len(COLOURS)
        n = len(kind)
        column = lambda low, high, n=n: rng.uniform(low, high, (n, 1, 1))  # noqa: E731
        radius = column(0.3, 0.6)
        u, v = x - column(-0.35, 0.35), y - column(-0.35, 0.35)
        # Distances to the edge, positive inside, of a circle, a square and a triangle that points up.
        square = radius * 0.9 - np.maximum(abs(u), abs(v))
        triangle = np.minimum(radius * 0.75 - v, (radius + v * 1.0) / 2 - abs(u) * 0.87)
        inside = np.choose(kind[:, None, None], [radius - np.hypot(u, v), square, triangle])
        cover = np.clip(inside * size / 2 + 0.5, 0, 1)[..., None]
        paint = rng.uniform(0.0, 0.35, (n, 3))
        paint[np.arange(n), colour] = rng.uniform(0.75, 1, n)
        light = 0.85 + 0.3 * (u * rng.uniform(-1, 1, (n, 1, 1)) + v * rng.uniform(-1, 1, (n, 1, 1)))[..., None]
        ground = rng.uniform(0.35, 0.95, (n, 1, 1, 3)) * (1 + 0.15 * (y * column(-1, 1)))[..., None]
        image = cover * paint[:, None, None] * light + (1 - cover) * ground
        images[start : start + 512] = np.round(np.clip(image, 0, 1) * 255)
    return images, labels


def save_grid(path: Path, images: np.ndarray, columns: int, gap: int = 2) -> None:
    """Writes uint8 images [N, H, W, 3] as one PNG with so many columns."""
    n, h, w, _ = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        canvas[top : top + h, left : left + w] = image
    atomic_write(path, lambda file: file.write(png(canvas)))


def png(image: np.ndarray) -> bytes:
    """An RGB image uint8 [H, W, 3] in the PNG format (8 bits, no filter)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = image.shape
    lines = b"".join(b"\0" + line.tobytes() for line in np.ascontiguousarray(image))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
