"""Samples at nodes of a graph or at points: what the scikit-learn estimators of the trend filter share."""

import dataclasses
import math
import numbers
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from scipy import sparse
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.validation import validate_data

from sparseopt.core.base.arguments import real_array
from sparseopt.core.losses.scalar import Logistic, Poisson, ScalarLoss, Squared
from sparseopt.core.penalties.names import BY_WEIGHT
from sparseopt.core.problem.problem import Status
from sparseopt.trend.filter import trend_filter
from sparseopt.trend.graph import Graph
from sparseopt.trend.job import Settings
from sparseopt.trend.methods import checked_method
from sparseopt.trend.signal import require_not_negative


class OnGraph(BaseEstimator):
    """What the regressor and the classifier share: parameters, the graph, the fit at its nodes and beyond them."""

    def __init__(
        self,
        order: int,
        alpha: float,
        graph: Graph | None,
        n_neighbors: int,
        penalty: Any,
        tol: float,
        max_steps: int,
        method: Any,
    ) -> None:
        self.order = order
        self.alpha = alpha
        self.graph = graph
        self.n_neighbors = n_neighbors
        self.penalty = penalty
        self.tol = tol
        self.max_steps = max_steps
        self.method = method

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """As of scikit-learn; settings of a method are `method__B`, `method__rho`, ..."""
        found = super().get_params(deep)
        method: Any = self.method
        settings = dataclasses.asdict(method) if deep and isinstance(method, Settings) else {}
        return found | {f"method__{name}": value for name, value in settings.items()}

    def set_params(self, **params: Any) -> Any:
        """As of scikit-learn; `method__B=2` changes a setting of the method, which may be given by its name."""
        own = {name: value for name, value in params.items() if not name.startswith("method__")}
        super().set_params(**own)
        if settings := {name.removeprefix("method__"): params[name] for name in params.keys() - own.keys()}:
            method: Any = {"name": self.method} if isinstance(self.method, str) else self.method
            if not isinstance(method, Mapping):
                method = {"name": method.name, **dataclasses.asdict(method)}
            self.method = checked_method({**method, **settings})
        return self

    def fit_nodes(self, X: np.ndarray, y: np.ndarray, weights: np.ndarray, penalty: Any, loss: Any) -> None:
        """Set the graph, the points of its nodes and the fit from checked samples; called by `fit`, for the warning."""
        if self.graph is not None:
            _node_numbers(X, self.graph)
        rows = np.flatnonzero(weights > 0)
        X, y, weights = X[rows], y[rows], weights[rows]
        _require_domain(y, rows, loss)
        if self.graph is None:
            first, node = _distinct(X)
            self.positions_ = X[first]
            self.neighbors_ = NearestNeighbors(n_neighbors=min(self.n_neighbors, len(first))).fit(self.positions_)
            self.graph_ = _neighbour_graph(self.neighbors_, len(first), self.n_neighbors)
        else:
            node = _node_numbers(X, self.graph)
            self.positions_ = self.neighbors_ = None
            self.graph_ = self.graph
        count = self.graph_.num_nodes
        mass = np.bincount(node, weights, minlength=count)
        if isinstance(loss, Squared | Poisson | Logistic):
            # Exact: up to a constant these losses are linear in y, so those of a node's samples add up to the loss of
            # their weighted mean with the sum of their weights.
            gather = sparse.csr_array((weights, (node, np.arange(len(node)))), shape=(count, len(node)))
            observed = ((gather @ y).T / np.where(mass > 0, mass, 1)).T
        else:
            observed = np.zeros((count, *y.shape[1:]))
            observed[node] = y
            _require_alike(y, observed, node, rows, loss)
        solution = trend_filter(
            observed,
            self.graph_,
            penalty,
            self.order,
            self.method,
            tol=self.tol,
            max_steps=self.max_steps,
            node_weights=mass,
            loss=loss,
        )
        self.solution_ = jax.device_get(solution)
        status = Status(int(self.solution_.status))
        if status is Status.NONFINITE:
            self.solution_.check()
        if status not in (Status.CONVERGED, Status.STATIONARY):
            warnings.warn(
                f"{type(self).__name__} stopped ({status.name}) after {int(solution.steps)} steps with residual "
                f"{float(solution.residual):.3g}: {status.advice}",
                ConvergenceWarning,
                stacklevel=3,
            )
        self.fitted_values_ = np.asarray(self.solution_.value)
        self.gap_ = float(self.solution_.gap)
        self.n_iter_ = int(self.solution_.steps)

    def at(self, X: Any, values: np.ndarray) -> np.ndarray:
        """The values of the nodes at the rows of X, `[m, ...]`; at other points the mean over the nearest nodes."""
        X = validate_data(self, X, reset=False, dtype=np.float64)
        if self.neighbors_ is None:
            return values[_node_numbers(X, self.graph_)]
        # The nodes stand first and differ, so a row that is one of them gets its number.
        count = len(self.positions_)
        node = _distinct(np.concatenate([self.positions_, X]))[1][count:]
        new = node >= count
        found = values[np.where(new, 0, node)]
        if new.any():
            distances, near = self.neighbors_.kneighbors(X[new])
            # The distance of distinct points may round to 0.
            distances = np.maximum(distances, np.finfo(np.float64).tiny)
            shares = distances[:, :1] / distances
            shares /= shares.sum(axis=1, keepdims=True)
            found[new] = np.einsum("mk,mk...->m...", shares, values[near])
        return found

    def checked_penalty(self) -> Any:
        """The penalty of weight alpha, after a check of all parameters that both estimators have."""
        if not (isinstance(self.alpha, numbers.Real) and 0 <= self.alpha < math.inf):
            raise ValueError(f"alpha is the weight of the penalty, a finite number >= 0, given {self.alpha!r}")
        if not (isinstance(self.order, numbers.Integral) and self.order >= 0):
            raise ValueError(
                f"order is an integer >= 0 (0: piecewise constant, 1: piecewise linear, ...), given {self.order!r}"
            )
        if not (isinstance(self.n_neighbors, numbers.Integral) and self.n_neighbors >= 1):
            raise ValueError(f"n_neighbors is an integer >= 1, given {self.n_neighbors!r}")
        if not (self.graph is None or isinstance(self.graph, Graph)):
            raise TypeError(
                f"graph is a sparseopt.Graph or None, given {type(self.graph).__name__}; Graph.from_scipy and "
                "Graph.from_networkx make one"
            )
        make = BY_WEIGHT.get(self.penalty) if isinstance(self.penalty, str) else self.penalty
        if not callable(make):
            raise ValueError(
                f"penalty is one of {', '.join(BY_WEIGHT)}, or a function of the weight such as sparseopt.MCP, given "
                f"{self.penalty!r}"
            )
        return make(float(self.alpha))


