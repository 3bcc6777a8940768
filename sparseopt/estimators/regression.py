"""Sparse linear models as scikit-learn regressors and classifiers, at one level of the penalty or along a path."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy.special import expit
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.metrics import d2_tweedie_score
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from sparseopt.core.base.types import precision
from sparseopt.core.losses.scalar import Logistic, check_scalar_loss
from sparseopt.estimators.levels import DATA, AtLevel, OverPath, SparseLinear
from sparseopt.estimators.samples import check_weights, classes_of


@dataclasses.dataclass(eq=False, repr=False)
class Regression(RegressorMixin, SparseLinear):
    """Targets, predictions and the score of a regressor."""

    _: dataclasses.KW_ONLY
    loss: Any = "square"

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Fit the coefficients; returns the estimator.

        Args:
            X: dense or SciPy sparse, `[samples, features]`; float32 stays float32.
            y: `[samples]`.
            sample_weight: `[samples]`, finite and not negative; None is 1 each. 0 drops a sample.

        Raises:
            ValueError, TypeError: for invalid parameters or data.
            RuntimeError: if the computation overflows.

        Warns:
            ConvergenceWarning: if the tolerance was not reached, saying what to try.
        """
        loss = check_scalar_loss(self.loss)
        if getattr(loss, "labels", False) is True:
            raise ValueError(f"{type(loss).__name__} is a loss of labels: use SparseClassifier or SparseClassifierCV")
        X, y = validate_data(self, X, y, y_numeric=True, **DATA)
        weights = None if sample_weight is None else check_weights(sample_weight, X.shape[0])
        self.fit_targets(X, y, y[None], weights, loss)
        self.coef_, self.intercept_ = self.coef_[0], self.intercept_[0]
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The mean of y, `[samples]`: the linear predictor, for Poisson its exponential."""
        scores = self._scores(X)[:, 0]
        with precision(scores.dtype):
            return np.asarray(self.loss_.mean(jnp.asarray(scores)))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """R², or for Poisson D², the explained fraction of the deviance."""
        if getattr(self.loss_, "counts", False) is True:
            return float(d2_tweedie_score(y, self.predict(X), sample_weight=sample_weight, power=1))
        return float(super().score(X, y, sample_weight))


def _is_logistic(model: Any) -> bool:
    return model.loss == "logistic" or isinstance(model.loss, Logistic)


@dataclasses.dataclass(eq=False, repr=False)
class Classification(ClassifierMixin, SparseLinear):
    """Targets, scores and labels of a classifier."""

    _: dataclasses.KW_ONLY
    loss: Any = "logistic"

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Fit the coefficients; returns the estimator.

        Args:
            X: dense or SciPy sparse, `[samples, features]`; float32 stays float32.
            y: labels `[samples]`, numbers or strings.
            sample_weight: `[samples]`, finite and not negative; None is 1 each. 0 drops a sample.

        Raises, warns: as `SparseRegressor.fit`; a ValueError too for a single class.
        """
        loss = check_scalar_loss(self.loss)
        if getattr(loss, "labels", False) is not True:
            raise ValueError(f"{type(loss).__name__} is no loss of labels: use SparseRegressor or SparseRegressorCV")
        X, y = validate_data(self, X, y, **DATA)
        check_classification_targets(y)
        weights = None if sample_weight is None else check_weights(sample_weight, X.shape[0])
        classes = classes_of(y, np.ones(len(y)) if weights is None else weights)
        apart = classes[1:] if len(classes) == 2 else classes
        other = -1.0 if loss.wrong(np.zeros(1)).any() else 0.0
        self.classes_: np.ndarray = classes
        self.fit_targets(X, y, np.where(y == apart[:, None], 1.0, other), weights, loss)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """The linear predictor of `classes_[1]`, `[samples]`; of every class `[samples, classes]` if there are more."""
        scores = self._scores(X)
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: Any) -> np.ndarray:
        """The label with the largest score, `[samples]`; of two, the second if its score is above 0."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)]

    @available_if(_is_logistic)
    def predict_proba(self, X: Any) -> np.ndarray:
        """The probabilities of `classes_`, `[samples, classes]`; more than two are scaled to the sum 1."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            return expit(np.stack([-scores, scores], axis=1))
        shares = expit(scores)
        return shares / shares.sum(axis=1, keepdims=True)


