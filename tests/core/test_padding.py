"""Problems of similar sizes share one compiled program, and nothing of that shows in a solution."""

import jax
import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.problem.iterate import iterate
from sparseopt.core.problem.padding import COARSE, FINE, pad_problem, round_up


def draw(rows, columns):
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((rows, columns)).astype(np.float32)
    return matrix, (matrix[:, :3].sum(1) + rng.standard_normal(rows)).astype(np.float32)


def lasso(rows, columns):
    return so.Problem(so.LeastSquares(*draw(rows, columns)), so.L1(2.0))


def test_sizes_grow_by_a_quarter_at_most():
    for ratio in (COARSE, FINE):
        for size in (*range(1, 3000), 99_999):
            assert size <= round_up(size, ratio) <= max(size * ratio, size + 1) or size < 2


MATRIX, TARGET = draw(45, 19)
ROWS, WEIGHTS = np.linspace(0.5, 2, 45).astype(np.float32), np.linspace(0.5, 3, 19).astype(np.float32)
SQUARES, LOGISTIC = so.LeastSquares(MATRIX, TARGET), so.LogisticLoss(MATRIX, (TARGET > 0).astype(np.float32))
PROBLEMS = {
    "lasso": so.Problem(SQUARES, so.L1(2.0)),
    "free entries": so.Problem(SQUARES, so.L1(np.where(WEIGHTS < 1, 0, WEIGHTS))),
    "weighted rows": so.Problem(so.LeastSquares(MATRIX, TARGET, ROWS), so.ElasticNet(2.0, 1.0)),
    "logistic": so.Problem(LOGISTIC, so.Nonnegative(0.5)),
    "MCP": so.Problem(SQUARES, so.MCP(2.0, 30.0)),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_padded_solution_is_the_solution(name):
    problem = PROBLEMS[name]
    start = np.linspace(-1, 1, 19).astype(np.float32) * (name == "lasso")
    solver = so.AcceleratedProximalGradient()
    assert pad_problem(problem, solver, start) is not None
    limits = {"tol": 1e-5, "max_steps": 200, "history": True}
    found, wanted = so.solve(problem, solver, start, **limits), iterate(problem, solver, start, **limits)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
    assert int(found.status) == int(wanted.status)
    assert abs(int(found.steps) - int(wanted.steps)) <= 10
    np.testing.assert_allclose(found.value, wanted.value, atol=2e-4)
    np.testing.assert_allclose(found.objective, wanted.objective, rtol=1e-5)
    first = np.s_[9:20:10]  # later ones are differences of nearly equal numbers
    np.testing.assert_allclose(found.history.objective[first], wanted.history.objective[first], rtol=1e-4)


def test_what_does_not_say_so_is_not_padded():
    steps, start = so.AcceleratedProximalGradient(), np.zeros(19, np.float32)
    others = {
        "a group": so.Problem(SQUARES, so.GroupL2(1.0)),
        "an operator": so.Problem(SQUARES, so.L1(1.0), np.diff(np.eye(19, dtype=np.float32), axis=0)),
        "a loss of one's own": so.Problem(so.Quadratic(np.eye(19, dtype=np.float32), start), so.L1(1.0)),
        "channels": so.Problem(so.LeastSquares(MATRIX, TARGET[:, None]), so.L1(1.0)),
    }
    for name, problem in others.items():
        assert pad_problem(problem, steps, problem.loss.start()) is None, name
    assert pad_problem(PROBLEMS["lasso"], so.PrimalDual(), start) is None

    def traced(weight):
        assert pad_problem(so.Problem(SQUARES, so.L1(weight)), steps, start) is None
        return weight

    jax.jit(traced)(1.0)
