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
from sparseopt.core.penalties.entries import L1
from sparseopt.core.solvers.interior import is_available
from sparseopt.trend.base.fit import Fit
from sparseopt.trend.base.geometry import Geometry
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.filter import check_fit, trend_filter
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
    dual: np.ndarray  # the certificate of `weight` in the layout of arrays, `[*rows, channels]`


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
    asked = check_fit(y, graph, L1(1.0), order, node_weights, missing, np.float64, loss=family)
    found = null_fit(asked, tol)
    # The intervals of other channels may be wider, below the largest.
    upper, lower = float(found.weight.max()), float(found.lower.max())
    if upper > (1 + tol) * lower:
        raise RuntimeError(
            f"the largest weight lies in [{lower:.9g}, {upper:.9g}], wider than tol={tol:g}; raise tol, the upper end "
            "is a weight at which the fit is the component means"
        )
    return upper


def null_fit(asked: Fit, tol: float) -> NullFit:
    """The bounds and the certificate; the interval may remain wider than `tol` at the step limit."""
    geometry, order = asked.geometry, asked.order
    pull = _pull(asked) if asked.square else null_pull(asked)
    if not pull.any():
        u: Any = np.zeros((geometry.count(order + 1), pull.shape[1]))
    else:
        times = geometry.inverses(order)
        demand = _inverse(geometry, pull, times, 0) if times else pull
        u = geometry.only_dual(demand, order)
    if u is None:
        parts = [_least_congested(geometry, order, column, tol) for column in demand.T]
        weight, lower, flow = (np.stack(part, axis=-1) for part in zip(*parts, strict=True))
        return NullFit(weight, lower, geometry.rows(flow, order + 1))
    weight = np.abs(u).max(axis=0, initial=0)
    return NullFit(weight, weight, geometry.rows(u, order + 1))


def _pull(asked: Fit) -> np.ndarray:
    """`W (y - null fit)`, `[n, channels]` in float64, exactly 0 if it is at the rounding level."""
    values, weights = asked.columns, asked.mass[:, None]
    apart = np.where(weights > 0, values - asked.geometry.null_fit(values, asked.mass, asked.order), 0)
    size = np.abs(np.where(weights > 0, values, 0)).max(axis=0)
    return np.where(np.abs(apart).max(axis=0) <= ROUNDING * size, 0, weights * apart)


_solve = jax.jit(lambda ground, right, times: ground.inverse(right, times), static_argnums=2)


def _inverse(geometry: Geometry, right: np.ndarray, times: int, order: int) -> np.ndarray:
    """`Ground.inverse` of columns `[n, channels]`."""
    kind = np.dtype(np.float64)
    with precision(kind):
        solution, solved = _solve(geometry.ground((order,), kind, True), geometry.rows(right, 0), times)
    if solved:
        return np.asarray(solution).reshape(right.shape)
    # Conjugate gradients take too long on long and thin graphs, whose factors have little fill.
    kept = np.delete(np.arange(geometry.num_nodes), np.unique(geometry.components, return_index=True)[1])

    def factor() -> Any:
        from scipy.sparse.linalg import splu

        inner = geometry.matrix(2)[kept][:, kept].tocsc()
        symmetric = {"SymmetricMode": True}
        return splu(inner, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=symmetric)

    solver = geometry.cache(("laplacian factor",), factor)
    for _ in range(times):
        full = np.zeros_like(right)
        full[kept] = solver.solve(right[kept])
        right = geometry.subtract_null(full, order)
    return right


def _least_congested(geometry: Geometry, order: int, demand: np.ndarray, tol: float) -> tuple[float, float, np.ndarray]:
    """An upper and a lower bound of the smallest `max |u|` with `Δᵀ u = demand`, and the u of the upper bound.

    Δ is D; on a grid with free ends it is the Δ of the order.
    """
    order, unseen = geometry.flow_order(order)
    difference = geometry.matrix(order + 1)

    def potential(demand: np.ndarray) -> np.ndarray:
        """`(ΔᵀΔ)^+ demand`."""
        return _inverse(geometry, geometry.subtract_null(demand[:, None], order), 1, order)[:, 0]

    def ratio(b: np.ndarray) -> float:
        """A lower bound from b."""
        return geometry.cut_ratio(b, demand, order)

    height = potential(demand)
    flow = difference @ height
    upper = float(np.abs(flow).max(initial=0))
    if geometry.wide and np.abs(difference.T @ flow - demand).max() > LEFT * np.abs(demand).max():
        raise RuntimeError(
            f"rounding hides the largest weight at order {order} on {geometry!r}: lower the order, or give a path its "
            "weights"
        )
    if upper == 0 or difference.shape[0] == geometry.num_nodes - unseen:
        return upper, upper, flow
    lower = max(map(ratio, (height, demand)))
    method: Any = Admm() if geometry.exact_step(weighted=False) else Doge()
    kind: Any = np.float64
    accuracy, fit, steps = 1e-14, None, FIRST_STEPS
    if tol >= COARSE and not geometry.wide:
        method, kind = Doge(), np.float32
        if geometry.kind == "edges" and is_available() and is_narrow(geometry):
            method, accuracy = Interior(), 1e-3 * tol
    graph = Graph(geometry)
    while upper > (1 + tol) * lower and steps <= MOST_STEPS:
        # At lower = lam_max the flow needs a little more room.
        level, start = L1(lower * (1 + tol / 2)), None if method.cold else fit
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
