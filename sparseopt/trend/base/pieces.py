"""The pieces of a fit: which differences are zero, the parts of the graph that they join, knots, degrees of freedom.

A difference is zero at the fit if the penalty's prox makes it zero, for L1 if `|u| < weight`; see `nonzero_at`.
At order 0 the components of the edges with a zero difference are the pieces. The degrees of freedom are the dimension
of the signals with the same zero differences:

    df = dim { b : (Δ^(k+1) b)_r = 0 for every row r that is zero at the fit }

For L1 its mean over the noise is the degrees of freedom `sum_j cov(fit_j, y_j) / sigma²` on every graph. The closed
forms for all orders, and on chains with free ends, are derived in The mathematics, "Paths of weights". On grids with
free ends there is none: the rank of a matrix gives it on small ones.

Source: Tibshirani and Taylor, "Degrees of freedom in lasso problems", Annals of Statistics 40 (2012), for any
difference matrix; Wang, Sharpnack, Smola, Tibshirani, "Trend filtering on graphs", JMLR 17 (2016), for graphs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.arguments import real_array
from sparseopt.core.base.types import pytree, static
from sparseopt.core.penalties.protocols import is_norm
from sparseopt.core.problem.problem import Solution
from sparseopt.system.report import Fact
from sparseopt.trend.base.geometry import Geometry
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.ground import Ground, couples_axes, mean_weight
from sparseopt.trend.base.signal import geometry_at


@pytree
class TrendSolution(Solution):
    """A `Solution` of the trend filter, with its pieces and knots.

    Attributes:
        nonzero: which rows of `graph.matrix(order + 1)` are not zero at the fit, `[rows]` or `[rows, channels]`.
        graph: the graph of the fit.
        order: the (highest) order of the fit.
        beta: the coefficients of the covariates, `[covariates]`; None without covariates.
        season: the periodic part at every node, whose sum over a period is 0; None without a season.
        fitted: the trend with the covariates' part and the season, on the scale of the loss; None without both.
    """

    nonzero: Any = None
    graph: Graph | None = static(default=None)
    order: int = static(default=0)
    beta: Any = None
    season: Any = None
    fitted: Any = None

    @classmethod
    def of(cls, solution: Solution, nonzero: Any) -> "TrendSolution":
        fields = {field.name: getattr(solution, field.name) for field in dataclasses.fields(Solution)}
        return cls(**fields, nonzero=nonzero)

    def _facts(self) -> list[Fact]:
        """Adds the pieces at order 0, at other orders the non-zero differences; for a single fit."""
        if self.nonzero is None or self.graph is None or np.ndim(self.status):
            return super()._facts()
        nonzero = f"{np.count_nonzero(self.nonzero):,} of {np.size(self.nonzero):,}"
        own = Fact("differences not zero", nonzero) if self.order else Fact("pieces", f"{self.pieces().max() + 1:,}")
        return [*super()._facts(), own]

    def pieces(self) -> np.ndarray:
        """The piece of every node of a fit of order 0, integers `[n]`.

        Two neighbours belong to one piece if the fit has the same value at both; with channels, the same values in all
        channels. The pieces are numbered 0, 1, ... in the order of their first nodes. Two pieces that are not
        neighbours may have the same value.

        The labels are as accurate as the fit: at a relative gap of 1e-4 it may join or divide some pieces of the
        optimum with nearly equal values. In a test image of 96 × 96 pixels the number of pieces at a gap of 1e-4 was
        within 1.2 % of the number at 1e-9, and at 1e-6 equal to it. For exact labels, lower `tol`.

        The values of a piece are exactly equal in a solution of `trend_filter`, and equal up to the tolerance with a
        `TrendSolver`.

        Returns:
            NumPy integers `[n]` in the order of the graph's nodes; `.reshape(shape)` for a grid.

        Raises:
            ValueError: for an order above 0, and for a batch of fits under `vmap`.

        Example:
            >>> y = np.array([0.1, -0.1, 0.0, 5.1, 4.9, 5.0])
            >>> fit = so.trend_filter(y, so.Graph.chain(6), so.L1(0.3))
            >>> fit.pieces().tolist(), fit.knots().tolist()
            ([0, 0, 0, 1, 1, 1], [3])
        """
        geometry = self._geometry()
        if self.order:
            raise ValueError(
                f"a fit of order {self.order} has no pieces of one value, only one of order 0 has: on a chain "
                "`knots()` gives the nodes where its polynomials change"
            )
        between = geometry.between(np.asarray(self.value).reshape(geometry.num_nodes, -1)).any(axis=-1)
        return geometry.labels(~(self._changed(geometry) & between)).astype(np.int64)

    def knots(self) -> np.ndarray:
        """The nodes of a chain at which a new polynomial begins, in ascending order.

        At order 0 a knot is the first node of a piece, without node 0: a breakpoint in the sense of ruptures, whose
        list ends with n. At order 1 it is a node at which the slope changes. At order k the k-th difference changes:
        for an odd k at the knot, for an even k between the knot and the node before it. Whether it changes is known
        only up to the tolerance of the fit, as for `pieces`. With channels a knot of any channel counts.

        Order k needs k + 2 nodes for a change, so the nodes next to the ends are never knots.

        Raises:
            ValueError: for a graph that is not a chain, and for a batch of fits under `vmap`.

        Example:
            >>> bend = np.abs(np.arange(21.0) - 10)
            >>> so.trend_filter(bend, so.Graph.chain(21), so.L1(0.1), order=1).knots().tolist()
            [10]
        """
        geometry = self._geometry()
        if self.order == 0 and geometry.line:
            return np.flatnonzero(np.diff(self.pieces())) + 1
        return geometry.knots(self._changed(geometry), self.order)

    def _geometry(self) -> Geometry:
        assert self.graph is not None
        if np.ndim(self.status):
            raise ValueError(
                f"pieces and knots belong to one fit, given a batch of {np.shape(self.status)}: select one with "
                "jax.tree.map(lambda leaf: leaf[i], solution)"
            )
        return self.graph.geometry.at(self.order)

    def _changed(self, geometry: Geometry) -> np.ndarray:
        """`nonzero` in any channel, in the layout of the rows."""
        found = np.asarray(self.nonzero)
        return geometry.rows(found.any(axis=tuple(range(1, found.ndim))), self.order + 1)


def nonzero_at(ground: Ground, penalty: Any, x: jax.Array, dual: Any, prox: Any, noise: Any, means: Any) -> jax.Array:
    """Which rows `Δ^(k+1) x` of the highest order are not zero at a fit.

    `dual` is the dual of the rows of `ground.operator`; `prox` the solver's last prox on them, which a penalty that is
    not a norm needs; `means` the component means, or the polynomial that no penalty sees, whose rows are zero up to
    rounding.

    At the optimum `rows = prox(rows + t u, t)` with the dual u for every t. An iterate keeps small differences of both
    signs where its dual says zero, so t is large, the size of a row of noise over the weight: the prox is zero unless
    `|u| = weight` almost exactly. At a gap of 1e-4 the count was within half a per cent of the count at 1e-9; a count
    by size was off by up to a half.
    """
    rows, operator = ground.highest.mv(x), ground.operator
    flat: Any = False
    if ground.proves_null or not is_norm(penalty):
        flat = jnp.all(x == means)
        rows = jnp.where(flat, 0, rows)
    if operator.order is None:
        if operator.maps[-1].order != ground.highest.order:
            return rows != 0  # the values alone are penalised
        penalty, size = penalty.penalties[-1], penalty.sizes[-1]
        dual, prox = (None if part is None else part[-size:].reshape(rows.shape) for part in (dual, prox))
    if prox is not None and not is_norm(penalty):
        return jnp.where(flat, False, prox != 0)
    scale = ground.row_norms * (noise / mean_weight(penalty, ground.padding[1]))
    if couples_axes(penalty):
        scale = jnp.max(scale, axis=0, keepdims=True)
    return (penalty.prox(rows + scale * dual, scale) != 0) & (rows != 0)


def average_pieces(values: np.ndarray, labels: np.ndarray, mass: np.ndarray, zero: bool) -> np.ndarray:
    """The mean of its piece at every node, `[n]`, weighted by `mass` where a node of the piece has any.

    With `zero` a piece with a node of value 0 is 0. A piece of one value keeps it exactly.
    """
    count = int(labels.max()) + 1
    some = np.zeros(count, np.int64)
    some[labels] = np.arange(labels.size)
    level = values[some]
    over = np.bincount(labels, mass)
    mass = np.where(over[labels] > 0, mass, 1)
    level = level + np.bincount(labels, mass * (values - level[labels])) / np.bincount(labels, mass)
    if zero:
        level[labels[values == 0]] = 0
    return level[labels]


def degrees_of_freedom(nonzero: Any, graph: Graph, order: int = 0, observed: Any = None) -> int:
    """The degrees of freedom of a fit whose non-zero differences are known.

    Args:
        nonzero: booleans `[rows]` or `[rows, channels]`: which rows of `graph.matrix(order + 1)` are not zero at the
            fit, such as the `nonzero` of a fit. Differences of a solution with a finite tolerance are rarely exactly
            zero; `trend_path` counts for you.
        graph: the graph.
        order: k.
        observed: booleans `[n]`, or None for all. At order 0 a piece without an observation does not count. At higher
            orders the count is at most the number of observations; below that it is assumed that the observations
            determine the fit.

    Raises:
        ValueError: for invalid arguments, and for a grid with free ends of more than 1,024 nodes.

    Returns:
        A whole number, the sum over the channels. For L1 it is an unbiased estimate, given the exact zeros; for other
        penalties (MCP, SCAD, L0, GroupL2) it is the dimension of the fitted model, not counting the search for the
        zeros.

    Example:
        >>> so.trend.degrees_of_freedom(np.array([False, True, False]), so.Graph.chain(4))  # one jump, two pieces
        2
    """
    geometry, order = geometry_at(graph, order)
    if reason := geometry.refuses_count():
        raise ValueError(f"{reason}: sparseopt.trend.trend_path estimates them")
    mask, rows = _booleans("nonzero", nonzero), geometry.count(order + 1)
    if mask.ndim not in (1, 2) or mask.shape[0] != rows:
        raise ValueError(
            f"the difference of order {order + 1} has {rows} rows, so `nonzero` has the shape [{rows}] or "
            f"[{rows}, channels], given {mask.shape}"
        )
    seen = None if observed is None else _booleans("observed", observed)
    if seen is not None and seen.shape != (geometry.num_nodes,):
        raise ValueError(f"`observed` has one entry for each of {geometry.num_nodes} nodes, given {seen.shape}")
    channels = mask.shape[1] if mask.ndim == 2 else 1
    return int(freedom_of_levels(geometry.rows(mask, order + 1)[None], geometry, order, seen, channels)[0])


def _booleans(name: str, given: Any) -> np.ndarray:
    array = real_array(name, given)
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise ValueError(f"`{name}` must be true or false, given {int(np.isnan(array).sum())} NaN")
    return array.astype(bool)


def freedom_of_levels(
    nonzero: np.ndarray, geometry: Geometry, order: int, observed: np.ndarray | None, channels: int
) -> np.ndarray:
    """`degrees_of_freedom` of the `nonzero` of fits, `[levels, ...]`; a single column counts for every channel."""
    shape = (len(nonzero), *geometry.difference(order + 1, np.float64).out_shape)
    columns = np.broadcast_to(nonzero if nonzero.ndim > len(shape) else nonzero[..., None], (*shape, channels))
    limit = geometry.num_nodes if observed is None else int(observed.sum())

    def freedom(level: np.ndarray) -> int:
        return sum(min(geometry.freedom(level[..., i], order, observed), limit) for i in range(channels))

    return np.array([freedom(level) for level in columns])
