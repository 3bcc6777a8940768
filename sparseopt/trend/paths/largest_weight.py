"""The smallest weight of L1 at which a trend filter returns the component means, with a certificate.

With another loss, the means are replaced by the best constants c of the components. The constants are the fit if and
only if some u in the dual ball has `Δ^(k+1)ᵀ u = -g`, g the gradient of the loss at c, or a subgradient. The smallest
weight has a closed form for odd orders and on forests; elsewhere Dinkelbach's iteration finds it between bounds; see
The mathematics, "Paths of weights". With free ends a polynomial replaces the means, and on grids the iteration replaces
the closed form.

Source: Dinkelbach, "On nonlinear fractional programming", Management Science 13 (1967); Strang, "Maximal flow through
a domain", Mathematical Programming 26 (1983), for flows and level sets; Wang, Sharpnack, Smola, Tibshirani, "Trend
filtering on graphs", JMLR 17 (2016), for the dual.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from sparseopt.core.base.arguments import positive_number
from sparseopt.core.base.types import precision
from sparseopt.core.losses.scalar import check_scalar_loss
from sparseopt.core.operators.row_tables import difference_matrix
from sparseopt.core.penalties.entries import L1
from sparseopt.core.solvers.interior import is_available
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.ground import ground_of, inverse_laplacian
from sparseopt.trend.base.job import Job
from sparseopt.trend.base.layout import layout_of
from sparseopt.trend.base.signal import Signal, component_means, null_fit_values
from sparseopt.trend.filter import check_job, trend_filter
from sparseopt.trend.methods.admm_plan import Admm
from sparseopt.trend.methods.doge_plan import Doge
from sparseopt.trend.methods.interior_plan import Interior, is_narrow
from sparseopt.trend.methods.losses import null_pull

FIRST_STEPS = 100
MOST_STEPS = 12_800
# From this tolerance on Doge-ADMM in float32 is the fastest, and on narrow graphs an interior point method.
COARSE = 1e-3
# A signal this close to its means, relative to itself, differs from them by rounding.
ROUNDING = 1e-12
# A flow that misses the demand by this fraction is no certificate.
LEFT = 1e-6


class NullFit(NamedTuple):
    """The weights at which the component means are the fit."""

    weight: np.ndarray  # the smallest weight with a certificate, an upper bound of lam_max, `[channels]`
    lower: np.ndarray  # a lower bound of lam_max, `[channels]`
    dual: np.ndarray  # the certificate of `weight` in the layout of `graph.base`, `[*rows, channels]`


def largest_weight(
    y: Any,
    graph: Graph,
    order: int = 0,
    node_weights: Any = None,
    tol: float = 1e-6,
    *,
    missing: str = "error",
    loss: Any = "square",
) -> float:
    """The smallest weight of `L1` at which the fit is the mean of every component, or with free ends a polynomial.

    Larger weights give the same fit, so a path of weights begins here. The weight is exact up to rounding for odd
    orders and on forests, such as chains. Elsewhere it is the upper end of a certified interval `[lower, upper]` with
    `upper / lower - 1 <= tol`.

    The arguments are as in `trend_filter`; `tol` is the relative width of the interval. The result is the largest
    weight over the channels, in units of y times node weight; 0 if the signal is its component means. With free ends
    the polynomial of least squares replaces the means, and the weight is exact on a chain at every order. With another
    loss the best constants replace them; for a loss with kinks the weight is large enough, but it may not be the
    smallest. With both, the best polynomial replaces them, and the weight is exact for every loss.

    Raises:
        RuntimeError: if the interval remains wider than `tol`, or for a high order on a large grid with free ends.

    Example:
        >>> y = np.array([0.0, 0.0, 3.0, 3.0])
        >>> round(so.trend.largest_weight(y, so.Graph.chain(4)), 6)  # 1.5 above the mean, two nodes a side
        3.0
        >>> so.trend_filter(y, so.Graph.chain(4), so.L1(3.001)).value.tolist()
        [1.5, 1.5, 1.5, 1.5]
    """
    tol, family = positive_number("tol", tol), check_scalar_loss(loss)
    job = check_job(y, graph, L1(1.0), order, node_weights, missing, np.float64, loss=family)
    found = null_fit(job, tol)
    # The intervals of other channels may be wider, below the largest.
    upper, lower = float(found.weight.max()), float(found.lower.max())
    if upper > (1 + tol) * lower:
        raise RuntimeError(
            f"the largest weight lies in [{lower:.9g}, {upper:.9g}], wider than tol={tol:g}; raise tol, the upper end "
            "is a weight at which the fit is the component means"
        )
    return upper


def null_fit(job: Job, tol: float) -> NullFit:
    """The bounds and the certificate; the interval may remain wider than `tol` at the step limit."""
    graph, order, layout, signal = job.graph, job.order, job.layout, job.signal
    pull = _pull(signal, graph, order) if job.square else null_pull(job)
    if not pull.any():
        u = np.zeros((layout.count(order + 1), pull.shape[1]))
    elif graph.free and graph.is_chain:
        with precision(np.dtype(np.float64)):
            u = np.asarray(_potential(graph.free_difference(order + 1, np.float64), pull))
    else:
        z = pull if graph.free or order == 0 else _inverse_times(graph, pull, (order + 1) // 2)
        if graph.free or order % 2 == 0:
            found = [_least_congested(graph, order, column, tol) for column in z.T]
            weight, lower, flow = (np.stack(part, axis=-1) for part in zip(*found, strict=True))
            return NullFit(weight, lower, layout.grid_rows(flow, order + 1))
        u = z - _midrange(z, graph)
    weight = np.abs(u).max(axis=0, initial=0)
    return NullFit(weight, weight, layout.grid_rows(u, order + 1))


def _pull(signal: Signal, graph: Graph, order: int) -> np.ndarray:
    """`W (y - null fit)`, `[n, channels]` in float64, exactly 0 if it is at the rounding level."""
    values, weights = signal.columns, signal.mass[:, None]
    apart = np.where(weights > 0, values - null_fit_values(signal, graph, order), 0)
    size = np.abs(np.where(weights > 0, values, 0)).max(axis=0)
    return np.where(np.abs(apart).max(axis=0) <= ROUNDING * size, 0, weights * apart)


_potential = jax.jit(lambda difference, pull: difference.potential(pull))
_inverse = jax.jit(inverse_laplacian, static_argnums=2)


def _inverse_times(graph: Graph, right: np.ndarray, times: int, order: int = 0) -> np.ndarray:
    """`inverse_laplacian` of columns, with free ends of an order."""
    kind = np.dtype(np.float64)
    with precision(kind):
        layout = layout_of(graph)
        solution, solved = _inverse(ground_of(layout, (order,), kind, True), layout.rows(right, 0), times)
    if solved:
        return np.asarray(solution).reshape(right.shape)
    # Conjugate gradients take too long on long and thin graphs, whose factors have little fill.
    grounded = np.unique(graph.components, return_index=True)[1]
    kept = np.delete(np.arange(graph.num_nodes), grounded)

    def factor() -> Any:
        from scipy.sparse.linalg import splu

        inner = graph.matrix(2)[kept][:, kept].tocsc()
        symmetric = {"SymmetricMode": True}
        return splu(inner, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=symmetric)

    solver = graph.cache(("laplacian factor",), factor)
    for _ in range(times):
        full = np.zeros_like(right)
        full[kept] = solver.solve(right[kept])
        right = _subtract_null(full, graph, order)
    return right


def _subtract_null(values: np.ndarray, graph: Graph, order: int) -> np.ndarray:
    """Columns minus their means over the components, or with free ends minus their polynomials."""
    if graph.free:
        basis = graph.polynomials(order)
        return values - basis @ (basis.T @ values)
    return values - component_means(values, graph, np.ones(graph.num_nodes))


def _midrange(values: np.ndarray, graph: Graph) -> np.ndarray:
    top = np.full((graph.num_components, values.shape[1]), -np.inf)
    bottom = -top
    np.maximum.at(top, graph.components, values)
    np.minimum.at(bottom, graph.components, values)
    return ((top + bottom) / 2)[graph.components]


def _best_cut(graph: Graph, b: np.ndarray, demand: np.ndarray) -> float:
    """The largest `|demand(S)| / cut(S)` over the level sets S of b, at least `<demand, b> / ||D b||_1`."""
    order = np.argsort(-b, kind="stable")
    place = np.empty(b.size, np.int64)
    place[order] = np.arange(b.size)
    root = np.ones(graph.num_edges) if graph.weights is None else np.sqrt(graph.weights)
    ends = np.sort(place[graph.row_edges], axis=1)
    opened = np.bincount(ends[:, 0], root, b.size) - np.bincount(ends[:, 1], root, b.size)
    cuts, inside = np.cumsum(opened)[:-1], np.abs(np.cumsum(demand[order]))[:-1]
    # A set that cuts no edge is a union of components: its demand is 0, and so is its cut, up to rounding.
    proper = cuts > 0.5 * np.min(root)
    return float(np.max(inside[proper] / cuts[proper], initial=0))


def _least_congested(graph: Graph, order: int, demand: np.ndarray, tol: float) -> tuple[float, float, np.ndarray]:
    """An upper and a lower bound of the smallest `max |u|` with `Δᵀ u = demand`, and the u of the upper bound.

    Δ is D, and u follows `graph.row_edges`; on a grid with free ends Δ is the one of the order.
    """
    if graph.free:
        difference, unseen = graph.matrix(order + 1), graph.polynomials(order).shape[1]
    else:
        difference, order = difference_matrix(graph.row_edges, graph.num_nodes, graph.weights, 1), 0
        unseen = graph.num_components

    def potential(demand: np.ndarray) -> np.ndarray:
        """`(ΔᵀΔ)^+ demand`."""
        return _inverse_times(graph, _subtract_null(demand[:, None], graph, order), 1, order)[:, 0]

    def ratio(b: np.ndarray) -> float:
        """A lower bound from b."""
        if not graph.free:
            return _best_cut(graph, b, demand)
        size = np.abs(difference @ b).sum()
        return float(demand @ b / size) if size > 0 else 0.0

    height = potential(demand)
    flow = difference @ height
    upper = float(np.abs(flow).max(initial=0))
    if graph.free and np.abs(difference.T @ flow - demand).max() > LEFT * np.abs(demand).max():
        raise RuntimeError(
            f"rounding hides the largest weight at order {order} on {graph!r}: lower the order, or give a path its "
            "weights"
        )
    if upper == 0 or difference.shape[0] == graph.num_nodes - unseen:
        return upper, upper, flow
    lower = max(map(ratio, (height, demand)))
    method: Any = Admm() if graph.shape is not None else Doge()
    kind: Any = np.float64
    accuracy, fit, steps = 1e-14, None, FIRST_STEPS
    if tol >= COARSE and not graph.free:
        method, kind = Doge(), np.float32
        if graph.shape is None and is_available() and is_narrow(graph):
            method, accuracy = Interior(), 1e-3 * tol
    while upper > (1 + tol) * lower and steps <= MOST_STEPS:
        # At lower = lam_max the flow needs a little more room.
        level, start = L1(lower * (1 + tol / 2)), None if method.on_host else fit
        fit = trend_filter(demand, graph, level, order, method, tol=accuracy, max_steps=steps, start=start, dtype=kind)
        part = np.asarray(fit.dual, np.float64)
        left = demand - difference.T @ part
        height = potential(left)
        whole = part + difference @ height
        if np.abs(whole).max() < upper:
            upper, flow = float(np.abs(whole).max()), whole
        lower = max(lower, *map(ratio, (left, height, np.asarray(fit.value).reshape(-1))))
        steps *= 2
    return upper, lower, flow
