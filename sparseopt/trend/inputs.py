"""Floor 5: what a caller may pass to the trend filter, checked and laid out on the host before any work."""

import dataclasses
from typing import Any

import jax
import numpy as np

from sparseopt.core.penalties import L1, GroupL2
from sparseopt.trend.graph import Graph


@dataclasses.dataclass(frozen=True)
class Signal:
    """A checked signal.

    Attributes:
        values: `[n]` or `[n, channels]` in the dtype of the computation, 0 where missing.
        weights: node weights `[n]`, 0 where missing, or None for ones.
        shape: the caller's shape, which the answer gets.
    """

    values: np.ndarray
    weights: np.ndarray | None
    shape: tuple[int, ...]


def compute_dtype(y: Any, dtype: Any) -> np.dtype:
    """float64 for float64 and integer signals, float32 for shorter floats, or what the caller asks for.

    Raises:
        ValueError: for a dtype other than float32 and float64, or a signal that holds no real numbers.
    """
    given = np.dtype(y.dtype)
    if dtype is None:
        if given.kind in "iub":
            return np.dtype(np.float64)
        if given.kind != "f" and given.name != "bfloat16":
            raise ValueError(f"a signal holds real numbers, given dtype {given}")
        return np.dtype(np.float64 if given.itemsize >= 8 else np.float32)
    wanted = np.dtype(dtype)
    if wanted not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise ValueError(f"dtype must be float32 or float64, given {wanted}")
    return wanted


def checked_signal(y: Any, graph: Graph, node_weights: Any, missing: str, dtype: Any) -> Signal:
    """The signal, its weights and the caller's shape.

    Raises:
        ValueError: on a length that does not fit the graph, non-finite values, weights that are negative,
            non-finite or of the wrong shape, an unknown `missing`, or a component without an observation.
    """
    y = np.asarray(y)
    kind = compute_dtype(y, dtype)
    shape = y.shape
    if graph.shape is not None and y.shape[: len(graph.shape)] == graph.shape and y.ndim <= len(graph.shape) + 1:
        flat = y.reshape(graph.num_nodes, *y.shape[len(graph.shape) :])
    else:
        flat = y
    if flat.ndim not in (1, 2) or flat.shape[0] != graph.num_nodes:
        grid = "" if graph.shape is None else f" or {graph.shape}, with or without a channel axis"
        raise ValueError(
            f"the graph has {graph.num_nodes} nodes, so the signal has the shape [{graph.num_nodes}] or "
            f"[{graph.num_nodes}, channels]{grid}; given {y.shape}"
        )
    if missing not in ("error", "nan"):
        raise ValueError(f'missing must be "error" or "nan", given {missing!r}')
    values = flat.astype(kind)
    absent = np.isnan(values).reshape(graph.num_nodes, -1)
    if np.isinf(values).any():
        raise ValueError(f"the signal has {int(np.isinf(values).sum())} infinite values")
    if absent.any() and missing == "error":
        raise ValueError(
            f'the signal has {int(absent.sum())} NaN of {values.size} values; missing="nan" fills them in from '
            "their neighbours"
        )
    weights = _checked_weights(node_weights, graph.num_nodes)
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
    return Signal(values, None if weights is None else weights.astype(kind), shape)


def _checked_weights(node_weights: Any, num_nodes: int) -> np.ndarray | None:
    if node_weights is None:
        return None
    weights = np.asarray(node_weights, np.float64).reshape(-1)
    if weights.size != num_nodes:
        raise ValueError(f"{num_nodes} nodes need as many node weights, given {weights.size}")
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        node = int(np.argmax(wrong))
        raise ValueError(
            f"node weights are finite and not negative, given {weights[node]} at node {node} "
            f"({int(wrong.sum())} such); 0 marks a missing observation"
        )
    return weights


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
    """The order as an int.

    Raises:
        ValueError: if it is negative or not an integer.
    """
    if int(order) != order or order < 0:
        raise ValueError(f"order is an integer >= 0 (0: piecewise constant, 1: piecewise linear, ...), given {order}")
    return int(order)


def checked_block(block: Any, order: int) -> int:
    """B as an int in 1..order+1; None takes order + 1, which needs no linear solve.

    Raises:
        ValueError: outside that range.
    """
    if block is None:
        return order + 1
    if int(block) != block or not 1 <= block <= order + 1:
        raise ValueError(f"B lies in 1..order+1 = 1..{order + 1}, given {block}; B = 0 is method='admm'")
    return int(block)


def checked_penalty(penalty: Any, channels: int | None, rows: int | None = None) -> Any:
    """The penalty, with finite parameters and a weight that is not negative.

    Args:
        penalty: the penalty.
        channels: of the signal, None without a channel axis.
        rows: where L1 may have a weight for each of so many rows; None allows one number only.

    Raises:
        TypeError: if it has no `value` and `prox`.
        ValueError: for a weight that is negative, not finite or of another shape, or a channel penalty without
            channels.
    """
    if not (hasattr(penalty, "value") and hasattr(penalty, "prox")):
        raise TypeError(f"a penalty has `value` and `prox`, such as sparseopt.L1(10.0); given {penalty!r}")
    if isinstance(penalty, GroupL2) and channels is None:
        raise ValueError("GroupL2 couples the channels of a signal [n, channels]; this one has none: use L1")
    check_parameters(penalty, rows)
    return penalty


def check_parameters(penalty: Any, rows: int | None = None) -> None:
    """See that the numbers of a penalty are finite and its weight is not negative and has its shape.

    Raises:
        ValueError: if not.
    """
    for leaf in jax.tree.leaves(penalty):
        number = np.asarray(leaf).dtype.kind in "biuf"
        if number and not np.all(np.isfinite(np.asarray(leaf))):
            raise ValueError(f"the penalty's parameters must be finite, given {penalty}")
    weight = getattr(penalty, "weight", None)
    if weight is not None:
        if np.ndim(weight) != 0 and not (rows is not None and isinstance(penalty, L1)):
            raise ValueError(
                f"the penalty's weight is one number here, given the shape {np.shape(weight)}; L1 in `trend_filter` "
                "takes a weight for every difference, and a graph takes weights of edges"
            )
        if np.ndim(weight) != 0 and np.shape(weight) != (rows,):
            raise ValueError(
                f"the weight of L1 is one number, or one for each of the {rows} rows of graph.matrix(order + 1), "
                f"given the shape {np.shape(weight)}"
            )
        if np.min(weight) < 0:
            raise ValueError(f"the penalty's weight must not be negative, given {np.min(weight)}")
