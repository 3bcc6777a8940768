"""The trend filter of counts, labels and signals with outliers, with the losses of `scalar.py`.

    minimise over b    sum_j w_j f(b_j; y_j)  +  penalty(Δ^(k+1) b)

b is on the scale of the loss: a log-rate for counts, log-odds for labels; `loss.mean(b)` maps it back. A fit exists if
and only if the best constant of every component is finite, which is checked for every channel; with free ends, if the
best polynomial of degree k is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.compile import Jitted
from sparseopt.core.base.types import precision
from sparseopt.core.losses.data import DataLoss
from sparseopt.core.losses.residuals import has_two_slopes
from sparseopt.core.losses.scalar import ScalarLoss
from sparseopt.core.penalties.protocols import has_conjugate, is_norm
from sparseopt.core.problem.certify import Anchor, judge
from sparseopt.core.problem.iterate import iterate
from sparseopt.core.problem.problem import Problem, Solution, Start, Status
from sparseopt.core.solvers.loss_admm import LossAdmm
from sparseopt.trend.base.fit import Fit
from sparseopt.trend.base.geometry import Geometry
from sparseopt.trend.base.ground import BOX_RANGES, NULL_EPS, OF_MEAN_SIZE, Data, Ground, mean_weight
from sparseopt.trend.base.penalties import leaves_as, vanishes
from sparseopt.trend.base.pieces import TrendSolution
from sparseopt.trend.methods.choice import choose
from sparseopt.trend.methods.plan import finish, known_fit
from sparseopt.trend.methods.polynomials import best_polynomials, linear_fits
from sparseopt.trend.methods.split_plan import FIRST_RHO, to_next_check

# A node without an observation still needs some weight in the x-step: this fraction of the mean.
LIGHT = 1e-2
# A polynomial, or a linear programme's answer, with this gap, in eps, is the fit: steps could only add to the rounding.
NULL_GAP_EPS = 256


def node_deviances(loss: ScalarLoss, fit: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`2 f(fit; y)` entry by entry in float64, `(fit - y)²` for the square; meaningless where y is missing."""
    if getattr(loss, "is_square", False):
        # A path has many fits, and on the host this takes less time than JAX needs to begin.
        return (np.asarray(fit, np.float64) - y) ** 2
    with precision(np.dtype(np.float64)):
        return 2 * np.asarray(loss.value(jnp.asarray(fit, jnp.float64), jnp.asarray(y)))


def null_pull(asked: Fit) -> np.ndarray:
    """Minus a subgradient of the loss at the best constants, `[n, channels]`, with sums of 0 over every component.

    With free ends, at the best polynomials, orthogonal to all polynomials.
    """
    with precision(asked.dtype):
        best = best_constants(asked)
        return np.zeros_like(best.pull) if best.exact.all() else best.pull


@dataclasses.dataclass(frozen=True)
class BestConstants:
    """The best constants of the components, or with free ends the best polynomials; arrays are `[n, channels]`."""

    loss: ScalarLoss  # in the request's dtype
    labels: np.ndarray  # the component of every node, `[n]`; without a penalty every node is one
    fit: np.ndarray
    pull: np.ndarray  # minus a subgradient of the loss there that no constant, or polynomial, sees
    exact: np.ndarray  # whether the fit is all that the node's component has observed


def best_constants(asked: Fit) -> BestConstants:
    """The best constants of a request with a loss; its dtype must be enabled."""
    geometry, nothing, loss = asked.geometry, vanishes(asked.penalty), leaves_as(asked.loss, asked.dtype)
    columns, weights, labels = asked.columns, asked.mass, geometry.components
    _require_domain(loss, geometry, columns, weights)
    if nothing or geometry.num_edges == 0:
        asked.require_complete()
        labels = np.arange(geometry.num_nodes)
    each = [np.ascontiguousarray(column) for column in columns.T]
    fit = np.stack([loss.location(column, weights, labels)[labels] for column in each], axis=1)
    _require_finite(fit, labels, loss, nothing)
    if nothing or not geometry.wide:
        gradient = np.array(DataLoss(loss, None, *asked.arrays).gradient(asked.on_nodes(fit)), np.float64)
        pull = -_balance(gradient.reshape(fit.shape), weights, labels)
        return BestConstants(loss, labels, fit, pull, _sees_one_value(columns, weights, labels))
    fit, gradient = best_polynomials(loss, geometry, asked.order, columns, weights, fit)
    seen = (weights > 0)[:, None]
    apart = np.abs(np.where(seen, np.asarray(loss.mean(jnp.asarray(fit))) - columns, 0)).max(axis=0)
    exact = apart <= NULL_EPS * np.finfo(asked.dtype).eps * np.abs(np.where(seen, columns, 0)).max(axis=0)
    return BestConstants(loss, labels, fit, -gradient, np.broadcast_to(exact, fit.shape))


