"""A case of `experiments.bench.patch_size`: its network, its compiled programs, and what they cost."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion import ledger, loss, optimize, process, sample, train
from diffusion.grids import uniform_grid
from diffusion.models import Model
from diffusion.models.unet import unet
from experiments.bench import jax_run
from experiments.bench.timing import Program

DTYPES = ("float32", "bfloat16")
CHANNELS = 3
RATE, EMA = 1e-4, 0.999


class Case(NamedTuple):
    """Images of size x size in patches of patch x patch."""

    size: int
    patch: int

    @property
    def name(self) -> str:
        return f"{self.size} px, P = {self.patch}"

    def shape(self, batch_size: int) -> tuple[int, int, int, int]:
        """Of a batch of images."""
        return batch_size, self.size, self.size, CHANNELS


def measured(
    case: Case, fields: dict[str, Any], dtype: str, *, batch_size: int, steps: int, sample_steps: int
) -> tuple[dict[str, Any], dict[str, Program]]:
    """What a case costs, time excepted, and {kind: a program}."""
    model, like = network(case, fields, dtype)
    shape = case.shape(batch_size)
    training, sampling = lowered_train(model, like, shape), lowered_sample(model, like, shape, sample_steps)
    compiled = {"train": training.compile(), "sample": sampling.compile()}
    cost = {
        "size": case.size,
        "patch_size": case.patch,
        "positions": (case.size // case.patch) ** 2,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(like)),
        **operations(case, fields, dtype, training, batch_size),
        "bytes": {kind: peak_bytes(program) for kind, program in compiled.items()},
    }
    return cost, ready(compiled, random_params(like), shape, steps)


def compared(
    torch_unet: Any,
    path: str,
    case: Case,
    fields: dict[str, Any],
    dtype: str,
    modes: Sequence[str],
    *,
    batch_size: int,
    steps: int,
    sample_steps: int,
) -> tuple[dict[str, float], dict[str, dict[str, Program]]]:
    """How well the published network and ours agree, and {kind: {name: program}}, ours with its parameters.

    Raises:
      AssertionError: they are not the same network.
    """
    make = partial(torch_unet.network, path, size=case.size, patch_size=case.patch, channels=CHANNELS, fields=fields)
    plain, like = network(case, fields, "float32")
    params, errors = torch_unet.parity(make(), plain, like, case.size, CHANNELS)
    model, _ = network(case, fields, dtype)
    shape = case.shape(batch_size)
    compiled = {
        "train": lowered_train(model, like, shape).compile(),
        "sample": lowered_sample(model, like, shape, sample_steps).compile(),
    }
    programs = {kind: {"ours": program} for kind, program in ready(compiled, params, shape, steps).items()}
    for mode in modes:
        settings, name = {"mode": mode, "dtype": dtype}, f"PyTorch {mode}"
        programs["train"][name] = torch_unet.train(make(), images(shape), steps, rate=RATE, ema=EMA, **settings)
        programs["sample"][name] = torch_unet.sample(make(), shape, sample_steps, **settings)
    return errors, programs


def network(case: Case, fields: dict[str, Any], dtype: str) -> tuple[Model, Any]:
    """The U-Net of a case, and the shapes of its parameters."""
    model = unet(patch_size=case.patch, dtype=dtype, **fields)
    image = jax.ShapeDtypeStruct(case.shape(1), jnp.float32)
    return model, jax.eval_shape(model.init, jax.random.key(0), image, jax.ShapeDtypeStruct((1,), jnp.float32))


def random_params(like: Any) -> Any:
    """Parameters of these shapes, none at its initial zero, of a size that keeps activations near one."""
    rng = np.random.default_rng(0)

    def value(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        fan = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 100
        return (rng.standard_normal(leaf.shape) / np.sqrt(fan)).astype(np.float32)

    return jax.tree.map(value, like)


def images(shape: Sequence[int]) -> np.ndarray:
    """Random images to train on."""
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def ready(
    compiled: dict[str, jax.stages.Compiled], params: Any, shape: Sequence[int], steps: int
) -> dict[str, Program]:
    """The compiled programs with their arguments: `steps` training steps, and one batch of samples."""
    params, key, sampling = jax.tree.map(jnp.asarray, params), jax.random.key(0), compiled["sample"]
    # The training step is given its state's memory, so that it has parameters of its own.
    state = train.init_state(jax.tree.map(jnp.copy, params), optimizer())
    return {
        "train": jax_run.steps_on(compiled["train"], 0, state, images(shape), steps),
        "sample": lambda: np.asarray(sampling(params, key)),
    }


def optimizer() -> optax.GradientTransformation:
    """AdamW."""
    return optimize.adamw(RATE, steps=1, schedule="constant")


def lowered_train(model: Model, like: Any, shape: Sequence[int]) -> jax.stages.Lowered:
    """(key, state, images of `shape`) -> (state, metrics), the training step, not yet compiled."""

    def mean_loss(params: Any, key: jax.Array, x0: jax.Array) -> tuple[jax.Array, dict]:
        return loss.loss(key, partial(model.apply, params), process.Linear(), x0, prediction="x0")[0].mean(), {}

    step = jax.jit(train.make_step(mean_loss, optimizer(), ema_decay=EMA), donate_argnums=1)
    state = jax.eval_shape(lambda params: train.init_state(params, optimizer()), like)
    return step.lower(jax.random.key(0), state, jax.ShapeDtypeStruct(shape, jnp.float32))


def lowered_sample(model: Model, like: Any, shape: Sequence[int], sample_steps: int) -> jax.stages.Lowered:
    """(params, key) -> samples of `shape` in so many steps of DDIM, not yet compiled."""
    path, times = process.Linear(), uniform_grid(sample_steps)

    def sampled(params: Any, key: jax.Array) -> jax.Array:
        x1 = jax.random.normal(key, shape)
        return sample.sample(key, partial(model.apply, params), path, x1, times, prediction="x0")

    return jax.jit(sampled).lower(like, jax.random.key(0))


def operations(
    case: Case, fields: dict[str, Any], dtype: str, training: jax.stages.Lowered, batch_size: int
) -> dict[str, dict[str, float]]:
    """Operations of an image's forward pass and training step, as the ledger and as XLA count them."""
    model, like = network(case, fields, dtype)
    shape = case.shape(batch_size)
    xt, t = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:1], jnp.float32)
    programs = {"forward": jax.jit(model.apply).lower(like, xt, t), "train": training}
    counted = ledger.flops(model.apply, like, xt, t)
    return {
        "flops": {"forward": counted, "train": 3 * counted},
        "xla_flops": {kind: program.cost_analysis()["flops"] / batch_size for kind, program in programs.items()},
    }


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """What a program holds at a time: arguments, results and temporary arrays; results that replace arguments once."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes
