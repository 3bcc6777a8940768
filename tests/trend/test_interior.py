"""The interior point method against the exact dual, and when "auto" chooses it."""

import importlib.util

import numpy as np
import pytest

import sparseopt as so
from sparseopt.trend.filter import chosen_method
from tests.tiers import often
from tests.trend.problems import GRAPHS, exact_fit, exact_sum, objective, random_graph


@pytest.mark.parametrize("order", range(6))
def test_every_order_has_the_exact_answer(rng, order):
    graph = GRAPHS["weighted"](rng)
    y = 5 * rng.standard_normal(graph.num_nodes)
    expected = exact_fit(y, graph, 0.7, order)
    found = so.trend_filter(y, graph, so.L1(0.7), order, "interior", tol=1e-9).check()
    assert objective(found.value, y, graph, 0.7, order) / objective(expected, y, graph, 0.7, order) - 1 <= 1.1e-9
    np.testing.assert_allclose(found.value, expected, atol=2e-3)


@pytest.mark.parametrize(("name", "order"), [("parts", 0), ("grid", 1), ("cube", 2), ("random", 3)])
def test_node_weights_row_weights_and_channels(rng, name, order):
    graph = GRAPHS[name](rng)
    y = 10 + 3 * rng.standard_normal((graph.num_nodes, 2))
    w = rng.uniform(0.3, 3.0, graph.num_nodes)
    weights = rng.uniform(0.2, 1.0, graph.matrix(order + 1).shape[0])
    weights[::4] = 0
    found = so.trend_filter(y, graph, so.L1(weights), order, "interior", tol=1e-9, node_weights=w).check()
    for channel in range(2):
        expected = exact_sum(y[:, channel], graph, {order: weights}, w)
        np.testing.assert_allclose(found.value[:, channel], expected, atol=2e-3)


def test_many_edges_a_node(rng):
    graph = random_graph(rng, n=20, extra=60)
    y = 5 * rng.standard_normal(20)
    found = so.trend_filter(y, graph, so.L1(0.7), 0, "interior", tol=1e-9).check()
    np.testing.assert_allclose(found.value, exact_fit(y, graph, 0.7, 0), atol=2e-3)


@pytest.mark.parametrize("order", often([0, 1, 2], 0, 1))
def test_missing_values_come_out_as_by_the_other_methods(rng, order):
    graph = random_graph(rng, n=40, extra=20)
    y = 5 + 3 * rng.standard_normal(40)
    y[[3, 17, 18]] = np.nan
    found = so.trend_filter(y, graph, so.L1(0.6), order, "interior", tol=1e-8, missing="nan").check()
    other = so.trend_filter(y, graph, so.L1(0.6), order, "doge", tol=1e-8, missing="nan").check()
    assert abs(float(found.objective) / float(other.objective) - 1) <= 2e-8
    if order:  # at order 0 a missing node may take any value between its neighbours
        np.testing.assert_allclose(found.value, other.value, atol=1e-2)


def test_a_large_weight_gives_the_means_and_the_dual_starts_other_methods(rng):
    graph = GRAPHS["parts"](rng)
    y = rng.standard_normal(11)
    found = so.trend_filter(y, graph, so.L1(100.0), 1, "interior").check()
    means = [y[:6].mean(), y[6:10].mean(), y[10]]
    np.testing.assert_allclose(found.value, np.repeat(means, [6, 4, 1]), atol=1e-12)
    first = so.trend_filter(y, graph, so.L1(0.3), 0, "interior", tol=1e-9)
    assert int(so.trend_filter(y, graph, so.L1(0.3), 0, "doge", tol=1e-6, start=first).steps) <= 10


