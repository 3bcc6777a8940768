"""The inverse by products is the inverse, at every size and on both sides of the recursion's cuts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.core.dense import LEAF, spd_inverse
from sparseopt.trend.filter import ENABLE_X64

SIZES = [1, 100, LEAF, LEAF + 1, 300, 576]
# One program a size and dtype.
inverse_of = jax.jit(spd_inverse)


def make_matrix(rng, size, condition):
    """Symmetric, with eigenvalues from 1 / condition to 1, float64."""
    basis, _ = np.linalg.qr(rng.standard_normal((size, size)))
    matrix = basis * np.geomspace(1, 1 / condition, size) @ basis.T
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize("size", SIZES)
def test_it_is_numpys_inverse_in_float64(rng, size):
    matrix = make_matrix(rng, size, 1e4)
    with ENABLE_X64(True):
        inverse = np.asarray(inverse_of(jnp.asarray(matrix)))
    assert inverse.dtype == np.float64
    exact = np.linalg.inv(matrix)
    assert np.linalg.norm(inverse - exact) <= 1e-10 * np.linalg.norm(exact)


@pytest.mark.parametrize("size", SIZES)
def test_the_error_in_float32_is_a_small_multiple_of_eps_times_the_condition_number(rng, size):
    condition = 1e3
    matrix = make_matrix(rng, size, condition).astype(np.float32)
    inverse = np.asarray(inverse_of(jnp.asarray(matrix)), np.float64)
    exact = np.linalg.inv(matrix.astype(np.float64))
    assert np.linalg.norm(inverse - exact, 2) <= 5 * np.finfo(np.float32).eps * condition * np.linalg.norm(exact, 2)
    np.testing.assert_array_equal(inverse, inverse.T)


@pytest.mark.parametrize("size", SIZES)
def test_the_identity_is_its_own_inverse_to_the_last_bit(size):
    np.testing.assert_array_equal(inverse_of(jnp.eye(size)), np.eye(size))


def test_a_matrix_that_is_not_definite_has_no_silent_answer():
    assert not np.isfinite(inverse_of(jnp.zeros((LEAF + 1, LEAF + 1)))).all()
