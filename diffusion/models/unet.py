"""A U-Net on the patch grid: Patch Diffusion's, and with other fields guided-diffusion's (ADM).

    x = conv(patchify(xt)) + positions,    c = silu(MLP(clock(t)) [+ class])
    block:     h = conv(silu(norm x));  h = norm(h) (1 + scale(c)) + shift(c);  h = conv(dropout(silu h))
               x <- skip(x) + h [sigmoid(class + 2)]                                                (1)
    attention: x <- x + Attention(norm x)                                                           (2)
    prediction = unpatchify(conv(silu(norm x)))

Luhman & Luhman 2022 (2207.04316) put patches of P x P pixels into the channels of the U-Net of Dhariwal & Nichol 2021
(2105.05233), which so works on P^2 times fewer positions. Levels halve the grid; every block of the way down is
concatenated to one of the way up. The defaults are Patch Diffusion's; `**ADM` turns its changes to the blocks back,
and with patch_size=1 that is the published ADM U-Net.

Group norm has the largest number of groups up to 32 that divides the channels: 32 where published networks have 32,
fewer for odd widths, down to one. An odd side of a grid is rounded up on the way down and cropped on the way up.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion.patch.geometry import geometry
from diffusion.models.base import Model, from_module
from diffusion.cpu.conv import conv1x1, conv3x3
from diffusion.patch import patchify, unpatchify
from diffusion.predict import WithVariance

LearnedVariance = Literal["none", "head", "channels"]
Sinusoids = Literal["ddpm", "adm"]
ClassIn = Literal["gate", "time"]
FilmNorm = Literal["plain", "affine"]
WidenIn = Literal["resample", "block"]
Downsample = Literal["same", "symmetric"]

# The fields by which guided-diffusion's U-Net differs from Patch Diffusion's: unet(**ADM, ...).
ADM = {
    "position_encoding": False,
    "sinusoids": "adm",
    "time_mult": 4.0,
    "class_in": "time",
    "film_norm": "affine",
    "widen_in": "block",
    "downsample": "symmetric",
}

_ZERO = nn.initializers.zeros_init()
_Conv = partial(nn.Conv, kernel_size=(3, 3), conv_general_dilated=conv3x3)


def unet(
    *,
    patch_size: int | Sequence[int] = 1,
    num_channels: int = 128,
    channel_mult: Sequence[float] = (1, 2, 2, 2),
    num_res_blocks: int = 2,
    attention_resolutions: Sequence[int] = (16, 8),
    num_heads: int = 4,
    num_head_channels: int | None = None,
    num_classes: int = 0,
    out_channels: int | None = None,
    learned_variance: LearnedVariance = "none",
    dropout: float = 0.0,
    use_scale_shift_norm: bool = True,
    resblock_updown: bool = False,
    position_encoding: bool = True,
    sinusoids: Sinusoids = "ddpm",
    time_mult: float | None = None,
    class_in: ClassIn = "gate",
    film_norm: FilmNorm = "plain",
    widen_in: WidenIn = "resample",
    downsample: Downsample = "same",
    dtype: jnp.dtype = jnp.float32,
    remat: bool = False,
    attention: str | None = None,
    clock: Callable[[jax.Array], jax.Array] | None = None,
) -> Model:
    """The network of eq. (1): xt [B, H, W, C] -> prediction [B, H, W, C], t in [0, 1], y in 0..num_classes.

    Parameters belong to one size of picture: the positions and the levels that attend follow from it.

    Args:
      patch_size: P, or one for each axis.
      num_channels: width at multiplier 1.
      channel_mult: width of each level in num_channels, rounded down; in any order.
      num_res_blocks: blocks per level on the way down; one more on the way up.
      attention_resolutions: levels attend whose grid, in patches, has a shorter side of one of these lengths. The
        middle always attends.
      num_heads: heads of attention, whatever the width; or
      num_head_channels: width of a head, however many there are.
      num_classes: 0 for unconditional; the label num_classes is the null label, and stands in when y is None.
      out_channels: of the prediction, default those of xt; fewer where the last channels of xt are a condition, as
        the low-resolution picture of super-resolution is.
      learned_variance: "none", or apply returns `WithVariance`: with "channels", v is the other half of the last
        convolution's output, any number (ADM); with "head", v is a sigmoid's, from layers of their own which see the
        features detached, so that learning the variance leaves the prediction alone (Patch Diffusion).
      use_scale_shift_norm: time scales and shifts the second norm of a block, as in (1); else it is added before it.
      resblock_updown: blocks (1) with average pooling or nearest neighbours change the size, instead of convolutions.
      position_encoding: fixed sines of both axes are added after the first convolution, the grid spanning 64.
      sinusoids: of the clock; "ddpm": sines first, down to frequency 1/10000; "adm": cosines first, not quite so far.
      time_mult: width of c in num_channels, default channel_mult[-1].
      class_in: the class gates the blocks, as in (1), or is added to the "time".
      film_norm: the second norm of a block is "plain", with epsilon 1e-3, or has an "affine" map, with 1e-5.
      widen_in: the width changes where the grid does ("resample"), or in the next level's first "block".
      downsample: the convolution with stride 2 pads as TensorFlow's "same" does, at the end, or "symmetric".
      dtype: of the computation; parameters, statistics of norms, the softmax and the heads are float32.
      remat: recompute blocks in the backward pass to save memory.
      attention: implementation of `jax.nn.dot_product_attention`: None, "xla" or "cudnn".
      clock: t [B] to what the sinusoids see, default 1000 t.

    Raises:
      ValueError: a name is unknown or a number impossible; on a call, patches do not tile the picture, or heads do
        not divide a width that attends.
    """
    names = {"learned_variance": (learned_variance, LearnedVariance), "sinusoids": (sinusoids, Sinusoids)}
    names |= {"class_in": (class_in, ClassIn), "film_norm": (film_norm, FilmNorm)}
    names |= {"widen_in": (widen_in, WidenIn), "downsample": (downsample, Downsample)}
    for name, (value, known) in names.items():
        if value not in get_args(known):
            raise ValueError(f"{name}={value!r} is not one of {get_args(known)}")
    if num_res_blocks < 1:
        raise ValueError(f"num_res_blocks={num_res_blocks} must be at least 1")
    if not channel_mult or min(channel_mult) * num_channels < 1:
        raise ValueError(f"channel_mult={tuple(channel_mult)} with num_channels={num_channels} leaves a level no width")
    time_mult = channel_mult[-1] if time_mult is None else time_mult
    block = dict(use_scale_shift_norm=use_scale_shift_norm, film_norm=film_norm, dropout=dropout, dtype=dtype)
    attend = dict(num_heads=num_heads, num_head_channels=num_head_channels, attention=attention, dtype=dtype)
    module = _UNet(
        patch_size=patch_size,
        widths=tuple(int(mult * num_channels) for mult in channel_mult),
        num_res_blocks=num_res_blocks,
        attention_resolutions=tuple(attention_resolutions),
        num_classes=num_classes,
        out_channels=out_channels,
        learned_variance=learned_variance,
        resblock_updown=resblock_updown,
        position_encoding=position_encoding,
        sinusoids=sinusoids,
        num_channels=num_channels,
        time_width=int(time_mult * num_channels),
        class_in=class_in,
        widen_in=widen_in,
        downsample=downsample,
        remat=remat,
        clock=clock or (lambda t: 1000 * t),
        block=block,
        attend=attend,
    )
    return from_module(module)


class _UNet(nn.Module):
    patch_size: int | Sequence[int]
    widths: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    num_classes: int
    out_channels: int | None
    learned_variance: str
    resblock_updown: bool
    position_encoding: bool
    sinusoids: str
    num_channels: int
    time_width: int
    class_in: str
    widen_in: str
    downsample: str
    remat: bool
    clock: Callable[[jax.Array], jax.Array]
    block: dict[str, Any]
    attend: dict[str, Any]

    @nn.compact
    def __call__(self, xt: jax.Array, t: jax.Array, y: jax.Array | None, train: bool) -> jax.Array | WithVariance:
        if xt.ndim != 4:
            raise ValueError(f"the U-Net works on pictures [B, H, W, C], got shape {xt.shape}")
        b, *size, channels = xt.shape
        dtype, last = self.block["dtype"], len(self.widths) - 1
        grids = [geometry(size, self.patch_size).grid]
        for _ in self.widths[1:]:
            grids.append(tuple(-(-n // 2) for n in grids[-1]))
        time, label = self._conditions(t, y)
        res = nn.remat(_ResBlock, static_argnums=(4,)) if self.remat else _ResBlock
        attention = nn.remat(_Attention) if self.remat else _Attention

        def block(x: jax.Array, level: int, name: str) -> jax.Array:
            x = res(self.widths[level], grids[level], **self.block, name=name)(x, time, label, train)
            attends = min(grids[level]) in self.attention_resolutions
            return attention(**self.attend, name=f"{name}_attention")(x) if attends else x

        def resample(x: jax.Array, level: int, to: int, name: str) -> jax.Array:
            width = self.widths[to if self.widen_in == "resample" else level]
            if self.resblock_updown:
                return res(width, grids[to], **self.block, name=name)(x, time, label, train)
            if to < level:
                return _Conv(width, dtype=dtype, name=name)(_resized(x, grids[to]))
            padding = "SAME" if self.downsample == "same" else 1
            return nn.Conv(width, (3, 3), 2, padding, dtype=dtype, name=name)(x)

        # Blocks are numbered as in the published programs, where one that changes the size counts on the way down.
        x = patchify(xt, self.patch_size).reshape(b, *grids[0], -1).astype(dtype)
        x = _Conv(self.widths[0], dtype=dtype, name="input_0")(x)
        if self.position_encoding:
            x = x + jnp.asarray(sine_positions(grids[0], self.widths[0]), dtype)[None]
        first, skips = x, [x]
        for level in range(last + 1):
            for _ in range(self.num_res_blocks):
                x = block(x, level, f"input_{len(skips)}")
                skips.append(x)
            if level < last:
                x = resample(x, level, level + 1, f"input_{len(skips)}_down")
                skips.append(x)

        x = res(x.shape[-1], grids[last], **self.block, name="middle_0")(x, time, label, train)
        x = attention(**self.attend, name="middle_1")(x)
        x = res(x.shape[-1], grids[last], **self.block, name="middle_2")(x, time, label, train)

        total = len(skips)
        for level in reversed(range(last + 1)):
            for _ in range(self.num_res_blocks + 1):
                name = f"output_{total - len(skips)}"
                x = block(jnp.concatenate([x, skips.pop()], -1), level, name)
            if level:
                x = resample(x, level, level - 1, f"{name}_up")
        return self._heads(first, x, time, size, channels if self.out_channels is None else self.out_channels)

    def _conditions(self, t: jax.Array, y: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """What the blocks know: c of eq. (1) [B, D], and the class [B, D] if it is not part of c."""
        dtype = self.block["dtype"]
        time = sinusoids(self.sinusoids, self.clock(t), self.num_channels).astype(dtype)
        time = nn.silu(nn.Dense(4 * self.num_channels, dtype=dtype, name="time_in")(time))
        time = nn.Dense(self.time_width, dtype=dtype, name="time_out")(time)
        if not self.num_classes:
            return nn.silu(time), None
        y = jnp.full(t.shape, self.num_classes) if y is None else y
        width = self.widths[0] if self.class_in == "gate" else self.time_width
        start = nn.initializers.normal(1.0)
        label = nn.Embed(self.num_classes + 1, width, dtype=dtype, embedding_init=start, name="classes")(y)
        return (nn.silu(time), label) if self.class_in == "gate" else (nn.silu(time + label), None)

    def _heads(
        self, first: jax.Array, x: jax.Array, time: jax.Array, size: Sequence[int], channels: int
    ) -> jax.Array | WithVariance:
        """From the features after the first convolution and after the last block to the prediction."""
        first, x, time = (a.astype(jnp.float32) for a in (first, x, time))
        pixels = math.prod(geometry(size, self.patch_size).patch)

        def picture(tokens: jax.Array) -> jax.Array:
            return unpatchify(tokens.reshape(len(tokens), -1, tokens.shape[-1]), size, self.patch_size)

        halves = 2 if self.learned_variance == "channels" else 1
        h = nn.silu(_GroupNorm(jnp.float32, name="head_norm")(x))
        pred = picture(_Conv(pixels * channels * halves, kernel_init=_ZERO, name="head")(h))
        if self.learned_variance == "none":
            return pred
        if self.learned_variance == "channels":
            return WithVariance(*jnp.split(pred, 2, -1))
        features = jax.lax.stop_gradient(jnp.concatenate([first, x], -1))
        # Activated a second time, as published.
        shift = nn.Dense(features.shape[-1], name="variance_time")(nn.silu(time))
        v = nn.silu(_Conv(self.num_channels, name="variance_in")(features + shift[:, None, None]))
        v = _Conv(pixels * channels, name="variance_out")(v)
        return WithVariance(pred, picture(nn.sigmoid(v)))


class _ResBlock(nn.Module):
    """The block of eq. (1), to `width` channels and to the grid `size`."""

    width: int
    size: tuple[int, int]
    use_scale_shift_norm: bool
    film_norm: str
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, label: jax.Array | None, train: bool) -> jax.Array:
        width, dtype = self.width, self.dtype
        h = _resized(nn.silu(_GroupNorm(dtype, name="norm_in")(x)), self.size)
        x = _resized(x, self.size)
        h = _Conv(width, dtype=dtype, name="conv_in")(h)
        plain = {"affine": False, "epsilon": 1e-3} if self.film_norm == "plain" else {}
        norm = _GroupNorm(dtype, **plain, name="norm_out")
        film = nn.Dense(width * (1 + self.use_scale_shift_norm), dtype=dtype, kernel_init=_ZERO, name="film")(time)
        film = film[:, None, None]
        if self.use_scale_shift_norm:
            scale, shift = jnp.split(film, 2, -1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + film)
        h = nn.Dropout(self.dropout)(nn.silu(h), deterministic=not train)
        h = _Conv(width, dtype=dtype, kernel_init=_ZERO, name="conv_out")(h)
        if label is not None:
            # Two more than the layer says, so that the gates start nearly open.
            h = h * nn.sigmoid(nn.Dense(width, dtype=dtype, name="gate")(label)[:, None, None] + 2)
        if x.shape[-1] != width:
            x = nn.Conv(width, (1, 1), dtype=dtype, conv_general_dilated=conv1x1, name="skip")(x)
        return x + h


class _Attention(nn.Module):
    """Attention between all positions, eq. (2)."""

    num_heads: int
    num_head_channels: int | None
    attention: str | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, *_, width = x.shape
        heads = self.num_heads if self.num_head_channels is None else max(1, width // self.num_head_channels)
        if width % heads or self.num_head_channels not in (None, width // heads):
            given = f"num_heads={heads}" if self.num_head_channels is None else f"{self.num_head_channels=}"[5:]
            raise ValueError(f"{given} does not divide the width {width} of a level that attends")
        h = _GroupNorm(self.dtype, name="norm")(x).reshape(b, -1, width)  # (B, N, W)
        qkv = nn.DenseGeneral((3, heads, width // heads), dtype=self.dtype, name="qkv")(h)
        if self.dtype == jnp.float16 and self.attention != "cudnn":
            # XLA sums float16 products in float32 on accelerators only, and attention asks for that.
            qkv = qkv.astype(jnp.float32)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # (B, N, H, D)
        h = jax.nn.dot_product_attention(q, k, v, implementation=self.attention).reshape(x.shape)
        return x + nn.Dense(width, dtype=self.dtype, kernel_init=_ZERO, name="out")(h)


class _GroupNorm(nn.Module):
    """Group norm; in float32 up to the result, which has `dtype`."""

    dtype: jnp.dtype
    affine: bool = True
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, *_, channels = x.shape
        groups = max(n for n in range(1, 33) if channels % n == 0)
        x = x.astype(jnp.float32)
        # Over the positions first: sums along rows of channels are vectorised, where those of a group would not be.
        means = jnp.stack([x.mean((1, 2)), jnp.square(x).mean((1, 2))]).reshape(2, b, groups, -1)
        mean, square = means.mean(-1, keepdims=True)
        gain = jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0) + self.epsilon)
        gain, mean = (a.repeat(channels // groups, -1).reshape(b, 1, 1, channels) for a in (gain, mean))
        bias = 0.0
        if self.affine:
            gain = gain * self.param("scale", nn.initializers.ones_init(), (channels,))[None, None, None]
            bias = self.param("bias", _ZERO, (channels,))[None, None, None]
        # Once a channel: fused with what follows, a CPU would find its group and compute this for every value.
        gain, bias = jax.lax.optimization_barrier((gain, bias - mean * gain))
        return (x * gain + bias).astype(self.dtype)


def sinusoids(kind: Sinusoids, clock: jax.Array, width: int) -> jax.Array:
    """Clock readings [B] as sines and cosines [B, width] of falling frequency, zero where an odd width has one left."""
    half = width // 2
    steps = half if kind == "adm" else max(half - 1, 1)
    angles = clock[:, None] * np.exp(-math.log(10000) * np.arange(half) / steps).astype(np.float32)[None]
    waves = (jnp.cos(angles), jnp.sin(angles)) if kind == "adm" else (jnp.sin(angles), jnp.cos(angles))
    return jnp.pad(jnp.concatenate(waves, -1), ((0, 0), (0, width % 2)))


def sine_positions(grid: Sequence[int], width: int) -> np.ndarray:
    """Fixed positions [*grid, width]: sines along the second axis in the first half of the width, then the first's.

    Places run from 0 to 64 along either axis, however long it is.
    """
    waves = []
    for n, half in zip(grid, (width // 2, width - width // 2), strict=True):
        frequency = np.exp(-math.log(10000) * np.arange(half) / max(half - 1, 1))
        waves.append(np.sin(64 / n * np.arange(n)[:, None] * frequency))
    rows, columns = waves
    rows = np.broadcast_to(rows[:, None], (*grid, rows.shape[-1]))
    columns = np.broadcast_to(columns[None], (*grid, columns.shape[-1]))
    return np.concatenate([columns, rows], -1).astype(np.float32)


def _resized(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """x [B, H, W, C] at `size`: itself, halved by averages, or doubled by nearest neighbours (odd sides, see above)."""
    h, w = size
    if x.shape[1] < h or x.shape[2] < w:
        return x.repeat(2, 1).repeat(2, 2)[:, :h, :w]
    if x.shape[1] > h or x.shape[2] > w:
        return nn.avg_pool(x, (2, 2), (2, 2), "SAME", count_include_pad=False)
    return x
