"""Patches: arrays [B, *S, C] to tokens [B, N, D] and back, in JAX, NumPy and compiled Numba, with the same results.

    from diffusion.patch import patchify, unpatchify, fold    JAX (`arrays`)
    from diffusion.patch import views                         zero-copy NumPy views, and the same three functions
    from diffusion.patch import compiled                      the same, compiled by Numba; `noised_patches`
    from diffusion.patch import geometry                      which windows tile an array; the shapes of all of them

Nothing is imported before it is used: `views` needs NumPy only, `compiled` also Numba, neither needs JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion.patch.arrays import fold, patchify, unpatchify

__all__ = ["fold", "patchify", "unpatchify"]

_MODULES = ("arrays", "compiled", "geometry", "views")


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("diffusion.patch.arrays"), name)
    if name in _MODULES:
        return importlib.import_module(f"diffusion.patch.{name}")
    raise AttributeError(f"module 'diffusion.patch' has no attribute {name!r}, only {', '.join([*__all__, *_MODULES])}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_MODULES])
