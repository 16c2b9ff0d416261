"""A vision transformer over patches: DiT, JiT, and mixtures of the two.

    z = embed(patchify(xt)) + positions,   c = clock(t) + class(y)
    z <- z + gate(c) Attention(shift-scale(norm z; c)),   z <- z + gate(c) MLP(shift-scale(norm z; c))     (1)
    prediction = unpatchify(head(z; c))

With the defaults this is DiT (Peebles & Xie 2022, 2212.09748): adaLN-zero, sine-cosine positions, LayerNorm, GELU. The
fields turn on the changes of JiT (Li & He 2025, 2511.13720): bottleneck embedding, RMSNorm, SwiGLU, qk-norm, rotary
positions, in-context class tokens, and dropout in the middle blocks only. With stride < patch_size patches overlap and
the prediction is their average, which removes visible borders between patches.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from diffusion import layers
from diffusion.models.base import DEFAULT_TASK, Model, Task, check_names, clock_of, from_fields, from_module
from diffusion.models.positions import frequencies, rotary_angles, rotate, sincos_positions
from diffusion.patch import patchify, unpatchify
from diffusion.patch.geometry import geometry
from diffusion.predict import Output, WithVariance, WithVelocity
from diffusion.sharding import split_examples

Norm = Literal["layer", "rms"]
Mlp = Literal["gelu", "swiglu"]
Positions = Literal["sincos", "learned", "rotary"]
DropoutBlocks = Literal["all", "middle"]
Remat = Literal["none", "dots", "all"]

_ZERO = nn.initializers.zeros_init()
_XAVIER = nn.initializers.xavier_uniform()
_NORMAL = nn.initializers.normal(0.02)


@dataclass(kw_only=True)
class ViT:
    """Arguments of the network of eq. (1): xt [B, *S, C] -> prediction [B, *S, C].

    Attributes:
      patch_size: window, per axis or one for all; any rank and any number of channels.
      stride: step between windows, default `patch_size`.
      bottleneck: patches are mapped to this many dimensions before the width (JiT).
      positions: any of "sincos", "learned" (added to the tokens) and "rotary" (in attention).
      class_tokens: this many tokens of the class are put before the patches from block `class_tokens_from` on (JiT);
        an unconditional network has none.
      times: 1, or 2 for networks of two times, t [B, 2] (mean-flow and shortcut models): a second embedding is added.
      dropout: rate of dropout after attention and inside the MLP, before its last matrix.
      attention_dropout: rate of dropout of the attention probabilities; `attention` must be None or "xla".
      dropout_blocks: "all", or "middle" for the blocks depth // 4 to 3 (depth // 4) - 1 (JiT).
      velocity_depth: of a network with a second output, Task.velocity, this many of the last blocks are doubled, one
        sequence for each output; 0: only the last layer is.
      dtype: of the computation; parameters, statistics of norms, the softmax and the head are float32.
      remat: what of a block is computed again in the backward pass, to save memory: "none"; "dots": all but the results
        of matrix products with weights and of attention; "all".
      scan: blocks that are alike are one loop (`jax.lax.scan`), and the parameters of all blocks one array of each kind
        (`diffusion.layers` converts both ways): programs of deep networks are shorter and compile faster. Initial
        values are those without; dropout draws other numbers. With remat="none", what is cheap to compute from the
        results of products is computed again in the backward pass.
      attention: implementation of `jax.nn.dot_product_attention`: None, "xla" or "cudnn" (a GPU's, in bfloat16).
      clock: how t is scaled before its sinusoidal embedding: "1000 t" (DiT), "1 - t" (JiT), "index" (DDPM's T t - 1),
        or a function.
    """

    conditional: ClassVar[bool] = True
    variances: ClassVar[tuple[str, ...]] = ("none", "channels")
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    returns_tokens: ClassVar[bool] = False
    scalars: ClassVar[bool] = True

    patch_size: int = 4
    stride: int | None = None
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    bottleneck: int | None = None
    norm: str = "layer"
    mlp: str = "gelu"
    qk_norm: bool = False
    positions: tuple[str, ...] = ("sincos",)
    class_tokens: int = 0
    class_tokens_from: int = 0
    times: int = 1
    velocity_depth: int = 0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dropout_blocks: str = "all"
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = False
    attention: str | None = None
    clock: str = "1000 t"

    def model(self, task: Task = DEFAULT_TASK) -> Model:
        """The network for a task. Its parameters are a nested dict.

        Raises:
          ValueError: heads does not divide width, or a value is unknown; on a call, windows do not tile the image, or
            the width does not suit the positions.
        """
        check_names(self, task, norm=Norm, mlp=Mlp, dropout_blocks=DropoutBlocks, remat=Remat)
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not divisible by heads={self.heads}")
        unknown = set(self.positions) - set(get_args(Positions))
        if unknown:
            raise ValueError(f"positions={tuple(self.positions)}: {sorted(unknown)} not among {get_args(Positions)}")
        if self.class_tokens and not 0 <= self.class_tokens_from < self.depth:
            raise ValueError(f"class_tokens_from={self.class_tokens_from} must lie in [0, depth={self.depth})")
        if self.times not in (1, 2):
            raise ValueError(f"times={self.times} must be 1 or 2")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout={self.attention_dropout} must lie in [0, 1)")
        if self.attention_dropout and self.attention not in (None, "xla"):
            raise ValueError(
                f"attention_dropout={self.attention_dropout}: attention={self.attention!r} never forms the "
                "probabilities that it drops; pass attention=None"
            )
        most = self.depth - (self.class_tokens_from if self.class_tokens else 0)
        if not 0 <= self.velocity_depth <= most:
            raise ValueError(
                f"velocity_depth={self.velocity_depth} must lie in [0, {most}], the blocks with class tokens"
            )
        if task.velocity and task.learned_variance != "none":
            raise ValueError(f"learned_variance={task.learned_variance!r} and a velocity head exclude each other")
        clock = clock_of(self.clock, task.steps)
        unrolled, model = (
            from_module(
                _ViT(replace(self, scan=scan), task, clock),
                num_classes=task.num_classes,
                times=self.times,
                scalars=task.scalars,
            )
            for scan in (False, self.scan)
        )
        if not self.scan:
            return model
        names = [layers.Span("block", 0, self.depth).name, layers.Span("velocity_block", 0, self.velocity_depth).name]

        def init(key: jax.Array, xt: jax.Array, t: jax.Array, y: Any = None) -> Any:
            params = unrolled.init(key, xt, t, y)
            return layers.stacked(params, names if "velocity_block_0" in params else names[:1])

        return model._replace(init=init)

    def spans(self, task: Task) -> list[tuple[int, int]]:
        """First and end of blocks that are alike and follow each other; without `scan` each block is alone."""
        cuts = {0, self.depth - self.velocity_depth, self.depth}
        if self.class_tokens and task.num_classes:
            cuts.add(self.class_tokens_from)
        if self.dropout_blocks == "middle" and (self.dropout or self.attention_dropout):
            cuts |= {self.depth // 4, 3 * (self.depth // 4)}
        return list(pairwise(sorted(cuts) if self.scan else range(self.depth + 1)))

    def hidden_matrices(self, params: Any) -> Any:
        """Marks the matrices for which `optimize.muon` is made; see the function of this name."""
        return hidden_matrices(params)


def vit(**fields: Any) -> Model:
    """The network of eq. (1) from the fields of `ViT` and of `Task`: vit(patch_size=4, num_classes=10)."""
    return from_fields(ViT, fields)


# The fields that all networks of JiT share: ViT(**JIT, width=...).
JIT = dict(norm="rms", mlp="swiglu", qk_norm=True, positions=("sincos", "rotary"), clock="1 - t")


class _ViT(nn.Module):
    net: ViT
    task: Task
    clock: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, xt: jax.Array, t: jax.Array, y: Any, train: bool) -> Output:
        net, task, dtype = self.net, self.task, jnp.dtype(self.net.dtype)
        _, *size, channels = xt.shape
        shape = geometry(size, net.patch_size, net.stride)
        z = patchify(xt, net.patch_size, net.stride).astype(dtype)  # (B, N, D)
        if net.bottleneck is not None:
            z = nn.Dense(net.bottleneck, use_bias=False, dtype=dtype, kernel_init=_XAVIER, name="bottleneck")(z)
        z = nn.Dense(net.width, dtype=dtype, kernel_init=_XAVIER, name="embed")(z)  # (B, N, W)
        if "sincos" in net.positions:
            z = z + jnp.asarray(sincos_positions(shape.grid, net.width), dtype)[None]
        if "learned" in net.positions:
            z = z + self.param("positions", _NORMAL, z.shape[1:]).astype(dtype)[None]

        if net.times == 1:
            c = _Clock(net.width, dtype, name="clock_embed")(self.clock(t))  # (B, W)
        else:
            c = _Clock(net.width, dtype, name="clock_embed")(self.clock(t[:, 0]))
            c = c + _Clock(net.width, dtype, name="second_clock_embed")(self.clock(t[:, 1]))
        if task.scalars:
            y, numbers = y
            for i in range(task.scalars):
                c = c + _Clock(net.width, dtype, name=f"scalar_embed_{i}")(self.clock(numbers[:, i]))
        class_tokens = net.class_tokens if task.num_classes else 0
        if task.num_classes:
            y = jnp.full(xt.shape[:1], task.num_classes) if y is None else y
            label = nn.Embed(task.num_classes + 1, net.width, dtype=dtype, embedding_init=_NORMAL, name="classes")(y)
            c = c + label
        rotation = rotary_angles(shape.grid, net.width // net.heads) if "rotary" in net.positions else None

        undropped, quarter = replace(net, dropout=0.0, attention_dropout=0.0), net.depth // 4

        def of(layer: int) -> ViT:
            """The arguments of a block, which may be one without dropout."""
            return net if net.dropout_blocks == "all" or quarter <= layer < 3 * quarter else undropped

        prefix, spans, doubled = 0, net.spans(task), net.depth - net.velocity_depth
        for first, end in spans:
            if class_tokens and first == net.class_tokens_from:
                prefix = class_tokens
                place = self.param("class_positions", _NORMAL, (prefix, net.width)).astype(dtype)
                z = jnp.concatenate([label[:, None] + place[None], z], 1)
                if rotation is not None:
                    # Class tokens have no place in the image: they are not rotated.
                    rotation = np.concatenate([np.zeros((prefix, rotation.shape[1]), np.float32), rotation])
            if first == doubled:
                z_velocity = z
            z = self._blocks(layers.Span("block", first, end), of(first), z, c, rotation, train)

        learned_variance = task.learned_variance == "channels"
        channels = channels if task.out_channels is None else task.out_channels
        width = _prod(shape.patch) * channels * (1 + learned_variance)

        def head(z: jax.Array, name: str) -> jax.Array:
            shift, scale = _gates(c, 2, net.width, dtype, f"{name}_gates")
            z = _modulate(_norm(net.norm, dtype, f"{name}_norm", affine=net.norm == "rms")(z[:, prefix:]), shift, scale)
            z = nn.Dense(width, kernel_init=_ZERO, name=name)(z.astype(jnp.float32))  # (B, N, D)
            return unpatchify(z, size, net.patch_size, net.stride)

        pred = head(z, "head")
        if learned_variance:
            return WithVariance(*jnp.split(pred, 2, -1))
        if not task.velocity:
            return pred
        if net.velocity_depth:
            z = z_velocity
            for first, end in (span for span in spans if span[0] >= doubled):
                span = layers.Span("velocity_block", first - doubled, end - doubled)
                z = self._blocks(span, of(first), z, c, rotation, train)
        return WithVelocity(pred, head(z, "velocity_head"))

    @nn.nowrap  # the blocks are named in the network itself
    def _blocks(
        self, span: layers.Span, net: ViT, z: jax.Array, c: jax.Array, rotation: np.ndarray | None, train: bool
    ) -> jax.Array:
        """The blocks of a span, one after the other, with the arguments `net`."""
        if not net.scan:
            again = partial(nn.remat, static_argnums=(4,), policy=_kept(net.remat))
            for name in span.layers:
                z = (_Block if net.remat == "none" else again(_Block))(net, name=name)(z, c, rotation, train)
            return z
        whole = span._replace(first=0, end=net.depth if span.layer == "block" else net.velocity_depth)
        if (params := self.get_variable("params", whole.name)) is None:
            raise ValueError(
                f"a network with scan=True has the parameters {whole.name}, and these have "
                f"{', '.join(sorted(self.variables['params']))}: pass layers.stacked(params, ['{whole.name}'])"
            )
        if span != whole:
            params = jax.tree.map(lambda leaf: leaf[span.first : span.end], params)
        block = _Block(net, parent=None, name=span.name)
        dropped = train and (net.dropout or net.attention_dropout)
        key = self.make_rng("dropout") if dropped else None

        def body(z: jax.Array, layer: tuple[Any, jax.Array]) -> tuple[jax.Array, None]:
            params, i = layer
            rngs = {"dropout": jax.random.fold_in(key, i)} if dropped else None
            return block.apply({"params": params}, z, c, rotation, train, rngs=rngs), None

        body = jax.checkpoint(body, prevent_cse=False, policy=_kept(net.remat))
        return jax.lax.scan(body, z, (params, jnp.arange(span.first, span.end)))[0]


def _kept(remat: str) -> Callable[..., Any]:
    """What of a block is not computed again in the backward pass: a policy of `jax.checkpoint`.

    For "none", in a loop, all but cheap functions of arrays that are kept: without a policy a loop keeps every array in
    between too, twice the memory of unrolled blocks, where the compiler fuses such functions into both passes.
    """
    if remat == "all":
        return jax.checkpoint_policies.nothing_saveable
    products = jax.checkpoint_policies.save_only_these_names("product")
    if remat == "dots":
        return products

    def policy(primitive: Any, *args: Any, **params: Any) -> Any:
        # Of the softmax, norms; cuDNN's attention.
        inside = ("exp", "reduce_max", "reduce_sum", "dot_product_attention")
        return primitive.name.startswith(inside) or products(primitive, *args, **params)

    return policy


class _Block(nn.Module):
    net: ViT

    @nn.compact
    def __call__(self, z: jax.Array, c: jax.Array, rotation: np.ndarray | None, train: bool) -> jax.Array:
        net, dtype, width = self.net, jnp.dtype(self.net.dtype), z.shape[-1]
        affine = net.norm == "rms"
        z = split_examples(z)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = _gates(c, 6, width, dtype, "gates")
        h = _modulate(_norm(net.norm, dtype, "norm_attention", affine)(z), shift_a, scale_a)
        z = _rows(z + gate_a * _rows(self._attend(_rows(h), rotation, train)))
        h = _modulate(_norm(net.norm, dtype, "norm_mlp", affine)(z), shift_m, scale_m)
        return _rows(z + gate_m * _rows(self._feed(_rows(h), train)))

    def _attend(self, h: jax.Array, rotation: np.ndarray | None, train: bool) -> jax.Array:
        net, dtype, width = self.net, jnp.dtype(self.net.dtype), h.shape[-1]
        qkv = checkpoint_name(_Qkv(net.heads, dtype, name="qkv")(h), "product")  # (B, N, 3, H, D)
        # The gradient of a split is one concatenation; of three indices, a sum of three padded arrays.
        q, k, v = (a.squeeze(2) for a in jnp.split(qkv, 3, 2))
        if net.qk_norm:
            q = nn.RMSNorm(dtype=dtype, name="norm_q")(q)
            k = nn.RMSNorm(dtype=dtype, name="norm_k")(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if net.attention_dropout and train:
            scores = jnp.einsum("bnhd,bmhd->bhnm", q.astype(jnp.float32), k.astype(jnp.float32))
            weights = nn.softmax(scores / math.sqrt(q.shape[-1]))
            weights = nn.Dropout(net.attention_dropout, name="dropout_attention")(weights, deterministic=False)
            out = jnp.einsum("bhnm,bmhd->bnhd", weights.astype(dtype), v)
        else:
            out = jax.nn.dot_product_attention(q, k, v, implementation=net.attention)
        out = checkpoint_name(out.reshape(h.shape), "product")
        out = checkpoint_name(nn.Dense(width, dtype=dtype, kernel_init=_XAVIER, name="out")(out), "product")
        return nn.Dropout(net.dropout)(out, deterministic=not train)

    def _feed(self, h: jax.Array, train: bool) -> jax.Array:
        net, dtype, width = self.net, jnp.dtype(self.net.dtype), h.shape[-1]
        hidden = int(width * net.mlp_ratio)
        if net.mlp == "swiglu":
            # Two thirds of the hidden width keep the parameter count of the plain MLP (Shazeer 2020, 2002.05202).
            hidden = int(hidden * 2 / 3)
            h = checkpoint_name(nn.Dense(2 * hidden, dtype=dtype, kernel_init=_XAVIER, name="up")(h), "product")
            gate, value = jnp.split(h, 2, -1)
            h = nn.silu(gate) * value
        else:
            h = checkpoint_name(nn.Dense(hidden, dtype=dtype, kernel_init=_XAVIER, name="up")(h), "product")
            h = nn.gelu(h, approximate=True)
        h = nn.Dropout(net.dropout)(h, deterministic=not train)
        return checkpoint_name(nn.Dense(width, dtype=dtype, kernel_init=_XAVIER, name="down")(h), "product")


class _Qkv(nn.Module):
    """h [B, N, W] to queries, keys and values [B, N, 3, H, W / H]: `nn.DenseGeneral` with those axes."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        width = h.shape[-1]
        shape = (3, self.heads, width // self.heads)
        kernel = self.param("kernel", lambda key: _XAVIER(key, (width, 3 * width), jnp.float32).reshape(width, *shape))
        bias = self.param("bias", _ZERO, shape, jnp.float32)

        def axes(h: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
            return jnp.tensordot(h, kernel, 1) + bias[None, None]

        def flat(h: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
            # XLA adds a vector within the matrix product on GPUs; a bias of three axes it first writes out for every
            # token. On TPUs the reshapes are copies.
            out = h @ kernel.reshape(width, -1) + bias.reshape(1, 1, -1)
            return out.reshape(*h.shape[:-1], *shape)

        return jax.lax.platform_dependent(*promote_dtype(h, kernel, bias, dtype=self.dtype), cuda=flat, default=axes)


class _Clock(nn.Module):
    """A time [B], on the network's clock, to [B, W]: 256 sines and cosines, then a two-layer MLP, as in DiT."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        angles = t[:, None] * frequencies(128)[None]
        h = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1).astype(self.dtype)
        h = nn.silu(nn.Dense(self.width, dtype=self.dtype, kernel_init=_NORMAL, name="in")(h))
        return nn.Dense(self.width, dtype=self.dtype, kernel_init=_NORMAL, name="out")(h)


def hidden_matrices(params: Any) -> Any:
    """Marks the matrices for which `optimize.muon` is made, those of attention and MLP: params as a tree of bools.

    The maps from the condition to shifts, scales and gates, which see one vector per image, are not among them.
    Queries, keys and values count as one matrix, and so do the two halves of SwiGLU.
    """

    def is_hidden(path: tuple, _: jax.Array) -> bool:
        names = [str(getattr(key, "key", "")) for key in path]
        inside = len(names) == 3 and re.match(r"(velocity_)?blocks?_\d", names[0])
        return bool(inside) and names[1] in ("qkv", "out", "up", "down") and names[2] == "kernel"

    return jax.tree_util.tree_map_with_path(is_hidden, params)


def _gates(c: jax.Array, n: int, width: int, dtype: jnp.dtype, name: str) -> list[jax.Array]:
    """n vectors [B, 1, W] from the condition c [B, W], zero at first, so that every block starts as the identity."""
    gates = checkpoint_name(nn.Dense(n * width, dtype=dtype, kernel_init=_ZERO, name=name)(nn.silu(c)), "product")
    return jnp.split(gates[:, None], n, -1)


def _modulate(z: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    return z * (1 + scale) + shift


@jax.custom_jvp
def _rows(z: jax.Array) -> jax.Array:
    """z [B, N, W] as it is; with its derivative, on NVIDIA GPUs, both are kept in memory token by token.

    The gradients of the gates are sums over tokens, for which XLA would otherwise keep all activations of the network
    with the tokens or the images last there, and transpose them before and after each matrix product. On TPUs its own
    choice is as good. Without a derivative there is no constraint, which `jax.export` would refuse to write.
    """
    return z


@_rows.defjvp
def _rows_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    rows = Layout(major_to_minor=(0, 1, 2))

    def kept(z: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(z, cuda=lambda z: with_layout_constraint(z, rows), default=lambda z: z)

    return kept(*primals), kept(*tangents)


def _norm(kind: str, dtype: jnp.dtype, name: str, affine: bool) -> nn.Module:
    if kind == "rms":
        return nn.RMSNorm(epsilon=1e-6, dtype=dtype, use_scale=affine, name=name)
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, use_bias=affine, use_scale=affine, name=name)


def _prod(values: Sequence[int]) -> int:
    return int(np.prod(values, dtype=int))
