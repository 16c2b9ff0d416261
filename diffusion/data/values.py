"""What arrays may hold: shapes [N, *S, C] with 1, 2 or 3 spatial axes, and values with a stated range.

uint8 is 0 .. 255 unless another range is stated. Of every other type the range must be stated, since nothing in the
numbers tells it: the largest value of some images is not the largest one that a value can have.
"""

from collections.abc import Sequence

import numpy as np

PLAIN = (0.0, 255.0)  # the range of uint8 where none is stated
FLAG = "--config.data.range"
# What stands between the first and the last axis of an array, by the number of axes there.
KINDS = {1: "sequences", 2: "images", 3: "volumes"}
# Integers beyond it are not exact in float32, in which all is computed.
EXACT = 2**24
OFFSET = 2**12  # values that are so many times their range have 12 bits left of float32's 24
CHANNELS = 4  # more channels than this, where they may be a spatial axis, must be confirmed


def is_plain(dtype: np.dtype | str, value_range: Sequence[float]) -> bool:
    """Whether values are those of ordinary images: uint8 in 0 .. 255."""
    return np.dtype(dtype) == np.uint8 and tuple(value_range) == PLAIN


def check_shape(owner: str, shape: Sequence[int], channels: int | None = None, flag: str = "channels") -> None:
    """Raises ValueError unless `shape` is [N, *S, C] with 1 to 3 spatial axes and, where given, C = `channels`.

    A last axis that may be a spatial one, as in images [N, H, W] without channels, must be confirmed by `channels`;
    `flag` is its name in the message. Such are more than 4 channels of sequences, and more than 4 where the axis before
    has the same length.
    """
    shape = tuple(shape)
    if len(shape) not in (3, 4, 5) or not np.prod(shape, dtype=object):
        remedy = "; a single channel is an axis too: array[..., None]" if len(shape) == 2 else ""
        raise ValueError(
            f"{owner} must have shape [N, L, C], [N, H, W, C] or [N, D, H, W, C] with N >= 1, not {shape}{remedy}"
        )
    *_, before, c = shape
    if channels is not None:
        if c != channels:
            raise ValueError(f"{flag}={channels}, but {owner} have {c} channels, the last axis of {shape}")
        return
    first = len(shape) > 3 and c > CHANNELS and shape[1] in (1, 3, 4)  # channels may come first
    if (len(shape) == 3 and (c > CHANNELS or c == before > 1)) or c == before > CHANNELS or first:
        names = {3: "[N, H, W]", 4: "[N, D, H, W]", 5: "[N, C, D, H, W]"}[len(shape)]
        first = "" if len(shape) == 3 else ", or np.moveaxis(images, 1, -1) where channels come first"
        raise ValueError(
            f"{owner} have shape {shape}: are the last {c} values channels? If this is {names}, add a channel axis: "
            f"pass images[..., None]{first}; if it is [N, *S, C], say so: {flag}={c}"
        )


def checked_range(
    owner: str, sample: np.ndarray, value_range: Sequence[float] | None, flag: str
) -> tuple[float, float]:
    """The smallest and the largest value of arrays like `sample`, some of them: as stated, or 0 and 255 of uint8.

    Raises:
      TypeError: they are no numbers that can be read.
      ValueError: the range is missing, or no range, or integers are too large for float32.
    """
    dtype = sample.dtype
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        remedy = ": pass array.astype(np.uint8), in the range (0, 1)" if dtype.kind == "b" else ""
        raise TypeError(f"{owner} are {dtype}, but must be integers or floats of at most 64 bits{remedy}")
    if value_range is None:
        if dtype == np.uint8:
            return PLAIN
        raise ValueError(
            f"{owner} are {dtype}, of unknown range: in a sample the smallest is {sample.min()} and the largest "
            f"{sample.max()}. State the smallest and the largest value that there can be: {_stated(flag, sample)}"
        )
    first, last = (float(value) for value in value_range) if len(value_range) == 2 else (0.0, 0.0)
    if not -np.inf < first < last < np.inf:
        raise ValueError(
            f"{flag}={tuple(value_range)} must be the smallest and the largest value, as in {_stated(flag, sample)}"
        )
    if dtype.kind != "f" and max(abs(first), abs(last)) > EXACT:
        raise ValueError(
            f"{flag}={tuple(value_range)}: {owner} are {dtype}, and integers beyond {EXACT:,} are not exact in "
            "float32: save them as float32, scaled to [0, 1]"
        )
    if dtype.itemsize > 4 and dtype.kind == "f" and max(abs(first), abs(last)) > OFFSET * (last - first):
        raise ValueError(
            f"{flag}={tuple(value_range)}: {owner} are {dtype}, and float32, which all is computed in, cannot tell "
            "such values apart: subtract the smallest, and save them as float32"
        )
    if dtype.kind != "f" and not (first.is_integer() and last.is_integer()):
        raise ValueError(f"{flag}={tuple(value_range)} must be integers, as {owner} are {dtype}")
    info = np.iinfo(dtype) if dtype.kind != "f" else np.finfo(dtype)
    if first < info.min or last > info.max:
        raise ValueError(f"{flag}={tuple(value_range)} is more than {dtype} can hold: {info.min} to {info.max}")
    return first, last


def check_values(owner: str, x: np.ndarray, value_range: tuple[float, float], flag: str) -> None:
    """Raises ValueError if some of the values x [B, ...] lie outside the range, or are NaN."""
    if is_plain(x.dtype, value_range):
        return
    first, last = value_range
    least, most = x.min(initial=last), x.max(initial=first)  # NaN, where there is one
    if first <= least and most <= last:
        return
    if np.isnan(least):
        count = int(np.isnan(x).sum())
        raise ValueError(f"{owner} hold NaN, {count} in {len(x)} arrays: replace them, or leave such arrays out")
    raise ValueError(
        f"{owner} hold values from {least} to {most}, outside the stated range {first:g} to {last:g}: state one that "
        f"holds them all, {flag}, or clip them with np.clip"
    )


def span_notes(sample: np.ndarray, value_range: tuple[float, float], flag: str) -> tuple[str, ...]:
    """A note if the values of arrays, of which `sample` are some, take less than half of their range."""
    low, high = float(sample.min()), float(sample.max())
    if 2 * (high - low) >= value_range[1] - value_range[0]:
        return ()
    return (
        f"in {len(sample)} of them values run from {low:g} to {high:g} only, of {value_range[0]:g} to "
        f"{value_range[1]:g}: if that is all there is, state it, as in {_stated(flag, sample)}",
    )


def _stated(flag: str, sample: np.ndarray) -> str:
    """The flag with the range of the sample."""
    low, high = float(np.nanmin(sample)), float(np.nanmax(sample))
    if sample.dtype.kind == "f" and 0 <= low <= high <= 1:
        low, high = 0.0, 1.0
    high = high if high > low else low + 1
    pair = f"({low!r}, {high!r})" if sample.dtype.kind == "f" else f"({low:.0f}, {high:.0f})"
    return f'{flag}="{pair}"' if flag.startswith("-") else f"{flag}={pair}"
