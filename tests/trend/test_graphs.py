"""Graphs: what makes one, the differences on it, and what is refused."""

import copy
import pickle

import networkx as nx
import numpy as np
import pytest
from scipy import sparse

import sparseopt as so
from tests.trend.problems import FREE, cases_of, refused

NAN, INF = np.nan, np.inf
EVEN, UNEVEN, GRID = (make(None) for make in FREE.values())
# Arguments besides good ones, and words of the error.
GOOD = {
    so.Graph.grid: {"shape": (4, 5)},
    so.Graph.chain: {"n": 3},
    so.Graph.from_edges: {"edges": [(0, 1), (1, 2)]},
}
BAD = {
    so.Graph.grid: [
        *[({"shape": shape}, "1 to 3 axes") for shape in ((), (2, 2, 2, 2), 5)],
        *[({"shape": (size, 3)}, "axis 0", "at least 1", f"given {size!r}") for size in (0, -2, 2.5, NAN, "a")],
        ({"shape": (10**6, 10**6)}, "1,000,000,000,000 nodes", "are free"),
        *[({"spacing": h}, "each of its 2 axes", repr(h)) for h in ((1, 2, 3), (1, 0), (1, NAN), 2.0)],
        ({"shape": (5,), "spacing": (2.0,)}, "a grid of one axis has no spacing"),
        ({"ends": "open"}, "unknown ends 'open'", "graph, free"),
    ],
    so.Graph.chain: [
        ({"n": 10**15}, "are free"),
        ({"times": [0.0, 1.0]}, "as many times, [3]", "(2,)"),
        ({"times": [0.0, NAN, 2.0]}, "times are finite", "nan at node 1"),
        ({"times": [0.0, 2.0, 2.0]}, "increase from node to node", "2 and then 2 at node 2"),
        ({"times": ["a", "b", "c"]}, "times must hold real numbers"),
        ({"times": [0.0, 1.0, 2.0], "ends": "graph"}, 'times need ends="free"'),
        ({"ends": "fre"}, "unknown ends 'fre'", "did you mean 'free'"),
    ],
    so.Graph.from_edges: [
        *[({"edges": [(0, node)]}, "whole node numbers") for node in ("b", NAN, 0.5, 1j)],
        ({"edges": np.array([[0, 1]], object)}, "whole node numbers"),
        ({"edges": [(False, True)]}, "whole node numbers"),
        ({"edges": [(0, 1), (2,)]}, "shape [m, 2]", "unequal length"),
        ({"edges": [(0, 1, 2), (1, 2, 3)]}, "shape [m, 2]", "pass the transpose"),
        ({"edges": []}, "at least one node"),
        ({"edges": [(0, -1)]}, "edge 0, (0, -1)"),
        ({"edges": [(0, 1), (1, 6)], "num_nodes": 6}, "edge 1, (1, 6), leaves the node numbers 0..5"),
        ({"edges": [(0, 1), (2, 2)]}, "edge 1 joins node 2 to itself"),
        ({"edges": [(0, 1), (1, 0)]}, "edge 1, (1, 0), was given before"),
        ({"edges": [(0, 2**62)]}, "num_nodes is"),
        *[
            ({"weights": [1.0, w]}, "edge weights are positive and finite", f"{w} at edge 1")
            for w in (0.0, -1.0, NAN, INF)
        ],
        *[({"weights": np.ones(shape)}, "2 edges need as many weights", str(shape)) for shape in ((1,), (3,), ())],
        *[({"weights": weights}, "real numbers") for weights in ([1j, 1j], ["1", "2"], [None, 1.0])],
        ({"edges": [(0, 1)] * 2, "weights": [1e308] * 2, "merge": True}, "given inf"),
        ({"nodes": "abcd"}, "3 nodes need as many names, given 4"),
    ],
    so.Graph.from_scipy: [
        *[({"adjacency": np.ones(shape)}, "square", str(shape)) for shape in ((2, 3), (3,))],
        ({"adjacency": [[0, 1], [0, 0]]}, "symmetric"),
        ({"adjacency": np.array([[0, 1], [2, 0]], np.uint8)}, "symmetric"),
        ({"adjacency": [[0, 1], [1, 2]]}, "1 diagonal entries (self-loops)", "node 1"),
        ({"adjacency": [[0, NAN], [NAN, 0]]}, "finite", "nan at (0, 1)"),
        *[({"adjacency": matrix}, "real numbers") for matrix in ("ab", sparse.csr_array(np.array([[0, 1j], [1j, 0]])))],
    ],
    so.Graph.from_networkx: [
        ({"graph": 5}, "networkx.Graph", "int", TypeError),
        ({"graph": nx.DiGraph([(0, 1)])}, "undirected"),
        ({"graph": nx.Graph([(0, 1, {"weight": "a"})])}, "real numbers"),
    ],
}


