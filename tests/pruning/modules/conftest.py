import jax.numpy as jnp
import numpy as np
import pytest

from tests.pruning.modules.kinds import TOKENS, WIDTH


@pytest.fixture
def batches(rng):
    """Inputs that differ in size, so that they count."""
    scales = np.geomspace(0.2, 3, WIDTH)
    return [jnp.asarray(rng.standard_normal((TOKENS, WIDTH)) * scales, jnp.float32) for _ in range(3)]
