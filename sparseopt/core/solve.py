"""`solve`, the front door of the core: checks on the host, the choice of a solver, the start."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparseopt.core.base.arguments import (
    class_or_function,
    fits,
    own_refusal,
    refuses_leaves,
    refuses_not_finite,
    renames,
)
from sparseopt.core.base.types import is_traced, known_on_cpu, precision, wide_types
from sparseopt.core.losses.data import DataLoss
from sparseopt.core.losses.quadratic import Quadratic
from sparseopt.core.losses.scalar import ScalarLoss
from sparseopt.core.operators.matrices import Matrix, SparseMatrix, known_matrix, refuses_map, refuses_transpose
from sparseopt.core.penalties.protocols import is_convex
from sparseopt.core.problem.iterate import checked_limits, iterate
from sparseopt.core.problem.padding import cut, pad_problem
from sparseopt.core.problem.problem import Problem, Solution, Solver, Status
from sparseopt.core.solvers.accelerated import AcceleratedProximalGradient, GraduatedProximalGradient
from sparseopt.core.solvers.maiht import Maiht
from sparseopt.core.solvers.primal_dual import PrimalDual, SplitAdmm
from sparseopt.core.solvers.refit import Refit
from sparseopt.core.working_sets.groups import UNLIKE
from sparseopt.core.working_sets.working_set import WorkingSet


class Choice(NamedTuple):
    """A solver, and why it was chosen."""

    solver: Solver
    why: str


# Up to FEW unknowns an inverse is always worth its cost; beyond, if it has at most ENTRIES times the entries of the
# matrices, since every step multiplies with it.
FEW, ENTRIES = 256, 4


def _exact_pays(problem: Problem, here: Any) -> bool:
    """Whether a product with an inverse of all unknowns is cheap compared to products with the matrices."""
    size = math.prod(problem.loss.start_shape())
    maps = (problem.operator, getattr(problem.loss, "matrix", getattr(problem.loss, "hessian", None)))
    return size <= FEW or size**2 <= ENTRIES * sum(map(np.size, jax.tree.leaves(maps)))


# Of a loss that is no square groups pay from this many columns on.
MANY_COLUMNS = 1000


def _columns_pay(problem: Problem) -> bool:
    """Whether steps on few columns take less time than steps with all."""
    if (labels := getattr(problem.penalty, "groups", None)) is not None:
        sizes = np.bincount(np.asarray(labels))
        if sizes.max(initial=0) > UNLIKE * sizes.mean():
            return False
    by_entry = problem.loss.is_square or hasattr(problem.penalty, "entry_terms")
    return by_entry or math.prod(problem.loss.start_shape()) >= MANY_COLUMNS


# The first that accepts a problem and suits it is chosen; one with None suits every problem that it accepts.
CANDIDATES: tuple[tuple[Any, Callable[[Problem, Any], bool] | None, str], ...] = (
    (
        WorkingSet(),
        lambda problem, here: known_on_cpu((problem, here)) and _columns_pay(problem),
        "a smooth loss of a matrix and a penalty on entries or groups: coordinate and Newton steps on few columns",
    ),
    (Refit(), None, "a quadratic loss on a fixed support is a linear system: conjugate gradients"),
    (
        Maiht(),
        lambda problem, _: isinstance(problem.loss, Quadratic) and not is_convex(problem.penalty),
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
        ValueError: for a problem that `solve` refuses whatever the solver, and if no solver accepts it, with what each
            of them needs.

    Example:
        >>> loss = so.LeastSquares(np.eye(3), np.ones(3))
        >>> so.chosen_solver(so.Problem(loss, so.L1(1.0))).solver
        WorkingSet(most=128)
        >>> print(so.chosen_solver(so.Problem(loss, so.L1(1.0), np.diff(np.eye(3), axis=0))).why)
        an operator or a loss with kinks, and few unknowns: an inverse computed once saves many steps
    """
    if reason := refuses_problem(problem) or _refuses_matrix(problem):
        raise ValueError(reason)
    return _choose(problem, jax.device_put(np.float32(0)))


def _choose(problem: Problem, here: Any) -> Choice:
    """The choice; `here` is a number on the device, which is traced inside a function that is being compiled."""
    reasons = []
    for solver, suits, why in CANDIDATES:
        reason = solver.refuses(problem)
        if reason is None and (suits is None or suits(problem, here)):
            return Choice(solver, why)
        reasons += [reason] if reason else []
    raise ValueError("no solver accepts this problem:\n" + "\n".join(f"  {reason}" for reason in reasons))


