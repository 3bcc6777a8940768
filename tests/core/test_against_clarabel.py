"""Random problems of every kind against Clarabel, an independent interior point solver.

One program solves all problems of a kind. The tolerance of Clarabel is 1e-10.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from scipy import sparse

import sparseopt as so
from sparseopt.core.base.types import precision
from sparseopt.core.penalties.protocols import has_conjugate
from tests.core import conic
from tests.core.conic import Conic
from tests.tiers import often

INSTANCES = 3
ROWS, COLUMNS, CHANNELS = 30, 12, 3
LABELS = np.arange(COLUMNS) // 3
BY_LABEL = [np.flatnonzero(g == LABELS) for g in range(LABELS.max() + 1)]
DIFFERENCES = np.diff(np.eye(COLUMNS), axis=0)
EYE = sparse.eye_array(COLUMNS)


def by_rows(rows):
    """The entries of each row of an array `[rows, CHANNELS]`."""
    return np.arange(rows * CHANNELS).reshape(rows, CHANNELS)


class Kind(NamedTuple):
    """How a problem is made from a generator, and the same problem in conic form."""

    problem: Callable[[np.random.Generator], tuple[so.Problem, Conic]]
    solvers: tuple[Any, ...] = ()  # besides the chosen one


class Data(NamedTuple):
    """A random regression."""

    matrix: np.ndarray
    clean: np.ndarray  # matrix @ truth
    weights: np.ndarray
    noise: np.ndarray


def data(rng, rows=ROWS, columns=COLUMNS):
    matrix = rng.standard_normal((rows, columns))
    truth = rng.standard_normal(columns) * (rng.random(columns) < 0.5)
    return Data(matrix, matrix @ truth, rng.uniform(0.5, 2.0, rows), rng.standard_normal(rows))


def sparse_matrix(rng, rows, columns, each=4):
    """Of `each` entries a row, so that all of them have equally many."""
    column = np.concatenate([rng.choice(columns, each, replace=False) for _ in range(rows)])
    entries = rng.standard_normal(rows * each)
    return sparse.csr_array((entries, (np.repeat(np.arange(rows), each), column)), shape=(rows, columns))


def incidence(rng, nodes, edges=20):
    pairs = np.array([rng.choice(nodes, 2, replace=False) for _ in range(edges)])
    rows = np.repeat(np.arange(edges), 2)
    return sparse.csr_array((np.tile([1.0, -1.0], edges), (rows, pairs.reshape(-1))), shape=(edges, nodes))


def program(size, loss, matrix, target, weights=1.0):
    form = Conic(size)
    loss(form, sparse.csr_array(matrix), target, np.broadcast_to(weights, target.shape))
    return form


def tall_l1(rng):
    at = data(rng)
    target = at.clean + at.noise
    form = program(COLUMNS, conic.squares, at.matrix, target)
    conic.absolute(form, EYE, 6.0)
    return so.Problem(so.LeastSquares(at.matrix, target), so.L1(6.0)), form


def wide_weighted_sparse_with_intercept(rng):
    columns = 50
    at = data(rng, 20, columns)
    matrix = sparse_matrix(rng, 20, columns - 1)
    matrix = sparse.csr_array(sparse.hstack([np.ones((20, 1)), matrix]))
    target = matrix @ rng.standard_normal(columns) + 3
    weight = np.r_[0.0, np.full(columns - 1, 1.5)]
    form = program(columns, conic.squares, matrix, target, at.weights)
    conic.absolute(form, sparse.eye_array(columns), weight)
    return so.Problem(so.LeastSquares(matrix, target, at.weights), so.L1(weight)), form


def rows_of_channels(rng):
    at = data(rng)
    target = at.matrix @ rng.standard_normal((COLUMNS, CHANNELS)) + rng.standard_normal((ROWS, CHANNELS))
    wide = sparse.kron(at.matrix, sparse.eye_array(CHANNELS))
    form = program(COLUMNS * CHANNELS, conic.squares, wide, target.reshape(-1), np.repeat(at.weights, CHANNELS))
    conic.lengths(form, sparse.eye_array(COLUMNS * CHANNELS), 30.0, by_rows(COLUMNS))
    return so.Problem(so.LeastSquares(at.matrix, target, at.weights), so.GroupL2(30.0)), form


def quadratic(rng):
    """A `Quadratic`, and its conic form by a factor of its Hessian."""
    factor = rng.standard_normal((COLUMNS, COLUMNS)) + 2 * np.eye(COLUMNS)
    center = rng.standard_normal(COLUMNS)
    form = program(COLUMNS, conic.squares, factor, factor @ center)
    return so.Quadratic(factor.T @ factor, center), form


def quadratic_labels(rng):
    loss, form = quadratic(rng)
    weight = rng.uniform(1, 8, len(BY_LABEL))
    conic.lengths(form, EYE, weight, BY_LABEL)
    return so.Problem(loss, so.GroupL2(weight, groups=LABELS)), form


def quadratic_differences(rng):
    loss, form = quadratic(rng)
    conic.absolute(form, DIFFERENCES, 2.0)
    return so.Problem(loss, so.L1(2.0), DIFFERENCES), form


def logistic_data(rng):
    at = data(rng)
    return at, (rng.random(ROWS) < 1 / (1 + np.exp(-at.clean))).astype(float)


def logistic_sparse_group(rng):
    at, target = logistic_data(rng)
    form = program(COLUMNS, conic.logistic, at.matrix, target, at.weights)
    conic.absolute(form, EYE, 0.7)
    conic.lengths(form, EYE, 1.0, BY_LABEL)
    loss = so.LogisticLoss(at.matrix, target, at.weights)
    return so.Problem(loss, so.SparseGroup(0.7, 1.0, groups=LABELS)), form


def logistic_groups_of_edges(rng):
    at = data(rng)
    target = (rng.random((ROWS, CHANNELS)) < 0.5).astype(float)
    edges = incidence(rng, COLUMNS)
    wide, over = (sparse.kron(m, sparse.eye_array(CHANNELS)).tocsr() for m in (at.matrix, edges))
    form = program(COLUMNS * CHANNELS, conic.logistic, wide, target.reshape(-1))
    conic.lengths(form, over, 0.3, by_rows(edges.shape[0]))
    return so.Problem(so.LogisticLoss(at.matrix, target), so.GroupL2(0.3), edges), form


def poisson_elastic_net(rng):
    at = data(rng)
    matrix = 0.5 * at.matrix
    target = rng.poisson(np.exp(0.5 * at.clean)).astype(float)
    form = program(COLUMNS, conic.poisson, matrix, target)
    conic.absolute(form, EYE, 1.0)
    conic.ridge(form, EYE, 0.5)
    return so.Problem(so.PoissonLoss(matrix, target), so.ElasticNet(1.0, 0.5)), form


def poisson_edges(rng):
    """Counts at the nodes of a graph, without a matrix."""
    target = rng.poisson(np.repeat([2.0, 9.0], COLUMNS // 2)).astype(float)
    edges = incidence(rng, COLUMNS)
    form = program(COLUMNS, conic.poisson, EYE, target)
    conic.absolute(form, edges, 0.5)
    return so.Problem(so.PoissonLoss(None, target), so.L1(0.5), edges), form


def huber_differences(rng):
    at = data(rng)
    target = at.clean + 3 * at.noise
    form = program(COLUMNS, conic.huber(0.8), at.matrix, target, at.weights)
    conic.absolute(form, DIFFERENCES, 1.0)
    loss = so.DataLoss(so.scalar.Huber(0.8), at.matrix, target, at.weights)
    return so.Problem(loss, so.L1(1.0), DIFFERENCES), form


def absolute_l1(rng):
    at = data(rng)
    target = at.clean + at.noise
    form = program(COLUMNS, conic.slopes(-1.0, 1.0), at.matrix, target, at.weights)
    conic.absolute(form, EYE, 2.0)
    return so.Problem(so.AbsoluteLoss(at.matrix, target, at.weights), so.L1(2.0)), form


def quantile_edges(rng):
    at = data(rng)
    target = at.clean + at.noise
    edges = incidence(rng, COLUMNS)
    form = program(COLUMNS, conic.slopes(-0.3, 0.7), at.matrix, target)
    conic.absolute(form, edges, 0.4)
    return so.Problem(so.DataLoss(so.scalar.Quantile(0.3), at.matrix, target), so.L1(0.4), edges), form


def quantile_elastic_net(rng):
    at = data(rng)
    target = at.clean + at.noise
    form = program(COLUMNS, conic.slopes(-0.8, 0.2), at.matrix, target)
    conic.absolute(form, EYE, 0.5)
    conic.ridge(form, EYE, 0.3)
    return so.Problem(so.DataLoss(so.scalar.Quantile(0.8), at.matrix, target), so.ElasticNet(0.5, 0.3)), form


def hinge_with_intercept(rng):
    at = data(rng)
    target = np.where(at.clean + at.noise > 0, 1.0, -1.0)
    matrix = np.column_stack([at.matrix[:, :-1], np.ones(ROWS)])
    weight = np.r_[np.full(COLUMNS - 1, 2.0), 0.0]
    form = program(COLUMNS, conic.squared_hinge, matrix, target)
    conic.absolute(form, EYE, weight)
    return so.Problem(so.SquaredHingeLoss(matrix, target), so.L1(weight)), form


def nonnegative(rng):
    at = data(rng)
    target = at.clean + at.noise
    form = program(COLUMNS, conic.squares, at.matrix, target)
    conic.between(form, EYE, 0.0, np.inf)
    form.cost(form.x, 1.0)
    return so.Problem(so.LeastSquares(at.matrix, target), so.Nonnegative(1.0)), form


def box(rng):
    at = data(rng)
    target = at.clean + at.noise
    low, high = -rng.uniform(0.1, 1, COLUMNS), rng.uniform(0.1, 1, COLUMNS)
    form = program(COLUMNS, conic.squares, at.matrix, target)
    conic.between(form, EYE, low, high)
    conic.absolute(form, EYE, 3.0)
    return so.Problem(so.LeastSquares(at.matrix, target), so.Box(low, high, 3.0)), form


def increasing(rng):
    """Isotonic regression: the differences are not negative. The answer meets that up to the tolerance only."""
    target = np.linspace(0, 2, COLUMNS) + rng.standard_normal(COLUMNS)
    form = program(COLUMNS, conic.squares, EYE, target)
    conic.between(form, DIFFERENCES, 0.0, np.inf)
    return so.Problem(so.LeastSquares(None, target), so.Nonnegative(), DIFFERENCES), form


def nodes_of_a_graph(rng):
    target = np.repeat([0.0, 2.0], COLUMNS // 2) + rng.standard_normal(COLUMNS)
    edges = incidence(rng, COLUMNS)
    form = program(COLUMNS, conic.squares, EYE, target)
    conic.absolute(form, edges, 0.3)
    return so.Problem(so.LeastSquares(None, target), so.L1(0.3), edges), form


PD, ADMM = so.PrimalDual(), so.SplitAdmm()
KINDS = {
    "least squares, L1": Kind(tall_l1, (PD, ADMM)),
    "wide sparse least squares, L1, intercept": Kind(wide_weighted_sparse_with_intercept, (PD, ADMM)),
    "least squares, groups of channels": Kind(rows_of_channels, (PD, ADMM)),
    "quadratic, labelled groups": Kind(quadratic_labels, (PD, ADMM, so.Maiht(), so.ProximalGradient())),
    "quadratic, L1 of differences": Kind(quadratic_differences, (PD,)),
    "logistic, sparse groups": Kind(logistic_sparse_group, (PD, ADMM)),
    "logistic, groups of edges": Kind(logistic_groups_of_edges, (PD,)),
    "poisson, elastic net": Kind(poisson_elastic_net, (PD, ADMM)),
    "poisson, L1 of edges": Kind(poisson_edges, (PD,)),
    "huber, L1 of differences": Kind(huber_differences, (PD,)),
    "absolute, L1": Kind(absolute_l1, (PD,)),
    "quantile, L1 of edges": Kind(quantile_edges, (PD,)),
    "quantile, elastic net": Kind(quantile_elastic_net, (PD,)),
    "squared hinge, L1, intercept": Kind(hinge_with_intercept, (PD, ADMM)),
    "least squares, nonnegative": Kind(nonnegative, (PD, ADMM)),
    "least squares, box": Kind(box, (PD, ADMM)),
    "least squares, increasing": Kind(increasing, (PD,)),
    "least squares, L1 of edges": Kind(nodes_of_a_graph, (PD,)),
}


@pytest.fixture(scope="module", autouse=True)
def _float64():
    with precision(np.dtype(np.float64)):
        yield


@cache
def made(kind):
    """The problems of a kind, stacked, and Clarabel's optima."""
    rng = np.random.default_rng([7, list(KINDS).index(kind)])
    pairs = [KINDS[kind].problem(rng) for _ in range(INSTANCES)]
    together = jax.tree.map(lambda *leaves: np.stack(leaves), *(problem for problem, _ in pairs))
    return pairs[0][0], together, np.array([form.least() for _, form in pairs])


