"""Differences on graphs against their matrices: products, sums, groups of rows, and the pieces that edges join."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse
from scipy.sparse.csgraph import connected_components

import sparseopt as so
from sparseopt.core.base.sums import total
from sparseopt.core.base.types import precision
from sparseopt.core.operators.component_means import piece_labels, piece_means
from sparseopt.core.operators.differences import Difference, GridBase, edge_base
from sparseopt.core.operators.maps import Identity, Stack
from sparseopt.core.operators.row_tables import (
    check_groups,
    colour_rows,
    difference_matrix,
    edge_grid,
    edge_sums,
    grid_edges,
    grid_groups,
    grid_sums,
    matrix_sums,
)
from tests.jitted import Jitted
from tests.tiers import often
from tests.trend.problems import GRAPHS, random_graph

ORDERS = [(order, from_edges) for order in range(1, 5) for from_edges in (False, True)]


def in_rows(graph, values, on_edges):
    """Rows in the matrix's order as an array of the operator's layout."""
    if graph.shape is None:
        return values
    return edge_grid(values, graph.shape, 0.0) if on_edges else values.reshape(graph.shape)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize(("order", "from_edges"), often(ORDERS, (1, False), (2, True), (3, True)))
def test_products_are_those_of_the_matrix_channel_by_channel(rng, name, order, from_edges):
    with precision(np.dtype(np.float64)):
        graph = GRAPHS[name](rng)
        operator = Jitted(Difference(graph.geometry.base(np.float64), order, from_edges))
        matrix = graph.matrix(order, from_edges)
        ends_on_edges = (order - from_edges) % 2 == 1
        xs, es = (rng.standard_normal((3, size)) for size in matrix.shape[::-1])
        given = [np.asarray(in_rows(graph, x, from_edges)) for x in xs]
        image = operator.mv(given[0])
        np.testing.assert_allclose(image, in_rows(graph, matrix @ xs[0], ends_on_edges), atol=1e-12)
        pulled = [np.asarray(in_rows(graph, e, ends_on_edges)) for e in es]
        back = operator.rmv(pulled[0])
        np.testing.assert_allclose(back, in_rows(graph, matrix.T @ es[0], from_edges), atol=1e-12)
        assert (image.shape, back.shape) == (operator.out_shape, operator.in_shape)
        for product, one, parts in ((operator.mv, image, given), (operator.rmv, back, pulled)):
            several = product(np.stack(parts, axis=-1))
            assert several.shape == (*one.shape, 3)
            np.testing.assert_allclose(several[..., 0], one, atol=1e-12)
            np.testing.assert_allclose(several[..., 2], product(parts[2]), atol=1e-12)


@pytest.mark.parametrize("name", ["grid", "random"])
def test_a_stack_has_the_rows_of_its_parts_and_their_transpose(rng, name):
    base = GRAPHS[name](rng).geometry.base(np.float32)
    parts = (Identity(base.node_shape), Difference(base, 1), Difference(base, 2))
    stack = Jitted(Stack(parts))
    x = rng.standard_normal((*stack.in_shape, 3)).astype(np.float32)
    image = stack.mv(x)
    assert image.shape == (*stack.out_shape, 3)
    np.testing.assert_array_equal(image, np.concatenate([Jitted(part).mv(x).reshape(-1, 3) for part in parts]))
    e = rng.standard_normal(image.shape).astype(np.float32)
    assert np.vdot(image, e) == pytest.approx(np.vdot(x, stack.rmv(e)), rel=2e-4, abs=2e-3)


@pytest.mark.parametrize("name", GRAPHS)
def test_constants_vanish_exactly_in_float32(rng, name):
    for order in (1, 2, 3):
        operator = Jitted(Difference(GRAPHS[name](rng).geometry.base(np.float32), order))
        assert not np.any(operator.mv(np.full(operator.in_shape, 123.456, np.float32)))


def test_sums_keep_their_accuracy_in_float32(rng):
    x = rng.uniform(0, 1, 3_000_000).astype(np.float32)
    assert float(total(jnp.asarray(x))) == pytest.approx(x.astype(np.float64).sum(), rel=1e-6)
    n = 10_001  # a hub with ten thousand edges
    base = edge_base(np.stack([np.zeros(n - 1, int), np.arange(1, n)], axis=1), n, None, np.float32)
    at_hub = float(base.laplacian(jnp.asarray(np.arange(n), jnp.float32))[0])
    assert at_hub == pytest.approx(-n * (n - 1) / 2, rel=1e-4)


@pytest.mark.parametrize("name", ["random", "weighted", "parts"])
@pytest.mark.parametrize("order", [1, 2])
def test_sums_from_the_degrees_are_those_of_the_matrix(rng, name, order):
    graph = GRAPHS[name](rng)
    quick = edge_sums(graph.edges, graph.num_nodes, graph.weights, order)
    whole = matrix_sums(graph.matrix(order))
    for field in dataclasses.fields(quick):
        np.testing.assert_allclose(getattr(quick, field.name), getattr(whole, field.name), rtol=1e-12)


@pytest.mark.parametrize("shape", [(3,), (40,), (30, 2), (8, 9, 7)])
@pytest.mark.parametrize(("order", "from_edges"), [*ORDERS[::2], *ORDERS[1:4:2]])
def test_grid_sums_are_those_of_the_whole_matrix(shape, order, from_edges):
    whole = matrix_sums(difference_matrix(grid_edges(shape), int(np.prod(shape)), None, order, from_edges))
    quick = grid_sums(shape, order, from_edges)
    on_edges = (order - from_edges) % 2 == 1
    for name in ("row_absolute", "row_squares", "column_absolute", "column_squares"):
        values = getattr(whole, name)
        edges = on_edges if name.startswith("row") else from_edges
        expected = edge_grid(values, shape, 1.0) if edges else values.reshape(shape)
        np.testing.assert_allclose(getattr(quick, name), expected, err_msg=name)


NODES, EDGES = 400, 500


def least_nodes(tails, heads, joins):
    """The least node of each component, by SciPy."""
    matrix = sparse.coo_array((np.ones(joins.sum()), (tails[joins], heads[joins])), (NODES, NODES))
    count, labels = connected_components(matrix, directed=False)
    least = np.full(count, NODES)
    np.minimum.at(least, labels, np.arange(NODES))
    return least[labels]


@pytest.mark.parametrize("shuffled", [False, True])
def test_pieces_are_the_connected_components(rng, shuffled):
    """Lanes: edges of a long path and random ones, few and many of which join."""
    name = rng.permutation(NODES) if shuffled else np.arange(NODES)
    path = np.stack([name[:-1], name[1:]])
    tails, heads = np.concatenate([path, rng.integers(0, NODES, (2, EDGES - NODES + 1))], 1).astype(np.int32)
    joins = rng.random((3, EDGES)) < np.array([[0.3], [0.95], [1.0]])
    found = jax.jit(jax.vmap(lambda joins: piece_labels(tails, heads, joins, NODES)))(joins)
    np.testing.assert_array_equal(found, [least_nodes(tails, heads, lane) for lane in joins])


def test_means_are_those_of_the_pieces(rng):
    labels = rng.integers(0, 5, 30)
    sums, weights = rng.standard_normal(30).astype(np.float32), rng.uniform(0.5, 1, 30).astype(np.float32)
    weights[labels == 3] = 0
    over = np.bincount(labels, weights, 5)
    means = np.divide(np.bincount(labels, sums, 5), over, out=np.zeros(5), where=over > 0)
    np.testing.assert_allclose(jax.jit(piece_means)(sums, weights, labels), means[labels], atol=1e-5)


def test_ends_are_those_of_the_differences(rng):
    edges = edge_base(rng.permuted(np.arange(24)).reshape(12, 2), 24, np.arange(12.0), np.float32)
    for base, scale in ((GridBase((4, 6)), 1), (edges, np.sqrt(np.arange(12)))):
        x = rng.standard_normal(base.node_shape).astype(np.float32)
        tails, heads = base.ends()
        apart = scale * (x.ravel()[np.asarray(tails)] - x.ravel()[np.asarray(heads)])
        np.testing.assert_allclose(base.difference(x), apart, atol=1e-6)


EXPECTED = {(1, False): (2, 4, 6), (2, False): (3, 5, 7), (3, False): (4, 16, 36), (1, True): (2, 2, 2)}


@pytest.mark.parametrize("shape", [(2,), (9,), (16, 9), (1, 7), (5, 12), (4, 5, 6), (9, 8, 7)])
@pytest.mark.parametrize(("block", "from_edges"), EXPECTED)
def test_closed_forms_are_disjoint_and_complete_and_as_many_as_in_the_paper(shape, block, from_edges):
    count = check_groups(so.Graph.grid(shape).matrix(block, from_edges), grid_groups(shape, block, from_edges))
    most = EXPECTED[block, from_edges][len(shape) - 1]
    assert count == most if shape == (16, 9) else count <= most


@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_colouring_is_disjoint_and_complete(rng, block):
    matrix = random_graph(rng, n=60, extra=60).matrix(block)
    count = check_groups(matrix, colour_rows(matrix))
    conflicts = (abs(matrix) @ abs(matrix).T).tocsr()
    assert count <= int(np.diff(conflicts.indptr).max())  # greedy needs no more than the largest degree plus one


def test_a_hub_is_coloured_without_its_graph_of_conflicts():
    spokes = 3000
    hub = difference_matrix(np.stack([np.zeros(spokes, int), np.arange(1, spokes + 1)], 1), spokes + 1, None, 1)
    assert check_groups(hub, colour_rows(hub)) == spokes


def test_a_grid_listed_in_another_order_is_grouped_too(rng):
    grid = so.Graph.grid((6, 7))
    listed = so.Graph.from_edges(grid.edges[rng.permutation(grid.num_edges)], 42)
    assert check_groups(listed.matrix(1), listed.groups(1)) >= 4
