"""Groups of rows without a shared column: disjoint and complete, whenever they are made."""

import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.operators.row_tables import check_groups, colour_rows, difference_matrix, grid_groups
from tests.trend.problems import random_graph

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
