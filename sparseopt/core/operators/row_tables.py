"""The matrices of graph differences, sums over their rows and columns, and groups of rows that share no column.

All of it runs on the host, once per graph, without loops over nodes, rows or edges.
"""

import dataclasses
import functools
import math
from typing import Any

import numpy as np
from scipy import sparse

from sparseopt.core.base.arguments import require_memory
from sparseopt.core.base.types import namespace

# Bytes for each entry of a sparse matrix, its square and its size, with indices.
ENTRY_BYTES = 36
SAMPLED_NODES = 64


def grid_edges(shape: tuple[int, ...]) -> np.ndarray:
    """The edges `[m, 2]` of a grid, axis by axis, tail before head, nodes numbered in row-major order."""
    nodes = np.arange(math.prod(shape)).reshape(shape)
    tails = [np.delete(nodes, n - 1, axis).reshape(-1) for axis, n in enumerate(shape)]
    heads = [np.delete(nodes, 0, axis).reshape(-1) for axis in range(len(shape))]
    return np.stack([np.concatenate(tails), np.concatenate(heads)], axis=1)


def difference_matrix(
    edges: np.ndarray, num_nodes: int, weights: np.ndarray | None, order: int, from_edges: bool = False
) -> sparse.csr_array:
    """`Δ^(order)`, or `Δ^(order-1) Dᵀ` for `from_edges`, as a SciPy CSR array in float64."""
    count = edges.shape[0]
    root = np.ones(count) if weights is None else np.sqrt(weights)
    rows = np.concatenate([np.arange(count)] * 2)
    incidence = sparse.csr_array((np.concatenate([root, -root]), (rows, edges.T.reshape(-1))), shape=(count, num_nodes))
    matrix, on_edges = sparse.csr_array(sparse.eye_array(count if from_edges else num_nodes)), from_edges
    for _ in range(order):
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
        require_memory(ENTRY_BYTES * rows * each, what, "use a lower order, or a graph with fewer edges")


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over the rows and the columns of a matrix Ψ."""

    row_absolute: np.ndarray  # `sum_j |Ψ_rj|`
    row_squares: np.ndarray  # `sum_j Ψ_rj²`
    column_absolute: np.ndarray  # `sum_r |Ψ_rj|`
    column_squares: np.ndarray  # `sum_r Ψ_rj²`


def matrix_sums(matrix: sparse.csr_array, columns: tuple[int, ...] = (-1,)) -> Sums:
    """The sums of a sparse matrix, with the sums of its columns in a shape."""
    size = abs(matrix)
    both = [size, size.multiply(size)]
    return Sums(*(np.asarray(m.sum(axis=1)) for m in both), *(np.asarray(m.sum(axis=0)).reshape(columns) for m in both))


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
    """Edge values `[m, ...]` in the order of `grid_edges` as `[dimensions, *shape, ...]`, `fill` elsewhere."""
    xp = namespace(values)
    parts, found = xp.split(values, np.cumsum(_edge_counts(shape))[:-1]), []
    for axis, part in enumerate(parts):
        part = part.reshape(*(n - (i == axis) for i, n in enumerate(shape)), *values.shape[1:])
        found.append(xp.pad(part, [(0, int(i == axis)) for i in range(part.ndim)], constant_values=fill))
    return xp.stack(found)


def edge_rows(values: Any, shape: tuple[int, ...]) -> Any:
    """The inverse of `edge_grid`: values `[dimensions, *shape, ...]` as `[m, ...]`, in the order of `grid_edges`."""
    along = [values[axis][*(slice(None),) * axis, : n - 1] for axis, n in enumerate(shape)]
    xp = namespace(values)
    return xp.concatenate([part.reshape(-1, *values.shape[len(shape) + 1 :]) for part in along])


def _edge_counts(shape: tuple[int, ...]) -> list[int]:
    """The number of edges along each axis."""
    return [math.prod(shape) // n * (n - 1) for n in shape]


def grid_weights(shape: tuple[int, ...], spacing: tuple[float, ...]) -> np.ndarray:
    """The weights `[m]` of the edges of a grid whose axes have a spacing: `1 / h²`."""
    return np.repeat(np.asarray(spacing, np.float64) ** -2, _edge_counts(shape))


def grid_sums(
    shape: tuple[int, ...], order: int, from_edges: bool = False, spacing: tuple[float, ...] | None = None
) -> Sums:
    """The sums for a grid's Ψ in the layout of `GridBase`, rows without an edge counted with sums of 1.

    They depend only on the distance to the borders, so they are computed on a grid of at most `2 order + 3` nodes a
    side, whose middle is repeated. A ValueError if memory is too small for its matrix.
    """
    small = tuple(min(n, 2 * order + 3) for n in shape)
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
    """The sums of the matrix itself; cached, since they are most of the set-up for a short chain."""
    edges, nodes = grid_edges(shape), math.prod(shape)
    weights = None if spacing is None else grid_weights(shape, spacing)
    require_matrix_memory(edges, nodes, order)
    return matrix_sums(difference_matrix(edges, nodes, weights, order, from_edges))


def _positions(shape: tuple[int, ...], axis: int | None) -> np.ndarray:
    """Coordinates `[dimensions, rows]` of the nodes, or of the tails of the edges along an axis."""
    sizes = [n - (i == axis) for i, n in enumerate(shape)]
    return np.indices(sizes).reshape(len(shape), -1)


def grid_groups(shape: tuple[int, ...], block: int, from_edges: bool = False) -> np.ndarray | None:
    """The group of every row of a grid's Ψ in closed form, or None if there is no formula.

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
