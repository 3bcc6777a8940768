"""Fits between bounds, and fits that only rise or fall: inside exactly, certified, against Clarabel and SciPy."""

import numpy as np
import pytest
from scipy.optimize import isotonic_regression

import sparseopt as so
from tests.trend.problems import LOSSES, Problem, observations, random_graph

CHAIN, FREE, GRID = so.Graph.chain(20, ends="graph"), so.Graph.chain(20), so.Graph.grid((4, 5))
UP = so.Box(-np.inf, 0.0)  # of the differences: an edge's tail less its head


def constrained(problem, bounds, monotone):
    """The same problem, with the constraints as penalties of their orders."""
    terms = {problem.order: problem.penalty}
    if bounds is not None:
        terms[-1] = so.Box(
            *(end if given is None else given for given, end in zip(bounds, (-np.inf, np.inf), strict=True))
        )
    if monotone is not None:
        weight = problem.penalty.weight if problem.order == 0 else 0.0
        ends = (-np.inf, 0.0) if monotone == "up" else (0.0, np.inf)
        terms[0] = so.Box(*ends, weight=weight)
    return problem.but(penalty=dict(sorted(terms.items())), order=0)


def require_optimal(fit, problem, bounds, monotone):
    """Inside the constraints without any tolerance, and as good as its gap says."""
    exact = constrained(problem, bounds, monotone)
    exact.exact  # noqa: B018  finds the bound
    value = np.asarray(fit.value, float)
    assert fit.status == so.Status.CONVERGED
    assert float(fit.objective) == pytest.approx(problem.objective(value), rel=1e-9)
    scale = 1 + abs(exact.bound)
    assert exact.bound - 1e-7 * scale <= fit.objective <= (1 + float(fit.gap)) * exact.bound + 1e-7 * scale
    low, high = (None, None) if bounds is None else bounds
    assert low is None or value.min() >= low
    assert high is None or value.max() <= high
    steps = problem.graph.matrix(1) @ value.reshape(problem.graph.num_nodes, -1)
    assert monotone is None or (steps.max() <= 0 if monotone == "up" else steps.min() >= 0)


CASES = {
    "clipped": (CHAIN, 0, (-0.5, 1.0), None),
    "clipped grid": (GRID, 0, (None, 0.4), None),
    "far from the data": (CHAIN, 0, (8.0, 9.0), None),
    "one value": (CHAIN, 0, (0.5, 0.5), None),
    "up": (CHAIN, 0, None, "up"),
    "down between bounds": (CHAIN, 0, (0.0, None), "down"),
    "up a grid": (GRID, 0, None, "up"),
    "slopes up": (FREE, 1, None, "up"),
    "slopes between bounds": (FREE, 1, (0.0, 1.5), None),
    "both": (GRID, 1, (0.0, 1.5), "up"),
}


@pytest.mark.parametrize("case", [*CASES][:-2])
def test_the_fit_is_inside_and_optimal(case, rng):
    graph, order, bounds, monotone = CASES[case]
    y = np.linspace(0, 2, 20) + rng.standard_normal(20)
    problem = Problem(y, graph, so.L1(0.4), order)
    shape = graph.shape if graph.shape is not None and len(graph.shape) > 1 else (20,)
    fit = so.trend_filter(y.reshape(shape), graph, so.L1(0.4), order, bounds=bounds, monotone=monotone)
    require_optimal(fit, problem, bounds, monotone)


@pytest.mark.thorough
@pytest.mark.parametrize("case", [*CASES][-2:])
def test_fits_of_order_1_are_inside_and_optimal(case, rng):
    test_the_fit_is_inside_and_optimal(case, rng)


def test_along_the_edges_of_a_list_that_only_fall(rng):
    graph = random_graph(rng, 20, weighted=True)
    y = 3 * rng.standard_normal(20)
    fit = so.trend_filter(y, graph, so.L1(0.3), monotone="down")
    require_optimal(fit, Problem(y, graph, so.L1(0.3)), None, "down")


@pytest.mark.parametrize(
    "loss", ["poisson", "quantile", *(pytest.param(loss, marks=pytest.mark.thorough) for loss in ("logistic", "huber"))]
)
def test_bounds_with_other_losses(loss, rng):
    y = np.asarray(observations(rng, loss, 20), float)
    problem, bounds = Problem(y, CHAIN, so.L1(0.3), loss=loss), (-0.4, 0.6)
    fit = so.trend_filter(y, CHAIN, so.L1(0.3), loss=LOSSES[loss], bounds=bounds)
    require_optimal(fit, problem, bounds, None)


def test_without_a_weight_it_is_isotonic_regression(rng):
    y, weights = np.linspace(0, 3, 400) + rng.standard_normal(400), rng.uniform(0.2, 3, 400)
    graph = so.Graph.chain(400)
    fit = so.trend_filter(y, graph, so.L1(0.0), monotone="up", node_weights=weights)
    np.testing.assert_allclose(fit.value, isotonic_regression(y, weights=weights).x, atol=1e-12)
    assert len(np.unique(fit.value)) == fit.pieces().max() + 1
    fall = so.trend_filter(-y, graph, so.L1(0.0), monotone="down", node_weights=weights)
    np.testing.assert_allclose(fall.value, -fit.value, atol=1e-12)


def test_the_mean_of_isotonic_counts_is_isotonic_regression(rng):
    """Of exponential families (Robertson, Wright, Dykstra 1988)."""
    counts = rng.poisson(np.exp(np.linspace(0, 2, 20))) + 1.0
    fit = so.trend_filter(counts, CHAIN, so.L1(0.0), monotone="up", loss="poisson", tol=1e-9)
    np.testing.assert_allclose(np.exp(fit.value), isotonic_regression(counts).x, rtol=1e-3)


def test_missing_values_and_channels(rng):
    y = np.stack([np.linspace(0, 2, 20), np.linspace(2, 0, 20)], axis=1) + 0.3 * rng.standard_normal((20, 2))
    gaps = y.copy()
    gaps[6:9] = np.nan
    fit = so.trend_filter(gaps, CHAIN, so.L1(0.2), bounds=(0.4, 1.6), missing="nan")
    weights = np.isfinite(gaps[:, 0]).astype(float)
    for channel in range(2):
        alone = so.trend_filter(y[:, channel], CHAIN, so.L1(0.2), bounds=(0.4, 1.6), node_weights=weights)
        np.testing.assert_allclose(fit.value[:, channel], alone.value, atol=1e-9)


@pytest.mark.parametrize("bounds", [(1.0, 0.0), 3.0, "ab", (1, 2, 3), (np.nan, 1.0), (True, 2.0), (np.inf, np.inf)])
def test_wrong_bounds(bounds):
    with pytest.raises(ValueError, match="bounds are a pair"):
        so.trend_filter(np.arange(20.0), CHAIN, so.L1(0.3), bounds=bounds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"monotone": "sideways"}, "monotone 'sideways'"),
        ({"monotone": "up", "penalty": so.MCP(1.0)}, "monotone joins L1 at order 0"),
        ({"bounds": (0, 1), "order": 1, "loss": "huber"}, "need the square loss"),
    ],
)
def test_constraints_that_do_not_join(changes, message):
    with pytest.raises(ValueError, match=message):
        so.trend_filter(**{"y": np.arange(20.0), "graph": CHAIN, "penalty": so.L1(0.3)} | changes)