@dataclasses.dataclass(eq=False, repr=False)
class SparseRegressor(Regression, AtLevel):
    """A linear model most of whose coefficients are exactly zero.

        minimise over w, c    sum_i s_i f(x_i · w + c; y_i) / sum_i s_i  +  alpha penalty(w)

    with the sample weights `s_i` and a loss f; the square is `1/2 (y_i - x_i · w - c)²`, as in scikit-learn's Lasso.

    Args:
        alpha: the weight of the penalty on the mean loss. 0 is no penalty.
        penalty: "l1", the sum of `|w_j|`; "elastic_net", the sum of `l1_ratio |w_j| + (1 - l1_ratio) / 2 w_j²`; "mcp"
            or "scad", whose bias on large coefficients is small, with the weight alpha; or an object such as
            `so.L1(weights)`, whose weights are multiplied by alpha.
        l1_ratio: from 0 to 1, of the elastic net only; None is 0.5 there.
        fit_intercept: whether there is a c; it has no penalty.
        positive: whether no coefficient may be negative, for "l1" and "elastic_net".
        tol: bound on the relative duality gap; for "mcp" and "scad", which have none, on the stationarity.
        max_steps: of the solver.
        warm_start: whether `fit` starts at the last fit, if it has the same shape.
        loss: "square", "huber", "absolute", "poisson" (counts, with the logarithm of the mean linear), or a
            `ScalarLoss` such as `so.scalar.Quantile(0.9)`.

    Attributes:
        coef_: w, `[features]`.
        sparse_coef_: the same as a SciPy CSR array `[1, features]`.
        intercept_: c, 0 without an intercept.
        gap_: the relative duality gap, an upper bound on the relative suboptimality; NaN without a certificate.
        n_iter_: the number of steps.
        solution_: the `Solution` of `so.solve`.
        loss_: the `ScalarLoss` of the fit.

    Source: Tibshirani, "Regression shrinkage and selection via the lasso", JRSS B 58 (1996).

    Example:
        >>> X = np.random.default_rng(0).standard_normal((50, 200))
        >>> model = so.SparseRegressor(alpha=0.1).fit(X, X[:, 0] - 2 * X[:, 1] + 3)
        >>> np.flatnonzero(model.coef_), round(float(model.intercept_))
        (array([0, 1]), 3)
    """


@dataclasses.dataclass(eq=False, repr=False)
class SparseClassifier(Classification, AtLevel):
    """A linear classifier most of whose coefficients are exactly zero.

    The problem is that of `SparseRegressor` with a loss of labels. More than two classes are fitted one against the
    rest.

    Args:
        alpha: the weight of the penalty on the mean loss; for scikit-learn's LogisticRegression, `1 / (C samples)`.
        penalty, l1_ratio, fit_intercept, positive, tol, max_steps, warm_start: as in `SparseRegressor`.
        loss: "logistic", "squared_hinge", or a `ScalarLoss` of labels.

    Attributes:
        classes_: the labels, sorted.
        coef_: `[1, features]`, for more than two classes `[classes, features]`.
        intercept_: `[1]` or `[classes]`.
        gap_: as in `SparseRegressor`, the largest of the classes.
        n_iter_: as in `SparseRegressor`, the largest of the classes.
        solution_: as in `SparseRegressor`; for more than two classes a list.

    Example:
        >>> X = np.random.default_rng(0).standard_normal((200, 20))
        >>> model = so.SparseClassifier(alpha=0.1).fit(X, np.where(X[:, 3] > 0, "yes", "no"))
        >>> np.flatnonzero(model.coef_), model.predict(np.eye(20)[[3]])
        (array([3]), array(['yes'], dtype='<U3'))
    """

    alpha: float = 0.01


@dataclasses.dataclass(eq=False, repr=False)
class SparseRegressorCV(Regression, OverPath):
    """`SparseRegressor` at the level that cross-validation chooses from a path.

    Args:
        alphas: the levels, or their number: from the first at which all coefficients are 0, down to 0.001 times that,
            or 0.01 with fewer samples than features.
        cv: the number of folds, or what else scikit-learn accepts that holds out every sample once.
        rule: "min" for the smallest error, "one_se" for the largest level within one standard error of it.
        penalty, l1_ratio, fit_intercept, positive, tol, max_steps, loss: as in `SparseRegressor`.

    Attributes:
        alpha_: the chosen level.
        alphas_: falling, `[alphas]`.
        cv_errors_: the mean deviance of the samples held out, `[alphas, folds]`; of the square the mean squared error.
        path_: the `Path` of all samples, in float64; its objectives are those of the mean loss. All others are as in
            `SparseRegressor`, at the chosen level.

    Example:
        >>> X = np.random.default_rng(0).standard_normal((60, 100))
        >>> model = so.SparseRegressorCV(rule="one_se").fit(X, X[:, 0] - 2 * X[:, 1] + X[:, 2:5].sum(axis=1))
        >>> np.flatnonzero(model.coef_)
        array([0, 1, 2, 3, 4])
    """


@dataclasses.dataclass(eq=False, repr=False)
class SparseClassifierCV(Classification, OverPath):
    """`SparseClassifier` at the level that cross-validation chooses from a path.

    More than two classes have one level, chosen by the sum of their errors.

    Args:
        alphas, cv, rule: as in `SparseRegressorCV`; a number of folds has equal shares of each label.
        penalty, l1_ratio, fit_intercept, positive, tol, max_steps, loss: as in `SparseClassifier`.

    Attributes:
        path_: as in `SparseRegressorCV`; for more than two classes a list. The level and the errors are as there, and
            all others as in `SparseClassifier`.
    """
