"""Encoded pictures (PNG, JPEG, WebP, ...) to uint8 [N, H, W, C], in memory or on demand.

Where the bytes come from is the business of an `Encoded`. A picture is turned upright (EXIF), freed of transparency,
brought to 1 or 3 channels and then to one size; `images` does this at once for all pictures, or for those that are
asked for when all would exceed a limit.
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
    """N encoded pictures of a data set: `read` gives the bytes of some, `describe` names one in messages."""

    name: str
    n: int
    read: Callable[[Sequence[int]], list[bytes]]
    describe: Callable[[int], str]


class Header(NamedTuple):
    """Upright size of a picture, and whether it is grey."""

    height: int
    width: int
    grey: bool


class OnDemand:
    """Pictures decoded when indexed: `images[indices]` is uint8 [B, H, W, C], as of an array."""

    def __init__(self, encoded: Encoded, size: tuple[int, int], crop: str, channels: int):
        self.shape = (encoded.n, *size, channels)
        self._encoded, self._crop, self._order = encoded, crop, np.arange(encoded.n)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices) -> np.ndarray:
        _, *size, channels = self.shape
        picked = self._order[indices]
        x = np.empty((picked.size, *self.shape[1:]), np.uint8)

        def decode(row: int, data: bytes) -> None:
            x[row] = _decode(data, tuple(size), self._crop, channels)

        _each(self._encoded, picked.ravel().tolist(), decode)
        return x.reshape(*picked.shape, *self.shape[1:])


def images(
    encoded: Encoded, size: tuple[int, int], crop: str, channels: int, memory_limit: int
) -> np.ndarray | OnDemand:
    """The pictures as uint8 [N, H, W, C], decoded now if that takes no more than `memory_limit` bytes.

    Raises:
      ValueError: pictures that cannot be read, or have another size where `crop` is "none".
    """
    on_demand = OnDemand(encoded, size, crop, channels)
    return on_demand if np.prod(on_demand.shape, dtype=object) > memory_limit else on_demand[:]


def headers(encoded: Encoded) -> list[Header]:
    """The header of every picture."""
    found: list[Header | None] = [None] * encoded.n

    def look(i: int, data: bytes) -> None:
        found[i] = _header(data)

    _each(encoded, range(encoded.n), look)
    return found


def common_size(encoded: Encoded, headers: Sequence[Header]) -> tuple[int, int]:
    """(height, width) of all pictures, or ValueError naming two that differ."""
    first = headers[0][:2]
    for i, header in enumerate(headers):
        if header[:2] != first:
            raise ValueError(
                f"pictures of {encoded.name} differ in size: {encoded.describe(0)} is {first[0]}x{first[1]}, "
                f"{encoded.describe(i)} is {header.height}x{header.width}. Set one size: --config.data.size=64, "
                "with --config.data.crop=center or resize"
            )
    return first


def verify(encoded: Encoded) -> None:
    """Raises ValueError naming the files that are no pictures or that end too early, much faster than decoding all."""
    _each(encoded, range(encoded.n), lambda _, data: _verify(data))


def reason(error: Exception) -> str:
    """The first line of an error's message, or its type where there is none."""
    text = str(error).split("\n")[0]
    return "not a picture that Pillow knows" if "cannot identify image" in text else text or type(error).__name__


def _each(encoded: Encoded, ids: Sequence[int], use: Callable[[int, bytes], None]) -> None:
    """Calls use(row, bytes of picture ids[row]) for every row, on a few threads.

    Raises:
      ValueError: it failed for some, with the names of the first five of them.
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
        list(pool.map(part, range(0, len(ids), chunk)))  # if interrupted, `map` cancels what has not begun
    if bad:
        shown = "; ".join(text for _, text in sorted(bad)[:5])
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            f"cannot read {len(bad)} of {len(ids)} pictures of {encoded.name}: {shown}{more}. Repair or remove them"
        )


def _decode(data: bytes, size: tuple[int, int], crop: str, channels: int) -> np.ndarray:
    """uint8 [H, W, C] of an encoded picture, upright and brought to `size`."""
    with Image.open(io.BytesIO(data)) as picture:
        if crop != "none":
            # JPEG decodes at 1/2, 1/4 or 1/8 for free; keep twice the pixels that the filter below will ask for.
            picture.draft(None, (2 * max(size), 2 * max(size)))
        picture = _plain(ImageOps.exif_transpose(picture), channels)
        width, height = picture.size
        if (height, width) != size:
            box = (0.0, 0.0, width, height)
            if crop == "none":
                raise ValueError(f"it is {height}x{width}, not {size[0]}x{size[1]}, and crop is 'none'")
            if crop == "center":
                scale = min(width / size[1], height / size[0])
                left, top = (width - scale * size[1]) / 2, (height - scale * size[0]) / 2
                box = (left, top, width - left, height - top)
            picture = picture.resize(size[::-1], Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
        return np.asarray(picture, np.uint8).reshape(*size, channels)


def _plain(picture: Image.Image, channels: int) -> Image.Image:
    """The picture in mode "L" (1 channel) or "RGB" (3)."""
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion cuts at 255 instead of scaling
        wide = np.asarray(picture).astype(np.int64).clip(0, 65535)
        picture = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("L" if channels == 1 else "RGB")


def _header(data: bytes) -> Header:
    with Image.open(io.BytesIO(data)) as picture:
        width, height = picture.size
        if picture.getexif().get(0x0112, 1) >= 5:  # orientations 5 to 8 lie on their side
            width, height = height, width
        return Header(height, width, picture.mode in ("1", "L", "LA") or picture.mode.startswith("I"))


def _verify(data: bytes) -> None:
    _header(data)  # of which the orientation will be needed
    with Image.open(io.BytesIO(data)) as picture:
        if picture.format == "PNG":
            picture.verify()
        # A JPEG has no checksums: one with its end marker is taken as whole.
        elif picture.format != "JPEG" or b"\xff\xd9" not in data[-4096:]:
            picture.load()
