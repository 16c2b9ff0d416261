"""Networks as pairs of pure functions. Flax is imported here and nowhere else."""

from diffusion.models.base import Model, Network, Task, from_module, recomposed

__all__ = ["Model", "Network", "Task", "from_module", "recomposed"]
