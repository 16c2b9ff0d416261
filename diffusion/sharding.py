"""Where arrays lie on many devices: one mesh with the axes "data" and "fsdp", for `jax.jit` and its compiler.

    batches             split over both axes, by examples
    parameters, state   split over "fsdp", each along the longest axis that fsdp divides; whole along "data"      (1)

With fsdp = 1 every device has a whole copy and adds its gradients to those of the others (data parallelism). With more,
an array is gathered where it is used and its gradient is added up in parts, so that parameters, averages and
optimiser each take 1 / fsdp of the memory (ZeRO, Rajbhandari et al. 2020, 1910.02054). The compiler finds the
communication from the shardings, so a step is the same function on one device and on a thousand, and its results agree
but for the order of sums.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
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
      ValueError: data x fsdp is not the number of devices, or does not fit the links of a TPU slice.
    """
    devices = jax.devices() if devices is None else list(devices)
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"fsdp={fsdp} must divide the number of devices, {len(devices)}")
    data = len(devices) // fsdp if data is None else data
    if data * fsdp != len(devices):
        raise ValueError(f"data={data} times fsdp={fsdp} must be the number of devices, {len(devices)}")
    try:
        return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)
    except NotImplementedError as e:
        raise ValueError(
            f"fsdp={fsdp} does not fit the slice: it must be a product of some of its sides, 1 or {len(devices)}"
        ) from e


def whole(mesh: Mesh) -> NamedSharding:
    """Every device has all of an array."""
    return NamedSharding(mesh, jax.P())


def by_examples(mesh: Mesh) -> NamedSharding:
    """The first axis of an array [B, ...] is split over all devices."""
    return NamedSharding(mesh, jax.P(AXES))


@contextmanager
def in_use(mesh: Mesh | None) -> Iterator[None]:
    """Within it, what is traced splits examples over this mesh, see `split_examples`; None changes nothing."""
    if mesh is None:
        yield
    else:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield


def split_examples(x: jax.Array) -> jax.Array:
    """x [B, ...] with its examples split over all devices of the mesh in use; as it is without one.

    Networks say so of what their blocks take. From the shardings of the parameters alone the compiler would rather
    split features: a training step of four of JiT-G's blocks on 16 chips took five times the memory.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names != AXES or mesh.size == 1 or x.shape[0] % mesh.size:
        return x
    if any(kind != AxisType.Auto for kind in mesh.axis_types):  # as within `jax.shard_map`
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(AXES))


def of_state(mesh: Mesh, state: Any, smallest: int | None = None) -> Any:
    """A sharding for each array of `state`, a pytree of arrays or of `jax.ShapeDtypeStruct`s, eq. (1).

    It depends on shapes alone, so parameters, their averages and their moments in an optimiser are split alike. An
    array with fewer than `smallest` values (`SMALLEST`), or without an axis that fsdp divides, is whole everywhere.
    """
    fsdp, smallest = mesh.shape["fsdp"], SMALLEST if smallest is None else smallest

    def of(leaf: Any) -> NamedSharding:
        shape = np.shape(leaf)
        axes = [axis for axis, n in enumerate(shape) if n % fsdp == 0]
        if fsdp == 1 or prod(shape) < smallest or not axes:
            return whole(mesh)
        # Of equally long ones the last, the output of a matrix product.
        longest = max(axes, key=lambda axis: (shape[axis], axis))
        return NamedSharding(mesh, jax.P(*(None,) * longest, "fsdp"))

    return jax.tree.map(of, state)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh on which the arrays of a pytree lie; None if they lie on none, as on a single device."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            return leaf.sharding.mesh
    return None


def put(tree: Any, shardings: Any) -> Any:
    """The arrays of a pytree with these shardings, one for all or a pytree of them.

    Every process passes the same values, which it has whole, and keeps the part of its own devices.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(_put, tree, shardings)


def put_rows(mesh: Mesh, tree: Any, batch_size: int) -> Any:
    """A batch whose examples are split over all devices, from the examples `rows` of it that this process has read."""
    sharding, own = by_examples(mesh), rows(mesh, batch_size)
    if len(own) == batch_size:
        return put(tree, sharding)
    place = {row: i for i, row in enumerate(own.tolist())}

    def put_own(x: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            first, *_ = index
            start, stop, _ = first.indices(batch_size)
            return x[place[start] : place[start] + stop - start]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, part)

    return jax.tree.map(put_own, tree)


def rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which examples of a batch lie on devices of this process, ascending, when it is split over all devices.

    Raises:
      ValueError: batch_size is not a multiple of the number of devices.
    """
    if batch_size % mesh.size:
        raise ValueError(f"batch_size={batch_size} must be a multiple of the {mesh.size} devices")
    found: set[int] = set()
    for index in by_examples(mesh).addressable_devices_indices_map((batch_size,)).values():
        found.update(range(*index[0].indices(batch_size)))
    return np.array(sorted(found))


def gathered(tree: Any) -> Any:
    """A pytree of arrays, no typed keys, as NumPy arrays, whole, in every process; all processes call it together."""

    def local(x: Any) -> Any:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            from jax.experimental import multihost_utils

            return multihost_utils.process_allgather(x, tiled=True)
        return x

    return jax.tree.map(np.asarray, jax.device_get(jax.tree.map(local, tree)))


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
