"""Floor 3: the problem, the solver protocol, the solution, and `solve`, the package's only outer loop.

    minimise over x    loss(x) + penalty(operator x)

A solver is a frozen pytree with four pure methods; the loop, the stopping rule, the history and the status
live here and nowhere else. Everything runs under `jit` and `vmap`; under `vmap` each lane stops on its own.
"""

import enum
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.types import pytree


@pytree
class Problem:
    """`minimise loss(x) + penalty(operator x)`; without an operator the penalty acts on x itself."""

    loss: Any
    penalty: Any
    operator: Any = None


class Status(enum.IntEnum):
    """How a solve ended. `Status(int(solution.status))` names it; `.advice` says what to try.

    Example:
        >>> so.Status(1).name
        'MAX_STEPS'
        >>> so.Status.NONFINITE.advice
        'a value became infinite or NaN: check the input for non-finite or huge values, or use a smaller step size'
    """

    CONVERGED = 0
    MAX_STEPS = 1
    NONFINITE = 2
    PRECISION = 3
    STATIONARY = 4

    @property
    def advice(self) -> str:
        """One sentence for a person."""
        return {
            Status.CONVERGED: "the residual reached the tolerance",
            Status.MAX_STEPS: "the step limit was reached before the tolerance: raise max_steps, raise tol, or "
            "try another method",
            Status.NONFINITE: "a value became infinite or NaN: check the input for non-finite or huge values, "
            "or use a smaller step size",
            Status.PRECISION: "rounding limits the answer before the tolerance: the measure no longer falls; "
            "use float64, or raise tol",
            Status.STATIONARY: "the stationarity residual reached the tolerance; the problem is not known to be "
            "convex, so this is no certificate of optimality",
        }[self]


class Measure(NamedTuple):
    """What a solver says about its state.

    Attributes:
        residual: the stopping measure.
        objective: loss plus penalty.
        gap: a relative duality gap or NaN.
        extra: any other scalars worth a history, as a pytree.
        stalled: True ends the solve with `Status.PRECISION`: rounding keeps the residual from falling further.
    """

    residual: Float[Array, ""]
    objective: Float[Array, ""]
    gap: Float[Array, ""]
    extra: Any = None
    stalled: Any = False


class Solver(Protocol):
    """The four methods that `solve` calls. All are pure; `problem` is passed in so that a solver holds no data.

    Two more are optional. `refuses(problem) -> str | None` is the one place where a solver says what it needs of a
    problem: what is wrong and what to do, or None where it can solve it. It looks at the problem's structure (types,
    attributes, whether there is an operator) and never at values, so it works on tracers; `solve` asks it first. A
    solver without it takes every problem. An attribute `stride` says how many iterations a step makes, for a solver
    whose measure is expensive; steps are then counted in iterations.
    """

    def init(self, problem: Problem, x0: Any) -> Any:
        """The state before the first step: a pytree of fixed structure, shapes and dtypes."""

    def step(self, problem: Problem, state: Any) -> Any:
        """The state after one iteration, or after `stride` of them."""

    def measure(self, problem: Problem, state: Any) -> Measure:
        """Residual, objective and gap of a state; cheap, since it runs after every step."""

    def extract(self, problem: Problem, state: Any) -> Any:
        """The answer held by a state."""


def lacks(solver: Any, part: str, given: Any, *needed: str) -> str | None:
    """Why `solver.refuses` a problem whose `part`, "loss" or "penalty", lacks a method or field; None if it has all."""
    absent = [name for name in needed if not hasattr(given, name)]
    if not absent:
        return None
    return (
        f"{type(solver).__name__} needs a {part} with {', '.join(needed)}, given {type(given).__name__} without "
        f"{', '.join(absent)}; give the {part} what is missing, or take another solver"
    )


def refuses_operator(solver: Any, problem: Problem) -> str | None:
    """Why a solver that takes the prox of the penalty alone refuses a problem; None where there is no operator."""
    if problem.operator is None:
        return None
    return (
        f"{type(solver).__name__} takes the prox of the penalty alone and solves problems without an operator, given "
        f"the operator {type(problem.operator).__name__}; for the differences of a graph use sparseopt.trend_filter, "
        "whose solvers Admm and LossAdmm take an operator, or write the penalty of `operator x` as a penalty with a "
        "prox of its own"
    )


@pytree
class Solution:
    """What `solve` returns.

    Attributes:
        value: the answer.
        status: a `Status` as an int32 scalar (an array of them under vmap).
        steps: iterations done.
        residual: the solver's own stopping measure at the end.
        objective: loss plus penalty at the end.
        gap: relative duality gap, NaN where the solver has no certificate.
        history: a `Measure` of arrays `[max_steps]`, NaN beyond `steps`, or None when not asked for
            (its `stalled` is None).
        state: the solver's last state, for a warm start or a closer look.
    """

    value: Any
    status: Any
    steps: Any
    residual: Any
    objective: Any
    gap: Any
    history: Any
    state: Any

    def check(self) -> "Solution":
        """Return self if every lane converged, with a certificate or to a stationary point.

        Raises:
            RuntimeError: otherwise, saying how the worst lane ended and what to try.
        """
        ended = {Status(int(status)) for status in jnp.ravel(self.status)}
        order = (Status.NONFINITE, Status.MAX_STEPS, Status.PRECISION, Status.STATIONARY, Status.CONVERGED)
        worst = next(status for status in order if status in ended)
        if worst not in (Status.CONVERGED, Status.STATIONARY):
            raise RuntimeError(
                f"not converged ({worst.name}) after {int(jnp.max(self.steps))} steps with residual "
                f"{float(jnp.max(self.residual)):.3g}: {worst.advice}"
            )
        return self