@pytest.mark.parametrize(("make", "changes", "words"), cases_of(BAD))
def test_an_error_names_what_was_given(make, changes, words):
    refused(lambda: make(**GOOD.get(make, {}) | changes), *words)


def test_merge_adds_duplicates_and_drops_loops_whatever_the_graph_was_given_as():
    given, weights = [(0, 1), (1, 2), (1, 1), (2, 1), (2, 3), (3, 3)], [1.0, 0.25, 9.0, 0.5, 2.0, 9.0]
    network = nx.MultiGraph()
    network.add_nodes_from(range(4))
    network.add_weighted_edges_from((*pair, w) for pair, w in zip(given, weights, strict=True))
    adjacency = np.diag([0.0, 9, 0, 9]) + np.diag([1, 0.75, 2], 1) + np.diag([1, 0.75, 2], -1)
    for graph in (
        so.Graph.from_edges(given, weights=weights, merge=True),
        so.Graph.from_networkx(network, merge=True),
        so.Graph.from_scipy(adjacency, merge=True),
    ):
        pairs = zip(map(tuple, np.sort(graph.edges).tolist()), graph.weights, strict=True)
        assert dict(pairs) == {(0, 1): 1.0, (1, 2): 0.75, (2, 3): 2.0}


def test_scipy_and_networkx_graphs_are_the_same_graph():
    named = nx.Graph([("a", "b", {"weight": 2.0}), ("d", "c")])
    graph = so.Graph.from_networkx(named)
    assert graph.nodes == ("a", "b", "d", "c")
    assert so.Graph.from_networkx(named, weight=None).weights is None
    same = so.Graph.from_scipy(nx.to_scipy_sparse_array(named))
    for each in (graph, same):
        np.testing.assert_allclose(each.matrix(2).toarray(), nx.laplacian_matrix(named).toarray())


def test_components_and_isolated_nodes():
    graph = so.Graph.from_edges([(0, 1), (3, 4)], 6)
    assert graph.num_components == 4
    np.testing.assert_array_equal(graph.isolated, [2, 5])
    assert so.Graph.grid((3, 4)).num_components == 1


def test_a_stored_graph_leaves_its_tables_out_and_a_copy_shares_them():
    graph = so.Graph.from_edges([(0, 1), (1, 2), (3, 4)], weights=[1.0, 2.0, 3.0], nodes="abcde")
    stored = pickle.dumps(graph)
    fit = so.trend_filter(np.arange(5.0), graph, so.L1(0.1), 1)
    assert pickle.dumps(graph) == stored
    assert copy.deepcopy([graph]) == [graph]
    thawed = pickle.loads(stored)
    assert (thawed.num_nodes, thawed.shape, thawed.nodes) == (5, None, tuple("abcde"))
    np.testing.assert_array_equal(so.trend_filter(np.arange(5.0), thawed, so.L1(0.1), 1).value, fit.value)


