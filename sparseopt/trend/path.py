"""Floor 5: the regularisation path of the trend filter, from the component means down to nearly the signal.

    minimise over b    1/2 sum_j w_j (y_j - b_j)²  +  penalty_weight(Δ^(k+1) b)        for weight_1 > weight_2 > ...

Every level has its certificate, its degrees of freedom and its sum of squares; `selection.py` chooses among them.

Source: Tibshirani and Taylor, "The solution path of the generalized lasso", Annals of Statistics 39 (2011).
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.arguments import is_positive, positive_number, real_array, require_memory, whole_number
from sparseopt.core.fidelity import total
from sparseopt.core.group_penalties import GroupL2
from sparseopt.core.iterate import iterate
from sparseopt.core.penalties import L1, MCP, SCAD, Norm
from sparseopt.core.problem import Problem, Solution, Status
from sparseopt.core.solvers.admm import Start, balanced_rho
from sparseopt.core.types import precision
from sparseopt.trend.freedom import freedom_of_rows
from sparseopt.trend.graph import Graph
from sparseopt.trend.ground import Data, data_of, on_rows
from sparseopt.trend.job import MOST_STEPS, Job, checked_penalty, require_representable
from sparseopt.trend.largest_weight import NullFit, null_fit
from sparseopt.trend.layout import layout_of
from sparseopt.trend.methods import INTERIOR, chosen_for_path, named
from sparseopt.trend.methods.interior import Interior
from sparseopt.trend.pieces import nonzero_at
from sparseopt.trend.plan import FIRST_RHO, Plan, finished
from sparseopt.trend.signal import Signal, checked_order, checked_signal, graph_at, signal_noise

# The relative accuracy of the first weight of a path: enough there, and ten times cheaper than the default.
FIRST_WEIGHT_TOL = 1e-2
# The rho from Doge's start is accepted within this factor of the rho from the noise.
RHO_RANGE = 1e4
# Levels of few steps do not adapt rho. With exact x-steps, a level takes the rho of the previous level, moved towards
# the rho that its last step suggests by the root of the ratio, by at most this factor.
LARGEST_WISH = 2.0
# A fit without state and dual, and which of its differences are not zero, in the layout of `graph.base`.
_Level = tuple[Solution, Any]


@dataclasses.dataclass(frozen=True)
class TrendPath:
    """Fits for several weights, the largest first. All arrays are NumPy arrays.

    Attributes:
        weights: `[levels]`, descending.
        values: the fits, `[levels, *shape of y]`.
        objectives: `[levels]`.
        gaps: relative duality gaps `[levels]`, upper bounds on the relative suboptimality; NaN where the penalty has
            no dual.
        residuals: of the stopping rule, `[levels]`: the gap, or the stationarity residual.
        steps: `[levels]`.
        statuses: the `Status` of each level, `[levels]`.
        degrees_of_freedom: of every fit, `[levels]`; see `degrees_of_freedom`.
        squares: `sum_j w_j (y_j - fit_j)²` over observed nodes and channels, `[levels]`.
        observations: the number of observed values.
        channels: of y, 1 without a channel axis.
        noise: the signal's `noise_level`, or NaN.
        largest_weight: the least weight known to give the component means; None if the weights were given.
        penalty: the penalty, without the weights of the levels.
    """

    weights: np.ndarray
    values: np.ndarray
    objectives: np.ndarray
    gaps: np.ndarray
    residuals: np.ndarray
    steps: np.ndarray
    statuses: np.ndarray
    degrees_of_freedom: np.ndarray
    squares: np.ndarray
    observations: int
    channels: int
    noise: float
    largest_weight: float | None
    penalty: Any

    def __len__(self) -> int:
        return len(self.weights)

    def check(self) -> "TrendPath":
        """Return self if every level converged, with a certificate or to a stationary point.

        Raises:
            RuntimeError: otherwise, naming the levels and what to try.
        """
        levels = np.flatnonzero(~np.isin(self.statuses, (Status.CONVERGED, Status.STATIONARY)))
        if not levels.size:
            return self
        listed = ", ".join(
            f"level {i} (weight {self.weights[i]:.4g}): {Status(int(self.statuses[i])).name} at residual "
            f"{self.residuals[i]:.2g}"
            for i in levels[:5]
        )
        more = f" and {len(levels) - 5} more" if len(levels) > 5 else ""
        raise RuntimeError(
            f"{len(levels)} of {len(self)} levels did not converge: {listed}{more}; "
            f"{Status(int(self.statuses[levels[0]])).advice}"
        )

    def at(self, index: int) -> Solution:
        """One level as a `Solution` without a state."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"the path has the levels 0..{len(self) - 1}, given {index}")
        fields = (self.values, self.statuses, self.steps, self.residuals, self.objectives, self.gaps)
        value, status, steps, residual, objective, gap = (field[index] for field in fields)
        return Solution(value, status, steps, residual, objective, gap, None, None)


