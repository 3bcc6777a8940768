"""Pieces and knots: exactly equal values, labels by an independent search, and objectives that do not rise."""

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest
from scipy import sparse

import sparseopt as so
from sparseopt.core.base.types import precision
from sparseopt.trend.base.pieces import labels_of
from sparseopt.trend.filter import check_job
from sparseopt.trend.methods.choice import choose
from sparseopt.trend.methods.piece_means import take_piece_means
from tests.trend.problems import GRAPHS, exact_fit, objective, random_graph


def searched(graph, values):
    """The label of every node: components of the edges with equal ends in all channels, by networkx."""
    values = np.asarray(values).reshape(graph.num_nodes, -1)
    equal = nx.Graph()
    equal.add_nodes_from(range(graph.num_nodes))
    equal.add_edges_from(edge for edge in graph.edges.tolist() if (values[edge[0]] == values[edge[1]]).all())
    labels = np.empty(graph.num_nodes, int)
    for number, part in enumerate(sorted(nx.connected_components(equal), key=min)):
        labels[list(part)] = number
    return labels


@pytest.mark.parametrize("name", GRAPHS)
def test_pieces_are_those_of_an_independent_solver(rng, name):
    graph = GRAPHS[name](rng)
    y = 5 * rng.standard_normal(graph.num_nodes)
    exact = exact_fit(y, graph, 1.5, 0)
    found = so.trend_filter(y, graph, so.L1(1.5))
    labels = found.pieces()
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, searched(graph, found.value))
    np.testing.assert_array_equal(labels, searched(graph, exact.round(7)))
    assert 1 < labels.max() + 1 < graph.num_nodes
    for piece in range(labels.max() + 1):
        assert len(set(np.asarray(found.value)[labels == piece].tolist())) == 1
    assert objective(found.value, y, graph, 1.5, 0) <= objective(exact, y, graph, 1.5, 0) * (1 + 1e-6)


@pytest.mark.parametrize(("penalty", "tol"), [(so.L1(20.0), 1e-2), (so.L1(20.0), 1e-6), (so.MCP(20.0), 1e-4)])
def test_equal_values_never_raise_the_objective(rng, penalty, tol):
    graph = so.Graph.grid((12, 12))
    y = np.kron(rng.uniform(0, 200, (3, 3)), np.ones((4, 4))) + 20 * rng.standard_normal((12, 12))
    weights = rng.uniform(0.5, 2, (12, 12))
    job = check_job(y, graph, penalty, 0, weights, "error", None, tol=tol)
    with precision(job.dtype):
        before = choose(job).plan(job).fit_job(job)
        after = take_piece_means(job, before)
        values = np.asarray(before.value), np.asarray(after.value)
        rows = [graph.matrix(1) @ value.reshape(-1) for value in values]
        costs = [
            0.5 * np.sum(weights * (value - y) ** 2) + float(penalty.value(jnp.asarray(row)))
            for value, row in zip(values, rows, strict=True)
        ]
    assert costs[1] <= costs[0] * (1 + 1e-15)
    assert np.count_nonzero(rows[1]) < np.count_nonzero(rows[0])
    assert float(after.objective) == pytest.approx(costs[1], rel=1e-12)
    if isinstance(penalty, so.L1):
        # The dual point is the same, and with it the lower bound.
        bounds = [float(fit.objective) / (1 + float(fit.gap)) for fit in (before, after)]
        assert bounds[0] == pytest.approx(bounds[1], rel=1e-9)


@pytest.mark.parametrize("name", ["grid", "weighted"])
def test_labels_do_not_depend_on_the_numbers_of_nodes_and_edges(rng, name):
    graph = GRAPHS[name](rng)
    n, y = graph.num_nodes, 5 * rng.standard_normal(graph.num_nodes)
    place = rng.permutation(n)  # node i becomes node place[i]
    rows = rng.permutation(graph.num_edges)
    weights = None if graph.weights is None else graph.weights[rows]
    other = so.Graph.from_edges(place[graph.edges[rows]], n, weights)
    labels = so.trend_filter(y, graph, so.L1(1.5)).pieces()
    moved = so.trend_filter(y[np.argsort(place)], other, so.L1(1.5)).pieces()[place]
    assert len(set(zip(labels, moved, strict=True))) == labels.max() + 1 == moved.max() + 1


