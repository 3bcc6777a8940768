"""The fits of a path of weights, each started from the fits before it.

The first level is the one whose answer is known: the component means, or for a loss the best constants.
"""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.compile import Jitted
from sparseopt.core.base.sums import total
from sparseopt.core.base.types import Observer
from sparseopt.core.losses.data import DataLoss
from sparseopt.core.penalties.entries import L1
from sparseopt.core.penalties.protocols import feasible, has_conjugate
from sparseopt.core.problem.certify import judge
from sparseopt.core.problem.problem import Problem, Start, Status
from sparseopt.core.solvers.admm import balanced_rho
from sparseopt.core.solvers.fused_lasso import fused_dual, fused_pieces
from sparseopt.trend.base.fit import Fit, start_at
from sparseopt.trend.base.ground import Data, Ground
from sparseopt.trend.base.pieces import TrendSolution
from sparseopt.trend.methods.choice import Doge, choose_for_path, is_short, unless_rounded
from sparseopt.trend.methods.losses import best_constants, fit_loss
from sparseopt.trend.methods.piece_means import FIRST_STOP, has_means, in_float32, stop_early
from sparseopt.trend.methods.split_plan import FIRST_RHO, SplitPlan, resume
from sparseopt.trend.paths.largest_weight import NullFit

# The rho from Doge's start is accepted within this factor of the rho from the noise.
RHO_RANGE = 1e4
# Down to this ratio of weight to noise the interior point method is faster than Doge-ADMM with its warm starts.
STRONG_LEVEL = 100.0
# The tables of merged chains become smaller down to this size.
SMALLEST_TABLE = 4096

Begin = Callable[[], None]  # called before each level


def descend(asked: Fit, weights: np.ndarray, first: NullFit | None, observer: Observer | None = None) -> TrendSolution:
    """The fits at descending weights, stacked, as NumPy arrays, without states and duals.

    The request, whose dtype must be enabled, has the penalty of the first weight, and `tol` and `max_steps` of each
    level. Rows are in the layout of arrays. `first` is the proof that the means are the fit at the first weight, or
    None. Fit and dual are piecewise linear functions of the weight, so a level starts from the line through the last
    two fits. All levels share one compiled program. The observer hears "weight" before each.
    """
    # The pieces of the exact fits of a chain only merge as the weight grows.
    merges = asked.geometry.line and asked.order == 0 and asked.is_l1
    exact = asked.dtype == np.float64 if asked.method is None else asked.method.merges
    if asked.square and merges and exact:
        return _by_merging(asked, weights)
    done = itertools.count()

    def begin() -> None:
        if observer is not None:
            observer("weight", next(done), len(weights))

    by = _by_solver if asked.square else _by_loss
    levels = jax.device_get(by(asked, weights, first, begin))
    return jax.tree.map(lambda *parts: np.stack(parts), *levels)


def _by_solver(asked: Fit, weights: np.ndarray, first: NullFit | None, begin: Begin) -> list[TrendSolution]:
    """The levels of the square loss, one after another, each started from the last two."""
    order, max_steps = asked.order, asked.max_steps
    method = choose_for_path(asked)
    proof = None if first is None else first.dual if asked.channels else first.dual[..., 0]
    if method.cold:
        return _by_interior(asked, method.plan(asked), weights, begin)
    early, means = FIRST_STOP, has_means(asked)
    working = in_float32(asked) if means and is_short(asked, method) else asked
    kind, plan = working.dtype, method.plan(working).pace(working)
    tol, relaxation = jnp.asarray(asked.tol, kind), working.settings.relaxation

    # The levels are judged with the data of the request, and solved with those of the working precision.
    _, data, penalty = asked.data, working.data, working.at(weights[0]).rows
    start = _first(plan, penalty, data, proof, working.first())
    older, found = start, list[TrendSolution]()
    for index, weight in enumerate(weights):
        begin()
        penalty = working.at(weight).rows
        last, before = weights[max(index - 1, 0)], weights[max(index - 2, 0)]
        ahead = min((last - weight) / (before - last), 1.0) if before > last else 0.0
        move = (jnp.asarray(weight / last, kind), jnp.asarray(ahead, kind))
        if index == 0 and first is not None and not has_conjugate(penalty):
            found.append(_null_level(plan, data, start, tol))
            continue
        settled = jnp.asarray(order >= method.keeps_rho_from and index >= 2 and has_conjugate(penalty))
        fits = (dataclasses.replace(start, settled=settled), older)
        state = _begin(plan, data, penalty, fits, move, balance=method.balances_rho and index > 0)
        older = start
        if means:
            here = asked.at(weight, method)

            def solve(tol: float, max_steps: int, settles: bool, penalty: Any = penalty) -> TrendSolution:
                nonlocal state, start
                level, start = resume(plan, data, penalty, state, (tol, max_steps), (relaxation, settles))
                state = level.state
                return level

            level, early = stop_early(here, solve, early)
        else:
            level, start = resume(plan, data, penalty, state, (tol, max_steps), (relaxation, False), settled)
        found.append(dataclasses.replace(level, state=None, dual=None))
    return found


