"""The rows of a graph difference as tables, their sums, and groups of rows that share no column.

Everything but `RowTable` runs on the host, once per graph, without loops over nodes, rows or edges.
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import sparse

from sparseopt.core.base.arguments import require_memory
from sparseopt.core.base.types import pytree, static
from sparseopt.core.operators.differences import spread

# Bytes for each entry of a sparse matrix, its square and its size, with indices.
ENTRY_BYTES = 36
SAMPLED_NODES = 64


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


def require_matrix_memory(edges: np.ndarray, num_nodes: int, order: int) -> None:
    """Raise a ValueError if memory is too small for the sparse `Δ^(order)`, whose rows reach `order // 2` edges far.

    The entries of a row are counted for a sample of the nodes.
    """
    if order <= 2:
        return  # not much larger than the edges
    ends = np.concatenate([edges, edges[:, ::-1], np.repeat(np.arange(num_nodes)[:, None], 2, axis=1)])
    ones = np.ones(len(ends), np.float32)
    near = sparse.csr_array((ones, ends.T), shape=(num_nodes, num_nodes))
    start = np.unique(np.linspace(0, num_nodes - 1, SAMPLED_NODES).astype(np.int64))
    reached = near[start]
    rows = len(edges) if order % 2 else num_nodes
    for _ in range(order // 2 - 1):
        reached = reached @ near
        reached.data[:] = 1
        # It only grows, so the first excess decides.
        each = reached.nnz // len(start)
        what = f"a difference matrix of order {order} with {rows:,} rows of {each:,} entries and more"
        require_memory(ENTRY_BYTES * rows * each, what, "take a lower order, or a graph of fewer edges")


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over the rows and the columns of a matrix Ψ."""

    row_absolute: np.ndarray  # `sum_j |Ψ_rj|`
    row_squares: np.ndarray  # `sum_j Ψ_rj²`
    column_absolute: np.ndarray  # `sum_r |Ψ_rj|`
    column_squares: np.ndarray  # `sum_r Ψ_rj²`


def matrix_sums(matrix: sparse.csr_array) -> Sums:
    """The sums of a sparse matrix."""
    size = abs(matrix)
    squares = size.multiply(size)
    along = [(size, 1), (squares, 1), (size, 0), (squares, 0)]
    return Sums(*(np.asarray(m.sum(axis=axis)).reshape(-1) for m, axis in along))


def edge_sums(edges: np.ndarray, num_nodes: int, weights: np.ndarray | None, order: int) -> Sums:
    """The sums of D (order 1) or L (order 2) of a graph without loops and repeated edges, from its degrees alone."""
    level = np.ones(edges.shape[0]) if weights is None else weights

    def at_nodes(values: np.ndarray) -> np.ndarray:
        return np.bincount(edges.reshape(-1), np.repeat(values, 2), num_nodes)

    degrees = at_nodes(level)
    if order == 1:
        root = np.sqrt(level)
        return Sums(2 * root, 2 * level, at_nodes(root), degrees)
    squares = degrees**2 + at_nodes(level**2)
    return Sums(2 * degrees, squares, 2 * degrees, squares)


def edge_grid(values: Any, shape: tuple[int, ...], fill: float) -> Any:
    """Edge values `[m, ...]` in the order of `grid_edges` as `[dimensions, *shape, ...]`, `fill` where no edge is."""
    xp = np if isinstance(values, np.ndarray) else jnp
    parts, start = [], 0
    for axis in range(len(shape)):
        sizes = [n - (i == axis) for i, n in enumerate(shape)]
        stop = start + math.prod(sizes)
        part = values[start:stop].reshape(*sizes, *values.shape[1:])
        widths = [(0, int(i == axis)) for i in range(part.ndim)]
        parts.append(xp.pad(part, widths, constant_values=fill))
        start = stop
    return xp.stack(parts)


