"""`iterate`, the package's only outer loop: the stopping rule, the history and the status."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sparseopt.core.base.arguments import finite_number, own_refusal, whole_number
from sparseopt.core.base.compile import Jitted
from sparseopt.core.base.types import is_traced
from sparseopt.core.problem.differentiate import Found, attach
from sparseopt.core.problem.problem import Measure, Problem, Solution, Solver, Status

# Steps are counted in int32.
MOST_STEPS = 2**31 - 1


def iterate(
    problem: Problem,
    solver: Solver,
    start: Any,
    *,
    tol: float | Array = 1e-6,
    max_steps: int | Array = 1000,
    history: bool = False,
) -> Solution:
    """Iterate `solver` on `problem` until its residual is at most `tol`; arguments and errors as in `sparseopt.solve`.

    `start` is in the form that the solver expects.
    """
    max_steps = checked_limits(tol, max_steps)
    if reason := own_refusal(solver, problem):
        raise ValueError(reason)
    # A step makes `stride` iterations, so the last one may end beyond the limit.
    length = int(max_steps) + -int(max_steps) % getattr(solver, "stride", 1) if history else 0
    # Without steps there is no loop to compile.
    moves = is_traced(max_steps) or max_steps != 0
    return _iterate(problem, solver, start, tol, max_steps, length, moves)


def checked_limits(tol: Any, max_steps: Any) -> Any:
    """`max_steps` as an int, if it is known; a ValueError for a tolerance or a limit that makes no sense."""
    if not is_traced(tol) and math.isnan(finite_number(tol)):
        raise ValueError(f"tol must be a finite number, given {tol!r}")
    return max_steps if is_traced(max_steps) else whole_number("max_steps", max_steps, 0, MOST_STEPS)


@partial(Jitted, static_argnums=(5, 6))
def _iterate(
    problem: Problem,
    solver: Solver,
    start: Any,
    tol: float | Array,
    max_steps: int | Array,
    history_length: int,
    moves: bool = True,
) -> Solution:
    given = problem
    # The loop is not differentiated: derivatives are attached to its answer.
    problem, solver, start = jax.lax.stop_gradient((problem, solver, start))

    def measure(state: Any) -> Measure:
        now = solver.measure(problem, state)
        return now._replace(stalled=jnp.asarray(now.stalled, bool))

    def sound(now: Measure, steps: Array) -> Array:
        # A start outside the set of an indicator costs +inf; after a step, +inf is an overflow.
        infeasible_start = (steps == 0) & jnp.isposinf(now.objective)
        return (jnp.isfinite(now.objective) | infeasible_start) & ~jnp.isnan(now.residual)

    stride = getattr(solver, "stride", 1)

    def advance(carry: tuple) -> tuple:
        state, steps, _, record = carry
        state = solver.step(problem, state)
        now, steps = measure(state), steps + stride
        if history_length:
            kept = now._replace(stalled=None)
            record = jax.tree.map(lambda rows, value: rows.at[steps - 1].set(value), record, kept)
        return state, steps, now, record

    def going(carry: tuple) -> Array:
        _, steps, now, _ = carry
        return (steps < max_steps) & ~(now.residual <= tol) & sound(now, steps) & ~now.stalled

    state = solver.init(problem, start)
    first = measure(state)
    # The residual before any step says nothing (no change has been seen): always take one step.
    first = first._replace(residual=jnp.full_like(first.residual, jnp.inf), stalled=jnp.zeros((), bool))
    kept = first._replace(stalled=None)
    record = jax.tree.map(lambda v: jnp.full((history_length,), jnp.nan, v.dtype), kept)
    carry = (state, jnp.zeros((), jnp.int32), first, record)
    state, steps, last, record = jax.lax.while_loop(going, advance, carry) if moves else carry

    value = solver.extract(problem, state)
    loss_dual, dual = solver.duals(problem, state) if hasattr(solver, "duals") else (None, None)
    # A NaN in the answer may not show in the solver's measure.
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(value)]))
    status = jnp.where(last.stalled, Status.PRECISION, Status.MAX_STEPS)
    # Without a gap a small residual proves no more.
    reached = jnp.where(jnp.isfinite(last.gap), Status.CONVERGED, Status.STATIONARY)
    status = jnp.where(last.residual <= tol, reached, status)
    status = jnp.where(sound(last, steps) & finite, status, Status.NONFINITE).astype(jnp.int32)
    step = solver.prox_step(problem, state) if hasattr(solver, "prox_step") else getattr(state, "step_size", None)
    given = solver.solves(given, state) if hasattr(solver, "solves") else given
    value, objective, _ = attach(given, value, last.objective, Found(loss_dual, dual, step))
    return Solution(
        value=value,
        status=status,
        steps=steps,
        residual=last.residual,
        objective=objective,
        gap=last.gap,
        history=record if history_length else None,
        state=state,
        dual=dual,
        violation=last.violation,
    )