def fit_loss(asked: Fit, best: BestConstants | None = None) -> TrendSolution:
    """The fit of a request with a loss, whose dtype must be enabled; `best` are its best constants, if known."""
    geometry, kind, tol = asked.geometry, asked.dtype, asked.tol
    method, settings = choose(asked), asked.settings
    _require_connected(asked.penalty)
    best = best_constants(asked) if best is None else best
    loss, null, alike = best.loss, best.fit, best.exact
    penalty, laid_out, columns, mass = asked.rows, asked.on_nodes, asked.columns, asked.mass
    nothing = vanishes(asked.penalty)
    if alike.all() and (nothing or float(_penalty_of(asked.ground, penalty, laid_out(0 * null))[1]) == 0):
        return known_fit(asked, null, flat=not nothing)
    y, weights = asked.arrays
    low, high = _box(asked, loss, null)
    node_loss = DataLoss(loss, None, y, weights, jnp.asarray(low, kind), jnp.asarray(high, kind))
    # If a component has only one value and the domain of the conjugate ends at 0, its dual, 0, has no room for
    # rounding. Its fit is known and its loss 0: its nodes count as missing, and the fit is inserted at the end.
    settled = _holding(mass, best.labels, alike & ~np.asarray(_zero_is_inside(node_loss)).reshape(alike.shape))
    if settled.any():
        node_loss = dataclasses.replace(node_loss, weights=laid_out(mass[:, None] * ~settled))
    each = zip(np.ascontiguousarray(columns.T), null.T, strict=True)
    curvatures = np.stack([loss.curvature(column, mass, fit) for column, fit in each], axis=1) * mass[:, None]
    curvatures = np.maximum(curvatures, LIGHT * curvatures.mean())
    # Cosines need one metric for all nodes, bands one for all channels.
    even = method.one_metric and geometry.one_metric(bool(asked.channels))
    plan = method.plan(dataclasses.replace(asked, weights=None if even else asked.mass.astype(kind)))
    dual = _null_dual(asked.ground, penalty, best.pull, node_loss, laid_out)
    inside = jnp.zeros_like(dual) if np.asarray(_zero_is_inside(node_loss)).all() else dual
    sigma = float(np.mean(curvatures))
    solver = LossAdmm(
        plan.node_solve,
        jnp.asarray(settings.rho or _first_rho(asked.ground, penalty, laid_out(best.pull), sigma), kind),
        kind.type(settings.relaxation),
        min(settings.cadence or plan.cadence, asked.max_steps),
        sigma=jnp.asarray(sigma, kind),
        sets=None if is_norm(penalty) else asked.ground,
        anchor=Anchor(inside, _pull_of(asked.ground.operator, inside)) if has_conjugate(penalty) else None,
        metric=None if even else laid_out(curvatures / sigma),
    )
    x = laid_out(null)
    start, warm = Start(x, dual), asked.first()
    if warm is not None:
        # The rho of the square loss's solver does not apply here.
        start = warm if warm.sigma is not None else dataclasses.replace(warm, rho=None)
    if settings.rho is not None:
        start = dataclasses.replace(start, rho=None)
    problem = Problem(node_loss, penalty, plan.split)
    limit = to_next_check(asked.max_steps, solver.cadence)
    enough = max(tol, NULL_GAP_EPS * float(jnp.finfo(kind).eps))
    known = asked.ground.proves_null and is_norm(penalty)
    known = known and float(_gap_at(problem, x, dual, solver.anchor, True)) <= enough
    if known:
        # The polynomial is the fit; for a large weight rounding of its rows would spoil an iteration.
        start = Start(x, dual)
    elif geometry.wide and asked.method is None and asked.is_l1 and has_two_slopes(loss):
        # For a long series the iteration would take many thousands of steps.
        fit, rows = linear_fits(loss, geometry, asked.order, asked.penalty.weight, columns, mass, null)
        start = Start(laid_out(fit), jnp.asarray(rows.reshape(dual.shape), kind))
        known = float(_gap_at(problem, start.x, start.dual, solver.anchor, False)) <= enough
    limit = 0 if known and not asked.history else limit  # a history has at least one check
    found = iterate(problem, solver, start, tol=jnp.asarray(tol, kind), max_steps=limit, history=asked.history)
    if settled.any():
        found = dataclasses.replace(found, value=jnp.where(laid_out(settled) > 0, x, found.value))
    if known:
        found = dataclasses.replace(found, status=jnp.asarray(Status.PRECISION, jnp.int32))
    return _finish(asked.ground, node_loss, penalty, found, x, solver.anchor, jnp.asarray(tol, kind))


