"""What is looked at of arrays [N, *S, C] of any type: uint8 images [N, H, W, C] with one or three channels.

Of images themselves these are the first three channels, or the first one; of volumes their middle slice, of sequences
curves. Values of other types than uint8 are scaled, so that their range becomes 0 .. 255.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from diffusion.data import Source
from diffusion.data.values import KINDS, PLAIN, is_plain

ROWS = 64  # height of a curve, in pixels
WIDEST = 256  # of a curve; of longer sequences each column shows all values of a stretch


def as_images(values: np.ndarray, value_range: tuple[float, float] = PLAIN) -> np.ndarray:
    """uint8 images [N, H, W, 1 or 3] of arrays [N, H, W, C], [N, L, C] or [N, D, H, W, C] with values in this range."""
    x = eight_bit(values, value_range)
    shown = x[..., : 3 if x.shape[-1] >= 3 else 1]
    if x.ndim == 3:
        return curves(x[..., :3])
    return shown[:, shown.shape[1] // 2] if x.ndim == 5 else shown


def eight_bit(values: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """The values as uint8, with their range scaled to 0 .. 255; what lies outside is clipped, and NaN is 0."""
    if is_plain(values.dtype, value_range):
        return values
    return np.rint(np.nan_to_num(np.clip(scaled(values, value_range), 0, 255))).astype(np.uint8)


def scaled(values: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """The values with their range scaled to 0 .. 255: uint8 in that range as they are, others as float64."""
    if is_plain(values.dtype, value_range):
        return values
    first, last = value_range
    return (values.astype(np.float64) - first) / (last - first) * 255


def curves(x: np.ndarray) -> np.ndarray:
    """Curves, white on black, of sequences uint8 [N, L, C], C up to 3: [N, ROWS, W, 1 or 3], a colour per channel."""
    n, length, c = x.shape
    starts = np.linspace(0, length, min(length, WIDEST), endpoint=False).astype(int)
    # A column reaches to the first value of the next one, so that curves have no gaps.
    after = x[:, np.minimum(np.append(starts[1:], length), length - 1)]
    least = np.minimum(np.minimum.reduceat(x, starts, 1), after)
    most = np.maximum(np.maximum.reduceat(x, starts, 1), after)
    top, bottom = ((ROWS - 1) - edge.astype(int) * (ROWS - 1) // 255 for edge in (most, least))
    rows = np.arange(ROWS)[:, None, None]
    drawn = np.where((rows >= top[:, None]) & (rows <= bottom[:, None]), 255, 0).astype(np.uint8)
    return drawn if c != 2 else np.concatenate([drawn, np.zeros_like(drawn[..., :1])], -1)


def note(shape: tuple[int, ...]) -> str | None:
    """What images of arrays of `shape` [*S, C] show of them, in words; None if it is all."""
    *size, c = shape
    if len(size) == 1:
        colours = ", ".join(("red", "green", "blue")[:c])
        words = ["curves" if c == 1 else f"curves of {'all' if c <= 3 else 'the first 3 of'} {c} channels ({colours})"]
    else:
        words = ["the middle slice of each volume"] if len(size) == 3 else []
        if c not in (1, 3):
            words.append(f"the first {'3' if c > 3 else '1'} of {c} channels")
    return ", ".join(words) or None


class Converted:
    """Arrays of a source, converted by `eight_bit` or `scaled` when indexed."""

    def __init__(self, source: Source, convert: Callable[[np.ndarray, tuple[float, float]], np.ndarray]):
        self.shape, self.dtype = source.images.shape, np.dtype(np.uint8 if convert is eight_bit else np.float64)
        self._images, self._range, self._convert = source.images, source.value_range, convert

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Any) -> np.ndarray:
        return self._convert(self._images[indices], self._range)


def converted(source: Source, convert: Callable[[np.ndarray, tuple[float, float]], np.ndarray]) -> Source:
    """The source with images converted by `eight_bit`, in which features measure them, or by `scaled`."""
    if is_plain(source.dtype, source.value_range):
        return source
    return source._replace(images=Converted(source, convert), value_range=PLAIN)


def kind(shape: tuple[int, ...]) -> str:
    """Whether arrays of `shape` [*S, C] are "images", "sequences" or "volumes"."""
    return KINDS[len(shape) - 1]
