"""The choice of a level of a path: by criteria that count degrees of freedom, or by cross-validation.

With DEV the deviance (for the square the weighted sum of squares), N the number of observations, df the degrees of
freedom and sigma the standard deviation of the noise:

    gcv    (DEV / N) / (1 - df / N)²,  df <= N / 2           needs no sigma
    sure   (DEV + 2 sigma² df) / N - sigma²                  an unbiased estimate of the mean squared error (L1)
    aic    DEV / sigma² + 2 df,       or  N log(DEV / N) + 2 N (df + 1) / (N - df - 2)  if sigma is not known
    bic    DEV / sigma² + log(N) df,  or  N log(DEV / N) + log(N) df,  df <= N / 2      if sigma is not known

For counts and labels sigma² is the dispersion, 1 if their variance is that of a Poisson or binomial distribution.

Source: Golub, Heath and Wahba, Technometrics 21 (1979); Stein, Annals of Statistics 9 (1981); Akaike (1974); Schwarz
(1978); Hurvich, Simonoff and Tsai, JRSS B 60 (1998), for the corrected aic; Zou, Hastie and Tibshirani, Annals of
Statistics 35 (2007), for their use with a count of dimensions; Hastie, Tibshirani and Friedman, "The Elements of
Statistical Learning", section 7.10, for rules by the standard error.
"""

import dataclasses
import math
from typing import Any, Generic, Self, TypeVar

import numpy as np

from sparseopt.core.base.arguments import is_positive, unknown, whole_number
from sparseopt.core.base.types import Observer
from sparseopt.core.path import Levels
from sparseopt.core.problem.problem import Status

P = TypeVar("P", bound=Levels)
CRITERIA = ("gcv", "sure", "aic", "bic")
# How many standard errors above the smallest error a rule allows.
RULES = {"min": 0.0, "half_se": 0.5, "one_se": 1.0}
# Beyond this share of N, criteria without sigma fall towards the data themselves.
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
    def weight(self) -> float:
        """Another name for `level`, which is the weight of a trend filter's penalty."""
        return self.level

    @property
    def value(self) -> np.ndarray:
        """The answer at the chosen level, with all observations."""
        return self.path.at(self.index).value


@dataclasses.dataclass(frozen=True)
class Selection(Chosen[P]):
    """A level chosen with a criterion.

    Attributes:
        path: the levels to choose from.
        criterion: "gcv", "sure", "aic" or "bic".
        curve: the criterion at every level, `[levels]`; +inf where the degrees of freedom are too many for it.
        index: the level with the smallest criterion.
        sigma: the standard deviation of the noise, or the root of the dispersion, that was used; None if none was.
    """

    path: P
    criterion: str
    curve: np.ndarray
    index: int
    sigma: float | None


