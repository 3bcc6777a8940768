"""`trend_filter`, from a signal on a graph to a fit with a certificate.

    minimise over b    1/2 sum_j w_j (y_j - b_j)²  +  penalty(Δ^(k+1) b)

arguments -> a checked request -> a method -> its plan -> the fit -> the caller's shape.

Source: Wang, Sharpnack, Smola, Tibshirani, "Trend filtering on graphs", JMLR 17 (2016); for several penalties,
Tibshirani, Saunders, Rosset, Zhu, Knight, "Sparsity and smoothness via the fused lasso", JRSS B 67 (2005), and
Tibshirani, "Adaptive piecewise polynomial estimation via trend filtering", Annals of Statistics 42 (2014), section 7.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.arguments import renames
from sparseopt.core.base.mesh import Devices, device_line
from sparseopt.core.base.types import precision, wide_types
from sparseopt.core.losses.scalar import check_scalar_loss
from sparseopt.core.penalties.entries import L1
from sparseopt.core.penalties.protocols import Penalty
from sparseopt.core.problem.problem import Solution
from sparseopt.trend.base.fit import Fit
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.parts import over_devices
from sparseopt.trend.base.penalties import bears, check_terms, constrained, terms_of, vanishes, without_bounds
from sparseopt.trend.base.pieces import TrendSolution
from sparseopt.trend.base.signal import check_graph, check_order, check_signal
from sparseopt.trend.beside import check_beside, fit_beside
from sparseopt.trend.methods.bounded import clipped_fit
from sparseopt.trend.methods.choice import as_method, choose, is_short, unless_rounded
from sparseopt.trend.methods.losses import fit_loss
from sparseopt.trend.methods.piece_means import short_fit, take_piece_means
from sparseopt.trend.methods.plan import known_fit
from sparseopt.trend.segments.priced import is_priced, priced_fit


@renames(
    warm_start="start",
    B="method=sparseopt.trend.Doge(B=...)",
    **dict.fromkeys(("rho", "relaxation", "cadence"), "it to the method, as in method=sparseopt.trend.Doge(rho=1.0)"),
)
def trend_filter(
    y: Any,
    graph: Graph,
    penalty: Penalty | Mapping[int, Penalty],
    order: int = 0,
    method: Any = "auto",
    start: Solution | None = None,
    *,
    tol: float = 1e-6,
    max_steps: int = 20_000,
    node_weights: Any = None,
    missing: str = "error",
    history: bool = False,
    dtype: Any = None,
    loss: Any = "square",
    bounds: Any = None,
    monotone: str | None = None,
    devices: Devices = None,
    covariates: Any = None,
    season: int | None = None,
) -> TrendSolution:
    """Fit `b` to a signal `y` on a graph so that most of its differences `Δ^(order+1) b` are exactly zero.

    Args:
        y: `[n]` or `[n, channels]` in the graph's node order; on a grid, also `[*shape]` or `[*shape, channels]`.
            The computation runs in float64 for float64 and integer signals and for free ends from order 1 on, else in
            float32. Large signals of low order are first solved in float32; objective and gap are computed in float64.
        graph: the graph of the signal.
        penalty: `L1`, `MCP`, `SCAD`, `L0`, `GroupL2`, or any object with `value` and `prox`. `L0` at order 0 on a chain
            has its global minimum for the square, Poisson and, up to 20,000 nodes, absolute and quantile losses, unless
            a method is named; pieces without a count have the rate eps times the mean. On other graphs it is a local
            minimum for the square and Poisson losses, in which no two pieces gain by merging. `GroupL2(w)` couples the
            channels; on a grid at order 0 `GroupL2(w, axis=0)` is isotropic total variation, the sum over the nodes of
            the length of the gradient, for every channel, and with axis (0, -1) for all channels together. The weight
            of L1 is a number, or one for each row of `graph.matrix(order + 1)`. Several penalties are given by their
            orders, as in `{-1: L1(0.5), 0: L1(2.0)}`, and add up; order -1 penalises b itself.
        order: k >= 0; 0 fits piecewise constants, 1 piecewise linear, 2 piecewise quadratic signals. It must be 0 for
            several penalties. On `Graph.chain(n)` polynomials of degree k are left unchanged, as genlasso does. On
            `Graph.chain(n, ends="graph")`, grids and other graphs the differences are the graph's: orders of 1 and more
            penalise a slope at the ends.
        method: "doge", "admm", "fused_lasso" (L1 at order 0 on chains), "interior" (L1; except on chains it needs the
            extra `interior`), "doge_groups" (Doge-ADMM as the paper stores it), or an object with settings such as
            `so.trend.Doge(B=2, rho=1.0)`; or "auto"; `so.trend.chosen_method` says which method that chooses.
        start: an earlier solution on the same graph at the same order, from any method with the same B. A fit that
            takes no step needs none.
        tol: the relative duality gap to reach; for a penalty without a conjugate, the stationarity residual.
        max_steps: step limit.
        node_weights: w >= 0, `[n]`; 0 marks a missing observation. At orders >= 1 with missing nodes the gap
            bounds the suboptimality among fits within ten data ranges of the data.
        missing: "nan" treats NaN as missing; "error" raises.
        history: record residual, objective, gap and rho of every check.
        dtype: float32 or float64 instead of the signal's dtype. With node weights of 1 a fit with the gap `tol` lies
            within `sqrt(2 tol P)` of the optimum in Euclidean norm, with P the objective; so converged fits in float32
            and float64 differ by at most twice that. The status PRECISION says that float32 was not enough.
        loss: "square", "poisson" (counts; b is the log-rate), "logistic" (labels 0 and 1, or proportions of ones; b is
            the log-odds), "squared_hinge" (labels -1 and 1; b is a score), "huber", "absolute", or an object of
            `so.scalar` such as `so.scalar.Huber(delta)` or `so.scalar.Quantile(level)`, or your own `ScalarLoss`. Not
            with "fused_lasso" and "interior". With free ends from order 1 on, your own loss must be smooth; for L1 with
            an absolute or quantile loss "auto" uses linear programming, whose fits count no steps. See
            `trend.methods.losses`.
        bounds: (low, high), between which every value of the fit lies; None for no end.
        monotone: "up" for a fit that does not fall, on chains from node to node, on grids along every axis, else from
            the first to the second node of every edge; "down" for one that does not rise. At order 0 on a chain the fit
            is exact, and without a weight, L1(0.0), the isotonic regression. Bounds and monotone fits of order 1 and
            more need the square loss.
        devices: the number of devices for the fit, "all", or a `jax.sharding.Mesh` of one axis "devices"; None for one.
            Several devices need one penalty, the square loss and "doge" with B = order + 1; up to rounding they give
            the answer of one device. With several processes, each calls this with the same arguments and gets the whole
            answer. `.state` stays on the devices.
        covariates: X, `[n]` or `[n, covariates]`, on a grid also `[*shape, covariates]`, known at every node: the loss
            is that of `b + X beta`, in one convex problem with one gap. A column that the trend can follow at no cost,
            such as a constant, is an error. Needs one channel, `L1`, and the square, Huber, Poisson or logistic loss or
            a smooth one of your own; runs in float64. See `trend.beside`.
        season: the period of a series, in rows: a periodic part with the sum 0 over a period is added, as covariates
            are. Rows count, not times: a row that is absent needs a row of NaN.

    Returns:
        A `TrendSolution`: a `Solution` with `.pieces()` and `.knots()`. At order 0 the nodes of a piece have exactly
        equal values, unless that would raise the objective of an inexact fit. Its `.gap` is `(P - D) / D`, an upper
        bound on the relative suboptimality of `.value`, or NaN if the penalty has no dual. `.status` is CONVERGED,
        STATIONARY (converged without a certificate), PRECISION (rounding keeps the gap above tol), MAX_STEPS or
        NONFINITE; `.check()` raises for the last three. Arrays are NumPy arrays if float64 was used while JAX's 64-bit
        flag is off.

    Raises:
        ValueError, TypeError: for invalid input, saying what was given and what was expected.

    Example:
        >>> y = np.array([0.1, -0.1, 0.0, 5.1, 4.9, 5.0])
        >>> solution = so.trend_filter(y, so.Graph.chain(6), so.L1(0.3), order=0).check()
        >>> solution.value.round(3).tolist()
        [0.1, 0.1, 0.1, 4.9, 4.9, 4.9]
        >>> bool(solution.gap <= 1e-6)
        True
    """
    options: Any = {"tol": tol, "max_steps": max_steps, "start": start, "history": history}
    options |= {"loss": check_scalar_loss(loss), "method": as_method(method)}
    options["limits"] = bounds, monotone
    plain = covariates is None and season is None
    dtype = dtype if plain or dtype is not None else np.float64
    if not plain and (bounds is not None or monotone is not None):
        raise ValueError("bounds and monotone fits have no covariates and no season beside them: leave one out")
    asked = check_fit(y, graph, penalty, order, node_weights, missing, dtype, devices, **options)
    working, native = asked.geometry.working(), wide_types() or asked.dtype == np.float32
    with precision(asked.dtype), working:
        if not plain:
            found = fit_beside(asked, check_beside(covariates, season, asked), _solve)
            return asked.geometry.fetch(dataclasses.replace(found, graph=graph), False)
        found = asked.list_rows(_solve(asked))
        value = asked.geometry.gather(found.value, 0).reshape(asked.shape)
        found = dataclasses.replace(found, value=value, graph=graph, order=asked.order)
        return asked.geometry.fetch(found, native)


def first_part(
    y: Any, graph: Graph, order: int, node_weights: Any, missing: str, loss: Any, covariates: Any, season: int | None
) -> np.ndarray:
    """What covariates and a season explain of a signal before a weight is known, in its shape, by its differences.

    Raises:
        ValueError: as `trend_filter` does.
    """
    options: Any = {"loss": check_scalar_loss(loss)}
    asked = check_fit(y, graph, L1(1.0), order, node_weights, missing, np.float64, **options)
    with precision(asked.dtype):
        return check_beside(covariates, season, asked).explained(asked).reshape(asked.shape)


def chosen_method(
    y: Any,
    graph: Graph,
    penalty: Penalty | Mapping[int, Penalty],
    order: int = 0,
    *,
    tol: float = 1e-6,
    node_weights: Any = None,
    missing: str = "error",
    dtype: Any = None,
) -> str:
    """Return the method that `trend_filter(..., method="auto")` chooses for the square loss and the same arguments.

    "interior" accepts no start and keeps no history: if they are requested, another method is chosen.

    Example:
        >>> so.trend.chosen_method(np.arange(6.0) % 2, so.Graph.grid((2, 3)), so.L1(0.3), order=2)
        'admm'
    """
    asked = check_fit(y, graph, penalty, order, node_weights, missing, dtype, tol=tol)
    with precision(asked.dtype):
        return choose(asked).name


def check_fit(
    y: Any,
    graph: Graph,
    penalty: Any,
    order: Any,
    node_weights: Any,
    missing: str,
    dtype: Any,
    devices: Devices = None,
    limits: tuple[Any, str | None] = (None, None),
    **options: Any,
) -> Fit:
    """The checked arguments of `trend_filter`; the limits are bounds and monotone."""
    mesh = None if devices is None else device_line(devices)
    if mesh is not None and mesh.size > 1 and limits != (None, None):
        raise ValueError("bounds and monotone fits work on one device: leave out devices, or leave them out")
    terms = constrained(terms_of(penalty, check_order(order)), *limits)
    highest, count = max(0, *terms), 1 if mesh is None else mesh.size
    rows = [term for k, term in terms.items() if k >= 0]  # no values are filled up
    geometry = check_graph(graph).geometry.at(highest)
    signal = check_signal(y, geometry, highest, node_weights, missing, dtype, devices=count)
    geometry = over_devices(geometry if bears(geometry, rows) else geometry.as_edges(), mesh)
    channels, kind = signal["values"].shape[1:], signal["values"].dtype
    terms = check_terms(terms, geometry, channels, kind)
    if max(0, *terms) < highest:
        # The highest penalty costs nothing: the geometry may depend on the order.
        return check_fit(y, graph, terms, 0, node_weights, missing, dtype, devices, **options)
    asked = Fit(geometry, terms, **signal, **options)
    geometry.require_penalty(asked.penalty, channels)
    return asked


def _solve(asked: Fit) -> TrendSolution:
    """The fit of a request, in the layout of the nodes; at order 0 with the means of its pieces."""
    if not asked.geometry.several_devices and (free := without_bounds(asked.terms)) is not None:
        return clipped_fit(asked, free, _solve)
    if is_short(asked):
        return short_fit(asked)
    found = _fit(asked)
    found = dataclasses.replace(found, nonzero=asked.geometry.gather(found.nonzero, asked.order + 1))
    return take_piece_means(asked, found)


def _fit(asked: Fit) -> TrendSolution:
    if not asked.square:
        return priced_fit(asked, _solve) if is_priced(asked) else fit_loss(asked)
    geometry, alone = asked.geometry, not asked.several
    if geometry.num_edges == 0 and not alone:
        raise ValueError(
            "the graph has no edges, so only a penalty on the values themselves acts: apply its prox, as in "
            "L1(0.5).prox(y, 1.0)"
        )
    if asked.method is not None and geometry.num_edges:
        choose(asked)  # what it cannot do is an error even if the fit is known
    if alone and (null := geometry.as_null_fit(asked)) is not None:
        # A polynomial costs nothing: a method would only round it.
        flat = jnp.zeros((geometry.count(asked.order + 1), *asked.channels), asked.dtype)
        if asked.rows.value(flat) == 0:
            return known_fit(asked, null, flat=True)
    if alone and (geometry.num_edges == 0 or vanishes(asked.penalty)):
        asked.require_complete()
        return known_fit(asked, asked.values)
    if is_priced(asked):
        return priced_fit(asked, _solve)
    method = choose(asked)
    found = method.plan(asked).fit_asked(asked)
    return unless_rounded(asked, found) if method.cold else found
