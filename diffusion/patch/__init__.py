"""Patches: arrays [B, *S, C] to tokens [B, N, D] and back, in JAX, NumPy and compiled Numba, with the same results.

    from diffusion.patch import patchify, unpatchify, fold    JAX (`arrays`)
    from diffusion.patch import views                         zero-copy NumPy views, and the same three functions
    from diffusion.patch import compiled                      the same, compiled by Numba; `noised_patches`
    from diffusion.patch import geometry                      which windows tile an array; the shapes of all of them

Nothing is imported before it is used: `views` needs NumPy only, `compiled` Numba, neither JAX.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion.patch.arrays import fold, patchify, unpatchify

__all__ = ["fold", "patchify", "unpatchify"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from diffusion.patch import arrays

        return getattr(arrays, name)
    raise AttributeError(f"module 'diffusion.patch' has no attribute {name!r}; it has {', '.join(__all__)}")