@Jitted
def _first(plan: SplitPlan, penalty: Any, data: Data, proof: Any, last: Any) -> Start:
    """The start of the first level: the means, if there is a proof for them, or `last`."""
    kind = data.means.dtype
    rho = (FIRST_RHO * data.strength(plan.ground, penalty)).astype(kind)
    if last is not None:
        start = Start(last.x.astype(kind) - data.shift, feasible(penalty, last.dual.astype(kind)))
    elif proof is None:
        start = plan.start(penalty, data)
    else:
        start = Start(data.means - data.shift, jnp.asarray(proof, kind))
    return dataclasses.replace(start, rho=rho)


def _by_loss(asked: Fit, weights: np.ndarray, _: Any, begin: Begin) -> list[TrendSolution]:
    """The levels with a loss, each started at the last one; the best constants are tried as the fit of each."""
    levels, last, best = list[TrendSolution](), None, best_constants(asked)
    for weight in weights:
        begin()
        fit = fit_loss(dataclasses.replace(asked.at(weight), start=last), best)
        levels.append(dataclasses.replace(fit, state=None, dual=None))
        # A known fit, as without any difference in the data, has no dual to start from.
        last = None if fit.dual is None else start_at(fit)
    return levels


def _by_merging(asked: Fit, weights: np.ndarray) -> TrendSolution:
    """The exact levels of a chain at order 0, from the last weight to the first.

    As the weight grows, the pieces of a fit only merge, even with node weights. So every level is the fused lasso of
    the means of the pieces before it, of which there are soon few. Missing nodes lie on the line between their
    neighbours, which costs nothing.

    Source: Friedman, Hastie, Höfling and Tibshirani, "Pathwise coordinate optimization", Annals of Applied Statistics 1
    (2007), section 4.1.
    """
    columns, mass = asked.columns, asked.mass
    n, channels = columns.shape
    fits = np.empty((len(weights), n, channels))
    seen = np.flatnonzero(mass)
    for channel, column in enumerate(columns.T):
        shift = float(np.average(column, weights=mass))
        values, masses, starts = column[seen] - shift, mass[seen], np.arange(seen.size)
        for index in reversed(range(len(weights))):
            count = len(values)
            table = np.zeros((2, _padded_size(count, n)))
            table[:, :count] = values, masses
            found = np.asarray(fused_pieces(*table, weights[index], count))[:count]
            first = np.flatnonzero(np.append(True, found[1:] != found[:-1]))
            pulled, masses = np.add.reduceat(masses * values, first), np.add.reduceat(masses, first)
            values, starts = pulled / masses, starts[first]
            level = np.repeat(found[first] + shift, np.append(starts[1:], seen.size) - starts)
            fits[index, :, channel] = level if seen.size == n else np.interp(np.arange(n), seen, level)
    fits = fits.reshape(len(weights), n, *asked.channels)
    tol = jnp.asarray(asked.tol, asked.dtype)
    found = _merged(asked.ground, asked.data.loss, weights, fits, tol)
    statuses, objectives, gaps, nonzero = jax.device_get(found)
    steps = np.zeros(len(weights), np.int32)
    return TrendSolution(fits, statuses, steps, gaps, objectives, gaps, nonzero=nonzero)


def _padded_size(count: int, n: int) -> int:
    """A size of at least `count`, from a few, so that few programs are compiled."""
    size = n
    while size > SMALLEST_TABLE and size // 8 >= count:
        size //= 8
    return size


