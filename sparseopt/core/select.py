"""The choice of a level of a path: by criteria that count degrees of freedom, or by cross-validation.

With DEV the deviance, N the number of observations and df the degrees of freedom:

    gcv    (DEV / N) / (1 - df / N)²
    aic    N log(DEV / N) + 2 df         or DEV + 2 df          if the mean determines the variance, as of counts
    bic    N log(DEV / N) + log(N) df    or DEV + log(N) df

Source: Golub, Heath and Wahba, Technometrics 21 (1979); Akaike (1974); Schwarz (1978); Hastie, Tibshirani and Friedman,
"The Elements of Statistical Learning", section 7.10, for the rule of one standard error.
"""

import dataclasses
from typing import Any, Generic, Self, TypeVar

import numpy as np

from sparseopt.core.base.arguments import unknown, whole_number
from sparseopt.core.base.types import precision
from sparseopt.core.path import Levels, Path, path
from sparseopt.core.problem.problem import Problem, Status
from sparseopt.core.working_sets.columns import columns_of

P = TypeVar("P", bound=Levels)
CRITERIA = ("gcv", "aic", "bic")
# How many standard errors above the smallest error a rule allows.
RULES = {"min": 0.0, "half_se": 0.5, "one_se": 1.0}
# Beyond this share of N the criteria of a least squares fit follow the noise.
MOST_FREEDOM = 0.5


class Chosen(Generic[P]):
    """A chosen level of a path."""

    path: P
    index: Any

    @property
    def level(self) -> float:
        """The chosen level."""
        return float(self.path.levels[self.index])

    @property
    def value(self) -> np.ndarray:
        """The answer at the chosen level, with all observations."""
        return self.path.at(self.index).value


@dataclasses.dataclass(frozen=True)
class Selection(Chosen[P]):
    """A level chosen with a criterion.

    Attributes:
        path: the levels to choose from.
        criterion: "gcv", "aic" or "bic".
        curve: the criterion at every level, `[levels]`; +inf where the degrees of freedom are too many for it.
        index: the level with the smallest criterion.
    """

    path: P
    criterion: str
    curve: np.ndarray
    index: int


def select(path: Path, criterion: str = "bic") -> Selection[Path]:
    """Choose the level of a path with the best value of a criterion.

    Of least squares, levels with more degrees of freedom than half of the observations are left out.

    Raises:
        ValueError: for another criterion, and as `Path.degrees_of_freedom`.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> A = rng.standard_normal((80, 100))
        >>> b = 3 * A[:, 0] - 2 * A[:, 1] + rng.standard_normal(80)
        >>> chosen = so.select(so.path(so.Problem(so.LeastSquares(A, b), so.L1(1.0))))
        >>> np.flatnonzero(chosen.value)[:2]
        array([0, 1])
    """
    if not isinstance(path, Path):
        raise TypeError(
            f"select takes what so.path returns, given {type(path).__name__}; for graphs there is so.trend.select"
        )
    if criterion not in CRITERIA:
        raise ValueError(unknown("criterion", criterion, CRITERIA))
    deviances, freedom, count = path.deviances, path.degrees_of_freedom, path.observations
    known = getattr(path.loss, "known_variance", False)
    with np.errstate(divide="ignore", invalid="ignore"):
        if criterion == "gcv":
            curve = deviances / count / (1 - freedom / count) ** 2
        else:
            misfit = deviances if known else count * np.log(deviances / count)
            curve = misfit + (2.0 if criterion == "aic" else np.log(count)) * freedom
    if not known or criterion == "gcv":
        curve = np.where(freedom <= MOST_FREEDOM * count, curve, np.inf)
    return Selection(path, criterion, curve, int(np.argmin(curve)))


@dataclasses.dataclass(frozen=True)
class CrossValidation(Chosen[P]):
    """A level chosen by held-out observations; `value` is the answer with all of them.

    Attributes:
        path: with all observations.
        fold_errors: the mean deviance of the held-out observations, `[folds, levels]`.
        errors: its mean over the folds, `[levels]`.
        standard_errors: of that mean, `[levels]`.
        folds: the fold that held every observation out, `[rows]`.
        rule: "min", "half_se" or "one_se".
        statuses: the `Status` of the folds' levels, `[folds, levels]`.
    """

    path: P
    fold_errors: np.ndarray
    errors: np.ndarray
    standard_errors: np.ndarray
    folds: np.ndarray
    rule: str
    statuses: np.ndarray

    def check(self) -> Self:
        """Return self if every level of the path and of every fold converged.

        Raises:
            RuntimeError: otherwise, naming levels and what to try.
        """
        self.path.check()
        good = np.isin(self.statuses, (Status.CONVERGED, Status.STATIONARY))
        if good.all():
            return self
        fold, level = np.argwhere(~good)[0]
        status = Status(int(self.statuses[fold, level]))
        raise RuntimeError(
            f"{int((~good).sum())} of {good.size} levels of the folds did not converge, the first in fold {fold} at "
            f"{self.path.named(int(level))}: {status.name}; {status.advice}"
        )

    @property
    def index(self) -> int:
        return self.index_by(self.rule)

    def index_by(self, rule: str) -> int:
        """The level that a rule chooses: of the smallest error, or the largest within half or one standard error of it.

        A ValueError for an unknown rule.
        """
        if rule not in RULES:
            raise ValueError(unknown("rule", rule, RULES))
        best = int(np.argmin(self.errors))
        return int(np.argmax(self.errors <= self.errors[best] + RULES[rule] * self.standard_errors[best]))


