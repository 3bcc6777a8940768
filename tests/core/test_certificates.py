"""Random problems of every kind against Clarabel: the optimum, and no gap below the true suboptimality.

One program solves all problems of a kind.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.losses.data import as_least_squares
from sparseopt.core.operators.differences import Difference, GridBase
from sparseopt.core.penalties.protocols import has_conjugate
from sparseopt.core.problem.certify import certificate, relative_gap
from tests.core import conic
from tests.core.conic import Conic
from tests.core.problems import ADMM, APG, COLUMNS, KINDS, PD, made, takers
from tests.tiers import often

# The rounding of an objective's sums; how far Clarabel's value, which meets its cones up to 1e-10, may be from ours.
ALLOWED, ORACLE = 1e-11, 1e-6
TOL = {np.float32: 1e-3, np.float64: 1e-6}


pytestmark = pytest.mark.usefixtures("double")


@jax.jit
@jax.vmap
def objective(problem, x):
    return problem.loss.value(x) + problem.penalty.value(x if problem.operator is None else problem.operator.mv(x))


def solved(together, solver, **limits):
    return jax.device_get(jax.jit(jax.vmap(lambda problem: so.solve(problem, solver, **limits)))(together))


ALL = [(name, solver) for name, kind in KINDS.items() for solver in takers(kind)]
KEPT = [
    ("squares, L1, wide and sparse", ADMM),
    ("squares, nonnegative, of differences, no matrix", ADMM),
    ("quadratic, groups, dense", APG),
    ("logistic, sparse groups, dense", APG),
    ("poisson, L1, of edges, no matrix", PD),
]
# By APG and PD to a gap far below the root of eps.
DEEP = dict.fromkeys(["squares, L1, dense", "squared hinge, L1, dense", "logistic, L1, dense"], 1e-12)
DEEP |= {"poisson, elastic net, dense": 1e-12, "huber, groups, dense": 1e-10}


def kind_of(solver):
    return type(solver).__name__ if hasattr(solver, "init") else None


@pytest.mark.parametrize(("name", "solver"), often(ALL, *KEPT), ids=kind_of)
def test_every_solver_that_takes_a_problem_finds_its_optimum_and_its_gap_bounds_the_error(name, solver):
    kind = KINDS[name]
    problems, together, least, _ = made(kind, 3)
    assert so.chosen_solver(problems[0]).solver in (*takers(kind), so.WorkingSet())
    assert solver.refuses(problems[0]) is None
    assert has_conjugate(problems[0].penalty)
    tol = DEEP.get(name, 1e-7) if solver in (APG, PD) else 1e-7
    found = solved(together, solver, tol=tol, max_steps=100_000)
    value = np.asarray(objective(together, found.value))
    inside = np.isfinite(value)
    if kind.operator and kind.penalty in ("box", "nonnegative"):
        assert np.all(np.asarray(found.violation) <= np.where(inside, 0, 1e-3 * tol))
    else:
        assert np.all(inside)
        assert found.violation is None
    reached = np.where(inside, value, found.objective)
    np.testing.assert_allclose(reached, least, rtol=1e-6)
    np.testing.assert_allclose(found.objective, reached, rtol=1e-12)
    ended = so.Status.STATIONARY if solver in kind.more else so.Status.CONVERGED
    assert set(found.status.tolist()) == {ended}
    assert np.all(found.residual <= tol)
    if solver not in kind.more:
        # The gap bounds the true distance from the optimum, up to Clarabel's own error.
        assert np.all(found.gap >= (reached - least) / least - 1e-9)


FAR = [(name, solver, kind) for name, of in KINDS.items() for solver in of.spread for kind in (np.float32, np.float64)]
# Each compiles a program. The others run in `make test-thorough`.
FEW, MANY = 20, 48
OFTEN = [
    ("quantile, L1, dense", ADMM, np.float64, FEW),
    ("absolute, L1, of any, dense", PD, np.float32, FEW),
    ("squares, nonnegative, dense", APG, np.float64, FEW),
    ("logistic, L1, dense", APG, np.float32, FEW),
]


@pytest.mark.parametrize(
    ("name", "solver", "dtype", "instances"), often([*OFTEN, *((*case, MANY) for case in FAR)], *OFTEN), ids=kind_of
)
def test_no_gap_is_below_the_true_suboptimality(name, solver, dtype, instances):
    kind = KINDS[name]
    _, together, optima, points = made(kind, instances, True, dtype)
    found = solved(together, solver, tol=TOL[dtype], max_steps=20_000)
    assert found.value.dtype == dtype
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64) if leaf.dtype.kind == "f" else leaf, together)
    if kind.penalty in ("box", "nonnegative"):
        box = wide.penalty if kind.penalty == "box" else None
        points = np.clip(points, box.low if box else 0, box.high if box else None)
    # No lower bound on the optimum is above the objective of any point, such as Clarabel's.
    reached, least = (np.asarray(objective(wide, x)) for x in (found.value.astype(np.float64), points))
    assert np.all(np.abs(least / optima - 1) <= ORACLE)
    assert not np.any(found.gap < reached / least - 1 - ALLOWED)
    # And a gap is found: other units of the columns change little.
    certified = (found.status == so.Status.CONVERGED) & (found.gap <= TOL[dtype])
    # Coupled entries have one step, which other units make short.
    assert np.mean(certified) >= (0.5 if kind.penalty == "groups" else 0.85)
    # In float32 other units can hide every dual point: then there is no gap, and no claim of one.
    silent = np.isnan(found.gap) & (dtype == np.float32)
    assert set(found.status[~silent].tolist()) <= {so.Status.CONVERGED, so.Status.MAX_STEPS}
    assert set(found.status[silent].tolist()) <= {so.Status.STATIONARY, so.Status.MAX_STEPS}


def test_a_gap_found_far_from_the_answer_is_no_bound_later():
    """Where x is still far too short, what a dual point lacks of its equation is charged too little for what follows.

    An ill-conditioned matrix.
    """
    rng, (rows, columns), weight = np.random.default_rng(5), (64, 48), 30.0
    left = np.linalg.qr(rng.standard_normal((rows, columns)))[0]
    right = np.linalg.qr(rng.standard_normal((columns, columns)))[0]
    matrix = (left * 10.0 ** np.linspace(0, -6, columns)) @ right.T
    target = matrix @ np.repeat(rng.standard_normal(6) * 50, 8) + 1e-3 * rng.standard_normal(rows)
    differences, form = np.diff(np.eye(columns), axis=0), Conic(columns)
    conic.slopes(-1.0, 1.0)(form, matrix, target, np.ones(rows))
    conic.absolute(form, differences, weight)
    found = so.solve(
        so.Problem(so.AbsoluteLoss(matrix, target), so.L1(weight), differences), PD, tol=1e-4, max_steps=1000
    )
    above = float(found.objective) / form.least() - 1
    assert above > 1e-2
    assert float(found.gap) >= above


def test_in_float32_the_violation_of_a_constraint_is_reported():
    line = np.linspace(0, 3, COLUMNS, dtype=np.float32) + np.float32([0.5, -0.5] * (COLUMNS // 2))
    problem = so.Problem(
        so.LeastSquares(None, line), so.Nonnegative(), np.diff(np.eye(COLUMNS, dtype=np.float32), axis=0)
    )
    found = so.solve(problem).check()
    rows = np.diff(np.asarray(found.value, np.float64))
    assert float(found.violation) == pytest.approx(max(-rows.min(), 0) / max(1, np.abs(rows).max()), abs=1e-7)
    assert found.violation <= 1e-4
    assert found.gap <= 1e-4


def test_a_quadratic_as_least_squares_keeps_the_digits_of_every_column(rng):
    """Columns whose lengths differ by ten thousand: the eigenvectors of the Hessian as it is lose the short ones."""
    columns = rng.standard_normal((30, COLUMNS)) * 10.0 ** np.linspace(-4, 0, COLUMNS)
    columns[:, 0] = 0
    hessian = (columns.T @ columns).astype(np.float32)
    root = np.asarray(as_least_squares(so.Quadratic(hessian, np.ones(COLUMNS, np.float32))).matrix.matrix, np.float64)
    assert not root[:, 0].any()
    units = np.diag(1 / (np.sqrt(np.diag(hessian)) + (np.arange(COLUMNS) == 0)))
    np.testing.assert_allclose(units @ root.T @ root @ units, units @ hessian @ units, atol=3e-6)


@jax.jit
def certified(problem, x, dual):
    return certificate(problem, x, problem.loss.image(x), dual, -problem.loss.pull(dual))


def test_a_bound_from_far_away_allows_for_the_rounding_of_the_objective_there():
    """One row, so that the optimum and its dual are known; far from it the bound is a difference of large numbers."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        row, weight = (rng.standard_normal((1, 8)) + 30).astype(np.float32), rng.uniform(1, 3, 8).astype(np.float32)
        dual = np.min(weight.astype(float) / row[0])
        problem = so.Problem(so.AbsoluteLoss(row, np.float32([65.0])), so.L1(weight))
        x = rng.uniform(0, 100, 8).astype(np.float32)
        assert float(certified(problem, x, -np.float32([dual])).bound) <= 65 * dual


