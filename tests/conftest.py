"""Strict JAX for every test: no silent rank promotion, no key used twice, and (pyproject.toml) no warning."""

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
