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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion.cpu.conv import conv1x1, conv3x3
from diffusion.models.base import DEFAULT_TASK, Model, Task, check_names, clock_of, from_fields, from_module
from diffusion.patch import patchify, unpatchify
from diffusion.patch.geometry import geometry
from diffusion.predict import Output, WithVariance
from diffusion.sharding import split_examples

Sinusoids = Literal["ddpm", "adm"]
ClassIn = Literal["gate", "time"]
FilmNorm = Literal["plain", "affine"]
WidenIn = Literal["resample", "block"]
Downsample = Literal["same", "symmetric"]
Remat = Literal["none", "all"]

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


@dataclass(kw_only=True)
class UNet:
    """Arguments of the network of eq. (1): xt [B, H, W, C] -> prediction [B, H, W, C].

    Parameters belong to one size of image: the positions and the levels that attend follow from it.

    Attributes:
      patch_size: P, or one for each axis.
      num_channels: width at multiplier 1.
      channel_mult: width of each level in num_channels, rounded down; in any order.
      num_res_blocks: blocks per level on the way down; one more on the way up.
      attention_resolutions: levels attend whose grid, in patches, has a shorter side of one of these lengths. The
        middle always attends.
      num_heads: heads of attention, whatever the width; or
      num_head_channels: width of a head, however many there are.
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
      remat: "all": blocks are computed again in the backward pass, to save memory; or "none".
      attention: implementation of `jax.nn.dot_product_attention`: None, "xla" or "cudnn".
      clock: how t is scaled before its sinusoidal embedding: "1000 t", "1 - t", "index" (DDPM's T t - 1) or
        a function.

    With a learned variance "head" (`Task`), its layers see the features detached, so that learning the variance does
    not change the prediction (Patch Diffusion); with "channels" v is a half of the last convolution's output (ADM).
    """

    conditional: ClassVar[bool] = True
    variances: ClassVar[tuple[str, ...]] = ("none", "head", "channels")
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    returns_tokens: ClassVar[bool] = False

    patch_size: int = 1
    num_channels: int = 128
    channel_mult: tuple[float, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16, 8)
    num_heads: int = 4
    num_head_channels: int | None = None
    dropout: float = 0.0
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    position_encoding: bool = True
    sinusoids: str = "ddpm"
    time_mult: float | None = None
    class_in: str = "gate"
    film_norm: str = "plain"
    widen_in: str = "resample"
    downsample: str = "same"
    dtype: str = "float32"
    remat: str = "none"
    attention: str | None = None
    clock: str = "1000 t"

    def model(self, task: Task = DEFAULT_TASK) -> Model:
        """The network for a task. Its parameters are a nested dict.

        Raises:
          ValueError: a value is unknown or a number impossible; on a call, patches do not tile the image, or heads do
            not divide a width that attends.
        """
        names = dict(sinusoids=Sinusoids, class_in=ClassIn, film_norm=FilmNorm)
        check_names(self, task, **names, widen_in=WidenIn, downsample=Downsample, remat=Remat)
        if self.num_res_blocks < 1:
            raise ValueError(f"num_res_blocks={self.num_res_blocks} must be at least 1")
        if not self.channel_mult or min(self.channel_mult) * self.num_channels < 1:
            raise ValueError(
                f"channel_mult={tuple(self.channel_mult)} with num_channels={self.num_channels} leaves a level no width"
            )
        clock = clock_of(self.clock, task.steps)
        module = _UNet(replace(self), task.num_classes, task.out_channels, task.learned_variance, clock)
        return from_module(module, num_classes=task.num_classes)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(int(mult * self.num_channels) for mult in self.channel_mult)

    @property
    def time_width(self) -> int:
        """Channels of c, eq. (1)."""
        return int((self.channel_mult[-1] if self.time_mult is None else self.time_mult) * self.num_channels)


def unet(**fields: Any) -> Model:
    """The network of eq. (1) from the fields of `UNet` and of `Task`: unet(patch_size=4, num_classes=10)."""
    return from_fields(UNet, fields)