def test_a_dual_just_outside_its_domain_costs_no_more_than_its_rounding_error():
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((60, 20))
    sides = np.sign(matrix @ rng.standard_normal(20) + rng.standard_normal(60))
    problem = so.Problem(so.SquaredHingeLoss(matrix, sides), so.L1(1.0))
    x = so.solve(problem, tol=1e-12).check().value
    dual = problem.loss.rows.gradient(problem.loss.image(x))
    assert jnp.sum(dual == 0) > 10  # most are surely on their side
    for s in (dual, jnp.where(dual == 0, 1e-18 * sides, dual)):
        assert 0 <= certified(problem, x, s).gap <= 1e-11


def test_a_poisson_loss_far_from_0_falls_in_float32_too():
    rows = (np.random.default_rng(0).standard_normal((30, 8)) / 3 + 20).astype(np.float32)
    problem = so.Problem(so.PoissonLoss(rows, np.full(30, 20, np.float32)), so.L1(np.float32(1)))
    found = so.solve(problem, max_steps=1000)
    assert float(found.objective) < 1e-3 * float(problem.value(jnp.zeros(8, jnp.float32)))


@pytest.mark.parametrize(
    ("least", "kind", "penalty", "operator", "status"),
    [
        (-1e-3, np.float64, so.L1(0.01), None, "MAX_STEPS"),
        (-0.5, np.float64, so.L1(0.01), np.eye(300), "NONFINITE"),
        (-1e-5, np.float32, so.Nonnegative(), None, "MAX_STEPS"),
    ],
)
def test_a_loss_without_a_minimum_is_not_certified(least, kind, penalty, operator, status):
    """The eigenvalues of a Hessian are checked before the solve up to 256 rows only."""
    hessian, center = np.diag(np.r_[least, np.ones(299)]), np.r_[1 if operator is not None else 1e6, np.ones(299)]
    loss = so.Quadratic(hessian.astype(kind), center.astype(kind))
    found = so.solve(so.Problem(loss, penalty, operator), max_steps=200)
    assert so.Status(int(found.status)).name == status
    assert np.isnan(found.gap)


