"""`path`: the solutions of a problem along falling levels, each with its certificate.

    minimise over x    loss(x) + level * penalty(x)        for level_1 > level_2 > ...

Every level begins at the answer of the last one. `select.py` chooses among the levels.

Source: Friedman, Hastie and Tibshirani, "Regularization paths for generalized linear models via coordinate descent",
JSS 33 (2010); Zou, Hastie and Tibshirani, "On the degrees of freedom of the lasso", Annals of Statistics 35 (2007).
"""

import dataclasses
import math
from functools import cached_property
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from sparseopt.core.base.arguments import is_positive, real_array, whole_number
from sparseopt.core.base.types import Observer, known_on_cpu, precision
from sparseopt.core.losses.data import DataLoss
from sparseopt.core.operators.matrices import Matrix
from sparseopt.core.penalties.entries import L1
from sparseopt.core.penalties.protocols import gauge
from sparseopt.core.penalties.sums import Sum, stack
from sparseopt.core.problem.problem import Problem, Solution, Status
from sparseopt.core.solve import refuses_problem, solve
from sparseopt.core.working_sets.columns import columns_of
from sparseopt.core.working_sets.entry_terms import EntryTerms
from sparseopt.core.working_sets.working_set import HostSolve, WorkingSet
from sparseopt.system.report import Fact, html_facts, spread

# The last level over the first: with fewer rows than columns, and with more.
RATIO_WIDE, RATIO_TALL = 1e-2, 1e-3
# The null fit is solved at this multiple of a level at which nothing enters, and to this tolerance.
ABOVE, NULL_TOL = 10.0, 1e-9
# An error names at most this many levels.
MOST_NAMED = 5


class Levels:
    """What the paths of problems and of signals have in common, and what `select` and `cross_validate` ask of them."""

    levels: Any
    statuses: np.ndarray
    residuals: np.ndarray
    deviances: np.ndarray
    observations: Any
    loss: Any
    noise: Any  # the standard deviation of the noise, NaN if nothing estimates it
    degrees_of_freedom: Any
    usual_criterion = "bic"

    @property
    def usual_rule(self) -> str:
        """The rule of cross-validation for this loss."""
        return "min"

    def refuses(self, criterion: str) -> str | None:
        """Why a criterion does not choose among these levels, or None."""
        return refuses_criterion(criterion, self.loss)

    def observed(self) -> tuple[np.ndarray, np.ndarray]:
        """Which observations there are `[count]`, and the groups whose parts in all folds are equal `[count]`."""
        raise NotImplementedError

    def held_out(self, out: np.ndarray, observer: Observer | None) -> tuple[np.ndarray, np.ndarray]:
        """The mean deviances of the observations `out` in fits without them, and their statuses, `[levels]` each."""
        raise NotImplementedError

    def at(self, index: int) -> Solution:
        """The solution at one level."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.statuses)

    def place(self, index: int) -> int:
        """A level's number from 0 on; an IndexError if there is none."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"the path has the levels 0..{len(self) - 1}, given {index}")
        return index % len(self)

    def named(self, index: int) -> str:
        """A level in a sentence."""
        return f"level {index} ({self.levels[index]:.4g})"

    def check(self) -> Self:
        """Return self if every level converged, with a certificate or to a stationary point.

        Raises:
            RuntimeError: otherwise, naming the levels and what to try.
        """
        wrong = np.flatnonzero(~Status.reached(self.statuses))
        if not wrong.size:
            return self
        listed = ", ".join(
            f"{self.named(i)}: {Status(int(self.statuses[i])).name} at residual {self.residuals[i]:.2g}"
            for i in wrong[:MOST_NAMED]
        )
        more = f" and {wrong.size - MOST_NAMED} more" if wrong.size > MOST_NAMED else ""
        raise RuntimeError(
            f"{wrong.size} of {len(self)} levels did not converge: {listed}{more}; "
            f"{Status(int(self.statuses[wrong[0]])).advice}"
        )

    def _html(self, figures: dict[str, np.ndarray]) -> str:
        """How the levels ended, and the spread of figures `[levels]`."""
        ended = ", ".join(f"{(self.statuses == s).sum()} {Status(int(s)).name}" for s in np.unique(self.statuses))
        facts = [Fact("levels", ended), *(Fact(name, spread(values)) for name, values in figures.items())]
        return html_facts(type(self).__name__, facts)


def refuses_criterion(criterion: str, loss: Any) -> str | None:
    """Why a criterion does not choose among fits with a loss of one observation, or None."""
    if criterion == "sure" and not getattr(loss, "is_square", False):
        return (
            f"sure estimates a mean squared error, given a path with loss={loss}: take cross-validation "
            "(cross_validate), or bic"
        )
    return None


