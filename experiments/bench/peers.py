"""Other frameworks that are timed beside ours, in the same process: imported, and shown to compute the same."""

import importlib
import os
from typing import Any

import jax

from experiments.bench import timing

# Largest difference between two float32 programs that count as the same, relative as each caller says.
TOLERANCE = 1e-4


def torch_module(name: str, without: str) -> Any:
    """The module experiments.bench.`name`, which imports PyTorch, set to as many cores as XLA takes.

    Args:
      without: how to do without PyTorch, for the message: "pass --peer=none".

    Raises:
      ValueError: PyTorch is missing, or cannot use the device that JAX uses.
    """
    try:
        import torch
    except ImportError:
        raise ValueError(f"the comparison needs PyTorch: pip install -e '.[torch]', or {without}") from None
    # Two frameworks share the GPU: JAX must not take three quarters of its memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise ValueError(f"JAX uses a GPU and this PyTorch has none: install its CUDA build, or {without}")
    torch.set_num_threads(timing.cores())
    return importlib.import_module(f"experiments.bench.{name}")


def check_same(what: str, errors: dict[str, float]) -> dict[str, float]:
    """`errors`, the differences between a program and ours.

    Raises:
      AssertionError: one is larger than TOLERANCE, or NaN: the programs are not the same, and no time is measured.
    """
    if not all(error <= TOLERANCE for error in errors.values()):
        raise AssertionError(f"{what} does not compute what ours does: {errors} exceed {TOLERANCE}")
    return errors


def agreement(errors: dict[str, float]) -> str:
    """What `check_same` found, in words."""
    return "the same in float32: " + ", ".join(f"{name} agree to {error:.1e}" for name, error in errors.items())
