"""Inputs at the edge whose answer is known exactly: degenerate graphs, extreme weights, odd dtypes, missing values."""

import itertools

import networkx as nx
import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.base import arguments
from sparseopt.core.operators import row_tables as grouping
from sparseopt.trend.base import signal
from tests.tiers import often
from tests.trend.problems import random_graph, two_parts

PENALTIES = [so.L1(1.0), so.MCP(1.0), so.SCAD(1.0), so.L0(1.0), so.GroupL2(1.0)]


def status(solution):
    return so.Status(int(solution.status))


@pytest.mark.parametrize(
    "graph", [so.Graph.chain(1, ends="graph"), so.Graph.grid((1, 1, 1)), so.Graph.from_edges([], 4)], ids=repr
)
@pytest.mark.parametrize("order", often([0, 1, 2], 0, 2))
def test_without_edges_the_fit_is_the_signal(rng, graph, order):
    y = rng.standard_normal((graph.num_nodes, 2))
    for penalty in PENALTIES:
        found = so.trend_filter(y, graph, penalty, order)
        np.testing.assert_array_equal(found.value, y)
        assert status(found) is so.Status.CONVERGED
        assert float(found.gap) == 0
    for method in ("doge", "admm", "fast_admm", "interior"):
        np.testing.assert_array_equal(so.trend_filter(y, graph, so.L1(1.0), order, method).value, y)
    both = so.trend_filter(y, graph, {0: so.L1(1.0), 1: so.L1(1.0)})
    np.testing.assert_array_equal(both.value, y)
    again = so.trend.reweighted(y[:, 0], graph, so.MCP(1.0), order)
    np.testing.assert_array_equal(again.value, y[:, 0])
    assert again.status is so.Status.STATIONARY
    assert so.trend.largest_weight(y, graph, order) == 0
    assert np.isnan(so.trend.noise_level(y, graph, order))
    rows = graph.num_nodes if order % 2 else 0
    assert so.trend.degrees_of_freedom(np.zeros(rows, bool), graph, order) == graph.num_nodes


@pytest.mark.parametrize(("order", "method"), [(0, "doge"), (1, "auto"), (2, "interior")])
def test_an_isolated_node_keeps_its_value_to_the_last_bit(rng, order, method):
    graph, y = two_parts(rng), 100 + rng.standard_normal(11)
    assert so.trend_filter(y, graph, so.L1(0.4), order, method).value[10] == y[10]


@pytest.mark.parametrize("order", often([0, 1], 1))
def test_components_are_solved_each_alone(rng, order):
    graph, y = two_parts(rng), 5 * rng.standard_normal(11)
    together = so.trend_filter(y, graph, so.L1(0.7), order, "interior", tol=1e-12).check()
    parts = [
        (so.Graph.chain(6, ends="graph"), slice(6)),
        (so.Graph.from_edges([(0, 1), (1, 2), (0, 2), (2, 3)]), slice(6, 10)),
    ]
    for part, nodes in parts:
        alone = so.trend_filter(y[nodes], part, so.L1(0.7), order, "interior", tol=1e-12).check()
        # Both are this close to the optimum, by their gaps.
        far = 2 * np.sqrt(2 * 1e-12 * float(together.objective))
        assert np.linalg.norm(alone.value - together.value[nodes]) <= far


def test_parallel_edges_are_one_of_the_summed_weight_and_loops_are_nothing(rng):
    given = [(0, 1), (1, 2), (1, 1), (2, 1), (2, 3), (3, 3)]
    weights = [1.0, 0.3, 9.0, 0.5, 2.0, 9.0]
    merged = so.Graph.from_edges(given, weights=weights, merge=True)
    single = so.Graph.from_edges([(0, 1), (1, 2), (2, 3)], weights=[1.0, 0.3 + 0.5, 2.0])
    network = nx.MultiGraph()
    network.add_nodes_from(range(4))
    network.add_weighted_edges_from((*pair, w) for pair, w in zip(given, weights, strict=True))
    y = 3 * rng.standard_normal(4)
    expected = so.trend_filter(y, single, so.L1(0.3), 0, "doge").value
    np.testing.assert_array_equal(so.trend_filter(y, merged, so.L1(0.3), 0, "doge").value, expected)
    other = so.trend_filter(y, so.Graph.from_networkx(network, merge=True), so.L1(0.3), 0, "doge")
    np.testing.assert_array_equal(other.value, expected)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", ["L1", "MCP", "SCAD", "L0", "GroupL2", "row weights"])
def test_weight_0_returns_the_signal_to_the_last_bit(rng, order, name):
    graph, y = so.Graph.chain(12), rng.standard_normal((12, 2))
    penalty = so.L1(np.zeros(11 - order)) if name == "row weights" else getattr(so, name)(0.0)
    found = so.trend_filter(y, graph, penalty, order)
    np.testing.assert_array_equal(found.value, y)
    assert status(found) is so.Status.CONVERGED
    assert float(found.gap) == 0


