"""The plan of a splitting method: what it splits, its x-step, and the solve and its continuation with that.

start -> the solver's loop in the core -> the dual of the rows.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from sparseopt.core.base.compile import Jitted
from sparseopt.core.base.types import pytree, static
from sparseopt.core.operators.maps import Split
from sparseopt.core.penalties.protocols import feasible, has_conjugate, is_norm
from sparseopt.core.problem.iterate import iterate
from sparseopt.core.problem.problem import Problem, Solution, Start
from sparseopt.core.solvers.admm import Admm
from sparseopt.trend.base.fit import Fit
from sparseopt.trend.base.ground import Data
from sparseopt.trend.base.penalties import couples_rows
from sparseopt.trend.base.pieces import TrendSolution
from sparseopt.trend.methods.plan import Plan, finish, fit

COUPLED = 'NuclearNorm couples all rows, which Doge-ADMM moves by steps of their own: use method="admm"'
# rho starts at this multiple of the weight over the noise: the balance 3 of admm.py at duals of rms 0.8 weight.
FIRST_RHO = 2.4
# The memory of Anderson acceleration of the standard ADMM; fifteen were hardly better.
ACCELERATION = 10
# The next of two similar fits uses the rho of the last one, moved towards the rho that its last step asks for by the
# root of the ratio, by at most this factor.
LARGEST_WISH = 2.0


@pytree
class SplitPlan(Plan):
    """The plan of a splitting method."""

    split: Split  # the operator, split as the method needs it
    node_solve: Any  # the x-step
    cadence: int = static()  # steps between two checks

    def refuses(self, penalty: Any, weighted: bool) -> str | None:
        if couples_rows(penalty) and jnp.ndim(self.split.row_scale):
            return COUPLED
        if weighted and self.node_solve.one_weight:
            return "transforms along the axes solve for nodes of one weight alone"
        return None

    def solver(self, rho: Any, relaxation: Any = 1.7, settles: Any = False, sets: Any = None) -> Any:
        more: Any = {"acceleration": ACCELERATION, "settles": settles, "sets": sets}
        return Admm(self.node_solve, rho, relaxation, self.cadence, **more)

    def solve(
        self, data: Data, penalty: Any, limits: tuple[Any, Any], start: Start, rates: tuple[Any, Any, Any], history: int
    ) -> tuple[Solution, Array, Any]:
        kind, (tol, limit), (rho, relaxation, settles) = data.centred.target.dtype, limits, rates
        usual = (FIRST_RHO * data.strength(self.ground, penalty)).astype(kind)
        first, sets = usual if rho is None else jnp.asarray(rho, kind), None if is_norm(penalty) else self.ground
        solver = self.solver(first, jnp.asarray(relaxation, kind), settles, sets)
        last = start.rho
        if last is not None:
            last = None if rho is not None else jnp.where(last > 0, last, usual)
        start, limit = Start(start.x, start.dual, last), to_next_check(limit, self.cadence)
        problem = Problem(data.centred, penalty, self.split)
        found = iterate(problem, solver, start, tol=tol, max_steps=history or limit, history=history > 0)
        dual = found.state.candidate
        if has_conjugate(penalty):
            # Without a step it is the start's dual, which may belong to a larger weight.
            dual = jnp.where(found.steps > 0, dual, feasible(penalty, dual))
        return found, dual, self.split.row_scale / found.state.rho

    def pace(self, asked: Fit) -> "SplitPlan":
        """The plan with the cadence of a request."""
        given = asked.settings.cadence
        return dataclasses.replace(self, cadence=min(self.cadence if given is None else given, asked.max_steps))

    def fit_asked(self, asked: Fit, settles: bool = False) -> TrendSolution:
        plan, rates = self.pace(asked), (asked.settings.rho, asked.settings.relaxation, settles)
        history = to_next_check(asked.max_steps, plan.cadence) if asked.history else 0
        more = {"data": asked.data, "start": asked.first(), "rates": rates, "history": history}
        return fit(plan, asked.arrays, asked.rows, (asked.tol, asked.max_steps), **more)


def to_next_check(max_steps: Any, cadence: int) -> Any:
    """A step limit, rounded up to the next check."""
    return -(-max_steps // cadence) * cadence


@Jitted
def resume(
    plan: SplitPlan,
    data: Data,
    penalty: Any,
    state: Any,
    limits: tuple[Any, Any],
    pace: tuple[Any, Any],
    settled: Any = False,
) -> tuple[TrendSolution, Start]:
    """A fit of prepared data from a state of the solver, and the start of a similar fit; arguments as in `fit`.

    After a `settled` rho the next one moves towards the rho that the last step asks for.
    """
    kind, (tol, max_steps), (relaxation, settles) = state.now.x.dtype, limits, pace
    solver, tol = plan.solver(state.rho, jnp.asarray(relaxation, kind), settles), jnp.asarray(tol, kind)
    limit = to_next_check(max_steps, plan.cadence)
    found = iterate(Problem(data.centred, penalty, plan.split), solver, state, tol=tol, max_steps=limit)
    state = found.state
    ended = finish(plan.ground, data, penalty, found, state.candidate, tol)
    wish = jnp.where(settled, jnp.sqrt(state.check.motion / state.rho), 1)
    following = Start(found.value, state.candidate, state.rho * jnp.clip(wish, 1 / LARGEST_WISH, LARGEST_WISH))
    return ended, following
