"""Networks as pairs of pure functions. Flax lives here and nowhere else."""

from diffusion.models.base import Model, from_module, recomposed

__all__ = ["Model", "from_module", "recomposed"]
