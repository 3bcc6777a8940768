"""A `Plan`, the host work of a method on a graph, and the fit of a signal with it, one pure program.

    minimise over b    1/2 sum_j w_j (y_j - b_j)²  +  sum_k penalty_k(Δ^(k+1) b)

signal -> centred data -> start -> the solver's loop -> the caller's units, certified -> derivatives attached.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparseopt.core.base.compile import Jitted
from sparseopt.core.base.types import pytree, static
from sparseopt.core.operators.maps import Split
from sparseopt.core.penalties.protocols import feasible, has_conjugate, is_norm
from sparseopt.core.problem.certify import Anchor, judge, promote, stationary
from sparseopt.core.problem.differentiate import Found, attach
from sparseopt.core.problem.iterate import iterate
from sparseopt.core.problem.problem import Problem, Solution, Start, Status
from sparseopt.core.solvers.admm import Admm
from sparseopt.trend.base.fit import Fit
from sparseopt.trend.base.ground import Data, Ground, data_of, with_known
from sparseopt.trend.base.penalties import couples_rows
from sparseopt.trend.base.pieces import TrendSolution, nonzero_at

COUPLED = 'NuclearNorm couples all rows, which Doge-ADMM moves by steps of their own: use method="admm"'
# rho starts at this multiple of the weight over the noise: the balance 3 of admm.py at duals of rms 0.8 weight.
FIRST_RHO = 2.4
# The memory of Anderson acceleration of the standard ADMM; fifteen were hardly better.
ACCELERATION = 10
# The next of two similar fits uses the rho of the last one, moved towards the rho that its last step asks for by the
# root of the ratio, by at most this factor.
LARGEST_WISH = 2.0


@pytree
class Plan:
    """A method on a graph: tables, factors and choices; see `fit`."""

    ground: Ground  # the graph's own tables
    split: Split  # the operator, split as the method needs it
    node_solve: Any  # the x-step
    cadence: int = static()  # steps between two checks
    # Whether the start is the fit, without node weights: the first check ends the solve.
    exact: bool = static(default=False)

    def refuses(self, penalty: Any, weighted: bool) -> str | None:
        """Why the plan does not fit such a penalty, or a signal with node weights; None if it does."""
        if couples_rows(penalty) and jnp.ndim(self.split.row_scale):
            return COUPLED
        if weighted and self.node_solve.one_weight:
            return "transforms along the axes solve for nodes of one weight alone"
        return None

    def solver_penalty(self, penalty: Any) -> Any:
        """The penalty on the rows, in the solver's form."""
        return penalty

    def row_dual(self, penalty: Any, dual: Array) -> Array:
        """The dual of the rows from the solver's."""
        return dual

    def solver_dual(self, penalty: Any, dual: Array) -> Array:
        """The solver's dual from the dual of the rows."""
        return dual

    def solver(self, rho: Any, relaxation: Any = 1.7) -> Any:
        acceleration = 0 if self.exact else ACCELERATION
        return Admm(self.node_solve, rho, relaxation, self.cadence, acceleration=acceleration)

    def start(self, penalty: Any, data: Data, weights: Any) -> Start:
        """The centred signal with a dual of 0; or, if the weight may be large enough, the null fit and its dual."""
        ground, centre = self.ground, data.centred.target
        nothing = jnp.zeros(self.split.row_shape(centre), centre.dtype)
        if not is_norm(penalty) or ground.operator.order is None:
            return Start(centre, nothing)
        apart = data.loss.target - data.means
        dual, kept = ground.proof(penalty, apart if weights is None else weights * apart)
        return Start(jnp.where(kept, data.means - data.shift, centre), jnp.where(kept, dual, 0))

    def pace(self, asked: Fit) -> "Plan":
        """The plan with the cadence of a request."""
        given = asked.settings.cadence
        cadence = self.cadence if given is None or self.exact else given
        return dataclasses.replace(self, cadence=min(cadence, asked.max_steps))

    def fit_asked(self, asked: Fit) -> TrendSolution:
        """The fit of a request's signal, in the layout of arrays."""
        plan, rates = self.pace(asked), (asked.settings.rho, asked.settings.relaxation)
        history = to_next_check(asked.max_steps, plan.cadence) if asked.history else 0
        limits = asked.tol, asked.max_steps
        return fit(plan, asked.arrays, asked.rows, limits, start=asked.first(), rates=rates, history=history)


