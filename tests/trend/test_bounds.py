"""Fits between bounds, and fits that only rise or fall: inside exactly, certified, against Clarabel and SciPy."""

import numpy as np
import pytest
from scipy.optimize import isotonic_regression

import sparseopt as so
from tests.tiers import often
from tests.trend.problems import Problem, observations, random_graph

CHAIN, FREE, GRID = so.Graph.chain(20, ends="graph"), so.Graph.chain(20), so.Graph.grid((4, 5))
OTHER = random_graph(np.random.default_rng(2), 20, weighted=True)
FALLS = {"up": (-np.inf, 0.0), "down": (0.0, np.inf)}
# Graph, order, bounds, direction, loss.
CASES = {
    "clipped": (CHAIN, 0, (-0.5, 1.0), None, "square"),
    "clipped grid": (GRID, 0, (None, 0.4), None, "square"),
    "far from the data": (CHAIN, 0, (8.0, 9.0), None, "square"),
    "one value": (CHAIN, 0, (0.5, 0.5), None, "square"),
    "up": (CHAIN, 0, None, "up", "square"),
    "down between bounds": (CHAIN, 0, (0.0, None), "down", "square"),
    "up a grid": (GRID, 0, None, "up", "square"),
    "down a list of edges": (OTHER, 0, None, "down", "square"),
    "counts": (CHAIN, 0, (-0.4, 0.6), None, "poisson"),
    "quantile": (CHAIN, 0, (-0.4, 0.6), None, "quantile"),
    "labels": (CHAIN, 0, (-0.4, 0.6), None, "logistic"),
    "outliers": (CHAIN, 0, (-0.4, 0.6), None, "huber"),
    "slopes up": (FREE, 1, None, "up", "square"),
    "slopes between bounds": (FREE, 1, (0.0, 1.5), None, "square"),
    "both": (GRID, 1, (0.0, 1.5), "up", "square"),
}
SELDOM = ("labels", "outliers", "slopes between bounds", "both")


@pytest.mark.parametrize("case", often(CASES, *(case for case in CASES if case not in SELDOM)))
def test_the_fit_is_inside_and_optimal(case, rng):
    graph, order, bounds, monotone, loss = CASES[case]
    y = np.linspace(0, 2, 20) + rng.standard_normal(20) if loss == "square" else 1.0 * observations(rng, loss, 20)
    problem = Problem(y, graph, so.L1(0.3), order, loss=loss)
    fit = problem.fit(y=y.reshape(graph.shape or -1), bounds=bounds, monotone=monotone)
    low, high = bounds or (None, None)
    low, high = -np.inf if low is None else low, np.inf if high is None else high
    # The same problem, with the constraints as penalties of their orders; an edge's tail less its head is below 0.
    terms = {-1: so.Box(low, high)} if bounds else {}
    terms |= {0: so.Box(*FALLS[monotone], weight=0.3 * (order == 0))} if monotone else {}
    best = problem.but(penalty={order: problem.penalty} | terms, order=0).least
    value, margin = np.ravel(fit.value), 1e-7 * (1 + abs(best))
    assert fit.status == so.Status.CONVERGED
    assert float(fit.objective) == pytest.approx(problem.objective(value), rel=1e-9)
    assert best - margin <= fit.objective <= (1 + float(fit.gap)) * best + margin
    # Without any tolerance.
    assert low <= value.min() <= value.max() <= high
    falls = graph.matrix(1) @ value
    assert monotone is None or np.all((FALLS[monotone][0] <= falls) & (falls <= FALLS[monotone][1]))


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