@dataclasses.dataclass(frozen=True)
class Path(Levels):
    """Solutions for several levels, the largest first. All arrays are NumPy's, `[levels]` if nothing else is said.

    Attributes:
        levels: descending; they multiply the numbers of the penalty that are weights.
        values: the answers, a SciPy CSR array `[levels, entries]`; with an intercept it is the last entry.
        objectives: loss plus penalty.
        gaps: relative duality gaps, upper bounds on the relative suboptimality; NaN if there is no certificate.
        residuals: of the stopping rule: the gap, or the stationarity residual.
        steps: of each solve.
        statuses: the `Status` of each level.
        deviances: twice the loss; for least squares the weighted sum of squares.
        problem: the problem at level 1.
        tol: of each level.
        max_steps: of each level.
    """

    levels: np.ndarray
    values: sparse.csr_array
    objectives: np.ndarray
    gaps: np.ndarray
    residuals: np.ndarray
    steps: np.ndarray
    statuses: np.ndarray
    deviances: np.ndarray
    problem: Problem
    tol: float
    max_steps: int
    noise = math.nan

    @property
    def loss(self) -> Any:
        """The loss of one observation."""
        return self.problem.loss.scalar

    @property
    def mass(self) -> np.ndarray:
        """The weights of the rows, `[rows]`."""
        loss = self.problem.loss
        weights: Any = 1.0 if loss.weights is None else loss.weights
        return np.broadcast_to(weights, np.shape(loss.target)[0]).astype(np.float64)

    @property
    def observations(self) -> int:
        """The number of rows with a positive weight."""
        return int(np.count_nonzero(self.mass))

    def observed(self) -> tuple[np.ndarray, np.ndarray]:
        target = np.asarray(self.problem.loss.target)
        return self.mass > 0, target if getattr(self.loss, "labels", False) else np.zeros(len(target))

    def held_out(self, out: np.ndarray, observer: Observer | None) -> tuple[np.ndarray, np.ndarray]:
        loss, mass = self.problem.loss, self.mass
        within = dataclasses.replace(loss, weights=np.where(out, 0, mass))
        # The sum of a loss grows with the rows: the same level of their mean.
        levels = within.weights.sum() / mass.sum() * self.levels
        found = _path(Problem(within, self.problem.penalty), levels, self.tol, self.max_steps, observer)
        matrix, values, shift = columns_of(loss.matrix), found.values, 0.0
        if loss.intercept:
            values, shift = values[:, :-1], values[:, [-1]].toarray().T
        # Only columns that some level uses.
        used = np.unique(values.indices)
        rows = matrix.matrix[:, used][out] @ values[:, used].T
        fits = np.asarray(rows.todense() if hasattr(rows, "todense") else rows) + shift
        target = np.asarray(loss.target, float)[out][:, None]
        with precision(np.dtype(np.float64)):
            terms = np.asarray(self.loss.value(fits, np.broadcast_to(target, fits.shape)))
        return 2 * mass[out] @ terms / mass[out].sum(), found.statuses

    @cached_property
    def degrees_of_freedom(self) -> np.ndarray:
        """The trace of the derivative of the fit by the target, `[levels]`: an intercept counts as 1.

        For L1 the number of entries that are not 0, if their columns are independent; with a ridge it is less.

        Raises:
            ValueError: for a penalty that is no sum over entries of the form of the elastic net.
        """
        penalty = self.problem.penalty
        if not hasattr(penalty, "entry_terms"):
            first = penalty.penalties[0] if isinstance(penalty, Sum) else penalty
            raise ValueError(
                "degrees of freedom are known for L1, ElasticNet, Box and Nonnegative, given "
                f"{type(first).__name__}: choose the level by cross_validate"
            )
        columns, found = columns_of(self.problem.loss.matrix), []
        for level, start, end in zip(self.levels, self.values.indptr, self.values.indptr[1:], strict=False):
            used, x = self.values.indices[start:end], self.values.data[start:end]
            terms = EntryTerms(self.values.shape[1], *at_level(penalty, level).entry_terms())
            used = used[(x != terms.low[used]) & (x != terms.high[used])]
            ridge = terms.ridge[used]
            if not ridge.any():
                found.append(float(min(used.size, self.observations)))
                continue
            gram = columns.gram(used, self._curvature(start, end))
            found.append(float(np.trace(np.linalg.solve(gram + np.diag(ridge), gram))))
        return np.array(found)

    def _curvature(self, start: int, end: int) -> np.ndarray:
        """The second derivatives of the loss at the rows, for one level."""
        x = np.zeros(self.values.shape[1])
        x[self.values.indices[start:end]] = self.values.data[start:end]
        run = HostSolve(self.problem, x)
        with precision(np.dtype(np.float64)):
            return np.broadcast_to(run.fit.at(run.columns.image(x)).curve, np.shape(self.problem.loss.target))

    def at(self, index: int) -> Solution:
        """The solution at one level."""
        index = self.place(index)
        fields = (self.statuses, self.steps, self.residuals, self.objectives, self.gaps)
        return Solution(self.values[[index]].toarray()[0], *(field[index] for field in fields))

    def _repr_html_(self) -> str:
        figures = {"levels": self.levels, "relative duality gaps": self.gaps}
        return self._html(figures | {"non-zeros": np.diff(self.values.indptr)})


