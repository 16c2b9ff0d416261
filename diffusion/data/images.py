"""Decodes images (PNG, JPEG, WebP, ...) to uint8 [N, H, W, C], in memory or on demand.

An `Encoded` knows where the bytes come from. Each image is rotated upright (EXIF), blended with white where it is
transparent, converted to 1 or 3 channels, and then brought to one size. `decode` does this at once for all images, or,
if they exceed a limit, for those that are indexed.
"""

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

WORKERS = min(8, os.cpu_count() or 1)


class Encoded(NamedTuple):
    """N encoded images of a data set: `read` gives the bytes of some, `describe` names one of them in messages."""

    name: str
    n: int
    read: Callable[[Sequence[int]], list[bytes]]
    describe: Callable[[int], str]


class Header(NamedTuple):
    """Upright size of an image, and whether it is grey."""

    height: int
    width: int
    grey: bool


class OnDemand:
    """Images decoded when indexed: `images[indices]` is uint8 [B, H, W, C], as for an array."""

    def __init__(self, encoded: Encoded, size: tuple[int, int], crop: str, channels: int):
        self.shape = (encoded.n, *size, channels)
        self._encoded, self._crop, self._order = encoded, crop, np.arange(encoded.n)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices) -> np.ndarray:
        _, *size, channels = self.shape
        picked = self._order[indices]
        x = np.empty((picked.size, *self.shape[1:]), np.uint8)

        def write(row: int, data: bytes) -> None:
            x[row] = _decode(data, tuple(size), self._crop, channels)

        _each(self._encoded, picked.ravel().tolist(), write)
        return x.reshape(*picked.shape, *self.shape[1:])


def decode(
    encoded: Encoded, size: tuple[int, int], crop: str, channels: int, memory_limit: int
) -> np.ndarray | OnDemand:
    """The images as uint8 [N, H, W, C], decoded now if that takes at most `memory_limit` bytes, else when indexed.

    Raises:
      ValueError: images that cannot be read, or have another size while `crop` is "none".
    """
    on_demand = OnDemand(encoded, size, crop, channels)
    return on_demand if np.prod(on_demand.shape, dtype=object) > memory_limit else on_demand[:]


def headers(encoded: Encoded) -> list[Header]:
    """The header of every image."""
    found: list[Header | None] = [None] * encoded.n

    def write(i: int, data: bytes) -> None:
        found[i] = _header(data)

    _each(encoded, range(encoded.n), write)
    return found


def common_size(encoded: Encoded, headers: Sequence[Header]) -> tuple[int, int]:
    """(height, width) of all images, or a ValueError that names two of different size."""
    first = headers[0][:2]
    for i, header in enumerate(headers):
        if header[:2] != first:
            raise ValueError(
                f"images of {encoded.name} differ in size: {encoded.describe(0)} is {first[0]}x{first[1]}, "
                f"{encoded.describe(i)} is {header.height}x{header.width}. Set one size: --config.data.size=64, "
                "with --config.data.crop=center or resize"
            )
    return first


def verify(encoded: Encoded) -> None:
    """Raises a ValueError that names files that are no images or incomplete; much faster than decoding all."""
    _each(encoded, range(encoded.n), lambda _, data: _verify(data))


def reason(error: Exception) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    text = str(error).split("\n")[0]
    return "not an image format that Pillow reads" if "cannot identify image" in text else text or type(error).__name__


def _each(encoded: Encoded, ids: Sequence[int], use: Callable[[int, bytes], None]) -> None:
    """Calls use(row, bytes of image ids[row]) for every row, on a few threads.

    Raises:
      ValueError: it failed for some rows; the message names the first five of them.
    """
    bad: list[tuple[int, str]] = []
    chunk = max(1, min(64, -(-len(ids) // WORKERS)))

    def part(start: int) -> None:
        picked = ids[start : start + chunk]
        for row, data in enumerate(encoded.read(picked), start):
            try:
                use(row, data)
            except Exception as error:
                bad.append((row, f"{encoded.describe(ids[row])} ({reason(error)})"))

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(part, range(0, len(ids), chunk)))  # if interrupted, `map` cancels the parts that have not begun
    if bad:
        shown = "; ".join(text for _, text in sorted(bad)[:5])
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            f"cannot read {len(bad)} of {len(ids)} images of {encoded.name}: {shown}{more}. Repair or remove them"
        )


def _decode(data: bytes, size: tuple[int, int], crop: str, channels: int) -> np.ndarray:
    """uint8 [H, W, C] of an encoded image, upright and brought to `size`."""
    with Image.open(io.BytesIO(data)) as image:
        if crop != "none":
            # A JPEG decodes at 1/2, 1/4 or 1/8 of its size at no cost; keep twice the pixels that `resize` needs.
            image.draft(None, (2 * max(size), 2 * max(size)))
        image = _plain(ImageOps.exif_transpose(image), channels)
        width, height = image.size
        if (height, width) != size:
            box = (0.0, 0.0, width, height)
            if crop == "none":
                raise ValueError(f"it is {height}x{width}, not {size[0]}x{size[1]}, and crop is 'none'")
            if crop == "center":
                scale = min(width / size[1], height / size[0])
                left, top = (width - scale * size[1]) / 2, (height - scale * size[0]) / 2
                box = (left, top, width - left, height - top)
            image = image.resize(size[::-1], Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
        return np.asarray(image, np.uint8).reshape(*size, channels)


def _plain(image: Image.Image, channels: int) -> Image.Image:
    """The image in mode "L" (1 channel) or "RGB" (3)."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255 instead of scaling
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _header(data: bytes) -> Header:
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        if image.getexif().get(0x0112, 1) >= 5:  # orientations 5 to 8 are rotated by 90 degrees
            width, height = height, width
        return Header(height, width, image.mode in ("1", "L", "LA") or image.mode.startswith("I"))


def _verify(data: bytes) -> None:
    _header(data)  # reads the orientation too
    with Image.open(io.BytesIO(data)) as image:
        if image.format == "PNG":
            image.verify()
        # A JPEG has no checksums: it counts as complete if it has its end marker.
        elif image.format != "JPEG" or b"\xff\xd9" not in data[-4096:]:
            image.load()