def test_an_objective_that_rounding_makes_negative_proves_nothing():
    assert relative_gap(jnp.zeros(()), jnp.asarray(-1e-6)) == np.inf


def test_another_unit_of_a_feature_without_a_penalty_changes_no_answer():
    rng = np.random.default_rng(0)
    hours = rng.uniform(0, 10, 200)
    costs = 1 + 0.5 * hours + (0.2 + 0.2 * hours) * rng.standard_normal(200)
    for unit in (1.0, 5e-3, 1e-3, 1e-8):
        line = np.column_stack([np.ones(200), unit * (hours - hours.mean())])
        found = so.solve(so.Problem(so.QuantileLoss(line, costs, 0.9), so.L1(0.0))).check()
        assert float(found.gap) <= 1e-6
        assert float(found.objective) == pytest.approx(50.857288279, rel=1e-6)


LINE = np.arange(20.0)
FREE = {
    "squares": so.LeastSquares(None, LINE),
    "absolute": so.AbsoluteLoss(None, LINE / 3),
    "no rows": so.LeastSquares(np.eye(20), np.sin(LINE), np.zeros(20)),
}


@pytest.mark.parametrize("name", often(FREE, "squares"))
def test_an_optimum_of_0_is_found_up_to_rounding(name):
    found = so.solve(so.Problem(FREE[name], so.L1(1.0), np.diff(np.eye(20), n=2, axis=0)), max_steps=1000).check()
    assert float(found.gap) <= 1e-6
    assert float(found.objective) <= 1e-11