def trend_path(
    y: Any,
    graph: Graph,
    penalty: Any = L1,
    order: int = 0,
    *,
    weights: Any = None,
    num: int = 50,
    ratio: float = 1e-3,
    tol: float = 1e-4,
    method: str = "auto",
    max_steps: int = 20_000,
    node_weights: Any = None,
    missing: str = "error",
    dtype: Any = None,
) -> TrendPath:
    """Fits of a trend filter from the weight that leaves only the component means down to nearly the signal.

    Args:
        y: as in `trend_filter`.
        graph: as in `trend_filter`.
        penalty: a penalty class such as `L1`, or a penalty whose `weight` is replaced at every level.
        order: k.
        weights: positive, in any order; None takes `num` weights, evenly spaced in the logarithm, from `largest_weight`
            to `ratio` times that. This is for L1, MCP and SCAD, whose means become stationary at the same weight, and
            GroupL2, where the first weight is large enough but not the least; other penalties need given weights.
        num: the number of weights.
        ratio: the last weight over the first.
        tol: of each level, as in `trend_filter`.
        method: as in `trend_filter`, for all levels; from order 1 on "auto" prefers an exact x-step, since most steps
            are spent where smoothing is strong.
        max_steps: step limit of each level.
        node_weights: as in `trend_filter`.
        missing: as in `trend_filter`.
        dtype: as in `trend_filter`.

    Returns:
        A `TrendPath`; it holds every fit, so it needs the memory of `num` signals.

    Example:
        >>> y = np.array([0.1, -0.1, 0.0, 5.1, 4.9, 5.0])
        >>> path = so.trend_path(y, so.Graph.chain(6), num=4, ratio=2e-2).check()
        >>> path.weights.round(3).tolist()
        [7.5, 2.036, 0.553, 0.15]
        >>> path.degrees_of_freedom.tolist()
        [1, 2, 2, 2]
        >>> path.at(2).value.round(2).tolist()
        [0.18, 0.18, 0.18, 4.82, 4.82, 4.82]
    """
    k = checked_order(order)
    name = named(method)
    signal = checked_signal(y, graph, node_weights, missing, dtype)
    graph = graph_at(graph, k, signal)
    template = _checked_template(penalty, signal)
    tol, max_steps = positive_number("tol", tol), whole_number("max_steps", max_steps, 1, MOST_STEPS)
    if not (is_positive(ratio) and ratio < 1):
        raise ValueError(f"ratio, the last weight over the first, lies in (0, 1), given {ratio!r}")
    given = None if weights is None else _checked_levels(weights, signal.values.dtype)
    num = whole_number("num", num, 1) if given is None else len(given)
    # The fits from the device, and as one array.
    needed, what = 2 * num * signal.values.nbytes, f"a path of {num:,} fits of {signal.values.size:,} values"
    require_memory(needed, what, "take fewer weights, or single fits")
    if graph.num_edges == 0:
        raise ValueError("the graph has no edges, so every weight gives the same fit, the signal itself")
    first = None
    if given is None:
        first = _first_fit(signal, graph, template, k)
        given = float(first.weight.max()) * np.geomspace(1, ratio, num)
    top = dataclasses.replace(template, weight=float(given[0]))
    job = Job(
        layout_of(graph),
        {k: top},
        signal.values.dtype,
        signal.values.shape[1:],
        signal.weights is not None,
        signal,
        method=name,
        tol=tol,
        max_steps=max_steps,
    )
    with precision(job.dtype):
        found = jax.device_get(_descend(job, template, given, first))
    seen = None if signal.weights is None else signal.weights > 0
    columns, mass = signal.columns, signal.mass[:, None]
    channels = columns.shape[1]

    def stacked(name: str) -> np.ndarray:
        return np.stack([getattr(fit, name) for fit, _ in found])

    values = stacked("value").reshape(len(given), *signal.shape)

    return TrendPath(
        weights=given,
        values=values,
        objectives=stacked("objective"),
        gaps=stacked("gap"),
        residuals=stacked("residual"),
        steps=stacked("steps"),
        statuses=stacked("status"),
        degrees_of_freedom=np.array([freedom_of_rows(rows, graph, k, seen, channels) for _, rows in found]),
        squares=np.array([np.sum(mass * (columns - fit.reshape(columns.shape)) ** 2) for fit in values]),
        observations=channels * (graph.num_nodes if seen is None else int(seen.sum())),
        channels=channels,
        noise=signal_noise(signal, graph, k),
        largest_weight=None if first is None else float(given[0]),
        penalty=template,
    )


