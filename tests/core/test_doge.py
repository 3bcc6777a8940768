import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.fidelity import NodeSquares, total
from sparseopt.core.grouping import group_table
from sparseopt.core.operators import Difference
from sparseopt.core.problem import Problem
from sparseopt.core.solvers.admm import Admm, Start
from sparseopt.core.solvers.doge import doge_split
from sparseopt.core.solvers.fast_admm import ChainTotalVariation, fused_lasso
from sparseopt.core.solvers.node_solve import ConjugateGradient, Diagonal, cosine_solve
from sparseopt.trend.filter import precision
from tests.jitted import Jitted
from tests.trend.problems import exact_fit, random_graph

PENALTIES = [so.L1(0.7), so.L0(0.9), so.MCP(0.7, 3.0), so.MCP(0.7, 1.2), so.SCAD(0.7, 3.7), so.SCAD(0.7, 2.1)]
DOUBLE = np.dtype(np.float64)


@jax.jit
def _values(penalty, points):
    """The penalty of every point on its own."""
    return jax.vmap(penalty.value)(points)


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
@pytest.mark.parametrize("step", [0.1, 1.0, 4.0])
def test_no_grid_point_beats_the_scalar_prox(penalty, step):
    with precision(DOUBLE):
        x, grid = np.linspace(-8, 8, 161), np.linspace(-9, 9, 3601)
        u = Jitted(penalty).prox(x, step)
        values = np.asarray(_values(penalty, np.concatenate([u, grid])))

        reached = 0.5 * (u - x) ** 2 + step * values[:161]
        best = np.min(0.5 * (grid - x[:, None]) ** 2 + step * values[161:], axis=1)
        assert np.max(reached - best) <= 1e-10


@pytest.mark.parametrize("penalty", [*PENALTIES, so.GroupL2(0.7)], ids=repr)
def test_no_perturbation_beats_the_lifted_prox(rng, penalty):
    with precision(DOUBLE):
        graph = random_graph(rng, n=20, extra=12)
        channels = (3,) if isinstance(penalty, so.GroupL2) else ()
        for block in (1, 2):
            matrix, labels = graph.matrix(block), graph.groups(block)
            table, _ = group_table(matrix, labels, 0, np.float64)
            lifted = so.lift(penalty, table)
            x = 2 * rng.standard_normal((20, *channels))
            best = Jitted(lifted).prox(x, 0.6)
            # A value of exactly zero is judged as such: rounding in the product turns it into noise.
            rows = Jitted(table).mv(best)
            rows = np.where(np.abs(rows) < 1e-12, 0, rows)
            reached = 0.5 * np.sum((best - x) ** 2) + 0.6 * Jitted(penalty).value(rows)
            sizes = np.repeat([1e-4, 1e-2, 1.0], 50).reshape(-1, *[1] * x.ndim)
            others = best + sizes * rng.standard_normal((150, *x.shape))
            costs = 0.5 * np.sum((others - x).reshape(150, -1) ** 2, axis=1) + 0.6 * np.asarray(_values(lifted, others))
            assert np.all(reached <= costs + 1e-12)


@pytest.mark.parametrize("metric", ["copies", "groups"])
@pytest.mark.parametrize("penalty", [so.L1(0.7), so.MCP(0.7, 6.0), so.L0(0.4)], ids=repr)
@pytest.mark.parametrize("block", [1, 2, 3])
def test_the_iteration_is_that_of_the_paper_with_its_copies(rng, metric, penalty, block):
    # The paper's form, literally: one copy and one dual a group, over-relaxed, copies where a group touches or
    # everywhere. The solver stores neither and must give the same iterates.
    with precision(DOUBLE):
        graph = random_graph(rng, n=16, extra=8)
        y, rho, relaxation = rng.standard_normal(16), 0.8, 1.6
        matrix, labels = graph.matrix(block), graph.groups(block)
        groups = int(labels.max()) + 1
        tables = [group_table(matrix, labels, i, np.float64)[0] for i in range(groups)]
        lifted = [Jitted(so.lift(penalty, table)) for table in tables]
        touched = [
            np.ones(16) if metric == "groups" else (abs(matrix[labels == i]).sum(axis=0) > 0).astype(float)
            for i in range(groups)
        ]
        b, theta = y.copy(), [np.zeros(16) for _ in range(groups)]
        split = doge_split(
            Difference(graph.base(np.float64), block),
            Difference(graph.base(np.float64), 0),
            graph.sums(block),
            metric,
            np.float64,
            groups,
        )
        problem = Problem(NodeSquares(jnp.asarray(y)), penalty, jax.tree.map(jnp.asarray, split))
        solver = Admm(Diagonal(), rho, relaxation=relaxation, changes=0)
        rows = jnp.zeros(matrix.shape[0])
        state = solver.init(problem, Start(jnp.asarray(y), rows))
        step = jax.jit(lambda state: solver.iterate(problem, state))
        for _ in range(12):
            alphas = [f.prox(b - t, 1 / rho) for f, t in zip(lifted, theta, strict=True)]
            relaxed = [relaxation * a + (1 - relaxation) * b for a in alphas]
            total_copies = sum(touched)
            pulled = sum(m * (t + a) for m, t, a in zip(touched, theta, relaxed, strict=True))
            b = (y + rho * pulled) / (1 + rho * total_copies)
            theta = [t + a - b for t, a in zip(theta, relaxed, strict=True)]
            state = step(state)
            np.testing.assert_allclose(state.x, b, atol=1e-9)


