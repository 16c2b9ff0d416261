"""A network for the rest of the package: two pure functions, after optax's GradientTransformation.

The arguments of a network that describe its architecture are the fields of a dataclass in its own file (`vit.ViT`,
`unet.UNet`, `blog.Blog`); what follows from the data, the process and the loss is a `Task`. `ViT(...).model(Task(...))`
is a `Model`, and so is `vit(...)`, which takes the fields of both.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion.patch import unpatchify
from diffusion.predict import Output
from diffusion.process import Path, check_images

LearnedVariance = Literal["none", "channels", "head"]
Params = Any  # a nested dict of arrays


class Init(Protocol):
    """(key, xt [B, *S, C], t [B], y) -> params."""

    def __call__(self, key: jax.Array, xt: jax.Array, t: jax.Array, y: Any = None) -> Params: ...


class Apply(Protocol):
    """(params, xt [B, *S, C], t [B], y, *, key=None) -> prediction; `key` turns dropout on."""

    def __call__(
        self, params: Params, xt: jax.Array, t: jax.Array, y: Any = None, *, key: jax.Array | None = None
    ) -> Output: ...


class Model(NamedTuple):
    """A network.

    init: (key, xt [B, *S, C], t [B], y) -> params, a nested dict of arrays. y is None for an unconditional network.
    apply: (params, xt, t, y, *, key=None) -> prediction, or `predict.WithVariance`; `key` turns dropout on.

    `partial(model.apply, params)` is a denoiser.
    """

    init: Init
    apply: Apply


class Task(NamedTuple):
    """What a network must know of the data, the process and the loss.

    num_classes: 0 for unconditional; else y [B] lies in 0..num_classes, and num_classes is the null label, which also
      stands in when y is None.
    scalars: so many further numbers, like times, are a condition: y is then a pair (labels or None, [B, scalars]).
    out_channels: channels of the prediction; None for those of xt. Fewer where the last channels of xt are a condition.
    learned_variance: "none", or apply returns `WithVariance`: with "channels", v, any number, is a second half of the
      last layer's output (DiT, ADM); with "head", v is a sigmoid's, from layers of their own (Patch Diffusion).
    velocity: apply returns `predict.WithVelocity`, whose second output has a head of its own (`meanflow`).
    path: for networks whose input is alpha(t).
    steps: T of the chain, for networks whose clock is its index.
    """

    num_classes: int = 0
    out_channels: int | None = None
    learned_variance: LearnedVariance = "none"
    scalars: int = 0
    velocity: bool = False
    path: Path | None = None
    steps: int | None = None


DEFAULT_TASK = Task()


class Network(Protocol):
    """The dataclass of a network's arguments, each with a default; the class attributes say what it can do.

    Some fields have a meaning outside the network, if it has them, and must then have these names: `stride` between
    patches; `dropout` and `attention_dropout`, rates, for which training passes `key` if one is above 0; `dtype`
    ("float16" scales the loss). A method `hidden_matrices(params)` marks the matrices that `optimize.muon` takes.
    """

    patch_size: int
    conditional: ClassVar[bool]  # whether it takes labels
    variances: ClassVar[tuple[str, ...]]  # the values of Task.learned_variance
    dtypes: ClassVar[tuple[str, ...]]  # of its computation
    returns_tokens: ClassVar[bool]  # predictions are tokens [B, N, D]; `recomposed` turns them into images
    # `scalars: ClassVar[bool] = True` of networks that know Task.scalars and Task.velocity.

    def model(self, task: Task = DEFAULT_TASK) -> Model: ...


def from_fields(network: Callable[..., Network], fields: Mapping[str, Any]) -> Model:
    """The model of a network's dataclass, from its fields and those of `Task`."""
    task = {name: value for name, value in fields.items() if name in Task._fields}
    return network(**{name: value for name, value in fields.items() if name not in task}).model(Task(**task))


