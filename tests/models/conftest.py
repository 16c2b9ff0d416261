"""All tests of networks compile quickly."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick(few_optimizations):
    """Small networks take longer to optimise than to run."""
