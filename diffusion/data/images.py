"""Decodes images (PNG, JPEG, WebP, ...) to uint8 [N, H, W, C], in memory or on demand.

An `Encoded` knows where the bytes come from. Each image is rotated upright (EXIF), blended with white where it is
transparent, converted to 1 or 3 channels (or to 4, which keep its transparency), and then brought to one size. `decode`
does this at once for all images, or, if they exceed a limit, for those that are indexed. What is no pixel (EXIF, texts,
profiles) and cannot be read is left out; the image is then not rotated.
"""

import functools
import io
import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

T = TypeVar("T")

SAMPLED = 16  # images that tell their sizes and how many bits their values have
WORKERS = min(8, os.cpu_count() or 1) + 1  # one waits for Python's lock, or for a file
CHUNK = 8  # images of a task: few, so that the threads end together
# What Pillow opens and has no pixels of its own: drawings, tables, films.
NO_IMAGES = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF")
ORIENTATION = 0x0112  # the EXIF tag
# The transposition that rotates an image of each orientation upright, from the definition of the tag.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Progress = Callable[[str, int, int], None]  # called with what is done, the images done so far, and all


class Encoded(NamedTuple):
    """N encoded images of a data set: `read` gives the bytes of some, `describe` names one of them in messages.

    `remedy` says what to do about images that cannot be read.
    """

    name: str
    n: int
    read: Callable[[Sequence[int]], list[bytes]]
    describe: Callable[[int], str]
    remedy: str = "Repair or remove them"


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
        return self.read(self._order[indices])

    def read(self, picked: np.ndarray, progress: Progress | None = None) -> np.ndarray:
        """The images `picked`, integers [*S]: uint8 [*S, H, W, C]."""
        _, *size, channels = self.shape
        x, ids = np.empty((picked.size, *self.shape[1:]), np.uint8), picked.ravel().tolist()

        def write(row: int, data: bytes) -> None:
            x[row] = _decode(data, tuple(size), self._crop, channels)

        bad = _each(self._encoded, ids, write, progress)
        refuse(self._encoded, [Bad(ids[row], why) for row, why in bad], len(ids))
        return x.reshape(*picked.shape, *self.shape[1:])


def decode(
    encoded: Encoded,
    size: tuple[int, int],
    crop: str,
    channels: int,
    memory_limit: int,
    progress: Progress | None = None,
) -> np.ndarray | OnDemand:
    """The images as uint8 [N, H, W, C], decoded now if that takes at most `memory_limit` bytes, else when indexed.

    Raises:
      ValueError: images that cannot be read, or have another size while `crop` is "none".
    """
    on_demand = OnDemand(encoded, size, crop, channels)
    if np.prod(on_demand.shape, dtype=object) > memory_limit:
        return on_demand
    return on_demand.read(np.arange(encoded.n), progress)


def headers(encoded: Encoded) -> list[Header]:
    """The header of every image."""
    found, bad = inspect(encoded, range(encoded.n))
    refuse(encoded, bad, encoded.n)
    return found


class Bad(NamedTuple):
    """An image that cannot be read: its number, and why."""

    index: int
    reason: str


def inspect(
    encoded: Encoded, ids: Sequence[int], *, whole: bool = False, progress: Progress | None = None
) -> tuple[list[Header | None], list[Bad]]:
    """The headers of the images `ids`, and those that cannot be read, whose header is None.

    `whole` also decodes each image, a JPEG at an eighth of its size: what passes, `decode` can read.
    """
    found: list[Header | None] = [None] * len(ids)

    def write(row: int, data: bytes) -> None:
        found[row] = _whole(data) if whole else _header(data)

    bad = _each(encoded, ids, write, progress, "checking images")
    return found, [Bad(ids[row], why) for row, why in bad]


def refuse(encoded: Encoded, bad: Sequence[Bad], n: int, remedy: str | None = None) -> None:
    """Raises a ValueError that names the first five of the bad images among n, if there are any."""
    if bad:
        shown = "; ".join(described(encoded, bad[:5]))
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            f"cannot read {len(bad)} of {n} images of {encoded.name}: {shown}{more}. {remedy or encoded.remedy}"
        )


def described(encoded: Encoded, bad: Sequence[Bad]) -> list[str]:
    """Each of these images and why it cannot be read."""
    return [f"{encoded.describe(i)} ({why})" for i, why in bad]


