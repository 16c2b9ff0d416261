"""How the PyTorch programs of the benchmarks are run: device, precision, compilation, waiting."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import torch
from torch import Tensor


def device() -> str:
    """What PyTorch calls the device that JAX uses."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def to_device(x: Any) -> Tensor:
    """A NumPy array as a tensor on this device."""
    return torch.from_numpy(x).to(device())


def compiled(f: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """`f` as it is ("eager") or under torch.compile ("compile"), with matrix products as precise as JAX's."""
    if device() == "cuda":
        torch.set_float32_matmul_precision("high")  # JAX's default on GPUs
        torch.backends.cudnn.allow_tf32 = True
    return torch.compile(f) if mode == "compile" else f


def full_precision() -> None:
    """Turns shorter products off, for comparisons of values; `compiled` turns them on again."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def narrow(dtype: str) -> contextlib.AbstractContextManager:
    """Autocast for "bfloat16"; nothing for "float32"."""
    return torch.autocast(device(), torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()


def wait() -> None:
    """Returns when all work is done."""
    if device() == "cuda":
        torch.cuda.synchronize()
