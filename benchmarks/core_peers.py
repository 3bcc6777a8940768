"""Solvers of sparse regression with one interface: sparseopt and public ones.

A solver is prepared for a problem, with the data in the layout of its library, and then called with one of its own
tolerances, from a cold start.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from importlib import import_module
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


def ours(problem: Regression) -> Solve:
    """`so.solve`, with the chosen solver."""
    given = core_problem(problem)

    def solve(tol: float) -> Answer:
        found = so.solve(given, tol=tol, max_steps=MANY)
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


def named(path: str) -> Any:
    """What a module has under a name, imported when it is needed."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def fitted(path: str, weight: Callable[[Regression], dict[str, Any]], **settings: Any) -> Callable[[Regression], Solve]:
    """A solver that is an estimator in the style of scikit-learn; `weight` gives its arguments for a problem."""

    def prepare(problem: Regression) -> Solve:
        # Every library accepts labels of -1 and 1.
        target = 2 * problem.target - 1 if problem.logistic else problem.target
        make = partial(named(path), **weight(problem), **{"fit_intercept": False, "max_iter": 1000} | settings)

        def solve(tol: float) -> Answer:
            return np.ravel(make(tol=tol).fit(problem.matrix, target).coef_), {}

        return solve

    return prepare


def _mean(problem: Regression) -> Any:
    """The weight for a loss that is the mean over the rows."""
    return problem.weight / problem.target.size


def _alpha(problem: Regression) -> dict[str, Any]:
    return {"alpha": _mean(problem)}


def _inverse(problem: Regression) -> dict[str, Any]:
    return {"C": 1 / problem.weight}


def _grouped(problem: Regression) -> dict[str, Any]:
    return {"alpha": _mean(problem), "groups": problem.group}


def _unweighted(problem: Regression) -> dict[str, Any]:
    return {**_grouped(problem), "weights": np.ones(problem.matrix.shape[1] // problem.group)}


def _path(run: Callable[..., tuple]) -> Callable[[Regression], Solve]:
    """A solver of a path: `run` takes matrix, target, weights and tolerance."""

    def prepare(problem: Regression) -> Solve:
        return lambda tol: (run(problem.matrix, problem.target, _mean(problem), tol)[1].T, {})

    return prepare


def _sklearn_path(matrix: Any, target: Any, alphas: Any, tol: float) -> tuple:
    return named("sklearn.linear_model.lasso_path")(matrix, target, alphas=alphas, tol=tol, max_iter=MANY)


def _skglm_path(matrix: Any, target: Any, alphas: Any, tol: float) -> tuple:
    return named("skglm.Lasso")(fit_intercept=False, max_iter=1000, tol=tol).path(matrix, target, alphas)


def _celer_path(matrix: Any, target: Any, alphas: Any, tol: float) -> tuple:
    return named("celer.celer_path")(matrix, target, "lasso", alphas=alphas, tol=tol, max_iter=1000)


SKLEARN_LOGISTIC = partial(fitted, "sklearn.linear_model.LogisticRegression", _inverse, l1_ratio=1)
OURS = [Solver("sparseopt", "sparseopt", ours, 1e-6)]
LASSO = [
    *OURS,
    Solver(
        "scikit-learn Lasso", "scikit-learn", fitted("sklearn.linear_model.Lasso", _alpha, copy_X=False, max_iter=MANY)
    ),
    Solver("skglm Lasso", "skglm", fitted("skglm.Lasso", _alpha)),
    Solver("celer Lasso", "celer", fitted("celer.Lasso", _alpha)),
]
SOLVERS: dict[str, list[Solver]] = {
    "lasso-dense": LASSO,
    "lasso-sparse": LASSO,
    "logistic-sparse": [
        *OURS,
        Solver("scikit-learn liblinear", "scikit-learn", SKLEARN_LOGISTIC(solver="liblinear", max_iter=MANY)),
        Solver("scikit-learn saga", "scikit-learn", SKLEARN_LOGISTIC(solver="saga", max_iter=SAGA_EPOCHS)),
        Solver("skglm SparseLogisticRegression", "skglm", fitted("skglm.SparseLogisticRegression", _alpha)),
        Solver("celer LogisticRegression", "celer", fitted("celer.LogisticRegression", _inverse)),
    ],
    "group-lasso": [
        *OURS,
        Solver("skglm GroupLasso", "skglm", fitted("skglm.GroupLasso", _unweighted)),
        Solver("celer GroupLasso", "celer", fitted("celer.GroupLasso", _grouped)),
    ],
    "lasso-path": [
        Solver("sparseopt, vmap", "sparseopt", partial(ours_path, warm=False), 1e-6),
        Solver("sparseopt, warm starts", "sparseopt", partial(ours_path, warm=True), 1e-6),
        Solver("scikit-learn lasso_path", "scikit-learn", _path(_sklearn_path)),
        Solver("skglm path", "skglm", _path(_skglm_path)),
        Solver("celer path", "celer", _path(_celer_path)),
    ],
}
