"""Patch-based image diffusion as pure functions; modules are imported when they are first used.

`import diffusion` alone needs nothing but Python; `diffusion.process`, `diffusion.patch` and the others are imported on
access.
"""

import importlib
from typing import Any

_MODULES = (
    "averages",
    "cpu",
    "data",
    "experts",
    "grids",
    "guide",
    "io",
    "layers",
    "ledger",
    "loss",
    "methods",
    "metrics",
    "models",
    "optimize",
    "patch",
    "posterior",
    "predict",
    "pretrained",
    "process",
    "sample",
    "sharding",
    "solvers",
    "superres",
    "times",
    "train",
    "vlb",
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"diffusion.{name}")
    raise AttributeError(f"module 'diffusion' has no attribute {name!r}; its modules are {', '.join(_MODULES)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
