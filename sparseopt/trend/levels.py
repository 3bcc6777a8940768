"""Floor 5: the levels of a path, solved one after the other, each started from the fit before.

Fit and dual are piecewise linear functions of the weight, so a level starts from the line through the last two. All
levels share one compiled program, and no number comes back to the host in between.

Source: Tibshirani and Taylor, "The solution path of the generalized lasso", Annals of Statistics 39 (2011).
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.fidelity import NodeSquares, total
from sparseopt.core.iterate import iterate
from sparseopt.core.penalties import Norm
from sparseopt.core.problem import Problem, Status
from sparseopt.core.solvers.admm import Admm, Start, balanced_rho
from sparseopt.core.types import pytree
from sparseopt.trend.choice import choose_path_method
from sparseopt.trend.freedom import chain_dual, nonzero_rows, row_dual
from sparseopt.trend.graph import Graph
from sparseopt.trend.inputs import Signal
from sparseopt.trend.interior import Interior
from sparseopt.trend.largest_weight import NullFit
from sparseopt.trend.methods import ACCELERATION, Prepared, chain_penalty, prepare, starts_exact
from sparseopt.trend.options import usual_cadence
from sparseopt.trend.preparation import FIRST_RHO, finished, leaves_as, set_up
from sparseopt.trend.start import cold_start, exact_start

# Doge's start brings a rho of its own, believed within this factor of what the noise says.
RHO_RANGE = 1e4
# A level of few steps has no use for a rho that is sought again. With exact x-steps, levels take the rho of the level
# before, moved towards what its last step asked for by the root of the ratio, by this factor at most.
LARGEST_WISH = 2.0
# `fast_admm` seeks its rho at every level below this order, where that was measured to be quicker.
KEPT_RHO_ORDER = 2


@pytree
class _Task:
    """What all levels share."""

    loss: NodeSquares
    centred: NodeSquares
    ready: Prepared
    full: Prepared
    solver: Admm
    shift: Any
    means: Any
    noise: Any


class Level(NamedTuple):
    """One fit, as it comes from the device; `nonzero` in the layout of `graph.base`."""

    value: Any
    objective: Any
    gap: Any
    residual: Any
    steps: Any
    status: Any
    nonzero: Any


def descend(
    signal: Signal,
    graph: Graph,
    template: Any,
    order: int,
    weights: np.ndarray,
    method: str,
    tol: float,
    max_steps: int,
    first: NullFit | None,
) -> list[Level]:
    """The fits at descending weights, as device arrays; call it where the signal's precision is enabled.

    Args:
        signal: checked.
        graph: with an edge.
        template: the penalty; its weight is replaced.
        order: k.
        weights: descending.
        method: of `METHODS`.
        tol: of each level.
        max_steps: of each level.
        first: proof that the means are the fit at the first weight, or None.
    """
    kind, channels = signal.values.dtype, signal.values.shape[1:]
    weighted = signal.weights is not None
    base = set_up(signal, graph, order)
    centred, full, laid_out = base.centred, base.full, base.laid_out
    shift, means, centre = base.shift, base.means, base.centred.center

    def penalty_at(weight: float) -> Any:
        return leaves_as(dataclasses.replace(template, weight=weight), kind)

    noise = base.noise or float(weights[0])
    if method == "auto":
        method = choose_path_method(graph, template, order, weighted, weights[0] / noise, tol, kind)
    if method == "interior":
        interior = Interior(signal, graph, order, base, penalty_at(weights[0]))
        return _by_interior(interior, [penalty_at(weight) for weight in weights], tol, max_steps, first)
    ready = prepare(graph, order, method, order + 1 if method == "doge" else 0, weighted, kind, bool(channels))
    exact = starts_exact(method, order, weighted)
    solver = Admm(
        ready.node_solve,
        jnp.asarray(FIRST_RHO * weights[0] / noise, kind),
        cadence=1 if exact else usual_cadence(method),
        acceleration=0 if exact else ACCELERATION,
    )
    task = _Task(
        base.loss, centred, ready, full, solver, jnp.asarray(shift, kind), laid_out(means), jnp.asarray(noise, kind)
    )

    def in_solver(penalty: Any) -> Any:
        return chain_penalty(penalty, graph, order) if method == "fast_admm" else penalty

    top = in_solver(penalty_at(weights[0]))
    if first is None:
        start = cold_start(signal, graph, top, order, base, ready)
    else:
        dual = jnp.asarray(first.dual.reshape(full.split.row_shape(centre)), kind)
        start = Start(laid_out(means - shift), chain_dual(top, dual))
    start = older = dataclasses.replace(start, rho=solver.rho)
    found: list[Level] = []
    for index, weight in enumerate(weights):
        penalty = penalty_at(weight)
        last, before = weights[max(index - 1, 0)], weights[max(index - 2, 0)]
        ahead = min((last - weight) / (before - last), 1.0) if before > last else 0.0
        move = (jnp.asarray(weight / last, kind), jnp.asarray(ahead, kind))
        if index == 0 and first is not None and not isinstance(penalty, Norm):
            found.append(_null_level(task, start, tol))
            continue
        keeps = method == "admm" or (method == "fast_admm" and order >= KEPT_RHO_ORDER)
        settled = keeps and index >= 2 and isinstance(penalty, Norm)
        level, following = _solved(
            task,
            in_solver(penalty),
            penalty,
            (dataclasses.replace(start, settled=jnp.asarray(settled)), older),
            move,
            jnp.asarray(tol, kind),
            max_steps=max_steps,
            exact=exact,
            balance=method == "doge" and index > 0,
        )
        start, older = following, start
        found.append(level)
    return found


def _by_interior(
    solver: Interior, penalties: list[Any], tol: float, max_steps: int, first: NullFit | None
) -> list[Level]:
    """The levels by the interior point method, which starts cold but orders its factors once."""
    full, noise = solver.base.full, solver.base.noise or 1.0
    levels = []
    for index, penalty in enumerate(penalties):
        if index == 0 and first is not None:
            fit = solver.null_fit(penalty, first.dual, tol)
        else:
            fit = solver.fit(penalty, tol, max_steps)
        nonzero = _marked(penalty, full, fit.value, fit.state.candidate, noise)
        levels.append(Level(fit.value, fit.objective, fit.gap, fit.residual, fit.steps, fit.status, nonzero))
    return levels


@jax.jit
def _marked(penalty: Any, full: Prepared, value: jax.Array, dual: jax.Array, noise: jax.Array) -> jax.Array:
    """The rows of a fit that are not zero."""
    return nonzero_rows(penalty, full.split.mv(value), dual, full.row_norms * (noise / penalty.weight))


@partial(jax.jit, static_argnames=("max_steps", "exact", "balance"))
def _solved(
    task: _Task,
    penalty: Any,
    plain: Any,
    fits: tuple[Start, Start],
    move: tuple[Any, Any],
    tol: Any,
    *,
    max_steps: int,
    exact: bool,
    balance: bool,
) -> tuple[Level, Start]:
    """One level and where it ended.

    Args:
        task: what all levels share.
        penalty: as the solver takes it.
        plain: as the caller gave it.
        fits: where the last two levels ended; for the first level the start.
        move: the weight over the last one, 1 for the first level, and how far the line through the last two fits is
            followed.
        tol: as in `solve`.
        max_steps: as in `solve`.
        exact: whether the penalty's prox is the fit.
        balance: whether rho is found anew.
    """
    split, centred = task.ready.split, task.centred
    start = fits[0]
    if exact:
        start = exact_start(penalty, centred.center)
    elif isinstance(penalty, Norm):
        start = _predicted(penalty, fits, move)
    rho = fits[0].rho * move[0]
    if balance:
        # Where Doge's rho ended at the last level is far off; the solver's first changes would find this one.
        usual = FIRST_RHO * plain.weight / task.noise
        rho = jnp.clip(balanced_rho(split, centred, start.x, start.dual), usual / RHO_RANGE, usual * RHO_RANGE)
    start = Start(start.x, start.dual, rho, fits[0].settled)
    found = iterate(Problem(centred, penalty, split), task.solver, start, tol=tol, max_steps=max_steps)
    fit = finished(Problem(task.loss, penalty, split), found, task.shift, task.means, tol)
    if isinstance(penalty, Norm):
        nonzero = _marked(plain, task.full, fit.value, row_dual(penalty, found.state.candidate), task.noise)
    else:
        nonzero = found.state.prox != 0
    level = Level(fit.value, fit.objective, fit.gap, fit.residual, found.steps, fit.status, nonzero)
    state = found.state
    wish = jnp.where(fits[0].settled, jnp.sqrt(state.check.motion / state.rho), 1)
    return level, Start(found.value, state.candidate, state.rho * jnp.clip(wish, 1 / LARGEST_WISH, LARGEST_WISH))


@jax.jit
def _null_level(task: _Task, start: Start, tol: Any) -> Level:
    """The component means of a penalty that is no norm: stationary by their dual, without a step.

    A step might leave them: where 1 / rho is long, a prox that is not convex prefers other points.
    """
    split, centred = task.ready.split, task.centred
    left = centred.gradient(start.x) + split.rmv(start.dual)
    whole = centred.weigh(centred.center)
    residual = jnp.sqrt(total(left * left) / jnp.maximum(total(whole * whole), jnp.finfo(left.dtype).tiny))
    status = jnp.where(residual <= tol, Status.STATIONARY, Status.PRECISION).astype(jnp.int32)
    none = jnp.zeros(start.dual.shape, bool)
    objective = task.loss.value(task.means)
    nothing, steps = jnp.full_like(objective, jnp.nan), jnp.zeros((), jnp.int32)
    return Level(task.means, objective, nothing, residual, steps, status, none)


def _predicted(penalty: Any, fits: tuple[Start, Start], move: tuple[Any, Any]) -> Start:
    """The next fit: fit and dual are piecewise linear in the weight; before there are two, the dual is scaled."""
    (last, before), (ratio, ahead) = fits, move
    scaled = jnp.where(ahead > 0, 1, ratio) * last.dual
    dual = penalty.project_dual(scaled + ahead * (last.dual - before.dual))
    return Start(last.x + ahead * (last.x - before.x), dual)