def notes(encoded: Encoded, size: tuple[int, int], crop: str) -> tuple[str, ...]:
    """What to know of how some of the images are read: that they are scaled to `size`, that 16-bit images are dark."""
    ids = np.unique(np.linspace(0, encoded.n - 1, min(encoded.n, SAMPLED)).astype(int)).tolist()
    sizes: list[tuple[int, int]] = []
    most: list[int] = []

    def write(row: int, data: bytes) -> None:
        sizes.append(_header(data)[:2])
        image = Image.open(io.BytesIO(data))
        if image.mode.startswith("I"):
            most.append(int(np.asarray(image).max()))

    _each(encoded, ids, write)  # those that cannot be read are named elsewhere
    return (*_scaled_note(set(sizes), size, crop), *_depth_note(most))


def _scaled_note(sizes: set[tuple[int, int]], size: tuple[int, int], crop: str) -> tuple[str, ...]:
    if sizes <= {size}:
        return ()
    found = " to ".join(f"{h}x{w}" for h, w in sorted({min(sizes), max(sizes)}))
    how = "scaled, and cropped at the center" if crop == "center" else "scaled, each axis by itself"
    return (f"images of {found} are {how}, to {size[0]}x{size[1]}",)


def _depth_note(most: Sequence[int]) -> tuple[str, ...]:
    """A note if 16-bit images, of which these are the largest values, hold 12 bits or less, and so are nearly black."""
    if not most or not 0 < max(most) < 1 << 12:
        return ()
    return (
        f"16-bit images are scaled from 0 .. 65535, but of {len(most)} of them the largest value is {max(most)}, so "
        f"they are nearly black: multiply them by {(1 << 16) // (1 << max(most).bit_length())}, or save them as an "
        f'array and state its range, --config.data.range="(0, {(1 << max(most).bit_length()) - 1})"',
    )


@functools.cache
def suffixes() -> frozenset[str]:
    """The suffixes of the images that Pillow reads here, ".png", ".jpg", ..., in lower case."""
    Image.init()
    return frozenset(
        suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in NO_IMAGES
    )


def common_size(encoded: Encoded, headers: Sequence[Header]) -> tuple[int, int]:
    """(height, width) of all images, or a ValueError that names two of different size."""
    first = headers[0][:2]
    for i, header in enumerate(headers):
        if header[:2] != first:
            heights, widths = sorted(h.height for h in headers), sorted(h.width for h in headers)
            raise ValueError(
                f"images of {encoded.name} differ in size: {encoded.describe(0)} is {first[0]}x{first[1]}, "
                f"{encoded.describe(i)} is {header.height}x{header.width}; heights are {heights[0]} to {heights[-1]} "
                f"(median {heights[len(heights) // 2]}), widths {widths[0]} to {widths[-1]} (median "
                f"{widths[len(widths) // 2]}). Set one size: "
                '--config.data.size="(64, 64)", with --config.data.crop=center '
                "or resize"
            )
    return first


def reason(error: Exception) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    text = str(error).split("\n")[0]
    return "not an image format that Pillow reads" if "cannot identify image" in text else text or type(error).__name__


