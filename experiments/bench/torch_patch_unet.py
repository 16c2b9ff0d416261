"""Patch Diffusion's U-Net once more, in PyTorch, with its loss and its sampler: the peer of the accelerator run.

The network is `diffusion.models.unet` with its defaults and `learned_variance="head"`, without classes: equation (1)
there, field by field, with PyTorch's own layers. Modules bear the names of our parameters, which `copy_params` relies
on. Images are channels last, [B, H, W, C], as ours; inside, features are [B, C, H, W] in the channels-last memory
format. The chain of the loss and of the sampler is a table of alpha and sigma, so that index i is the time i / T:

    L = mean w (x0_hat - x0)^2 + mean KL(q(x_{i-1} | x_i, x0) || p(x_{i-1} | x_i)) / log 2,    w = alpha / sigma   (1)
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UNet(nn.Module):
    """xt [B, H, W, C], clock [B] -> (prediction, v), [B, H, W, C] each; the fields are those of `unet`.

    `clock` is what the sinusoids see. Only square images whose patch grid halves evenly at every level.

    Raises:
      ValueError: the grid does not halve evenly, or heads do not divide a width that attends.
    """

    def __init__(
        self,
        size: int,
        channels: int,
        *,
        patch_size: int,
        num_channels: int,
        channel_mult: Sequence[float],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        num_head_channels: int,
        learned_variance: str,
    ) -> None:
        super().__init__()
        if learned_variance != "head":
            raise ValueError(f"the PyTorch U-Net knows learned_variance='head' only, not {learned_variance!r}")
        self.patch_size, self.num_channels, self.grid = patch_size, num_channels, size // patch_size
        levels = len(channel_mult)
        if size % patch_size or self.grid % 2 ** (levels - 1):
            raise ValueError(f"{size} pixels in patches of {patch_size} do not halve evenly over {levels} levels")
        widths = [int(mult * num_channels) for mult in channel_mult]
        time, values = int(channel_mult[-1] * num_channels), patch_size**2 * channels
        self.plan: list[tuple[str, str, str]] = []  # what is done, the module it is done with, what becomes of the skip

        def add(kind: str, name: str, module: nn.Module, skip: str = "") -> None:
            self.add_module(name, module)
            self.plan.append((kind, name, skip))

        def level_block(name: str, before: int, level: int, skip: str) -> None:
            attends = self.grid >> level in attention_resolutions
            add("block", name, _Block(before, widths[level], time), "" if attends and skip == "push" else skip)
            if attends:
                attention = _Attention(widths[level], num_head_channels)
                add("attention", f"{name}_attention", attention, "push" if skip == "push" else "")

        self.time_in, self.time_out = nn.Linear(num_channels, 4 * num_channels), nn.Linear(4 * num_channels, time)
        self.input_0 = nn.Conv2d(values, widths[0], 3, padding=1)
        skips, width = [widths[0]], widths[0]
        for level in range(levels):
            for _ in range(num_res_blocks):
                level_block(f"input_{len(skips)}", width, level, "push")
                width = widths[level]
                skips.append(width)
            if level < levels - 1:
                add("down", f"input_{len(skips)}_down", nn.Conv2d(width, widths[level + 1], 3, 2), "push")
                width = widths[level + 1]
                skips.append(width)
        add("block", "middle_0", _Block(width, width, time))
        add("attention", "middle_1", _Attention(width, num_head_channels))
        add("block", "middle_2", _Block(width, width, time))
        total = len(skips)
        for level in reversed(range(levels)):
            for _ in range(num_res_blocks + 1):
                name = f"output_{total - len(skips)}"
                level_block(name, width + skips.pop(), level, "pop")
                width = widths[level]
            if level:
                add("up", f"{name}_up", nn.Conv2d(width, widths[level - 1], 3, padding=1))
                width = widths[level - 1]

        self.head_norm, self.head = _norm(width), nn.Conv2d(width, values, 3, padding=1)
        features = widths[0] + width
        self.variance_time = nn.Linear(time, features)
        self.variance_in = nn.Conv2d(features, num_channels, 3, padding=1)
        self.variance_out = nn.Conv2d(num_channels, values, 3, padding=1)
        half = num_channels // 2
        steps = torch.arange(half, dtype=torch.float64) / max(half - 1, 1)
        self.register_buffer("frequencies", torch.exp(-math.log(10000) * steps).float())
        self.register_buffer("positions", _positions(self.grid, widths[0]))
        self.to(memory_format=torch.channels_last)

    def forward(self, xt: Tensor, clock: Tensor) -> tuple[Tensor, Tensor]:
        angles = clock[:, None] * self.frequencies
        waves = F.pad(torch.cat([angles.sin(), angles.cos()], -1), (0, self.num_channels % 2))
        time = F.silu(self.time_out(F.silu(self.time_in(waves))))
        x = self.input_0(self._cut(xt))
        x = first = x + self.positions.to(x.dtype)
        skips = [x]
        for kind, name, skip in self.plan:
            module = getattr(self, name)
            if kind == "block":
                x = module(torch.cat([x, skips.pop()], 1) if skip == "pop" else x, time)
            elif kind == "down":
                x = module(F.pad(x, (0, 1, 0, 1)))
            elif kind == "up":
                x = module(F.interpolate(x, scale_factor=2.0, mode="nearest"))
            else:
                x = module(x)
            if skip == "push":
                skips.append(x)
        with torch.autocast(x.device.type, enabled=False):  # the heads are float32
            first, x, time = first.float(), x.float(), time.float()
            pred = self.head(F.silu(self.head_norm(x)))
            features = torch.cat([first, x], 1).detach() + self.variance_time(F.silu(time))[:, :, None, None]
            v = torch.sigmoid(self.variance_out(F.silu(self.variance_in(features))))
        return self._join(pred), self._join(v)

    def _cut(self, x: Tensor) -> Tensor:
        """Images [B, H, W, C] to patches in the channels, [B, P P C, H / P, W / P]."""
        b, p, g = x.shape[0], self.patch_size, self.grid
        return x.reshape(b, g, p, g, p, -1).permute(0, 2, 4, 5, 1, 3).reshape(b, -1, g, g)

    def _join(self, x: Tensor) -> Tensor:
        """Inverse of `_cut`."""
        b, p, g = x.shape[0], self.patch_size, self.grid
        return x.reshape(b, p, p, -1, g, g).permute(0, 4, 1, 5, 2, 3).reshape(b, g * p, g * p, -1)


class _Block(nn.Module):
    def __init__(self, before: int, width: int, time: int) -> None:
        super().__init__()
        self.norm_in, self.conv_in = _norm(before), nn.Conv2d(before, width, 3, padding=1)
        self.film, self.conv_out = nn.Linear(time, 2 * width), nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Conv2d(before, width, 1) if before != width else nn.Identity()
        self.groups = _groups(width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv_in(F.silu(self.norm_in(x)))
        scale, shift = self.film(time)[:, :, None, None].chunk(2, 1)
        h = F.group_norm(h, self.groups, eps=1e-3) * (1 + scale) + shift
        return self.skip(x) + self.conv_out(F.silu(h))


class _Attention(nn.Module):
    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        if width % head:
            raise ValueError(f"num_head_channels={head} does not divide the width {width} of a level that attends")
        self.heads = width // head
        self.norm, self.qkv, self.out = _norm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, width, *size = x.shape
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, N, W)
        q, k, v = self.qkv(h).view(b, h.shape[1], 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, N, D)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)
        return x + self.out(h).transpose(1, 2).reshape(b, width, *size)


def _groups(width: int) -> int:
    return max(n for n in range(1, 33) if width % n == 0)


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(_groups(width), width, eps=1e-5)


def _positions(grid: int, width: int) -> Tensor:
    """Fixed positions [1, width, grid, grid]: sines along the second axis, then along the first; places span 64."""
    waves = []
    for half in (width // 2, width - width // 2):
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / max(half - 1, 1))
        waves.append(torch.sin(64 / grid * torch.arange(grid, dtype=torch.float64) * frequencies[:, None]))
    rows, columns = waves
    shape = (grid, grid)
    both = [columns[:, None].expand(-1, *shape), rows[:, :, None].expand(-1, *shape)]
    return torch.cat(both)[None].float()


def copy_params(module: UNet, params: dict[str, Any]) -> UNet:
    """`module` with the parameters of our network, or with a tree of that shape such as its gradients.

    Raises:
      ValueError: the two networks do not have the same parameters.
    """
    left = dict(_leaves(params))
    with torch.no_grad():
        for name, own in module.named_parameters():
            *path, last = name.split(".")
            found = [left.pop((*path, ours), None) for ours in ((last,) if last == "bias" else ("kernel", "scale"))]
            value = next((v for v in found if v is not None), None)
            if value is None or value.size != own.numel():
                raise ValueError(f"{name} {tuple(own.shape)} of the PyTorch network has no counterpart in ours")
            if last == "weight" and own.ndim == 4:
                value = value.transpose(3, 2, 0, 1)
            elif last == "weight" and own.ndim == 2:
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


class Chain(NamedTuple):
    """The noising chain: alpha and sigma, float32 [T + 1], at the times i / T; and `least`, the variance of step 2."""

    alpha: Tensor
    sigma: Tensor
    least: float


def linear_chain(device: str, steps: int = 1000) -> Chain:
    """DDPM's chain with linear betas."""
    betas = np.linspace(1e-4, 0.02, steps) * (1000 / steps)
    kept = np.concatenate([[1.0], np.cumprod(1 - betas)])
    alpha, sigma = (torch.from_numpy(np.sqrt(a)).float().to(device) for a in (kept, 1 - kept))
    r = math.sqrt(kept[2] / kept[1] * (1 - kept[1]) / (1 - kept[2]))
    return Chain(alpha, sigma, (1 - kept[1]) * (1 - r**2))


