"""Inverse and inverse factor by products are correct at every size, on both sides of the panel borders."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.core.base.dense import WHOLE, spd_inverse, spd_inverse_factor
from tests.tiers import often

SIZES = [1, 17, 129, WHOLE, WHOLE + 1]
EPS = np.finfo(np.float32).eps
# One program a size and dtype.
inverse_of, factor_of = jax.jit(spd_inverse), jax.jit(spd_inverse_factor)


def make_matrix(rng, size, condition):
    """Symmetric, with eigenvalues from 1 / condition to 1, float64."""
    basis, _ = np.linalg.qr(rng.standard_normal((size, size)))
    matrix = basis * np.geomspace(1, 1 / condition, size) @ basis.T
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize("size", often(SIZES, 1, 17, 129))
def test_it_is_numpys_inverse_in_float64(rng, size):
    matrix = make_matrix(rng, size, 1e4)
    with jax.enable_x64(True):
        inverse = np.asarray(inverse_of(jnp.asarray(matrix)))
    assert inverse.dtype == np.float64
    exact = np.linalg.inv(matrix)
    assert np.linalg.norm(inverse - exact) <= 1e-10 * np.linalg.norm(exact)


@pytest.mark.parametrize("size", often(SIZES, 17, 129, WHOLE + 1))
def test_the_error_in_float32_is_a_small_multiple_of_eps_times_the_condition_number(rng, size):
    matrix = make_matrix(rng, size, 1e3).astype(np.float32)
    inverse = np.asarray(inverse_of(jnp.asarray(matrix)), np.float64)
    exact = np.linalg.inv(matrix.astype(np.float64))
    assert np.linalg.norm(inverse - exact, 2) <= 5 * EPS * 1e3 * np.linalg.norm(exact, 2)
    np.testing.assert_array_equal(inverse, inverse.T)


@pytest.mark.parametrize("size", often(SIZES, 17, WHOLE + 1))
def test_the_factor_is_that_of_a_matrix_that_differs_by_rounding_alone(rng, size):
    matrix = make_matrix(rng, size, 1e6).astype(np.float32)
    factor = np.asarray(factor_of(jnp.asarray(matrix)), np.float64)
    np.testing.assert_array_equal(factor, np.triu(factor))
    assert (np.diagonal(factor) > 0).all()
    root = np.linalg.inv(factor)
    assert np.linalg.norm(root @ root.T - matrix.astype(np.float64), 2) <= 20 * EPS


@pytest.mark.parametrize("size", often(SIZES, 17, 129, WHOLE + 1))
def test_the_identity_is_its_own_inverse_to_the_last_bit(size):
    np.testing.assert_array_equal(inverse_of(jnp.eye(size)), np.eye(size))


@pytest.mark.parametrize("last", [0.0, -1.0])
def test_a_matrix_that_is_not_definite_has_no_silent_answer(last):
    matrix = jnp.eye(WHOLE).at[-1, -1].set(last)
    assert not np.isfinite(inverse_of(matrix)).any()
    assert not np.isfinite(factor_of(matrix)[:, -1]).any()


@pytest.mark.parametrize("found", [inverse_of, factor_of], ids=["inverse", "factor"])
def test_the_program_of_large_matrices_does_not_grow_with_them_and_calls_no_library(found):
    few, many = (
        found.lower(jax.ShapeDtypeStruct((size, size), jnp.float32)).as_text() for size in (2 * WHOLE, 32 * WHOLE)
    )
    assert re.sub(r"\d+", "", few) == re.sub(r"\d+", "", many)
    assert "custom_call" not in few


def test_a_batch_is_inverted_as_one_by_one(rng):
    batch = jnp.asarray([make_matrix(rng, 17, 1e2) for _ in range(2)], jnp.float32)
    np.testing.assert_allclose(jax.vmap(inverse_of)(batch)[1], inverse_of(batch[1]), rtol=1e-4, atol=1e-4)