@pytest.mark.parametrize("shape", [(40,), (7, 8), (3, 4, 5)])
def test_regions_of_a_grid_are_components_of_its_edges(rng, shape):
    graph = so.Graph.grid(shape)
    values = rng.integers(0, 2, shape)
    joined = np.zeros((len(shape), *shape), bool)
    for axis, size in enumerate(shape):
        joined[axis][(slice(None),) * axis + (slice(size - 1),)] = np.diff(values, axis=axis) == 0
    np.testing.assert_array_equal(labels_of(graph, joined), searched(graph, values))


def test_channels_agree_within_a_piece(rng):
    graph = so.Graph.grid((6, 5))
    y = 5 * rng.standard_normal((6, 5, 2))
    apart, coupled = (so.trend_filter(y, graph, penalty(2.0)) for penalty in (so.L1, so.GroupL2))
    for found in (apart, coupled):
        np.testing.assert_array_equal(found.pieces(), searched(graph, found.value))
    fits = [so.trend_filter(y[..., i], graph, so.L1(2.0)) for i in (0, 1)]
    alone = [fit.pieces() for fit in fits]
    assert apart.pieces().max() + 1 >= len(set(zip(*alone, strict=True)))
    counts = [so.trend.degrees_of_freedom(fit.nonzero, graph) for fit in fits]
    assert counts == [labels.max() + 1 for labels in alone]
    assert so.trend.degrees_of_freedom(apart.nonzero, graph) == sum(counts)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", [*GRAPHS, "turned", "free chain", "free grid"])
def test_rows_of_a_fit_are_those_of_the_graphs_matrix(rng, name, order):
    turned = rng.permutation(so.Graph.grid((4, 5)).edges)
    others = {
        "turned": lambda _: so.Graph.from_edges(np.where(rng.random((len(turned), 1)) < 0.5, turned, turned[:, ::-1])),
        "free chain": lambda _: so.Graph.chain(20, ends="free"),
        "free grid": lambda _: so.Graph.grid((4, 5), ends="free"),
    }
    graph = (GRAPHS | others)[name](rng)
    y = 5 * rng.standard_normal((graph.num_nodes, 2))
    matrix = graph.matrix(order + 1)
    found = so.trend_filter(y, graph, so.L1(1.5), order, tol=1e-10)
    rows = matrix @ np.asarray(found.value).reshape(y.shape)
    assert found.dual.shape == found.nonzero.shape == rows.shape
    np.testing.assert_allclose(matrix.T @ found.dual, y - np.asarray(found.value).reshape(y.shape), atol=1e-3)
    assert np.all(np.abs(rows[~found.nonzero]) < 1e-3)
    again = so.trend_filter(y, graph, so.L1(1.5), order, "doge", found, tol=1e-6)
    assert again.steps <= 20
    solver = so.trend_solver(graph, order, channels=2)
    planned = solver(y, so.L1(1.5), tol=1e-3)
    assert planned.dual.shape == rows.shape
    left = matrix.T @ planned.dual - (y - np.asarray(planned.value).reshape(y.shape))
    assert np.linalg.norm(left) <= 0.1 * np.linalg.norm(y)
    assert solver(y, so.L1(1.5), tol=1e-3, start=found).steps <= planned.steps


def test_the_dual_of_several_penalties_has_their_rows_one_after_another(rng):
    graph = so.Graph.grid((4, 5))
    y = 5 * rng.standard_normal(20)
    found = so.trend_filter(y, graph, {-1: so.L1(0.5), 0: so.L1(1.0), 1: so.L1(0.3)}, tol=1e-9)
    rows = sparse.vstack([sparse.eye_array(20), graph.matrix(1), graph.matrix(2)])
    np.testing.assert_allclose(rows.T @ found.dual, y - found.value, atol=1e-3)
    again = so.trend_filter(y, graph, {-1: so.L1(0.5), 0: so.L1(1.0), 1: so.L1(0.3)}, start=found, tol=1e-6)
    assert again.steps <= 20