def _between(chain: Chain, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For steps j < i [B]: the small and the large variance between them, and mean = on_x0 x0 + on_xt xt."""
    alpha_i, sigma_i, alpha_j, sigma_j = chain.alpha[i], chain.sigma[i], chain.alpha[j], chain.sigma[j]
    r = alpha_i * sigma_j / (alpha_j * sigma_i)
    gap = (1 - r) * (1 + r)
    found = (sigma_j.square() * gap, sigma_i.square() * gap, alpha_j * gap, r * sigma_j / sigma_i)
    return tuple(a[:, None, None, None] for a in found)


def loss_at(network: Callable[..., Any], chain: Chain, x0: Tensor, i: Tensor, eps: Tensor) -> Tensor:
    """Loss, eq. (1), of images x0 [B, H, W, C] in [-1, 1] at steps i [B] in 1..T with noise eps."""
    alpha, sigma = (a[i][:, None, None, None] for a in (chain.alpha, chain.sigma))
    xt = alpha * x0 + sigma * eps
    pred, v = network(xt, (i - 1).float())
    weight = alpha * sigma / sigma.clamp(min=1e-3).square()
    fit = (weight * (pred - x0).square()).mean()

    small, large, on_x0, on_xt = _between(chain, i, i - 1)
    log_small, log_large = torch.where(small > 0, small, chain.least).log(), large.log()
    log_var = (1 - v) * log_large + v * log_small
    mean = on_x0 * pred.detach() + on_xt * xt
    difference = log_small - log_var
    wanted = on_x0 * x0 + on_xt * xt
    kl = 0.5 * (torch.expm1(difference) - difference + (wanted - mean).square() * torch.exp(-log_var))

    inverse, centred = torch.exp(-0.5 * log_var), x0 - mean
    above, below = (_normal_cdf(inverse * (centred + at)) for at in (1 / 255, -1 / 255))
    mass = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, above - below))
    last = (i == 1)[:, None, None, None]
    return fit + torch.where(last, -mass.clamp(min=1e-12).log(), kl).mean() / math.log(2)


def image_loss(network: Callable[..., Any], chain: Chain, images: Tensor) -> Tensor:
    """`loss_at` of uint8 images [B, H, W, C] at random steps."""
    x0 = images.float() / 127.5 - 1
    i = torch.randint(1, len(chain.alpha), (len(x0),), device=x0.device)
    return loss_at(network, chain, x0, i, torch.randn_like(x0))


def sample(network: Callable[..., Any], chain: Chain, x: Tensor, steps: Sequence[int]) -> Tensor:
    """uint8 images from noise x [B, H, W, C] along falling `steps` that end at 0: ancestral, learned variance, clipped.

    No noise is added in the last step.
    """
    with torch.no_grad():
        for i, j in zip(steps[:-1], steps[1:], strict=True):
            now, then = (torch.full((len(x),), n, device=x.device) for n in (i, j))
            pred, v = network(x, (now - 1).float())
            small, large, on_x0, on_xt = _between(chain, now, then)
            mean = on_x0 * pred.clamp(-1, 1) + on_xt * x
            if j == 0:
                x = mean
                continue
            x = mean + torch.exp(((1 - v) * large.log() + v * small.log()) / 2) * torch.randn_like(x)
    return ((x + 1) / 2).clamp(0, 1).mul(255).round().to(torch.uint8)


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