def select(path: P, criterion: str | None = None, sigma: float | None = None) -> Selection[P]:
    """Choose the level of a path with the best value of a criterion.

    Args:
        path: of `so.path` or `so.trend.trend_path`.
        criterion: "gcv", "sure", "aic" or "bic"; None is "bic" for a regression and "gcv" for signals. Degrees of
            freedom count dimensions; for penalties other than L1 this does not count the search for the zeros, and the
            criteria favour small weights. "gcv", and "bic" without sigma, consider only levels with at most half as
            many degrees of freedom as observations; if the noise is so small that more are needed, use "sure" or "aic".
        sigma: the standard deviation of the noise (at observation weight 1). With None, "sure" and "bic" use the robust
            estimate of a signal's path, `path.noise`, and "aic" the corrected form; "bic" uses the profiled likelihood
            if that estimate is 0 or unknown, as for every regression. Of 100 values the estimate may be a fifth too
            small, and "sure" then chooses too small a weight: give sigma if you know it. For Poisson and logistic
            losses, None is 1.

    Raises:
        ValueError: also for "sure" with a loss other than the square, whose risk it estimates; for a signal's path with
            the logistic loss by "gcv" and "aic", which in our benchmarks chose fits with up to 49 times the smallest
            error; and as `Path.degrees_of_freedom`.
        RuntimeError: if a level of the path has values that are not finite.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> A = rng.standard_normal((80, 100))
        >>> b = 3 * A[:, 0] - 2 * A[:, 1] + rng.standard_normal(80)
        >>> chosen = so.select(so.path(so.Problem(so.LeastSquares(A, b), so.L1(1.0))))
        >>> np.flatnonzero(chosen.value)[:2]
        array([0, 1])
        >>> y = np.repeat([0.0, 5.0, 2.0], 40) + rng.standard_normal(120)
        >>> best = so.select(so.trend.trend_path(y, so.Graph.chain(120)), "bic")
        >>> bool(best.path.degrees_of_freedom[best.index] < 10)
        True
    """
    _require_path("select", path)
    criterion = path.usual_criterion if criterion is None else criterion
    if criterion not in CRITERIA:
        raise ValueError(unknown("criterion", criterion, CRITERIA))
    if reason := path.refuses(criterion):
        raise ValueError(reason)
    if sigma is None and (criterion == "sure" or (criterion == "bic" and path.noise > 0)):
        sigma = path.noise
    if sigma is None and getattr(path.loss, "known_variance", False):
        sigma = 1.0
    _require_finite(path.statuses, "the path")
    if sigma is not None and not is_positive(sigma):
        raise ValueError(
            f"sigma, the standard deviation of the noise, must be positive and finite, given {sigma} (the path's own "
            f"estimate is {path.noise:.4g}); give the one you know"
        )
    if criterion == "gcv":
        sigma = None
    count, deviance, freedom = path.observations, path.deviances, path.degrees_of_freedom.astype(float)
    price = {"aic": 2.0, "bic": math.log(count)}.get(criterion, 0.0)
    few, left = freedom <= MOST_FREEDOM * count, count - freedom - 2
    with np.errstate(divide="ignore", invalid="ignore"):
        if criterion == "gcv":
            curve = np.where(few, deviance / count / (1 - freedom / count) ** 2, np.inf)
        elif criterion == "sure":
            assert sigma is not None
            curve = (deviance + 2 * sigma**2 * freedom) / count - sigma**2
        elif sigma is not None:
            curve = deviance / sigma**2 + price * freedom
        elif criterion == "aic":
            curve = np.where(left > 0, count * (np.log(deviance / count) + 2 * (freedom + 1) / left), np.inf)
        else:
            curve = np.where(few, count * np.log(deviance / count) + price * freedom, np.inf)
    if np.isposinf(curve).all():
        raise ValueError(
            f"{criterion} calls no level best: every level has too many degrees of freedom for it "
            f"({freedom.min():g} or more of {count} values); give a level, or sigma, with which 'sure' and 'aic' can"
        )
    return Selection(path, criterion, curve, int(np.argmin(curve)), sigma)


