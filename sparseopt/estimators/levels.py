"""What sparse linear models share: their problems, and the solutions at one level of the penalty or along a path.

`solve` fits one level, `path` and `cross_validate` fit and choose among many. The loss is a mean over the samples, and
so the level of every penalty has the units that it has in scikit-learn, whatever the number of samples.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse
from sklearn.base import is_classifier
from sklearn.model_selection import check_cv
from sklearn.utils.validation import check_is_fitted, validate_data

from sparseopt.core.base.arguments import finite_number, positive_number, real_array, unknown, whole_number
from sparseopt.core.base.thresholds import infinite_unless, largest_ratio
from sparseopt.core.base.types import pytree
from sparseopt.core.losses.data import DataLoss
from sparseopt.core.losses.scalar import ScalarLoss
from sparseopt.core.path import RATIO_TALL, RATIO_WIDE, Path, at_level, largest_level, path
from sparseopt.core.penalties.entries import L1, MCP, SCAD, ElasticNet
from sparseopt.core.penalties.sets import Nonnegative
from sparseopt.core.problem.problem import Problem, Solution, Status
from sparseopt.core.select import RULES, cross_validate
from sparseopt.core.solve import solve
from sparseopt.estimators.base import Fitted

DATA: dict[str, Any] = {"accept_sparse": ("csc", "csr"), "dtype": (np.float64, np.float32)}
# Of an elastic net without a given one, as in scikit-learn.
L1_RATIO = 0.5


@pytree
class NonnegativeNet(ElasticNet):
    """The elastic net plus the indicator of `x >= 0`; prox: the elastic net's, then `max(x, 0)`."""

    def value(self, x: Any) -> Any:
        return super().value(x) + infinite_unless(jnp.all(x >= 0), x)

    def prox(self, x: Any, step: Any) -> Any:
        return jnp.maximum(super().prox(x, step), 0)

    def slack(self, x: Any, dual: Any) -> Any:
        # Below the weight the conjugate is 0.
        above = jnp.maximum(dual, 0)
        return super().slack(x, above) + (above - dual) * x + infinite_unless(x >= 0, x)

    def dual_norm(self, dual: Any) -> Any:
        return largest_ratio(jnp.where(jnp.asarray(self.ridge) > 0, 0, jnp.maximum(dual, 0)), self.weight)

    def entry_terms(self) -> tuple[Any, Any, Any, Any]:
        return self.weight, self.ridge, 0.0, np.inf