def _require_connected(penalty: Any) -> None:
    """Raise a ValueError if some row weights are 0: these may cut off a part whose best constant is not finite."""
    weight = getattr(penalty, "weight", 1.0)
    zeros = np.size(weight) - np.count_nonzero(weight)
    if 0 < zeros < np.size(weight):
        raise ValueError(
            f"with a loss= the weights of L1 must be positive, given {zeros} of {np.size(weight)} that are 0: a part "
            "that they cut off may have no finite fit; give them a small weight"
        )


def _require_domain(loss: ScalarLoss, geometry: Geometry, columns: np.ndarray, weights: np.ndarray) -> None:
    """Raise a ValueError for an observation outside the loss's domain."""
    wrong = loss.wrong(columns) & (weights > 0)[:, None]
    if not wrong.any():
        return
    node, channel = (int(i) for i in np.argwhere(wrong)[0])
    place = f"node {node}"
    if len(geometry.node_shape) > 1:
        place += f", pixel {tuple(int(i) for i in np.unravel_index(node, geometry.node_shape))}"
    if columns.shape[1] > 1:
        place += f", channel {channel}"
    raise ValueError(
        f"{type(loss).__name__} needs {loss.expected}, given {columns[node, channel]:g} at {place} "
        f"({int(wrong.sum())} such)"
    )


def _require_finite(null: np.ndarray, labels: np.ndarray, loss: ScalarLoss, unpenalised: bool) -> None:
    endless = ~np.isfinite(null)
    if not endless.any():
        return
    node, channel = (int(i) for i in np.argwhere(endless)[0])
    size = int(np.sum(labels == labels[node]))
    count = len(np.unique(labels[endless.any(axis=1)]))
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


def _holding(weights: np.ndarray, labels: np.ndarray, marked: np.ndarray) -> np.ndarray:
    """Whether the node's component has a marked observation in that channel, `[n, channels]`."""
    nodes, channels = np.nonzero(marked & (weights > 0)[:, None])
    found = np.zeros((int(labels.max()) + 1, marked.shape[1]), bool)
    found[labels[nodes], channels] = True
    return found[labels]


