"""The caller's signal on a graph, checked on the host before any work."""

import contextlib
import math
from typing import Any

import jax
import numpy as np

from sparseopt.core.base.arguments import real_array, require_memory, whole_number
from sparseopt.trend.base.geometry import Geometry
from sparseopt.trend.base.graph import Graph

# What messages say about traced values.
UNKNOWN = (
    "which are not known under jit, vmap and grad: make a solver outside with sparseopt.trend_solver(graph, order), "
    "and call it there"
)
# On a graph with a long enough path the entries of Δ^(order+1) reach binomial(order + 1, half of it); from the next
# order on they are no longer exact in float64.
MOST_ORDER = 55
# The peak memory of a fit, in arrays of the signal's size and dtype: 30 to 120 were measured over methods, orders and
# graphs. Work without a solve, such as the noise level, needs fewer.
FIT_COPIES, PLAIN_COPIES = 24, 6
# Of the device's memory a fit holds 19 to 23 such arrays in the programs compiled for an H100.
DEVICE_COPIES = 16
# The gap compares squares of residuals with those of the signal, which must be this much above the smallest normal
# number: otherwise residuals vanish and every fit would count as exact.
SQUARES_ABOVE_TINY = 1e12


def check_graph(graph: Any) -> Graph:
    """The graph; a TypeError if it is not a `Graph`."""
    if not isinstance(graph, Graph):
        raise TypeError(
            f"the graph is a sparseopt.Graph, given {graph!r:.100}; "
            "Graph.grid(shape), .chain(n), .from_edges, .from_scipy and .from_networkx make one"
        )
    return graph


def compute_dtype(y: np.ndarray, dtype: Any, geometry: Geometry) -> np.dtype:
    """float64 for float64 and integer signals and for free ends, else float32; or the caller's `dtype`, one of the two.

    At order 0 free ends are the ends of the graph.
    """
    if dtype is None:
        # In float32 differences of order 3 lose all digits over some hundred nodes.
        wide = geometry.wide or y.dtype.kind in "iub" or y.dtype.itemsize >= 8
        return np.dtype(np.float64 if wide else np.float32)
    with contextlib.suppress(TypeError):  # of what is no dtype
        if (wanted := np.dtype(dtype)) in (np.float32, np.float64):
            return wanted
    raise ValueError(f"dtype must be float32 or float64, given {dtype!r}")