def at_level(penalty: Any, level: float) -> Any:
    """The penalty with its weights times a level; the last part of a sum, which an intercept has, stays."""
    if isinstance(penalty, Sum):
        first, *rest = penalty.penalties
        return dataclasses.replace(penalty, penalties=(at_level(first, level), *rest))
    weights = getattr(penalty, "least", ("weight",))
    return dataclasses.replace(penalty, **{name: level * np.asarray(getattr(penalty, name)) for name in weights})


def largest_level(problem: Problem) -> float:
    """The smallest level at which every entry with a weight is 0: where a path begins.

    The problem and its errors are as in `path`.

    Example:
        >>> problem = so.Problem(so.LeastSquares(np.eye(3), np.array([1.0, -3.0, 2.0])), so.L1(1.0))
        >>> so.core.largest_level(problem)
        3.0
    """
    problem = _checked(problem)
    parts = problem.penalty.penalties if isinstance(problem.penalty, Sum) else (problem.penalty,)
    first = parts[0]
    if not hasattr(first, "dual_norm"):
        if not hasattr(first, "with_concavity"):
            raise ValueError(f"give levels: none follows from a {type(first).__name__}")
        first = L1(first.weight)  # of the same slope at 0
    of_entries = hasattr(first, "group_weight") and np.asarray(first.weight) > 0
    of_groups = np.asarray(getattr(first, "group_weight", first.weight)) > 0
    if of_groups.ndim and getattr(first, "groups", None) is not None:
        of_groups = of_groups[np.asarray(first.groups)]
    weighted = np.asarray(of_entries | of_groups)
    start = np.zeros(problem.loss.start_shape())
    if len(parts) > 1 or (weighted.ndim and not weighted.all()):
        # The entries without a weight have their own fit first, at a level at which nothing else enters.
        convex = stack([first, *parts[1:]], problem.penalty.sizes) if len(parts) > 1 else first
        above = ABOVE * _needed(problem, first, weighted, start) or 1.0
        start = np.asarray(solve(Problem(problem.loss, at_level(convex, above)), tol=NULL_TOL).value, np.float64)
    return _needed(problem, first, weighted, start)


def _needed(problem: Problem, first: Any, weighted: np.ndarray, x: np.ndarray) -> float:
    """The level at which the entries with a weight stay at 0, if the others are those of x."""
    run = HostSolve(problem, x)
    slope = -run.begin().gradient
    slope = slope[: -1 if problem.loss.intercept else None]
    if not hasattr(first, "entry_terms"):
        with precision(np.dtype(np.float64)):
            return float(gauge(first, jnp.asarray(np.where(weighted, slope, 0) if weighted.ndim else slope)))
    # At 0 neither a ridge nor a bound beyond counts.
    terms = EntryTerms(slope.size, *first.entry_terms())
    out = np.maximum(np.where(terms.high > 0, slope, 0), np.where(terms.low < 0, -slope, 0))
    return float(np.max(out[terms.weight > 0] / terms.weight[terms.weight > 0], initial=0))


