"""Solvers of sparse regression with one interface: sparseopt and public ones.

A solver is prepared for a problem, with the data in the layout of its library, and then called with one of its own
tolerances, from a cold start.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from core_problems import Regression

import sparseopt as so

# Large enough that it never ends a solve.
MANY = 1_000_000
# Except for saga, which would run for hours.
SAGA_EPOCHS = 50
Answer = tuple[np.ndarray, dict[str, Any]]
Solve = Callable[[float], Answer]


@dataclasses.dataclass(frozen=True)
class Solver:
    """One solver.

    Attributes:
        name: in records.
        package: its distribution.
        prepare: from a problem to a function of the tolerance, which returns the answer and numbers for the record.
        first: the coarsest tolerance.
    """

    name: str
    package: str
    prepare: Callable[[Regression], Solve]
    first: float = 1e-3


def core_problem(problem: Regression) -> so.Problem:
    """The problem for sparseopt, with its arrays on the device."""
    loss: Any = so.LeastSquares(problem.matrix, problem.target)
    if problem.logistic:
        loss = so.LogisticLoss(problem.matrix, problem.target)
    penalty: Any = so.L1(problem.weight)
    if problem.group > 1:
        penalty = so.GroupL2(problem.weight, groups=np.arange(problem.matrix.shape[1]) // problem.group)
    return jax.tree.map(jnp.asarray, so.Problem(loss, penalty))


def ours(problem: Regression, solver: so.core.Solver | None = None) -> Solve:
    """`so.solve`, with the chosen solver or another."""
    given = core_problem(problem)

    def solve(tol: float) -> Answer:
        found = so.solve(given, solver, tol=tol, max_steps=MANY)
        return np.asarray(found.value), {"steps": int(found.steps), "status": so.Status(int(found.status)).name}

    return solve


def ours_path(problem: Regression, warm: bool) -> Solve:
    """All weights at once by `vmap`, or in sequence by `scan`, each started from the previous answer."""
    given = core_problem(problem)
    weights = jnp.asarray(problem.weight)

    def at(weight: Any, start: Any, given: so.Problem, tol: float) -> tuple[Any, Any]:
        found = so.solve(so.Problem(given.loss, so.L1(weight)), start=start, tol=tol, max_steps=MANY)
        return found.value, found.steps

    @jax.jit
    def together(given: so.Problem, tol: float) -> tuple[Any, Any]:
        return jax.vmap(lambda weight: at(weight, None, given, tol))(weights)

    @jax.jit
    def in_turn(given: so.Problem, tol: float) -> tuple[Any, Any]:
        def step(x: Any, weight: Any) -> tuple[Any, Any]:
            x, steps = at(weight, x, given, tol)
            return x, (x, steps)

        return jax.lax.scan(step, given.loss.start(), weights)[1]

    def solve(tol: float) -> Answer:
        x, steps = (in_turn if warm else together)(given, tol)
        return np.asarray(x), {"steps": int(steps.sum()), "most_steps": int(steps.max())}

    return solve


def fitted(make: Callable[[Regression, float], Any]) -> Callable[[Regression], Solve]:
    """A solver that is an estimator in the style of scikit-learn."""

    def prepare(problem: Regression) -> Solve:
        # Every library accepts labels of -1 and 1.
        target = 2 * problem.target - 1 if problem.logistic else problem.target

        def solve(tol: float) -> Answer:
            return np.ravel(make(problem, tol).fit(problem.matrix, target).coef_), {}

        return solve

    return prepare


def _mean(problem: Regression) -> Any:
    """The weight for a loss that is the mean over the rows."""
    return problem.weight / problem.target.size


def _sklearn_lasso(problem: Regression, tol: float) -> Any:
    from sklearn.linear_model import Lasso

    return Lasso(_mean(problem), fit_intercept=False, copy_X=False, max_iter=MANY, tol=tol)


def _sklearn_logistic(problem: Regression, tol: float, solver: str) -> Any:
    from sklearn.linear_model import LogisticRegression

    most = SAGA_EPOCHS if solver == "saga" else MANY
    return LogisticRegression(
        C=1 / problem.weight, l1_ratio=1, solver=solver, fit_intercept=False, max_iter=most, tol=tol
    )


def _skglm_lasso(problem: Regression, tol: float) -> Any:
    from skglm import Lasso

    return Lasso(_mean(problem), fit_intercept=False, max_iter=1000, tol=tol)


def _skglm_logistic(problem: Regression, tol: float) -> Any:
    from skglm import SparseLogisticRegression

    return SparseLogisticRegression(_mean(problem), fit_intercept=False, max_iter=1000, tol=tol)


def _skglm_group(problem: Regression, tol: float) -> Any:
    from skglm import GroupLasso

    count = problem.matrix.shape[1] // problem.group
    return GroupLasso(
        problem.group, _mean(problem), weights=np.ones(count), fit_intercept=False, max_iter=1000, tol=tol
    )


def _celer_lasso(problem: Regression, tol: float) -> Any:
    from celer import Lasso

    return Lasso(_mean(problem), fit_intercept=False, max_iter=1000, tol=tol)


def _celer_logistic(problem: Regression, tol: float) -> Any:
    from celer import LogisticRegression

    return LogisticRegression(C=1 / problem.weight, fit_intercept=False, max_iter=1000, tol=tol)


def _celer_group(problem: Regression, tol: float) -> Any:
    from celer import GroupLasso

    return GroupLasso(problem.group, _mean(problem), fit_intercept=False, max_iter=1000, tol=tol)


def _sklearn_path(problem: Regression) -> Solve:
    from sklearn.linear_model import lasso_path

    def solve(tol: float) -> Answer:
        found = lasso_path(problem.matrix, problem.target, alphas=_mean(problem), tol=tol, max_iter=MANY)
        return found[1].T, {}

    return solve


def _skglm_path(problem: Regression) -> Solve:
    from skglm import Lasso

    def solve(tol: float) -> Answer:
        model = Lasso(fit_intercept=False, max_iter=1000, tol=tol)
        return model.path(problem.matrix, problem.target, _mean(problem))[1].T, {}

    return solve


def _celer_path(problem: Regression) -> Solve:
    from celer import celer_path

    def solve(tol: float) -> Answer:
        alphas = _mean(problem)
        found = celer_path(problem.matrix, problem.target, "lasso", alphas=alphas, tol=tol, max_iter=1000)
        return found[1].T, {}

    return solve


OURS = [Solver("sparseopt", "sparseopt", ours, 1e-6)]
OURS_PATH = [
    Solver("sparseopt, vmap", "sparseopt", partial(ours_path, warm=False), 1e-6),
    Solver("sparseopt, warm starts", "sparseopt", partial(ours_path, warm=True), 1e-6),
]
LASSO = [
    Solver("scikit-learn Lasso", "scikit-learn", fitted(_sklearn_lasso)),
    Solver("skglm Lasso", "skglm", fitted(_skglm_lasso)),
    Solver("celer Lasso", "celer", fitted(_celer_lasso)),
]
LOGISTIC = [
    Solver("scikit-learn liblinear", "scikit-learn", fitted(partial(_sklearn_logistic, solver="liblinear"))),
    Solver("scikit-learn saga", "scikit-learn", fitted(partial(_sklearn_logistic, solver="saga"))),
    Solver("skglm SparseLogisticRegression", "skglm", fitted(_skglm_logistic)),
    Solver("celer LogisticRegression", "celer", fitted(_celer_logistic)),
]
GROUP = [
    Solver("skglm GroupLasso", "skglm", fitted(_skglm_group)),
    Solver("celer GroupLasso", "celer", fitted(_celer_group)),
]
PATH = [
    Solver("scikit-learn lasso_path", "scikit-learn", _sklearn_path),
    Solver("skglm path", "skglm", _skglm_path),
    Solver("celer path", "celer", _celer_path),
]
SOLVERS: dict[str, list[Solver]] = {
    "lasso-dense": OURS + LASSO,
    "lasso-sparse": OURS + LASSO,
    "logistic-sparse": OURS + LOGISTIC,
    "group-lasso": OURS + GROUP,
    "lasso-path": OURS_PATH + PATH,
}
