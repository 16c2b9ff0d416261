"""The published Patch Diffusion program, in PyTorch, to compare with ours: its network as it is, from a checkout.

Its training step here is the one of `patch_size`: noising, forward, backward, AdamW in its fastest form and the
average of the parameters. The network recomputes its attention in the backward pass, as published. It runs under
autocast for bfloat16.
"""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn

from diffusion.grids import uniform_grid
from diffusion.models import Model
from diffusion.pretrained import layouts
from experiments.bench import peers, torch_run, torch_vit


def network(path: str, *, size: int, patch_size: int, channels: int, fields: dict[str, Any]) -> nn.Module:
    """The published U-Net with our fields and random parameters, none at its initial zero, on the device JAX uses.

    Raises:
      ValueError: the program at `path` cannot be imported, or has no such network.
    """
    sys.path.insert(0, str(path))
    try:
        program = importlib.import_module("patch_diffusion.unet")
    except ImportError as e:
        raise ValueError(f"--peer={path}: its patch_diffusion.unet cannot be imported: {e}") from None
    finally:
        sys.path.remove(str(path))
    module = program.UNetModel(
        image_size=size,
        in_channels=channels,
        model_channels=fields["num_channels"],
        out_channels=channels,
        num_res_blocks=fields["num_res_blocks"],
        # As how many times smaller than the input the levels are that attend.
        attention_resolutions=tuple(size // patch_size // n for n in fields["attention_resolutions"]),
        patch_size=patch_size,
        channel_mult=fields["channel_mult"],
        num_heads=4,
        use_scale_shift_norm=True,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            scale = 0.1 if p.ndim == 1 else 1 / math.sqrt(p[0].numel())
            p.copy_(scale * torch.randn(p.shape, generator=generator) + (p.ndim == 1 and name.endswith("weight")))
    return module.to(torch_run.device())


def parity(module: nn.Module, model: Model, like: Any, size: int, channels: int) -> tuple[Any, dict[str, float]]:
    """Our parameters from theirs, and the largest difference of outputs, and of gradients in norm, in float32.

    Raises:
      ValueError: the published network has other parameters than ours.
      AssertionError: they are not the same network.
    """
    torch_run.full_precision()
    rng = np.random.default_rng(2)
    xt, wanted = rng.standard_normal((2, 2, size, size, channels), np.float32)
    clock = np.array([0.2, 0.7], np.float32)

    def ours(arrays: dict[str, Tensor]) -> Any:
        return layouts.from_torch({k: v.cpu().numpy() for k, v in arrays.items()}, like, layouts.patch_unet())

    def error(params: Any) -> tuple[jax.Array, jax.Array]:
        pred = model.apply(params, xt, clock)
        return jnp.square(pred - wanted).mean(), pred

    params = ours(module.state_dict())
    with jax.default_matmul_precision("highest"):
        grads, pred = jax.jit(jax.grad(error, has_aux=True))(params)
    theirs = module(_channels_first(xt), 1000 * torch_run.to_device(clock))
    (theirs - _channels_first(wanted)).square().mean().backward()
    slopes = ours({name: p.grad for name, p in module.named_parameters()})
    gradient = _norm(jax.tree.map(np.subtract, grads, slopes)) / _norm(slopes)
    output = np.abs(theirs.detach().cpu().numpy().transpose(0, 2, 3, 1) - pred).max() / np.abs(pred).max()
    return params, peers.check_same("the published network", {"outputs": float(output), "gradients": gradient})


def train(
    module: nn.Module, x0: np.ndarray, steps: int, *, rate: float, ema: float, mode: str, dtype: str
) -> Callable[[], None]:
    """Takes `steps` training steps on images x0 [B, H, W, C]; `mode` is "eager" or "compile"."""
    apply = torch_run.compiled(module, mode)

    def loss(x0: Tensor, y: None) -> Tensor:
        t = torch.rand(len(x0), device=x0.device)
        mix = t[:, None, None, None]
        xt = (1 - mix) * x0 + mix * torch.randn_like(x0)
        return (apply(xt, 1000 * t) - x0).square().mean()

    adamw = torch_vit.optimizer(module, rate=rate, b2=0.999, weight_decay=0.0)
    step, images = torch_vit.make_step(module, loss, adamw, clip=None, ema=ema), _channels_first(x0).cpu()

    def run() -> None:
        for _ in range(steps):
            # With the backward pass, which recomputes the attention.
            with torch_run.narrow(dtype):
                step(images.to(torch_run.device()), None)
        torch_run.wait()

    return run


def sample(
    module: nn.Module, shape: Sequence[int], sample_steps: int, *, mode: str, dtype: str
) -> Callable[[], np.ndarray]:
    """Makes samples of `shape` [B, H, W, C] in so many steps of DDIM; channels come first."""
    b, h, w, c = shape
    apply, times = torch_run.compiled(module, mode), uniform_grid(sample_steps).tolist()
    y = torch.zeros(b, device=torch_run.device())
    make = partial(
        torch_vit.sample, lambda x, t, y: apply(x, 1000 * t), y, (c, h, w), times, null=0, scales=None, low=-1, high=1
    )

    def run() -> np.ndarray:
        with torch_run.narrow(dtype):
            return make().cpu().numpy()

    return run


def _norm(tree: Any) -> float:
    return math.sqrt(sum(float(np.square(x).sum()) for x in jax.tree.leaves(tree)))


def _channels_first(x: np.ndarray) -> Tensor:
    return torch_run.to_device(x).permute(0, 3, 1, 2).contiguous()