def test_a_penalty_of_weight_0_or_ridge_0_has_the_gap_of_the_norm_that_it_is():
    rng = np.random.default_rng(1)
    loss = so.LeastSquares(rng.standard_normal((30, 8)), rng.standard_normal(30))
    for weight, same in ((2.0, so.ElasticNet(2.0, 0.0)), (0.0, so.Box(-np.inf, np.inf))):
        found, other = (so.solve(so.Problem(loss, penalty)).check() for penalty in (so.L1(weight), same))
        assert float(other.gap) == pytest.approx(float(found.gap), rel=1e-3, abs=1e-12)
        np.testing.assert_allclose(other.value, found.value, atol=1e-9)


@so.pytree
class Blur:
    """Gaussian means of standard deviation 2 along both axes of a picture."""

    rows: Any
    columns: Any

    def mv(self, x):
        return self.rows @ x @ self.columns

    rmv = mv


def test_the_dual_of_a_blurred_picture_reaches_the_equation_along_its_ball():
    """Moved out of it, the whole pair would be scaled by the worst pixel: a gap of 1e-5 where the answer has 1e-8."""
    rng, shape = np.random.default_rng(0), (16, 24)
    at = [np.arange(n) for n in shape]
    blur = Blur(*(np.exp(-((a[:, None] - a) ** 2) / 8) / np.sqrt(8 * np.pi) for a in at))
    clean = 0.2 + 0.6 * ((at[0][:, None] - 8) ** 2 + (at[1] - 8) ** 2 < 16)
    noisy = np.asarray(blur.mv(clean)) + 0.05 * rng.standard_normal(shape)
    problem = so.Problem(so.LeastSquares(blur, noisy), so.GroupL2(0.02, axis=0), Difference(GridBase(shape), 1))
    found = so.solve(problem, PD, max_steps=1500).check()
    best = so.solve(problem, PD, tol=1e-8, max_steps=30_000).objective
    assert -1e-12 <= found.objective / best - 1 <= found.gap <= 1e-6


def test_the_advice_for_constraints_that_no_point_meets_names_them():
    """Of a user's own map the entries are not known: no linear program finds out before."""

    @so.pytree
    class Both:
        def mv(self, x):
            return jnp.concatenate([x, -x])

        def rmv(self, e):
            return e[:4] - e[4:]

    problem = so.Problem(so.LeastSquares(None, np.ones((4, 1))), so.Box(np.ones((8, 1)), 2.0), Both())
    with pytest.raises(RuntimeError, match="constraints, check that some x meets all"):
        so.solve(problem, max_steps=200).check()
