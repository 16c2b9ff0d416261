"""Strict JAX for every test: no silent rank promotion, no warning (pyproject.toml) and, with $TEST_KEY_REUSE, no key
used twice: `.ci/run` sets it for a part of the tests, and it takes a twelfth of the time.

Programs are compiled with few optimisations, here and in the processes that tests start, since most take longer to
compile than to run: a third of the time. The jobs and notebooks of `.ci/run` are compiled as users compile them.
"""

import gc
import os
from importlib import metadata
from pathlib import Path

_QUICK = ["--xla_cpu_parallel_codegen_split_count=1"]
if metadata.version("jaxlib").startswith("0.10."):  # later versions have no such flag, and an unknown one is fatal
    _QUICK.append("--xla_cpu_use_fusion_emitters=false")
# Read when jax is imported, and when it compiles first.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_QUICK])
# Tracing makes many objects, few of them in cycles.
gc.set_threshold(200_000, 20, 100)

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

from diffusion import data  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", bool(os.environ.get("TEST_KEY_REUSE")))


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture(scope="session")
def mnist5k_root(tmp_path_factory):
    """A folder of data sets in which mnist5k is prepared."""
    folder = tmp_path_factory.mktemp("tfds")
    data.load("mnist5k", "test", data_dir=folder)
    return folder


@pytest.fixture(scope="session")
def mnist5k_splits(mnist5k_root):
    """The training and the held-out digits."""
    return [data.load("mnist5k", split, data_dir=mnist5k_root) for split in ("train", "test")]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """One folder for all processes of this test session."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory) -> Path:
    """Each program is compiled once in the tests of a module, and of other modules that use this.

    The value is the folder of compiled programs, one for each process: JAX does not write its files atomically.
    """
    cache = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in cache]
    programs = tmp_path_factory.getbasetemp() / "xla"
    compilation_cache.reset_cache()
    for name, value in zip(cache, (str(programs), 0.0), strict=True):
        jax.config.update(name, value)
    yield programs
    for name, value in zip(cache, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
