"""How many operations the vision transformer takes, counted by hand from its fields: what `diffusion.ledger` must find.

    FLOPs = 2 (multiplications in the matrix products of the forward pass)                          (1)

A training step takes three times as many. What is done once per value (norms, activations, rotations) is left out.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

from diffusion.models.base import Task
from diffusion.models.vit import ViT
from diffusion.patch.geometry import geometry


def vit_flops(size: Sequence[int], channels: int, **fields: Any) -> int:
    """Operations of `vit(**fields)` on one image [*size, channels], forward, eq. (1).

    Raises:
      TypeError: `vit` has no such field.
      ValueError: windows do not tile the image.
    """
    task = Task(**{name: value for name, value in fields.items() if name in Task._fields})
    f = ViT(**{name: value for name, value in fields.items() if name not in Task._fields})
    shape = geometry(size, f.patch_size, f.stride)
    n, values, width = prod(shape.grid), prod(shape.patch) * channels, f.width
    outward = prod(shape.patch) * (channels if task.out_channels is None else task.out_channels)
    outward *= 1 + (task.learned_variance != "none")
    hidden = int(width * f.mlp_ratio)
    feed = 3 * width * int(hidden * 2 / 3) if f.mlp == "swiglu" else 2 * width * hidden
    products = n * (values * width if f.bottleneck is None else f.bottleneck * (values + width))
    for layer in range(f.depth):
        tokens = n + (f.class_tokens if task.num_classes and layer >= f.class_tokens_from else 0)
        times = 1 + (task.velocity and layer >= f.depth - f.velocity_depth)
        products += times * (tokens * (4 * width**2 + feed) + 2 * tokens**2 * width + 6 * width**2)
    products += (f.times + task.scalars) * (256 * width + width**2)
    products += (1 + task.velocity) * (2 * width**2 + n * width * outward)
    return 2 * products