def from_module(module: nn.Module, *, num_classes: int | None = None, times: int = 1, scalars: int = 0) -> Model:
    """Model of a Flax module with signature module(xt, t, y, train), which takes `times` times, t [B] or [B, times].

    With `scalars`, y is a pair (labels or None, numbers [B, scalars]).

    Calls raise ValueError when they are traced: for images that are not of a floating type and for t of another shape.
    With `num_classes`, y must be labels [B] in 0..num_classes (where they are concrete), or None; with 0 the network is
    unconditional and y must be None. Without, y may be any pytree, for networks with other conditions.
    """

    def check(xt: jax.Array, t: jax.Array, y: Any) -> None:
        check_images(xt)
        shape = xt.shape[:1] if times == 1 else (xt.shape[0], times)
        if not hasattr(t, "dtype") or t.shape != shape or not jnp.issubdtype(t.dtype, jnp.floating):
            given = f"{t.dtype} {tuple(t.shape)}" if hasattr(t, "dtype") else repr(t)
            raise ValueError(f"t must be a floating-point array of shape {shape}, not {given}")
        if scalars:
            wanted = (xt.shape[0], scalars)
            if not isinstance(y, tuple) or len(y) != 2 or jnp.shape(y[1]) != wanted:
                given = [jnp.shape(leaf) for leaf in jax.tree.leaves(y)]
                raise ValueError(f"y must be a pair (labels or None, numbers {wanted}), not arrays of shapes {given}")
            y = y[0]
        if y is None or num_classes is None:
            return
        if num_classes == 0:
            raise ValueError("this network is unconditional (num_classes=0): call it without labels y")
        if not hasattr(y, "dtype") or y.shape != xt.shape[:1] or not jnp.issubdtype(y.dtype, jnp.integer):
            given = f"{y.dtype} {tuple(y.shape)}" if hasattr(y, "dtype") else repr(y)
            raise ValueError(f"labels y must be an array of integers of shape {xt.shape[:1]}, not {given}")
        if not isinstance(y, jax.core.Tracer | jax.ShapeDtypeStruct):
            labels = np.asarray(y)
            if labels.size and not (labels.min() >= 0 and labels.max() <= num_classes):
                raise ValueError(f"labels y lie in {labels.min()}..{labels.max()}, outside 0..{num_classes}")

    def init(key: jax.Array, xt: jax.Array, t: jax.Array, y: Any = None) -> Params:
        check(xt, t, y)
        return module.init(key, xt, t, y, False)["params"]

    def apply(params: Params, xt: jax.Array, t: jax.Array, y: Any = None, *, key: jax.Array | None = None) -> Output:
        check(xt, t, y)
        rngs = None if key is None else {"dropout": key}
        return module.apply({"params": params}, xt, t, y, key is not None, rngs=rngs)

    return Model(init, apply)


def recomposed(model: Model, patch_size: int | Sequence[int], stride: int | Sequence[int] | None = None) -> Model:
    """The model with predictions as images where they were tokens [B, N, D]: overlapping patches are averaged."""

    def apply(params: Params, xt: jax.Array, t: jax.Array, y: Any = None, *, key: jax.Array | None = None) -> jax.Array:
        tokens = model.apply(params, xt, t, y, key=key)
        return unpatchify(tokens, xt.shape[1:-1], patch_size, stride)

    return Model(model.init, apply)


def check_names(network: Any, task: Task, **literals: Any) -> None:
    """Raises ValueError for a field of `network` that is not one of the values of its Literal, and for a task that it
    cannot do."""
    for name, known in literals.items():
        if getattr(network, name) not in get_args(known):
            raise ValueError(f"{name}={getattr(network, name)!r} is not one of {get_args(known)}")
    kind = type(network)
    if task.learned_variance not in kind.variances:
        raise ValueError(
            f"learned_variance={task.learned_variance!r} is not one of {kind.variances}, which {kind.__name__} has"
        )
    if (task.scalars or task.velocity) and not getattr(kind, "scalars", False):
        raise ValueError(
            f"scalars={task.scalars}, velocity={task.velocity}: {kind.__name__} has neither, mean-flow models need ViT"
        )
    if task.num_classes and not kind.conditional:
        raise ValueError(f"num_classes={task.num_classes}: {kind.__name__} is unconditional, use it without labels")
    dtype = getattr(network, "dtype", "float32")
    try:
        known = jnp.dtype(dtype).name in kind.dtypes
    except TypeError:  # no dtype at all
        known = False
    if not known:
        raise ValueError(f"dtype={dtype!r} is not one of {kind.dtypes}, in which {kind.__name__} can compute")


def clock_of(clock: str | Callable[[jax.Array], jax.Array], steps: int | None) -> Callable[[jax.Array], jax.Array]:
    """t to what a network's sinusoids see, from its name: "1000 t" (DiT), "1 - t" (JiT) or "index" (DDPM's T t - 1).

    Raises:
      ValueError: there is no such clock, or it is the index of a chain whose length is unknown.
    """
    if callable(clock):
        return clock
    if clock == "index":
        if steps is None:
            raise ValueError("clock='index' is the index in a chain of steps, and this process has none")
        return lambda t: steps * t - 1
    clocks = {"1000 t": lambda t: 1000 * t, "1 - t": lambda t: 1 - t}
    if clock not in clocks:
        raise ValueError(f"clock={clock!r} is not one of {(*clocks, 'index')}")
    return clocks[clock]