@dataclasses.dataclass(eq=False, repr=False)
class SparseLinear(Fitted):
    """What all four share: parameters, the problems of a fit, the answers, the linear predictor.

    The fields are the parameters of `__init__`, which scikit-learn reads. A regressor and two classes have one problem,
    more classes have one each. `loss` is a field of the classes below.
    """

    _: dataclasses.KW_ONLY
    penalty: Any = "l1"
    l1_ratio: float | None = None
    fit_intercept: bool = True
    positive: bool = False
    tol: float = 1e-6
    max_steps: int = 10_000

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    @property
    def sparse_coef_(self) -> sparse.csr_array:
        """The coefficients as a SciPy CSR array, `[1, features]`, or `[classes, features]` for several classes."""
        check_is_fitted(self)
        return sparse.csr_array(np.atleast_2d(self.coef_))

    def fit_targets(self, X: Any, y: np.ndarray, targets: np.ndarray, weights: Any, loss: ScalarLoss) -> None:
        """Set the attributes from checked samples and a row of `targets` for each problem; called by `fit`."""
        positive_number("tol", self.tol)
        whole_number("max_steps", self.max_steps, 1)
        penalty = self._check_penalty()
        # One number for equal weights.
        shares: Any = 1 / len(y) if weights is None else (weights / weights.sum()).astype(X.dtype)
        intercept = bool(self.fit_intercept)
        losses = [DataLoss(loss, X, target.astype(X.dtype), shares, intercept=intercept) for target in targets]
        found = self._solve([Problem(one, penalty) for one in losses], y)
        values = np.stack([solution.value for solution in found]).astype(X.dtype)
        self.coef_ = values[:, : X.shape[1]]
        self.intercept_ = values[:, -1] if intercept else np.zeros(len(values), X.dtype)
        self.solution_, self.loss_ = found[0] if len(found) == 1 else found, loss
        self.gap_, self.n_iter_ = max(float(s.gap) for s in found), max(int(s.steps) for s in found)

    def _solve(self, problems: list[Problem], y: np.ndarray) -> list[Solution]:
        """The solutions of problems whose penalty is that of level 1."""
        raise NotImplementedError

    def _check_penalty(self) -> Any:
        """The penalty at level 1."""
        given = self.penalty
        share = L1_RATIO if self.l1_ratio is None else finite_number(self.l1_ratio)
        if not 0 <= share <= 1:
            raise ValueError(f"l1_ratio is a number from 0 to 1, given {self.l1_ratio!r}")
        if self.l1_ratio is not None and given != "elastic_net":
            raise ValueError(f'l1_ratio is of penalty="elastic_net", given {self.l1_ratio!r} with {given!r:.100}')
        named: dict[str, Any] = {
            "l1": L1(1.0),
            "elastic_net": ElasticNet(share, 1 - share),
            "mcp": MCP(1.0),
            "scad": SCAD(1.0),
        }
        if self.positive:
            named = {"l1": Nonnegative(1.0), "elastic_net": NonnegativeNet(share, 1 - share)}
        if isinstance(given, str) and given in named:
            return named[given]
        if self.positive or isinstance(given, str | type) or not (hasattr(given, "prox") and hasattr(given, "weight")):
            known = f"{', '.join(named)} with positive=True" if self.positive else f"{', '.join(named)}, or an object "
            known += "" if self.positive else "with a weight such as so.L1(1.0)"
            raise ValueError(f"penalty is one of {known}, given {given!r:.100}")
        return given

    def _scores(self, X: Any) -> np.ndarray:
        """The linear predictor, `[m, problems]`."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, **DATA)
        return X @ np.atleast_2d(self.coef_).T + self.intercept_


@dataclasses.dataclass(eq=False, repr=False)
class AtLevel(SparseLinear):
    """A fit at one level of the penalty."""

    alpha: float = 1.0
    _: dataclasses.KW_ONLY
    warm_start: bool = False

    def _solve(self, problems: list[Problem], y: np.ndarray) -> list[Solution]:
        if not finite_number(self.alpha) >= 0:
            raise ValueError(f"alpha is the weight of the penalty, a finite number >= 0, given {self.alpha!r}")
        found = []
        for number, problem in enumerate(problems):
            start = None
            if self.warm_start and hasattr(self, "coef_"):
                ends = [np.atleast_1d(self.intercept_)[:, None]] if self.fit_intercept else []
                last = np.hstack([np.atleast_2d(self.coef_), *ends])
                same = last.shape == (len(problems), *problem.loss.start_shape())
                start = last[number].astype(problem.loss.target.dtype) if same else None
            at = Problem(problem.loss, at_level(problem.penalty, float(self.alpha)))
            found.append(jax.device_get(solve(at, start=start, tol=self.tol, max_steps=self.max_steps)))
            self.warn_unless_converged(found[-1], 4)
        return found


@dataclasses.dataclass(eq=False, repr=False)
class OverPath(SparseLinear):
    """A fit at the level with the best cross-validated error; several classes have one level."""

    _: dataclasses.KW_ONLY
    alphas: Any = 100
    cv: Any = 5
    rule: str = "min"

    def _solve(self, problems: list[Problem], y: np.ndarray) -> list[Solution]:
        if np.ndim(self.alphas) == 0:
            levels = self._levels(problems, whole_number("alphas", self.alphas, 1))
        else:
            levels = np.sort(real_array("alphas", self.alphas).astype(np.float64), axis=None)[::-1]
        if self.rule not in RULES:
            raise ValueError(unknown("rule", self.rule, RULES))
        held = self._folds(y, problems[0].loss.weights)
        whole = [path(problem, levels, tol=self.tol, max_steps=self.max_steps) for problem in problems]
        chosen = [cross_validate(one, held, rule=self.rule) for one in whole]
        table = np.sum([one.fold_errors for one in chosen], axis=0)
        spread = table.std(axis=0, ddof=1) / len(table) ** 0.5
        summed = dataclasses.replace(chosen[0], fold_errors=table, errors=table.mean(axis=0), standard_errors=spread)
        # Twice the sum of the losses, in place of the mean: `select` counts samples.
        paths = [dataclasses.replace(one.path, deviances=len(y) * one.path.deviances) for one in chosen]
        for one in paths:
            for index in np.flatnonzero(~Status.reached(one.statuses))[:1]:
                self.warn_unless_converged(one.at(int(index)), 4)
        self.alpha_, self.alphas_, self.cv_errors_ = summed.level, levels, table.T
        self.path_ = paths[0] if len(paths) == 1 else paths
        return [one.at(summed.index) for one in paths]

    def _levels(self, problems: list[Problem], count: int) -> np.ndarray:
        """Falling levels, from the first at which no coefficient enters in any problem."""
        penalty, loss = self._check_penalty(), problems[0].loss
        if hasattr(penalty, "ridge"):
            # A ridge moves no entry away from 0 or back.
            penalty = Nonnegative(penalty.weight) if self.positive else L1(penalty.weight)
        if not np.any(np.asarray(penalty.weight) > 0):
            raise ValueError("a penalty whose weight is 0, such as l1_ratio=0, has no first level: give alphas")
        first = max(largest_level(Problem(problem.loss, penalty)) for problem in problems) or 1.0
        ratio = RATIO_WIDE if loss.target.size < loss.start_shape()[0] else RATIO_TALL
        return first * ratio ** np.linspace(0, 1, count)

    def _folds(self, y: np.ndarray, weights: Any) -> np.ndarray:
        """The fold that holds each sample out."""
        held = np.full(len(y), -1)
        splits = list(check_cv(self.cv, y, classifier=is_classifier(self)).split(np.zeros((len(y), 1)), y))
        for fold, (_, out) in enumerate(splits):
            held[out] = fold
        if sum(len(out) for _, out in splits) != len(y) or (held < 0).any():
            raise ValueError("the folds of cv hold out every sample once, such as those of KFold")
        if np.ndim(weights):
            # A fold without weight has no error.
            held[weights == 0] = held[np.argmax(weights > 0)]
        return held

    def plot_path(self, ax: Any = None) -> Any:
        """Draw the coefficients over the level, with the chosen level marked; returns the matplotlib axes.

        Each coefficient has a colour, and with several classes each class.
        """
        import matplotlib.pyplot as plt

        check_is_fitted(self)
        ax = plt.subplots()[1] if ax is None else ax
        paths: list[Path] = self.path_ if isinstance(self.path_, list) else [self.path_]
        for number, one in enumerate(paths):
            values = one.values[:, : self.n_features_in_]
            several = {"color": f"C{number}"} if len(paths) > 1 else {}
            lines = ax.plot(self.alphas_, values[:, np.unique(values.indices)].toarray(), **several)
            if several and lines:
                lines[0].set_label(f"class {self.classes_[number]}")
        ax.axvline(self.alpha_, color="black", linestyle="--", label=f"chosen, {self.alpha_:.3g}")
        # The path runs from left to right.
        ax.set(xscale="log", xlabel="alpha", ylabel="coefficient", xlim=(self.alphas_[0], self.alphas_[-1]))
        ax.legend()
        return ax
