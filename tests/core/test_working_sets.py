"""Sparse regression by working sets: the optimum and its gap, the two forms, matrices of every kind, bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

import sparseopt as so
from sparseopt.core.working_sets import rounds
from tests.core.conic import Conic, absolute, lengths
from tests.core.problems import LOSSES, PENALTIES, Rows
from tests.tiers import often

SET = so.WorkingSet()
ROWS, COLUMNS = 40, 9
SMOOTH = ["squares", "logistic", "poisson", "huber", "squared hinge"]
TIGHT = {"squares": 1e-10, "logistic": 1e-7}

pytestmark = pytest.mark.usefixtures("double")


def drawn(name, seed=0, rows=ROWS, columns=COLUMNS):
    """A matrix, a target, weights of which some are 0, and the smooth loss."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, columns))
    target = LOSSES[name].target(rng, matrix[:, :3] @ [1.0, -1.0, 0.5])
    return matrix, target, rng.uniform(0.2, 2, rows) * (rng.random(rows) < 0.8)


def optimum(name, matrix, target, weights, intercept, *terms):
    """Clarabel's least objective and the answer that has it; `terms` add those of the penalty."""
    form, seen, columns = Conic(matrix.shape[1] + intercept), weights > 0, matrix.shape[1]
    whole = np.column_stack([matrix, np.ones(len(matrix))]) if intercept else matrix
    LOSSES[name].term(form, sparse.csr_array(whole[seen]), target[seen], weights[seen])
    for term, *given in terms:
        term(form, sparse.eye_array(columns, columns + intercept).tocsr(), *given)
    return form.least(), form.answer


@pytest.mark.parametrize("penalty", ["L1", "elastic net", "box", "nonnegative"])
@pytest.mark.parametrize(("name", "intercept"), [*((name, False) for name in SMOOTH), ("squares", True)])
def test_the_optimum_is_that_of_an_interior_point_method_and_the_gap_bounds_the_error(name, penalty, intercept):
    matrix, target, weights = drawn(name)
    entries = (np.linspace(0.2, 3, COLUMNS), np.full(COLUMNS, -0.4), np.linspace(0.1, 0.9, COLUMNS))
    make, term = PENALTIES[penalty]
    loss = dataclasses.replace(LOSSES[name].make(matrix, target, weights), intercept=intercept)
    problem = so.Problem(loss, make(*entries))
    of_penalty = lambda form, rows: term(form, Rows(rows, np.ones(COLUMNS), *entries))  # noqa: E731
    found, (least, _) = so.solve(problem, SET).check(), optimum(name, matrix, target, weights, intercept, [of_penalty])
    np.testing.assert_allclose(found.objective, problem.value(found.value), rtol=1e-12)
    np.testing.assert_allclose(found.objective, least, rtol=1e-6)
    assert found.gap >= found.objective / least - 1 - 1e-8


@pytest.mark.parametrize(("name", "columns"), [("squares", 300), ("squares", 2300), ("logistic", 300)])
def test_of_many_columns_few_rounds_find_the_optimum_and_every_gap_bounds_the_error(name, columns, monkeypatch):
    monkeypatch.setattr(rounds, "MANY", 60 * 2300)  # a large matrix is searched in two stages
    matrix, target, _ = drawn(name, 1, 60, columns)
    weight = 0.1 * np.max(np.abs(matrix.T @ (target - target.mean())))
    problem = so.Problem(LOSSES[name].make(matrix, target, None), so.L1(weight))
    best = so.solve(problem, SET, tol=TIGHT[name]).check()
    for steps in range(4):
        found = so.solve(problem, SET, tol=TIGHT[name], max_steps=steps)
        assert found.steps <= steps
        np.testing.assert_allclose(found.objective, problem.value(found.value), rtol=1e-12)
        assert found.gap >= found.objective / best.objective - 1 - TIGHT[name]
    # The gradient of every entry is within the weight, and at it where the answer is not 0.
    slope = -np.asarray(problem.loss.gradient(best.value)) / weight
    assert np.max(np.abs(slope)) <= 1 + 1e-4
    used = np.flatnonzero(best.value)
    np.testing.assert_allclose(slope[used], np.sign(best.value[used]), atol=1e-4)
    assert so.solve(problem, SET, best.value).steps == 0


