"""Quick compiles."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """The problems are small and their shapes many: what XLA optimises costs more than it gives."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