@pytest.mark.parametrize("ends", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("n", [1, 2, 3, 30, 200])
def test_the_fused_lasso_is_exact(rng, n, ends):
    from scipy.optimize import lsq_linear

    with precision(DOUBLE):
        y = rng.standard_normal(n).cumsum()
        levels = rng.uniform(0.1, 2.0, n + 1)
        levels[[0, -1]] = ends
        differences = np.eye(n + 1, n) - np.eye(n + 1, n, -1)
        kept = levels > 0
        expected = y
        if kept.any():
            part = differences[kept]
            dual = lsq_linear(part.T, y, (-levels[kept], levels[kept]), method="bvls", tol=1e-15, max_iter=5000)
            expected = y - part.T @ dual.x
        np.testing.assert_allclose(jax.jit(fused_lasso)(y, levels), expected, atol=1e-7)


@pytest.mark.parametrize("pinned", [False, True])
def test_the_chain_penalty_is_a_norm(rng, pinned):
    with precision(DOUBLE):
        penalty = Jitted(ChainTotalVariation(0.8, pinned))
        shape = (1, 12) if pinned else (12,)
        x = rng.standard_normal(shape)
        x[..., -1] *= not pinned  # the last place of an edge array is empty
        dual = penalty.project_dual(x - penalty.prox(x, 1.0))
        np.testing.assert_allclose(dual, x - penalty.prox(x, 1.0), atol=1e-12)
        slack = penalty.slack(x, dual)
        assert slack.min() >= -1e-15  # a product and a sum may be rounded as one
        assert slack.sum() == pytest.approx(penalty.value(x) - np.vdot(dual, x), abs=1e-10)
        assert isinstance(penalty.tree, so.Conjugate)
        size = penalty.dual_norm(dual)
        assert size == pytest.approx(1, abs=1e-12)  # a difference of the prox is not zero
        assert penalty.dual_norm(0.3 * dual) == pytest.approx(0.3 * size, rel=1e-12)
        assert np.abs(penalty.prox(dual, 1.01)).max() < 1e-12
        assert np.abs(penalty.prox(dual, 0.99)).max() > 1e-3


@pytest.mark.parametrize(("shape", "power"), [((9,), 1), ((6, 7), 2), ((3, 4, 5), 3)])
def test_cosines_and_conjugate_gradients_solve_the_x_step(rng, shape, power):
    with precision(DOUBLE):
        graph = so.Graph.grid(shape)
        inner = Difference(graph.base(np.float64), power)
        split = doge_split(Difference(graph.base(np.float64), 0), inner, graph.sums(power), "coefficients", np.float64)
        split = dataclasses.replace(split, row_scale=jnp.asarray(1.0), column_scale=jnp.asarray(2.0))
        right = rng.standard_normal((*shape, 2))
        loss = NodeSquares(jnp.zeros(right.shape))
        matrix = graph.matrix(power).toarray()
        system = np.eye(graph.num_nodes) + 0.7 * 2.0 * matrix.T @ matrix
        expected = np.linalg.solve(system, right.reshape(-1, 2)).reshape(right.shape)
        exact = Jitted(cosine_solve(shape, (power,), np.float64)).solve(loss, split, right, 0.7, 0 * right)
        np.testing.assert_allclose(exact, expected, atol=1e-9)
        diagonal = jnp.asarray(2.0 * graph.sums(power).column_squares.reshape(*shape, 1))
        close = Jitted(ConjugateGradient(diagonal, 1e-10)).solve(loss, split, right, 0.7, 0 * right)
        np.testing.assert_allclose(close, expected, atol=1e-7)


def test_sums_keep_their_accuracy_in_float32(rng):
    x = rng.uniform(0, 1, 3_000_000).astype(np.float32)
    assert float(total(jnp.asarray(x))) == pytest.approx(x.astype(np.float64).sum(), rel=1e-6)


def test_the_independent_solver_agrees_with_a_closed_form():
    graph = so.Graph.chain(2)
    np.testing.assert_allclose(exact_fit(np.array([0.0, 10.0]), graph, 1.0, 0), [1, 9], atol=1e-9)
