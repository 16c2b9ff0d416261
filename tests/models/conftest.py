"""Small networks take longer to optimise than to run."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quick():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
