import numpy as np
import pytest

from sparseopt.core.base.types import precision


@pytest.fixture(scope="module")
def double():
    """64-bit types for all tests of a module."""
    with precision(np.dtype(np.float64)):
        yield
