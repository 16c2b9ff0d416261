"""EfficientNet-Lite0, a small classifier of photographs, used by `metrics.features.efficientnet`. No diffusion model.

    block(h) = project(r6(depthwise(r6(expand(h)))))  [+ h, if it has the shape of h],   r6(h) = clip(h, 0, 6)  (1)
    pooled = mean over positions of r6(head(blocks(r6(stem(x)))))                                              (2)
    logits = V pooled + c

Tan and Le 2019 (1905.11946); "Lite" leaves out squeeze-and-excitation and uses (1)'s r6. Padding is TensorFlow's
"SAME", batch normalisation is folded into the convolutions (`folded`).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion.models import folded
from diffusion.models.folded import Conv

SIZE = 224  # of the images that it was trained on
FEATURES = 1280
CLASSES = 1000
EPSILON = 1e-3  # of the batch normalisation
# Kernel size, blocks, channels out, expansion, stride of the first block.
STAGES = ((3, 1, 16, 1, 1), (3, 2, 24, 6, 2), (5, 2, 40, 6, 2), (3, 3, 80, 6, 2), (5, 3, 112, 6, 1), (5, 4, 192, 6, 2),
          (3, 1, 320, 6, 1))  # fmt: skip
BLOCKS = [(k, out, e, s if i == 0 else 1) for k, n, out, e, s in STAGES for i in range(n)]

Params = Any


def apply(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Features [B, 1280], eq. (2), and logits [B, 1000] of x float32 [B, H, W, 3], (pixel - 127) / 128."""
    return _EfficientNetLite0().apply({"params": params}, x)


def shapes() -> Params:
    """The shape of every parameter, as `jax.ShapeDtypeStruct`."""
    x = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    return jax.eval_shape(_EfficientNetLite0().init, jax.random.key(0), x)["params"]


def from_torch(state: Mapping[str, np.ndarray]) -> Params:
    """Parameters from a state dict of the package efficientnet_lite_pytorch, batch normalisation folded.

    Raises:
      ValueError: an entry is missing, or has another shape.
    """
    names = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for i, (_, _, expansion, _) in enumerate(BLOCKS):
        layers = {"expand": ("_expand_conv", "_bn0")} if expansion > 1 else {}
        layers |= {"depthwise": ("_depthwise_conv", "_bn1"), "project": ("_project_conv", "_bn2")}
        names |= {f"block_{i}_{layer}": tuple(f"_blocks.{i}.{name}" for name in of) for layer, of in layers.items()}
    try:
        params = {layer: folded.from_torch(state, *of, EPSILON) for layer, of in names.items()}
        params["logits"] = {"kernel": state["_fc.weight"].T, "bias": state["_fc.bias"]}
    except KeyError as e:
        raise ValueError(f"the weights of EfficientNet-Lite0 lack the entry {e}") from None
    return folded.checked(params, shapes(), "EfficientNet-Lite0")


class _EfficientNetLite0(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = nn.relu6(Conv(32, (3, 3), 2, name="stem")(x))
        for i, (size, features, expansion, stride) in enumerate(BLOCKS):
            before, width = h, h.shape[-1] * expansion
            if expansion > 1:
                h = nn.relu6(Conv(width, name=f"block_{i}_expand")(h))
            h = nn.relu6(Conv(width, (size, size), stride, depthwise=True, name=f"block_{i}_depthwise")(h))
            h = Conv(features, name=f"block_{i}_project")(h)
            if h.shape == before.shape:
                h += before
        h = nn.relu6(Conv(FEATURES, name="head")(h))
        pooled = h.mean((1, 2))
        return pooled, nn.Dense(CLASSES, precision="highest", name="logits")(pooled)