def check_signal(
    y: Any,
    geometry: Geometry,
    order: int,
    node_weights: Any,
    missing: str,
    dtype: Any,
    copies: int = FIT_COPIES,
    devices: int = 1,
) -> dict[str, Any]:
    """Values, weights and shape of a `Fit` from the arguments of `trend_filter`; a TypeError or ValueError if wrong.

    The geometry is the one at the order. `copies` is the smallest number of arrays like the signal that the work needs,
    on this many `devices`.
    """
    count = geometry.num_nodes
    if isinstance(y, jax.core.Tracer):
        raise TypeError(f"trend_filter checks a signal's values, {UNKNOWN}")
    y = real_array("a signal", y)
    kind = compute_dtype(y, dtype, geometry)
    nodes = next((shape for shape in geometry.shapes if y.shape[: len(shape)] == shape), ())
    flat = y.reshape(count, *y.shape[len(nodes) :]) if nodes else y
    if not nodes or flat.ndim > 2 or flat.size == 0:
        raise ValueError(
            f"the graph has {count} nodes, so the signal has the shape [{count}] or [{count}, channels]"
            f"{geometry.or_shape}{', with or without a channel axis' * bool(geometry.or_shape)}; given {y.shape}"
        )
    if not (isinstance(missing, str) and missing in ("error", "nan")):
        raise ValueError(f'missing must be "error" or "nan", given {missing!r}')
    what = f"work on a {kind} signal of the shape {flat.shape}, {math.prod(flat.shape):,} values,"
    advice = "solve channels one by one, split the graph, or use dtype=np.float32"
    nbytes = math.prod(flat.shape) * kind.itemsize
    require_memory(copies * nbytes, what, advice, on_device=min(copies, DEVICE_COPIES) * nbytes // devices)
    weights = np.ones(count)
    if node_weights is not None:
        weights = real_array("node weights", node_weights).astype(np.float64)
        require_node_weights(weights.shape, geometry)
        weights = weights.reshape(-1)
        require_not_negative(weights, "node weights", "at node")
    if np.isinf(flat).any():
        raise ValueError(
            f'the signal has {int(np.isinf(flat).sum())} infinite values; mark missing ones with NaN and missing="nan"'
        )
    with np.errstate(over="ignore"):
        values = flat.astype(kind)
    absent = np.isnan(values).reshape(count, -1)
    if absent.any():
        if missing == "error":
            raise ValueError(
                f'the signal has {int(absent.sum())} NaN of {values.size} values; missing="nan", in the shell '
                "--missing, fills them in from their neighbours"
            )
        partly = absent.any(axis=1) & ~absent.all(axis=1)
        if partly.any():
            raise ValueError(
                f"{int(partly.sum())} nodes miss some channels but not all; solve such channels one by one"
            )
        weights = weights * ~absent.any(axis=1)
    equal = bool(np.all(weights == 1))
    if not equal:
        require_determined(weights, geometry, order)
        values = np.where((weights > 0).reshape(-1, *(1 for _ in values.shape[1:])), values, 0)
    _require_squares(values, float(weights.max()), kind)
    return {"values": values, "weights": None if equal else weights.astype(kind), "shape": y.shape}


def require_node_weights(shape: tuple[int, ...], geometry: Geometry) -> None:
    """Raise a ValueError unless there is one for each node."""
    if shape not in geometry.shapes:
        count = geometry.num_nodes
        raise ValueError(
            f"{count} nodes need as many node weights, [{count}]{geometry.or_shape}, given "
            f"{shape[0] if len(shape) == 1 else f'the shape {shape}'}"
        )


def require_not_negative(weights: np.ndarray, what: str, where: str) -> None:
    """Raise a ValueError for the first weight that is negative or not finite."""
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(
            f"{what} are finite and not negative, given {weights[first]} {where} {first} "
            f"({int(wrong.sum())} such); 0 marks a missing observation"
        )


def _require_squares(values: np.ndarray, heaviest: float, kind: np.dtype) -> None:
    limits = np.finfo(kind)
    largest = float(np.abs(values).max())
    # The factor 100 leaves room for a solver's intermediate values. All in float64, as roots.
    root = largest * np.sqrt(heaviest)
    high = float(np.sqrt(float(limits.max) / (100.0 * values.size)))
    low = float(np.sqrt(float(limits.tiny) * SQUARES_ABOVE_TINY))
    size = f"its largest value is {largest:.3g}" if np.isfinite(largest) else "its largest value is beyond that"
    if heaviest != 1:
        size += f", times the root of the largest node weight {root:.3g}"
    wider = "" if kind == np.float64 else ", or use dtype=np.float64"
    if not max(root, largest) <= high:
        raise ValueError(
            f"squares of this signal overflow {kind}: {size}, but at most {high:.3g} fits; divide signal and penalty "
            f"weight by one number{wider}"
        )
    if largest > 0 and root < low:
        raise ValueError(
            f"squares of this signal vanish in {kind}: {size}, but {low:.3g} is the smallest; multiply signal and "
            f"penalty weight by one number{wider}"
        )


def require_determined(weights: np.ndarray, geometry: Geometry, order: int) -> None:
    """Raise a ValueError if the nodes with a positive weight, of `[n]`, do not determine a fit."""
    seen = np.bincount(geometry.components, weights=weights > 0, minlength=geometry.num_components)
    if (seen == 0).any():
        empty = int(np.argmax(seen == 0))
        node = int(np.argmax(geometry.components == empty))
        raise ValueError(
            f"{int((seen == 0).sum())} components have no observed node (one holds node {node}), so their fit is "
            "not defined; leave them out or give them an observation"
        )
    if not weights.all():
        geometry.require_determined(order, weights > 0)


def check_order(order: Any) -> int:
    """The order as an int in `[0, MOST_ORDER]`; else a ValueError."""
    return whole_number("order", order, 0, MOST_ORDER, "0: piecewise constant, 1: piecewise linear, ...")


def geometry_at(graph: Any, order: Any) -> tuple[Geometry, int]:
    """The geometry of a graph for the trend filter of an order, and that order, both checked."""
    order = check_order(order)
    return check_graph(graph).geometry.at(order), order