@jax.jit
@jax.vmap
def objective(problem, x):
    return problem.loss.value(x) + problem.penalty.value(x if problem.operator is None else problem.operator.mv(x))


def solved(kind, solver=None):
    alone, together, least = made(kind)
    solver = solver or so.chosen_solver(alone).solver
    found = jax.jit(jax.vmap(lambda problem: so.solve(problem, solver, tol=1e-7, max_steps=100_000)))(together)
    return alone, jax.device_get((found, objective(together, found.value))), least


def assert_solved(kind, solver=None):
    alone, (found, value), least = solved(kind, solver)
    inside = np.isfinite(value)
    reached = np.where(inside, value, found.objective)
    np.testing.assert_allclose(reached, least, rtol=1e-6)
    np.testing.assert_allclose(found.objective, reached, rtol=1e-12)
    assert set(found.status.tolist()) == {so.Status.CONVERGED}
    assert np.all(found.residual <= 1e-7)
    assert has_conjugate(alone.penalty)
    certified = solver is None or not isinstance(solver, so.Maiht | so.ProximalGradient)
    if certified:
        assert not np.any(np.isnan(found.gap[inside]))
        # The gap bounds the true distance from the optimum, up to Clarabel's own error.
        assert np.all(found.gap[inside] >= (reached - least)[inside] / least[inside] - 1e-9)


# `test_certificates.py` has these losses and penalties too; these are of other shapes.
KEPT_KINDS = [
    "wide sparse least squares, L1, intercept",
    "quadratic, labelled groups",
    "logistic, sparse groups",
    "least squares, increasing",
]


@pytest.mark.parametrize("kind", often(KINDS, *KEPT_KINDS))
def test_the_chosen_solver_finds_the_optimum_and_its_gap_bounds_the_error(kind):
    assert_solved(kind)


OTHERS = [(kind, solver) for kind, given in KINDS.items() for solver in given.solvers]
KEPT = [
    ("wide sparse least squares, L1, intercept", ADMM),
    ("poisson, L1 of edges", PD),
]


@pytest.mark.parametrize(
    ("kind", "solver"),
    often(OTHERS, *KEPT),
    ids=[f"{kind}, {type(solver).__name__}" for kind, solver in OTHERS],
)
def test_every_solver_that_takes_a_problem_finds_its_optimum(kind, solver):
    assert solver.refuses(made(kind)[0]) is None
    assert_solved(kind, solver)
