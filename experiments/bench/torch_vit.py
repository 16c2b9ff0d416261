"""The network, training step and sampler of `experiments.bench.vit` once more, in PyTorch.

    x0_hat = network(xt, t, y),   xt = (1 - t) x0 + t eps,   L = mean (x0_hat - x0)^2 / max(t, floor)^2     (1)

Same architecture as `diffusion.models.vit`, field by field, with PyTorch's own layers wherever there is one. Modules
have the names of our parameters, which `copy_params` relies on; images are channels last, [B, H, W, C], as ours.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Names in published signatures: N tokens, W width, H heads, D dimensions of a head or values of a patch.


class ViT(nn.Module):
    """xt [B, H, W, C], t [B], y [B] -> prediction [B, H, W, C]; the fields are those of `diffusion.models.vit.vit`."""

    def __init__(
        self,
        size: tuple[int, int],
        channels: int,
        *,
        patch_size: int,
        stride: int | None,
        width: int,
        depth: int,
        heads: int,
        num_classes: int,
        mlp_ratio: float,
        bottleneck: int | None,
        norm: str,
        mlp: str,
        qk_norm: bool,
        positions: Sequence[str],
        class_tokens: int,
        class_tokens_from: int,
        clock: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.size, self.patch_size, self.stride = size, patch_size, stride or patch_size
        self.grid = tuple((n - patch_size) // self.stride + 1 for n in size)
        self.clock, self.class_tokens, self.class_tokens_from = clock, class_tokens, class_tokens_from
        n, values = math.prod(self.grid), patch_size**2 * channels

        self.bottleneck = nn.Linear(values, bottleneck, bias=False) if bottleneck is not None else nn.Identity()
        self.embed = nn.Linear(values if bottleneck is None else bottleneck, width)
        self.positions = nn.Parameter(torch.zeros(n, width)) if "learned" in positions else None
        self.register_buffer("sincos", _sincos(self.grid, width) if "sincos" in positions else None)
        layers = {"in": nn.Linear(256, width), "silu": nn.SiLU(), "out": nn.Linear(width, width)}
        self.clock_embed = nn.Sequential(OrderedDict(layers))
        self.classes = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.class_positions = nn.Parameter(torch.zeros(class_tokens, width)) if class_tokens else None
        for layer in range(depth):
            self.add_module(f"block_{layer}", _Block(width, heads, mlp_ratio, norm, mlp, qk_norm))
        self.head_gates = nn.Linear(width, 2 * width)
        self.head_norm = _norm(norm, width)
        self.head = nn.Linear(width, values)

        angles = _rotary(self.grid, width // heads) if "rotary" in positions else None
        for prefix in {0, class_tokens}:
            both = (None, None) if angles is None else _cos_sin(angles, prefix)
            self.register_buffer(f"cos_{prefix}", both[0])
            self.register_buffer(f"sin_{prefix}", both[1])
        self.register_buffer("frequencies", _frequencies(128).float())
        self.register_buffer("share", 1 / self._fold(torch.ones(1, n, values)))

    def forward(self, xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        z = self.embed(self.bottleneck(self._patchify(xt)))  # (B, N, W)
        if self.sincos is not None:
            z = z + self.sincos.to(z.dtype)
        if self.positions is not None:
            z = z + self.positions.to(z.dtype)
        angles = self.clock(t)[:, None] * self.frequencies
        c = self.clock_embed(torch.cat([angles.cos(), angles.sin()], -1))  # (B, W)
        if self.classes is not None:
            label = self.classes(y).to(c.dtype)
            c = c + label
        c = F.silu(c)  # every use of c begins so

        prefix = 0
        for layer in range(self.depth):
            if self.class_tokens and layer == self.class_tokens_from:
                prefix = self.class_tokens
                z = torch.cat([label[:, None] + self.class_positions.to(z.dtype), z], 1)
            turn = (getattr(self, f"cos_{prefix}"), getattr(self, f"sin_{prefix}"))
            z = getattr(self, f"block_{layer}")(z, c, *turn)

        shift, scale = self.head_gates(c)[:, None].chunk(2, -1)
        z = self.head(torch.addcmul(shift, self.head_norm(z[:, prefix:]), 1 + scale))  # (B, N, D)
        return self._fold(z.float()) * self.share

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(name.startswith("block_") for name, _ in self.named_children())

    def _patchify(self, x: Tensor) -> Tensor:
        windows = x.unfold(1, self.patch_size, self.stride).unfold(2, self.patch_size, self.stride)
        return windows.permute(0, 1, 2, 4, 5, 3).reshape(x.shape[0], math.prod(self.grid), -1)

    def _fold(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, D] added up where they overlap, [B, H, W, C]."""
        b, n, values = tokens.shape
        p = self.patch_size
        patches = tokens.reshape(b, *self.grid, p, p, values // p**2)
        if p == self.stride:
            return patches.permute(0, 1, 3, 2, 4, 5).reshape(b, *self.size, -1)
        columns = patches.permute(0, 5, 3, 4, 1, 2).reshape(b, values, n)
        return F.fold(columns, self.size, p, stride=self.stride).permute(0, 2, 3, 1)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float, norm: str, mlp: str, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.gated = heads, mlp == "swiglu"
        hidden = int(width * mlp_ratio)
        hidden = int(hidden * 2 / 3) if self.gated else hidden
        self.gates = nn.Linear(width, 6 * width)
        self.norm_attention, self.norm_mlp = _norm(norm, width), _norm(norm, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * hidden if self.gated else hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, z: Tensor, c: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.gates(c)[:, None].chunk(6, -1)
        h = self._attend(torch.addcmul(shift_a, self.norm_attention(z), 1 + scale_a), cos, sin)
        z = torch.addcmul(z, gate_a, h)
        h = self._feed(torch.addcmul(shift_m, self.norm_mlp(z), 1 + scale_m))
        return torch.addcmul(z, gate_m, h)

    def _attend(self, h: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        b, n, width = h.shape
        q, k, v = self.qkv(h).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, N, D)
        q, k = self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype)
        if cos is not None:
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out(out.transpose(1, 2).reshape(b, n, width))

    def _feed(self, h: Tensor) -> Tensor:
        if not self.gated:
            return self.down(F.gelu(self.up(h), approximate="tanh"))
        gate, value = self.up(h).chunk(2, -1)
        return self.down(F.silu(gate) * value)


def copy_params(module: ViT, params: dict[str, Any]) -> ViT:
    """`module` with the parameters of our network, which must be exactly its own.

    Raises:
      ValueError: the two networks do not have the same parameters.
    """
    left = dict(_leaves(params))
    with torch.no_grad():
        for name, own in module.named_parameters():
            *path, last = name.split(".")
            for ours in (last, *{"weight": ("kernel", "scale", "embedding")}.get(last, ())):
                value = left.pop((*path, ours), None)
                if value is not None:
                    break
            if value is None or value.size != own.numel():
                raise ValueError(f"{name} {tuple(own.shape)} of the PyTorch network has no counterpart in ours")
            if ours == "kernel":
                value = value.reshape(value.shape[0], -1).T
            own.copy_(torch.from_numpy(np.array(value)).reshape(own.shape))
    if left:
        raise ValueError(f"the PyTorch network has no counterpart of {sorted('.'.join(path) for path in left)}")
    return module


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Any:
    if not isinstance(tree, dict):
        yield path, np.asarray(tree)
        return
    for name, below in tree.items():
        yield from _leaves(below, (*path, name))


def image_loss(
    network: Callable[..., Tensor], images: Tensor, y: Tensor, *, null: int, drop: float, mean: float, std: float,
    low: float, high: float, floor: float,
) -> Tensor:  # fmt: skip
    """Loss, eq. (1), of uint8 images [B, H, W, C]: logit-normal times, labels dropped for guidance."""
    x0 = low + (high - low) * (images.float() / 255)
    t = torch.sigmoid(mean + std * torch.randn(len(x0), device=x0.device))
    eps = torch.randn_like(x0)
    y = torch.where(torch.rand(len(x0), device=x0.device) < drop, null, y)
    at = t[:, None, None, None]
    error = (network((1 - at) * x0 + at * eps, t, y) - x0).square().mean((1, 2, 3))
    return (error / t.clamp(min=floor).square()).mean()


def optimizer(module: nn.Module, *, rate: float, b2: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW in its fastest form; only matrices decay."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, b2), fused=True)


def make_step(
    module: ViT, loss: Callable[..., Tensor], adamw: torch.optim.Optimizer, *, clip: float | None, ema: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """(images, y) -> loss, after one step of clipped AdamW on `module` and of its average."""
    params = list(module.parameters())
    average = [p.detach().clone() for p in params]

    def step(images: Tensor, y: Tensor) -> Tensor:
        value = loss(images, y)
        adamw.zero_grad(set_to_none=True)
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(params, clip, foreach=True)
        adamw.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, params, 1 - ema)
        return value.detach()

    return step


def sample(
    network: Callable[..., Tensor], y: Tensor, shape: Sequence[int], times: Sequence[float], *, null: int,
    scales: Sequence[float] | None, low: float, high: float,
) -> Tensor:  # fmt: skip
    """uint8 samples [B, *shape] by DDIM along falling `times`, with a guidance scale for each step, or none."""
    x = torch.randn(len(y), *shape, device=y.device)
    with torch.no_grad():
        for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
            if scales is None:
                x0 = network(x, torch.full((len(y),), t, device=x.device), y)
            else:
                both = torch.cat([y, torch.full_like(y, null)])
                halves = network(torch.cat([x, x]), torch.full((2 * len(y),), t, device=x.device), both)
                conditional, unconditional = halves.chunk(2)
                x0 = unconditional + scales[i] * (conditional - unconditional)
            x = (1 - s) * x0 + s * (x - (1 - t) * x0) / t
    return ((x - low) / (high - low)).clamp(0, 1).mul(255).round().to(torch.uint8)


def _norm(kind: str, width: int) -> nn.Module:
    if kind == "rms":
        return nn.RMSNorm(width, eps=1e-6)
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def _frequencies(n: int) -> Tensor:
    return torch.exp(-math.log(10000) * torch.arange(n, dtype=torch.float64) / n)


def _places(grid: tuple[int, int]) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid)).reshape(-1, len(grid))


def _sincos(grid: tuple[int, int], width: int) -> Tensor:
    angles = _places(grid).flip(1)[:, :, None] * _frequencies(width // 4)
    return torch.cat([angles.sin(), angles.cos()], -1).reshape(-1, width).float()


def _rotary(grid: tuple[int, int], head_dim: int) -> Tensor:
    return (_places(grid)[:, :, None] * _frequencies(head_dim // 4)).reshape(-1, head_dim // 2)


def _cos_sin(angles: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """cos and sin [prefix + N, D] of both halves of a head; the first `prefix` tokens are not turned."""
    angles = torch.cat([torch.zeros(prefix, angles.shape[1]), angles]).repeat(1, 2)
    sign = torch.ones(angles.shape[1])
    sign[: angles.shape[1] // 2] = -1
    return angles.cos().float(), (angles.sin() * sign).float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, N, D] turned: the halves (a, b) of a head become (a cos - b sin, b cos + a sin)."""
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos.to(x.dtype), torch.cat([b, a], -1), sin.to(x.dtype))
