"""Features of FID: Inception-v3 of 2015-12-05, from the published file that the user names.

    x = (resize(images) - 128) / 128,   features, logits, spatial = network(x)                        (1)
    resize:  y_i = x_l + (x_{l+1} - x_l) (i s - l),   l = floor(i s),  s = size / 299,  x_n = x_{n-1}          (2)

Heusel et al. 2017 (1706.08500), as torch-fidelity defines it. (2), along rows and then columns, is TensorFlow 1's
bilinear resizing: pixels lie at whole numbers, the image shifts by up to half a pixel, and nothing is filtered where it
shrinks. A grey image is repeated to three channels. The file is not part of this package; both copies are the same:

    github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth
    github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth
"""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.data.batches import checked_images
from diffusion.metrics.features import Extracted
from diffusion.metrics.features.batches import Progress, checked_rgb, in_batches
from diffusion.models import inception
from diffusion.pretrained import layouts

NAME = "Inception-v3"
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d"  # of the published file: its first digits, which are in its name
BATCH_SIZE = 16


def inception_features(images: np.ndarray, params: Any, progress: Progress | None = None) -> Extracted:
    """Features float32 [N, 2048], logits [N, 1008] and spatial features [N, 2023], eq. (1), of uint8 [N, H, W, 1 or 3].

    `params` are `load_weights(path)`. The logits have no bias, as the Inception score takes them; the spatial features
    are those of sFID.

    Raises:
      TypeError: images are not uint8.
      ValueError: images are not [N, H, W, 1 or 3] with N >= 1.
    """
    images = checked_rgb(checked_images(images), NAME)
    found = in_batches(functools.partial(_forward, params), images, BATCH_SIZE, progress)
    taps = inception.Taps(*found)
    return Extracted(taps.pool, taps.logits, taps.spatial)


def load_weights(path: str | os.PathLike, sha256: str | None = SHA256) -> Any:
    """Parameters of `models.inception` from the published file, whose SHA-256 must begin so (None: any).

    Raises:
      FileNotFoundError: there is no such file; the message says where it is published.
      ValueError: another file, one that was cut off, or weights of another network.
    """
    path = Path(path).expanduser()
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}: download the weights of {NAME} from {URL}") from None
    if sha256 is not None and not found.startswith(sha256):
        raise ValueError(
            f"{path} has SHA-256 {found[:8]}..., not {sha256}... as the published weights of {NAME}: "
            f"download them again from {URL}; a distance in features of other weights is no FID"
        )
    return jax.device_put(inception.from_torch(layouts.read(path)))


@jax.jit
def _forward(params: Any, images: jax.Array) -> inception.Taps:
    return inception.apply(params, (resized(images) - 128) / 128)


def resized(images: jax.Array) -> jax.Array:
    """uint8 [B, H, W, C] to float32 [B, 299, 299, 3] with values in 0 .. 255, eq. (2)."""
    x = images.astype(jnp.float32)
    for axis in (1, 2):
        n = x.shape[axis]
        place = np.arange(inception.SIZE, dtype=np.float32) * np.float32(n / inception.SIZE)
        low = place.astype(np.int32)
        weight = (place - low).reshape([-1 if i == axis else 1 for i in range(4)])
        below = jnp.take(x, low, axis)
        x = below + (jnp.take(x, np.minimum(low + 1, n - 1), axis) - below) * weight
    return jnp.broadcast_to(x, (*x.shape[:3], 3))