CONCAVE = {
    "L0": so.L0(12.0),
    "MCP": so.MCP(6.0, gamma=0.2),
    "SCAD": so.SCAD(6.0),
    "log sum": so.LogSum(6.0, 0.3),
    "half-power": so.LHalf(9.0),
}


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("name", CONCAVE)
def test_no_change_of_one_entry_improves_the_answer_of_a_penalty_that_is_not_convex(name, intercept):
    matrix, target, weights = drawn("squares", 3, ROWS, 60)
    loss = so.LeastSquares(matrix, target + 4 * intercept, weights, intercept=intercept)
    problem = so.Problem(loss, CONCAVE[name])
    assert isinstance(so.chosen_solver(problem).solver, so.WorkingSet)
    found = so.solve(problem)
    assert found.status == so.Status.STATIONARY
    assert 0 < np.count_nonzero(found.value) < 40
    # The objective as a function of one entry, at other values of it.
    changes = np.concatenate([-np.geomspace(1e-3, 5, 60), np.geomspace(1e-3, 5, 60)])
    moved = found.value + np.concatenate([np.kron(np.eye(found.value.size), changes[:, None]), -np.diag(found.value)])
    values = jax.vmap(problem.value)(moved)
    np.testing.assert_allclose(found.objective, problem.value(found.value), rtol=1e-12)
    assert np.min(values) >= found.objective * (1 - 1e-9)
    # Nor does a sparse matrix change it, nor a start at the answer.
    sparse_loss = dataclasses.replace(loss, matrix=so.LeastSquares(sparse.csc_array(matrix), target).matrix)
    if not intercept:
        np.testing.assert_allclose(so.solve(so.Problem(sparse_loss, CONCAVE[name])).objective, found.objective)
    assert so.solve(problem, start=found.value).steps == 0


@pytest.mark.parametrize("sparse_within", [False, True])
@pytest.mark.parametrize(("name", "intercept"), often([("squares", True), ("logistic", False)], ("squares", True)))
def test_groups_have_the_optimum_and_a_gap_that_bounds_the_error(name, intercept, sparse_within):
    matrix, target, weights = drawn(name, 5, ROWS, 150)
    labels = np.random.default_rng(0).integers(0, 50, 150)
    loss = dataclasses.replace(LOSSES[name].make(matrix, target, weights), intercept=intercept)
    of_groups = np.append(0.0, np.linspace(1, 4, 49))
    penalty = so.GroupL2(of_groups, groups=labels)
    terms = [[lengths, of_groups[1:], [np.flatnonzero(labels == group) for group in range(1, 50)]]]
    if sparse_within:
        of_entries = np.linspace(0, 2, 150)
        penalty = so.SparseGroup(of_entries, of_groups, groups=labels)
        terms.append([absolute, of_entries])
    problem, (least, best) = so.Problem(loss, penalty), optimum(name, matrix, target, weights, intercept, *terms)
    for tol in (1e-2, 1e-8):
        found = so.solve(problem, SET, tol=tol).check()
        assert found.gap >= found.objective / least - 1 - 1e-8
        np.testing.assert_allclose(found.objective, problem.value(found.value), rtol=1e-12)
    np.testing.assert_allclose(found.objective, least, rtol=1e-7)
    np.testing.assert_allclose(found.value, best, atol=1e-3)
    # Some groups are 0, and without weights of the entries no group is so in part.
    zeros, sizes = np.bincount(labels, found.value[:150] == 0), np.bincount(labels)
    assert np.any((zeros > 0) & (zeros < sizes)) == sparse_within
    assert 0 < np.count_nonzero(zeros) < np.count_nonzero(sizes)
    levels = so.path(problem, num=5).check()
    assert np.max(np.abs(levels.values[[0]].toarray()[0, :150][labels > 0])) <= 1e-4


