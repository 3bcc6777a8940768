"""The solver that benchopt's benchmarks load: `so.solve`, and `so.trend_filter` for signals that are only noisy.

`bench_benchopt.py` copies this file to a benchmark's solvers. A benchmark says what it minimises by the names of the
numbers that it hands over, for which `PROBLEMS` has a function each. All are solved in float64, from a cold start, to
the tolerance that benchopt asks for. The compilation comes before benchopt's clock starts, as numba's does.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchopt import BaseObjective, BaseSolver
from benchopt.stopping_criterion import SufficientProgressCriterion

import sparseopt as so

jax.config.update("jax_enable_x64", True)

# Steps that no solve needs.
MANY = 1_000_000
# The answer to a tolerance.
Solve = Callable[[float], np.ndarray]


def solving(loss: Any, penalty: Any, operator: Any = None) -> Solve:
    """`so.solve`, with the problem's arrays on the device."""
    problem = jax.tree.map(jnp.asarray, so.Problem(loss, penalty, operator))
    return lambda tol: np.asarray(so.solve(problem, tol=tol, max_steps=MANY).value)


def centred(X: Any, y: np.ndarray, penalty: Any, scale: float, fit_intercept: bool) -> Solve:
    """Least squares over `scale`; an intercept, the last entry, is solved for by taking the means away."""
    means, mean = (X.mean(axis=0), y.mean()) if fit_intercept else (0.0, 0.0)
    weights = None if scale == 1 else np.full(len(y), 1 / scale)
    solve = solving(so.LeastSquares(X - means, y - mean, weights), penalty)

    def whole(tol: float) -> np.ndarray:
        x = solve(tol)
        return np.append(x, mean - means @ x)

    return whole if fit_intercept else solve


def lasso(X: Any, y: Any, lmbd: float, fit_intercept: bool) -> Solve:
    """`1/2 ||y - X b||² + lmbd ||b||_1`."""
    return centred(X, y, so.L1(lmbd), 1, fit_intercept)


def elastic_net(X: Any, y: Any, l1_ratio: float, lmbda: float, fit_intercept: bool) -> Solve:
    """`1/(2 n) ||y - X b||² + lmbda (ratio ||b||_1 + (1 - ratio) / 2 ||b||²)`."""
    return centred(X, y, so.ElasticNet(lmbda * l1_ratio, lmbda * (1 - l1_ratio)), len(y), fit_intercept)


def mcp(X: Any, y: Any, lmbd: float, gamma: float) -> Solve:
    """`1/(2 n) ||y - X b||²` and the minimax concave penalty."""
    return centred(X, y, so.MCP(lmbd, gamma), len(y), False)


def nonnegative(X: Any, y: Any, fit_intercept: bool) -> Solve:
    """`1/2 ||y - X b||²` over b >= 0."""
    return centred(X, y, so.Nonnegative(), 1, fit_intercept)


def logistic(X: Any, y: Any, lmbd: float) -> Solve:
    """`sum_i log(1 + exp(-y_i (X b)_i)) + lmbd ||b||_1`, for labels -1 and 1."""
    return solving(so.LogisticLoss(X, (y + 1) / 2), so.L1(lmbd))


def quantile(X: Any, y: Any, lmbd: float, quantile: float, fit_intercept: bool) -> Solve:
    """The mean pinball loss and `lmbd ||b||_1`, both times n; the intercept is a column without a penalty."""
    weights = np.full(X.shape[1] + fit_intercept, lmbd * len(y))
    weights[X.shape[1] :] = 0
    matrix = np.column_stack([X, np.ones((len(y), int(fit_intercept)))])
    return solving(so.QuantileLoss(matrix, y, quantile), so.L1(weights))


def line(A: Any, reg: float, y: Any, c: float, delta: float, data_fit: str) -> Solve:
    """A loss of `A u` and `reg sum |u_(i+1) - u_i|`."""
    del c
    columns = A.shape[1]
    return smoothing(A @ np.eye(columns), y, delta, data_fit, so.Graph.chain(columns), so.L1(reg))


def picture(A: Any, reg: float, delta: float, data_fit: str, y: Any, isotropy: str) -> Solve:
    """A loss of `A u` and the total variation of a picture u, isotropic or not."""
    basis = np.eye(y.size).reshape(-1, *y.shape)
    matrix = np.column_stack([(A @ one).reshape(-1) for one in basis])
    penalty = so.GroupL2(reg, axis=0) if isotropy == "isotropic" else so.L1(reg)
    return smoothing(matrix, y, delta, data_fit, so.Graph.grid(y.shape), penalty)


def smoothing(matrix: np.ndarray, y: np.ndarray, delta: float, data_fit: str, graph: so.Graph, penalty: Any) -> Solve:
    """Half the squares of the residuals, or Huber's loss of them, and a penalty of the differences on a graph."""
    huber = data_fit == "huber"
    if np.array_equal(matrix, np.eye(y.size)):
        loss = so.scalar.Huber(delta) if huber else "square"
        return lambda tol: np.asarray(so.trend_filter(y, graph, penalty, loss=loss, tol=tol, max_steps=MANY).value)
    if isinstance(penalty, so.GroupL2):
        # The edges that begin at a pixel are its gradient.
        penalty = so.GroupL2(penalty.weight, groups=np.unique(graph.edges[:, 0], return_inverse=True)[1])
    target = y.reshape(-1)
    fit = so.HuberLoss(matrix, target, delta) if huber else so.LeastSquares(matrix, target)
    solve = solving(fit, penalty, graph.matrix(1))
    return lambda tol: solve(tol).reshape(-1, *y.shape[1:])


STATED = (lasso, elastic_net, mcp, nonnegative, logistic, quantile, line, picture)
# By the names that a benchmark hands over; and the name that it has for the answer, if that is not `beta`.
PROBLEMS: dict[Any, Callable[..., Solve]] = {frozenset(signature(state).parameters): state for state in STATED}
ANSWERS = {quantile: "params", line: "u", picture: "u"}


class Solver(BaseSolver):
    """sparseopt with the solver that it chooses itself."""

    name = "sparseopt"
    # Tolerances fall by less than two thirds: many in a row end at the same check of the gap.
    stopping_criterion = SufficientProgressCriterion(patience=20, strategy="tolerance")
    requirements = ("sparseopt",)

    def skip(self, **given: Any) -> tuple[bool, str | None]:
        known = frozenset(given) in PROBLEMS
        return not known, None if known else f"no problem hands over {', '.join(sorted(given))}"

    def set_objective(self, **given: Any) -> None:
        state = PROBLEMS[frozenset(given)]
        self.answer = ANSWERS.get(state, "beta")
        self.solve = state(**given)
        self.run(1.0)

    def run(self, stop_val: float) -> None:
        """Solve to a relative duality gap, or to what the solver has in its place."""
        # The first tolerance is a huge one, for the start; a whole number would compile anew.
        self.found = self.solve(min(float(stop_val), 1.0))

    def get_result(self) -> Any:
        """The answer, under the benchmark's name; benchopt before 1.5 takes it alone."""
        return {self.answer: self.found} if hasattr(BaseObjective, "evaluate_result") else self.found
