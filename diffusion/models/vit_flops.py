"""How many operations the vision transformer takes, counted by hand from its fields.

    FLOPs = 2 (multiplications in the matrix products of the forward pass)                          (1)

A training step takes three times as many. What is done once per value (norms, activations, rotations) is left out.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

from diffusion.patch.geometry import geometry


def vit_flops(
    size: Sequence[int],
    channels: int,
    *,
    patch_size: int | Sequence[int],
    width: int,
    depth: int,
    stride: int | Sequence[int] | None = None,
    num_classes: int = 0,
    mlp_ratio: float = 4.0,
    mlp: str = "gelu",
    bottleneck: int | None = None,
    class_tokens: int = 0,
    class_tokens_from: int = 0,
    **_: Any,
) -> int:
    """Operations of `vit(**fields)` on one image [*size, channels], forward, eq. (1); other fields change nothing.

    Raises:
      ValueError: windows do not tile the image.
    """
    shape = geometry(size, patch_size, stride)
    n, values = prod(shape.grid), prod(shape.patch) * channels
    hidden = int(width * mlp_ratio)
    feed = 3 * width * int(hidden * 2 / 3) if mlp == "swiglu" else 2 * width * hidden
    products = n * (values * width if bottleneck is None else bottleneck * (values + width))
    for layer in range(depth):
        tokens = n + (class_tokens if num_classes and layer >= class_tokens_from else 0)
        products += tokens * (4 * width**2 + feed) + 2 * tokens**2 * width + 6 * width**2
    products += 256 * width + width**2 + 2 * width**2 + n * width * values
    return 2 * products
