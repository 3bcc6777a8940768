"""What the core is built on: pytrees, programs on a CPU, exact counts of largest entries, inverses of every size."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import sparseopt as so
from sparseopt.core.base import compile as compile_module
from sparseopt.core.base import thresholds
from sparseopt.core.base.compile import OPTIONS, Jitted
from sparseopt.core.base.dense import WHOLE, spd_inverse, spd_inverse_factor
from sparseopt.core.base.thresholds import n_of_m_mask, soft_threshold
from tests.tiers import often


def test_numbers_are_leaves_named_by_their_field_and_choices_are_structure():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(so.MCP(1.0))]
    assert paths == [".weight", ".gamma"]
    one, other, turned = (jax.tree.structure(so.RowTopK(k, axis=axis)) for k, axis in ((1, 0), (2, 0), (1, 1)))
    assert one == other != turned
    assert jax.tree.map(lambda k: k + 1, so.RowTopK(1, axis=1)) == so.RowTopK(2, axis=1)


def test_structures_of_different_classes_differ():
    for nodes in ((so.L0(1.0), so.L1(1.0), so.GroupL2(1.0)), (so.MCP(1.0), so.SCAD(1.0))):
        for one, other in itertools.combinations(nodes, 2):
            assert jax.tree.structure(one) != jax.tree.structure(other)
            assert jax.tree.structure([one, 1]) != jax.tree.structure([other, 1])


NAMES, MOST = ("first", "second", "third"), [most for most, _ in OPTIONS]
FIRST, SECOND, _ = MOST


@pytest.mark.parametrize("size", [4, SECOND, SECOND + 1])
def test_a_shape_is_traced_once_and_every_transformation_gives_what_a_call_gives(size):
    traces = []

    def function(x, power):
        traces.append(x.shape)
        return (x**power).sum()

    call, x = Jitted(function, static_argnums=1), jnp.full(size, 2.0)
    for _ in range(3):
        assert float(call(x, 3)) == 8 * size
    assert traces == [(size,)]
    # Known arguments inside a traced function: its program is part of the one around it.
    assert jax.jit(lambda: call(x, 3))() == jax.jit(call, static_argnums=1)(x, 3) == 8 * size
    np.testing.assert_array_equal(jax.vmap(lambda a: call(a, 3))(jnp.stack([x, 2 * x])), [8 * size, 64 * size])
    np.testing.assert_array_equal(jax.grad(lambda a: call(a, 3))(x), 3 * x**2)
    assert jax.vmap(lambda scale: scale * call(x, 3))(jnp.ones(2)).tolist() == [8 * size, 8 * size]


@pytest.mark.parametrize(
    ("size", "program"),
    [(3, "first"), (FIRST, "first"), (FIRST + 1, "second"), (SECOND, "second"), (SECOND + 1, "third")],
)
def test_the_entries_choose_the_program(monkeypatch, size, program):
    call, taken = Jitted(lambda x: x), []
    monkeypatch.setattr(compile_module, "_knows_options", lambda: True)
    monkeypatch.setattr(call, "usual", lambda x: taken.append("usual"))
    programs = [(most, lambda x, name=name: taken.append(name)) for name, most in zip(NAMES, MOST, strict=True)]
    monkeypatch.setattr(call, "on_cpu", programs)
    call(np.ones(size, np.float32))
    jax.jit(call)(np.ones(size, np.float32))
    assert taken == [program, "usual"]


def test_a_jaxlib_that_does_not_know_the_options_compiles_as_usual(monkeypatch):
    assert compile_module._knows_options.__wrapped__()
    monkeypatch.setattr(compile_module, "OPTIONS", [(9, {"xla_no_such_option": 1})])
    assert not compile_module._knows_options.__wrapped__()


# Compiled once for every size: what is tested is one program for every count.
kth_largest, top_k_mask = jax.jit(thresholds.kth_largest), jax.jit(thresholds.top_k_mask)

magnitudes = hnp.arrays(
    np.float32,
    st.sampled_from([(), (1,), (60,), (6, 7), (3, 4, 5)]),
    elements=st.floats(0, 2.0**100, width=32, allow_subnormal=False) | st.sampled_from([0.0, 1.0]),
)


@settings(max_examples=40, deadline=None)
@given(magnitudes)
def test_the_k_largest_are_kept_and_equal_ones_win_in_the_order_of_the_flattened_array(x):
    order = np.argsort(-x, axis=None, kind="stable")
    for k in range(x.size + 1):
        mask = np.asarray(top_k_mask(x, k))
        assert mask.shape == x.shape
        assert np.flatnonzero(mask).tolist() == sorted(order[:k])
        assert k == 0 or kth_largest(x, k) == x.flat[order[k - 1]]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_kth_largest_is_that_of_a_sort_in_every_weight_dtype(rng, dtype):
    x = jnp.abs(jnp.asarray(rng.standard_normal((20, 30)), dtype))
    for k in (1, 100, 299, 600):
        assert float(kth_largest(x, k)) == float(jnp.sort(x.ravel())[-k])
        assert int(top_k_mask(x, k).sum()) == k
    assert top_k_mask(x, 700).all()
    assert np.isinf(kth_largest(x, 0))


@pytest.mark.parametrize(("n", "m", "axis"), [(2, 4, 0), (1, 4, 1), (3, 3, 1)])
def test_n_of_m_mask_keeps_the_first_of_the_largest_n_of_every_group(rng, n, m, axis):
    for score in (rng.random((24, 48)).astype(np.float32), np.asarray(rng.integers(0, 3, (24, 48)), np.float32)):
        mask = np.moveaxis(np.asarray(n_of_m_mask(jnp.asarray(score), n, m, axis)), axis, 0)
        groups = np.moveaxis(score, axis, 0).reshape(-1, m, mask.shape[1])
        expected = np.zeros(groups.shape, bool)
        np.put_along_axis(expected, np.argsort(-groups, axis=1, kind="stable")[:, :n], True, axis=1)
        np.testing.assert_array_equal(mask.reshape(groups.shape), expected)


def test_the_slope_of_a_soft_threshold_of_zero_is_that_from_above():
    x = jnp.array([-2.0, 0.5, jnp.nan])
    np.testing.assert_array_equal(soft_threshold(x, 0.0), x)
    slope = jax.jacfwd(lambda threshold: soft_threshold(x[:2], threshold))(0.0)
    np.testing.assert_array_equal(slope, [1.0, -1.0])


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
