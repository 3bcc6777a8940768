"""The pieces of a fit: which differences are zero, the parts of the graph that they join, and knots.

A difference is zero at the fit where the penalty's prox makes it zero, for L1 where `|u| < weight`; see `nonzero_rows`
in `freedom.py`. At order 0 the components of the edges with a zero difference are the pieces.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from sparseopt.core.base.types import pytree, static
from sparseopt.core.operators.maps import Stack
from sparseopt.core.penalties.protocols import Norm
from sparseopt.core.problem.problem import Solution
from sparseopt.trend.freedom import nonzero_rows
from sparseopt.trend.graph import Graph
from sparseopt.trend.ground import Ground, couples_axes, mean_weight


@pytree
class TrendSolution(Solution):
    """A `Solution` of the trend filter, with its pieces and knots.

    Attributes:
        nonzero: which rows of `Δ^(order+1) b` are not zero at the fit, in the layout of the rows; with channels their
            last axis.
        graph: the graph of the fit.
        order: the (highest) order of the fit.
    """

    nonzero: Any = None
    graph: Graph | None = static(default=None)
    order: int = static(default=0)

    @classmethod
    def of(cls, solution: Solution, nonzero: Any) -> "TrendSolution":
        fields = {field.name: getattr(solution, field.name) for field in dataclasses.fields(Solution)}
        return cls(**fields, nonzero=nonzero)

    def pieces(self) -> np.ndarray:
        """The piece of every node of a fit of order 0, integers `[n]`.

        Two neighbours belong to one piece if the fit has the same value at both; with channels, the same values in all
        channels. The pieces are numbered 0, 1, ... in the order of their first nodes. Two pieces that are no neighbours
        may have the same value.

        The labels are those of the fit as it was solved: a fit with a relative gap of 1e-4 may join or divide some
        pieces of the optimum, of nearly the same value. In a test picture of 96 x 96 pixels the number of pieces at a
        gap of 1e-4 was within 1.2 % of that at 1e-9, and at 1e-6 the same. For exact labels lower `tol`.

        The values of a piece are exactly equal in a solution of `trend_filter`, and up to the tolerance in one of a
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
        graph = self._graph()
        if self.order:
            raise ValueError(
                f"a fit of order {self.order} has no pieces of one value, only one of order 0 has: on a chain "
                "`knots()` gives the nodes where its polynomials change"
            )
        values = np.asarray(self.value).reshape(graph.num_nodes, -1)
        return labels_of(graph, ~self._changed() | ~edges_between(graph, values).any(axis=-1)).astype(np.int64)

    def knots(self) -> np.ndarray:
        """The nodes of a chain at which another polynomial begins, in ascending order.

        At order 0 a knot is the first node of a piece, without node 0: a breakpoint in the sense of ruptures, whose
        list ends with n. At order 1 it is a node at which the slope changes. At order k the k-th difference changes:
        for an odd k at the knot, for an even k between the knot and the node before it. Whether it changes is known
        only up to the tolerance of the fit, as for `pieces`. With channels a knot of any channel counts.

        Order k needs k + 2 nodes for a change, so the nodes next to the ends are never knots.

        Raises:
            ValueError: for a graph that is no chain, and for a batch of fits under `vmap`.

        Example:
            >>> bend = np.abs(np.arange(21.0) - 10)
            >>> so.trend_filter(bend, so.Graph.chain(21), so.L1(0.1), order=1).knots().tolist()
            [10]
        """
        graph = self._graph()
        if not graph.is_chain:
            raise ValueError(
                f"knots are ordered along a chain, and {graph!r} is not a chain: at order 0 `pieces()` gives its pieces"
            )
        if self.order == 0:
            return np.flatnonzero(np.diff(self.pieces())) + 1
        changed, first, shift = self._changed().reshape(-1), (self.order + 1) // 2, (self.order + 1) % 2
        if not graph.free:
            # Row j belongs to node j, for even orders to the edge from j to j + 1. Rows that reach beyond an end say
            # nothing of a knot.
            changed = changed[first : max(first, graph.num_nodes - first - shift)]
        return np.flatnonzero(changed) + first + shift

    def _graph(self) -> Graph:
        assert self.graph is not None
        if np.ndim(self.status):
            raise ValueError(
                f"pieces and knots are those of one fit, given a batch of {np.shape(self.status)}: take one by "
                "jax.tree.map(lambda leaf: leaf[i], solution)"
            )
        return self.graph

    def _changed(self) -> np.ndarray:
        """`nonzero` in any channel, without an axis of channels."""
        found, graph = np.asarray(self.nonzero), self.graph
        assert graph is not None
        on_edges = self.order % 2 == 0
        axes = 1 if graph.shape is None else len(graph.shape) + on_edges
        return np.any(found.reshape(*found.shape[:axes], -1), axis=-1)