def to_next_check(max_steps: Any, cadence: int) -> Any:
    """A step limit, rounded up to the next check."""
    return -(-max_steps // cadence) * cadence


def known_fit(asked: Fit, value: np.ndarray, flat: bool = False) -> TrendSolution:
    """The solution for a known fit of objective 0; the differences of a flat one are 0."""
    fit, zero, none = asked.on_nodes(value), jnp.zeros((), asked.dtype), jnp.zeros((), jnp.int32)
    rows = asked.geometry.difference(asked.order + 1, asked.dtype).mv(fit)
    nonzero = jnp.zeros(rows.shape, bool) if flat else rows != 0
    return TrendSolution(fit, jnp.asarray(Status.CONVERGED, jnp.int32), none, zero, zero, zero, nonzero=nonzero)


@partial(Jitted, static_argnames="history")
def fit(
    plan: Plan,
    arrays: tuple[Array, Any],
    penalty: Any,
    limits: tuple[Any, Any],
    *,
    start: Start | None = None,
    rates: tuple[Any, Any] = (None, 1.7),
    history: int = 0,
) -> TrendSolution:
    """The fit of a signal, in its units and in the layout of arrays, with its certificate and its derivatives.

    `arrays` are the signal and its weights or None, `limits` the tolerance and the step limit, `rates` rho and the
    relaxation. The penalty is on the rows of `plan.ground.operator`. A start is a point in the caller's units with the
    dual of its rows. If rho is None, or the start's rho is 0, it is chosen from the data. `history` is the number of
    steps in the history, 0 for none.
    """
    (y, weights), (tol, max_steps), (rho, relaxation) = arrays, limits, rates
    given = y, penalty, weights
    plan, y, penalty, weights, start = jax.lax.stop_gradient((plan, y, penalty, weights, start))
    kind, ground = y.dtype, plan.ground
    tol, relaxation = jnp.asarray(tol, kind), jnp.asarray(relaxation, kind)
    data, limit = data_of(ground, y, weights), to_next_check(max_steps, plan.cadence)
    certified = has_conjugate(penalty)
    if certified:
        # A signal without a penalty is the fit; its objective is 0, so no relative gap exists.
        data, free = with_known(ground, data, penalty)
        limit = jnp.where(free, 0, limit)
    usual = (FIRST_RHO * data.strength(ground, penalty)).astype(kind)
    solver = plan.solver(usual if rho is None else jnp.asarray(rho, kind), relaxation)
    inner = plan.solver_penalty(penalty)
    if start is None or plan.exact:
        first = plan.start(penalty, data, weights)
        if ground.proves_null and is_norm(penalty):
            proof = plan.row_dual(inner, first.dual)
            whole = Problem(data.loss, penalty, ground.operator)
            limit = jnp.where(judge(whole, data.means, proof, null=True)[1] <= tol, 0, limit)
    else:
        dual, last = plan.solver_dual(inner, start.dual.astype(kind)), start.rho
        last = None if rho is not None or last is None else jnp.where(last > 0, last, usual)
        first = Start(start.x.astype(kind) - data.shift, dual, last)
    problem = Problem(data.centred, inner, plan.split)
    exact = plan.exact and weights is None
    limit = 0 if exact else limit
    found = iterate(problem, solver, first, tol=tol, max_steps=history or limit, history=history > 0)
    if exact:
        # The start is the answer, even after a history's steps, after which the values of a piece differ by rounding.
        status = jnp.where(found.status == Status.NONFINITE, found.status, Status.CONVERGED)
        found = dataclasses.replace(found, value=first.x, status=status)
    dual = plan.row_dual(inner, found.state.candidate)
    if exact:
        dual = inner.dual_at(found.value, found.state.candidate)
    elif certified:
        # Without a step it is the start's dual, which may belong to a larger weight.
        dual = jnp.where(found.steps > 0, dual, feasible(penalty, dual))
    ended = finish(ground, data, penalty, found, dual, tol)
    y, penalty, weights = given
    caller = dataclasses.replace(data.loss, target=_known(y, data, ground, weights), weights=weights)
    step = plan.split.row_scale / found.state.rho
    problem = Problem(caller, penalty, ground.operator)
    value, objective, _ = attach(problem, ended.value, ended.objective, Found(None, ended.dual, step))
    # The memory of the acceleration is many times the signal, and no later solve can use it.
    state = dataclasses.replace(found.state, past=None)
    return dataclasses.replace(ended, value=value, objective=objective, state=state)


@Jitted
def resume(
    plan: Plan,
    data: Data,
    penalty: Any,
    state: Any,
    limits: tuple[Any, Any],
    relaxation: Any,
    settled: Any = False,
) -> tuple[TrendSolution, Start]:
    """A fit of prepared data from a state of the solver, and the start of a similar fit; arguments as in `fit`.

    After a `settled` rho the next one moves towards the rho that the last step asks for.
    """
    kind, inner, (tol, max_steps) = state.now.x.dtype, plan.solver_penalty(penalty), limits
    solver, tol = plan.solver(state.rho, jnp.asarray(relaxation, kind)), jnp.asarray(tol, kind)
    limit = to_next_check(max_steps, plan.cadence)
    found = iterate(Problem(data.centred, inner, plan.split), solver, state, tol=tol, max_steps=limit)
    state = found.state
    ended = finish(plan.ground, data, penalty, found, plan.row_dual(inner, state.candidate), tol)
    wish = jnp.where(settled, jnp.sqrt(state.check.motion / state.rho), 1)
    following = Start(found.value, state.candidate, state.rho * jnp.clip(wish, 1 / LARGEST_WISH, LARGEST_WISH))
    return ended, following


def _known(y: Array, data: Data, ground: Ground, weights: Any) -> Array:
    """The signal, even where its weight is 0, since the derivative in that weight depends on it."""
    if weights is not None:
        y = jnp.where(jnp.isfinite(y), y, 0)
    return y if ground.present is None else jnp.where(ground.present, y, data.shift)


def finish(
    ground: Ground, data: Data, penalty: Any, found: Solution, dual: Array, tol: Any, anchor: Anchor | None = None
) -> TrendSolution:
    """The solution `found` of the centred problem with the dual of its rows, in the caller's units, judged there.

    The component means are the limit for large weights; if they are no worse than the iterate, they are the answer, and
    its differences are exactly zero. L0 may be stuck far above them. The anchor is as in `judge`.
    """
    x, problem = found.value + data.shift, Problem(data.loss, penalty, ground.operator)
    if not has_conjugate(penalty):
        of_means, of_x = data.loss.value(data.means) + penalty.value(jnp.zeros_like(dual)), found.objective
        take, certified = of_means < of_x, jnp.zeros((), bool)
        # With a dual of 0 the derivatives are the derivatives of the means.
        dual, objective, gap = jnp.where(take, 0, dual), jnp.where(take, of_means, of_x), found.gap
    else:
        (of_x, x_gap), (of_means, means_gap) = (
            judge(problem, point, dual, anchor, null) for point, null in ((x, False), (data.means, True))
        )
        # The rows of x may lie slightly outside a set: then the solver's copies give the objective, without a gap.
        outside = ~jnp.isfinite(of_x) & (not is_norm(penalty))
        of_x = jnp.where(outside, found.objective, of_x)
        take = of_means <= of_x
        certified = take | ~outside
        objective, gap = jnp.where(take, of_means, of_x), jnp.where(take, means_gap, x_gap)
    # Adding the mean rounds, and it may overflow where the centred problem did not: the gap accounts for both.
    ended = dataclasses.replace(
        found,
        value=jnp.where(take, data.means, x),
        dual=dual,
        status=jnp.where(certified, promote(found.status, gap, objective, tol), stationary(found.status)),
        objective=objective,
        residual=jnp.where(certified, gap, found.residual),
        gap=jnp.where(certified, gap, jnp.nan),
    )
    if ground.anchored and has_conjugate(penalty):
        ended = _with_zeros(ground, data, penalty, ended, dual, tol)
    prox = None if found.state is None else found.state.rows.prox
    return TrendSolution.of(ended, nonzero_at(ground, penalty, ended.value, dual, prox, data.noise, data.means))


def _with_zeros(ground: Ground, data: Data, penalty: Any, fit: Solution, dual: Array, tol: Array) -> Solution:
    """The fit with 0 where the first term's prox with a long step is 0, if its gap is no worse or within tol.

    See `nonzero_at` in `pieces.py` for why the dual decides, and not the size of an entry.
    """
    first, x = penalty.penalties[0], fit.value
    weight = jnp.asarray(getattr(first, "weight", 1.0))
    long = (data.noise / jnp.where(weight == 0, 1, jnp.mean(weight))).astype(x.dtype)
    flat = x.reshape(penalty.sizes[0], *dual.shape[1:])
    kept = first.prox(flat + long * dual[: flat.shape[0]], long) != 0
    value = jnp.where(kept.reshape(x.shape), x, 0)
    objective, gap = judge(Problem(data.loss, penalty, ground.operator), value, dual)
    take = gap <= jnp.maximum(fit.gap, tol)
    changed = {"value": value, "residual": gap, "objective": objective, "gap": gap}
    return dataclasses.replace(fit, **{name: jnp.where(take, new, getattr(fit, name)) for name, new in changed.items()})
