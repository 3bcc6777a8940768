"""Groups of rows without a shared column: disjoint and complete, whenever they are made."""

import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.operators.row_tables import check_groups, colour_rows, difference_matrix, grid_edges, grid_groups
from tests.trend.problems import random_graph

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


@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_colouring_is_disjoint_and_complete(rng, block):
    matrix = random_graph(rng, n=60, extra=60).matrix(block)
    count = check_groups(matrix, colour_rows(matrix))
    conflicts = (abs(matrix) @ abs(matrix).T).tocsr()
    assert count <= int(np.diff(conflicts.indptr).max())  # greedy needs no more than the largest degree plus one


def test_a_hub_and_many_edges_are_coloured_in_seconds(rng):
    spokes = 3000  # its graph of conflicts would be quadratic
    hub = difference_matrix(np.stack([np.zeros(spokes, int), np.arange(1, spokes + 1)], 1), spokes + 1, None, 1)
    assert check_groups(hub, colour_rows(hub)) == spokes
    matrix = difference_matrix(grid_edges((400, 400)), 160_000, None, 1)
    shuffled = matrix[rng.permutation(matrix.shape[0])]
    assert check_groups(shuffled, colour_rows(shuffled)) <= 8


def test_a_grid_listed_in_another_order_is_grouped_too(rng):
    grid = so.Graph.grid((6, 7))
    listed = so.Graph.from_edges(grid.edges[rng.permutation(grid.num_edges)], 42)
    assert listed.shape == (6, 7)
    assert check_groups(listed.matrix(1), listed.groups(1)) >= 4
