"""All tests of networks share compiled programs."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick(compiled_once):
    """Many of them compile the same network."""