@dataclasses.dataclass(frozen=True)
class CrossValidation(Chosen[P]):
    """A level chosen by held-out observations; `value` is the answer with all of them.

    Attributes:
        path: with all observations.
        fold_errors: the mean deviance of the held-out observations, weighted as they are, `[folds, levels]`.
        errors: its mean over the folds, `[levels]`.
        standard_errors: of that mean, `[levels]`.
        folds: the number of the fold that held every observation out, `[rows]` or `[n]`; -1 without a weight.
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
        good = Status.reached(self.statuses)
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
    path: P, folds: Any = 5, *, seed: int = 0, rule: str | None = None, observer: Observer | None = None
) -> CrossValidation[P]:
    """Choose a level of a path by the deviance of held-out observations, which for the square is the squared error.

    Each fold is held out once: its rows leave the problem, and its nodes are filled in as missing. All folds use the
    levels of the path; those of a regression times the fold's share of the weights, since losses are sums. A fold of a
    signal has fewer observations, so the same weight smooths slightly more than on all nodes.

    Args:
        path: of `so.path` or `so.trend.trend_path`.
        folds: their number, drawn at random with equal shares of every label, and on a graph of every component, so
            that each keeps a node; or the fold of every row or node, such as regions that belong together.
        seed: of the draw.
        rule: "min" for the level of the smallest error, "half_se" or "one_se" for the largest level within half a
            standard error or one of it. None is "half_se" for signals of labels, since it came closest to the best
            fits in our benchmarks, and "min" for the rest.
        observer: called with what a path counts, the number of finished levels of all folds and that of all levels.

    Raises:
        ValueError: for folds or a rule that make no sense; for a component with only one observed node, which no fold
            can predict; and with a loss, for one without a finite fit if a fold is left out, as when that fold has all
            its counts.
        RuntimeError: if a fit has values that are not finite.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> A = rng.standard_normal((80, 100))
        >>> b = 3 * A[:, 0] - 2 * A[:, 1] + rng.standard_normal(80)
        >>> chosen = so.cross_validate(so.path(so.Problem(so.LeastSquares(A, b), so.L1(1.0))), rule="one_se")
        >>> np.flatnonzero(chosen.value)
        array([0, 1, 3])
        >>> clean = np.repeat([0.0, 5.0, 2.0], 40)
        >>> y = clean + rng.standard_normal(120)
        >>> chosen = so.cross_validate(so.trend.trend_path(y, so.Graph.chain(120), num=20))
        >>> bool(np.mean((chosen.value - clean) ** 2) < 0.2)
        True
    """
    _require_path("cross_validate", path)
    rule = path.usual_rule if rule is None else rule
    if rule not in RULES:
        raise ValueError(unknown("rule", rule, RULES))
    held, found = _folds(path, folds, seed), []
    count = int(held.max()) + 1
    for fold in range(count):

        def part(what: str, done: int, total: int, fold: int = fold) -> None:
            assert observer is not None
            observer(what, fold * total + done, count * total)

        found.append(path.held_out(held == fold, None if observer is None else part))
    errors, statuses = map(np.array, zip(*found, strict=True))
    _require_finite(statuses, "the folds (fold, level)")
    spread = errors.std(axis=0, ddof=1) / math.sqrt(count)
    return CrossValidation(path, errors, errors.mean(axis=0), spread, held, rule, statuses)


def _folds(path: Levels, folds: Any, seed: int) -> np.ndarray:
    """The fold of every observation, from 0 on; -1 of those without a weight."""
    seen, groups = path.observed()
    places, held = np.flatnonzero(seen), np.full(seen.size, -1)
    if np.ndim(folds):
        labels = np.asarray(folds).reshape(-1)
        if labels.size != seen.size or np.unique(labels[seen]).size < 2:
            raise ValueError(
                f"folds are a number, or one of at least two labels for each of {seen.size} observations, given "
                f"{labels.size} of {np.unique(labels).size} kinds"
            )
        held[places] = np.unique(labels[seen], return_inverse=True)[1]
        return held
    if places.size < 2:
        raise ValueError(f"two folds need two observations with a positive weight, given {places.size}")
    folds = whole_number("folds", folds, 2, places.size, "of the observations with a positive weight")
    shuffled = np.random.default_rng(whole_number("seed", seed, 0)).permutation(places)
    held[shuffled[np.argsort(groups[shuffled], kind="stable")]] = np.arange(places.size) % folds
    return held


def _require_path(name: str, given: Any) -> None:
    if not isinstance(given, Levels):
        raise TypeError(
            f"{name} takes a path, as so.path returns it for a problem and so.trend.trend_path for a signal, given "
            f"{type(given).__name__}"
        )


def _require_finite(statuses: np.ndarray, where: str) -> None:
    broken = np.argwhere(statuses == Status.NONFINITE)
    if broken.size:
        raise RuntimeError(
            f"{len(broken)} levels of {where} ended in values that are not finite, the first at {broken[0].tolist()}, "
            f"so none can be called best: {Status.NONFINITE.advice}"
        )
