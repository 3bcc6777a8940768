"""Floor 5: `trend_filter`, from a signal on a graph to a fit with a certificate.

    minimise over b    1/2 sum_j w_j (y_j - b_j)²  +  penalty(Δ^(k+1) b)

Other losses are in `general_loss.py`, sums of penalties of several orders in `sums.py`.

Source: Wang, Sharpnack, Smola, Tibshirani, "Trend filtering on graphs", JMLR 17 (2016).
"""

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.fidelity import wide_types
from sparseopt.core.iterate import iterate
from sparseopt.core.mesh import Devices, at_work, device_line
from sparseopt.core.penalties import Norm
from sparseopt.core.problem import Problem, Solution, Status
from sparseopt.core.solvers.admm import Admm
from sparseopt.core.solvers.mixed import solve_mixed
from sparseopt.trend.choice import choose_method
from sparseopt.trend.devices import fetched, over_devices, require_at_hand, require_doge, require_local
from sparseopt.trend.general_loss import checked_loss, fit_loss
from sparseopt.trend.graph import Graph
from sparseopt.trend.inputs import Signal, checked_block, checked_order, checked_signal
from sparseopt.trend.interior import Interior
from sparseopt.trend.methods import ACCELERATION, chain_penalty, prepare, starts_exact
from sparseopt.trend.options import Options
from sparseopt.trend.preparation import (
    FIRST_RHO,
    SetUp,
    answered,
    finished,
    mean_weight,
    on_rows,
    placed,
    set_up,
    vanishes,
)
from sparseopt.trend.start import cold_start, exact_start, start_point, warm_start_of
from sparseopt.trend.sums import checked_terms, fit_sum, is_sum, sum_method

# The context manager left jax.experimental in JAX 0.8.
ENABLE_X64: Any = (jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")).enable_x64

# From so many nodes on a start in float32 saves more than the compilation of a second program costs.
MIXED_FROM = 500_000
mixed = jax.jit(solve_mixed)


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
    cadence: int | None = None,
    dtype: Any = None,
    loss: Any = None,
    devices: Devices = None,
) -> Solution:
    """Fit `b` to a signal `y` on a graph so that few of its differences `Δ^(order+1) b` are not zero.

    Args:
        y: `[n]` or `[n, channels]` in the graph's node order; on a grid also `[*shape]` or `[*shape, channels]`.
            The computation runs in float64 for float64 and integer signals, in float32 for shorter floats.
        graph: where it lives.
        penalty: `L1`, `MCP`, `SCAD`, `L0`, `GroupL2` (couples channels), or any object with `value` and `prox`. The
            weight of L1 is a number, or one for each row of `graph.matrix(order + 1)`. Or several penalties, keyed by
            their orders, as in `{-1: L1(0.5), 0: L1(2.0)}`: their sum, where order -1 penalises b itself.
        order: k >= 0; 0 fits piecewise constants, 1 piecewise linear, 2 piecewise quadratic signals. It stays 0 for
            several penalties.
        method: "doge", "admm", "fast_admm" (chains), "interior" (L1; needs the extra `interior`), or "auto";
            `chosen_method` tells what that takes.
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
        cadence: steps between two checks; None takes 10 for Doge, whose steps are cheap, and 5 for others. A start
            that is the fit already is checked after one.
        dtype: float32 or float64 instead of the signal's own. At node weights of 1 a fit within the gap `tol` lies
            within `sqrt(2 tol P)` of the optimum, in Euclidean norm and with P the objective; so converged fits in
            float32 and in float64 lie within twice that of each other. PRECISION says that float32 was not enough.
        loss: None for the square, `PoissonLoss()` (counts; b is the log-rate), `LogisticLoss()` (labels 0 and 1; b is
            the log-odds), `SquaredHingeLoss()` (labels -1 and 1; b is a score), `HuberLoss(delta)`, `AbsoluteLoss()`,
            `QuantileLoss(level)`, a `ScalarLoss` of your own, or the name "poisson", "logistic", "squared_hinge",
            "huber" or "absolute". Not by "fast_admm". See `sparseopt.trend.general_loss`.
        devices: how many devices work on the fit together, "all", or a `jax.sharding.Mesh` of one axis "devices"; None
            for one. Several do one penalty and the square loss by "doge" with B = order + 1; the answer is that of one
            device to rounding. With several processes each calls this with the same arguments and gets all of the
            answer. `.state` stays on the devices.

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
    k, family = checked_order(order), checked_loss(loss)
    signal = checked_signal(y, graph, node_weights, missing, dtype)
    terms = checked_terms(penalty, signal, graph, k)
    if not is_sum(terms):
        ((k, penalty),) = terms.items()
    elif B is not None or family is not None:
        raise ValueError(f"several penalties take neither B nor loss, given B={B}, loss={loss}")
    block = checked_block(B, k)
    options = Options(method, block, tol, max_steps, warm_start, rho, relaxation, history, cadence)
    kind = signal.values.dtype
    native = wide_types() or kind == np.float32
    mesh = device_line(devices)
    if mesh is None:
        require_at_hand(warm_start)
    else:
        require_doge(options, k, family, is_sum(terms))
        require_local(penalty, signal.values.shape[1:])
        graph = over_devices(graph, mesh)
        options = dataclasses.replace(options, method="doge", warm_start=graph.taken_up(warm_start, k))
    with precision(kind), at_work(mesh):
        if family is not None:
            solution = fit_loss(signal, graph, penalty, k, family, options)
        elif is_sum(terms):
            solution = fit_sum(signal, graph, terms, options)
        elif graph.num_edges == 0 or vanishes(penalty):
            solution = _unchanged(signal)
        elif isinstance(penalty, Norm) and (filled := _constant(signal, graph)) is not None:
            # An objective of 0, against which no gap has a relative size.
            solution = _unchanged(Signal(filled, None, signal.shape))
        else:
            solution = _fit(signal, graph, penalty, k, options)
        if mesh is not None:
            return fetched(solution)
        return solution if native else jax.device_get(solution)


def chosen_method(
    y: Any,
    graph: Graph,
    penalty: Any,
    order: int = 0,
    tol: float = 1e-6,
    *,
    node_weights: Any = None,
    missing: str = "error",
    dtype: Any = None,
) -> str:
    """The method that `trend_filter(..., method="auto")` takes for the square loss; arguments as there.

    "interior" starts cold and keeps no history: with a warm start or a history another method is taken.

    Example:
        >>> from sparseopt.trend.filter import chosen_method
        >>> chosen_method(np.arange(6.0) % 2, so.Graph.grid((2, 3)), so.L1(0.3), order=2)
        'admm'
    """
    signal = checked_signal(y, graph, node_weights, missing, dtype)
    terms, weighted = checked_terms(penalty, signal, graph, checked_order(order)), signal.weights is not None
    if is_sum(terms):
        return sum_method(terms, graph, weighted)
    ((k, penalty),) = terms.items()
    with precision(signal.values.dtype):
        strength = _strength(penalty, set_up(signal, graph, k))
    return choose_method(graph, penalty, k, weighted, strength, tol, signal.values.dtype)


def _unchanged(signal: Signal) -> Solution:
    """The exact answer where nothing is penalised: y, with a gap of 0."""
    if signal.weights is not None and not signal.weights.all():
        raise ValueError("without a penalty the fit is not defined at missing nodes: raise the penalty's weight")
    zero = jnp.zeros((), signal.values.dtype)
    value = jnp.asarray(signal.values.reshape(signal.shape))
    status, steps = jnp.asarray(Status.CONVERGED, jnp.int32), jnp.zeros((), jnp.int32)
    return Solution(value, status, steps, zero, zero, zero, None, None)


def _constant(signal: Signal, graph: Graph) -> np.ndarray | None:
    """The signal with every missing value filled in, if its components have one value each; None otherwise."""
    columns = signal.values.reshape(graph.num_nodes, -1)
    seen = np.arange(graph.num_nodes) if signal.weights is None else np.flatnonzero(signal.weights)
    one = np.empty(graph.num_components, np.int64)
    one[graph.components[seen]] = seen
    filled = columns[one[graph.components]]
    return filled.reshape(signal.values.shape) if np.array_equal(filled[seen], columns[seen]) else None


def _strength(penalty: Any, base: SetUp, padding: float = 1.0) -> float:
    """The penalty's weight over the noise of the signal."""
    return mean_weight(penalty, padding) / base.noise if base.noise > 0 else 1.0