def nonzero_at(
    ground: Ground, penalty: Any, x: jax.Array, dual: Any, prox: Any, noise: Any, means: Any = None
) -> jax.Array:
    """Which rows `Δ^(k+1) x` of the highest order are not zero at a fit.

    `dual` is that of the rows of `ground.operator`; `prox` the solver's last prox on them, which a penalty that is no
    norm needs; `means` those of the components, or the polynomial that no penalty sees, whose rows are zero up to
    rounding.
    """
    rows, operator = ground.highest.mv(x), ground.operator
    flat: Any = False
    if means is not None and (ground.basis is not None or not isinstance(penalty, Norm)):
        flat = jnp.all(x == means)
        rows = jnp.where(flat, 0, rows)
    if isinstance(operator, Stack):
        if operator.maps[-1].order != ground.highest.order:
            return rows != 0  # the values alone are penalised
        penalty, size = penalty.penalties[-1], penalty.sizes[-1]
        dual, prox = (None if part is None else part[-size:].reshape(rows.shape) for part in (dual, prox))
    if not isinstance(penalty, Norm):
        return jnp.where(flat, False, prox != 0)
    scale = ground.row_norms * (noise / mean_weight(penalty, ground.padding[1]))
    if couples_axes(penalty):
        scale = jnp.max(scale, axis=0, keepdims=True)
    return nonzero_rows(penalty, rows, dual, scale)


def edges_between(graph: Graph, values: np.ndarray) -> np.ndarray:
    """Whether the ends of an edge have different values, in the layout of D's rows; values are `[n, channels]`."""
    if graph.shape is None:
        tails, heads = graph.edges.T
        return values[tails] != values[heads]
    on_grid = values.reshape(*graph.shape, -1)
    found = np.zeros((len(graph.shape), *on_grid.shape), bool)
    for axis, size in enumerate(graph.shape):
        before = (slice(None),) * axis
        low, high = on_grid[*before, : size - 1], on_grid[*before, 1:]
        np.not_equal(low, high, out=found[axis][*before, : size - 1])
    return found


def labels_of(graph: Graph, joined: np.ndarray) -> np.ndarray:
    """The component of every node in the graph of the joined edges, `[n]`, numbered by their first nodes.

    `joined` is in the layout of D's rows: `[m]`, on a grid `[dimensions, *shape]` with any entry where no edge is.
    """
    shape, n = graph.shape, graph.num_nodes
    if shape is None:
        from scipy.sparse import csgraph

        tails, heads = graph.edges[joined].T
        edges = sparse.coo_array((np.ones(tails.size, bool), (tails, heads)), shape=(n, n))
        return csgraph.connected_components(edges, directed=False)[1]
    if len(shape) == 1:
        return np.cumsum(np.append(False, ~joined[0][:-1]))
    from scipy import ndimage

    # A picture with a pixel for each node and each edge: its regions are found in a fraction of the time.
    pixels = np.zeros([2 * size - 1 for size in shape], bool)
    nodes = (slice(None, None, 2),) * len(shape)
    pixels[nodes] = True
    for axis, size in enumerate(shape):
        between = tuple(slice(i == axis, None, 2) for i in range(len(shape)))
        pixels[between] = joined[axis][*(slice(None),) * axis, : size - 1]
    return ndimage.label(pixels)[0][nodes].reshape(-1) - 1


def levelled(values: np.ndarray, labels: np.ndarray, mass: np.ndarray, zero: bool) -> np.ndarray:
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
