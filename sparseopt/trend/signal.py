"""Floor 5: the caller's signal on a graph, checked on the host before any work."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from sparseopt.core.arguments import real_array, require_memory, whole_number
from sparseopt.trend.graph import Graph

# On a graph with a long enough path the entries of Δ^(order+1) reach binomial(order + 1, half of it); from the next
# order on they are no longer exact in float64.
MOST_ORDER = 55
# The peak memory of a fit, in arrays of the signal's size and dtype: 30 to 120 were measured over methods, orders and
# graphs. Work without a solve, such as the noise level, needs fewer.
FIT_COPIES = 24
PLAIN_COPIES = 6
# The gap compares squares of residuals with those of the signal, which must be this much above the smallest normal
# number: otherwise residuals vanish and every fit would count as exact.
SQUARES_ABOVE_TINY = 1e12


@dataclasses.dataclass(frozen=True)
class Signal:
    """A checked signal."""

    values: np.ndarray  # `[n]` or `[n, channels]` in the dtype of the computation, 0 where missing
    weights: np.ndarray | None  # node weights `[n]`, 0 where missing, or None for ones
    shape: tuple[int, ...]  # the caller's shape, which the answer gets


def checked_graph(graph: Any) -> Graph:
    """The graph; a TypeError if it is not a `Graph`."""
    if not isinstance(graph, Graph):
        raise TypeError(
            f"the graph is a sparseopt.Graph, given {graph!r:.100}; "
            "Graph.grid(shape), .chain(n), .from_edges, .from_scipy and .from_networkx make one"
        )
    return graph


def compute_dtype(y: np.ndarray, dtype: Any) -> np.dtype:
    """float64 for float64 and integer signals, float32 for shorter floats, or the caller's `dtype`, one of the two."""
    if dtype is None:
        return np.dtype(np.float64 if y.dtype.kind in "iub" or y.dtype.itemsize >= 8 else np.float32)
    try:
        wanted = np.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"dtype must be float32 or float64, given {dtype!r}") from error
    if wanted not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise ValueError(f"dtype must be float32 or float64, given {wanted}")
    return wanted


def checked_signal(
    y: Any, graph: Graph, node_weights: Any, missing: str, dtype: Any, copies: int = FIT_COPIES
) -> Signal:
    """The signal, its weights and the caller's shape, from the arguments of `trend_filter`.

    `copies` is the least number of arrays like the signal that the work takes.

    Raises:
        TypeError: for a graph that is not a `Graph`, and a signal that is traced.
        ValueError: on a signal that does not hold real numbers, a length that does not fit the graph, non-finite
            values, values whose squares overflow or vanish, weights that are negative, non-finite or of the wrong
            shape, an unknown `missing`, a component without an observation, or too little memory.
    """
    graph = checked_graph(graph)
    if isinstance(y, jax.core.Tracer):
        raise TypeError(
            "trend_filter checks a signal's values, which are not known under jit, vmap and grad: make a solver by "
            "sparseopt.trend_solver(graph, order) outside, and call it there"
        )
    y = real_array("a signal", y)
    kind = compute_dtype(y, dtype)
    shape = y.shape
    if graph.shape is not None and y.shape[: len(graph.shape)] == graph.shape and y.ndim <= len(graph.shape) + 1:
        flat = y.reshape(graph.num_nodes, *y.shape[len(graph.shape) :])
    else:
        flat = y
    if flat.ndim not in (1, 2) or flat.shape[0] != graph.num_nodes or flat.size == 0:
        grid = "" if graph.shape is None else f" or {graph.shape}, with or without a channel axis"
        raise ValueError(
            f"the graph has {graph.num_nodes} nodes, so the signal has the shape [{graph.num_nodes}] or "
            f"[{graph.num_nodes}, channels]{grid}; given {y.shape}"
        )
    if not (isinstance(missing, str) and missing in ("error", "nan")):
        raise ValueError(f'missing must be "error" or "nan", given {missing!r}')
    what = f"work on a {kind} signal of the shape {flat.shape}, {math.prod(flat.shape):,} values,"
    advice = "solve channels one by one, split the graph, or take dtype=np.float32"
    require_memory(copies * math.prod(flat.shape) * kind.itemsize, what, advice)
    weights = _checked_weights(node_weights, graph)
    if np.isinf(flat).any():
        raise ValueError(
            f'the signal has {int(np.isinf(flat).sum())} infinite values; mark missing ones by NaN and missing="nan"'
        )
    with np.errstate(over="ignore"):
        values = flat.astype(kind)
    absent = np.isnan(values).reshape(graph.num_nodes, -1)
    if absent.any() and missing == "error":
        raise ValueError(
            f'the signal has {int(absent.sum())} NaN of {values.size} values; missing="nan" fills them in from '
            "their neighbours"
        )
    if absent.any():
        partly = absent.any(axis=1) & ~absent.all(axis=1)
        if partly.any():
            raise ValueError(
                f"{int(partly.sum())} nodes miss some channels but not all; solve such channels one by one"
            )
        weights = (np.ones(graph.num_nodes) if weights is None else weights) * ~absent.any(axis=1)
        values = np.where(np.isnan(values), 0, values)
    if weights is not None:
        if np.all(weights == 1):
            weights = None
        else:
            _require_observations(weights, graph)
            seen = (weights > 0).reshape((-1,) + (1,) * (values.ndim - 1))
            values = np.where(seen, values, 0)
    _require_squares(values, weights, kind)
    return Signal(values, None if weights is None else weights.astype(kind), shape)