def path(
    problem: Problem,
    levels: Any = None,
    num: int = 100,
    *,
    ratio: float | None = None,
    tol: float = 1e-6,
    max_steps: int = 10_000,
    observer: Observer | None = None,
) -> Path:
    """Solve a problem at falling levels, from the one at which nothing enters.

    Args:
        problem: a `DataLoss` and a penalty with a `weight`, without an operator. The levels multiply the weight, and
            the ridge of an `ElasticNet`; what an intercept and a weight of 0 leave free stays free.
        levels: positive and falling; None uses `num` levels, evenly spaced in the logarithm, from
            `so.core.largest_level` to `ratio` times that.
        num: the number of levels.
        ratio: the last level over the first; None is 0.01 with fewer rows than columns, else 0.001.
        tol: of each level, as in `solve`.
        max_steps: of each level, as in `solve`.
        observer: called with "level", the number of finished levels and the number of levels, before each level.

    Returns:
        A `Path`, in float64.

    Raises:
        ValueError: as `solve`; for levels that are not positive or rise; and for a penalty from whose type no first
            level follows, without levels.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> A = rng.standard_normal((50, 200))
        >>> problem = so.Problem(so.LeastSquares(A, A[:, 0] - 2 * A[:, 1] + 3, intercept=True), so.L1(1.0))
        >>> found = so.path(problem, num=20).check()
        >>> found.values.shape, int(found.values[[0]].nnz)  # at first the intercept alone
        ((20, 201), 1)
        >>> found.at(-1).value[[0, 1, -1]].round(1)
        array([ 1., -2.,  3.])
    """
    problem = _checked(problem)
    max_steps = whole_number("max_steps", max_steps, 0)
    if not is_positive(tol):
        raise ValueError(f"tol must be positive and finite, given {tol!r}")
    rows, entries = np.shape(problem.loss.target)[0], problem.loss.start_shape()[0]
    if levels is None:
        num = whole_number("num", num, 1)
        ratio = (RATIO_WIDE if rows < entries else RATIO_TALL) if ratio is None else ratio
        if not (is_positive(ratio) and ratio < 1):
            raise ValueError(f"ratio is the last level over the first, between 0 and 1, given {ratio!r}")
        levels = (largest_level(problem) or 1.0) * ratio ** np.linspace(0, 1, num)
    levels = real_array("levels", levels).astype(np.float64)
    if levels.ndim != 1 or not levels.size or not (np.isfinite(levels) & (levels > 0)).all():
        raise ValueError(f"levels are positive and finite numbers [levels], given {levels!r:.100}")
    if (np.diff(levels) > 0).any():
        raise ValueError("levels fall, since every one begins at the answer of the last: sort them, the largest first")
    return _path(problem, levels, tol, max_steps, observer)


def _path(problem: Problem, levels: np.ndarray, tol: float, max_steps: int, observer: Observer | None) -> Path:
    """A path at levels that are checked."""
    start: Any = np.zeros(problem.loss.start_shape())
    solver = WorkingSet()
    fast = solver.refuses(problem) is None and known_on_cpu((problem, jax.device_put(0)))
    run = HostSolve(problem, start, keeps=True, yields=True) if fast else None
    found, values = [], []
    for index, level in enumerate(levels):
        if observer is not None:
            observer("level", index, len(levels))
        penalty = at_level(problem.penalty, float(level))
        solution = run.at(penalty, tol, max_steps) if run else None
        if run and solution is not None and Status.reached(solution.status):
            loss = run.begin().now.value
        else:
            at = Problem(problem.loss, penalty)
            solution = solve(at, start=start if solution is None else solution.value, tol=tol, max_steps=max_steps)
            with precision(np.dtype(np.float64)):
                loss = float(problem.loss.value(np.asarray(solution.value, np.float64)))
        start = np.asarray(solution.value, np.float64)
        values.append(sparse.csr_array(start[None]))
        ended = (solution.objective, solution.gap, solution.residual, solution.steps, solution.status)
        found.append((*ended, 2 * loss))
    objectives, gaps, residuals, steps, statuses, deviances = map(np.asarray, zip(*found, strict=True))
    stacked = sparse.csr_array(sparse.vstack(values))
    return Path(levels, stacked, objectives, gaps, residuals, steps, statuses, deviances, problem, tol, max_steps)


def _checked(problem: Problem) -> Problem:
    if reason := refuses_problem(problem):
        raise ValueError(reason)
    known = isinstance(problem.loss, DataLoss) and isinstance(problem.loss.matrix, Matrix)
    if not known or problem.operator is not None:
        raise ValueError(
            "a path needs a loss of data with a dense or SciPy sparse matrix, such as so.LeastSquares(A, b), and no "
            "operator; for signals on graphs there is so.trend.trend_path"
        )
    if np.ndim(problem.loss.target) != 1:
        raise ValueError(f"a path needs a target [rows], given the shape {np.shape(problem.loss.target)}")
    parts = problem.penalty.penalties if isinstance(problem.penalty, Sum) else (problem.penalty,)
    if not hasattr(parts[0], "weight"):
        raise ValueError(f"a path needs a penalty with a weight, such as so.L1(1.0), given {type(parts[0]).__name__}")
    return problem