def cross_validate(
    problem: Problem,
    levels: Any = None,
    num: int = 100,
    *,
    folds: Any = 5,
    seed: int = 0,
    rule: str = "min",
    ratio: float | None = None,
    tol: float = 1e-6,
    max_steps: int = 10_000,
) -> CrossValidation[Path]:
    """Choose a level by the deviance of held-out observations.

    Args:
        problem: as in `path`.
        levels: as in `path`; for a fold times its share of the weights, since losses are sums.
        num: as in `path`.
        folds: their number, drawn at random, for labels with equal shares of each; or the fold of every row, `[rows]`.
        seed: of the draw.
        rule: "min" for the level of the smallest error, "half_se" or "one_se" for the largest level within half a
            standard error or one of it.
        ratio: as in `path`.
        tol: as in `path`.
        max_steps: as in `path`.

    Raises:
        ValueError: as `path`, and for folds or a rule that make no sense.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> A = rng.standard_normal((80, 100))
        >>> b = 3 * A[:, 0] - 2 * A[:, 1] + rng.standard_normal(80)
        >>> chosen = so.cross_validate(so.Problem(so.LeastSquares(A, b), so.L1(1.0)), rule="one_se")
        >>> np.flatnonzero(chosen.value)
        array([0, 1, 3])
    """
    if rule not in RULES:
        raise ValueError(unknown("rule", rule, RULES))
    whole = path(problem, levels, num, ratio=ratio, tol=tol, max_steps=max_steps)
    loss = problem.loss
    count = np.shape(loss.target)[0]
    weights = np.ones(count) if loss.weights is None else np.broadcast_to(loss.weights, count).astype(float)
    held = _folds(loss, weights, folds, seed)
    errors, statuses = [], []
    for fold in np.unique(held):
        out = (held == fold) & (weights > 0)
        within = dataclasses.replace(loss, weights=np.where(out, 0, weights))
        # The sum of a loss grows with the rows: the same level of their mean.
        share = within.weights.sum() / weights.sum()
        found = path(Problem(within, problem.penalty), share * whole.levels, tol=tol, max_steps=max_steps)
        if not np.isfinite(found.objectives).all():
            raise RuntimeError(f"without fold {fold} a level ended {Status.NONFINITE.name}: scale the columns")
        errors.append(_deviances(loss, weights, out, found))
        statuses.append(found.statuses)
    table = np.array(errors)
    spread = table.std(axis=0, ddof=1) / len(table) ** 0.5
    return CrossValidation(whole, table, table.mean(axis=0), spread, held, rule, np.array(statuses))


def _deviances(loss: Any, weights: np.ndarray, out: np.ndarray, found: Path) -> np.ndarray:
    """The mean deviance of the rows `out` at every level."""
    matrix, values, shift = columns_of(loss.matrix), found.values, 0.0
    if matrix.ones:
        values, shift = values[:, :-1], values[:, [-1]].toarray().T
    # Only columns that some level uses.
    used = np.unique(values.indices)
    rows = matrix.matrix[:, used][out] @ values[:, used].T
    fits = np.asarray(rows.todense() if hasattr(rows, "todense") else rows) + shift
    target = np.asarray(loss.target, float)[out][:, None]
    with precision(np.dtype(np.float64)):
        terms = np.asarray(loss.scalar.value(fits, np.broadcast_to(target, fits.shape)))
    return 2 * weights[out] @ terms / weights[out].sum()


def _folds(loss: Any, weights: np.ndarray, folds: Any, seed: int) -> np.ndarray:
    """The fold of every row."""
    count = weights.size
    if np.ndim(folds):
        held = np.asarray(folds)
        if held.shape != (count,) or np.unique(held[weights > 0]).size < 2:
            raise ValueError(f"folds are a number, or one of at least two labels for each of {count} rows")
        return held
    seen = np.flatnonzero(weights > 0)
    folds = whole_number("folds", folds, 2, seen.size, "of the rows with a positive weight")
    rng = np.random.default_rng(seed)
    order = rng.permutation(seen)
    if getattr(loss.scalar, "labels", False):
        order = order[np.argsort(np.asarray(loss.target)[order], kind="stable")]
    held = np.zeros(count, np.int64)
    held[order] = np.arange(seen.size) % folds
    return held