def _checked_weights(node_weights: Any, graph: Graph) -> np.ndarray | None:
    if node_weights is None:
        return None
    weights = real_array("node weights", node_weights).astype(np.float64)
    if weights.shape not in ((graph.num_nodes,), graph.shape):
        grid = "" if graph.shape is None else f" or {graph.shape}"
        raise ValueError(
            f"{graph.num_nodes} nodes need as many node weights, [{graph.num_nodes}]{grid}, given "
            f"{weights.size if weights.ndim == 1 else f'the shape {weights.shape}'}"
        )
    weights = weights.reshape(-1)
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        node = int(np.argmax(wrong))
        raise ValueError(
            f"node weights are finite and not negative, given {weights[node]} at node {node} "
            f"({int(wrong.sum())} such); 0 marks a missing observation"
        )
    return weights


def _require_squares(values: np.ndarray, weights: np.ndarray | None, kind: np.dtype) -> None:
    """Raise a ValueError if sums of squares overflow, or single squares vanish."""
    limits = np.finfo(kind)
    largest = float(np.abs(values).max())
    heaviest = 1.0 if weights is None else float(weights.max())
    # The factor 100 leaves room for a solver's intermediate values. All in float64, as roots.
    root = largest * np.sqrt(heaviest)
    high = float(np.sqrt(float(limits.max) / (100.0 * values.size)))
    low = float(np.sqrt(float(limits.tiny) * SQUARES_ABOVE_TINY))
    size = f"its largest value is {largest:.3g}" if np.isfinite(largest) else "its largest value is beyond that"
    if heaviest != 1:
        size += f", times the root of the largest node weight {root:.3g}"
    wider = "" if kind == np.float64 else ", or take dtype=np.float64"
    if not max(root, largest) <= high:
        raise ValueError(
            f"squares of this signal overflow {kind}: {size}, where {high:.3g} is the most; divide signal and penalty "
            f"weight by one number{wider}"
        )
    if largest > 0 and root < low:
        raise ValueError(
            f"squares of this signal vanish in {kind}: {size}, where {low:.3g} is the least; multiply signal and "
            f"penalty weight by one number{wider}"
        )


def _require_observations(weights: np.ndarray, graph: Graph) -> None:
    seen = np.bincount(graph.components, weights=weights > 0, minlength=graph.num_components)
    if (seen == 0).any():
        empty = int(np.argmax(seen == 0))
        node = int(np.argmax(graph.components == empty))
        raise ValueError(
            f"{int((seen == 0).sum())} components have no observed node (one holds node {node}), so their fit is "
            "not defined; leave them out or give them an observation"
        )


def checked_order(order: Any) -> int:
    """The order as an int in `[0, MOST_ORDER]`; else a ValueError."""
    return whole_number("order", order, 0, MOST_ORDER, "0: piecewise constant, 1: piecewise linear, ...")