@renames(x0="start")
def solve(
    problem: Problem,
    solver: Solver | None = None,
    start: Any = None,
    *,
    tol: float | Array | None = None,
    max_steps: int | Array = 10_000,
    history: bool = False,
) -> Solution:
    """Solve a problem; works under `jit`, `vmap` and `grad` too.

    The dtype of its JAX arrays decides the precision. If all arrays are NumPy's (or lists, or SciPy's), it is theirs,
    at least float32 and float64 for whole numbers, whatever JAX's 64-bit flag says; the answer in float64 then consists
    of NumPy arrays unless the flag is on. A TPU computes in float32. Inside `jit`, `vmap` or `grad` JAX's flag decides.

    `value` and `objective` have derivatives of every order (`jax.grad`, `jax.jvp`) with respect to every leaf of the
    problem, by the implicit function theorem: one linear solve, whatever the number of iterations. They are exact where
    the active set (the zeros of x or of `operator x`, the kept entries of a pattern) is locally constant, which is
    almost everywhere; at a tie they are one-sided. Everything else in a `Solution` has zero derivatives.

    Args:
        problem: what to minimise.
        solver: a solver such as `so.PrimalDual()`; None uses `chosen_solver(problem)`.
        start: where to begin, of the answer's shape and dtype, or None for zeros. With None and a concave penalty
            (`MCP`, `SCAD`, `LogSum`) paths of such penalties lead to a better start: a few rounds of `WorkingSet`, or
            the first 200 iterations of `AcceleratedProximalGradient` (`GraduatedProximalGradient`).
        tol: bound on the solver's residual: the relative duality gap `(P - D) / D` if there is a certificate. None is
            1e-6 in float64 and 1e-4 in float32, whose gaps often end near 1e-5. With a negative `tol` the solver runs
            `max_steps` steps.
        max_steps: step limit, 0 or more; a solver whose steps make `stride` iterations rounds it up to whole steps. An
            integer if a history is requested.
        history: record residual, objective and gap after every step. If a step of the solver makes `stride` iterations,
            the history has one entry per iteration, and those between steps are NaN.

    Returns:
        A `Solution`. `solve` never raises on non-convergence; `solution.check()` does. CONVERGED means that the gap is
        known and at most `tol`; without a gap a small residual is STATIONARY. An answer with an entry that is not
        finite has the status NONFINITE. A constraint on `operator x` is met up to `1e-3 tol max(1, max |operator x|)`
        in float64, up to `tol` in float32; `violation` says how far it is missed.

    Raises:
        ValueError: before any work, for a problem that the solver cannot solve (with the text of its `refuses`), for
            shapes that do not fit, an `rmv` that is not the transpose of `mv`, a Hessian (of 256 rows or fewer) that is
            not positive semidefinite, NaN, data outside a loss's domain, a constraint on `operator x` that no x meets
            (checked for matrices of up to a million entries), or a negative `max_steps`. The values of tracers are not
            checked.

    Example:
        >>> problem = so.Problem(so.Quadratic(np.eye(3), np.array([3.0, 0.1, -2.0])), so.L1(1.0))
        >>> solution = so.solve(problem).check()
        >>> solution.value.round(3)
        array([ 2.,  0., -1.])
        >>> so.Status(int(solution.status)).name
        'CONVERGED'
        >>> jax.grad(lambda weight: so.solve(so.Problem(problem.loss, so.L1(weight))).value.sum())(1.0)
        Array(0., dtype=float32, weak_type=True)
    """
    if reason := refuses_problem(problem):
        raise ValueError(reason)
    # A number put on the device is traced inside every function that is being compiled.
    here = jax.device_put(np.float32(0))
    problem, start, kind = _in_one_precision(problem, start, here)
    native = wide_types() or kind != np.float64
    with precision(kind):
        found = _solve(problem, solver, start, (kind, here), tol, max_steps, history)
        if native and isinstance(found.value, np.ndarray):
            found = jax.device_put(found)
    return found if native or isinstance(found.value, np.ndarray) else jax.device_get(found)


def _refuses_matrix(problem: Problem) -> str | None:
    """Why the entries of a loss's matrix cannot be used; apart, since a working set finds that by its first product."""
    return problem.loss.refuses_matrix() if isinstance(problem.loss, DataLoss) else None