def _require_domain(y: np.ndarray, rows: np.ndarray, loss: ScalarLoss) -> None:
    """Raise a ValueError for an observation that the loss does not take; a mean of several might hide it."""
    if not (wrong := loss.wrong(y)).any():
        return
    place = tuple(np.argwhere(wrong)[0])
    raise ValueError(
        f"{type(loss).__name__} takes {loss.expected}, given y = {y[place]:g} in row {rows[place[0]]} "
        f"({int(wrong.sum())} such)"
    )


def _require_alike(y: np.ndarray, observed: np.ndarray, node: np.ndarray, rows: np.ndarray, loss: ScalarLoss) -> None:
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


def checked_weights(sample_weight: Any, count: int) -> np.ndarray:
    """The sample weights `[count]` in float64, 1 each for None; a ValueError if one is negative or all are 0."""
    if sample_weight is None:
        return np.ones(count)
    weights = real_array("sample_weight", sample_weight).astype(np.float64)
    if weights.shape != (count,):
        raise ValueError(f"sample_weight has one entry a sample, the shape ({count},), given {weights.shape}")
    require_not_negative(weights, "sample weights", "in row")
    if not weights.any():
        raise ValueError("every sample weight is zero, which drops all samples; give at least one a positive weight")
    return weights


def _node_numbers(X: np.ndarray, graph: Graph) -> np.ndarray:
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


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first place of each distinct row, in that order, and for every row the number of its distinct row."""
    _, first, member = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    return first[order], rank[member.reshape(-1)]


def _neighbour_graph(search: NearestNeighbors, count: int, n_neighbors: int) -> Graph:
    """An edge wherever one of two points is among the nearest neighbours of the other, itself excluded."""
    if count == 1:
        return Graph.from_edges([], 1)
    nearest = search.kneighbors_graph(n_neighbors=min(n_neighbors, count - 1))
    return Graph.from_scipy(nearest.maximum(nearest.T))
