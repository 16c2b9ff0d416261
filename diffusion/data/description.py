"""What a source holds, in words."""

from collections.abc import Sequence

import numpy as np

from diffusion.data import values
from diffusion.data.batches import Source
from diffusion.data.layout import listed

CLASSES, LINES = 20, 5  # the most that are listed


def describe(source: Source) -> str:
    """Number, size, channels and range of the images, classes with their counts, splits, and files that were left out.

    Nothing is decoded. At most 20 classes and 5 files are listed.
    """
    n, *size, channels = source.images.shape
    opened = source.opened
    known = {1: "1 channel (grey)", 3: "3 channels (RGB)"} if len(size) == 2 else {1: "1 channel"}
    kind = known.get(channels, f"{channels} channels")
    split = f", split {opened.split}" if opened.split else ""
    what = values.KINDS[len(size)]
    if not values.is_plain(source.dtype, source.value_range):
        kind += f", {source.dtype} from {source.value_range[0]:g} to {source.value_range[1]:g}"
    lines = [f"{source.name}{split}: {n:,} {what} of {'x'.join(map(str, size))}, {kind}"]
    if source.num_classes:
        lines += [("classes", _classes(source))]
    else:
        lines += [("classes", "none: the images have no labels")]
    if opened.splits:
        lines += [("splits", ", ".join(f"{split} {count:,}" for split, count in opened.splits))]
    if opened.passed_over:
        lines += [("passed over", listed(f"{count:,} {suffix}" for suffix, count in opened.passed_over))]
    if opened.skipped:
        lines += [("skipped", f"{len(opened.skipped):,} that cannot be read")]
        lines += [("", text) for text in _first(opened.skipped)]
    lines += [("note", text) for text in opened.notes]
    return "\n".join([lines[0], *(f"  {name:<12}{text}" for name, text in lines[1:])])


def _classes(source: Source) -> str:
    counts = np.bincount(source.labels, minlength=source.num_classes)
    named = [f"{name} ({count:,})" for name, count in zip(source.class_names, counts.tolist(), strict=True)]
    text = f"{source.num_classes:,}: {listed(named, CLASSES)}"
    if len(named) > CLASSES:
        text += f" ({counts.min():,} to {counts.max():,} images each)"
    empty = [name for name, count in zip(source.class_names, counts, strict=True) if not count]
    return text + (f"; without images: {listed(empty, LINES)}" if empty else "")


def _first(texts: Sequence[str]) -> list[str]:
    more = len(texts) - LINES
    return [*texts[:LINES], *([f"and {more:,} more"] if more > 0 else [])]