def edge_rows(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `edge_grid`: values `[dimensions, *shape, ...]` as `[m, ...]`, in the order of `grid_edges`."""
    parts = []
    for axis in range(len(shape)):
        along = values[axis][*(slice(None),) * axis, : shape[axis] - 1]
        parts.append(along.reshape(-1, *values.shape[len(shape) + 1 :]))
    return np.concatenate(parts)


def grid_sums_side(order: int) -> int:
    """The longest side of the grid on which `grid_sums` forms Ψ as a matrix."""
    return 2 * order + 3


def grid_weights(shape: tuple[int, ...], spacing: tuple[float, ...]) -> np.ndarray:
    """The weights `[m]` of the edges of a grid whose axes have a spacing: `1 / h²`."""
    counts = [math.prod(shape) // n * (n - 1) for n in shape]
    return np.repeat(np.asarray(spacing, np.float64) ** -2, counts)


def grid_sums(
    shape: tuple[int, ...], order: int, from_edges: bool = False, spacing: tuple[float, ...] | None = None
) -> Sums:
    """The sums for a grid's Ψ in the layout of `GridBase`, rows without an edge counted with sums of 1.

    They depend only on the distance to the borders, so they are computed on a grid of at most `grid_sums_side` nodes a
    side, whose middle is repeated.
    """
    small = tuple(min(n, grid_sums_side(order)) for n in shape)
    sums = _small_grid_sums(small, order, from_edges, spacing)
    on_edges = (order - from_edges) % 2 == 1
    half = order + 1

    def grow(values: np.ndarray, edges: bool) -> np.ndarray:
        table = edge_grid(values, small, 1.0) if edges else values.reshape(small)
        table = table.astype(np.float32 if spacing is None else np.float64)  # exact, or far from the limits of float32
        for axis, (n, few) in enumerate(zip(shape, small, strict=True)):
            take = np.arange(n)
            if n > few:
                take = np.where(take <= half, take, np.where(take >= n - half - 1, take - n + few, half))
            table = np.take(table, take, axis=axis + edges)
        return table

    rows, columns = (sums.row_absolute, sums.row_squares), (sums.column_absolute, sums.column_squares)
    return Sums(*(grow(values, on_edges) for values in rows), *(grow(values, from_edges) for values in columns))


@functools.lru_cache(maxsize=64)
def _small_grid_sums(shape: tuple[int, ...], order: int, from_edges: bool, spacing: tuple[float, ...] | None) -> Sums:
    """The sums of the matrix itself; kept, since most of the set-up for a short chain would be theirs."""
    weights = None if spacing is None else grid_weights(shape, spacing)
    return matrix_sums(difference_matrix(grid_edges(shape), math.prod(shape), weights, order, from_edges))


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

    The places of a support have different residues, so two rows of one residue cannot meet.
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


def colour_rows(matrix: sparse.csr_array) -> np.ndarray:
    """Groups for any sparse matrix: rows of one group share no column, found greedily, `[rows]`.

    Each group is a maximal set of disjoint rows: in each round every column nominates its longest remaining row (ties
    at random), rows nominated by all their columns join the group, and rows that meet them wait for the next group. The
    conflict graph, which a hub makes quadratic, is never formed. Cost: about `groups * log(rows)` passes over the
    remaining entries.

    Source: Luby, "A simple parallel algorithm for the maximal independent set problem", 1986; Jones and
    Plassmann, "A parallel graph coloring heuristic", 1993.
    """
    rows, columns = matrix.shape
    lengths = np.diff(matrix.indptr)
    rank = np.empty(rows, np.int64)
    rank[np.lexsort((np.random.default_rng(0).permutation(rows), lengths))] = np.arange(1, rows + 1)
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
    """The number of groups; a ValueError if a row has no label `0, 1, ...` or two rows of a group share a column."""
    if labels.shape != (matrix.shape[0],) or (labels < 0).any():
        raise ValueError(f"groups are one number >= 0 for each of {matrix.shape[0]} rows, given shape {labels.shape}")
    owner = np.repeat(labels.astype(np.int64), np.diff(matrix.indptr))
    keys, counts = np.unique(owner * matrix.shape[1] + matrix.indices, return_counts=True)
    if (counts > 1).any():
        group, column = divmod(int(keys[np.argmax(counts > 1)]), matrix.shape[1])
        raise ValueError(f"group {group} has {int(np.max(counts))} rows that share column {column}")
    return int(labels.max(initial=-1)) + 1


def places_within(owner: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """The place of every item among those of its owner, in the given order, and the largest number that one owns."""
    counts = np.bincount(owner, minlength=count)
    order = np.argsort(owner, kind="stable")
    place = np.empty(owner.size, np.int64)
    place[order] = np.arange(owner.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return place, int(np.max(counts, initial=0))


def table_shape(matrix: sparse.csr_array, labels: np.ndarray) -> tuple[int, int, int]:
    """Groups, rows of the largest group, entries of the longest row: the shape of the arrays of a `RowTable`."""
    sizes, lengths = np.bincount(labels), np.diff(matrix.indptr)
    return sizes.size, int(sizes.max(initial=0)), max(int(lengths.max(initial=1)), 1)


def edge_places(shape: tuple[int, ...]) -> np.ndarray:
    """The places `[m]` of the edges of `grid_edges` in the flattened edge array of `GridBase`."""
    count = sum(int(np.prod(shape)) // n * (n - 1) for n in shape)
    return np.flatnonzero(edge_grid(np.ones(count), shape, 0.0))


@pytree
class RowTable:
    """The rows of all groups as padded tables; one group, a slice along the first axis, is a `LinearMap`.

    Under `jax.vmap` over the table each call sees one group, in which each column is in at most one row. A padded entry
    points past the last column, where it reads 0 and writes nothing; a padded row has only padded entries. Every group
    is padded to the size of the largest: on a graph with hubs most of the table is padding (see `table_shape`).

    Example:
        >>> from sparseopt.core.operators.row_tables import row_table
        >>> chain = so.Graph.chain(4)
        >>> table = row_table(chain.matrix(1), chain.groups(1), jnp.float32)
        >>> table.row_numbers.tolist()  # the edges 0-1 and 2-3; the edge 1-2 and a padded row
        [[0, 2], [1, 3]]
        >>> jax.vmap(lambda group: group.mv(jnp.array([0.0, 1.0, 5.0, 9.0])))(table)
        Array([[-1., -4.],
               [-4.,  0.]], dtype=float32)
    """

    columns: Any  # int32 `[groups, rows, width]`, places in the array that Ψ acts on, flattened
    coefficients: Any  # `[groups, rows, width]`, 0 where padded
    row_numbers: Any  # int32 `[groups, rows]`, places in the array that Ψ gives, flattened; past the last where padded
    num_rows: int = static()  # places in that array
    num_columns: int = static()  # places in the array that Ψ acts on

    def mv(self, x: Any) -> Any:
        """`Ψ_i x` of one group, `[rows]` or `[rows, channels]`."""
        found = jnp.asarray(x).at[self.columns].get(mode="fill", fill_value=0)
        return jnp.sum(spread(self.coefficients, found) * found, axis=1)

    def rmv(self, e: Any) -> Any:
        """`Ψ_iᵀ e` of one group: every column is written once."""
        image = jnp.zeros((self.num_columns, *e.shape[1:]), e.dtype)
        rows = e[:, None]
        return image.at[self.columns].set(spread(self.coefficients, rows) * rows, mode="drop")

    def row_squares(self) -> Any:
        """The squared norm of every row; 1 for a row without entries, which is then harmless."""
        squares = jnp.sum(self.coefficients * self.coefficients, axis=-1)
        return jnp.where(squares > 0, squares, 1)

    def gathered(self, values: Any) -> Any:
        """Values `[num_rows, ...]` as `[groups, rows, ...]`; a padded row gets those of the last row."""
        return values.at[self.row_numbers].get(mode="clip")

    def scattered(self, values: Any) -> Any:
        """Values `[groups, rows, ...]` as `[num_rows, ...]`; 0 where there is no row."""
        image = jnp.zeros((self.num_rows, *values.shape[2:]), values.dtype)
        return image.at[self.row_numbers].set(values, mode="drop")


def row_table(
    matrix: sparse.csr_array,
    labels: np.ndarray,
    dtype: Any,
    *,
    rows: tuple[np.ndarray, int] | None = None,
    columns: tuple[np.ndarray, int] | None = None,
) -> RowTable:
    """The table of a matrix Ψ whose rows have the group labels `[rows]`, checked by `check_groups`.

    `rows` has the place of every row in the flattened array that Ψ returns, and its size; None is for their own order.
    `columns` is the same for the array that Ψ acts on.
    """
    places, num_rows = (np.arange(matrix.shape[0]), matrix.shape[0]) if rows is None else rows
    columns_at, num_columns = (np.arange(matrix.shape[1]), matrix.shape[1]) if columns is None else columns
    groups, most, width = table_shape(matrix, labels)
    within, _ = places_within(labels, groups)
    owner = np.repeat(np.arange(labels.size), np.diff(matrix.indptr))
    at = labels[owner], within[owner], np.arange(owner.size) - matrix.indptr[owner]

    def filled(shape: tuple[int, ...], nothing: Any, kind: Any, where: Any, values: np.ndarray) -> np.ndarray:
        table = np.full(shape, nothing, kind)
        table[where] = values
        return table

    return RowTable(
        filled((groups, most, width), num_columns, np.int32, at, columns_at[matrix.indices]),
        filled((groups, most, width), 0, dtype, at, matrix.data),
        filled((groups, most), num_rows, np.int32, (labels, within), places),
        num_rows,
        num_columns,
    )
