"""Shared by all tests: two CPU threads are enough, and random arrays come from one seeded generator."""

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20251125)
