"""Freed memory is kept by the process, where the C library is glibc."""

import ctypes
import os
import platform

import jax


def keep_memory() -> None:
    """Lets the process keep the memory that it frees, where the C library is glibc, and makes JAX wait for a CPU.

    On a CPU XLA allocates the temporary arrays of a step anew each time. glibc returns blocks of that size to the
    system and gets them back as pages to be zeroed, one fault for every 4 KiB: a quarter of a training step on two
    cores. Call it before the first array is made; later it has no effect.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt, trim_threshold, mmap_max, arena_max = ctypes.CDLL(None).mallopt, -1, -4, -8
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    # Only the main thread's arena grows past 64 MiB without mmap, so that thread must be the one that allocates.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if _several_cpu_devices():
        # Each has a thread of its own: all must share that arena, though they wait for each other in it.
        mallopt(arena_max, 1)


def _several_cpu_devices() -> bool:
    """Whether the CPU will be cut into several devices, as tests do."""
    asked = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    return asked or jax.config.jax_num_cpu_devices > 1