def _fit(signal: Signal, graph: Graph, penalty: Any, k: int, options: Options) -> Solution:
    kind, channels = signal.values.dtype, signal.values.shape[1:]
    weighted, method, tol = signal.weights is not None, options.method, options.tol
    base = set_up(signal, graph, k)
    rows = on_rows(penalty, graph, k, bool(channels))
    strength, penalty = _strength(rows, base, graph.padding(k + 1)), placed(rows, graph, k, kind)
    if method == "auto":
        method = choose_method(graph, penalty, k, weighted, strength, tol, kind, options.is_cold)
    if method == "interior":
        found = Interior(signal, graph, k, base, penalty).fit(penalty, tol, options.max_steps)
        if options.method == "interior" or int(found.status) == Status.CONVERGED:
            return dataclasses.replace(found, value=found.value.reshape(signal.shape))
        # Rounding ended it: where the weight is very large, the others get closer.
        method = choose_method(graph, penalty, k, weighted, strength, tol, kind, cold=False)
    exact = starts_exact(method, k, weighted)
    ready = prepare(graph, k, method, options.block if method == "doge" else 0, weighted, kind, bool(channels))
    if method == "fast_admm":
        penalty = chain_penalty(penalty, graph, k)
    rho, warm_start = options.rho, options.warm_start
    settings = options.solver_settings(method, kind) | ({"cadence": 1} if exact else {"acceleration": ACCELERATION})
    solver = Admm(
        ready.node_solve,
        jnp.asarray(FIRST_RHO * strength if rho is None else rho, kind),
        **settings,
    )
    if warm_start is None:
        start = cold_start(signal, graph, penalty, k, base, ready)
    else:
        x = base.laid_out(start_point(warm_start, signal) - base.shift)
        start = warm_start_of(x, warm_start, ready, rho)
    if exact:
        start = exact_start(penalty, base.centred.center)
    problem, level = Problem(base.centred, penalty, ready.split), jnp.asarray(tol, kind)
    limit = options.limit(solver.cadence)
    if kind == np.float64 and graph.num_nodes >= MIXED_FROM and isinstance(penalty, Norm) and not options.history:
        found = mixed(problem, solver, start, tol=level, max_steps=jnp.asarray(limit, jnp.int32))
    else:
        found = iterate(problem, solver, start, tol=level, max_steps=limit, history=options.history)
    problem, shift, means = Problem(base.loss, penalty, ready.split), jnp.asarray(base.shift, kind), base.means
    fit = finished(problem, found, shift, base.laid_out(means, shift), level)
    return answered(found, fit, graph, signal.shape)
