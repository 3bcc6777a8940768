"""`solve`, the front door of the core: checks on the host, the choice of a solver, the start."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparseopt.core.base.arguments import class_or_function, fits, own_refusal, refuses_leaves, renames
from sparseopt.core.losses.data import DataLoss
from sparseopt.core.losses.quadratic import Quadratic
from sparseopt.core.losses.scalar import ScalarLoss
from sparseopt.core.operators.matrices import refuses_map, refuses_transpose
from sparseopt.core.penalties.protocols import is_convex
from sparseopt.core.problem.iterate import iterate
from sparseopt.core.problem.padding import cut, pad_problem
from sparseopt.core.problem.problem import Problem, Solution, Solver
from sparseopt.core.solvers.accelerated import AcceleratedProximalGradient, GraduatedProximalGradient
from sparseopt.core.solvers.maiht import Maiht
from sparseopt.core.solvers.primal_dual import PrimalDual, SplitAdmm
from sparseopt.core.solvers.refit import Refit


class Choice(NamedTuple):
    """A solver, and why it was chosen."""

    solver: Solver
    why: str


# Up to FEW unknowns an inverse is always worth its cost; beyond, if it has at most ENTRIES times the entries of the
# matrices, since every step multiplies with it.
FEW, ENTRIES = 256, 4


def _exact_pays(problem: Problem) -> bool:
    """Whether a product with an inverse of all unknowns is cheap compared to products with the matrices."""
    size = math.prod(problem.loss.start_shape())
    maps = (problem.operator, getattr(problem.loss, "matrix", getattr(problem.loss, "hessian", None)))
    return size <= FEW or size**2 <= ENTRIES * sum(leaf.size for leaf in jax.tree.leaves(maps))


# The first that accepts a problem and suits it is chosen; one with None suits every problem that it accepts.
CANDIDATES: tuple[tuple[Any, Callable[[Problem], bool] | None, str], ...] = (
    (Refit(), None, "a quadratic loss on a fixed support is a linear system: conjugate gradients"),
    (
        Maiht(),
        lambda problem: isinstance(problem.loss, Quadratic) and not is_convex(problem.penalty),
        "a quadratic loss and a penalty that is not known to be convex: monotone accelerated hard thresholding",
    ),
    (
        AcceleratedProximalGradient(),
        None,
        "a smooth loss and a penalty with a prox: accelerated gradient steps need only gradients of the loss",
    ),
    (
        SplitAdmm(),
        _exact_pays,
        "an operator or a loss with kinks, and few unknowns: an inverse computed once saves many steps",
    ),
    (
        PrimalDual(),
        None,
        "an operator or a loss with kinks, and many unknowns: steps need products with the operators alone",
    ),
)


def chosen_solver(problem: Problem) -> Choice:
    """Return the solver that `solve` uses for a problem if none is given, and why.

    Raises:
        ValueError: if no solver accepts the problem, with what each of them needs.

    Example:
        >>> loss = so.LeastSquares(np.eye(3), np.ones(3))
        >>> so.chosen_solver(so.Problem(loss, so.L1(1.0))).solver
        AcceleratedProximalGradient(step_size=None, cadence=10)
        >>> print(so.chosen_solver(so.Problem(loss, so.L1(1.0), np.diff(np.eye(3), axis=0))).why)
        an operator or a loss with kinks, and few unknowns: an inverse computed once saves many steps
    """
    reasons = []
    for solver, suits, why in CANDIDATES:
        reason = solver.refuses(problem)
        if reason is None and (suits is None or suits(problem)):
            return Choice(solver, why)
        reasons += [reason] if reason else []
    raise ValueError("no solver accepts this problem:\n" + "\n".join(f"  {reason}" for reason in reasons))


@renames(x0="start")
def solve(
    problem: Problem,
    solver: Solver | None = None,
    start: Any = None,
    *,
    tol: float | Array = 1e-6,
    max_steps: int | Array = 10_000,
    history: bool = False,
) -> Solution:
    """Solve a problem; works under `jit`, `vmap` and `grad` too.

    `value` and `objective` have derivatives of every order (`jax.grad`, `jax.jvp`) with respect to every leaf of the
    problem, by the implicit function theorem: one linear solve, whatever the number of iterations. They are exact where
    the active set (the zeros of x or of `operator x`, the kept entries of a pattern) is locally constant, which is
    almost everywhere; at a tie they are one-sided. Everything else in a `Solution` has zero derivatives.

    Args:
        problem: what to minimise.
        solver: a solver such as `so.PrimalDual()`; None uses `chosen_solver(problem)`.
        start: where to begin, of the answer's shape and dtype, or None for zeros. With None,
            `AcceleratedProximalGradient` and a concave penalty (`MCP`, `SCAD`, `LogSum`) the first 200 iterations
            follow paths of such penalties to a better start (`GraduatedProximalGradient`).
        tol: bound on the solver's residual: the relative duality gap `(P - D) / D` if there is a certificate. With a
            negative `tol` the solver runs `max_steps` steps.
        max_steps: step limit, 0 or more; a solver whose steps make `stride` iterations rounds it up to whole steps. An
            integer if a history is requested.
        history: record residual, objective and gap after every step. If a step of the solver makes `stride` iterations,
            the history has one entry per iteration, and those between steps are NaN.

    Returns:
        A `Solution`. `solve` never raises on non-convergence; `solution.check()` does. An answer with an entry that is
        not finite has the status NONFINITE.

    Raises:
        ValueError: before any work, for a problem that the solver cannot solve (with the text of its `refuses`), for
            shapes that do not fit, an `rmv` that is not the transpose of `mv`, a Hessian (of 256 rows or fewer) that is
            not positive semidefinite, data outside a loss's domain, or a negative `max_steps`. The values of tracers
            are not checked.

    Example:
        >>> problem = so.Problem(so.Quadratic(jnp.eye(3), jnp.array([3.0, 0.1, -2.0])), so.L1(1.0))
        >>> solution = so.solve(problem).check()
        >>> solution.value.round(3)
        Array([ 2.,  0., -1.], dtype=float32)
        >>> so.Status(int(solution.status)).name
        'CONVERGED'
        >>> jax.grad(lambda weight: so.solve(so.Problem(problem.loss, so.L1(weight))).value.sum())(1.0)
        Array(0., dtype=float32, weak_type=True)
    """
    if reason := _refuses_data(problem):
        raise ValueError(reason)
    if solver is None:
        solver = chosen_solver(problem).solver
    elif reason := _refuses_solver(solver) or own_refusal(solver, problem):
        raise ValueError(reason)
    for name in ("loss", "penalty", "operator"):
        if reason := refuses_leaves(name, getattr(problem, name)):
            raise ValueError(reason)
    if start is None:
        if not hasattr(problem.loss, "start"):
            raise ValueError(
                f"give a start: the shape of x does not follow from a {type(problem.loss).__name__} (a loss may "
                "have a method start() that returns zeros of x)"
            )
        start = problem.loss.start()
        if type(solver) is AcceleratedProximalGradient and hasattr(problem.penalty, "with_concavity"):
            solver = GraduatedProximalGradient(solver.step_size, solver.cadence)
    if type(start) in (list, tuple, int, float, complex):
        start = np.asarray(start)
    if isinstance(start, np.ndarray | jax.Array):
        if reason := refuses_leaves("start", start) or _refuses_shapes(problem, start):
            raise ValueError(reason)
        start = jnp.asarray(start, _dtype(problem, start))
    limits: dict[str, Any] = {"tol": tol, "max_steps": max_steps, "history": history}
    if shared := pad_problem(problem, solver, start):
        return cut(iterate(shared[0], solver, shared[1], **limits), problem, shared[0], start)
    return iterate(problem, solver, start, **limits)


def _refuses_solver(solver: Any) -> str | None:
    if fits(solver, Solver):
        return None
    given = class_or_function(solver) or repr(solver)
    advice = "a tolerance is the keyword tol" if isinstance(solver, float | int) else "or None, which chooses one"
    return f"the solver is an object such as sparseopt.PrimalDual(), given {given}; {advice}"


def _refuses_data(problem: Problem) -> str | None:
    if not isinstance(problem, Problem):
        return f"solve needs a sparseopt.Problem(loss, penalty, operator=None), given {type(problem).__name__}"
    if kind := class_or_function(problem.loss):
        return f"a loss is an object such as sparseopt.LeastSquares(A, b), given {kind}"
    if isinstance(problem.loss, ScalarLoss):
        name = type(problem.loss).__name__
        return (
            "solve needs a loss of data, such as sparseopt.LogisticLoss(A, y), given the loss of one observation: "
            f"write DataLoss(so.scalar.{name}(), matrix, target)"
        )
    if reason := refuses_map("operator", problem.operator):
        return reason
    if kind := class_or_function(problem.penalty):
        return f"a penalty is an object such as sparseopt.L1(10.0), given {kind}"
    return own_refusal(problem.penalty) or own_refusal(problem.loss)


def _dtype(problem: Problem, start: Any) -> Any:
    """A float that holds the entries of start and of every array in the problem."""
    arrays = [leaf for leaf in (start, *jax.tree.leaves(problem)) if np.ndim(leaf) and hasattr(leaf, "dtype")]
    floats = [leaf.dtype for leaf in arrays if jnp.issubdtype(leaf.dtype, jnp.floating)]
    floats += [problem.loss.dtype] if isinstance(problem.loss, DataLoss) else []
    return jnp.result_type(*map(jax.dtypes.canonicalize_dtype, floats)) if floats else jnp.result_type(float)


def _refuses_shapes(problem: Problem, start: Any) -> str | None:
    if isinstance(problem.loss, DataLoss | Quadratic):
        wanted = problem.loss.start_shape()
        if jnp.shape(start) != wanted:
            return f"start needs the shape {wanted} of the loss's x, given {jnp.shape(start)}"
    maps = {"operator": problem.operator}
    if isinstance(problem.loss, DataLoss):
        maps[f"matrix of {type(problem.loss).__name__}"] = problem.loss.matrix
    reasons = (refuses_transpose(name, given, start) for name, given in maps.items() if given is not None)
    return next((reason for reason in reasons if reason), None)
