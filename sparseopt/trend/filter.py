"""Floor 5: `trend_filter`, from a signal on a graph to a fit with a certificate.

    minimise over b    1/2 sum_j w_j (y_j - b_j)²  +  penalty(Δ^(k+1) b)

Source: Wang, Sharpnack, Smola, Tibshirani, "Trend filtering on graphs", JMLR 17 (2016).
"""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.fidelity import NodeSquares, total, wide_types
from sparseopt.core.penalties import Norm
from sparseopt.core.solve import Problem, Solution, Status, solve
from sparseopt.core.solvers.admm import Admm, Start
from sparseopt.trend.graph import Graph
from sparseopt.trend.inputs import Signal, checked_block, checked_order, checked_penalty, checked_signal
from sparseopt.trend.methods import METHODS, Prepared, chain_penalty, choose_method, prepare
from sparseopt.trend.start import null_space_dual

# At orders >= 1 the fit may leave the range of the data where nothing is observed. The certificate then holds
# among fits within this many ranges of it; at order 0 the range itself is a bound that loses nothing.
BOX_RANGES = 10.0
# rho starts at this multiple of the weight over the noise: the balance 3 of admm.py at duals of rms 0.8 weight.
FIRST_RHO = 2.4
# The context manager left jax.experimental in JAX 0.8.
ENABLE_X64: Any = (jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")).enable_x64


@contextlib.contextmanager
def precision(dtype: np.dtype) -> Iterator[None]:
    """Enable 64-bit types for the block if dtype needs them, whatever the global flag says."""
    if dtype == np.float64 and not wide_types():
        with ENABLE_X64(True):
            yield
    else:
        yield


def trend_filter(
    y: Any,
    graph: Graph,
    penalty: Any,
    order: int = 0,
    method: str = "auto",
    tol: float = 1e-6,
    max_steps: int = 20_000,
    node_weights: Any = None,
    *,
    B: int | None = None,
    missing: str = "error",
    warm_start: Solution | None = None,
    rho: float | None = None,
    relaxation: float = 1.7,
    history: bool = False,
    cadence: int = 5,
    dtype: Any = None,
) -> Solution:
    """Fit `b` to a signal `y` on a graph so that few of its differences `Δ^(order+1) b` are not zero.

    Args:
        y: `[n]` or `[n, channels]` in the graph's node order; on a grid also `[*shape]` or `[*shape, channels]`.
            The computation runs in float64 for float64 and integer signals, in float32 for shorter floats.
        graph: where it lives.
        penalty: `L1`, `MCP`, `SCAD`, `L0`, `GroupL2` (couples channels), or any object with `value` and `prox`.
        order: k >= 0; 0 fits piecewise constants, 1 piecewise linear, 2 piecewise quadratic signals.
        method: "doge", "admm", "fast_admm" (chains), or "auto".
        tol: the relative duality gap to reach; for a penalty that is no norm, the stationarity residual.
        max_steps: step limit.
        node_weights: w >= 0, `[n]`; 0 marks a missing observation. At orders >= 1 with missing nodes the gap
            bounds the suboptimality among fits that stay within ten data ranges of the data.
        B: how many difference factors Doge-ADMM treats row by row, 1..order+1; None is order + 1.
        missing: "nan" treats NaN as missing; "error" refuses them.
        warm_start: an earlier solution on the same graph at the same order, of any method with the same B.
        rho: the first ADMM parameter; None chooses it from the data.
        relaxation: over-relaxation in (0, 2).
        history: record residual, objective, gap and rho of every check.
        cadence: steps between two checks.
        dtype: float32 or float64 instead of the signal's own.

    Returns:
        A `Solution`. Its `.gap` is `(P - D) / D`, an upper bound on the relative suboptimality of `.value`, or
        NaN where the penalty has no dual. `.status` is CONVERGED, STATIONARY (converged without a certificate),
        PRECISION (rounding keeps the gap above tol), MAX_STEPS or NONFINITE; `.check()` raises on the last three.
        Arrays are NumPy arrays where float64 was used while JAX's 64-bit flag is off.

    Raises:
        ValueError, TypeError: on input that does not fit, saying what was given and what was expected.

    Example:
        >>> y = np.array([0.1, -0.1, 0.0, 5.1, 4.9, 5.0])
        >>> solution = so.trend_filter(y, so.Graph.chain(6), so.L1(0.3), order=0).check()
        >>> solution.value.round(3).tolist()
        [0.1, 0.1, 0.1, 4.9, 4.9, 4.9]
        >>> bool(solution.gap <= 1e-6)
        True
    """
    k = checked_order(order)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
    block = checked_block(B, k)
    signal = checked_signal(y, graph, node_weights, missing, dtype)
    checked_penalty(penalty, signal.values.shape[1] if signal.values.ndim == 2 else None)
    if not (tol > 0 and 0 < relaxation < 2 and cadence >= 1 and max_steps >= 1 and (rho is None or rho > 0)):
        raise ValueError(
            "tol, rho, cadence and max_steps must be positive and relaxation in (0, 2), given "
            f"tol={tol}, rho={rho}, cadence={cadence}, max_steps={max_steps}, relaxation={relaxation}"
        )
    kind = signal.values.dtype
    native = wide_types() or kind == np.float32
    with precision(kind):
        if graph.num_edges == 0 or _is_zero(penalty):
            solution = _unchanged(signal)
        else:
            rounded = -(-max_steps // cadence) * cadence
            options = {"relaxation": relaxation, "cadence": cadence}
            solution = _fit(signal, graph, penalty, k, method, block, warm_start, rho, options, tol, rounded, history)
        return solution if native else jax.device_get(solution)


def _is_zero(penalty: Any) -> bool:
    weight = getattr(penalty, "weight", None)
    return weight is not None and float(weight) == 0


def _unchanged(signal: Signal) -> Solution:
    """The exact answer where nothing is penalised: y, with a gap of 0."""
    if signal.weights is not None and not signal.weights.all():
        raise ValueError("without a penalty the fit is not defined at missing nodes: raise the penalty's weight")
    zero = jnp.zeros((), signal.values.dtype)
    value = jnp.asarray(signal.values.reshape(signal.shape))
    status, steps = jnp.asarray(Status.CONVERGED, jnp.int32), jnp.zeros((), jnp.int32)
    return Solution(value, status, steps, zero, zero, zero, None, None)


@dataclasses.dataclass(frozen=True)
class SetUp:
    """What a fit needs beside penalty and method.

    Attributes:
        loss: on the nodes, `[*nodes]` or `[*nodes, channels]`.
        centred: the same with the overall mean taken from the signal.
        shift: that mean, `[channels]`.
        means: of every node's component, `[n, channels]`.
        full: the operator `Δ^(order+1)`, as Doge-ADMM takes it.
        noise: of the signal; 0 where it has no differences.
        laid_out: values `[n, channels]` on the nodes of the graph, on the device.
    """

    loss: NodeSquares
    centred: NodeSquares
    shift: np.ndarray
    means: np.ndarray
    full: Prepared
    noise: float
    laid_out: Callable[[np.ndarray], jax.Array]


def set_up(signal: Signal, graph: Graph, order: int) -> SetUp:
    """Lay out a checked signal; call it where the signal's precision is enabled."""
    kind, channels = signal.values.dtype, signal.values.shape[1:]
    nodes = graph.shape or (graph.num_nodes,)

    def laid_out(values: np.ndarray) -> jax.Array:
        return jnp.asarray(values.reshape(*nodes, *channels), kind)

    shift, means = _means(signal, graph)
    weights = None
    if signal.weights is not None:
        weights = jnp.asarray(signal.weights.reshape(*nodes, *(1 for _ in channels)))
    low, high = _box(signal, order)
    loss = NodeSquares(laid_out(signal.values), weights, jnp.asarray(low, kind), jnp.asarray(high, kind))
    centre = loss.observed(laid_out(signal.values - shift))
    centred = NodeSquares(centre, weights, jnp.asarray(low - shift, kind), jnp.asarray(high - shift, kind))
    full = prepare(graph, order, "doge", order + 1, weights is not None, kind, bool(channels))
    return SetUp(loss, centred, shift, means, full, float(_noise(full, centre)), laid_out)


def leaves_as(penalty: Any, kind: np.dtype) -> Any:
    """The penalty with its numbers in the dtype of the computation."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, kind) if np.ndim(leaf) == 0 else jnp.asarray(leaf), penalty)


def _fit(
    signal: Signal,
    graph: Graph,
    penalty: Any,
    k: int,
    method: str,
    block: int,
    warm_start: Solution | None,
    rho: float | None,
    options: dict[str, Any],
    tol: float,
    max_steps: int,
    history: bool,
) -> Solution:
    kind, channels = signal.values.dtype, signal.values.shape[1:]
    weighted = signal.weights is not None
    base = set_up(signal, graph, k)
    loss, centred, full, noise = base.loss, base.centred, base.full, base.noise
    shift, means = base.shift, base.means
    centre, laid_out = centred.center, base.laid_out
    penalty = leaves_as(penalty, kind)
    level = float(getattr(penalty, "weight", 1.0))
    strength = level / noise if noise > 0 else 1.0
    if method == "auto":
        method = choose_method(graph, penalty, k, weighted, strength)
    ready = prepare(graph, k, method, block if method == "doge" else 0, weighted, kind, bool(channels))
    if method == "fast_admm":
        penalty = chain_penalty(penalty, graph, k)
    solver = Admm(
        ready.node_solve,
        jnp.asarray(FIRST_RHO * strength if rho is None else rho, kind),
        relaxation=jnp.asarray(options["relaxation"], kind),
        cadence=options["cadence"],
    )
    if warm_start is None:
        start = _cold(signal, means, laid_out, graph, penalty, k, full, ready, shift, centre)
    else:
        x = laid_out(np.asarray(warm_start.value).reshape(signal.values.shape) - shift)
        start = _warm(x, warm_start, ready, rho)
    problem = Problem(centred, penalty, ready.split)
    found = solve(problem, solver, start, tol=jnp.asarray(tol, kind), max_steps=max_steps, history=history)
    value, objective, gap = _finish(
        Problem(loss, penalty, ready.split), found, jnp.asarray(shift, kind), laid_out(means)
    )
    status = found.status
    if isinstance(penalty, Norm):
        # The mean comes back in working precision; what that costs is part of the answer.
        lost = (status == Status.CONVERGED) & ~(gap <= tol)
        status = jnp.where(lost, Status.PRECISION, status)
        status = jnp.where((status != Status.NONFINITE) & (gap <= tol), Status.CONVERGED, status)
    else:
        status = jnp.where(status == Status.CONVERGED, Status.STATIONARY, status)
    return dataclasses.replace(
        found,
        value=value.reshape(signal.shape),
        status=status.astype(jnp.int32),
        residual=gap if isinstance(penalty, Norm) else found.residual,
        objective=objective,
        gap=gap,
    )


def _box(signal: Signal, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Bounds for the fit at missing nodes, one a channel."""
    seen = signal.values if signal.weights is None else signal.values[signal.weights > 0]
    low, high = seen.min(axis=0), seen.max(axis=0)
    wider = BOX_RANGES * (high - low) if k else 0
    return low - wider, high + wider


@jax.jit
def _noise(ready: Prepared, y: jax.Array) -> jax.Array:
    """The standard deviation of white noise whose differences have the mean size of those of y."""
    return 1.2533 * jnp.mean(jnp.abs(ready.split.mv(y)) / ready.row_norms)


def _means(signal: Signal, graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """The mean over all observed nodes and the mean of every node's component, `[channels]` and `[n, channels]`."""
    kind, channels = signal.values.dtype, signal.values.shape[1:]
    columns = signal.values.reshape(graph.num_nodes, -1)
    if signal.weights is None:
        overall = columns.mean(axis=0, dtype=np.float64)
    else:
        overall = np.average(columns, axis=0, weights=signal.weights.astype(np.float64))
    if graph.num_components == 1:
        means = np.broadcast_to(overall.astype(kind), columns.shape)
    else:
        weights = np.ones(graph.num_nodes) if signal.weights is None else signal.weights.astype(np.float64)
        mass = np.bincount(graph.components, weights=weights)
        sums = [np.bincount(graph.components, weights=weights * column) for column in columns.T]
        means = (np.stack(sums, axis=1) / mass[:, None])[graph.components].astype(kind)
    return overall.astype(kind).reshape(channels), means.reshape(graph.num_nodes, *channels)


def _cold(
    signal: Signal,
    means: np.ndarray,
    laid_out: Callable[[np.ndarray], jax.Array],
    graph: Graph,
    penalty: Any,
    k: int,
    full: Prepared,
    ready: Prepared,
    shift: np.ndarray,
    centre: jax.Array,
) -> Start:
    """The signal with a dual of 0; or, where the weight may be that large, the means and their dual.

    The means are the fit only if `penalty(Δ z) >= <pull, z>` for all z, so one z decides for most signals.
    """
    plain = Start(centre, jnp.zeros(ready.split.row_shape(centre), centre.dtype))
    if not isinstance(penalty, Norm) or plain.dual.shape != full.split.row_shape(centre):
        return plain
    weights = 1.0 if signal.weights is None else signal.weights.reshape((-1,) + (1,) * (means.ndim - 1))
    pull = weights * (signal.values - means)
    if float(penalty.value(full.split.mv(laid_out(pull)))) < np.sum(pull**2, dtype=np.float64):
        return plain
    found = null_space_dual(graph, pull.reshape(graph.num_nodes, -1).astype(np.float64), k)
    if found is None:
        return plain
    z = laid_out(found[0].reshape(means.shape))
    dual = full.split.outer.base.difference(z) if found[1] else z
    return Start(laid_out(means - shift), penalty.project_dual(dual))


def _warm(x: jax.Array, warm_start: Solution, ready: Prepared, rho: float | None) -> Start:
    """The start that continues an earlier solution.

    Raises:
        ValueError: if its dual does not fit.
    """
    state = warm_start.state
    wanted = ready.split.row_shape(x)
    if state is None or state.candidate.shape != wanted:
        given = None if state is None else state.candidate.shape
        raise ValueError(
            f"warm_start needs a solution of the same graph and order whose dual has the shape {wanted}, given {given}"
        )
    return Start(x, jnp.asarray(state.candidate, x.dtype), state.rho if rho is None else None)


@jax.jit
def _finish(
    problem: Problem, found: Solution, shift: jax.Array, means: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The fit in the caller's units, its objective, and its gap as it stands after rounding.

    The component means are the limit for large weights; where they are no worse than the iterate they are the
    answer, and its differences are exactly zero.
    """
    loss, penalty, split = problem.loss, problem.penalty, problem.operator
    x = found.value + shift
    if not isinstance(penalty, Norm):
        return x, found.objective, found.gap
    tiny = jnp.finfo(x.dtype).tiny
    dual = found.state.candidate

    def judged(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = split.mv(x)
        objective = loss.value(x) + penalty.value(rows)
        slack = loss.slack(x, split.rmv(dual)) + total(penalty.slack(rows, dual))
        gap = jnp.where(slack < objective, slack / jnp.maximum(objective - slack, tiny), jnp.inf)
        return objective, jnp.where(slack == 0, 0, gap)

    of_x, of_means = judged(x), judged(means)
    take = of_means[0] <= of_x[0]
    return (
        jnp.where(take, means, x),
        jnp.where(take, of_means[0], of_x[0]),
        jnp.where(take, of_means[1], of_x[1]),
    )
