"""Where arrays lie on many devices: one mesh with the axes "data" and "fsdp", for `jax.jit` and its compiler.

    batches             split over both axes, by examples
    parameters, state   split over "fsdp", each array along its longest axis that can be; whole along "data"      (1)

With fsdp = 1 every device has a whole copy and adds its gradients to those of the others (data parallelism). With more,
an array is gathered where it is used and its gradient is added up in parts, so that parameters, averages and
optimiser each take 1 / fsdp of the memory (ZeRO, Rajbhandari et al. 2020, 1910.02054). The compiler finds the
communication from the shardings alone, so a step is the same function on one device and on a thousand, and its
results agree but for the order of sums.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

AXES = ("data", "fsdp")
# Arrays of fewer values are whole everywhere: gathering them takes longer than the memory is worth.
SMALLEST = 4096


def make_mesh(data: int | None = None, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of data x fsdp devices, by default of all. Neighbouring devices are in one group of `fsdp`.

    Args:
      data: groups that hold a whole state each; None for as many as there are devices for.
      fsdp: devices over which a state is split.
      devices: in place of `jax.devices()`.

    Raises:
      ValueError: data x fsdp is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"fsdp={fsdp} must divide the number of devices, {len(devices)}")
    data = len(devices) // fsdp if data is None else data
    if data * fsdp != len(devices):
        raise ValueError(f"data={data} times fsdp={fsdp} must be the number of devices, {len(devices)}")
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def whole(mesh: Mesh) -> NamedSharding:
    """Every device has all of an array."""
    return NamedSharding(mesh, jax.P())


def by_examples(mesh: Mesh) -> NamedSharding:
    """The first axis of an array [B, ...] is split over all devices."""
    return NamedSharding(mesh, jax.P(AXES))


def of_state(mesh: Mesh, state: Any, smallest: int = SMALLEST) -> Any:
    """A sharding for each array of `state`, a pytree of arrays or of `jax.ShapeDtypeStruct`s, eq. (1).

    It depends on shapes alone, so parameters, their averages and their moments in an optimiser are split alike. An
    array with fewer than `smallest` values, or without an axis that fsdp divides, is whole everywhere.
    """
    fsdp = mesh.shape["fsdp"]

    def of(leaf: Any) -> NamedSharding:
        shape = np.shape(leaf)
        axes = [axis for axis, n in enumerate(shape) if n % fsdp == 0]
        if fsdp == 1 or prod(shape) < smallest or not axes:
            return whole(mesh)
        # Of equally long ones the last, whose parts are contiguous for none but are those of a product's output.
        longest = max(axes, key=lambda axis: (shape[axis], axis))
        return NamedSharding(mesh, jax.P(*(None,) * longest, "fsdp"))

    return jax.tree.map(of, state)


def divided(mesh: Mesh, batch_size: int) -> bool:
    """Whether batches of this size can be split over all devices."""
    return batch_size % mesh.size == 0
