"""Strict JAX for every test: no silent rank promotion, no key used twice, and (pyproject.toml) no warning."""

import os
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from diffusion import data

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


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
def few_optimizations(tmp_path_factory) -> Path:
    """Compiles quickly, for modules whose programs take longer to optimise than to run, and each program once.

    The value is the folder of compiled programs, one for each process: JAX does not write its files atomically.
    """
    cache = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in cache]
    programs = tmp_path_factory.getbasetemp() / "xla"
    compilation_cache.reset_cache()
    for name, value in zip(cache, (str(programs), 0.0), strict=True):
        jax.config.update(name, value)
    jax.config.update("jax_disable_most_optimizations", True)
    yield programs
    jax.config.update("jax_disable_most_optimizations", False)
    for name, value in zip(cache, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
