"""Images through a network in batches of one size, on all devices of a process: any number of images compiles once."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from diffusion import sharding

Forward = Callable[[np.ndarray], Any]
Progress = Callable[[int], Any]


def in_batches(
    forward: Forward, images: np.ndarray, batch_size: int, progress: Progress | None = None
) -> tuple[np.ndarray, ...]:
    """The arrays [N, ...] that `forward`, uint8 [batch_size, H, W, C] -> (arrays [batch_size, ...], ...), gives.

    Several devices share a batch of so many times this size. The last batch is filled up with black images, whose
    results are dropped. `progress(n)` is told of every n images.
    """
    parts, mesh = [], sharding.make_mesh(devices=jax.local_devices())
    batch_size *= mesh.size
    for i in range(0, len(images), batch_size):
        batch = images[i : i + batch_size]
        n = len(batch)
        if n < batch_size:
            batch = np.concatenate([batch, np.zeros((batch_size - n, *batch.shape[1:]), batch.dtype)])
        if mesh.size > 1:
            batch = sharding.put(batch, sharding.by_examples(mesh))
        parts.append([np.asarray(x)[:n] for x in forward(batch)])
        if progress is not None:
            progress(n)
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def checked_rgb(images: np.ndarray, network: str) -> np.ndarray:
    """`images` [N, H, W, C], if C is 1 or 3.

    Raises:
      ValueError: another number of channels.
    """
    if images.shape[-1] not in (1, 3):
        raise ValueError(
            f"{network} takes images with 1 or 3 channels, not {images.shape[-1]} as in {images.shape}: pass "
            "images[..., :3], or another feature function"
        )
    return images
