"""Positions of tokens for transformers: sine-cosine tables to be added, and angles that rotate queries and keys.

Both have the same frequencies, 10000^(-i / n) (Vaswani et al. 2017, 1706.03762; Su et al. 2021, 2104.09864), which are
also those of the embedding of a time.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def sincos_positions(grid: Sequence[int], width: int) -> np.ndarray:
    """Fixed sine-cosine positions [N, width] of a grid of tokens; for two axes, DiT's (the last axis comes first).

    Raises:
      ValueError: width is not a multiple of 2 * len(grid).
    """
    rank = len(grid)
    if width % (2 * rank):
        raise ValueError(f"width={width} must be a multiple of {2 * rank} for sine-cosine positions on {rank} axes")
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, rank)  # (N, rank)
    angles = places[:, ::-1, None] * frequencies(width // (2 * rank))  # (N, rank, width / 2 rank)
    return np.concatenate([np.sin(angles), np.cos(angles)], -1).reshape(len(places), width).astype(np.float32)


def rotary_angles(grid: Sequence[int], head_dim: int) -> np.ndarray:
    """Rotation angles [N, head_dim / 2] of a grid of tokens: each axis turns an equal share of the head's pairs.

    Raises:
      ValueError: head_dim is not a multiple of 2 * len(grid).
    """
    rank = len(grid)
    if head_dim % (2 * rank):
        raise ValueError(
            f"head dimension {head_dim} must be a multiple of {2 * rank} for rotary positions on {rank} axes: pass "
            "another width or number of heads, or positions without 'rotary'"
        )
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, rank)
    return (places[:, :, None] * frequencies(head_dim // (2 * rank))).reshape(len(places), head_dim // 2)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """x [B, N, H, D] with its halves turned as pairs by angles [N, D / 2] (Su et al. 2021, 2104.09864)."""
    cos, sin = (f(angles)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def frequencies(n: int) -> np.ndarray:
    """n frequencies from 1 down to 1 / 10000, not included, in a geometric series."""
    return np.exp(-math.log(10000) * np.arange(n) / n).astype(np.float32)