def test_it_says_where_it_stopped(rng):
    graph = random_graph(rng, n=40, extra=20)
    y = rng.standard_normal(40)
    assert so.Status(int(so.trend_filter(y, graph, so.L1(0.5), 1, "interior", max_steps=2).status)) is (
        so.Status.MAX_STEPS
    )
    single = so.trend_filter(y.astype(np.float32), graph, so.L1(0.5), 1, "interior", tol=1e-5).check()
    assert single.value.dtype == np.float32
    constant = so.trend_filter(np.full(40, 3.0), graph, so.L1(0.5), 1, "interior").check()
    np.testing.assert_array_equal(constant.value, 3.0)


def test_auto_takes_it_on_narrow_graphs_alone(rng, monkeypatch):
    road, y = so.Graph.from_edges(so.Graph.grid((30, 40)).edges[1:], 1200), rng.standard_normal(1200)
    assert chosen_method(y, road, so.L1(3.0), 1) == "interior"
    assert chosen_method(y, road, so.L1(2.0), 1, tol=1e-6) == "interior"
    assert chosen_method(y, road, so.L1(2.0), 1, tol=1e-4) == "doge"
    assert chosen_method(y, road, so.L1(0.1), 2) == "interior"
    tangle = so.Graph.from_edges(rng.integers(0, 600, (3000, 2)), 600, merge=True)
    assert chosen_method(rng.standard_normal(600), tangle, so.L1(3.0), 1) == "doge"
    assert chosen_method(y, road, so.MCP(3.0), 1) == "doge"
    assert chosen_method(y, road, so.L1(1.0), 0) == "doge"
    assert chosen_method(y, road, so.L1(100.0), 0) == "interior"
    assert chosen_method(y, so.Graph.chain(1200), so.L1(1.0), 1) == "doge"
    assert chosen_method(y, so.Graph.chain(1200), so.L1(100.0), 1) == "interior"
    assert chosen_method(y, so.Graph.grid((30, 40)), so.L1(1.0), 1) != "interior"
    # A warm start is what it cannot use.
    first = so.trend_filter(y, road, so.L1(3.0), 1)
    assert first.state is None  # that of the others has a rho
    second = so.trend_filter(y, road, so.L1(3.0), 1, start=first)
    assert second.state is not None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert chosen_method(y, road, so.L1(3.0), 1) == "doge"
    with pytest.raises(ImportError, match=r'pip install "sparseopt\[interior\]"'):
        so.trend_filter(y, road, so.L1(1.0), 1, "interior")


@pytest.mark.parametrize("order", often([1, 2], 1))
def test_paths_are_those_of_the_other_methods(rng, order):
    graph = random_graph(rng, n=60, extra=20)
    y = np.cumsum(rng.standard_normal((60, 2)), axis=0)
    path = so.trend.trend_path(y, graph, order=order, num=12, ratio=1e-2, tol=1e-7, method="interior").check()
    other = so.trend.trend_path(y, graph, order=order, num=12, ratio=1e-2, tol=1e-7, method="doge").check()
    np.testing.assert_allclose(path.weights, other.weights)
    np.testing.assert_allclose(path.values, other.values, atol=0.02)
    # Which rows are zero is known to the tolerance: a row more or less.
    np.testing.assert_allclose(path.degrees_of_freedom, other.degrees_of_freedom, atol=1)
    # Both single fits and paths take it by themselves.
    auto = so.trend.trend_path(y, graph, order=order, num=12, ratio=1e-2, tol=1e-7)
    np.testing.assert_array_equal(auto.values, path.values)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"penalty": so.MCP(1.0)}, "solves the L1 penalty, given MCP"),
        ({"history": True}, "no start and keeps no history"),
        ({"loss": "huber"}, "solves the square loss only"),
        ({"penalty": {0: so.L1(1.0), 1: so.L1(1.0)}}, "solves single orders"),
    ],
)
def test_bad_input_is_an_error_that_names_it(rng, arguments, match):
    call = {"y": rng.standard_normal(14), "graph": random_graph(rng), "penalty": so.L1(1.0), **arguments}
    with pytest.raises(ValueError, match=match):
        so.trend_filter(method="interior", **call)