@pytest.mark.parametrize("name", SMOOTH)
def test_in_float32_the_answer_is_float32_and_its_gap_bounds_the_error(name):
    matrix, target, _ = drawn(name, 2)
    problem = so.Problem(LOSSES[name].make(matrix.astype(np.float32), target.astype(np.float32), None), so.L1(1.0))
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64) if np.ndim(leaf) else leaf, problem)
    found, best = so.solve(problem, SET).check(), so.solve(wide, SET).check()
    assert found.value.dtype == found.objective.dtype == np.float32
    reached = float(wide.value(found.value.astype(np.float64)))
    assert found.gap >= reached / best.objective - 1 - 2e-6


@pytest.mark.parametrize(("name", "kind"), [("squares", "sparse"), ("logistic", "dense")])
def test_the_form_under_jit_and_vmap_has_the_same_answer_and_derivatives(name, kind):
    matrix, target, weights = drawn(name, 3)
    given = matrix if kind == "dense" else sparse.csr_array(matrix * (np.abs(matrix) > 0.5))
    loss = dataclasses.replace(LOSSES[name].make(given, target, weights), intercept=name == "squares")

    def answer(weight):
        return so.solve(so.Problem(loss, so.L1(weight)), SET, tol=1e-7)

    levels = np.array([0.5, 2.0])
    host = [so.solve(so.Problem(loss, so.L1(level)), SET, tol=1e-7).check() for level in levels]
    total = jax.value_and_grad(lambda level: (jnp.sum((found := answer(level)).value), found), has_aux=True)
    (_, together), slopes = jax.jit(jax.vmap(total))(levels)
    assert set(together.status.tolist()) == {so.Status.CONVERGED}
    np.testing.assert_allclose(together.value, [one.value for one in host], atol=1e-4)
    np.testing.assert_allclose(together.objective, [one.objective for one in host], rtol=1e-8)
    ends = [so.solve(so.Problem(loss, so.L1(2.0 + apart)), SET, tol=0).value.sum() for apart in (-1e-2, 1e-2)]
    np.testing.assert_allclose(slopes[1], (ends[1] - ends[0]) / 2e-2, rtol=1e-3)


def test_an_answer_with_more_entries_than_the_static_set_is_not_found_and_says_so():
    matrix, target, _ = drawn("squares", 4)
    problem = so.Problem(so.LeastSquares(matrix, target), so.L1(1e-3))
    few, enough = so.WorkingSet(most=4), so.WorkingSet(most=COLUMNS)
    assert np.count_nonzero(so.solve(problem, few).check().value) > few.most
    assert jax.jit(lambda: so.solve(problem, few, max_steps=50).status)() == so.Status.MAX_STEPS
    assert jax.jit(lambda: so.solve(problem, enough, max_steps=50).status)() == so.Status.CONVERGED


@pytest.mark.parametrize("name", ["squares", "logistic"])
def test_matrices_of_every_kind_have_one_answer_and_are_left_unchanged(name):
    rng = np.random.default_rng(5)
    whole = rng.integers(-2, 3, (ROWS, COLUMNS))
    whole[:, 4] = 0
    target = LOSSES[name].target(rng, whole[:, 0] - 0.5 * whole[:, 1])
    row, column = np.nonzero(whole)
    entries = np.concatenate([whole[row, column] - 0.5, np.full(row.size, 0.5)])  # every place twice
    twice = sparse.coo_array((entries, (np.tile(row, 2), np.tile(column, 2))), shape=whole.shape)
    mixed = sparse.csc_array(whole * 1.0)
    for start, end in zip(mixed.indptr[:-1], mixed.indptr[1:], strict=True):
        mixed.indices[start:end], mixed.data[start:end] = mixed.indices[start:end][::-1], mixed.data[start:end][::-1]
    fixed = np.asfortranarray(whole, np.float64)
    fixed.flags.writeable = False
    strided = np.repeat(whole, 2, axis=1)[:, ::2]
    kinds = [whole * 1.0, whole, whole.astype(np.int8), fixed, strided, twice, mixed, sparse.csr_array(whole)]
    answers = []
    for matrix in kinds:
        parts = [getattr(matrix, part, None) for part in ("data", "indices", "indptr", "row", "col")]
        copies = [None if part is None else np.array(part) for part in parts]
        answers.append(so.solve(so.Problem(LOSSES[name].make(matrix, target, None), so.L1(1.5)), SET).check().value)
        for part, copy in zip(parts, copies, strict=True):
            np.testing.assert_array_equal(part, copy)
    np.testing.assert_allclose(answers, [answers[0]] * len(kinds), atol=1e-6)
    assert answers[0][4] == 0


