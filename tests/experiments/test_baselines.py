"""The baselines of the Doge-ADMM paper solve the same problem as `trend_filter`, by the named algorithms."""

import numpy as np
import pytest

import sparseopt as so
from doge_baselines import Method, algorithm_of, assemble, fit
from sparseopt.core.base.types import precision
from sparseopt.core.solve import solve
from tests.tiers import often

SHAPE, WEIGHT = (9, 8), 4.0


@pytest.fixture(scope="module")
def signal() -> np.ndarray:
    i, j = np.mgrid[: SHAPE[0], : SHAPE[1]]
    return 20.0 * (i > 4) + 2.0 * j + 5 * np.random.default_rng(0).standard_normal(SHAPE)


def optimum(signal: np.ndarray, graph: so.Graph, order: int) -> so.Solution:
    return so.trend_filter(signal, graph, so.L1(WEIGHT), order, tol=1e-11).check()


NESTED = [("fast_admm", "tuned", order) for order in (0, 1, 2)]
PUBLISHED = [("doge", 0), ("doge", 1), ("admm", 1), ("fast_admm", 1), ("doge_groups", 1)]
CASES = [*NESTED, *((method, "published", order) for method, order in PUBLISHED)]


@pytest.mark.parametrize(
    ("method", "settings", "order"),
    often(CASES, NESTED[0], ("doge", "published", 1), ("doge_groups", "published", 1)),
)
def test_a_method_reaches_the_certified_optimum(signal: np.ndarray, method: Method, settings: str, order: int) -> None:
    graph, nested = so.Graph.grid(SHAPE), settings == "tuned"
    accuracy = {"tol": 1e-8, "inner_tol": 1e-11} if nested else {"tol": 1e-7}
    found = fit(signal, graph, so.L1(WEIGHT), order, method, settings=settings, **accuracy)
    best = optimum(signal, graph, order)
    assert so.Status(int(found.status)) is so.Status.CONVERGED
    assert float(found.objective) - float(best.objective) >= -1e-9
    above = float(found.objective) / float(best.objective) - 1
    assert above <= float(found.gap) + 1e-10
    assert above <= 1e-7
    np.testing.assert_allclose(np.asarray(found.value), best.value, atol=0.02)
    assert nested or float(found.state.rho) == 1.0


def test_the_certificate_is_a_bound_with_a_coarse_inner_solve(signal: np.ndarray) -> None:
    graph = so.Graph.grid(SHAPE)
    best = optimum(signal, graph, 1)
    for steps in (5, 10, 15):
        found = fit(signal, graph, so.L1(WEIGHT), 1, "fast_admm", tol=1e-12, max_steps=steps, inner_tol=1e-2)
        assert float(found.gap) >= float(found.objective) / float(best.objective) - 1 - 1e-10


@pytest.mark.thorough
def test_any_graph_has_the_nested_method() -> None:
    rng = np.random.default_rng(1)
    edges = np.unique(np.sort(rng.integers(0, 30, (60, 2)), axis=1), axis=0)
    graph = so.Graph.from_edges(edges[edges[:, 0] < edges[:, 1]], 30)
    y = rng.standard_normal(30)
    found = fit(y, graph, so.L1(0.1), 1, "fast_admm", tol=1e-7)
    best = so.trend_filter(y, graph, so.L1(0.1), 1, tol=1e-10)
    assert float(found.objective) / float(best.objective) - 1 <= 1e-7


@pytest.mark.parametrize("method", ["doge", "doge_groups"])
def test_doge_with_published_settings_is_the_published_iteration(signal: np.ndarray, method: Method) -> None:
    """Copies `alpha_i`, duals `theta_i` for each group, as equations 9 to 11 of the paper have them."""
    graph, order = so.Graph.grid(SHAPE), 1
    matrix, labels = graph.matrix(order + 1).toarray(), graph.groups(order + 1)
    groups = [matrix[labels == group] for group in range(labels.max() + 1)]
    y = signal.reshape(-1)
    b, theta = y.copy(), [np.zeros_like(y) for _ in groups]
    for _ in range(10):
        alpha = []
        for rows, dual in zip(groups, theta, strict=True):
            v = b - dual
            s, squares = rows @ v, (rows**2).sum(axis=1)
            u = np.sign(s) * np.maximum(np.abs(s) - WEIGHT * squares, 0)
            alpha.append(v + rows.T @ ((u - s) / squares))
        b = (y + sum(theta) + sum(alpha)) / (1 + len(groups))
        theta = [dual + copy - b for dual, copy in zip(theta, alpha, strict=True)]
    with precision(np.dtype(np.float64)):
        made = assemble(signal, graph, so.L1(WEIGHT), order, method, "published")
        found = solve(made.problem, made.solver, made.start, tol=-1.0, max_steps=10)
        np.testing.assert_allclose(np.asarray(found.value).reshape(-1), b, atol=1e-10)


def test_gtf_admm_is_one_of_the_others_at_every_order() -> None:
    names = [algorithm_of("gtf_admm", order) for order in range(4)]
    assert names == ["fast_admm", "admm", "fast_admm", "admm"]


def test_stopping_on_change_stops_where_the_fit_stands_still(signal: np.ndarray) -> None:
    graph = so.Graph.grid(SHAPE)
    stopped = fit(signal, graph, so.L1(WEIGHT), 1, "doge", settings="published", stop="change", tol=1e-4)
    steps = int(stopped.steps)
    with precision(np.dtype(np.float64)):
        made = assemble(signal, graph, so.L1(WEIGHT), 1, "doge", "published", cadence=1)
        last, before = (
            np.asarray(solve(made.problem, made.solver, made.start, tol=-1.0, max_steps=count).value)
            for count in (steps, steps - 1)
        )
    np.testing.assert_allclose(stopped.value, last, atol=1e-10)
    change = np.linalg.norm(last - before) / np.linalg.norm(before)
    assert change <= 1e-4
    assert float(stopped.residual) == pytest.approx(change, rel=1e-6)


def test_what_a_baseline_cannot_do_is_said(signal: np.ndarray) -> None:
    graph = so.Graph.grid(SHAPE)
    with pytest.raises(ValueError, match="L1"):
        fit(signal, graph, so.MCP(4.0), 1, "fast_admm")
    with pytest.raises(ValueError, match=r"takes one channel, given shape \(9, 8, 2\) on 72 nodes"):
        fit(np.stack([signal, signal], axis=-1), graph, so.L1(4.0), 1, "fast_admm")
