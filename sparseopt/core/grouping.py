"""Floor 1: the rows of a graph difference as tables, their sums, and groups of rows that share no column.

Everything here runs on the host, once a graph: SciPy products and whole-array NumPy, no loop over nodes,
rows or edges.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np
from scipy import sparse


def grid_edges(shape: tuple[int, ...]) -> np.ndarray:
    """The edges `[m, 2]` of a grid, axis by axis, tail before head, nodes numbered in row-major order."""
    nodes = np.arange(int(np.prod(shape))).reshape(shape)
    pairs = []
    for axis in range(len(shape)):
        tails = np.delete(nodes, shape[axis] - 1, axis=axis)
        heads = np.delete(nodes, 0, axis=axis)
        pairs.append(np.stack([tails.reshape(-1), heads.reshape(-1)], axis=1))
    return np.concatenate(pairs)


def difference_matrix(
    edges: np.ndarray, num_nodes: int, weights: np.ndarray | None, order: int, from_edges: bool = False
) -> sparse.csr_array:
    """`Δ^(order)`, or `Δ^(order-1) Dᵀ` for `from_edges`, as a SciPy CSR array in float64."""
    count = edges.shape[0]
    root = np.ones(count) if weights is None else np.sqrt(weights)
    rows = np.concatenate([np.arange(count)] * 2)
    incidence = sparse.csr_array((np.concatenate([root, -root]), (rows, edges.T.reshape(-1))), shape=(count, num_nodes))
    matrix = incidence.T.tocsr() if from_edges else sparse.csr_array(sparse.eye_array(num_nodes))
    for index in range(order - from_edges):
        matrix = (incidence if index % 2 == 0 else incidence.T) @ matrix
    matrix = sparse.csr_array(matrix)
    matrix.eliminate_zeros()
    matrix.sort_indices()
    return matrix


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over the rows and the columns of a matrix Ψ.

    Attributes:
        row_absolute: `sum_j |Ψ_rj|`.
        row_squares: `sum_j Ψ_rj²`.
        column_absolute: `sum_r |Ψ_rj|`.
        column_squares: `sum_r Ψ_rj²`.
        column_counts: the number of rows that touch a column.
    """

    row_absolute: np.ndarray
    row_squares: np.ndarray
    column_absolute: np.ndarray
    column_squares: np.ndarray
    column_counts: np.ndarray


def matrix_sums(matrix: sparse.csr_array) -> Sums:
    """The sums of a sparse matrix."""
    size = abs(matrix)
    squares = size.multiply(size)
    touched = sparse.csr_array((np.ones_like(matrix.data), matrix.indices, matrix.indptr), shape=matrix.shape)
    along = [(size, 1), (squares, 1), (size, 0), (squares, 0), (touched, 0)]
    return Sums(*(np.asarray(m.sum(axis=axis)).reshape(-1) for m, axis in along))


def edge_grid(values: np.ndarray, shape: tuple[int, ...], fill: float) -> np.ndarray:
    """Edge values in the order of `grid_edges` as `[dimensions, *shape]`, `fill` where an axis has no edge."""
    full = np.full((len(shape), *shape), fill)
    start = 0
    for axis in range(len(shape)):
        sizes = [n - (i == axis) for i, n in enumerate(shape)]
        count = int(np.prod(sizes))
        place = tuple(slice(0, n) for n in sizes)
        full[(axis, *place)] = values[start : start + count].reshape(sizes)
        start += count
    return full


def grid_sums(shape: tuple[int, ...], order: int, from_edges: bool = False) -> Sums:
    """The sums for a grid's Ψ in the layout of `GridBase`, rows without an edge counted with sums of 1.

    They depend only on the distance to the borders, so they are found on a grid of at most `2 order + 3` nodes
    a side and its middle is repeated.
    """
    small = tuple(min(n, 2 * order + 3) for n in shape)
    sums = matrix_sums(difference_matrix(grid_edges(small), int(np.prod(small)), None, order, from_edges))
    on_edges = (order - from_edges) % 2 == 1
    half = order + 1

    def grow(values: np.ndarray, edges: bool) -> np.ndarray:
        table = edge_grid(values, small, 1.0) if edges else values.reshape(small)
        for axis, (n, few) in enumerate(zip(shape, small, strict=True)):
            take = np.arange(n)
            if n > few:
                take = np.where(take <= half, take, np.where(take >= n - half - 1, take - n + few, half))
            table = np.take(table, take, axis=axis + edges)
        return table

    return Sums(
        grow(sums.row_absolute, on_edges),
        grow(sums.row_squares, on_edges),
        grow(sums.column_absolute, from_edges),
        grow(sums.column_squares, from_edges),
        grow(sums.column_counts, from_edges),
    )