@Jitted
def _merged(ground: Ground, loss: DataLoss, weights: Any, fits: Any, tol: Any) -> Any:
    """Status, objective, gap and non-zero differences of exact fits, whose duals are sums along the chain."""

    def judge_at(level: tuple[Any, Any]) -> Any:
        weight, x = level
        rows = ground.highest.mv(x)
        dual = fused_dual(-loss.gradient(x), rows[0, :-1], 2 * (jnp.full(rows.shape[1] - 1, weight),))
        dual = jnp.zeros_like(rows).at[0, :-1].set(dual)
        objective, gap = judge(Problem(loss, L1(weight), ground.operator), x, dual)
        status = jnp.where(gap <= tol, Status.CONVERGED, Status.PRECISION).astype(jnp.int32)
        return status, objective, gap, rows != 0

    return jax.lax.map(judge_at, (weights, fits))


def _by_interior(asked: Fit, plan: Any, weights: np.ndarray, begin: Begin) -> list[TrendSolution]:
    """The levels with the plan of an interior point method, which starts cold but orders its factors only once.

    At order 0, Doge-ADMM started from the last of them is faster for weaker levels.
    """
    strong, levels = weights, list[TrendSolution]()
    if asked.order == 0 and asked.method is None:
        strong = weights[weights * asked.strength > STRONG_LEVEL * weights[0]]
    for weight in strong:
        begin()
        here = asked.at(weight)
        fit = unless_rounded(here, plan.fit_asked(here))
        levels.append(dataclasses.replace(fit, state=None, dual=None))
    if strong.size < weights.size:
        rest = dataclasses.replace(asked, method=Doge(), start=start_at(fit) if levels else None)
        levels += _by_solver(rest, weights[strong.size :], None, begin)
    return levels


@partial(Jitted, static_argnames="balance")
def _begin(
    plan: SplitPlan, data: Data, penalty: Any, fits: tuple[Start, Start], move: tuple[Any, Any], *, balance: bool
) -> Any:
    """The state in which a level begins.

    `fits` are the ends of the last two levels (for the first level the start), `move` is the weight over the previous
    one (1 for the first level) and how far to follow the line through the last two fits. With `balance` rho is computed
    again.
    """
    split, centred, start = plan.split, data.centred, fits[0]
    if has_conjugate(penalty):
        start = _predict(penalty, fits, move)
    rho = fits[0].rho * move[0]
    if balance:
        # The last rho of Doge's previous level is far off; the solver's first changes would find this one.
        usual = FIRST_RHO * penalty.weight / data.noise
        rho = jnp.clip(balanced_rho(split, centred, start.x, start.dual), usual / RHO_RANGE, usual * RHO_RANGE)
    start = Start(start.x, start.dual, rho, fits[0].settled)
    return plan.solver(rho).init(Problem(centred, penalty, split), start)


@Jitted
def _null_level(plan: SplitPlan, data: Data, start: Start, tol: Any) -> TrendSolution:
    """The component means for a penalty that is not a norm: stationary by their dual, without a step.

    A step could leave them: for a long 1 / rho, a prox that is not convex prefers other points.
    """
    centred = data.centred
    left = centred.gradient(start.x) + plan.split.rmv(start.dual)
    whole = centred.weigh(centred.target)
    residual = jnp.sqrt(total(left * left) / jnp.maximum(total(whole * whole), jnp.finfo(left.dtype).tiny))
    status = jnp.where(residual <= tol, Status.STATIONARY, Status.PRECISION).astype(jnp.int32)
    none = jnp.zeros(start.dual.shape, bool)
    objective = data.loss.value(data.means)
    nothing, steps = jnp.full_like(objective, jnp.nan), jnp.zeros((), jnp.int32)
    return TrendSolution(data.means, status, steps, residual, objective, nothing, nonzero=none)


def _predict(penalty: Any, fits: tuple[Start, Start], move: tuple[Any, Any]) -> Start:
    """The predicted fit: extrapolated from the last two; with only one, its dual is scaled."""
    (last, before), (ratio, ahead) = fits, move
    scaled = jnp.where(ahead > 0, 1, ratio) * last.dual
    dual = feasible(penalty, scaled + ahead * (last.dual - before.dual))
    return Start(last.x + ahead * (last.x - before.x), dual)
