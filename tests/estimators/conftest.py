"""A small regression for all sparse linear models."""

import pytest

M, P = 60, 30
# For our estimators and for scikit-learn's.
TIGHT = {"tol": 1e-12}
EXACT = {"tol": 1e-14, "max_iter": 100_000}


@pytest.fixture
def X(rng):
    return rng.standard_normal((M, P))


@pytest.fixture
def y(X, rng):
    return X[:, 0] - 2 * X[:, 1] + X[:, 2] + rng.standard_normal(M) + 5


@pytest.fixture
def weights(rng):
    return rng.integers(0, 3, M)