def test_a_renumbered_graph_is_the_same_problem(rng):
    numbers = rng.permutation(60)
    edges = numbers[np.stack([np.arange(59), np.arange(1, 60)], axis=1)]
    names = [f"node {i}" for i in range(60)]
    graph = so.Graph.from_edges(edges, 60, rng.uniform(0.5, 2.0, 59), nodes=names)
    local, order = graph.renumber()
    assert np.ptp(local.edges, axis=1).max() == 1  # a chain again
    assert local.nodes == tuple(names[i] for i in order)
    np.testing.assert_allclose(local.matrix(2).toarray(), graph.matrix(2).toarray()[np.ix_(order, order)], rtol=1e-12)
    same, order = UNEVEN.renumber()
    assert same is UNEVEN
    assert order.tolist() == list(range(30))


def genlasso_matrix(times, n, order):
    """`D^(order)` as R's genlasso builds it: `D <- D0 %*% (wts * D)` with `wts = i / diff(pos, lag = i)`."""
    at = np.arange(n, dtype=float) if times is None else times
    found = np.diff(np.eye(n), axis=0)
    for i in range(1, order):
        found = np.diff((i / (at[i:] - at[:-i]))[:, None] * found, axis=0)
    return found


def kronecker_matrix(order):
    """`D^(order)` of all lines: `D ⊗ I` over `I ⊗ D`, each over its power of the spacing."""
    (n, m), (h, g) = GRID.shape, GRID.spacing
    down = np.kron(genlasso_matrix(None, n, order), np.eye(m)) / h**order
    across = np.kron(np.eye(n), genlasso_matrix(None, m, order)) / g**order
    return np.concatenate([down, across])


@pytest.mark.parametrize("graph", [EVEN, UNEVEN, GRID], ids=repr)
def test_free_differences_are_those_of_genlasso_or_of_its_lines(graph):
    for order in range(1, 6):
        wanted = genlasso_matrix(graph.times, 30, order) if graph is not GRID else kronecker_matrix(order)
        np.testing.assert_allclose(graph.matrix(order).toarray(), (-1) ** order * wanted, rtol=1e-12, atol=1e-13)


def test_without_enough_nodes_along_an_axis_there_are_no_rows():
    for graph, order, shape in (
        (so.Graph.chain(1), 2, (0, 1)),
        (so.Graph.chain(3), 3, (0, 3)),
        (so.Graph.grid((4, 4), ends="free"), 4, (0, 16)),
        (so.Graph.grid((4, 5), ends="free"), 4, (4, 20)),
    ):
        assert graph.matrix(order).shape == shape


def test_the_spacing_of_a_grid_is_the_weight_of_its_edges(rng):
    grid = so.Graph.grid((4, 5, 3), (1.0, 0.5, 2.0))
    assert sorted(set(grid.weights)) == [0.25, 1.0, 4.0]
    y, edges = rng.standard_normal(60), so.Graph.from_edges(grid.edges, weights=grid.weights)
    for order in (1, 2, 3):
        np.testing.assert_allclose(grid.matrix(order) @ y, edges.matrix(order) @ y, atol=1e-12)


def test_a_graph_shows_what_makes_it():
    for graph, shown in (
        (so.Graph.chain(4, times=[0, 1, 3, 4]), "Graph.chain(4, times)"),
        (so.Graph.chain(5), "Graph.chain(5)"),
        (so.Graph.grid((5,), ends="free"), "Graph.chain(5)"),
        (so.Graph.chain(5, ends="graph"), "Graph.chain(5, ends='graph')"),
        (so.Graph.grid((5,)), "Graph.chain(5, ends='graph')"),
        (GRID, "Graph.grid((6, 5), spacing=(1.0, 1.5), ends='free')"),
        (so.Graph.from_edges([(0, 1), (0, 2)]), "<Graph of 3 nodes and 2 edges>"),
    ):
        assert repr(graph) == shown