def test_a_sparse_fit_keeps_its_zeros(rng):
    graph = random_graph(rng)
    y = rng.standard_normal(14) + np.where(np.arange(14) > 9, 4, 0)
    found = so.trend_filter(y, graph, {-1: so.L1(0.5), 0: so.L1(0.4)}, tol=1e-9)
    np.testing.assert_array_equal(found.pieces(), searched(graph, found.value))
    assert np.count_nonzero(found.value) < 14


def test_counts_have_pieces(rng):
    counts = rng.poisson(np.repeat([2.0, 12.0], 15))
    found = so.trend_filter(counts, so.Graph.chain(30), so.L1(4.0), loss="poisson", tol=1e-6)
    exact = so.trend_filter(counts, so.Graph.chain(30), so.L1(4.0), loss="poisson", tol=1e-10)
    np.testing.assert_array_equal(found.pieces(), exact.pieces())
    assert len(set(np.asarray(found.value).tolist())) == found.pieces().max() + 1 < 15


@pytest.mark.parametrize("method", ["doge", "interior"])
def test_knots_of_order_one_are_where_the_slope_changes(rng, method):
    chain = so.Graph.chain(40)
    y = np.interp(np.arange(40.0), [0, 15, 39], [0, 30, -10]) + rng.standard_normal(40)
    found = so.trend_filter(y, chain, so.L1(3.0), 1, method, tol=1e-9)
    bends = np.diff(exact_fit(y, chain, 3.0, 1), 2)
    np.testing.assert_array_equal(found.knots(), np.flatnonzero(np.abs(bends) > 1e-6) + 1)
    assert 0 < len(found.knots()) < 12
    with pytest.raises(ValueError, match=r"a fit of order 1 has no pieces of one value, .*: on a chain `knots\(\)`"):
        found.pieces()


def test_a_bend_without_noise_is_one_knot():
    bend = np.abs(np.arange(21.0) - 10)
    assert so.trend_filter(bend, so.Graph.chain(21), so.L1(1.0), order=1).knots().tolist() == [10]


def test_knots_of_order_two_begin_another_parabola(rng):
    chain, y = so.Graph.chain(30), np.cumsum(rng.standard_normal(30))
    found = so.trend_filter(y, chain, so.L1(0.5), 2, tol=1e-9)
    rows = np.diff(exact_fit(y, chain, 0.5, 2), 3)  # row j: nodes j to j + 3, the middle one between j + 1 and j + 2
    np.testing.assert_array_equal(found.knots(), np.flatnonzero(np.abs(rows) > 1e-6) + 2)


def test_breakpoints_are_knots_of_order_zero():
    y = np.repeat([1.0, 5.0, 2.0], 10)
    found = so.trend_filter(y, so.Graph.chain(30), so.L1(0.1))
    assert found.knots().tolist() == [10, 20]
    still = so.trend_filter(y, so.Graph.chain(30), so.L1(1e3))
    assert still.knots().tolist() == []
    assert still.pieces().max() == 0
    for loss in ("square", "huber"):
        alone = so.trend_filter(y, so.Graph.chain(30), so.L1(0.0), loss=loss)
        np.testing.assert_array_equal(alone.pieces(), np.repeat([0, 1, 2], 10))
    # XLA reads a difference below the smallest normal number as 0.
    tiny = so.trend_filter(np.array([1, 0, 1e-40], np.float32), so.Graph.chain(3), so.L1(0.0))
    assert tiny.pieces().tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"knots are ordered along a chain, and Graph.grid\(\(5, 6\)\) is not"):
        so.trend_filter(y, so.Graph.grid((5, 6)), so.L1(0.1)).knots()


def test_a_planned_fit_has_pieces_and_a_batch_none(rng):
    graph = so.Graph.grid((4, 5))
    y = 5 * rng.standard_normal((2, 4, 5)).astype(np.float32)
    solver = so.trend_solver(graph, order=0)
    batch = jax.jit(jax.vmap(lambda y: solver(y, so.L1(2.0))))(y)
    with pytest.raises(ValueError, match=r"given a batch of \(2,\): take one by jax.tree.map"):
        batch.pieces()
    for lane in range(2):
        one = jax.tree.map(lambda leaf, lane=lane: leaf[lane], batch)
        np.testing.assert_array_equal(one.pieces(), so.trend_filter(y[lane], graph, so.L1(2.0)).pieces())
