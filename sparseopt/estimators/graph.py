"""The trend filter as a scikit-learn regressor and classifier, on a given graph or on nearest neighbours."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse
from scipy.special import expit
from sklearn.base import ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.metrics import d2_tweedie_score, r2_score
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

from sparseopt.core.base.arguments import finite_number, whole_number
from sparseopt.core.base.types import precision
from sparseopt.core.losses.scalar import Logistic, ScalarLoss, check_scalar_loss
from sparseopt.core.penalties.names import BY_WEIGHT
from sparseopt.estimators.base import Fitted
from sparseopt.estimators.samples import (
    check_weights,
    classes_of,
    distinct,
    neighbour_graph,
    node_numbers,
    require_alike,
)
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.method import Settings
from sparseopt.trend.base.signal import check_graph, check_order
from sparseopt.trend.filter import trend_filter
from sparseopt.trend.methods.choice import AUTO, as_method


@dataclasses.dataclass(eq=False, repr=False)
class OnGraph(Fitted):
    """What the regressor and the classifier share: parameters, the graph, the fit at its nodes and beyond them.

    The fields are the parameters of `__init__`, which scikit-learn reads.
    """

    order: int = 0
    alpha: float = 1.0
    graph: Graph | None = None
    _: dataclasses.KW_ONLY
    n_neighbors: int = 10
    penalty: Any = "l1"
    tol: float = 1e-4
    max_steps: int = 20_000
    method: Any = "auto"
    covariates: Any = None
    season: int | None = None
    bounds: Any = None
    monotone: str | None = None

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """As in scikit-learn; settings of a method are `method__B`, `method__rho`, ..."""
        found = super().get_params(deep)
        method: Any = self.method
        settings = dataclasses.asdict(method) if deep and isinstance(method, Settings) else {}
        return found | {f"method__{name}": value for name, value in settings.items()}

    def set_params(self, **params: Any) -> Any:
        """As in scikit-learn; `method__B=2` changes a setting of the method, which may be given by its name."""
        own = {name: value for name, value in params.items() if not name.startswith("method__")}
        super().set_params(**own)
        if settings := {name.removeprefix("method__"): params[name] for name in params.keys() - own.keys()}:
            method: Any = as_method(self.method)
            known = {"name": AUTO} if method is None else {"name": method.name, **dataclasses.asdict(method)}
            # Another method begins with its own defaults.
            self.method = as_method(settings if "name" in settings else {**known, **settings})
        return self

    def fit_nodes(self, X: np.ndarray, y: np.ndarray, weights: np.ndarray, loss: ScalarLoss) -> None:
        """Set the graph, the points of its nodes and the fit from checked samples; called by `fit`, for the warning."""
        penalty, rows = self._check_penalty(), np.flatnonzero(weights > 0)
        beside = {"covariates": self.covariates, "season": self.season}
        if self.graph is None and any(each is not None for each in beside.values()):
            raise ValueError("covariates and season belong to the nodes of a graph: give graph, or leave them out")
        y, weights = y[rows], weights[rows]
        if (wrong := loss.wrong(y)).any():  # a mean of several samples might hide it
            place = tuple(np.argwhere(wrong)[0])
            raise ValueError(
                f"{type(loss).__name__} needs {loss.expected}, given y = {y[place]:g} in row {rows[place[0]]} "
                f"({int(wrong.sum())} such)"
            )
        if self.graph is None:
            first, node = distinct(X[rows])
            self.positions_ = X[rows[first]]
            count = int(self.n_neighbors)
            self.neighbors_ = NearestNeighbors(n_neighbors=min(count, len(first))).fit(self.positions_)
            self.graph_ = neighbour_graph(self.neighbors_, len(first), count)
        else:
            node = node_numbers(X, self.graph)[rows]
            self.positions_ = self.neighbors_ = None
            self.graph_ = self.graph
        count = self.graph_.num_nodes
        mass = np.bincount(node, weights, minlength=count)
        if getattr(loss, "adds_up", False):
            gather = sparse.csr_array((weights, (node, np.arange(len(node)))), shape=(count, len(node)))
            observed = ((gather @ y).T / np.where(mass > 0, mass, 1)).T
        else:
            observed = np.zeros((count, *y.shape[1:]))
            observed[node] = y
            require_alike(y, observed, node, rows, loss)
        options: Any = {"tol": self.tol, "max_steps": self.max_steps, "node_weights": mass, "loss": loss}
        options |= {"bounds": self.bounds, "monotone": self.monotone, **beside}
        found = trend_filter(observed, self.graph_, penalty, self.order, self.method, **options)
        self.solution_ = found = jax.device_get(found)
        self.warn_unless_converged(found, 3)
        fitted = found.value if found.fitted is None else found.fitted
        self.fitted_values_, self.gap_, self.n_iter_ = np.asarray(fitted), float(found.gap), int(found.steps)

    def at(self, X: Any, values: np.ndarray) -> np.ndarray:
        """The values of the nodes at the rows of X, `[m, ...]`; at other points the mean over the nearest nodes."""
        X = validate_data(self, X, reset=False, dtype=np.float64)
        if self.neighbors_ is None:
            return values[node_numbers(X, self.graph_)]
        # The nodes stand first and differ, so a row that is one of them gets its number.
        count = len(self.positions_)
        node = distinct(np.concatenate([self.positions_, X]))[1][count:]
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

    def _check_penalty(self) -> Any:
        """The penalty with weight alpha, after a check of all parameters that both estimators have."""
        if not finite_number(self.alpha) >= 0:
            raise ValueError(f"alpha is the weight of the penalty, a finite number >= 0, given {self.alpha!r}")
        check_order(self.order)
        whole_number("n_neighbors", self.n_neighbors, 1)
        if self.graph is not None:
            check_graph(self.graph)
        make = BY_WEIGHT.get(self.penalty) if isinstance(self.penalty, str) else self.penalty
        if not callable(make):
            raise ValueError(
                f"penalty is one of {', '.join(BY_WEIGHT)}, or a function of the weight such as sparseopt.MCP, given "
                f"{self.penalty!r}"
            )
        return make(float(self.alpha))


@dataclasses.dataclass(eq=False, repr=False)
class GraphTrendFilter(MultiOutputMixin, RegressorMixin, OnGraph):
    """Smooth observations on a graph so that most differences of the fit are exactly zero.

        minimise over b    sum_i s_i f(b[node(i)]; y_i)  +  penalty(Δ^(order+1) b)

    with the sample weights `s_i`, a loss f (the square is `1/2 (y_i - b[node(i)])²`) and a penalty with weight
    `alpha`. `trend_filter` solves it in float64. For labels use `GraphTrendClassifier`.

    With `graph=None`, a sample is a point, a row of X `[m, features]`. The nodes are the distinct points, in the order
    of their first appearance. Two nodes are joined by an edge of weight 1 if one is among the `n_neighbors` nearest
    (Euclidean) neighbours of the other. Scale the features first.

    With a graph, a sample is an observation of one of its nodes: X `[m, 1]` holds node numbers `0..n-1`. Nodes without
    a sample are missing values, and the fit fills them in; cross-validation holds nodes out.

    For the square and Poisson several samples of a node count as their weighted mean with the sum of their weights:
    repeating a sample is the same as doubling its weight. For other losses a mean does not have that property, so the
    samples of a node must be equal.

    Args:
        order: k >= 0; 0 fits piecewise constants, 1 piecewise linear, 2 piecewise quadratic signals.
        alpha: the weight of the penalty as in `trend_filter`, in the units of y times the units of the sample weights;
            the loss is not divided by the number of samples. For L1 at order 0 with the square or Poisson, one edge of
            weight 1 between two plateaus moves the prediction of a plateau of total sample weight s by `alpha / s`
            towards the other. 0 returns the data.
        graph: a `Graph`, or None for the nearest neighbours of the rows of X.
        n_neighbors: the smallest number of neighbours of a point, for the graph and for `predict`; fewer if there are
            fewer points. Not used with a graph.
        penalty: "l1", "l0", "mcp", "scad", "group_l2" (which couples the outputs), or a function of the weight that
            returns a penalty, such as `so.MCP`.
        tol, max_steps, method: as in `trend_filter`.
        covariates, season: as in `trend_filter`, for the nodes of a graph that is given.
        bounds, monotone: as in `trend_filter`, of the fit b.
        loss: "square", "poisson" (counts), "huber", "absolute", or a `ScalarLoss` such as `so.scalar.Quantile(0.9)`.

    Attributes:
        graph_: the `Graph` of the fit.
        fitted_values_: the fit b at the nodes of `graph_`, `[n]`, or `[n, outputs]` for such a y. For Poisson it is the
            logarithm of a rate. It holds the covariates' part and the season; `solution_` has each.
        loss_: the `ScalarLoss` of the fit.
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

    _: dataclasses.KW_ONLY
    loss: Any = "square"

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "GraphTrendFilter":
        """Fit the values of the nodes; returns the estimator.

        Args:
            X: points `[m, features]`, or node numbers `[m, 1]`.
            y: `[m]` or `[m, outputs]`.
            sample_weight: `[m]`, finite and not negative; None is 1 each. 0 drops a sample.

        Raises:
            ValueError, TypeError: for invalid parameters or data, and for a component of the graph without a defined
                fit: one without a sample or, for Poisson, without a positive count.
            RuntimeError: if the computation overflows.

        Warns:
            ConvergenceWarning: if the tolerance was not reached, saying what to try.
        """
        loss = check_scalar_loss(self.loss)
        if getattr(loss, "labels", False) is True:
            raise ValueError(
                f"GraphTrendFilter is a regressor, and {type(loss).__name__} is for labels: use GraphTrendClassifier, "
                "which accepts two labels of any kind, without loss="
            )
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        self.fit_nodes(X, y.astype(np.float64), check_weights(sample_weight, len(X)), loss)
        self.loss_ = loss
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The mean of an observation at nodes `[m, 1]` or points `[m, features]`: `[m]`, or `[m, outputs]`.

        The mean is `fitted_values_`, its exponential for Poisson, and `loss.mean(fitted_values_)` in general. Without a
        graph, a point of the fit gets its node's mean, and any other point the average over its `n_neighbors` nearest
        nodes, weighted by 1 / distance. So at every order the prediction stays in the range of its neighbours: it
        continues a constant but not a slope.
        """
        check_is_fitted(self)
        with precision(np.dtype(np.float64)):
            means = np.asarray(self.loss_.mean(jnp.asarray(self.fitted_values_)))
        return self.at(X, means)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """R², or for Poisson D², the explained fraction of the deviance; averaged over the outputs."""
        found = self.predict(X)
        if getattr(self.loss_, "counts", False) is not True:
            return float(r2_score(y, found, sample_weight=sample_weight))
        columns = (np.asarray(values).reshape(len(found), -1).T for values in (y, found))
        pairs = zip(*columns, strict=True)
        return float(np.mean([d2_tweedie_score(*pair, sample_weight=sample_weight, power=1) for pair in pairs]))


@dataclasses.dataclass(eq=False, repr=False)
class GraphTrendClassifier(ClassifierMixin, OnGraph):
    """Fit the log-odds of two labels on a graph so that most of their differences are exactly zero.

        minimise over b    sum_i s_i (log(1 + exp(b[node(i)])) - p_i b[node(i)])  +  penalty(Δ^(order+1) b)

    with the sample weights `s_i` and `p_i = 1 - label_smoothing / 2` for the second label, `label_smoothing / 2` for
    the first. A sample is a point, or with a graph an observation of one of its nodes, as in `GraphTrendFilter`.
    Several samples of a node count as the proportion of their labels with the sum of their weights.

    More than two classes: `sklearn.multiclass.OneVsRestClassifier(GraphTrendClassifier(...))`.

    Args:
        order, graph, n_neighbors, tol, max_steps, method: as in `GraphTrendFilter`.
        alpha: the weight of the penalty, in the units of the sample weights. For L1 at order 0, one edge of weight 1
            between two plateaus moves the probability of a plateau of total sample weight s by `alpha / s` towards the
            other's.
        penalty: "l1", "l0", "mcp", "scad", or a function of the weight that returns a penalty.
        label_smoothing: in [0, 1). It keeps the log-odds finite if all samples of a component have the same label,
            as in separate clusters of points: the fit there is `log(2 / label_smoothing - 1)` in size. With 0 such a
            component is an error.

    Attributes:
        classes_: the two labels, sorted.
        fitted_values_: the log-odds b of the second label at the nodes of `graph_`, `[n]`; all others are as in
            `GraphTrendFilter`.

    Source: as `GraphTrendFilter`; for label smoothing, Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the
    Inception architecture for computer vision", CVPR 2016, section 7.

    Example:
        >>> X = np.arange(8.0).reshape(-1, 1)
        >>> model = so.GraphTrendClassifier(alpha=0.5, graph=so.Graph.chain(8), label_smoothing=0, tol=1e-6)
        >>> model.fit(X, ["no", "yes", "no", "no", "yes", "yes", "no", "yes"]).predict_proba(X)[:, 1].round(3).tolist()
        [0.375, 0.375, 0.375, 0.375, 0.625, 0.625, 0.625, 0.625]
    """

    alpha: float = 0.1
    _: dataclasses.KW_ONLY
    label_smoothing: float = 0.01

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "GraphTrendClassifier":
        """Fit the log-odds of the nodes; returns the estimator.

        Args:
            X: points `[m, features]`, or node numbers `[m, 1]`.
            y: labels `[m]` with two values, numbers or strings.
            sample_weight: `[m]`, finite and not negative; None is 1 each. 0 drops a sample.

        Raises, warns: as `GraphTrendFilter.fit`; a ValueError too unless there are two classes.
        """
        smoothing = self.label_smoothing
        if not 0 <= finite_number(smoothing) < 1:
            raise ValueError(f"label_smoothing is a number in [0, 1), given {smoothing!r}")
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        weights = check_weights(sample_weight, len(X))
        classes = classes_of(y, weights)
        if len(classes) > 2:
            raise ValueError(
                f"Only binary classification is supported. The type of the target is {type_of_target(y)}, with "
                f"{len(classes)} classes: fit one against the rest by "
                "sklearn.multiclass.OneVsRestClassifier(GraphTrendClassifier(...))"
            )
        proportions = np.where(y == classes[1], 1 - smoothing / 2, smoothing / 2)
        self.fit_nodes(X, proportions, weights, Logistic())
        self.classes_: np.ndarray = classes
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """The log-odds of `classes_[1]`, `[m]`, from the probabilities of `predict_proba`."""
        first, second = np.log(self.predict_proba(X)).T
        return second - first

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probabilities of `classes_` at nodes or points, `[m, 2]`.

        Points that are not in the fit get an average of probabilities, as in `GraphTrendFilter.predict`.
        """
        check_is_fitted(self)
        return self.at(X, expit(self.fitted_values_[:, None] * [-1, 1]))

    def predict(self, X: Any) -> np.ndarray:
        """The more probable label, `[m]`; the first if both are equally probable."""
        first, second = self.predict_proba(X).T
        return self.classes_[(second > first).astype(int)]