LARGE = {
    "grid": lambda rng: so.Graph.grid((4, 5)),
    "random": lambda rng: random_graph(rng, n=15, weighted=True),
}


@pytest.mark.parametrize(
    ("name", "order"), often(itertools.product(("grid", "random"), range(3)), ("grid", 0), ("random", 1))
)
def test_from_the_largest_weight_on_the_fit_is_the_mean(rng, name, order):
    graph = LARGE[name](rng)
    y = 10 + 3 * rng.standard_normal(graph.num_nodes)
    largest = so.trend.largest_weight(y, graph, order)
    for factor in (1.01, 100.0, 1e8):
        found = so.trend_filter(y, graph, so.L1(factor * largest), order, "doge", tol=1e-10)
        assert status(found) is so.Status.CONVERGED, factor
        np.testing.assert_allclose(found.value, y.mean(), rtol=1e-14)
    at = so.trend_filter(y, graph, so.L1(largest), order, "doge", tol=1e-10)
    assert status(at) is so.Status.CONVERGED
    np.testing.assert_allclose(at.value, y.mean(), rtol=1e-4)
    below = so.trend_filter(y, graph, so.L1(0.9 * largest), order, "doge", tol=1e-10)
    assert np.ptp(below.value) > 1e-3
    assert float(below.objective) < 0.5 * np.sum((y - y.mean()) ** 2) * (1 - 1e-6)


