"""Features of 28x28 digits: a small classifier whose weights come with this package.

The network that is usual for Frechet distances was trained on photographs, and its features say little about digits.
Batches have one fixed size, so that an image's features do not depend on the other images, and any number of images
compiles once.
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
from diffusion.metrics.features.batches import in_batches
from diffusion.models import classifier

NAME = "the digits' classifier"
WEIGHTS = Path(__file__).parent / "mnist_classifier.safetensors"
SHA256 = "052ee3a01fef402e1268c33fc0f871cb5a5e6076c98f207378755c1e16b9d162"  # of WEIGHTS
BATCH_SIZE = 250


def digit_features(images: np.ndarray, params: Any = None) -> Extracted:
    """Features float32 [N, 64] and logits float32 [N, 10] of digits, uint8 [N, 28, 28, 1], white on black.

    `params` are parameters of `models.classifier`; None means those that come with the package.

    Raises:
      TypeError: images are not uint8.
      ValueError: images are not [N, 28, 28, 1] with N >= 1.
    """
    images = checked_images(images)
    if images.shape[1:] != classifier.SIZE:
        raise ValueError(f"digits must have shape [N, 28, 28, 1], not {images.shape}: pass another feature function")
    params = _default_params() if params is None else params
    logits, features = in_batches(functools.partial(_forward, params), images, BATCH_SIZE)
    return Extracted(features, logits)


def load_classifier(path: str | os.PathLike = WEIGHTS, sha256: str = SHA256) -> Any:
    """Parameters of the digit classifier, from a file that must have this SHA-256.

    Raises:
      OSError: the file is missing or cannot be read.
      ValueError: another file; numbers measured with it could not be compared with published ones.
    """
    try:
        file = Path(path).read_bytes()
    except FileNotFoundError as e:
        raise FileNotFoundError(
            f"the digit classifier {path} is missing: install the package again, or train it with "
            "`python -m experiments.classifier`"
        ) from e
    found = hashlib.sha256(file).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} has SHA-256 {found}, not {sha256} as the digit classifier: install the package again, or pass "
            "sha256= of a classifier that you trained"
        )
    return classifier.from_bytes(file)


@functools.cache
def _default_params() -> Any:
    return load_classifier()


@jax.jit
def _forward(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return classifier.apply(params, images.astype(jnp.float32) / 255)
