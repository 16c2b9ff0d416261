"""Memory that is kept between steps, where the C library is glibc."""

import platform
import subprocess
import sys

import pytest

from diffusion.cpu import memory

FAULTS = """
import resource, sys
import jax
from diffusion.cpu.memory import keep_memory

if sys.argv[1] == "kept":
    keep_memory()

# 100 MB that exist only while it runs
@jax.jit
def step(x):
    a = jax.numpy.arange(25e6).reshape(5000, 5000) + x
    return a @ a[:8].T

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(1.0).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# The heap grows by a few such blocks until small ones no longer split the free one.
print(sorted(faults() for _ in range(17))[8])
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told to keep memory")
def test_memory_that_was_freed_is_there_again_without_page_faults():
    """Of 100 MB that XLA asks for at every step: there are 24,414 pages of 4 KiB in them."""
    count = {
        case: int(subprocess.run([sys.executable, "-c", FAULTS, case], capture_output=True, check=True).stdout)
        for case in ("returned", "kept")
    }
    assert count["kept"] < count["returned"] / 20


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("there may be no mallopt"))
    monkeypatch.setattr(memory.jax.config, "update", lambda *_: pytest.fail("nothing is gained by waiting"))
    memory.keep_memory()
