"""A training step on many devices, before there are any: its memory, compiled or not, and what its text says.

state     parameters, averages and optimiser, split by `sharding.of_state`; exact                   (1)
temporary what the compiler says, or, not compiled, gradients like the parameters, and for each image of the
          device's share of a batch what the ledger says is kept; in a batch by parts, of one part     (2)
"""

import time
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion import sharding
from experiments import objective, parts, preflight
from experiments.bench.accelerator import program_text
from experiments.checks import named
from experiments.parts import Parts

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


class Shapes(NamedTuple):
    """The arguments of a training step, as shapes with their shardings."""

    key: Any
    state: Any
    batch: Any


class Compiled(NamedTuple):
    """What the compiler says of a program on each device, in bytes and operations; None where it does not say."""

    seconds: float
    arguments: int
    outputs: int
    temporary: int
    alias: int
    flops: float | None  # loops counted once
    collectives: dict[str, dict[str, int]]

    @property
    def bytes(self) -> int:
        """Results in the place of arguments counted once."""
        return self.arguments + self.outputs - self.alias + self.temporary


def mesh_of(data: int | None, fsdp: int, count: int, devices: list[Any] | None = None) -> Mesh:
    """The mesh of so many devices; an abstract one, which is enough for shapes, without `devices`.

    Raises:
      ValueError: data x fsdp is not their number, or the mesh does not fit the links of a TPU slice.
    """
    if fsdp < 1 or count % fsdp or (data is not None and data * fsdp != count):
        given = f"{'' if data is None else f'--config.mesh.data={data} times '}--config.mesh.fsdp={fsdp}"
        must = "must divide" if data is None else "must be"
        raise ValueError(f"{given} {must} the number of devices, {count}")
    if devices is None:
        auto = (jax.sharding.AxisType.Auto,) * 2
        return jax.sharding.AbstractMesh((count // fsdp, fsdp), sharding.AXES, axis_types=auto)
    with named("mesh"):
        return sharding.make_mesh(count // fsdp, fsdp, devices)


def shapes(run: Parts, batch_size: int, mesh: Mesh) -> Shapes:
    """The arguments of a training step on a mesh.

    Raises:
      ValueError: the batch cannot be split over its devices.
    """
    if batch_size % mesh.size:
        raise ValueError(f"--batch_size={batch_size} must be a multiple of {mesh.size} devices")
    state = jax.eval_shape(partial(objective.init_state, run), jax.eval_shape(partial(parts.init_params, run)))
    batch = preflight.examples(batch_size, run.spec)
    key = jax.eval_shape(partial(parts.key, run.seed, "train"))
    return Shapes(
        _placed(key, sharding.whole(mesh)),
        jax.tree.map(_placed, state, sharding.of_state(mesh, state)),
        jax.tree.map(lambda x: _placed(x, sharding.by_examples(mesh)), batch),
    )


def compiled(run: Parts, given: Shapes) -> Compiled:
    """Compiles a training step for the devices of its arguments.

    Raises:
      jax.errors.JaxRuntimeError: it does not fit, where the compiler knows that (`out_of_memory`), or another reason.
    """
    begin = time.perf_counter()
    step = objective.sharded_step(run, given.key.sharding.mesh, jax.tree.map(lambda x: x.sharding, given.state))
    program = step.lower(*given).compile()
    memory, cost = program.memory_analysis(), program.cost_analysis()
    return Compiled(
        time.perf_counter() - begin,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes,
        cost.get("flops") if cost else None,
        program_text.collectives(program.as_text()),
    )


def out_of_memory(error: Exception) -> bool:
    """Whether a compiler refused a program because it does not fit the device's memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


def state_bytes(given: Shapes) -> dict[str, int]:
    """What each device holds between steps, eq. (1), and its share of a batch, by kind."""
    state = given.state
    kinds = {
        "parameters": state.params,
        "averages": (state.ema, state.power),
        "optimiser": state.opt,
        "other state": (state.step, state.log2_scale, state.carry),
        "batch": given.batch,
    }
    return {name: sum(map(_share, jax.tree.leaves(tree))) for name, tree in kinds.items()}


def estimated(given: Shapes, kept: int, images: float) -> int:
    """Temporary bytes on each device, eq. (2), where an image keeps `kept` bytes and a device has so many of them."""
    return sum(map(_share, jax.tree.leaves(given.state.params))) + int(kept * images)


def images_at_a_time(run: Parts, batch_size: int, devices: int) -> float:
    """Images whose activations a device keeps at a time."""
    return min(batch_size * run.repeat, run.microbatch or batch_size * run.repeat) / devices


def largest_power(fits: Callable[[int], bool], start: int = 1, most: int = 2**14) -> int:
    """The largest power of two that fits, at most `most`, or 0; asks about `start` first, and for few others."""
    n = start
    if not fits(n):
        while n > 1:
            n //= 2
            if fits(n):
                return n
        return 0
    while n < most and fits(2 * n):
        n *= 2
    return n


def _placed(x: Any, where: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _share(x: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array on each device."""
    return prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
