"""Networks for tests: parameters of which none is at its initial zero, and inputs."""

import jax
import jax.numpy as jnp
import numpy as np


def ready(model, shape, classes=0, times=1):
    """Arguments of `model.apply`."""
    rng = np.random.default_rng(1)
    xt = rng.standard_normal(shape).astype(np.float32)
    t = np.linspace(0.1, 0.9, shape[0] * times, dtype=np.float32).reshape((shape[0], times)[:times])
    y = np.arange(shape[0]) % classes if classes else None

    def value(path, p):
        noise = rng.standard_normal(p.shape).astype(p.dtype)
        shifted = noise / np.sqrt(p.shape[0]) if p.ndim > 1 else (path[-1].key == "scale") + 0.1 * noise
        return jnp.asarray(shifted)

    return jax.tree_util.tree_map_with_path(value, jax.eval_shape(model.init, jax.random.key(0), xt, t, y)), xt, t, y