def _checked_template(penalty: Any, signal: Signal) -> Any:
    fields: Any = dataclasses.fields(penalty) if dataclasses.is_dataclass(penalty) else ()
    if "weight" not in [field.name for field in fields]:
        raise TypeError(
            f"a path replaces the penalty's `weight`, a field of a dataclass as in sparseopt.L1(1.0); given {penalty!r}"
        )
    template = penalty(1.0) if isinstance(penalty, type) else dataclasses.replace(penalty, weight=1.0)
    return checked_penalty(template, signal.values.shape[1:], signal.values.dtype)


def _checked_levels(weights: Any, kind: np.dtype) -> np.ndarray:
    levels = real_array("weights", weights).astype(np.float64)
    if levels.ndim != 1 or levels.size == 0:
        raise ValueError(f"weights are an array of at least one number, given the shape {levels.shape}")
    wrong = ~(np.isfinite(levels) & (levels > 0))
    if wrong.any():
        raise ValueError(f"weights are positive and finite, given {levels[wrong][0]} ({int(wrong.sum())} such)")
    require_representable(levels, kind)
    return np.sort(levels)[::-1]


def _first_fit(signal: Signal, graph: Graph, template: Any, order: int) -> NullFit:
    if not isinstance(template, (L1, MCP, SCAD, GroupL2)):
        raise ValueError(f"where a path of {template} begins is not known: give its weights")
    first = null_fit(signal, graph, order, FIRST_WEIGHT_TOL)
    weight = float(first.weight.max())
    if isinstance(template, GroupL2):
        weight = float(np.sqrt(np.sum(first.dual**2, axis=-1)).max())
    if weight == 0:
        null = "a polynomial of this degree" if graph.free else "the mean of its component everywhere"
        raise ValueError(f"the signal is {null}, so every weight gives the same fit, the signal itself")
    return first._replace(weight=np.array(weight))


def _descend(job: Job, template: Any, weights: np.ndarray, first: NullFit | None) -> list[_Level]:
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

    method = chosen_for_path(job)
    plan = method.plan(job)
    proof = None if first is None else first.dual if job.channels else first.dual[..., 0]
    if method is INTERIOR:
        return _by_interior(plan, [penalty_at(weight) for weight in weights], proof)
    y, node_weights = job.arrays
    tol = jnp.asarray(job.tol, kind)
    data, start = _first(plan, penalty_at(weights[0]), y, node_weights, proof)
    older, found = start, list[_Level]()
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


def _by_interior(solver: Interior, penalties: list[Any], proof: Any) -> list[_Level]:
    """The levels by the interior point method, which starts cold but orders its factors only once."""
    levels: list[_Level] = []
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
) -> tuple[_Level, Start]:
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
def _null_level(plan: Plan, data: Data, start: Start, tol: Any) -> _Level:
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
