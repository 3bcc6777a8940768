"""Floor 5: the trend filter as a scikit-learn regressor, on a given graph or on the nearest neighbours of points."""

import math
import numbers
import warnings
from typing import Any

import jax
import numpy as np
from scipy import sparse

from sparseopt.core.arguments import real_array
from sparseopt.core.penalty_names import BY_WEIGHT
from sparseopt.core.problem import Status
from sparseopt.trend.filter import trend_filter
from sparseopt.trend.graph import Graph
from sparseopt.trend.signal import require_not_negative

try:
    from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neighbors import NearestNeighbors
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "GraphTrendFilter needs scikit-learn 1.6 or newer: pip install 'sparseopt[sklearn]'", name=error.name
    ) from error


class GraphTrendFilter(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Smooth observations on a graph so that few differences of the fit are not zero.

        minimise over b    1/2 sum_i s_i (y_i - b[node(i)])²  +  penalty(Δ^(order+1) b)

    with the sample weights `s_i` and a penalty of weight `alpha`. It is solved by `trend_filter`, in float64.

    With `graph=None` a sample is a point, a row of X `[m, features]`. The nodes are the distinct points, in the order
    of their first appearance. Two nodes are joined by an edge of weight 1 if one is among the `n_neighbors` nearest
    (Euclidean) neighbours of the other. Scale the features first.

    With a graph a sample is an observation of one of its nodes: X `[m, 1]` holds node numbers `0..n-1`. Nodes without a
    sample are missing values, and the fit fills them in; cross-validation holds nodes out.

    Several samples of a node count as their weighted mean with the sum of their weights: repeating a sample is the same
    as doubling its weight.

    Args:
        order: k >= 0; 0 fits piecewise constants, 1 piecewise linear, 2 piecewise quadratic signals.
        alpha: the weight of the penalty as in `trend_filter`, in the units of y times those of the sample weights; the
            loss is not divided by the number of samples. For L1 at order 0, one edge of weight 1 between two plateaus
            moves a plateau of total sample weight s by `alpha / s` towards the other. 0 returns the data.
        graph: a `Graph`, or None for the nearest neighbours of the rows of X.
        n_neighbors: the least number of neighbours of a point, for the graph and for `predict`; fewer if there are
            fewer points. Not used with a graph.
        penalty: "l1", "l0", "mcp", "scad", "group_l2" (which couples the outputs), or a function of the weight that
            returns a penalty, such as `so.MCP`.
        tol, max_steps, method: of `trend_filter`.

    Attributes:
        graph_: the `Graph` of the fit.
        fitted_values_: the fit at the nodes of `graph_`, `[n]`, or `[n, outputs]` for such a y.
        solution_: the `Solution` of `trend_filter` with NumPy arrays.
        gap_: its relative duality gap, an upper bound on the relative suboptimality; NaN without a certificate.
        n_iter_: the number of steps.
        n_features_in_: the number of columns of X.
        positions_: the points of the nodes, `[n, features]`; None with a graph.
        neighbors_: the fitted `NearestNeighbors` of those points; None with a graph.

    Source: Wang, Sharpnack, Smola, Tibshirani, "Trend filtering on graphs", JMLR 17 (2016).

    Example:
        >>> X = np.arange(6.0).reshape(-1, 1)
        >>> y = np.array([0.1, -0.1, 0.0, 5.1, 4.9, 5.0])
        >>> model = so.GraphTrendFilter(order=0, alpha=0.3, graph=so.Graph.chain(6), tol=1e-6)
        >>> model.fit(X[[0, 1, 2, 3, 5]], y[[0, 1, 2, 3, 5]]).predict(X).round(3).tolist()
        [0.1, 0.1, 0.1, 4.9, 4.9, 4.9]
    """

    def __init__(
        self,
        order: int = 0,
        alpha: float = 1.0,
        graph: Graph | None = None,
        *,
        n_neighbors: int = 10,
        penalty: Any = "l1",
        tol: float = 1e-4,
        max_steps: int = 20_000,
        method: str = "auto",
    ) -> None:
        self.order = order
        self.alpha = alpha
        self.graph = graph
        self.n_neighbors = n_neighbors
        self.penalty = penalty
        self.tol = tol
        self.max_steps = max_steps
        self.method = method

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "GraphTrendFilter":
        """Fit the values of the nodes; returns the estimator.

        Args:
            X: points `[m, features]`, or node numbers `[m, 1]`.
            y: `[m]` or `[m, outputs]`.
            sample_weight: `[m]`, finite and not negative; None is 1 each. 0 drops a sample.

        Raises:
            ValueError, TypeError: on parameters or data that do not fit, and for a component of the graph without a
                sample, where no fit is defined.
            RuntimeError: if the computation overflows.

        Warns:
            ConvergenceWarning: if the tolerance was not reached, saying what to try.
        """
        penalty = self._checked_penalty()
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        weights = _checked_weights(sample_weight, len(X))
        if self.graph is not None:
            _node_numbers(X, self.graph)
        seen = weights > 0
        X, y, weights = X[seen], y[seen].astype(np.float64), weights[seen]
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
        gather = sparse.csr_array((weights, (node, np.arange(len(node)))), shape=(count, len(node)))
        means = ((gather @ y).T / np.where(mass > 0, mass, 1)).T
        solution = trend_filter(
            means, self.graph_, penalty, self.order, self.method, self.tol, self.max_steps, node_weights=mass
        )
        self.solution_ = jax.device_get(solution)
        status = Status(int(self.solution_.status))
        if status is Status.NONFINITE:
            self.solution_.check()
        if status not in (Status.CONVERGED, Status.STATIONARY):
            warnings.warn(
                f"GraphTrendFilter stopped ({status.name}) after {int(solution.steps)} steps with residual "
                f"{float(solution.residual):.3g}: {status.advice}",
                ConvergenceWarning,
                stacklevel=2,
            )
        self.fitted_values_ = np.asarray(self.solution_.value)
        self.gap_ = float(self.solution_.gap)
        self.n_iter_ = int(self.solution_.steps)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The fit at nodes `[m, 1]` of the graph, or at points `[m, features]`: `[m]`, or `[m, outputs]`.

        Without a graph, a point of the fit gets its fitted value, and any other point the mean of the fitted values at
        its `n_neighbors` nearest nodes, weighted by 1 / distance. So at every order the prediction stays in the range
        of its neighbours: it continues a constant but not a slope.
        """
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        if self.neighbors_ is None:
            return self.fitted_values_[_node_numbers(X, self.graph_)]
        # The nodes stand first and differ, so a row that is one of them gets its number.
        count = len(self.positions_)
        node = _distinct(np.concatenate([self.positions_, X]))[1][count:]
        new = node >= count
        found = self.fitted_values_[np.where(new, 0, node)]
        if new.any():
            distances, near = self.neighbors_.kneighbors(X[new])
            # The distance of distinct points may round to 0.
            distances = np.maximum(distances, np.finfo(np.float64).tiny)
            shares = distances[:, :1] / distances
            shares /= shares.sum(axis=1, keepdims=True)
            found[new] = np.einsum("mk,mk...->m...", shares, self.fitted_values_[near])
        return found

    def _checked_penalty(self) -> Any:
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


def _checked_weights(sample_weight: Any, count: int) -> np.ndarray:
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
