"""Doge-ADMM with copies, the iteration of the paper, and without; the exact fused lasso; the x-step of both."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import lsq_linear

import sparseopt as so
from sparseopt.core.losses.data import DataLoss
from sparseopt.core.losses.scalar import Squared
from sparseopt.core.operators.differences import Difference
from sparseopt.core.operators.maps import Identity
from sparseopt.core.operators.normal_solves import ConjugateGradient, Diagonal, cosine_solve
from sparseopt.core.problem.problem import Problem, Start
from sparseopt.core.solvers.admm import Admm
from sparseopt.core.solvers.doge import DogeGroups, doge_split
from sparseopt.core.solvers.fused_lasso import fused_lasso
from tests.jitted import Jitted
from tests.tiers import often
from tests.trend.problems import GRAPHS, random_graph

pytestmark = pytest.mark.usefixtures("double")


def doge_problem(graph, order, block, loss, penalty):
    """A problem of Doge-ADMM with the metric of the paper in float64, its x-step, and the groups of its rows."""
    base, on_edges = graph.geometry.base(np.float64), (order + 1 - block) % 2 == 1
    left, labels = order + 1 - block, graph.groups(block, on_edges)
    outer = Difference(base, block, on_edges)
    inner = Difference(base, left) if left else Identity(base.node_shape)
    split = doge_split(outer, inner, graph.geometry.sums(block, on_edges), np.float64, int(labels.max()) + 1)
    # Labels from 1 on: a place without a row has 0.
    groups = graph.geometry.rows(labels + 1, order + 1)[..., None] == np.arange(1, labels.max() + 2)
    if loss.target.ndim > len(inner.in_shape):
        split = dataclasses.replace(split, row_scale=split.row_scale[..., None])
        groups = groups[..., None, :]
    node_solve = Diagonal()
    if inner.order and graph.shape is not None:
        node_solve = cosine_solve(graph.shape, (inner.order,), np.float64)
    elif inner.order:
        node_solve = ConjugateGradient(jnp.ones(inner.in_shape), 1e-12)
    problem = Problem(loss, penalty, jax.tree.map(jnp.asarray, split))
    return problem, node_solve, jnp.asarray(groups)


def test_the_solver_with_copies_is_the_iteration_of_the_paper(rng):
    # Written out in NumPy, group by group and row by row, with the paper's formula for L1.
    graph = random_graph(rng, n=16, extra=8)
    y, rho, relaxation, level = rng.standard_normal(16), 0.8, 1.6, 0.7
    problem, node_solve, groups = doge_problem(graph, 1, 2, so.LeastSquares(None, jnp.asarray(y)), so.L1(level))
    solver = DogeGroups(node_solve, rho, relaxation=relaxation, cadence=1, changes=0, groups=groups)
    state = solver.init(problem, Start(problem.loss.target, jnp.zeros(16)))
    step = jax.jit(solver.step)

    matrix, labels = graph.matrix(2).toarray(), graph.groups(2)
    parts = [matrix[labels == i] for i in range(labels.max() + 1)]
    b, theta = y.copy(), np.zeros((len(parts), 16))
    for _ in range(12):
        alpha = b - theta
        for i, part in enumerate(parts):
            for a in part:
                s, length = a @ alpha[i], a @ a
                alpha[i] -= a * np.clip(s / length, -level / rho, level / rho)
        relaxed = relaxation * alpha + (1 - relaxation) * b
        b = (y + rho * (theta + relaxed).sum(axis=0)) / (1 + rho * len(parts))
        theta = theta + relaxed - b
        state = step(problem, state)
        np.testing.assert_allclose(state.now.x, b, atol=1e-9)
        np.testing.assert_allclose(state.rows.memory.alpha.T, alpha, atol=1e-9)
        np.testing.assert_allclose(state.rows.memory.theta.T, theta, atol=1e-9)


PENALTIES = {"L1": so.L1(0.7), "MCP": so.MCP(0.7, 3.0), "GroupL2": so.GroupL2(0.7)}
WHOLE = [
    ("grid", 0, 1, "rows"),
    ("grid", 2, 3, "L1"),
    ("cube", 2, 2, "rows"),
    ("random", 2, 2, "MCP"),
    ("weighted", 0, 1, "GroupL2"),
]


@pytest.mark.parametrize(("name", "order", "block", "kind"), often(WHOLE, WHOLE[0], WHOLE[3], WHOLE[4]))
def test_the_solver_without_copies_makes_the_same_iterates(rng, name, order, block, kind):
    graph, weights = GRAPHS[name](rng), None
    nodes = graph.shape or (graph.num_nodes,)
    y = jnp.asarray(3 * rng.standard_normal((*nodes, 3) if kind == "GroupL2" else nodes))
    penalty = PENALTIES.get(kind)
    if kind == "rows":
        levels = rng.uniform(0.2, 1, graph.matrix(order + 1).shape[0])
        penalty = so.L1(jnp.asarray(graph.geometry.rows(levels, order + 1)))
        if block == order + 1:  # with missing nodes, where the x-step needs no cosines
            weights = rng.uniform(0.5, 2, nodes) * (rng.uniform(size=nodes) > 0.2)
    loss = DataLoss(Squared(), None, y, weights, -20.0, 20.0)
    problem, node_solve, groups = doge_problem(graph, order, block, loss, penalty)
    fused, literal = Admm(node_solve, 0.8), DogeGroups(node_solve, 0.8, groups=groups)
    some = problem.operator.outer.mv(jnp.asarray(rng.standard_normal(problem.operator.inner.mv(y).shape)))
    for dual, rho in ((0 * some, 0.8), (0.2 * some, 3.0)):
        start = Start(y, dual, jnp.asarray(rho))
        ours, theirs = (so.solve(problem, s, start, max_steps=120, history=True) for s in (literal, fused))
        assert (ours.steps, ours.status) == (theirs.steps, theirs.status)
        one, other = ours.history, theirs.history
        assert np.isfinite(one.objective).any()
        np.testing.assert_allclose(one.objective, other.objective, rtol=1e-9)
        np.testing.assert_allclose(one.extra["rho"], other.extra["rho"], rtol=1e-6)
        np.testing.assert_allclose(one.gap, other.gap, rtol=1e-6, atol=1e-11)
        np.testing.assert_allclose(one.residual, other.residual, rtol=1e-6, atol=1e-11)
        np.testing.assert_allclose(ours.value, theirs.value, atol=1e-9)
        np.testing.assert_allclose(ours.state.candidate, theirs.state.candidate, atol=1e-9)


def test_the_solver_with_copies_rejects_groups_of_another_operator():
    chain, loss = so.Graph.grid((5,)), so.LeastSquares(None, jnp.zeros(5))
    problem, node_solve, groups = doge_problem(chain, 0, 1, loss, so.L1(1.0))
    other = doge_problem(so.Graph.grid((6,)), 0, 1, loss, so.L1(1.0))[2]
    weighted = doge_split(problem.operator.outer, problem.operator.inner, chain.geometry.sums(1), np.float64)
    assert DogeGroups(node_solve, 1.0, groups=groups).refuses(problem) is None
    for given, wrong, text in (
        (problem, other, r"\(1, 5\), given the shape \(1, 6, 2\)"),
        (problem, groups[..., 0], r"\(1, 5\), given the shape \(1, 5\)"),
        (dataclasses.replace(problem, operator=weighted), groups, r"number of groups, .*\(5,\)"),
    ):
        with pytest.raises(ValueError, match=text):
            so.solve(given, DogeGroups(node_solve, 1.0, groups=wrong), Start(loss.target, jnp.zeros((1, 5))))


@pytest.mark.parametrize("n", [1, 2, 3, 30])
@pytest.mark.parametrize("missing", [False, True])
def test_the_fused_lasso_is_exact(rng, n, missing):
    y, masses = rng.standard_normal(n).cumsum(), rng.uniform(0.5, 2.0, n)
    fall, rise = rng.uniform(0.1, 2.0, (2, n - 1))
    if missing:
        masses[1::3] = 0
    seen = masses > 0
    found = np.asarray(jax.jit(fused_lasso)(y, (fall, rise), masses))
    # Without a value a node is no node: the lower weight of its two differences is the price of a jump over it.
    gaps = list(itertools.pairwise(np.flatnonzero(seen)))
    of_falls, of_rises = (np.array([weights[i:j].min() for i, j in gaps]) for weights in (fall, rise))
    count, expected = int(seen.sum()), y[seen]
    if count > 1:
        part = np.eye(count - 1, count) - np.eye(count - 1, count, 1)
        root = np.sqrt(masses[seen])
        bounds = -of_rises, of_falls
        dual = lsq_linear(part.T / root[:, None], root * y[seen], bounds, method="bvls", tol=1e-15, max_iter=5000)
        expected = y[seen] - part.T @ dual.x / masses[seen]
    np.testing.assert_allclose(found[seen], expected, atol=1e-7)

    def cost(jumps, falls, rises):
        return falls @ np.maximum(-jumps, 0) + rises @ np.maximum(jumps, 0)

    seen_jumps = np.diff(found[seen])
    assert cost(np.diff(found), fall, rise) == pytest.approx(cost(seen_jumps, of_falls, of_rises), abs=1e-12)


@pytest.mark.parametrize(("shape", "power"), [((9,), 1), ((6, 7), 2), ((3, 4, 5), 3)])
def test_cosines_and_conjugate_gradients_solve_the_x_step(rng, shape, power):
    graph = so.Graph.grid(shape)
    inner = Difference(graph.geometry.base(np.float64), power)
    split = doge_split(Identity(inner.out_shape), inner, graph.geometry.sums(power), np.float64)
    split = dataclasses.replace(split, row_scale=jnp.asarray(1.0), column_scale=jnp.asarray(2.0))
    right = rng.standard_normal((*shape, 2))
    matrix = graph.matrix(power).toarray()
    system = np.eye(graph.num_nodes) + 0.7 * 2.0 * matrix.T @ matrix
    expected = np.linalg.solve(system, right.reshape(-1, 2)).reshape(right.shape)
    diagonal = jnp.asarray(2.0 * graph.geometry.sums(power).column_squares.reshape(*shape, 1))
    for solver, atol in ((cosine_solve(shape, (power,), np.float64), 1e-9), (ConjugateGradient(diagonal, 1e-10), 1e-7)):
        found = Jitted(solver).solve(None, split, right, 0.7, 0 * right)
        np.testing.assert_allclose(found, expected, atol=atol)
