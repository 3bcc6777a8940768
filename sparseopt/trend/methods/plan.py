"""A `Plan`, the host work of a method on a graph, and the fit of a signal with it, one pure program.

    minimise over b    1/2 sum_j w_j (y_j - b_j)²  +  sum_k penalty_k(Δ^(k+1) b)

signal -> centred data -> the fit that no penalty sees, if it is proved -> the method's solve -> the caller's units,
certified -> derivatives attached. `split_plan.py` has the solve of the splitting methods, `chain_plans.py` two for
chains; `interior_plan.py` has a method that works on the host, and shares `finish`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparseopt.core.base.compile import Jitted
from sparseopt.core.base.types import pytree
from sparseopt.core.penalties.protocols import has_conjugate, is_norm
from sparseopt.core.problem.certify import Anchor, judge, promote, stationary
from sparseopt.core.problem.differentiate import Found, attach
from sparseopt.core.problem.problem import Problem, Solution, Start, Status
from sparseopt.trend.base.fit import Fit
from sparseopt.trend.base.ground import Data, Ground, data_of, with_known
from sparseopt.trend.base.pieces import TrendSolution, nonzero_at


@pytree
class Plan:
    """A method on a graph: tables, factors and choices; see `fit`."""

    ground: Ground  # the graph's own tables
    takes_start = True

    def refuses(self, penalty: Any, weighted: bool) -> str | None:
        """Why the plan does not fit such a penalty, or a signal with node weights; None if it does."""
        raise NotImplementedError

    def solve(
        self, data: Data, penalty: Any, limits: tuple[Any, Any], start: Start, rates: tuple[Any, Any, Any], history: int
    ) -> tuple[Solution, Array, Any]:
        """The solution of the centred problem, the dual of its rows, and the step size of its prox or None.

        `start` is a centred point with the dual of its rows and a rho or None; if the step limit is 0, it is the
        answer. The rest is as in `fit`.
        """
        raise NotImplementedError

    def fit_asked(self, asked: Fit) -> TrendSolution:
        """The fit of a request's signal, in the layout of arrays."""
        asked.first()  # a start that does not suit is an error, even if it has no use
        return fit(self, asked.arrays, asked.rows, (asked.tol, asked.max_steps), data=asked.data)

    def start(self, penalty: Any, data: Data) -> Start:
        """The centred signal with a dual of 0; or, if the weight may be large enough, the null fit and its dual."""
        ground, centre = self.ground, data.centred.target
        rows = jax.eval_shape(ground.operator.mv, centre)
        nothing = jnp.zeros(rows.shape, rows.dtype)
        if not is_norm(penalty) or ground.operator.order is None:
            return Start(centre, nothing)
        dual, kept = ground.proof(penalty, data.loss.weigh(data.loss.target - data.means))
        return Start(jnp.where(kept, data.means - data.shift, centre), jnp.where(kept, dual, 0))


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
    data: Data | None = None,
    start: Start | None = None,
    rates: tuple[Any, Any, Any] = (None, 1.7, False),
    history: int = 0,
) -> TrendSolution:
    """The fit of a signal, in its units and in the layout of arrays, with its certificate and its derivatives.

    `arrays` are the signal and its weights or None, `limits` the tolerance and the step limit. The penalty is on the
    rows of `plan.ground.operator`. A start is a point in the caller's units with the dual of its rows. A splitting
    method has `rates`, rho, the relaxation and whether its solver `settles`; if rho is None, or the start's rho is 0,
    it is chosen from the data.
    `history` is the number of steps in the history, 0 for none. `data` are those of the arrays, if they are known.
    """
    (y, weights), (tol, max_steps) = arrays, limits
    given = y, penalty, weights
    plan, y, penalty, weights, start = jax.lax.stop_gradient((plan, y, penalty, weights, start))
    kind, ground = y.dtype, plan.ground
    tol, limit = jnp.asarray(tol, kind), jnp.asarray(max_steps, jnp.int32)
    data = data_of(ground, y, weights) if data is None else data
    if has_conjugate(penalty):
        # A signal without a penalty is the fit; its objective is 0, so no relative gap exists.
        data, free = with_known(ground, data, penalty)
        limit = jnp.where(free, 0, limit)
    if start is not None and plan.takes_start:
        start = dataclasses.replace(start, x=start.x.astype(kind) - data.shift, dual=start.dual.astype(kind))
    else:
        start = plan.start(penalty, data)
        if (ground.proves_null or not plan.takes_start) and is_norm(penalty):
            whole = Problem(data.loss, penalty, ground.operator)
            limit = jnp.where(judge(whole, data.means, start.dual, null=True)[1] <= tol, 0, limit)
    found, dual, step = plan.solve(data, penalty, (tol, limit), start, rates, history)
    ended = finish(ground, data, penalty, found, dual, tol)
    y, penalty, weights = given
    caller = dataclasses.replace(data.loss, target=_known(y, data, ground, weights), weights=weights)
    problem = Problem(caller, penalty, ground.operator)
    value, objective, _ = attach(problem, ended.value, ended.objective, Found(None, ended.dual, step))
    # The memory of the acceleration is many times the signal, and no later solve can use it.
    state = None if found.state is None else dataclasses.replace(found.state, past=None)
    return dataclasses.replace(ended, value=value, objective=objective, state=state)


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
    x, problem = ground.within(penalty, found.value + data.shift), Problem(data.loss, penalty, ground.operator)
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
