"""A small convolutional classifier of 28x28 digits, used by `metrics.features.digits`. It is not a diffusion model.

    h_l = maxpool(relu(conv_l(h_{l-1}))),   features = gelu(W h + b),   logits = V features + c     (1)

Three convolutions with 16, 32 and 64 channels, the first two followed by 2x2 pooling. The features use GELU, because
after a ReLU some of them are always zero, which makes their covariance singular. All products use full float32
precision: the reduced precision that is the default on a GPU would change the features, and so the distances.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIZE = (28, 28, 1)
CLASSES = 10
FEATURES = 64

Params = Any


def init(key: jax.Array) -> Params:
    """Initial parameters: a dict layer -> name -> float32 array."""
    return _Classifier().init(key, jnp.zeros((1, *SIZE)))["params"]


def apply(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits [B, 10] and features [B, 64] of x float [B, 28, 28, 1] with values in [0, 1], background 0."""
    return _Classifier().apply({"params": params}, x)


def to_bytes(params: Params) -> bytes:
    """`params` as a safetensors file whose tensors are named layer.name."""
    from safetensors.numpy import save

    return save({f"{layer}.{name}": np.asarray(x) for layer, leaves in params.items() for name, x in leaves.items()})


def from_bytes(file: bytes) -> Params:
    """The parameters that `to_bytes` wrote."""
    from safetensors.numpy import load

    params: Params = {}
    for path, x in load(file).items():
        layer, name = path.split(".")
        params.setdefault(layer, {})[name] = x
    return params


class _Classifier(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = _halve(nn.relu(nn.Conv(16, (5, 5), precision="highest", name="conv_0")(x)))  # (B, 14, 14, 16)
        h = _halve(nn.relu(nn.Conv(32, (3, 3), precision="highest", name="conv_1")(h)))  # (B, 7, 7, 32)
        h = nn.relu(nn.Conv(64, (3, 3), precision="highest", name="conv_2")(h))  # (B, 7, 7, 64)
        h = h.reshape(h.shape[0], -1)
        features = nn.gelu(nn.Dense(FEATURES, precision="highest", name="features")(h))
        return nn.Dense(CLASSES, precision="highest", name="logits")(features), features


def _halve(x: jax.Array) -> jax.Array:
    """Maximum of each 2x2 block; on a CPU the gradient of this form costs half that of `nn.max_pool`."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))