GIVEN = {
    "a list": list,
    "bool": lambda y: y > 4,
    "int8": lambda y: y.astype(np.int8),
    "uint8": lambda y: y.astype(np.uint8),
    "uint16": lambda y: y.astype(np.uint16),
    "int32": lambda y: y.astype(np.int32),
    "int64": lambda y: y.astype(np.int64),
    "float16": lambda y: y.astype(np.float16),
    "float32": lambda y: y.astype(np.float32),
    "longdouble": lambda y: y.astype(np.longdouble),
    "big-endian": lambda y: y.astype(">f8"),
    "every second": lambda y: np.repeat(y, 2)[::2],
    "backwards": lambda y: y[::-1].copy()[::-1],
    "read-only": lambda y: np.broadcast_to(y, (2, y.size))[0],
}
TREE = so.Graph.from_edges([(i, i // 2) for i in range(1, 12)])


@pytest.mark.parametrize("name", GIVEN)
def test_numbers_of_every_kind_give_the_fit_of_their_values(rng, name):
    given = GIVEN[name](rng.integers(0, 9, 12).astype(float))
    kind = np.float32 if name in ("float16", "float32") else np.float64
    plain = np.array(given, np.float64)
    found = so.trend_filter(given, TREE, so.L1(1.0), 1, "doge", tol=1e-4)
    assert found.value.dtype == kind
    expected = so.trend_filter(plain, TREE, so.L1(1.0), 1, "doge", tol=1e-4, dtype=kind)
    np.testing.assert_array_equal(found.value, expected.value)
    np.testing.assert_array_equal(np.array(given, np.float64), plain)  # what the caller holds is left alone
    assert so.trend.largest_weight(given, TREE, 1) == so.trend.largest_weight(plain, TREE, 1)
    assert so.trend.noise_level(given, TREE) == so.trend.noise_level(plain, TREE)


def test_layouts_in_memory_do_not_matter(rng):
    graph, y = so.Graph.grid((3, 4)), rng.standard_normal((3, 4, 2))
    expected = np.asarray(so.trend_filter(y, graph, so.L1(0.3), 1, "doge").value)
    for given in (np.asfortranarray(y), y.transpose(2, 0, 1).copy().transpose(1, 2, 0), y.tolist()):
        np.testing.assert_array_equal(so.trend_filter(given, graph, so.L1(0.3), 1, "doge").value, expected)
    flat = so.trend_filter(y.reshape(12, 2), graph, so.L1(0.3), 1, "doge").value
    np.testing.assert_array_equal(np.asarray(flat).reshape(3, 4, 2), expected)
    weights = rng.uniform(0.5, 2.0, (3, 4))
    by_shape = so.trend_filter(y, graph, so.L1(0.3), 1, "doge", node_weights=weights).value
    by_row = so.trend_filter(y, graph, so.L1(0.3), 1, "doge", node_weights=weights.reshape(-1)).value
    np.testing.assert_array_equal(by_shape, by_row)


@pytest.mark.parametrize("order", often([0, 1, 2], 0, 2))
def test_one_observation_a_component_is_enough(rng, order):
    # Only constants of a component cost nothing, so one value determines it, at every order.
    graph, y = two_parts(rng), np.full(11, np.nan)
    y[[2, 8, 10]] = 1.0, -3.0, 7.0
    found = so.trend_filter(y, graph, so.L1(0.5), order, missing="nan", tol=1e-10)
    assert status(found) is so.Status.CONVERGED
    np.testing.assert_array_equal(found.value, np.repeat([1.0, -3.0, 7.0], [6, 4, 1]))
    assert (float(found.objective), float(found.gap)) == (0, 0)
    whole = so.trend_filter(np.asarray(found.value), graph, so.L1(0.5), order)
    np.testing.assert_array_equal(whole.value, found.value)


def test_masked_entries_and_nan_and_weights_of_0_are_the_same_missing_values(rng):
    graph, y = so.Graph.grid((3, 4)), rng.standard_normal(12)
    absent = np.isin(np.arange(12), [1, 7])
    expected = so.trend_filter(y, graph, so.L1(0.3), node_weights=np.where(absent, 0.0, 1.0)).value
    holes = so.trend_filter(np.where(absent, np.nan, y), graph, so.L1(0.3), missing="nan").value
    masked = so.trend_filter(np.ma.array(y, mask=absent), graph, so.L1(0.3), missing="nan").value
    np.testing.assert_array_equal(holes, expected)
    np.testing.assert_array_equal(masked, expected)
    assert so.trend.largest_weight(np.ma.array(np.arange(12), mask=False), graph, 1) == so.trend.largest_weight(
        np.arange(12), graph, 1
    )


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_unit_of_the_signal_does_not_matter(rng, kind, sign):
    power = sign * (30 if kind == np.float32 else 400)
    graph, y = so.Graph.grid((4, 5)), rng.standard_normal(20).astype(kind)
    plain = so.trend_filter(y, graph, so.L1(0.25), 1, "doge", tol=1e-5).check()
    scaled = so.trend_filter(np.ldexp(y, power), graph, so.L1(np.ldexp(0.25, power)), 1, "doge", tol=1e-5).check()
    far = 2 * np.sqrt(2 * 1e-5 * float(plain.objective))
    assert np.linalg.norm(np.ldexp(np.asarray(scaled.value), -power) - plain.value) <= far


def test_an_order_that_fills_the_operator_is_refused_before_it_is_formed(rng, monkeypatch):
    n = 2000
    ends = np.stack([np.arange(1, n), rng.integers(0, np.arange(1, n))], axis=1)
    monkeypatch.setattr(arguments, "ALWAYS_FREE", 0)
    monkeypatch.setattr(arguments, "available_memory_bytes", lambda: 2**24)
    for graph in (so.Graph.grid((12, 12, 12)), so.Graph.from_edges(ends)):
        y = np.arange(float(graph.num_nodes))
        assert graph.sums(2).row_squares.size == graph.num_nodes
        with pytest.raises(ValueError, match=r"difference matrix of order 16 .* rows of .* entries and more takes"):
            so.trend_filter(y, graph, so.L1(1.0), 15, "doge")


def test_the_estimated_entries_are_a_lower_bound_near_the_truth(rng, monkeypatch):
    asked = []
    monkeypatch.setattr(grouping, "require_memory", lambda needed, *_: asked.append(needed))
    for graph in (so.Graph.chain(200, ends="graph"), so.Graph.grid((15, 15)), random_graph(rng, n=200, extra=100)):
        for order in (4, 5, 6):
            truth = graph.matrix(order).nnz * grouping.ENTRY_BYTES
            assert 0.5 * truth <= asked[-1] <= 1.15 * truth


def test_what_needs_more_memory_than_there_is_is_refused(monkeypatch):
    y, graph = np.arange(10_000.0), so.Graph.chain(10_000)
    needed = signal.FIT_COPIES * y.nbytes
    monkeypatch.setattr(arguments, "ALWAYS_FREE", 0)
    monkeypatch.setattr(arguments, "available_memory_bytes", lambda: needed - 1)
    for call in (so.trend_filter, so.trend.trend_path):
        with pytest.raises(ValueError, match=r"10,000 values, takes at least 1\.8 MiB, and 1\.8 MiB are free"):
            call(y, graph, so.L1(1.0))
    monkeypatch.setattr(arguments, "available_memory_bytes", lambda: needed)
    with pytest.raises(ValueError, match="a history of max_steps=1,000,000 steps takes"):
        so.trend_filter(y, graph, so.L1(1.0), history=True, max_steps=10**6)
    assert so.trend.noise_level(y, graph) > 0


def test_the_unit_of_the_spacing_does_not_matter(rng):
    y = rng.standard_normal((12, 10))
    levels = [so.trend.noise_level(y, so.Graph.grid(y.shape, spacing=(h, 2 * h)), order=3) for h in (1e-7, 1.0, 1e7)]
    np.testing.assert_allclose(levels, levels[1], rtol=1e-9)
