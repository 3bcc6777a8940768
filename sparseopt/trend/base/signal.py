"""The caller's signal on a graph, checked on the host before any work, and its noise level."""

import contextlib
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.arguments import real_array, require_memory, whole_number
from sparseopt.core.base.compile import Jitted
from sparseopt.core.base.types import precision
from sparseopt.core.operators.differences import Difference
from sparseopt.core.operators.normal_solves import LONGEST_FREE_AXIS
from sparseopt.core.operators.row_tables import edge_rows
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
FIT_COPIES = 24
PLAIN_COPIES = 6
# Of the device's memory a fit holds 19 to 23 such arrays in the programs compiled for an H100.
DEVICE_COPIES = 16
# The gap compares squares of residuals with those of the signal, which must be this much above the smallest normal
# number: otherwise residuals vanish and every fit would count as exact.
SQUARES_ABOVE_TINY = 1e12
# A signal counts as a polynomial if it differs from its fit by at most this many eps of its largest value.
NULL_EPS = 16
# The median of |x| for a standard normal x.
NORMAL_MEDIAN = 0.6744897501960817
# One weight does not suit channels if the noise of one is more than this many times that of another.
UNLIKE = 5


@dataclasses.dataclass(frozen=True)
class Signal:
    """A checked signal."""

    values: np.ndarray  # `[n]` or `[n, channels]` in the dtype of the computation, 0 where missing
    weights: np.ndarray | None  # node weights `[n]`, 0 where missing, or None for ones
    shape: tuple[int, ...]  # the caller's shape, which the answer gets

    @property
    def columns(self) -> np.ndarray:
        """The values, `[n, channels]` in float64."""
        return self.values.reshape(len(self.values), -1).astype(np.float64)

    @property
    def mass(self) -> np.ndarray:
        """The node weights, `[n]` in float64."""
        return np.ones(len(self.values)) if self.weights is None else self.weights.astype(np.float64)

    @property
    def complete(self) -> bool:
        """Whether every node is observed."""
        return self.weights is None or bool(self.weights.all())


def check_graph(graph: Any) -> Graph:
    """The graph; a TypeError if it is not a `Graph`."""
    if not isinstance(graph, Graph):
        raise TypeError(
            f"the graph is a sparseopt.Graph, given {graph!r:.100}; "
            "Graph.grid(shape), .chain(n), .from_edges, .from_scipy and .from_networkx make one"
        )
    return graph


def compute_dtype(y: np.ndarray, dtype: Any, graph: Graph, order: int) -> np.dtype:
    """float64 for float64 and integer signals and for free ends, else float32; or the caller's `dtype`, one of the two.

    At order 0 free ends are the ends of the graph.
    """
    if dtype is None:
        # In float32 differences of order 3 lose all digits over some hundred nodes.
        wide = (graph.free and order > 0) or y.dtype.kind in "iub" or y.dtype.itemsize >= 8
        return np.dtype(np.float64 if wide else np.float32)
    with contextlib.suppress(TypeError):  # of what is no dtype
        if (wanted := np.dtype(dtype)) in (np.float32, np.float64):
            return wanted
    raise ValueError(f"dtype must be float32 or float64, given {dtype!r}")


