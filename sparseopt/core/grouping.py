"""Floor 1: the rows of a graph difference as tables, their sums, and groups of rows that share no column.

All but `RowTable` runs on the host, once a graph: SciPy products and whole-array NumPy, no loop over nodes,
rows or edges.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import sparse

from sparseopt.core.operators import spread
from sparseopt.core.types import pytree, static


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
    if from_edges:
        matrix, left = incidence.T.tocsr(), order - 1
    else:
        matrix, left = (incidence, order - 1) if order else (sparse.csr_array(sparse.eye_array(num_nodes)), 0)
    on_edges = not from_edges
    for _ in range(left):
        matrix = sparse.csr_array((incidence.T if on_edges else incidence) @ matrix)
        on_edges = not on_edges
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


def edge_sums(edges: np.ndarray, num_nodes: int, weights: np.ndarray | None, order: int) -> Sums:
    """The sums of D (order 1) or L (order 2) of a graph without loops and repeated edges, from its degrees alone."""
    level = np.ones(edges.shape[0]) if weights is None else weights

    def at_nodes(values: np.ndarray) -> np.ndarray:
        return np.bincount(edges.reshape(-1), np.repeat(values, 2), num_nodes)

    degrees, edges_of = at_nodes(level), np.bincount(edges.reshape(-1), minlength=num_nodes).astype(float)
    if order == 1:
        root = np.sqrt(level)
        return Sums(2 * root, 2 * level, at_nodes(root), degrees, edges_of)
    squares = degrees**2 + at_nodes(level**2)
    return Sums(2 * degrees, squares, 2 * degrees, squares, edges_of + (edges_of > 0))


def edge_grid(values: np.ndarray, shape: tuple[int, ...], fill: float) -> np.ndarray:
    """Edge values in the order of `grid_edges` as `[dimensions, *shape]`, `fill` where an axis has no edge."""
    full = np.full((len(shape), *shape), fill)
    start = 0
    for axis in range(len(shape)):
        sizes = [n - (i == axis) for i, n in enumerate(shape)]
        count = int(np.prod(sizes))
        place: tuple[Any, ...] = (axis, *(slice(0, n) for n in sizes))
        full[place] = values[start : start + count].reshape(sizes)
        start += count
    return full


def grid_sums_side(order: int) -> int:
    """The longest side of the grid on which `grid_sums` forms Ψ as a matrix."""
    return 2 * order + 3


def grid_sums(shape: tuple[int, ...], order: int, from_edges: bool = False) -> Sums:
    """The sums for a grid's Ψ in the layout of `GridBase`, rows without an edge counted with sums of 1.

    They depend only on the distance to the borders, so they are found on a grid of at most `grid_sums_side`
    nodes a side and its middle is repeated.
    """
    small = tuple(min(n, grid_sums_side(order)) for n in shape)
    sums = matrix_sums(difference_matrix(grid_edges(small), int(np.prod(small)), None, order, from_edges))
    on_edges = (order - from_edges) % 2 == 1
    half = order + 1

    def grow(values: np.ndarray, edges: bool) -> np.ndarray:
        table = edge_grid(values, small, 1.0) if edges else values.reshape(small)
        table = table.astype(np.float32)  # small integers: exact
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


def _positions(shape: tuple[int, ...], axis: int | None) -> np.ndarray:
    """Coordinates `[dimensions, rows]` of the nodes, or of the tails of the edges along an axis."""
    sizes = [n - (i == axis) for i, n in enumerate(shape)]
    return np.indices(sizes).reshape(len(shape), -1)


def grid_groups(shape: tuple[int, ...], block: int, from_edges: bool = False) -> np.ndarray | None:
    """The group of every row of a grid's Ψ in closed form, or None where there is no formula.

    | Ψ | support of a row | groups in 1, 2, 3 dimensions |
    |---|---|---|
    | D | an edge | by axis and parity: 2, 4, 6 |
    | L | a star | `(i + 2j + 3l) mod (2 dimensions + 1)`: 3, 5, 7 |
    | D L | two joined stars | by axis, `(i + 3j + 5l) mod 4 dimensions` with i along the axis: 4, 16, 36 |
    | Dᵀ | the edges of a node | parity: 2 |

    The support's places have different residues, so two rows of one residue cannot meet, at borders neither.
    Source of the 2-D groups: Bu, Wu, Zuo, section 3.
    """
    dimensions = len(shape)
    if block == 1 and from_edges:
        return (_positions(shape, None).sum(axis=0) % 2).astype(np.int32)
    if from_edges or block > 3:
        return None
    if block == 2:
        factors = np.arange(1, dimensions + 1)
        return (factors @ _positions(shape, None) % (2 * dimensions + 1)).astype(np.int32)
    modulus = 2 if block == 1 else 4 * dimensions
    labels = []
    for axis in range(dimensions):
        factors = np.zeros(dimensions, int)
        if block == 3:
            factors[[i for i in range(dimensions) if i != axis]] = [3, 5][: dimensions - 1]
        factors[axis] = 1
        labels.append(axis * modulus + factors @ _positions(shape, axis) % modulus)
    return np.concatenate(labels).astype(np.int32)


def colour_rows(matrix: sparse.csr_array, seed: int = 0) -> np.ndarray:
    """Groups for any sparse matrix: rows of one group share no column, found greedily, `[rows]`.

    Group by group a maximal set of disjoint rows is taken: in each round every column nominates its
    longest remaining row (ties at random), rows nominated by all their columns are in, rows that meet them wait
    for the next group. The conflict graph, which a hub makes quadratic, is never formed. Cost: about
    `groups * log(rows)` passes over the entries that remain.

    Source: Luby, "A simple parallel algorithm for the maximal independent set problem", 1986; Jones and
    Plassmann, "A parallel graph coloring heuristic", 1993.
    """
    rows, columns = matrix.shape
    lengths = np.diff(matrix.indptr)
    rank = np.empty(rows, np.int64)
    rank[np.lexsort((np.random.default_rng(seed).permutation(rows), lengths))] = np.arange(1, rows + 1)
    labels = np.where(lengths == 0, 0, -1).astype(np.int32)
    owner = np.repeat(np.arange(rows), lengths)
    column = matrix.indices.astype(np.int64)
    group = 0
    while owner.size:
        live_owner, live_column = owner, column
        while live_owner.size:
            strongest = np.zeros(columns, np.int64)
            np.maximum.at(strongest, live_column, rank[live_owner])
            blocked = np.ones(rows, bool)
            blocked[live_owner] = False
            blocked[live_owner[strongest[live_column] != rank[live_owner]]] = True
            winner = ~blocked[live_owner]
            labels[live_owner[winner]] = group
            taken = np.zeros(columns, bool)
            taken[live_column[winner]] = True
            meets = np.zeros(rows, bool)
            meets[live_owner[taken[live_column]]] = True
            stays = ~meets[live_owner]
            live_owner, live_column = live_owner[stays], live_column[stays]
        waits = labels[owner] < 0
        owner, column = owner[waits], column[waits]
        group += 1
    return labels


def check_groups(matrix: sparse.csr_array, labels: np.ndarray) -> int:
    """The number of groups, once they are known to be complete and disjoint.

    Raises:
        ValueError: if the labels are not one number `0, 1, ...` a row, or two rows of a group share a column.
    """
    if labels.shape != (matrix.shape[0],) or (labels < 0).any():
        raise ValueError(f"groups are one number >= 0 for each of {matrix.shape[0]} rows, given shape {labels.shape}")
    owner = np.repeat(labels.astype(np.int64), np.diff(matrix.indptr))
    keys, counts = np.unique(owner * matrix.shape[1] + matrix.indices, return_counts=True)
    if (counts > 1).any():
        group, column = divmod(int(keys[np.argmax(counts > 1)]), matrix.shape[1])
        raise ValueError(f"group {group} has {int(np.max(counts))} rows that share column {column}")
    return int(labels.max(initial=-1)) + 1


def bucket_widths(lengths: np.ndarray) -> np.ndarray:
    """The smallest width 1, 2, 3, 4, 6, 8, 12, 16, ... that holds each length.

    Example:
        >>> from sparseopt.core.grouping import bucket_widths
        >>> bucket_widths(np.array([1, 2, 5, 9]))
        array([ 1,  2,  6, 12])
    """
    largest = max(int(lengths.max(initial=1)), 1)
    powers = 2 ** np.arange(int(np.ceil(np.log2(largest))) + 1)
    allowed = np.unique(np.concatenate([powers, 3 * powers[:-1]]) if powers.size > 1 else powers)
    return allowed[np.searchsorted(allowed, np.maximum(lengths, 1))]


@pytree
class RowTable:
    """The rows of one group as a `LinearMap`: padded tables, each column in one row at most.

    A padded entry points past the last column, where it reads 0 and writes nothing.
    """

    columns: tuple[Any, ...]  # int32 [rows, width], one table a width
    coefficients: tuple[Any, ...]  # [rows, width]
    num_columns: int = static()

    def mv(self, x: Any) -> Any:
        """`Ψ_i x`, the rows table by table."""
        parts = []
        for place, factor in zip(self.columns, self.coefficients, strict=True):
            found = x.at[place].get(mode="fill", fill_value=0)
            parts.append(jnp.sum(spread(factor, found) * found, axis=1))
        return jnp.concatenate(parts)

    def rmv(self, e: Any) -> Any:
        """`Ψ_iᵀ e`: every column is written once."""
        image = jnp.zeros((self.num_columns, *e.shape[1:]), e.dtype)
        start = 0
        for place, factor in zip(self.columns, self.coefficients, strict=True):
            rows = e[start : start + place.shape[0]][:, None]
            image = image.at[place].set(spread(factor, rows) * rows, mode="drop")
            start += place.shape[0]
        return image

    def row_squares(self) -> Any:
        """The squared norm of every row."""
        return jnp.concatenate([jnp.sum(factor * factor, axis=1) for factor in self.coefficients])


def group_table(matrix: sparse.csr_array, labels: np.ndarray, group: int, dtype: Any) -> tuple[RowTable, np.ndarray]:
    """The table of one group, and the numbers of its rows in the table's order."""
    rows = np.flatnonzero(labels == group)
    part = matrix[rows]
    lengths = np.diff(part.indptr)
    widths = bucket_widths(lengths)
    columns, coefficients, order = [], [], []
    for width in np.unique(widths):
        chosen = np.flatnonzero(widths == width)
        valid = np.arange(width) < lengths[chosen][:, None]
        place = np.where(valid, part.indptr[chosen][:, None] + np.arange(width), 0)
        columns.append(np.where(valid, part.indices[place], matrix.shape[1]).astype(np.int32))
        coefficients.append(np.where(valid, part.data[place], 0).astype(dtype))
        order.append(rows[chosen])
    return RowTable(tuple(columns), tuple(coefficients), matrix.shape[1]), np.concatenate(order)
