"""Parameters of layers that are alike, each kind in one array: `blocks_2_5` in place of `block_2` to `block_4`.

    blocks_FIRST_END: the same tree as each block's, its leaves [END - FIRST, ...]                   (1)

A network that scans over its layers (`models.vit.ViT.scan`) stores them so: gradients, averages and the state of the
optimiser then have a leaf for each kind of parameter, not for each layer. The functions here are for any tree shaped
like parameters: averages and gradients too.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Params = Any  # a nested dict of arrays


class Span(NamedTuple):
    """The layers `first` to `end` - 1 of those that are called `layer`_0, `layer`_1, ..."""

    layer: str
    first: int
    end: int

    @property
    def name(self) -> str:
        """Of their parameters, eq. (1)."""
        return f"{self.layer}s_{self.first}_{self.end}"

    @property
    def layers(self) -> list[str]:
        """The names of the layers."""
        return [f"{self.layer}_{i}" for i in range(self.first, self.end)]


def span(name: str) -> Span | None:
    """The layers that a name of eq. (1) stands for; None for any other name."""
    found = re.fullmatch(r"(\w*block)s_(\d+)_(\d+)", name)
    return Span(found[1], int(found[2]), int(found[3])) if found else None


def is_stacked(path: tuple[Any, ...]) -> bool:
    """Whether the leaf at a path of `jax.tree_util` has an axis of layers before its own."""
    return any(span(str(getattr(key, "key", ""))) is not None for key in path)


def unstacked(params: Params) -> Params:
    """Parameters with an entry for each layer."""
    found = {}
    for name, value in params.items():
        here = span(name)
        layers = [name] if here is None else here.layers
        for i, layer in enumerate(layers):
            found[layer] = value if here is None else jax.tree.map(lambda leaf, i=i: leaf[i], value)
    return found


def stacked(params: Params, names: Iterable[str]) -> Params:
    """Parameters with those layers together that `names` stand for, eq. (1); names of other kinds are passed over.

    The names of another tree give its form: stacked(unstacked(params), like).

    Raises:
      ValueError: a layer is missing.
    """
    found = dict(params)
    for here in filter(None, map(span, names)):
        if missing := [layer for layer in here.layers if layer not in found]:
            raise ValueError(f"{here.name} needs {', '.join(missing)}, and the parameters have {', '.join(params)}")
        found[here.name] = jax.tree.map(lambda *leaves: _stack(leaves), *[found.pop(layer) for layer in here.layers])
    return found


def _stack(leaves: tuple[Any, ...]) -> Any:
    return (np if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp).stack(leaves)
