"""Devices that `experiments.plan` knows, by their vendors' figures, and how to compile for them without having them.

v5e:4x4, v5p:4x4x4    a TPU slice by its topology, in chips
h100:8, h100:4x8      GPUs, or hosts x GPUs of each
cpu:8                 so many devices of this machine's CPU
"""

import importlib.util
import os
import re
from math import prod
from typing import Any, NamedTuple

GB, GIB, T = 1e9, 2**30, 1e12  # what vendors call a GB of memory is 2^30 bytes, less what the device keeps for itself


class Device(NamedTuple):
    """A device, by its vendor's figures; None where there is no such figure.

    Attributes:
      memory: bytes.
      flops: dense products in bfloat16 per second, at the peak.
      link_bandwidth: bytes per second that it sends to the devices next to it (TPU: all its links; GPU: NVLink).
      host_bandwidth: bytes per second that it sends to other hosts; None where links go on between hosts.
      description: the file in bench/targets that XLA compiles with.
    """

    kind: str  # tpu, gpu or cpu
    memory: float | None = None
    flops: float | None = None
    link_bandwidth: float | None = None
    host_bandwidth: float | None = None
    description: str | None = None


# TPUs: cloud.google.com/tpu/docs/v5e, /v5p and /v6e. Half of what is given for both directions of the links.
# H100 SXM and H200: their data sheets, without sparsity; NVLink 900 GB/s in both directions, 400 Gb/s InfiniBand for
# each GPU. The H200's processor is the H100's.
DEVICES = {
    "v5e": Device("tpu", 16 * GIB, 197 * T, 200 * GB),
    "v5p": Device("tpu", 95 * GIB, 459 * T, 600 * GB),
    "v6e": Device("tpu", 32 * GIB, 918 * T, 400 * GB),
    "h100": Device("gpu", 80 * GIB, 989 * T, 450 * GB, 50 * GB, "h100"),
    "h200": Device("gpu", 141 * GIB, 989 * T, 450 * GB, 50 * GB, "h100"),
    "cpu": Device("cpu"),
}
EXAMPLES = "cpu:8, v5e:4x4, v5p:4x4x4, v6e:8x8, h100:1, h200:8 or h100:4x8 (hosts x devices)"


class Target(NamedTuple):
    """So many devices of one kind: `shape` is a TPU's topology, or (hosts, devices of each)."""

    name: str
    shape: tuple[int, ...]

    @property
    def device(self) -> Device:
        return DEVICES[self.name]

    @property
    def count(self) -> int:
        """Of devices."""
        return prod(self.shape)

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second that a device sends, over the slowest of the links that all devices use."""
        several = self.device.kind == "gpu" and self.shape[0] > 1
        return self.device.host_bandwidth if several else self.device.link_bandwidth

    def __str__(self) -> str:
        shape = self.shape[1:] if self.device.kind != "tpu" and self.shape[0] == 1 else self.shape
        return f"{self.name}:{'x'.join(map(str, shape))}"


def parse(text: str) -> Target:
    """The target of a flag, --target=v5p:4x4x4.

    Raises:
      ValueError: there is no such device, or no such shape of one.
    """
    name, _, shape = text.partition(":")
    if name not in DEVICES:
        raise ValueError(f"--target={text}: the devices known are {', '.join(DEVICES)}, as in {EXAMPLES}")
    kind, axes = DEVICES[name].kind, {"cpu": (1,), "gpu": (1, 2), "tpu": (2, 3)}[DEVICES[name].kind]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or len(shape.split("x")) not in axes:
        raise ValueError(f"--target={text}: say how many devices, as in {EXAMPLES}")
    numbers = tuple(map(int, shape.split("x")))
    return Target(name, numbers if kind == "tpu" or len(numbers) == 2 else (1, *numbers))


def missing(target: Target) -> str | None:
    """The package to install to compile for a target, if it is not there."""
    from experiments.bench.accelerator import compile_ahead

    kind = target.device.kind
    if kind == "tpu":
        return None if importlib.util.find_spec("libtpu") else "libtpu"
    return compile_ahead.missing_plugin() if kind == "gpu" else None


def environment(target: Target) -> dict[str, str]:
    """The variables that JAX must find when it is imported, to compile for a target on this machine's CPU."""
    from experiments.bench.accelerator import compile_ahead

    if target.device.kind == "gpu":
        return compile_ahead.environment()
    if target.device.kind == "tpu":
        # No TPU is used, so several processes may compile at a time.
        return {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
    others = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", "")).split()
    flags = [*others, f"--xla_force_host_platform_device_count={target.count}"]
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}


def devices(target: Target) -> list[Any]:
    """The devices to compile for, of which only a CPU's are there; JAX was imported in `environment`.

    Raises:
      ValueError: the compiler has no slice of this shape.
    """
    import jax
    from jax.experimental import topologies

    from experiments.bench.accelerator import compile_ahead

    if target.device.kind == "cpu":
        return jax.devices()
    if target.device.kind == "gpu":
        card = target.device.description
        return compile_ahead.devices_of(card, compile_ahead.target(card), *target.shape)
    # One chip is the first of the smallest slice that there is.
    smallest = "x".join(["2", "2", "1"][: len(target.shape)])
    name = str(target) if target.count > 1 else f"{target.name}:{smallest}"
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)[: target.count]
    except Exception as e:  # of several types, with the shapes that it knows
        raise ValueError(f"--target={target}: the compiler has no such slice: {str(e).splitlines()[0]:.300}") from e
