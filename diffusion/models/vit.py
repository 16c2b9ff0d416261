"""A vision transformer over patches: DiT, JiT, and what lies between.

    z = embed(patchify(xt)) + positions,   c = clock(t) + class(y)
    z <- z + gate(c) Attention(shift-scale(norm z; c)),   z <- z + gate(c) MLP(shift-scale(norm z; c))     (1)
    prediction = unpatchify(head(z; c))

With the defaults this is DiT (Peebles & Xie 2022, 2212.09748): adaLN-zero, sine-cosine positions, LayerNorm, GELU. The
fields turn on the changes of JiT (Li & He 2025, 2511.13720): bottleneck embedding, RMSNorm, SwiGLU, qk-norm, rotary
positions and in-context class tokens. With stride < patch_size patches overlap and the prediction is their average,
which takes the seams out of it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion.patch.geometry import geometry
from diffusion.models.base import Model, from_module
from diffusion.patch import patchify, unpatchify
from diffusion.predict import WithVariance

Norm = Literal["layer", "rms"]
Mlp = Literal["gelu", "swiglu"]
Positions = Literal["sincos", "learned", "rotary"]
LearnedVariance = Literal["none", "channels"]

_ZERO = nn.initializers.zeros_init()
_XAVIER = nn.initializers.xavier_uniform()
_NORMAL = nn.initializers.normal(0.02)


def vit(
    *,
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    width: int = 384,
    depth: int = 12,
    heads: int = 6,
    num_classes: int = 0,
    mlp_ratio: float = 4.0,
    bottleneck: int | None = None,
    norm: Norm = "layer",
    mlp: Mlp = "gelu",
    qk_norm: bool = False,
    positions: Sequence[Positions] = ("sincos",),
    class_tokens: int = 0,
    class_tokens_from: int = 0,
    learned_variance: LearnedVariance = "none",
    dropout: float = 0.0,
    dtype: jnp.dtype = jnp.float32,
    remat: bool = False,
    attention: str | None = None,
    clock: Callable[[jax.Array], jax.Array] | None = None,
) -> Model:
    """The network of eq. (1): xt [B, *S, C] -> prediction [B, *S, C], t in [0, 1], y in 0..num_classes.

    Args:
      patch_size: window, per axis or one for all; any rank and any channel count.
      stride: step between windows, default `patch_size`.
      num_classes: 0 for unconditional; the label num_classes is the null label, and stands in when y is None.
      bottleneck: patches pass through this many dimensions before the width (JiT).
      positions: any of "sincos", "learned" (added to the tokens) and "rotary" (in attention).
      class_tokens: this many tokens of the class are put before the patches from block `class_tokens_from` on (JiT).
      learned_variance: "none", or with "channels" apply returns `WithVariance`, whose v, any number, is a second half of
        the head's output (DiT).
      dtype: of the computation; parameters, statistics of norms, the softmax and the head are float32.
      remat: recompute blocks in the backward pass to save memory.
      attention: implementation of `jax.nn.dot_product_attention`: None, "xla" or "cudnn".
      clock: t [B] to what the sinusoids see, default 1000 t (DiT's index); JiT's is 1 - t.

    Raises:
      ValueError: heads does not divide width, or a name is unknown; on a call, windows do not tile the picture, or
        the width does not suit the positions.
    """
    if width % heads:
        raise ValueError(f"width={width} is not divisible by heads={heads}")
    names = {"norm": (norm, Norm), "mlp": (mlp, Mlp), "learned_variance": (learned_variance, LearnedVariance)}
    for name, (value, known) in names.items():
        if value not in get_args(known):
            raise ValueError(f"{name}={value!r} is not one of {get_args(known)}")
    unknown = set(positions) - {"sincos", "learned", "rotary"}
    if unknown:
        raise ValueError(f"positions={tuple(positions)}: {sorted(unknown)} not among 'sincos', 'learned', 'rotary'")
    if class_tokens and not num_classes:
        raise ValueError(f"class_tokens={class_tokens} need num_classes > 0")
    if class_tokens and not 0 <= class_tokens_from < depth:
        raise ValueError(f"class_tokens_from={class_tokens_from} must lie in [0, depth={depth})")
    block = dict(heads=heads, mlp_ratio=mlp_ratio, norm=norm, mlp=mlp, qk_norm=qk_norm)
    block |= dict(dropout=dropout, dtype=dtype, attention=attention)
    tokens = dict(patch_size=patch_size, stride=stride, bottleneck=bottleneck, positions=tuple(positions))
    classes = dict(num_classes=num_classes, class_tokens=class_tokens, class_tokens_from=class_tokens_from)
    common = dict(learned_variance=learned_variance, block=block, remat=remat, clock=clock or (lambda t: 1000 * t))
    return from_module(_ViT(width=width, depth=depth, **common, **tokens, **classes))


class _ViT(nn.Module):
    patch_size: int | Sequence[int]
    stride: int | Sequence[int] | None
    width: int
    depth: int
    num_classes: int
    bottleneck: int | None
    positions: tuple[str, ...]
    class_tokens: int
    class_tokens_from: int
    learned_variance: str
    remat: bool
    clock: Callable[[jax.Array], jax.Array]
    block: dict

    @nn.compact
    def __call__(self, xt: jax.Array, t: jax.Array, y: jax.Array | None, train: bool) -> jax.Array | WithVariance:
        _, *size, channels = xt.shape
        dtype = self.block["dtype"]
        shape = geometry(size, self.patch_size, self.stride)
        z = patchify(xt, self.patch_size, self.stride).astype(dtype)  # (B, N, D)
        if self.bottleneck is not None:
            z = nn.Dense(self.bottleneck, use_bias=False, dtype=dtype, kernel_init=_XAVIER, name="bottleneck")(z)
        z = nn.Dense(self.width, dtype=dtype, kernel_init=_XAVIER, name="embed")(z)  # (B, N, W)
        if "sincos" in self.positions:
            z = z + jnp.asarray(sincos_positions(shape.grid, self.width), dtype)[None]
        if "learned" in self.positions:
            z = z + self.param("positions", _NORMAL, z.shape[1:]).astype(dtype)[None]

        c = _Clock(self.width, dtype, name="clock_embed")(self.clock(t))  # (B, W)
        if self.num_classes:
            y = jnp.full(t.shape, self.num_classes) if y is None else y
            label = nn.Embed(self.num_classes + 1, self.width, dtype=dtype, embedding_init=_NORMAL, name="classes")(y)
            c = c + label
        rotation = rotary_angles(shape.grid, self.width // self.block["heads"]) if "rotary" in self.positions else None

        block = nn.remat(_Block, static_argnums=(4,)) if self.remat else _Block
        prefix = 0
        for layer in range(self.depth):
            if self.class_tokens and layer == self.class_tokens_from:
                prefix = self.class_tokens
                place = self.param("class_positions", _NORMAL, (prefix, self.width)).astype(dtype)
                z = jnp.concatenate([label[:, None] + place[None], z], 1)
                if rotation is not None:
                    # Class tokens have no place in the picture: they are not rotated.
                    rotation = np.concatenate([np.zeros((prefix, rotation.shape[1]), np.float32), rotation])
            z = block(**self.block, name=f"block_{layer}")(z, c, rotation, train)

        norm = self.block["norm"]
        shift, scale = _gates(c, 2, self.width, dtype, "head_gates")
        z = _modulate(_norm(norm, dtype, "head_norm", affine=norm == "rms")(z[:, prefix:]), shift, scale)
        learned = self.learned_variance == "channels"
        width = _prod(shape.patch) * channels * (1 + learned)
        z = nn.Dense(width, kernel_init=_ZERO, name="head")(z.astype(jnp.float32))  # (B, N, D)
        pred = unpatchify(z, size, self.patch_size, self.stride)
        return WithVariance(*jnp.split(pred, 2, -1)) if learned else pred


class _Block(nn.Module):
    heads: int
    mlp_ratio: float
    norm: str
    mlp: str
    qk_norm: bool
    dropout: float
    dtype: jnp.dtype
    attention: str | None

    @nn.compact
    def __call__(self, z: jax.Array, c: jax.Array, rotation: np.ndarray | None, train: bool) -> jax.Array:
        width = z.shape[-1]
        affine = self.norm == "rms"
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = _gates(c, 6, width, self.dtype, "gates")
        h = _modulate(_norm(self.norm, self.dtype, "norm_attention", affine)(z), shift_a, scale_a)
        z = z + gate_a * self._attend(h, rotation, train)
        h = _modulate(_norm(self.norm, self.dtype, "norm_mlp", affine)(z), shift_m, scale_m)
        return z + gate_m * self._feed(h, train)

    def _attend(self, h: jax.Array, rotation: np.ndarray | None, train: bool) -> jax.Array:
        width = h.shape[-1]
        qkv = nn.DenseGeneral((3, self.heads, width // self.heads), dtype=self.dtype, kernel_init=_XAVIER, name="qkv")(
            h
        )
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # (B, N, H, D)
        if self.qk_norm:
            q = nn.RMSNorm(dtype=self.dtype, name="norm_q")(q)
            k = nn.RMSNorm(dtype=self.dtype, name="norm_k")(k)
        if rotation is not None:
            q, k = _rotate(q, rotation), _rotate(k, rotation)
        out = jax.nn.dot_product_attention(q, k, v, implementation=self.attention)
        out = nn.Dense(width, dtype=self.dtype, kernel_init=_XAVIER, name="out")(out.reshape(h.shape))
        return nn.Dropout(self.dropout)(out, deterministic=not train)

    def _feed(self, h: jax.Array, train: bool) -> jax.Array:
        width = h.shape[-1]
        hidden = int(width * self.mlp_ratio)
        if self.mlp == "swiglu":
            # Two thirds of the hidden width keep the parameter count of the plain MLP (Shazeer 2020, 2002.05202).
            hidden = int(hidden * 2 / 3)
            gate, value = jnp.split(nn.Dense(2 * hidden, dtype=self.dtype, kernel_init=_XAVIER, name="up")(h), 2, -1)
            h = nn.silu(gate) * value
        else:
            h = nn.gelu(nn.Dense(hidden, dtype=self.dtype, kernel_init=_XAVIER, name="up")(h), approximate=True)
        h = nn.Dropout(self.dropout)(h, deterministic=not train)
        return nn.Dense(width, dtype=self.dtype, kernel_init=_XAVIER, name="down")(h)


class _Clock(nn.Module):
    """A clock reading [B] to a vector [B, W]: 256 sines and cosines, then a two-layer MLP, as in DiT."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        angles = t[:, None] * _frequencies(128)[None]
        h = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1).astype(self.dtype)
        h = nn.silu(nn.Dense(self.width, dtype=self.dtype, kernel_init=_NORMAL, name="in")(h))
        return nn.Dense(self.width, dtype=self.dtype, kernel_init=_NORMAL, name="out")(h)


