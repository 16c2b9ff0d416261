"""The blog's network and its two loops in Keras, written from their description, to compare times with.

    z0 = tokens + E,   z_{l+1} = MultiHeadAttention_l(z_l, z_l) + z0,   pred = z_L without its last token   (1)

Piantedosi, "Diffusion model" (piantedosi.github.io/diffusion_model). E has one row per token, five as published
geometry goes; the published layer has four and looks up a fifth. As published, noise is added in NumPy, training feeds
whole batches of patches, and sampling patches, predicts and recomposes one image at a time.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported: no start-up messages

from typing import Any

import keras
import numpy as np

from diffusion.patch.geometry import geometry
from diffusion.patch.views import patchify


class Positions(keras.layers.Layer):
    """Adds a learned vector to each of n tokens of dimension d."""

    def __init__(self, n: int, d: int) -> None:
        super().__init__()
        self.table = keras.layers.Embedding(n, d)
        self.n = n

    def call(self, tokens: Any) -> Any:
        return tokens + self.table(keras.ops.arange(self.n))


def network(n: int, d: int, *, depth: int, heads: int, head_dim: int) -> keras.Model:
    """Eq. (1) for n patches of d values and one more token: [B, n + 1, d] -> [B, n, d]."""
    tokens = keras.Input((n + 1, d))
    z = start = Positions(n + 1, d)(tokens)
    for _ in range(depth):
        z = keras.layers.Add()([keras.layers.MultiHeadAttention(heads, head_dim)(z, z), start])
    return keras.Model(tokens, z[:, :n])


def copy_params(model: keras.Model, params: dict[str, Any]) -> None:
    """Gives `model` the parameters of `diffusion.models.blog`."""
    model.layers[1].set_weights([np.asarray(params["positions"])])
    attention = [layer for layer in model.layers if isinstance(layer, keras.layers.MultiHeadAttention)]
    for i, layer in enumerate(attention):
        ours = params[f"attention_{i}"]
        layer.set_weights(
            [np.asarray(ours[part][kind]) for part in ("query", "key", "value", "out") for kind in ("kernel", "bias")]
        )


def with_level(tokens: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Tokens [B, n, d] and one more that holds level [B]."""
    return np.concatenate([tokens, np.broadcast_to(level[:, None, None], (len(tokens), 1, tokens.shape[2]))], 1)


def training_batch(
    rng: np.random.Generator, x0: np.ndarray, repeat: int, rate: float, steps: int, window: int, stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """Noisy tokens with their level, and the noise in tokens: images x0 [B, H, W, 1], noised `repeat` times each."""
    x0 = np.tile(x0, (repeat, 1, 1, 1))
    eps = rng.standard_normal(x0.shape)
    level = rate ** rng.integers(0, steps + 1, len(x0))
    at = level[:, None, None, None]
    xt = (at * x0 + (1 - at) * eps).astype(np.float32)
    cut = [np.asarray(patchify(a, window, stride)) for a in (xt, eps.astype(np.float32))]
    return with_level(cut[0], level.astype(np.float32)), cut[1]


def sample(
    model: keras.Model, x: np.ndarray, rate: float, steps: int, step_size: float, window: int, stride: int
) -> np.ndarray:
    """A sample [H, W] from noise x [H, W], one `model.predict` per step."""
    grid = geometry(x.shape, window, stride).grid
    corners = [(i * stride, j * stride) for i in range(grid[0]) for j in range(grid[1])]
    for n in range(steps, 0, -1):
        tokens = np.stack([x[i : i + window, j : j + window].ravel() for i, j in corners])
        eps = model.predict(with_level(tokens[None], np.array([rate**n])).astype(np.float32), verbose=0)[0]
        total, counts = np.zeros_like(x), np.zeros_like(x)
        for patch, (i, j) in zip(eps, corners, strict=True):
            total[i : i + window, j : j + window] += patch.reshape(window, window)
            counts[i : i + window, j : j + window] += 1
        kept = rate**step_size
        x = (x - (1 - kept) * total / counts) / kept
    return x