def _each(
    encoded: Encoded,
    ids: Sequence[int],
    use: Callable[[int, bytes], None],
    progress: Progress | None = None,
    what: str = "reading images",
) -> list[tuple[int, str]]:
    """Calls use(row, bytes of image ids[row]) for every row, on threads; the rows for which it failed, and why."""
    bad: list[tuple[int, str]] = []
    chunk = max(1, min(CHUNK, -(-len(ids) // WORKERS)))

    def tried(rows: Sequence[int]) -> None:
        try:
            found = encoded.read([ids[row] for row in rows])
        except OSError as error:  # of a file: the others can be read
            if len(rows) > 1:
                for row in rows:
                    tried([row])
            else:
                bad.append((rows[0], reason(error)))
            return
        for row, data in zip(rows, found, strict=True):
            try:
                use(row, data)
            except Exception as error:
                bad.append((row, reason(error)))

    starts = range(0, len(ids), chunk)
    with ThreadPoolExecutor(WORKERS) as pool:
        parts = (range(start, min(start + chunk, len(ids))) for start in starts)
        # If interrupted, `map` cancels the parts that have not begun.
        for start, _ in zip(starts, pool.map(tried, parts), strict=True):
            if progress:
                progress(what, min(start + chunk, len(ids)), len(ids))
    return sorted(bad)


def _or_pixels_alone(use: Callable[[bytes], T], data: bytes) -> T:
    """use(data), or, where that fails and the image has anything beside pixels, use(what is needed for pixels)."""
    try:
        return use(data)
    except Exception:
        alone = _pixels_alone(data)
        if alone is None:
            raise
        return use(alone)


def _pixels_alone(data: bytes) -> bytes | None:
    """A PNG or JPEG without texts, EXIF and profiles; None if it has none, or is of another format."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        kept, at = [data[:8]], 8
        while at + 12 <= len(data):
            end = at + 12 + struct.unpack_from(">I", data, at)[0]
            if data[at + 4 : at + 8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
                kept.append(data[at:end])
            at = end
    elif data[:2] == b"\xff\xd8":
        kept, at = [data[:2]], 2
        while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
            marker, end = data[at + 1], at + 2 + struct.unpack_from(">H", data, at + 2)[0]
            # APP0 is JFIF, APP14 says how the colours are stored; the other APPn and comments are no pixels.
            if not (0xE1 <= marker <= 0xEF or marker == 0xFE) or marker == 0xEE:
                kept.append(data[at:end])
            if marker == 0xDA:  # the scan, up to the end of the file
                kept[-1], at = data[at:], len(data)
            else:
                at = end
    else:
        return None
    alone = b"".join(kept)
    return alone if len(alone) < len(data) else None


def _decode(data: bytes, size: tuple[int, int], crop: str, channels: int) -> np.ndarray:
    """uint8 [H, W, C] of an encoded image, upright and brought to `size`."""
    # A JPEG decodes at 1/2, 1/4 or 1/8 of its size at no cost; keep twice the pixels that `resize` needs.
    enough = None if crop == "none" else 2 * max(size)
    image = _plain(_or_pixels_alone(functools.partial(_upright, enough=enough), data), channels)
    width, height = image.size
    if (height, width) != size:
        box = (0.0, 0.0, width, height)
        if crop == "none":
            raise ValueError(f"it is {height}x{width}, not {size[0]}x{size[1]}, and crop is 'none'")
        if crop == "center":
            scale = min(width / size[1], height / size[0])
            left, top = (max(whole - scale * part, 0) / 2 for whole, part in ((width, size[1]), (height, size[0])))
            box = (left, top, width - left, height - top)
        image = image.resize(size[::-1], Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    return np.asarray(image, np.uint8).reshape(*size, channels)


def _upright(data: bytes, enough: int | None) -> Image.Image:
    """The decoded image, rotated as its EXIF orientation says; of a JPEG `enough` pixels in both directions will do."""
    image = Image.open(io.BytesIO(data))
    if enough is not None:
        image.draft(None, (enough, enough))
    image.load()
    how = UPRIGHT.get(_orientation(image))
    return image if how is None else image.transpose(how)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, where there is none or it cannot be read."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
        return value if value in UPRIGHT else 1
    except Exception:  # damaged EXIF raises many types
        return 1


def _plain(image: Image.Image, channels: int) -> Image.Image:
    """The image in mode "L" (1 channel), "RGB" (3) or "RGBA" (4)."""
    if image.mode == "F":  # Pillow would clip them to 0 .. 255, and leave a black image of values in [0, 1]
        raise ValueError("its pixels are floating-point numbers of unknown range: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255 instead of scaling
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    if channels == 4:
        return image.convert("RGBA")
    if image.mode == {1: "L", 3: "RGB"}[channels] and not image.has_transparency_data:
        return image  # which `convert` would copy
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _header(data: bytes) -> Header:
    """The header of an encoded image."""

    def read(data: bytes) -> Header:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if _orientation(image) >= 5:  # these are rotated by 90 degrees
                width, height = height, width
            return Header(height, width, image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I"))

    return _or_pixels_alone(read, data)


def _whole(data: bytes) -> Header:
    """The header of an image that was decoded as `_decode` does, but for its size."""

    def check(data: bytes) -> Header:
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "PNG":
                image.verify()  # the checksums too, which decoding does not look at
        _plain(_upright(data, 1), 3)  # of a JPEG all bytes are read, and an eighth of the pixels computed
        return _header(data)

    return _or_pixels_alone(check, data)
