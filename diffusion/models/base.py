"""What a network is to the rest of the package: two pure functions, after optax's GradientTransformation."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from diffusion.patch import unpatchify


class Model(NamedTuple):
    """A network.

    init: (key, xt [B, *S, C], t [B], y [B] | None) -> params, a nested dict of arrays.
    apply: (params, xt, t, y, *, key=None) -> prediction, or `predict.Learned` of it and a variance; `key` turns
      dropout on.

    `partial(model.apply, params)` is a denoiser.
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]


def from_module(module: nn.Module) -> Model:
    """Model of a Flax module with signature module(xt, t, y, train)."""

    def init(key: jax.Array, xt: jax.Array, t: jax.Array, y: jax.Array | None = None) -> Any:
        return module.init(key, xt, t, y, False)["params"]

    def apply(params: Any, xt: jax.Array, t: jax.Array, y: jax.Array | None = None, *, key=None) -> Any:
        rngs = None if key is None else {"dropout": key}
        return module.apply({"params": params}, xt, t, y, key is not None, rngs=rngs)

    return Model(init, apply)


def recomposed(model: Model, patch_size: int | Sequence[int], stride: int | Sequence[int] | None = None) -> Model:
    """The model answering in pictures where it answered in tokens [B, N, D]: overlapping patches are averaged."""

    def apply(params: Any, xt: jax.Array, t: jax.Array, y: jax.Array | None = None, *, key=None) -> jax.Array:
        tokens = model.apply(params, xt, t, y, key=key)
        return unpatchify(tokens, xt.shape[1:-1], patch_size, stride)

    return Model(model.init, apply)