def _solve(problem: Problem, solver: Any, start: Any, place: Any, tol: Any, max_steps: Any, history: bool) -> Solution:
    chosen, (kind, here) = solver is None, place
    if chosen:
        solver = _choose(problem, here).solver
    elif reason := _refuses_solver(solver) or own_refusal(solver, problem):
        raise ValueError(reason)
    from_zeros = start is None
    if from_zeros:
        if not hasattr(problem.loss, "start"):
            raise ValueError(
                f"give a start: the shape of x does not follow from a {type(problem.loss).__name__} (a loss may "
                "have a method start() that returns zeros of x)"
            )
        known = isinstance(problem.loss, DataLoss) and hasattr(solver, "on_host")
        start = np.zeros(problem.loss.start_shape(), kind) if known else problem.loss.start()
        if type(solver) is AcceleratedProximalGradient and hasattr(problem.penalty, "with_concavity"):
            solver = GraduatedProximalGradient(solver.step_size, solver.cadence)
    if isinstance(start, np.ndarray | jax.Array) and (
        reason := refuses_leaves("start", start) or _refuses_shapes(problem, start)
    ):
        raise ValueError(reason)
    usual = 1e-6 if kind == np.float64 else 1e-4
    limits: dict[str, Any] = {"tol": usual if tol is None else tol, "max_steps": max_steps, "history": history}
    max_steps = checked_limits(limits["tol"], max_steps)
    if hasattr(solver, "on_host") and known_on_cpu((problem, start, tol, max_steps, here)):
        known_start = np.asarray(start, kind)
        found = solver.on_host(problem, known_start, limits["tol"], max_steps, history, yields=chosen)
        if found is not None and (Status.reached(found.status) or not chosen):
            return found
        # What coordinate steps leave may still fall by steps on all entries.
        if found is not None:
            left = max_steps if history else max_steps - int(found.steps)
            begin = None if from_zeros and hasattr(problem.penalty, "with_concavity") else found.value
            rest = _solve(problem, AcceleratedProximalGradient(), begin, place, tol, left, history)
            return rest if rest.objective <= found.objective or rest.gap <= found.gap else found
    if isinstance(start, np.ndarray | jax.Array):
        start = jnp.asarray(start, kind)
    if reason := _refuses_matrix(problem):
        raise ValueError(reason)
    problem = jax.tree.map(_interleaved, problem, is_leaf=lambda node: isinstance(node, SparseMatrix))
    if shared := pad_problem(problem, solver, start):
        return cut(iterate(shared[0], solver, shared[1], **limits), problem, shared[0], start)
    return iterate(problem, solver, start, **limits)


def _interleaved(node: Any) -> Any:
    return node.interleaved() if isinstance(node, SparseMatrix) else node


def _refuses_solver(solver: Any) -> str | None:
    if fits(solver, Solver):
        return None
    given = class_or_function(solver) or repr(solver)
    advice = "a tolerance is the keyword tol" if isinstance(solver, float | int) else "or None, which chooses one"
    return f"the solver is an object such as sparseopt.PrimalDual(), given {given}; {advice}"


def refuses_problem(problem: Any) -> str | None:
    """Why no solver can take it."""
    if not isinstance(problem, Problem):
        return f"solve needs a sparseopt.Problem(loss, penalty, operator=None), given {type(problem).__name__}"
    loss, penalty = problem.loss, problem.penalty
    if kind := class_or_function(loss) or _plain(loss):
        return f"a loss is an object such as sparseopt.LeastSquares(A, b), given {kind}"
    if fits(loss, ScalarLoss):
        name = type(loss).__name__
        return (
            "solve needs a loss of data, such as sparseopt.LogisticLoss(A, y), given the loss of one observation: "
            f"write DataLoss(so.scalar.{name}(), matrix, target)"
        )
    if kind := class_or_function(penalty) or _plain(penalty):
        return f"a penalty is an object such as sparseopt.L1(10.0), given {kind}"
    if isinstance(penalty, DataLoss | Quadratic) or fits(penalty, ScalarLoss):
        return f"the order is Problem(loss, penalty, operator), given the loss {type(penalty).__name__} as the penalty"
    if reason := refuses_map("operator", problem.operator) or own_refusal(penalty) or own_refusal(loss):
        return reason
    for name in ("loss", "penalty", "operator"):
        if reason := refuses_leaves(name, getattr(problem, name)):
            return reason
    return refuses_not_finite("operator", problem.operator)


def _plain(given: Any) -> str | None:
    """What a number, a text or an array in place of an object is; None for an object."""
    if isinstance(given, np.ndarray | jax.Array):
        return f"an array of shape {np.shape(given)}"
    return repr(given) if isinstance(given, int | float | complex | str | list | tuple | np.generic) else None


