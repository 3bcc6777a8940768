"""Floor 5: the trend filter of counts, labels and signals with outliers, with the losses of `scalar_losses.py`.

    minimise over b    sum_j w_j f(b_j; y_j)  +  penalty(Δ^(k+1) b)

b is on the scale of the loss: a log-rate for counts, log-odds for labels; `loss.mean(b)` maps it back. A fit exists if
and only if the best constant of every component is finite, which is checked for every channel; with free ends, if the
best polynomial of degree k is.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.certify import promoted, stationary
from sparseopt.core.fidelity import NodeLoss
from sparseopt.core.iterate import iterate
from sparseopt.core.penalties import Norm
from sparseopt.core.problem import Problem, Solution
from sparseopt.core.scalar_losses import ScalarLoss
from sparseopt.core.solvers.loss_admm import Anchor, LossAdmm, LossStart, certificate
from sparseopt.core.types import precision
from sparseopt.trend.ground import BOX_RANGES, OF_MEAN_SIZE, Ground, leaves_as, mean_weight, null_space_dual
from sparseopt.trend.job import Job, vanishes
from sparseopt.trend.methods import chosen
from sparseopt.trend.pieces import TrendSolution, nonzero_at
from sparseopt.trend.plan import FIRST_RHO, known_fit, to_next_check
from sparseopt.trend.signal import Signal

# Newton's method for the best polynomial: its steps, the relative decrease of the loss that ends it, and the curvature
# over that at the start below which the loss has no minimum, only a limit.
NEWTON_STEPS, DECREASE, FLAT = 200, 1e-15, 1e-8
# A node without an observation still needs some weight in the x-step: this fraction of the mean.
LIGHT = 1e-2


@dataclasses.dataclass(frozen=True)
class _Data:
    """The observations on the host, in float64: `[n, channels]`, weights `[n]`, component labels `[n]`."""

    columns: np.ndarray
    weights: np.ndarray
    labels: np.ndarray


def node_deviances(loss: ScalarLoss | None, fit: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`2 f(fit; y)` entry by entry in float64, `(fit - y)²` for the square; where y is missing it means nothing."""
    if loss is None:
        return (y - fit) ** 2
    with precision(np.dtype(np.float64)):
        return 2 * np.asarray(loss.value(jnp.asarray(fit, jnp.float64), jnp.asarray(y)))


def null_pull(job: Job) -> np.ndarray:
    """Minus a subgradient of the loss at the best constants, `[n, channels]`, with sums of 0 over every component."""
    with precision(job.dtype):
        loss, data, null = _best_constants(job)
        if _sees_one_value(data).all():
            return np.zeros_like(null)
        node_loss = NodeLoss(loss, *job.arrays)
        return -_balanced_gradient(data, node_loss, null, partial(_laid_out, job), _free_basis(job))


def _best_constants(job: Job) -> tuple[ScalarLoss, _Data, np.ndarray]:
    """The loss in the job's dtype, the data, and the best constant of every node's component, `[n, channels]`."""
    assert job.signal is not None
    nothing, loss = vanishes(job.penalty), leaves_as(job.loss, job.dtype)
    data = _observations(job.signal, job, loss, free=nothing or job.graph.num_edges == 0)
    columns = [np.ascontiguousarray(column) for column in data.columns.T]
    null = np.stack([loss.location(column, data.weights, data.labels)[data.labels] for column in columns], axis=1)
    _require_finite(null, data, loss, nothing)
    if (basis := _free_basis(job)) is not None:
        fits = zip(columns, null.T, strict=True)
        null = np.stack([_best_polynomial(loss, basis, y, data.weights, start) for y, start in fits], axis=1)
    return loss, data, null


def _free_basis(job: Job) -> np.ndarray | None:
    """Orthonormal `[n, k + 1]`, of the polynomials that no penalty sees with free ends; None else."""
    basis = job.ground.basis
    return None if basis is None or vanishes(job.penalty) else np.asarray(basis, np.float64)


