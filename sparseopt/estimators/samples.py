"""Samples of an estimator, which are points or observations of nodes, as the nodes of a graph."""

from typing import Any

import numpy as np

from sparseopt.core.base.arguments import real_array
from sparseopt.core.losses.scalar import ScalarLoss
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.signal import require_not_negative


def require_alike(y: np.ndarray, observed: np.ndarray, node: np.ndarray, rows: np.ndarray, loss: ScalarLoss) -> None:
    """Raise a ValueError if samples of one node differ; `observed` is the last one at every node."""
    differ = (y != observed[node]).reshape(len(y), -1).any(axis=1)
    if not differ.any():
        return
    first = int(np.argmax(differ))
    last = int(np.flatnonzero(node == node[first])[-1])
    raise ValueError(
        f"with {type(loss).__name__} the samples of a node must be equal, since no single value stands for several; "
        f"given {y[first]} in row {rows[first]} and {y[last]} in row {rows[last]}, the same node "
        f"({len(np.unique(node[differ]))} such nodes): keep one value of each, such as their median, or use "
        'loss="square"'
    )


def check_weights(sample_weight: Any, count: int) -> np.ndarray:
    """The sample weights `[count]` in float64, 1 each for None; a ValueError if one is negative or all are 0."""
    if sample_weight is None:
        return np.ones(count)
    weights = real_array("sample_weight", sample_weight).astype(np.float64)
    if weights.shape != (count,):
        raise ValueError(f"sample_weight has one entry per sample, the shape ({count},), given {weights.shape}")
    require_not_negative(weights, "sample weights", "in row")
    if not weights.any():
        raise ValueError("every sample weight is zero, which drops all samples; give at least one a positive weight")
    return weights


def classes_of(y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The labels of the samples with a positive weight, sorted; a ValueError for a single one."""
    classes = np.unique(y[weights > 0])
    if len(classes) < 2:
        raise ValueError(
            f"a classifier needs samples of two classes, given one class, {classes[0]!r}, in the samples with a "
            "positive weight"
        )
    return classes


def node_numbers(X: np.ndarray, graph: Graph) -> np.ndarray:
    """The node of each sample, `[m]`; a ValueError for a row that names no node."""
    if X.shape[1] != 1:
        raise ValueError(f"with a graph, X is one column of node numbers, [m, 1]; given the shape {X.shape}")
    column = X[:, 0]
    wrong = (column != np.rint(column)) | (column < 0) | (column >= graph.num_nodes)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"X holds {column[row]:g} in row {row} ({int(wrong.sum())} such rows); the nodes of this graph are the "
            f"whole numbers 0..{graph.num_nodes - 1}"
        )
    return column.astype(np.int64)


def distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first place of each distinct row, in that order, and for every row the number of its distinct row."""
    _, first, member = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return first[order], np.argsort(order)[member.reshape(-1)]


def neighbour_graph(search: Any, count: int, n_neighbors: int) -> Graph:
    """A graph with an edge between two points if one is among the other's nearest neighbours, itself excluded."""
    if count == 1:
        return Graph.from_edges([], 1)
    nearest = search.kneighbors_graph(n_neighbors=min(n_neighbors, count - 1))
    return Graph.from_scipy(nearest.maximum(nearest.T))