def _in_one_precision(problem: Problem, start: Any, here: Any) -> tuple[Problem, Any, np.dtype]:
    """The problem and its start with floats of one dtype, and the dtype; see `solve`. Single numbers do not count."""
    if type(start) in (list, tuple, int, float, complex):
        start = np.asarray(start)
    leaves = jax.tree.leaves((problem, start))
    floats = [leaf for leaf in leaves if _is_floats(leaf)]
    if is_traced((problem, start, here)):
        kinds = [leaf.dtype for leaf in floats] or [np.dtype(np.float64)]
        return problem, start, np.dtype(jnp.result_type(*map(jax.dtypes.canonicalize_dtype, kinds)))
    deciding = [leaf.dtype for leaf in floats if isinstance(leaf, jax.Array)] or [leaf.dtype for leaf in floats]
    if not deciding:
        of_jax = any(isinstance(leaf, jax.Array) for leaf in leaves)
        deciding = [jnp.result_type(float) if of_jax else np.dtype(np.float64)]
    kind = np.dtype(np.float32 if jax.default_backend() == "tpu" else np.result_type(*deciding, np.float32))

    def taken(leaf: Any) -> Any:
        if _is_floats(leaf) and leaf.dtype.itemsize > kind.itemsize:
            return leaf.astype(kind)
        # JAX 0.10 keeps an array that a compiled function closed over in the precision of that time; a view is another.
        return leaf.view() if isinstance(leaf, np.ndarray) else leaf

    if kind == np.float64 or any(leaf.dtype.itemsize > kind.itemsize for leaf in floats):
        problem, start = jax.tree.map(taken, (problem, start))
    return problem, start, kind


def _is_floats(leaf: Any) -> bool:
    """Whether it is an array of floats; single numbers are promoted to what they meet."""
    return np.ndim(leaf) > 0 and hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _refuses_shapes(problem: Problem, start: Any) -> str | None:
    if of_package := isinstance(problem.loss, DataLoss | Quadratic):
        wanted = problem.loss.start_shape()
        if jnp.shape(start) != wanted:
            return f"start needs the shape {wanted} of the loss's x, given {jnp.shape(start)}"
    maps = {"operator": problem.operator}
    if isinstance(problem.loss, DataLoss):
        maps[f"matrix of {type(problem.loss).__name__}"] = problem.loss.matrix
    reasons = (refuses_transpose(name, given, start) for name, given in maps.items() if given is not None)
    if reason := next((reason for reason in reasons if reason), None):
        return reason
    like = jax.ShapeDtypeStruct(start.shape, jax.dtypes.canonicalize_dtype(start.dtype))
    rows = like
    if isinstance(problem.operator, Matrix):
        rows = jax.ShapeDtypeStruct(problem.operator.out_shape + like.shape[1:], like.dtype)
    elif problem.operator is not None:
        rows = jax.eval_shape(problem.operator.mv, like)
    return (
        (None if of_package else _refuses_array("loss", problem.loss, "gradient", like))
        or _refuses_array("penalty", problem.penalty, "prox", rows)
        or _refuses_empty(problem, rows)
    )


def _refuses_array(name: str, given: Any, method: str, like: Any) -> str | None:
    """Why a penalty, or a loss of the user's own, does not accept arrays like `like`."""
    leaves, tree = jax.tree.flatten(given)
    # Single numbers of entries suit every shape.
    if not hasattr(given, method) or (getattr(given, "separable", False) and not any(map(np.ndim, leaves))):
        return None
    kinds = tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    return _refuses_kind(name, method, tree, kinds, like.shape, like.dtype)


@functools.lru_cache(maxsize=1024)
def _refuses_kind(name: str, method: str, tree: Any, kinds: tuple, shape: tuple[int, ...], dtype: Any) -> str | None:
    leaves = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
    step = (1.0,) if method == "prox" else ()

    def called(leaves: Any, x: Any) -> Any:
        part = tree.unflatten(leaves)
        return getattr(part, method)(x, *step), part.value(x)

    try:
        made, value = jax.eval_shape(called, leaves, jax.ShapeDtypeStruct(shape, dtype))
    except (TypeError, ValueError, IndexError) as error:
        return f"the {name} does not accept an array of shape {shape}: {str(error).splitlines()[0]}"
    if jnp.shape(made) != shape or jnp.shape(value) != ():
        return (
            f"the {name} needs a {method} of the array's shape {shape} and one number as its value, given shapes "
            f"{jnp.shape(made)} and {jnp.shape(value)}: check the shapes of its weights"
        )
    return None


# Of an operator that is checked for a constraint that no x meets.
MOST_ENTRIES = 10**6


def _refuses_empty(problem: Problem, rows: Any) -> str | None:
    """Why no x meets a constraint on `operator x`."""
    if not (getattr(problem.penalty, "excludes_zero", False) and len(rows.shape) == 1):
        return None
    matrix: Any = known_matrix(problem.operator)
    known = matrix is not None and not is_traced(problem.penalty)
    if not (known and matrix.size <= MOST_ENTRIES and problem.penalty.misses(matrix)):
        return None
    return f"no x has `operator x` in the {type(problem.penalty).__name__}: the constraints contradict each other"