def _best_polynomial(
    loss: ScalarLoss, basis: np.ndarray, y: np.ndarray, weights: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """The polynomial of least loss, `[n]`, by Newton's method from a constant; a ValueError if there is none."""
    with precision(np.dtype(np.float64)):
        at = jnp.asarray(np.where(weights > 0, y, loss.mean(jnp.asarray(start))))
        told, fit = partial(_expanded, leaves_as(loss, np.float64), at, weights), start.astype(np.float64)
        value, slope, curvature = (np.asarray(part) for part in told(fit))
        first = curvature.max()
        for _ in range(NEWTON_STEPS):
            hessian = basis.T @ (curvature[:, None] * basis)
            hessian += max(curvature.max(), first) * 1e-9 * np.eye(len(hessian))
            move = -basis @ np.linalg.solve(hessian, basis.T @ slope)
            fall, share = -slope @ move, 1.0
            while share > 1e-12:
                after, slope_after, curvature_after = (np.asarray(part) for part in told(fit + share * move))
                if after <= value - 1e-4 * share * fall:
                    break
                share /= 2
            else:
                break
            enough = value - after <= DECREASE * abs(value)
            fit, value, slope, curvature = fit + share * move, after, slope_after, curvature_after
            if enough:
                break
    least = np.linalg.eigvalsh(basis.T @ (curvature[:, None] * basis))[0]
    if not loss.span_holds_fit and not least > FLAT * first:
        raise ValueError(
            f"with free ends no fit exists at order {basis.shape[1] - 1}: {type(loss).__name__} falls without end "
            'along a polynomial, as for labels that one polynomial parts; lower the order, or take ends="graph"'
        )
    return fit


def _laid_out(job: Job, values: np.ndarray) -> jax.Array:
    """Values `[n, channels]` in the layout of the nodes."""
    return job.layout.put(job.layout.rows(values.reshape(-1, *job.channels), 0).astype(job.dtype))


def fit_loss(job: Job) -> TrendSolution:
    """The fit of a job with a loss; its dtype must be enabled."""
    signal, graph, kind, tol = job.signal, job.graph, job.dtype, job.tol
    assert signal is not None
    method = chosen(job)
    _require_connected(job.penalty)
    loss, data, null = _best_constants(job)
    alike = _sees_one_value(data)
    if alike.all():
        return known_fit(job, null.reshape(signal.values.shape), flat=True)
    penalty, laid_out, columns = job.rows, partial(_laid_out, job), np.ascontiguousarray(data.columns.T)
    y, weights = job.arrays
    low, high = _box(signal, loss, job.order)
    node_loss = NodeLoss(loss, y, weights, jnp.asarray(low, kind), jnp.asarray(high, kind))
    # If a component has only one value and the domain of the conjugate ends at 0, its dual, 0, has no room for
    # rounding. Its fit is known and its loss 0: its nodes count as missing, and the fit is inserted at the end.
    settled = _holding(data, alike & ~_zero_is_inside(node_loss).reshape(alike.shape))
    if settled.any():
        node_loss = dataclasses.replace(node_loss, weights=laid_out(data.weights[:, None] * ~settled))
    curvatures = np.stack([loss.curvature(y, data.weights, null[:, c]) for c, y in enumerate(columns)], axis=1)
    curvatures = curvatures * data.weights[:, None]
    curvatures = np.maximum(curvatures, LIGHT * curvatures.mean())
    # Cosines need one metric for all nodes, bands one for all channels.
    even = method.one_metric and (graph.shape is not None or (graph.free and bool(job.channels)))
    plan = method.plan(dataclasses.replace(job, weighted=not even))
    pull = -_balanced_gradient(data, node_loss, null, laid_out, _free_basis(job))
    dual = _null_dual(job.ground, penalty, pull, node_loss, laid_out)
    inside = jnp.zeros_like(dual) if _zero_is_inside(node_loss).all() else dual
    sigma = float(np.mean(curvatures))
    solver = LossAdmm(
        plan.node_solve,
        Anchor(inside, job.ground.operator.rmv(inside)) if isinstance(penalty, Norm) else None,
        jnp.asarray(_first_rho(job.ground, penalty, laid_out(pull), sigma) if job.rho is None else job.rho, kind),
        jnp.asarray(sigma, kind),
        None if even else laid_out(curvatures / sigma),
        relaxation=kind.type(job.relaxation),
        cadence=min(job.cadence or plan.cadence, job.max_steps),
    )
    x = laid_out(null)
    start, warm = LossStart(x, dual), job.start()
    if warm is not None:
        last = getattr(getattr(job.warm_start, "state", None), "sigma", None)
        # The rho of the square loss's solver does not apply here.
        start = LossStart(warm.x, warm.dual, None if last is None else warm.rho, last)
    if job.rho is not None:
        start = dataclasses.replace(start, rho=None)
    problem = Problem(node_loss, penalty, plan.split)
    limit = to_next_check(job.max_steps, solver.cadence)
    if job.graph.free and isinstance(penalty, Norm) and float(_gap_at(problem, x, dual, solver.anchor)) <= tol:
        # The polynomial is the fit; for a large weight rounding of its rows would spoil an iteration.
        start, limit = LossStart(x, dual), 0
    found = iterate(problem, solver, start, tol=jnp.asarray(tol, kind), max_steps=limit, history=job.history)
    if settled.any():
        found = dataclasses.replace(found, value=jnp.where(laid_out(settled) > 0, x, found.value))
    if not isinstance(penalty, Norm):
        nonzero = nonzero_at(job.ground, penalty, found.value, None, found.state.copies[1], 1.0)
        return TrendSolution.of(dataclasses.replace(found, status=stationary(found.status)), nonzero)
    value, objective, gap, nonzero = _finish(job.ground, problem, found, solver.anchor, x)
    status = promoted(found.status, gap, objective, tol)
    found = dataclasses.replace(found, value=value, status=status, residual=gap, objective=objective, gap=gap)
    return TrendSolution.of(found, nonzero)


def _require_connected(penalty: Any) -> None:
    """Raise a ValueError if some row weights are 0: these may cut off a part whose best constant is not finite."""
    weight = getattr(penalty, "weight", 1.0)
    zeros = np.size(weight) - np.count_nonzero(weight)
    if 0 < zeros < np.size(weight):
        raise ValueError(
            f"with a loss= the weights of L1 must be positive, given {zeros} of {np.size(weight)} that are 0: a part "
            "that they cut off may have no finite fit; give them a small weight"
        )


def _observations(signal: Signal, job: Job, loss: ScalarLoss, free: bool) -> _Data:
    """The data, checked to lie in the loss's domain; without a penalty every node is a component."""
    graph, columns, weights = job.graph, signal.columns, signal.mass
    wrong = loss.wrong(columns) & (weights > 0)[:, None]
    if wrong.any():
        node, channel = (int(i) for i in np.argwhere(wrong)[0])
        place = f"node {node}"
        if graph.shape is not None and len(graph.shape) > 1:
            place += f", pixel {tuple(int(i) for i in np.unravel_index(node, graph.shape))}"
        if columns.shape[1] > 1:
            place += f", channel {channel}"
        raise ValueError(
            f"{type(loss).__name__} takes {loss.expected}, given {columns[node, channel]:g} at {place} "
            f"({int(wrong.sum())} such)"
        )
    if free and not weights.all():
        raise ValueError("without a penalty the fit is not defined at missing nodes: raise the penalty's weight")
    return _Data(columns, weights, np.arange(graph.num_nodes) if free else graph.components)


def _require_finite(null: np.ndarray, data: _Data, loss: ScalarLoss, unpenalised: bool) -> None:
    endless = ~np.isfinite(null)
    if not endless.any():
        return
    node, channel = (int(i) for i in np.argwhere(endless)[0])
    component = int(data.labels[node])
    size = int(np.sum(data.labels == component))
    count = len(np.unique(data.labels[endless.any(axis=1)]))
    where = f"node {node}" if size == 1 else f"the component of node {node} ({size} nodes)"
    if null.shape[1] > 1:
        where += f" in channel {channel}"
    advice = (
        "raise the penalty's weight" if unpenalised else "leave it out, join it to others by an edge, or observe more"
    )
    raise ValueError(
        f"{where} has {loss.unbounded}, so its best fit is {null[node, channel]:+g} and no minimum is attained "
        f"({count} such); {advice}"
    )


def _holding(data: _Data, marked: np.ndarray) -> np.ndarray:
    """Whether the node's component has a marked observation in that channel, `[n, channels]`."""
    nodes, channels = np.nonzero(marked & (data.weights > 0)[:, None])
    found = np.zeros((int(data.labels.max()) + 1, marked.shape[1]), bool)
    found[data.labels[nodes], channels] = True
    return found[data.labels]


def _sees_one_value(data: _Data) -> np.ndarray:
    """Whether the node's component has only one value in that channel: its best constant is then the fit."""
    seen = np.flatnonzero(data.weights > 0)[::-1]
    first = np.zeros(int(data.labels.max()) + 1, np.int64)
    first[data.labels[seen]] = seen
    return ~_holding(data, data.columns != data.columns[first[data.labels]])


def _box(signal: Signal, loss: ScalarLoss, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Bounds for the fit at missing nodes, one per channel, on the scale of the fit.

    At order 0 the range of the data is an exact bound, if the loss has one.
    """
    spans = [loss.span(column) for column in signal.columns[signal.mass > 0].T]
    low, high = np.array(spans).T.reshape(2, *signal.values.shape[1:])
    wider = 0 if order == 0 and loss.span_holds_fit else BOX_RANGES * (high - low)
    return low - wider, high + wider


@jax.jit
def _expanded(loss: ScalarLoss, y: Any, weights: Any, fit: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The loss of a fit, and node by node its slope and its curvature."""
    slope, curvature = jax.jvp(lambda x: loss.derivative(x, y), (fit,), (jnp.ones_like(fit),))
    return jnp.sum(weights * loss.value(fit, y)), weights * slope, weights * curvature


def _balanced_gradient(
    data: _Data,
    node_loss: NodeLoss,
    null: np.ndarray,
    laid_out: Callable[[np.ndarray], jax.Array],
    basis: np.ndarray | None,
) -> np.ndarray:
    """A subgradient of the loss at the best constants whose sum over every component is 0, `[n, channels]`.

    With a basis, the gradient at the best polynomial, orthogonal to all polynomials.
    """
    gradient = np.array(node_loss.gradient(laid_out(null)), np.float64).reshape(null.shape)
    if basis is not None:
        seen = (data.weights > 0)[:, None] * basis
        return gradient - seen @ np.linalg.solve(seen.T @ seen, basis.T @ gradient)
    for column in gradient.T:
        # Observations that the constant meets exactly take up the remainder: for the absolute loss their subgradients
        # are free. Without such observations the remainder is rounding.
        met = data.weights * (column == 0)
        met_mass = np.bincount(data.labels, met)
        takes = np.where((met_mass > 0)[data.labels], met, data.weights)
        left = np.bincount(data.labels, column) / np.bincount(data.labels, takes)
        column -= takes * left[data.labels]
    return gradient


def _null_dual(
    ground: Ground, penalty: Any, pull: np.ndarray, node_loss: NodeLoss, laid_out: Callable[[np.ndarray], jax.Array]
) -> jax.Array:
    """The dual of the best constants, shortened until it lies in the penalty's ball; 0 where it is not needed.

    If the weight is large enough it proves that the constants are the fit. It lies inside the domain of the conjugate,
    where the dual 0 may be on the boundary.
    """
    on_nodes = laid_out(pull)
    rows = ground.operator.mv(on_nodes)
    nothing = jnp.zeros_like(rows)
    if not isinstance(penalty, Norm):
        return nothing
    strong = float(penalty.value(rows)) >= np.sum(pull**2)
    if not strong and _zero_is_inside(node_loss).all():
        return nothing
    dual, solved = _of_means(ground, on_nodes)
    return _shortened(penalty, dual) if solved else nothing


_of_means = jax.jit(null_space_dual)


def _zero_is_inside(node_loss: NodeLoss) -> np.ndarray:
    """Whether the dual 0 lies inside the domain of the loss's conjugate, entry by entry; True at missing nodes."""
    low, high = node_loss.family.dual_range(node_loss.signal)
    inside = (low < 0) & (high > 0)
    if node_loss.weights is not None:
        inside = inside | (node_loss.weights == 0)
    return np.broadcast_to(inside, node_loss.signal.shape)


@jax.jit
def _shortened(penalty: Any, dual: jax.Array) -> jax.Array:
    """`dual` halved until it lies in the penalty's ball."""

    def outside(share: jax.Array) -> jax.Array:
        point = share * dual
        return (share > 1e-12) & jnp.any(jnp.abs(penalty.project_dual(point) - point) > 1e-6 * jnp.abs(point))

    share = jax.lax.while_loop(outside, lambda share: share / 2, jnp.ones((), dual.dtype))
    return penalty.project_dual(jnp.where(share > 1e-12, share, 0) * dual)


@jax.jit
def _gap_at(problem: Problem, null: jax.Array, dual: jax.Array, anchor: Anchor) -> jax.Array:
    return certificate(problem, null, dual, anchor, True)[1]


@jax.jit
def _first_rho(ground: Ground, penalty: Any, pull: jax.Array, sigma: float) -> jax.Array:
    """The weight over the noise, estimated from the differences of the loss's pull."""
    noise = OF_MEAN_SIZE * jnp.mean(jnp.abs(ground.highest.mv(pull)) / ground.row_norms)
    return FIRST_RHO * sigma * mean_weight(penalty, 1.0) / jnp.where(noise > 0, noise, 1)


@jax.jit
def _finish(
    ground: Ground, problem: Problem, found: Solution, anchor: Anchor, null: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The fit, its objective, its gap and its nonzero rows.

    The fit is the best constants if they are no worse than the iterate, up to rounding.
    """
    points, dual = jnp.stack([found.value, null]), found.state.candidate
    of_null = jnp.array([False, True])
    objectives, gaps = jax.lax.map(lambda at: certificate(problem, at[0], dual, anchor, at[1]), (points, of_null))
    rounding = 1 + 8 * jnp.finfo(objectives.dtype).eps
    place = (objectives[1] <= rounding * objectives[0]).astype(int)
    # rho is about this multiple of the weight over the noise of the fit.
    noise = FIRST_RHO * mean_weight(problem.penalty, ground.padding[1]) / found.state.rho
    nonzero = nonzero_at(ground, problem.penalty, points[place], dual, None, noise, null)
    return points[place], objectives[place], gaps[place], nonzero
