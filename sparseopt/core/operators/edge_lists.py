"""Edge lists and adjacency matrices as callers write them, checked on the host."""

from typing import Any

import numpy as np
from scipy import sparse

from sparseopt.core.base.arguments import is_positive, real_array, whole_number

# A pair of node numbers is stored as one int64 key.
MOST_NODES = 3_037_000_499


def check_edges(edges: Any, num_nodes: int | None, weights: Any) -> tuple[np.ndarray, int, np.ndarray | None]:
    """Edges as int64 `[m, 2]`, the number of nodes, weights as float64 `[m]` or None; else a ValueError."""
    try:
        pairs = np.asarray(edges)
    except ValueError as error:
        raise ValueError(f"edges have the shape [m, 2]; given rows of unequal length: {error}") from error
    if pairs.size == 0:
        pairs = np.zeros((0, 2), np.int64)
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        advice = "; pass the transpose, edges.T" if pairs.ndim == 2 and pairs.shape[0] == 2 else ""
        raise ValueError(f"edges have the shape [m, 2], given {pairs.shape}{advice}")
    whole = pairs.dtype.kind in "iu" or (
        pairs.dtype.kind == "f" and bool(np.all(np.isfinite(pairs) & (pairs == np.floor(pairs))))
    )
    if not whole:
        raise ValueError(f"edges are pairs of whole node numbers, given dtype {pairs.dtype}: {pairs[:1].tolist()} ...")
    given = max(int(pairs.max(initial=0)) + 1, 1) if num_nodes is None else num_nodes
    count = whole_number("num_nodes", given, 1, MOST_NODES)
    if num_nodes is None and not pairs.size:
        raise ValueError("a graph has at least one node: without edges give num_nodes; neither was given")
    outside = (pairs < 0) | (pairs >= count)
    if outside.any():
        row = int(np.argmax(outside.any(axis=1)))
        raise ValueError(
            f"edge {row}, {tuple(int(v) for v in pairs[row])}, leaves the node numbers 0..{count - 1} "
            f"({int(outside.any(axis=1).sum())} such edges); raise num_nodes or number nodes from 0"
        )
    pairs = pairs.astype(np.int64)
    if weights is None:
        return pairs, count, None
    level = real_array("edge weights", weights).astype(np.float64)
    if level.shape != (pairs.shape[0],):
        raise ValueError(f"{pairs.shape[0]} edges need as many weights, given the shape {level.shape}")
    require_positive(level)
    return pairs, count, level


def require_positive(level: np.ndarray) -> None:
    """Raise a ValueError for the first weight that is not positive and finite."""
    wrong = ~(np.isfinite(level) & (level > 0))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"edge weights are positive and finite, given {level[row]} at edge {row} ({int(wrong.sum())} such); "
            "leave out an edge of weight 0"
        )


def check_adjacency(adjacency: Any) -> Any:
    """An adjacency matrix as a SciPy COO array in float64 without zeros; a ValueError if it is not symmetric."""
    if not sparse.issparse(adjacency):
        adjacency = np.asarray(real_array("an adjacency matrix", adjacency), np.float64)
    if adjacency.dtype.kind not in "biuf":
        raise ValueError(f"an adjacency matrix holds real numbers, given dtype {adjacency.dtype}")
    if adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1]:
        raise ValueError(f"an adjacency matrix is square, given the shape {adjacency.shape}")
    matrix = sparse.coo_array(adjacency).astype(np.float64)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    wrong = ~np.isfinite(matrix.data)
    if wrong.any():
        place = int(np.argmax(wrong))
        raise ValueError(
            f"the entries of an adjacency matrix are finite, given {matrix.data[place]} at "
            f"({matrix.row[place]}, {matrix.col[place]}) ({int(wrong.sum())} such)"
        )
    apart = abs(matrix - matrix.T)
    if apart.nnz and not apart.max() <= 1e-12 * abs(matrix).max():
        raise ValueError("an undirected graph needs a symmetric adjacency matrix; pass (A + A.T) / 2 or A + A.T")
    return matrix


def check_spacing(spacing: Any, axes: int) -> tuple[float, ...] | None:
    """The spacing of a grid's axes, None for ones; a ValueError for anything but a positive number for each axis."""
    if spacing is None:
        return None
    if axes == 1:
        raise ValueError(
            'a grid of one axis has no spacing: Graph.chain(n, times=..., ends="free") accepts the times of its nodes'
        )
    given = tuple(spacing) if np.iterable(spacing) else (spacing,)
    if len(given) != axes or not all(map(is_positive, given)):
        raise ValueError(f"the spacing of a grid is one positive number for each of its {axes} axes, given {spacing!r}")
    sizes = tuple(map(float, given))
    return None if set(sizes) == {1.0} else sizes
