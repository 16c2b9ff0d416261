"""The number of operations of the U-Net, counted by hand from its fields: what `diffusion.ledger` must find.

    convolution  2 taps C_in C_out,    linear map  2 D_in D_out,    attention over N positions  4 N^2 W        (1)

A multiplication and an addition are two operations. Taps of a convolution are those inside the image, summed over
the positions; what is done once per value (norms, activations, resizing) is left out, one or two per cent of the whole
at the published widths. XLA's cost analysis of the compiled network is another count of the same thing.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

from diffusion.models.base import Task
from diffusion.models.unet import UNet
from diffusion.patch.geometry import geometry


def unet_flops(size: Sequence[int], channels: int, **fields: Any) -> int:
    """Operations of `unet(**fields)` on one image [*size, channels], forward, eq. (1).

    Raises:
      TypeError: `unet` has no such field.
      ValueError: patches do not tile the image.
    """
    task = Task(**{name: value for name, value in fields.items() if name in Task._fields})
    f = UNet(**{name: value for name, value in fields.items() if name not in Task._fields})
    shape = geometry(size, f.patch_size)
    grids = [shape.grid]
    for _ in f.channel_mult[1:]:
        grids.append(tuple(-(-n // 2) for n in grids[-1]))
    widths, time = f.widths, f.time_width
    last = len(widths) - 1
    gated = task.num_classes > 0 and f.class_in == "gate"
    pixels, outward = prod(shape.patch), channels if task.out_channels is None else task.out_channels

    def block(before: int, width: int, grid: tuple[int, ...]) -> int:
        conditions = 2 * time * width * (1 + f.use_scale_shift_norm) + 2 * widths[0] * width * gated
        skip = 2 * prod(grid) * before * width * (before != width)
        return _conv(grid, before, width) + _conv(grid, width, width) + conditions + skip

    def attention(width: int, grid: tuple[int, ...]) -> int:
        return 8 * prod(grid) * width**2 + 4 * prod(grid) ** 2 * width

    def level_block(before: int, level: int) -> int:
        attends = min(grids[level]) in f.attention_resolutions
        width = widths[level]
        return block(before, width, grids[level]) + attends * attention(width, grids[level])

    total = 2 * f.num_channels * 4 * f.num_channels + 2 * 4 * f.num_channels * time
    total += _conv(grids[0], pixels * channels, widths[0])
    width, skips = widths[0], [widths[0]]
    for level in range(last + 1):
        for _ in range(f.num_res_blocks):
            total += level_block(width, level)
            width = widths[level]
            skips.append(width)
        if level < last:
            wider = widths[level + 1] if f.widen_in == "resample" else width
            if f.resblock_updown:
                total += block(width, wider, grids[level + 1])
            else:
                total += _conv(grids[level], width, wider, stride=2)
            width = wider
            skips.append(width)
    total += 2 * block(width, width, grids[last]) + attention(width, grids[last])
    for level in reversed(range(last + 1)):
        for _ in range(f.num_res_blocks + 1):
            total += level_block(width + skips.pop(), level)
            width = widths[level]
        if level:
            wider = widths[level - 1] if f.widen_in == "resample" else width
            change = block if f.resblock_updown else lambda a, b, grid: _conv(grid, a, b)
            total += change(width, wider, grids[level - 1])
            width = wider
    total += _conv(grids[0], width, pixels * outward * (1 + (task.learned_variance == "channels")))
    if task.learned_variance == "head":
        features = widths[0] + width
        total += 2 * time * features + _conv(grids[0], features, f.num_channels)
        total += _conv(grids[0], f.num_channels, pixels * outward)
    return total


def _conv(grid: Sequence[int], inward: int, outward: int, stride: int = 1) -> int:
    """Operations of a 3x3 convolution of an image of size `grid`."""
    return 2 * prod(_taps(n, stride) for n in grid) * inward * outward


def _taps(n: int, stride: int) -> int:
    """Taps of windows of 3 inside an axis of length n: two hang over its ends, or one where two steps end before it."""
    windows = -(-n // stride)
    return 3 * windows - (1 if stride == 2 and n % 2 == 0 else 2)
