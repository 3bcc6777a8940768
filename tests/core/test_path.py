"""Paths of regression problems: every level is solved, the first is the smallest without an entry; the choice."""

import dataclasses

import numpy as np
import pytest
from scipy import sparse

import sparseopt as so
from sparseopt.core.problem.problem import Status

RNG = np.random.default_rng(0)
MATRIX = RNG.standard_normal((40, 90)) + 1
TARGET = MATRIX[:, :3] @ [2.0, -1.0, 1.0] + RNG.standard_normal(40) + 5
LABELS = (np.median(TARGET) < TARGET).astype(float)
SQUARES, WITH = so.LeastSquares(MATRIX, TARGET), so.LeastSquares(MATRIX, TARGET, intercept=True)
KINDS = {
    "squares": so.Problem(SQUARES, so.L1(1.0)),
    "squares, intercept": so.Problem(WITH, so.L1(1.0)),
    "own weights, two free": so.Problem(SQUARES, so.L1(np.where(np.arange(90) < 2, 0, np.linspace(1, 3, 90)))),
    "elastic net, intercept": so.Problem(WITH, so.ElasticNet(1.0, 0.3)),
    "nonnegative": so.Problem(SQUARES, so.Nonnegative(1.0)),
    "logistic, intercept": so.Problem(so.LogisticLoss(MATRIX, LABELS, intercept=True), so.L1(1.0)),
    "sparse": so.Problem(so.LeastSquares(sparse.csr_array(MATRIX * (MATRIX > 1)), TARGET), so.L1(1.0)),
    "MCP": so.Problem(SQUARES, so.MCP(1.0, 0.2)),
}


def weights_of(problem):
    penalty = problem.penalty.penalties[0] if hasattr(problem.penalty, "penalties") else problem.penalty
    return np.broadcast_to(penalty.weight, 90)


@pytest.mark.parametrize("name", KINDS)
def test_every_level_has_the_optimum_of_its_problem_and_the_first_is_the_smallest_without_an_entry(name):
    problem = KINDS[name]
    found = so.path(problem, num=8)
    assert set(found.statuses) == {Status.STATIONARY if name == "MCP" else Status.CONVERGED}
    weighted = weights_of(problem) > 0
    values = found.values.toarray()
    assert np.abs(values[0, :90][weighted]).max() < 1e-12
    below = so.path(problem, [found.levels[0] * (1 - 1e-3)], tol=1e-11)
    assert below.values.toarray()[0, :90][weighted].any()
    np.testing.assert_allclose(found.levels[-1] / found.levels[0], 1e-2)
    np.testing.assert_allclose(found.deviances, [2 * problem.loss.value(x) for x in values], rtol=1e-4)
    assert max(found.at(i).residual for i in range(len(found))) <= 1e-6  # of MCP too, which has no gap
    for i in (3, 7):
        alone = so.path(problem, [found.levels[i]], tol=1e-10)
        if name != "MCP":  # not convex: another start may end elsewhere
            assert found.objectives[i] == pytest.approx(alone.objectives[0], rel=2e-6)
            assert found.gaps[i] >= found.objectives[i] / alone.objectives[0] - 1 - 1e-9
        at = found.at(i)
        np.testing.assert_array_equal(at.value, values[i])


def test_degrees_of_freedom_are_the_trace_of_the_derivative_of_the_fit():
    problem, step = KINDS["elastic net, intercept"], 1e-4
    level = 0.2 * so.core.largest_level(problem)
    trace = 0.0
    for j in range(40):
        ends = []
        for sign in (1, -1):
            moved = so.LeastSquares(MATRIX, TARGET + sign * step * (np.arange(40) == j), intercept=True)
            x = so.path(so.Problem(moved, so.ElasticNet(1.0, 0.3)), [level], tol=1e-13).values.toarray()[0]
            ends.append(MATRIX[j] @ x[:-1] + x[-1])
        trace += (ends[0] - ends[1]) / (2 * step)
    assert so.path(problem, [level], tol=1e-13).degrees_of_freedom[0] == pytest.approx(trace, rel=1e-4)
    path = so.path(KINDS["squares, intercept"], num=5)
    np.testing.assert_array_equal(path.degrees_of_freedom, np.diff(path.values.indptr))


def test_the_criteria_are_their_formulas_and_half_of_the_observations_is_the_limit():
    path = so.path(KINDS["squares, intercept"], num=20)
    n, df, misfit = 40, path.degrees_of_freedom, path.deviances
    bic = np.where(df <= n / 2, n * np.log(misfit / n) + np.log(n) * df, np.inf)
    chosen = so.select(path, "bic")
    np.testing.assert_allclose(chosen.curve, bic)
    assert chosen.level == path.levels[np.argmin(bic)]
    aic = n * np.log(misfit / n) + 2 * n * (df + 1) / (n - df - 2)
    np.testing.assert_allclose(so.select(path, "aic").curve, np.where(df < n - 2, aic, np.inf))
    np.testing.assert_allclose(so.select(path, "sure", 0.5).curve, (misfit + 0.5 * df) / n - 0.25)
    with pytest.raises(ValueError, match=r"sigma.*estimate is nan"):
        so.select(path, "sure")


def test_cross_validation_fits_without_the_held_out_rows_at_the_level_of_their_mean_loss():
    folds = np.arange(40) % 4
    path = so.path(KINDS["squares, intercept"], num=6, tol=1e-10)
    found = so.cross_validate(path, folds, rule="one_se")
    out = folds == 2
    within = so.LeastSquares(MATRIX[~out], TARGET[~out], intercept=True)
    alone = so.path(so.Problem(within, so.L1(1.0)), 0.75 * found.path.levels, tol=1e-10).values.toarray()
    fits = MATRIX[out] @ alone[:, :-1].T + alone[:, -1]
    np.testing.assert_allclose(found.fold_errors[2], ((fits - TARGET[out, None]) ** 2).mean(0), rtol=1e-4)
    limit = found.errors.min() + found.standard_errors[np.argmin(found.errors)]
    assert found.index == np.flatnonzero(found.errors <= limit)[0] <= found.index_by("min")
    assert found.index <= found.index_by("half_se") <= found.index_by("min")
    assert found.check() is found
    broken = dataclasses.replace(found, statuses=np.where(np.eye(4, 6), Status.MAX_STEPS, Status.CONVERGED))
    with pytest.raises(RuntimeError, match=r"4 of 24 levels.*fold 0 at level 0 .*MAX_STEPS"):
        broken.check()