def check_signal(
    y: Any,
    graph: Graph,
    order: int,
    node_weights: Any,
    missing: str,
    dtype: Any,
    copies: int = FIT_COPIES,
    devices: int = 1,
) -> Signal:
    """The signal from the arguments of `trend_filter`; a TypeError or ValueError for invalid ones.

    The order is a checked one. `copies` is the smallest number of arrays like the signal that the work needs, on this
    many `devices`.
    """
    graph = check_graph(graph)
    if isinstance(y, jax.core.Tracer):
        raise TypeError(f"trend_filter checks a signal's values, {UNKNOWN}")
    y = real_array("a signal", y)
    kind = compute_dtype(y, dtype, graph, order)
    nodes = next((shape for shape in graph.array_shapes if y.shape[: len(shape)] == shape), ())
    flat = y.reshape(graph.num_nodes, *y.shape[len(nodes) :]) if nodes else y
    if not nodes or flat.ndim > 2 or flat.size == 0:
        grid = "" if graph.shape is None else f" or {graph.shape}, with or without a channel axis"
        raise ValueError(
            f"the graph has {graph.num_nodes} nodes, so the signal has the shape [{graph.num_nodes}] or "
            f"[{graph.num_nodes}, channels]{grid}; given {y.shape}"
        )
    if not (isinstance(missing, str) and missing in ("error", "nan")):
        raise ValueError(f'missing must be "error" or "nan", given {missing!r}')
    what = f"work on a {kind} signal of the shape {flat.shape}, {math.prod(flat.shape):,} values,"
    advice = "solve channels one by one, split the graph, or use dtype=np.float32"
    nbytes = math.prod(flat.shape) * kind.itemsize
    require_memory(copies * nbytes, what, advice, on_device=min(copies, DEVICE_COPIES) * nbytes // devices)
    weights = np.ones(graph.num_nodes)
    if node_weights is not None:
        weights = real_array("node weights", node_weights).astype(np.float64)
        require_node_weights(weights.shape, graph)
        weights = weights.reshape(-1)
        require_not_negative(weights, "node weights", "at node")
    if np.isinf(flat).any():
        raise ValueError(
            f'the signal has {int(np.isinf(flat).sum())} infinite values; mark missing ones with NaN and missing="nan"'
        )
    with np.errstate(over="ignore"):
        values = flat.astype(kind)
    absent = np.isnan(values).reshape(graph.num_nodes, -1)
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
        _require_observations(weights, graph)
        values = np.where((weights > 0).reshape(-1, *(1 for _ in values.shape[1:])), values, 0)
    _require_squares(values, float(weights.max()), kind)
    return Signal(values, None if equal else weights.astype(kind), y.shape)


def require_complete(signal: Signal) -> None:
    """Raise a ValueError if nodes are missing and no penalty ties them to others."""
    if not signal.complete:
        raise ValueError("without a penalty the fit is not defined at missing nodes: raise the penalty's weight")


def require_node_weights(shape: tuple[int, ...], graph: Graph) -> None:
    """Raise a ValueError unless there is one for each node."""
    if shape not in graph.array_shapes:
        grid = "" if graph.shape is None else f" or {graph.shape}"
        raise ValueError(
            f"{graph.num_nodes} nodes need as many node weights, [{graph.num_nodes}]{grid}, given "
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


def _require_observations(weights: np.ndarray, graph: Graph) -> None:
    seen = np.bincount(graph.components, weights=weights > 0, minlength=graph.num_components)
    if (seen == 0).any():
        empty = int(np.argmax(seen == 0))
        node = int(np.argmax(graph.components == empty))
        raise ValueError(
            f"{int((seen == 0).sum())} components have no observed node (one holds node {node}), so their fit is "
            "not defined; leave them out or give them an observation"
        )


def check_order(order: Any) -> int:
    """The order as an int in `[0, MOST_ORDER]`; else a ValueError."""
    return whole_number("order", order, 0, MOST_ORDER, "0: piecewise constant, 1: piecewise linear, ...")


def graph_at(graph: Graph, order: int, signal: Signal | None = None) -> Graph:
    """The graph for the trend filter of an order: with free ends at order 0 the plain one, which has fast methods.

    A ValueError with free ends, for fewer than `order + 2` nodes along every axis, for a grid with a very long axis, or
    for observed nodes that do not determine a polynomial.
    """
    if not graph.free:
        return graph
    if order == 0:
        return graph.cache("plain", lambda: Graph.grid(graph.node_shape, graph.spacing))
    longest, along = max(graph.node_shape), "" if graph.is_chain else " along an axis"
    if longest < order + 2:
        raise ValueError(
            f"order {order} with free ends needs at least {order + 2} nodes{along}, given {longest}: with fewer, every "
            "signal is a polynomial of that degree, and the fit is the signal itself; lower the order, or use "
            'ends="graph"'
        )
    if longest > LONGEST_FREE_AXIS and not graph.is_chain:
        raise ValueError(
            f"order {order} with free ends needs a grid of at most {LONGEST_FREE_AXIS:,} nodes along an axis, given "
            f'{longest:,}: divide the grid, or use ends="graph"'
        )
    if signal is None or signal.complete:
        return graph
    seen = signal.mass > 0
    count, determined = order + 1, np.count_nonzero(seen)
    if not graph.is_chain:
        basis = graph.polynomials(order)
        count, determined = basis.shape[1], np.linalg.matrix_rank(basis[seen])
    if determined < count:
        raise ValueError(
            f"order {order} with free ends needs at least {count} observed nodes, given "
            f"{np.count_nonzero(seen)}, and they must determine a polynomial of that degree"
            f"{'' if graph.is_chain else ' in each axis'}"
            ': lower the order, or use ends="graph"'
        )
    return graph


def null_fit_values(signal: Signal, graph: Graph, order: int) -> np.ndarray:
    """The best fit that costs no penalty, `[n, channels]`: the component means, or the polynomial with free ends."""
    values, weights = signal.columns, signal.mass
    if graph.free:
        root = np.sqrt(weights)[:, None]
        basis = graph.polynomials(order)
        fit = basis @ np.linalg.lstsq(root * basis, root * values)[0]
        return fit + basis @ np.linalg.lstsq(root * basis, root * (values - fit))[0]
    return component_means(values, graph, weights)


def component_means(values: np.ndarray, graph: Graph, weights: np.ndarray) -> np.ndarray:
    """The weighted mean of every node's component, `[n, channels]`."""
    sums = np.stack([np.bincount(graph.components, weights * column) for column in values.T], axis=1)
    return (sums / np.bincount(graph.components, weights)[:, None])[graph.components]


def as_null_fit(signal: Signal, graph: Graph, order: int) -> np.ndarray | None:
    """The signal, if it is such a fit up to rounding, with the values of the fit where nothing is observed; or None."""
    fit, values = null_fit_values(signal, graph, order), signal.columns
    found = np.where((signal.mass > 0)[:, None], values, fit)
    rounding = NULL_EPS * np.finfo(signal.values.dtype).eps * np.abs(values).max()
    return found.reshape(signal.values.shape) if np.abs(found - fit).max() <= rounding else None


def noise_level(y: Any, graph: Graph, order: int = 0, node_weights: Any = None, *, missing: str = "error") -> float:
    """The standard deviation of the noise in a signal whose trend has few or small differences.

    `median_r |(Δ^(order+1) y)_r| / (||Δ_r|| 0.6745)`: a difference of white noise of deviation sigma has standard
    deviation `sigma ||Δ_r||`, and a few jumps of the trend do not move the median.

    The arguments are as in `trend_filter`; all channels count as one sample. The noise at node j is assumed to have
    the variance `sigma² / w_j`, and rows that touch a node of weight 0 are left out. The result is NaN if no row is
    left.

    Source: Donoho and Johnstone, "Ideal spatial adaptation by wavelet shrinkage", Biometrika 81 (1994), with
    differences instead of the finest wavelets.

    Example:
        >>> y = np.repeat([0.0, 50.0], 500) + 2.0 * np.random.default_rng(0).standard_normal(1000)
        >>> bool(abs(so.trend.noise_level(y, so.Graph.chain(1000)) - 2.0) < 0.2)
        True
    """
    order = check_order(order)
    signal = check_signal(y, graph, order, node_weights, missing, np.float64, PLAIN_COPIES)
    return signal_noise(signal, graph_at(graph, order), order)


def unlike_channels(
    y: Any, graph: Graph, order: int = 0, node_weights: Any = None, *, missing: str = "error"
) -> str | None:
    """A sentence if one weight does not suit all channels of a signal, else None.

    It compares the `noise_level` of the channels: one weight smooths all of them, and the right weight is about
    proportional to the noise. The arguments are as in `noise_level`. Channels without noise are not compared.

    Example:
        >>> y = np.random.default_rng(0).standard_normal((90, 2)) * [1, 100]
        >>> "to one unit" in so.trend.unlike_channels(y, so.Graph.chain(90))
        True
    """
    order = check_order(order)
    signal, graph = (
        check_signal(y, graph, order, node_weights, missing, np.float64, PLAIN_COPIES),
        graph_at(graph, order),
    )
    found = [signal_noise(dataclasses.replace(signal, values=column), graph, order) for column in signal.columns.T]
    if not 0 < UNLIKE * min(found) < max(found):
        return None
    return (
        f"the noise of the channels is {min(found):.3g} to {max(found):.3g}, and one weight smooths them all: bring "
        "them to one unit, or smooth them one by one"
    )


# As one program: operation by operation it would be twenty.
_rows = Jitted(lambda difference, x: difference.mv(x))


def signal_noise(signal: Signal, graph: Graph, order: int) -> float:
    """`noise_level` of a checked signal."""
    values = signal.columns
    if signal.weights is None and not graph.free:
        with precision(np.dtype(np.float64)):
            on_nodes = jnp.asarray(values.reshape(*graph.node_shape, -1))
            rows = np.asarray(_rows(Difference(graph.base(np.float64), order + 1), on_nodes))
        squares = graph.sums(order + 1).row_squares
        if graph.shape is not None and order % 2 == 0:
            rows, squares = edge_rows(rows, graph.shape), edge_rows(squares, graph.shape)
    else:
        matrix = graph.matrix(order + 1)
        weights = signal.mass
        squares = matrix.multiply(matrix) @ (1 / np.where(weights > 0, weights, 1))
        squares = np.where(abs(matrix) @ (weights == 0) > 0, 0, squares)
        rows = matrix @ values
    judged = squares > 0  # an isolated node has a row without entries
    if not judged.any():
        return float("nan")
    sizes = np.abs(rows.reshape(-1, values.shape[1])[judged.reshape(-1)]) / np.sqrt(squares[judged])[:, None]
    return float(np.median(sizes) / NORMAL_MEDIAN)
