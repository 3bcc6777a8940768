import dataclasses

import numpy as np
import pytest
from scipy import sparse

import sparseopt as so
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
from tests.trend.problems import GRAPHS, random_graph

SHAPES = [(2,), (9,), (16, 9), (1, 7), (5, 12), (4, 5, 6), (9, 8, 7)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("block", "from_edges"), [(1, False), (2, False), (3, False), (1, True)])
def test_closed_forms_are_disjoint_and_complete(shape, block, from_edges):
    labels = grid_groups(shape, block, from_edges)
    count = check_groups(so.Graph.grid(shape).matrix(block, from_edges), labels)
    expected = {(1, False): (2, 4, 6), (2, False): (3, 5, 7), (3, False): (4, 16, 36), (1, True): (2, 2, 2)}
    assert count <= expected[block, from_edges][len(shape) - 1]


def test_the_numbers_of_groups_are_those_of_the_paper():
    graph = so.Graph.grid((20, 30))
    assert [int(graph.groups(block).max()) + 1 for block in (1, 2, 3)] == [4, 5, 16]


@pytest.mark.parametrize("name", ["random", "weighted", "parts"])
@pytest.mark.parametrize("order", [1, 2])
def test_sums_from_the_degrees_are_those_of_the_matrix(rng, name, order):
    graph = GRAPHS[name](rng)
    quick = edge_sums(graph.edges, graph.num_nodes, graph.weights, order)
    whole = matrix_sums(graph.matrix(order))
    for field in dataclasses.fields(quick):
        np.testing.assert_allclose(getattr(quick, field.name), getattr(whole, field.name), rtol=1e-12)


@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_colouring_is_disjoint_and_complete(rng, block):
    graph = random_graph(rng, n=60, extra=60)
    matrix = graph.matrix(block)
    labels = colour_rows(matrix)
    count = check_groups(matrix, labels)
    conflicts = (abs(matrix) @ abs(matrix).T).tocsr()
    assert count <= int(np.diff(conflicts.indptr).max())  # greedy needs no more than the largest degree plus one


def test_a_hub_is_coloured_without_its_quadratic_conflict_graph():
    spokes = 3000
    matrix = difference_matrix(np.stack([np.zeros(spokes, int), np.arange(1, spokes + 1)], 1), spokes + 1, None, 1)
    assert check_groups(matrix, colour_rows(matrix)) == spokes


def test_many_edges_are_coloured_in_seconds(rng):
    shape = (400, 400)
    matrix = difference_matrix(grid_edges(shape), 160_000, None, 1)
    shuffled = matrix[rng.permutation(matrix.shape[0])]
    assert check_groups(shuffled, colour_rows(shuffled)) <= 8


def test_a_grid_listed_in_another_order_is_grouped_too(rng):
    grid = so.Graph.grid((6, 7))
    listed = so.Graph.from_edges(grid.edges[rng.permutation(grid.num_edges)], 42)
    assert listed.shape == (6, 7)
    assert check_groups(listed.matrix(1), listed.groups(1)) >= 4


def test_the_check_names_what_is_wrong():
    matrix = sparse.csr_array(np.array([[1.0, -1, 0], [0, 1, -1]]))
    with pytest.raises(ValueError, match="group 0 has 2 rows that share column 1"):
        check_groups(matrix, np.array([0, 0]))
    with pytest.raises(ValueError, match="one number >= 0 for each of 2 rows"):
        check_groups(matrix, np.array([0, -1]))
    assert check_groups(matrix, np.array([0, 1])) == 2


@pytest.mark.parametrize("shape", [(3,), (40,), (23, 30), (30, 2), (13, 14, 15)])
@pytest.mark.parametrize(
    ("order", "from_edges"), [(1, False), (2, False), (3, False), (4, False), (1, True), (2, True)]
)
def test_grid_sums_are_those_of_the_whole_matrix(shape, order, from_edges):
    whole = matrix_sums(difference_matrix(grid_edges(shape), int(np.prod(shape)), None, order, from_edges))
    quick = grid_sums(shape, order, from_edges)
    on_edges = (order - from_edges) % 2 == 1
    for name in ("row_absolute", "row_squares", "column_absolute", "column_squares"):
        values = getattr(whole, name)
        edges = on_edges if name.startswith("row") else from_edges
        expected = edge_grid(values, shape, 1.0) if edges else values.reshape(shape)
        np.testing.assert_allclose(getattr(quick, name), expected, err_msg=name)
