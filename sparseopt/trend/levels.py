"""Floor 5: the fits of a path of weights, each started from the fits before it.

The first level is the one whose answer is known: the component means, or for a loss the best constants.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.fidelity import total
from sparseopt.core.iterate import iterate
from sparseopt.core.penalties import Norm
from sparseopt.core.problem import Problem, Solution, Status
from sparseopt.core.solvers.admm import Start, balanced_rho
from sparseopt.trend.ground import Data, data_of, on_rows
from sparseopt.trend.job import Job
from sparseopt.trend.largest_weight import NullFit
from sparseopt.trend.losses import fit_loss
from sparseopt.trend.methods import INTERIOR, chosen_for_path
from sparseopt.trend.methods.interior import Interior
from sparseopt.trend.pieces import nonzero_at
from sparseopt.trend.plan import FIRST_RHO, Plan, finished

# The rho from Doge's start is accepted within this factor of the rho from the noise.
RHO_RANGE = 1e4
# Levels of few steps do not adapt rho. With exact x-steps, a level takes the rho of the previous level, moved towards
# the rho that its last step suggests by the root of the ratio, by at most this factor.
LARGEST_WISH = 2.0
# A fit without state and dual, and which of its differences are not zero, in the layout of `graph.base`.
Level = tuple[Solution, Any]


def descend(job: Job, template: Any, weights: np.ndarray, first: NullFit | None) -> list[Level]:
    """The fits at descending weights, as device arrays; the job's dtype must be enabled.

    The job has the penalty of the first weight, and `tol` and `max_steps` of each level. `first` is the proof that the
    means are the fit at the first weight, or None. Fit and dual are piecewise linear functions of the weight, so a
    level starts from the line through the last two fits. All levels share one compiled program, and nothing returns to
    the host in between.
    """
    kind, order, max_steps = job.dtype, job.order, job.max_steps

    def penalty_at(weight: float) -> Any:
        penalty = dataclasses.replace(template, weight=weight)
        return on_rows({order: penalty}, job.layout, kind, bool(job.channels))

    if job.loss is not None:
        return _by_loss(job, template, weights)
    method = chosen_for_path(job)
    plan = method.plan(job)
    proof = None if first is None else first.dual if job.channels else first.dual[..., 0]
    if method is INTERIOR:
        return _by_interior(plan, [penalty_at(weight) for weight in weights], proof)
    y, node_weights = job.arrays
    tol = jnp.asarray(job.tol, kind)
    data, start = _first(plan, penalty_at(weights[0]), y, node_weights, proof)
    older, found = start, list[Level]()
    for index, weight in enumerate(weights):
        penalty = penalty_at(weight)
        last, before = weights[max(index - 1, 0)], weights[max(index - 2, 0)]
        ahead = min((last - weight) / (before - last), 1.0) if before > last else 0.0
        move = (jnp.asarray(weight / last, kind), jnp.asarray(ahead, kind))
        if index == 0 and first is not None and not isinstance(penalty, Norm):
            found.append(_null_level(plan, data, start, tol))
            continue
        settled = order >= method.keeps_rho_from and index >= 2 and isinstance(penalty, Norm)
        fits = (dataclasses.replace(start, settled=jnp.asarray(settled)), older)
        balance = method.balances_rho and index > 0
        level, following = _solved(plan, data, penalty, fits, move, tol, max_steps=max_steps, balance=balance)
        start, older = following, start
        found.append(level)
    return found


@jax.jit
def _first(plan: Plan, penalty: Any, y: Any, weights: Any, proof: Any) -> tuple[Data, Start]:
    """The prepared signal, and the start of the first level: the means, if there is a proof for them."""
    data, inner = data_of(plan.ground, y, weights), plan.taken(penalty)
    rho = (FIRST_RHO * data.strength(plan.ground, penalty)).astype(y.dtype)
    if proof is None:
        start = plan.start(penalty, data, weights)
    else:
        start = Start(data.means - data.shift, plan.solver_dual(inner, proof.astype(y.dtype)))
    return data, dataclasses.replace(start, rho=rho)


def _by_loss(job: Job, template: Any, weights: np.ndarray) -> list[Level]:
    """The levels with a loss, each started at the last one; the best constants are tried as the fit of each."""
    levels, last = list[Level](), None
    for weight in weights:
        terms = {job.order: dataclasses.replace(template, weight=float(weight))}
        fit = fit_loss(dataclasses.replace(job, terms=terms, warm_start=last))
        levels.append((dataclasses.replace(fit, state=None, dual=None, nonzero=None), fit.nonzero))
        # A known fit, as without any difference in the data, has no dual to start from.
        last = fit if fit.dual is not None else None
    return levels


def _by_interior(solver: Interior, penalties: list[Any], proof: Any) -> list[Level]:
    """The levels by the interior point method, which starts cold but orders its factors only once."""
    levels: list[Level] = []
    for index, penalty in enumerate(penalties):
        fit = solver.null_fit(penalty, proof) if index == 0 and proof is not None else solver.fit(penalty)
        levels.append((dataclasses.replace(fit, dual=None, nonzero=None), fit.nonzero))
    return levels


@partial(jax.jit, static_argnames=("max_steps", "balance"))
def _solved(
    plan: Plan,
    data: Data,
    penalty: Any,
    fits: tuple[Start, Start],
    move: tuple[Any, Any],
    tol: Any,
    *,
    max_steps: int,
    balance: bool,
) -> tuple[Level, Start]:
    """One level, and the start for the next.

    `fits` are the ends of the last two levels (for the first level the start), `move` is the weight over the previous
    one (1 for the first level) and how far to follow the line through the last two fits. With `balance` rho is computed
    again.
    """
    inner = plan.taken(penalty)
    split, centred, start = plan.split, data.centred, fits[0]
    if plan.exact:
        start = plan.start(penalty, data, None)
    elif isinstance(penalty, Norm):
        start = _predicted(inner, fits, move)
    rho = fits[0].rho * move[0]
    if balance:
        # The last rho of Doge's previous level is far off; the solver's first changes would find this one.
        usual = FIRST_RHO * penalty.weight / data.noise
        rho = jnp.clip(balanced_rho(split, centred, start.x, start.dual), usual / RHO_RANGE, usual * RHO_RANGE)
    start = Start(start.x, start.dual, rho, fits[0].settled)
    solver = plan.solver(fits[0].rho)
    found = iterate(Problem(centred, inner, split), solver, start, tol=tol, max_steps=max_steps)
    state = found.state
    dual = plan.row_dual(inner, state.candidate)
    fit = finished(plan.ground, data, penalty, found, dual, tol)
    nonzero = nonzero_at(plan.ground, penalty, fit.value, dual, state.prox, data.noise, data.means)
    level = dataclasses.replace(fit, state=None, dual=None), nonzero
    wish = jnp.where(fits[0].settled, jnp.sqrt(state.check.motion / state.rho), 1)
    return level, Start(found.value, state.candidate, state.rho * jnp.clip(wish, 1 / LARGEST_WISH, LARGEST_WISH))


@jax.jit
def _null_level(plan: Plan, data: Data, start: Start, tol: Any) -> Level:
    """The component means for a penalty that is not a norm: stationary by their dual, without a step.

    A step could leave them: for a long 1 / rho, a prox that is not convex prefers other points.
    """
    centred = data.centred
    left = centred.gradient(start.x) + plan.split.rmv(start.dual)
    whole = centred.weigh(centred.center)
    residual = jnp.sqrt(total(left * left) / jnp.maximum(total(whole * whole), jnp.finfo(left.dtype).tiny))
    status = jnp.where(residual <= tol, Status.STATIONARY, Status.PRECISION).astype(jnp.int32)
    none = jnp.zeros(start.dual.shape, bool)
    objective = data.loss.value(data.means)
    nothing, steps = jnp.full_like(objective, jnp.nan), jnp.zeros((), jnp.int32)
    return Solution(data.means, status, steps, residual, objective, nothing, None, None), none


def _predicted(penalty: Any, fits: tuple[Start, Start], move: tuple[Any, Any]) -> Start:
    """The predicted fit: extrapolated from the last two; with only one, its dual is scaled."""
    (last, before), (ratio, ahead) = fits, move
    scaled = jnp.where(ahead > 0, 1, ratio) * last.dual
    dual = penalty.project_dual(scaled + ahead * (last.dual - before.dual))
    return Start(last.x + ahead * (last.x - before.x), dual)