def test_a_target_that_is_missing_changes_nothing():
    matrix, target, _ = drawn("squares", 6)
    seen = np.arange(ROWS) % 4 > 0
    found = so.solve(so.Problem(so.LeastSquares(matrix, np.where(seen, target, np.nan), seen * 1.0), so.L1(1.0)))
    without = so.solve(so.Problem(so.LeastSquares(matrix[seen], target[seen]), so.L1(1.0)))
    np.testing.assert_allclose(found.check().value, without.check().value, atol=1e-9)


def test_targets_and_columns_far_from_zero_do_no_harm_beside_an_intercept():
    matrix = np.random.default_rng(7).standard_normal((60, 20))
    target = matrix[:, :3].sum(1) + np.random.default_rng(8).standard_normal(60)
    near = so.solve(so.Problem(so.LeastSquares(matrix, target, intercept=True), so.L1(2.0)), so.WorkingSet(), tol=1e-9)
    for shift, up in ((0.0, 1e5), (1e6, 0.0), (1e6, 1e5)):
        loss = so.LeastSquares(matrix + shift, target + up, intercept=True)
        far = so.solve(so.Problem(loss, so.L1(2.0)), so.WorkingSet())
        assert so.Status(int(far.status)) is so.Status.CONVERGED
        assert float(far.objective) == pytest.approx(float(near.objective), rel=1e-6)
        np.testing.assert_allclose(far.value[:-1], near.value[:-1], atol=1e-6)


def test_columns_in_use_stay_in_the_set_however_many_have_no_weight_or_are_zero(rng):
    matrix = np.zeros((80, 400))
    matrix[:, ::10] = rng.standard_normal((80, 40))
    free = np.where(np.arange(400) % 10 == 0, 2.0, 0.0)
    target = matrix.sum(axis=1)
    for penalty, weight in ((so.L1(free), 2.0), (so.GroupL2(1.0, groups=np.arange(400) // 10), 1.0)):
        # Of the columns that are not zero; each is alone in its group.
        least, _ = optimum("squares", matrix[:, ::10], target, np.ones(80), False, [absolute, weight])
        found = so.solve(so.Problem(so.LeastSquares(matrix, target), penalty), SET).check()
        np.testing.assert_allclose(found.objective, least, rtol=1e-5)


@pytest.mark.parametrize("penalty", [so.L1, lambda w: so.GroupL2(w[:50], groups=np.arange(100) % 50), so.LHalf])
def test_more_columns_without_a_weight_than_rows_fit_the_target_in_float32(penalty, rng):
    matrix, target = rng.standard_normal((30, 100)).astype("f"), 10 * rng.standard_normal(30).astype("f")
    weights = np.where(np.arange(100) % 50 < 40, 0, 5).astype("f")
    problem = so.Problem(so.LeastSquares(matrix, target), penalty(weights))
    found = so.solve(problem)
    assert found.status in (so.Status.CONVERGED, so.Status.STATIONARY)
    assert problem.value(found.value) < 1e-6
    assert np.max(np.abs(found.value)) < 100
