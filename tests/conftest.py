"""Strict JAX for every test: no silent rank promotion, no key used twice, and (pyproject.toml) no warning."""

import jax
import pytest

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


@pytest.fixture(scope="module")
def few_optimizations():
    """Compiles quickly, for modules whose programs take longer to optimise than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