def hidden_matrices(params: Any) -> Any:
    """Marks the matrices for which `optimize.muon` is made, those of attention and MLP: params as a tree of bools.

    The maps from the condition to shifts, scales and gates, which see one vector per picture, are not among them.
    Queries, keys and values count as one matrix, and so do the two halves of SwiGLU.
    """

    def is_hidden(path: tuple, _: jax.Array) -> bool:
        names = [getattr(key, "key", None) for key in path]
        inside = len(names) == 3 and str(names[0]).startswith("block_")
        return inside and names[1] in ("qkv", "out", "up", "down") and names[2] == "kernel"

    return jax.tree_util.tree_map_with_path(is_hidden, params)


def sincos_positions(grid: Sequence[int], width: int) -> np.ndarray:
    """Fixed sine-cosine positions [N, width] of a grid of tokens; for two axes, DiT's (the last axis comes first).

    Raises:
      ValueError: width is not a multiple of 2 * len(grid).
    """
    rank = len(grid)
    if width % (2 * rank):
        raise ValueError(f"width={width} must be a multiple of {2 * rank} for sine-cosine positions on {rank} axes")
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, rank)  # (N, rank)
    angles = places[:, ::-1, None] * _frequencies(width // (2 * rank))  # (N, rank, width / 2 rank)
    return np.concatenate([np.sin(angles), np.cos(angles)], -1).reshape(len(places), width).astype(np.float32)


def rotary_angles(grid: Sequence[int], head_dim: int) -> np.ndarray:
    """Rotation angles [N, head_dim / 2] of a grid of tokens: each axis turns an equal share of the head's pairs.

    Raises:
      ValueError: head_dim is not a multiple of 2 * len(grid).
    """
    rank = len(grid)
    if head_dim % (2 * rank):
        raise ValueError(
            f"head dimension {head_dim} must be a multiple of {2 * rank} for rotary positions on {rank} axes"
        )
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, rank)
    return (places[:, :, None] * _frequencies(head_dim // (2 * rank))).reshape(len(places), head_dim // 2)


def _rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """x [B, N, H, D] with its halves turned as pairs by angles [N, D / 2] (Su et al. 2021, 2104.09864)."""
    cos, sin = (f(angles)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _frequencies(n: int) -> np.ndarray:
    return np.exp(-math.log(10000) * np.arange(n) / n).astype(np.float32)


def _gates(c: jax.Array, n: int, width: int, dtype: jnp.dtype, name: str) -> list[jax.Array]:
    """n vectors [B, 1, W] from the condition c [B, W], zero at first, so that every block starts as the identity."""
    return jnp.split(nn.Dense(n * width, dtype=dtype, kernel_init=_ZERO, name=name)(nn.silu(c))[:, None], n, -1)


def _modulate(z: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    return z * (1 + scale) + shift


def _norm(kind: str, dtype: jnp.dtype, name: str, affine: bool) -> nn.Module:
    if kind == "rms":
        return nn.RMSNorm(epsilon=1e-6, dtype=dtype, use_scale=affine, name=name)
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, use_bias=affine, use_scale=affine, name=name)


def _prod(values: Sequence[int]) -> int:
    return int(np.prod(values, dtype=int))
