"""The classifiers of `diffusion.metrics.features` in PyTorch, with the same weights, batch normalisation folded."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.models import efficientnet
from experiments.bench import torch_run

Forward = Callable[[Tensor], tuple[Tensor, ...]]


def program(name: str, params: Any, x: np.ndarray, channels_last: bool) -> Callable[[], tuple[np.ndarray, ...]]:
    """The taps of x float32 [B, H, W, 3] as arrays: (features, logits), or (pool, logits, spatial) for "inception"."""
    weights = {layer: _weights(arrays, channels_last) for layer, arrays in params.items()}
    forward = {"efficientnet": _efficientnet, "inception": _inception}[name]
    images = torch_run.to_device(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    if channels_last:
        images = images.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run() -> tuple[np.ndarray, ...]:
        return tuple(tap.cpu().numpy() for tap in forward(weights, images))

    return run


def _weights(arrays: dict[str, np.ndarray], channels_last: bool) -> tuple[Tensor, Tensor | None]:
    kernel = np.asarray(arrays["kernel"])
    order = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
    found = torch_run.to_device(np.ascontiguousarray(kernel.transpose(order)))
    if channels_last and kernel.ndim == 4:
        found = found.contiguous(memory_format=torch.channels_last)
    return found, torch_run.to_device(np.array(arrays["bias"])) if "bias" in arrays else None


def _efficientnet(weights: dict[str, Any], x: Tensor) -> tuple[Tensor, ...]:
    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        """With TensorFlow's padding, which is one-sided where a stride of 2 meets an even size."""
        kernel, bias = weights[name]
        k = kernel.shape[-1]
        pads = [max((-(-n // stride) - 1) * stride + k - n, 0) for n in x.shape[-2:]]
        groups = x.shape[1] if name.endswith("depthwise") else 1
        if all(p % 2 == 0 for p in pads):
            return F.conv2d(x, kernel, bias, stride, [p // 2 for p in pads], groups=groups)
        height, width = pads
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(x, kernel, bias, stride, groups=groups)

    h = F.relu6(conv("stem", x, 2))
    for i, (_, _, expansion, stride) in enumerate(efficientnet.BLOCKS):
        before, name = h, f"block_{i}"
        if expansion > 1:
            h = F.relu6(conv(f"{name}_expand", h))
        h = F.relu6(conv(f"{name}_depthwise", h, stride))
        h = conv(f"{name}_project", h)
        if h.shape == before.shape:
            h = h + before
    pooled = F.relu6(conv("head", h)).mean((2, 3))
    return pooled, F.linear(pooled, *weights["logits"])


def _inception(weights: dict[str, Any], x: Tensor) -> tuple[Tensor, ...]:
    def conv(name: str, x: Tensor, stride: int = 1, valid: bool = False) -> Tensor:
        kernel, bias = weights[name]
        padding = 0 if valid else [k // 2 for k in kernel.shape[-2:]]
        return F.relu(F.conv2d(x, kernel, bias, stride, padding))

    def chain(branch: str, x: Tensor) -> Tensor:
        for i in range(1, 6):
            x = conv(f"{branch}_{i}", x) if f"{branch}_{i}" in weights else x
        return x

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def largest(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 1, 1)

    def block(name: str, x: Tensor, *branches: str) -> Tensor:
        chains = [chain(f"{name}_{branch}", x) for branch in branches]
        return torch.cat([conv(f"{name}_branch1x1", x), *chains, conv(f"{name}_branch_pool", mean(x))], 1)

    def split_block(name: str, x: Tensor, pool: Callable[[Tensor], Tensor]) -> Tensor:
        three = conv(f"{name}_branch3x3_1", x)
        double = conv(f"{name}_branch3x3dbl_2", conv(f"{name}_branch3x3dbl_1", x))
        parts = [
            ("branch3x3_2a", three),
            ("branch3x3_2b", three),
            ("branch3x3dbl_3a", double),
            ("branch3x3dbl_3b", double),
        ]
        middle = [conv(f"{name}_{branch}", h) for branch, h in parts]
        return torch.cat([conv(f"{name}_branch1x1", x), *middle, conv(f"{name}_branch_pool", pool(x))], 1)

    h = conv("Conv2d_2a_3x3", conv("Conv2d_1a_3x3", x, 2, True), valid=True)
    h = F.max_pool2d(conv("Conv2d_2b_3x3", h), 3, 2)
    h = F.max_pool2d(conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", h), valid=True), 3, 2)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        h = block(name, h, "branch5x5", "branch3x3dbl")
    double = conv("Mixed_6a_branch3x3dbl_2", conv("Mixed_6a_branch3x3dbl_1", h))
    double = conv("Mixed_6a_branch3x3dbl_3", double, 2, True)
    h = torch.cat([conv("Mixed_6a_branch3x3", h, 2, True), double, F.max_pool2d(h, 3, 2)], 1)
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        h = block(name, h, "branch7x7", "branch7x7dbl")
        if name == "Mixed_6d":
            spatial = h[:, :7].permute(0, 2, 3, 1).flatten(1)
    three = conv("Mixed_7a_branch3x3_2", conv("Mixed_7a_branch3x3_1", h), 2, True)
    seven = h
    for i in (1, 2, 3):
        seven = conv(f"Mixed_7a_branch7x7x3_{i}", seven)
    h = torch.cat([three, conv("Mixed_7a_branch7x7x3_4", seven, 2, True), F.max_pool2d(h, 3, 2)], 1)
    h = split_block("Mixed_7c", split_block("Mixed_7b", h, mean), largest)
    pool = h.mean((2, 3))
    return pool, F.linear(pool, *weights["logits"]), spatial