class _UNet(nn.Module):
    net: UNet
    num_classes: int
    out_channels: int | None
    learned_variance: str
    clock: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, xt: jax.Array, t: jax.Array, y: jax.Array | None, train: bool) -> Output:
        if xt.ndim != 4:
            raise ValueError(f"the U-Net works on images [B, H, W, C], got shape {xt.shape}")
        b, *size, channels = xt.shape
        net, dtype, widths, last = self.net, jnp.dtype(self.net.dtype), self.net.widths, len(self.net.widths) - 1
        grids = [geometry(size, net.patch_size).grid]
        for _ in widths[1:]:
            grids.append(tuple(-(-n // 2) for n in grids[-1]))
        time, label = self._conditions(t, y)
        again = net.remat == "all"
        res = nn.remat(_ResBlock, static_argnums=(4,)) if again else _ResBlock
        attention = nn.remat(_Attention) if again else _Attention

        def block(x: jax.Array, level: int, name: str) -> jax.Array:
            x = split_examples(x)
            x = res(net, widths[level], grids[level], name=name)(x, time, label, train)
            attends = min(grids[level]) in net.attention_resolutions
            return attention(net, name=f"{name}_attention")(x) if attends else x

        def resample(x: jax.Array, level: int, to: int, name: str) -> jax.Array:
            width = widths[to if net.widen_in == "resample" else level]
            if net.resblock_updown:
                return res(net, width, grids[to], name=name)(x, time, label, train)
            if to < level:
                return _Conv(width, dtype=dtype, name=name)(_resized(x, grids[to]))
            padding = "SAME" if net.downsample == "same" else 1
            return nn.Conv(width, (3, 3), 2, padding, dtype=dtype, name=name)(x)

        # Blocks are numbered as in the published programs, where one that changes the size counts on the way down.
        x = patchify(xt, net.patch_size).reshape(b, *grids[0], -1).astype(dtype)
        x = _Conv(widths[0], dtype=dtype, name="input_0")(x)
        if net.position_encoding:
            x = x + jnp.asarray(sine_positions(grids[0], widths[0]), dtype)[None]
        first, skips = x, [x]
        for level in range(last + 1):
            for _ in range(net.num_res_blocks):
                x = block(x, level, f"input_{len(skips)}")
                skips.append(x)
            if level < last:
                x = resample(x, level, level + 1, f"input_{len(skips)}_down")
                skips.append(x)

        x = res(net, x.shape[-1], grids[last], name="middle_0")(x, time, label, train)
        x = attention(net, name="middle_1")(x)
        x = res(net, x.shape[-1], grids[last], name="middle_2")(x, time, label, train)

        total = len(skips)
        for level in reversed(range(last + 1)):
            for _ in range(net.num_res_blocks + 1):
                name = f"output_{total - len(skips)}"
                x = block(jnp.concatenate([x, skips.pop()], -1), level, name)
            if level:
                x = resample(x, level, level - 1, f"{name}_up")
        return self._heads(first, x, time, size, channels if self.out_channels is None else self.out_channels)

    def _conditions(self, t: jax.Array, y: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """The conditions of the blocks: c of eq. (1) [B, D], and the class [B, D] if it is not part of c."""
        net, dtype = self.net, jnp.dtype(self.net.dtype)
        time = sinusoids(net.sinusoids, self.clock(t), net.num_channels).astype(dtype)
        time = nn.silu(nn.Dense(4 * net.num_channels, dtype=dtype, name="time_in")(time))
        time = nn.Dense(net.time_width, dtype=dtype, name="time_out")(time)
        if not self.num_classes:
            return nn.silu(time), None
        y = jnp.full(t.shape, self.num_classes) if y is None else y
        width = net.widths[0] if net.class_in == "gate" else net.time_width
        start = nn.initializers.normal(1.0)
        label = nn.Embed(self.num_classes + 1, width, dtype=dtype, embedding_init=start, name="classes")(y)
        return (nn.silu(time), label) if net.class_in == "gate" else (nn.silu(time + label), None)

    def _heads(self, first: jax.Array, x: jax.Array, time: jax.Array, size: Sequence[int], channels: int) -> Output:
        """From the features after the first convolution and after the last block to the prediction."""
        first, x, time = (a.astype(jnp.float32) for a in (first, x, time))
        pixels = math.prod(geometry(size, self.net.patch_size).patch)

        def image(tokens: jax.Array) -> jax.Array:
            return unpatchify(tokens.reshape(len(tokens), -1, tokens.shape[-1]), size, self.net.patch_size)

        halves = 2 if self.learned_variance == "channels" else 1
        h = nn.silu(_GroupNorm(jnp.float32, name="head_norm")(x))
        pred = image(_Conv(pixels * channels * halves, kernel_init=_ZERO, name="head")(h))
        if self.learned_variance == "none":
            return pred
        if self.learned_variance == "channels":
            return WithVariance(*jnp.split(pred, 2, -1))
        features = jax.lax.stop_gradient(jnp.concatenate([first, x], -1))
        # Activated a second time, as published.
        shift = nn.Dense(features.shape[-1], name="variance_time")(nn.silu(time))
        v = nn.silu(_Conv(self.net.num_channels, name="variance_in")(features + shift[:, None, None]))
        v = _Conv(pixels * channels, name="variance_out")(v)
        return WithVariance(pred, image(nn.sigmoid(v)))


class _ResBlock(nn.Module):
    """The block of eq. (1), to `width` channels and to the grid `size`."""

    net: UNet
    width: int
    size: tuple[int, int]

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, label: jax.Array | None, train: bool) -> jax.Array:
        net, width, dtype = self.net, self.width, jnp.dtype(self.net.dtype)
        h = _resized(nn.silu(_GroupNorm(dtype, name="norm_in")(x)), self.size)
        x = _resized(x, self.size)
        h = _Conv(width, dtype=dtype, name="conv_in")(h)
        plain = {"affine": False, "epsilon": 1e-3} if net.film_norm == "plain" else {}
        norm = _GroupNorm(dtype, **plain, name="norm_out")
        film = nn.Dense(width * (1 + net.use_scale_shift_norm), dtype=dtype, kernel_init=_ZERO, name="film")(time)
        film = film[:, None, None]
        if net.use_scale_shift_norm:
            scale, shift = jnp.split(film, 2, -1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + film)
        h = nn.Dropout(net.dropout)(nn.silu(h), deterministic=not train)
        h = _Conv(width, dtype=dtype, kernel_init=_ZERO, name="conv_out")(h)
        if label is not None:
            # Two more than the layer says, so that the gates start nearly open.
            h = h * nn.sigmoid(nn.Dense(width, dtype=dtype, name="gate")(label)[:, None, None] + 2)
        if x.shape[-1] != width:
            x = nn.Conv(width, (1, 1), dtype=dtype, conv_general_dilated=conv1x1, name="skip")(x)
        return x + h


class _Attention(nn.Module):
    """Attention between all positions, eq. (2)."""

    net: UNet

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        net, dtype = self.net, jnp.dtype(self.net.dtype)
        b, *_, width = x.shape
        heads = net.num_heads if net.num_head_channels is None else max(1, width // net.num_head_channels)
        if width % heads or net.num_head_channels not in (None, width // heads):
            given = f"num_heads={heads}" if net.num_head_channels is None else f"{net.num_head_channels=}"[4:]
            raise ValueError(f"{given} does not divide the width {width} of a level that attends")
        h = _GroupNorm(dtype, name="norm")(x).reshape(b, -1, width)  # (B, N, W)
        qkv = nn.DenseGeneral((3, heads, width // heads), dtype=dtype, name="qkv")(h)
        if dtype == jnp.float16 and net.attention != "cudnn":
            # XLA sums float16 products in float32 on accelerators only, and attention asks for that.
            qkv = qkv.astype(jnp.float32)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # (B, N, H, D)
        h = jax.nn.dot_product_attention(q, k, v, implementation=net.attention).reshape(x.shape)
        return x + nn.Dense(width, dtype=dtype, kernel_init=_ZERO, name="out")(h)


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
    """Times [B], on the network's clock, as sines and cosines [B, width] of falling frequency; odd widths end in 0."""
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
