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
from sparseopt.core.penalties import Norm
from sparseopt.core.solve import Problem, Status, solve
from sparseopt.core.solvers.admm import BALANCE, Admm, Start
from sparseopt.core.types import pytree
from sparseopt.trend.filter import FIRST_RHO, _cold, _finish, leaves_as, set_up
from sparseopt.trend.freedom import chain_dual, nonzero_rows, row_dual
from sparseopt.trend.graph import Graph
from sparseopt.trend.inputs import Signal
from sparseopt.trend.largest_weight import NullFit
from sparseopt.trend.methods import Prepared, chain_penalty, choose_method, prepare

# Doge's start brings a rho of its own, believed within this factor of what the noise says.
RHO_RANGE = 1e4
# From this order on the first changes of rho lead `fast_admm` astray: levels keep the rho that the second one found.
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
        method = choose_method(graph, template, order, weighted, weights[0] / noise)
        cosines = graph.shape is not None and not weighted
        if method == "doge" and (order >= 1 or cosines) and isinstance(template, Norm):
            # A path spends its steps where smoothing is strong: there the conditioning decides.
            method = "admm"
    ready = prepare(graph, order, method, order + 1 if method == "doge" else 0, weighted, kind, bool(channels))
    # On a chain at order 0 the start is exact already; the first check says so.
    exact = method == "fast_admm" and order == 0 and not weighted
    solver = Admm(ready.node_solve, jnp.asarray(FIRST_RHO * weights[0] / noise, kind), cadence=1 if exact else 5)
    task = _Task(
        base.loss, centred, ready, full, solver, jnp.asarray(shift, kind), laid_out(means), jnp.asarray(noise, kind)
    )

    def in_solver(penalty: Any) -> Any:
        return chain_penalty(penalty, graph, order) if method == "fast_admm" else penalty

    top = in_solver(penalty_at(weights[0]))
    if first is None:
        start = _cold(signal, means, laid_out, graph, top, order, full, ready, shift, centre)
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
        if index == 2 and method == "fast_admm" and order >= KEPT_RHO_ORDER:
            task = dataclasses.replace(task, solver=dataclasses.replace(solver, changes=0))
        level, following = _solved(
            task,
            in_solver(penalty),
            penalty,
            (start, older),
            move,
            jnp.asarray(tol, kind),
            max_steps=max_steps,
            exact=exact,
            balance=method == "doge" and index > 0,
        )
        start, older = following, start
        found.append(level)
    return found


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
        fit = penalty.prox(centred.center, 1.0)
        start = Start(fit, centred.center - fit)
    elif isinstance(penalty, Norm):
        start = _predicted(penalty, fits, move)
    rho = _balanced(task, start, plain.weight) if balance else fits[0].rho * move[0]
    start = Start(start.x, start.dual, rho)
    found = solve(Problem(centred, penalty, split), task.solver, start, tol=tol, max_steps=max_steps)
    value, objective, gap = _finish(Problem(task.loss, penalty, split), found, task.shift, task.means)
    status = found.status
    if isinstance(penalty, Norm):
        status = jnp.where((status == Status.CONVERGED) & ~(gap <= tol), Status.PRECISION, status)
        status = jnp.where((status != Status.NONFINITE) & (gap <= tol), Status.CONVERGED, status)
        dual = row_dual(penalty, found.state.candidate)
        scale = task.full.row_norms * (task.noise / plain.weight)
        nonzero, residual = nonzero_rows(plain, task.full.split.mv(value), dual, scale), gap
    else:
        status = jnp.where(status == Status.CONVERGED, Status.STATIONARY, status)
        nonzero, residual = found.state.prox != 0, found.residual
    level = Level(value, objective, gap, residual, found.steps, status.astype(jnp.int32), nonzero)
    return level, Start(found.value, found.state.candidate, found.state.rho)


@jax.jit
def _null_level(task: _Task, start: Start, tol: Any) -> Level:
    """The component means of a penalty that is no norm: stationary by their dual, without a step.

    The solver's residual could not say so: it is relative to differences that are 0 here.
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


def _balanced(task: _Task, start: Start, weight: Any) -> jax.Array:
    """The rho of `Admm`'s first changes, found from the start: where Doge's rho ended at the last level is far off."""
    split = task.ready.split
    tiny = jnp.finfo(start.x.dtype).tiny

    def mean_square(scale: Any, x: jax.Array) -> jax.Array:
        scale = jnp.broadcast_to(scale, x.shape)
        return total(scale * x * x) / jnp.maximum(total(scale), tiny)

    on_nodes = split.column_scale if split.inner.order == 0 else jnp.ones((), start.x.dtype)
    apart = mean_square(on_nodes, task.centred.observed(task.centred.center - start.x))
    rho = BALANCE * jnp.sqrt(mean_square(split.row_scale, start.dual) / jnp.maximum(apart, tiny))
    usual = FIRST_RHO * weight / task.noise
    return jnp.clip(rho, usual / RHO_RANGE, usual * RHO_RANGE)
