"""The degrees of freedom of a trend-filter fit: the dimension of the signals with the same zero differences.

    df = dim { b : (Δ^(k+1) b)_r = 0 for every row r that is zero at the fit }

For L1 its mean over the noise is the degrees of freedom `sum_j cov(fit_j, y_j) / sigma²` on every graph. The closed
forms for all orders, and on chains with free ends, are derived in The mathematics, "Paths of weights". On grids with
free ends there is none: the rank of a matrix gives it on small ones.

Source: Tibshirani and Taylor, "Degrees of freedom in lasso problems", Annals of Statistics 40 (2012), for any
difference matrix; Wang, Sharpnack, Smola, Tibshirani, "Trend filtering on graphs", JMLR 17 (2016), for graphs.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from scipy import sparse

from sparseopt.core.base.arguments import real_array
from sparseopt.core.operators.row_tables import edge_rows
from sparseopt.core.penalties.protocols import Norm
from sparseopt.trend.graph import Graph
from sparseopt.trend.layout import layout_of
from sparseopt.trend.signal import checked_graph, checked_order, graph_at

# The rank of a dense matrix of so many columns takes about a second.
MOST_RANKED = 1024


def degrees_of_freedom(nonzero: Any, graph: Graph, order: int = 0, observed: Any = None) -> int:
    """The degrees of freedom of a fit whose non-zero differences are known.

    Args:
        nonzero: booleans `[rows]` or `[rows, channels]`: which rows of `graph.matrix(order + 1)` are not zero at the
            fit; or the `nonzero` of a fit on this graph, whose layout may be that of a grid. Differences of a solution
            with a finite tolerance are rarely exactly zero; `trend_path` counts for you.
        graph: the graph.
        order: k.
        observed: booleans `[n]`, or None for all. At order 0 a piece without an observation does not count. At higher
            orders the count is at most the number of observations; below that it is assumed that the observations
            determine the fit.

    Raises:
        ValueError: for arguments that do not fit, and for a grid with free ends of more than 1,024 nodes.

    Returns:
        A whole number, the sum over the channels. For L1 it is an unbiased estimate, given the exact zeros; for other
        penalties (MCP, SCAD, L0, GroupL2) it is the dimension of the fitted model, without the cost of choosing the
        zeros.

    Example:
        >>> so.trend.degrees_of_freedom(np.array([False, True, False]), so.Graph.chain(4))  # one jump, two pieces
        2
    """
    order = checked_order(order)
    graph = graph_at(checked_graph(graph), order)
    if not is_countable(graph):
        raise ValueError(
            f"on a grid with free ends the degrees of freedom are the rank of a matrix, which is found for at most "
            f"{MOST_RANKED:,} nodes, given {graph.num_nodes:,}: sparseopt.trend.trend_path estimates them"
        )
    mask = _booleans("nonzero", nonzero)
    rows = layout_of(graph).count(order + 1)
    by_rows, laid_out = mask.ndim in (1, 2) and mask.shape[0] == rows, False
    if graph.shape is not None and not graph.free:
        shape = graph.shape if order % 2 else (len(graph.shape), *graph.shape)
        laid_out = mask.shape[: len(shape)] == shape and mask.ndim <= len(shape) + 1
    # [1, 2] on a chain of two nodes: one row of two channels, or one fit.
    if by_rows is laid_out and (not by_rows or mask.shape == (1, 2)):
        raise ValueError(
            f"the difference of order {order + 1} has {rows} rows, so `nonzero` has the shape [{rows}] or "
            f"[{rows}, channels], or on a grid that of a fit's `nonzero`, given {mask.shape}"
        )
    seen = None if observed is None else _booleans("observed", observed)
    if seen is not None and seen.shape != (graph.num_nodes,):
        raise ValueError(f"`observed` has one entry for each of {graph.num_nodes} nodes, given {seen.shape}")
    if laid_out:
        return freedom_of_rows(mask, graph, order, seen, mask.size // math.prod(shape))
    return _count(mask[:, None] if mask.ndim == 1 else mask, graph, lambda: graph.edges, order, seen)


def is_countable(graph: Graph) -> bool:
    """Whether `degrees_of_freedom` can count on a graph of an order."""
    return not graph.free or graph.is_chain or graph.num_nodes <= MOST_RANKED


def _booleans(name: str, given: Any) -> np.ndarray:
    array = real_array(name, given)
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise ValueError(f"`{name}` says true or false, given {int(np.isnan(array).sum())} NaN")
    return array.astype(bool)


def _count(mask: np.ndarray, graph: Graph, edges: Callable[[], np.ndarray], order: int, seen: np.ndarray | None) -> int:
    """The sum over the columns of `mask`; rows of even orders follow `edges()`."""
    if graph.free and not graph.is_chain:
        rows, n = graph.matrix(order + 1).toarray(), graph.num_nodes
        found = np.array([n - np.linalg.matrix_rank(rows[~column]) for column in mask.T])
    elif graph.free:
        found = order + 1 + mask.sum(axis=0)
    elif order % 2:
        counts = np.zeros((graph.num_components, mask.shape[1]))
        np.add.at(counts, graph.components, mask)
        found = np.maximum(counts, 1).sum(axis=0)
    else:
        found = np.array([_pieces(~column, graph, edges, seen if order == 0 else None) for column in mask.T])
    limit = graph.num_nodes if seen is None else int(seen.sum())
    return int(np.minimum(found, limit).sum())


def _pieces(kept: np.ndarray, graph: Graph, edges: Callable[[], np.ndarray], seen: np.ndarray | None) -> int:
    """The components of the graph with the kept edges only; with `seen`, those that hold a seen node."""
    n = graph.num_nodes
    if seen is None and graph.num_edges == n - graph.num_components:
        return n - int(kept.sum())  # a forest: each edge joins two pieces
    tails, heads = edges()[kept].T
    from scipy.sparse import csgraph

    adjacency = sparse.coo_array((np.ones(tails.size, np.int8), (tails, heads)), shape=(n, n))
    count, labels = csgraph.connected_components(adjacency, directed=False)
    return count if seen is None else np.unique(labels[seen]).size


def freedom_of_rows(nonzero: np.ndarray, graph: Graph, order: int, observed: np.ndarray | None, channels: int) -> int:
    """`degrees_of_freedom` of rows in the layout of `graph.base`; a single column counts for every channel."""
    mask = nonzero
    if order % 2 and not graph.free:
        mask = mask.reshape(graph.num_nodes, -1)
    elif graph.shape is not None and not graph.free:
        mask = edge_rows(mask, graph.shape)
    mask = mask.reshape(mask.shape[0], -1)
    return _count(np.broadcast_to(mask, (mask.shape[0], channels)), graph, lambda: graph.row_edges, order, observed)


def nonzero_rows(penalty: Any, rows: jax.Array, dual: jax.Array, scale: jax.Array) -> jax.Array:
    """Which rows `Δ b` of a fit are not zero, judged by its dual u for a `Norm`; `scale` is t, one per row.

    At the optimum `rows = prox(rows + t u, t)` for every t. An iterate keeps small differences of both signs where its
    dual says zero, so t is large, the size of a row of noise over the weight: the prox is zero unless `|u| = weight`
    almost exactly. At a gap of 1e-4 the count was within half a per cent of that at 1e-9; a count by size was off by up
    to a half.
    """
    assert isinstance(penalty, Norm)
    return (penalty.prox(rows + scale * dual, scale) != 0) & (rows != 0)