def solve(
    problem: Problem,
    solver: Solver,
    x0: Any,
    *,
    tol: float | Array = 1e-6,
    max_steps: int | Array = 1000,
    history: bool = False,
) -> Solution:
    """Iterate `solver` on `problem` from `x0` until its residual is at most `tol`.

    Args:
        problem: what to minimise.
        solver: how.
        x0: the start, of the answer's shape and dtype. On well-conditioned problems the answers from starts in float32
            and in float64 agree to 1e-4 of the largest entry.
        tol: bound on the solver's residual; a negative one runs exactly `max_steps` steps.
        max_steps: step limit, 0 or more; an integer where a history is asked for.
        history: record residual, objective and gap after every step. A solver whose step makes `stride` iterations
            counts these: its steps end at a multiple of the stride, and the iterations in between are NaN.

    Returns:
        A `Solution`. It never raises on non-convergence; `solution.check()` does. An answer that is not finite in
        every entry, from whatever cause, has the status NONFINITE.

    Raises:
        ValueError: if `max_steps` is negative, or if the solver cannot solve such a problem: with the text of its
            `refuses`, before anything is traced.

    Example:
        >>> problem = so.Problem(so.Quadratic(jnp.eye(3), jnp.array([3.0, 0.1, -2.0])), so.L1(1.0))
        >>> solution = so.solve(problem, so.Maiht(), x0=jnp.zeros(3), tol=1e-6).check()
        >>> solution.value.round(3)
        Array([ 2.,  0., -1.], dtype=float32)
        >>> so.Status(int(solution.status)).name
        'CONVERGED'
    """
    if isinstance(max_steps, int) and max_steps < 0:
        raise ValueError(f"max_steps must be 0 or more, given {max_steps}")
    refuses = getattr(solver, "refuses", None)
    if refuses is not None and (reason := refuses(problem)):
        raise ValueError(reason)
    return _solve(problem, solver, x0, tol, max_steps, int(max_steps) if history else 0)


@partial(jax.jit, static_argnums=(5,))
def _solve(
    problem: Problem, solver: Solver, x0: Any, tol: float | Array, max_steps: int | Array, history_length: int
) -> Solution:
    def measured(state: Any) -> Measure:
        now = solver.measure(problem, state)
        return now._replace(stalled=jnp.asarray(now.stalled, bool))

    def sound(now: Measure, steps: Array) -> Array:
        # A start outside the set of an indicator costs +inf; after a step that is an overflow.
        infeasible_start = (steps == 0) & jnp.isposinf(now.objective)
        return (jnp.isfinite(now.objective) | infeasible_start) & ~jnp.isnan(now.residual)

    def going(carry: tuple) -> Array:
        _, steps, now, _ = carry
        return (steps < max_steps) & ~(now.residual <= tol) & sound(now, steps) & ~now.stalled

    stride = getattr(solver, "stride", 1)

    def advance(carry: tuple) -> tuple:
        state, steps, _, record = carry
        state = solver.step(problem, state)
        now, steps = measured(state), steps + stride
        if history_length:
            kept = now._replace(stalled=None)
            record = jax.tree.map(lambda rows, value: rows.at[steps - 1].set(value), record, kept)
        return state, steps, now, record

    state = solver.init(problem, x0)
    first = measured(state)
    # The residual before any step says nothing yet (no change has been seen): always take one step.
    first = first._replace(residual=jnp.full_like(first.residual, jnp.inf), stalled=jnp.zeros((), bool))
    record = jax.tree.map(lambda v: jnp.full((history_length,), jnp.nan, v.dtype), first._replace(stalled=None))
    carry = (state, jnp.zeros((), jnp.int32), first, record)
    state, steps, last, record = jax.lax.while_loop(going, advance, carry)

    value = solver.extract(problem, state)
    # A solver may measure something that a NaN in its answer does not reach.
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(value)]))
    status = jnp.where(last.stalled, Status.PRECISION, Status.MAX_STEPS)
    status = jnp.where(last.residual <= tol, Status.CONVERGED, status)
    status = jnp.where(sound(last, steps) & finite, status, Status.NONFINITE).astype(jnp.int32)
    return Solution(
        value=value,
        status=status,
        steps=steps,
        residual=last.residual,
        objective=last.objective,
        gap=last.gap,
        history=record if history_length else None,
        state=state,
    )