def _sees_one_value(columns: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the node's component has only one value in that channel: its best constant is then the fit."""
    seen = np.flatnonzero(weights > 0)[::-1]
    first = np.zeros(int(labels.max()) + 1, np.int64)
    first[labels[seen]] = seen
    return ~_holding(weights, labels, columns != columns[first[labels]])


def _box(asked: Fit, loss: ScalarLoss, null: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds for the fit at missing nodes, one per channel, on the scale of the fit, around the best constants `null`.

    At order 0 the range of the data is an exact bound, if the loss has one.
    """
    low, high = np.array([loss.span(column) for column in asked.columns[asked.mass > 0].T]).T
    ends = np.minimum(low, null.min(axis=0)), np.maximum(high, null.max(axis=0))
    low, high = np.reshape(ends, (2, *asked.values.shape[1:]))
    wider = 0 if asked.order == 0 and loss.span_holds_fit else BOX_RANGES * (high - low)
    return low - wider, high + wider


def _balance(gradient: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A subgradient of the loss `[n, channels]`, moved so that its sum over every component is 0."""
    for column in gradient.T:
        # Observations that the constant meets exactly take up the remainder: for the absolute loss their subgradients
        # are free. Without such observations the remainder is rounding.
        met = weights * (column == 0)
        met_mass = np.bincount(labels, met)
        takes = np.where((met_mass > 0)[labels], met, weights)
        left = np.bincount(labels, column) / np.bincount(labels, takes)
        column -= takes * left[labels]
    return gradient


def _null_dual(
    ground: Ground, penalty: Any, pull: np.ndarray, node_loss: DataLoss, laid_out: Callable[[np.ndarray], jax.Array]
) -> jax.Array:
    """The dual of the best constants, shortened until it lies in the penalty's ball; 0 if it is not needed.

    If the weight is large enough it proves that the constants are the fit. It lies inside the domain of the conjugate,
    where the dual 0 may be on the boundary.
    """
    on_nodes = laid_out(pull)
    nothing, cost = _penalty_of(ground, penalty, on_nodes)
    if not is_norm(penalty):
        return nothing
    strong = float(cost) >= np.sum(pull**2)
    if not strong and np.asarray(_zero_is_inside(node_loss)).all():
        return nothing
    dual, solved = _of_means(ground, on_nodes)
    return _shorten(penalty, dual) if solved else nothing


_of_means = Jitted(lambda ground, pull: ground.shortest(pull))
_pull_of = Jitted(lambda operator, dual: operator.rmv(dual))


@Jitted
def _penalty_of(ground: Ground, penalty: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Zeros on the rows, and the penalty of the rows of x."""
    rows = ground.operator.mv(x)
    return jnp.zeros_like(rows), penalty.value(rows)


@Jitted
def _zero_is_inside(node_loss: DataLoss) -> jax.Array:
    """Whether the dual 0 lies inside the domain of the loss's conjugate, entry by entry; True at missing nodes."""
    low, high = node_loss.scalar.dual_range(node_loss.target)
    inside = (low < 0) & (high > 0)
    if node_loss.weights is not None:
        inside = inside | (node_loss.weights == 0)
    return jnp.broadcast_to(inside, node_loss.target.shape)


@Jitted
def _shorten(penalty: Any, dual: jax.Array) -> jax.Array:
    """`dual` halved until it lies in the penalty's ball."""

    def outside(share: jax.Array) -> jax.Array:
        point = share * dual
        return (share > 1e-12) & jnp.any(jnp.abs(penalty.project_dual(point) - point) > 1e-6 * jnp.abs(point))

    share = jax.lax.while_loop(outside, lambda share: share / 2, jnp.ones((), dual.dtype))
    return penalty.project_dual(jnp.where(share > 1e-12, share, 0) * dual)


@Jitted
def _gap_at(problem: Problem, x: jax.Array, dual: jax.Array, anchor: Anchor, null: bool) -> jax.Array:
    return judge(problem, x, dual, anchor, null)[1]


@Jitted
def _first_rho(ground: Ground, penalty: Any, pull: jax.Array, sigma: float) -> jax.Array:
    """The weight over the noise, estimated from the differences of the loss's pull."""
    noise = OF_MEAN_SIZE * jnp.mean(jnp.abs(ground.highest.mv(pull)) / ground.row_norms)
    return FIRST_RHO * sigma * mean_weight(penalty, 1.0) / jnp.where(noise > 0, noise, 1)


@Jitted
def _finish(
    ground: Ground, loss: DataLoss, penalty: Any, found: Solution, null: jax.Array, anchor: Anchor | None, tol: Any
) -> TrendSolution:
    """`finish`, with the best constants in place of the means."""
    # rho is about this multiple of the weight over the noise of the fit.
    noise = FIRST_RHO * mean_weight(penalty, ground.padding[1]) / found.state.rho
    data = Data(loss, loss, jnp.zeros((), null.dtype), null, noise)
    return finish(ground, data, penalty, found, found.state.candidate, tol, anchor)
