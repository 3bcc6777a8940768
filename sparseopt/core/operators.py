"""Floor 1: linear maps that know `mv` and `rmv` and never form a matrix; the graph differences among them.

    Δ^(1) = D,    Δ^(m+1) = Dᵀ Δ^(m) for odd m,  D Δ^(m) for even m;    L = DᵀD

D has one row an edge, `sqrt(w) * (x[tail] - x[head])` for an edge of weight w. So Δ^(m) is `L^(m/2)` for even m
and `D L^((m-1)/2)` for odd m. A `Difference` composes D, Dᵀ and L of a base: `GridBase` works with slices,
`EdgeBase` with gathers. All arrays may carry trailing channel axes.

Source: Wang, Sharpnack, Smola, Tibshirani, "Trend filtering on graphs", JMLR 2016, section 2.
"""

import itertools
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseopt.core.types import pytree, static

FloatArray = Float[Array, "..."]


@runtime_checkable
class LinearMap(Protocol):
    """A linear map between arrays of two shapes, and its transpose."""

    def mv(self, x: FloatArray) -> FloatArray:
        """The image of x."""

    def rmv(self, e: FloatArray) -> FloatArray:
        """The image of e under the transpose: `<e, A x> = <Aᵀ e, x>`."""


def _ahead(x: FloatArray, axis: int) -> FloatArray:
    """`x[i] - x[i + 1]` along an axis, zero in the last place: as many entries as x."""
    first = jax.lax.slice_in_dim(x, 0, -1, axis=axis)
    second = jax.lax.slice_in_dim(x, 1, None, axis=axis)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, 1)
    return jnp.pad(first - second, widths)


def _ahead_transpose(e: FloatArray, axis: int) -> FloatArray:
    """The transpose of `_ahead`: `e[i] - e[i - 1]`, the last entry of e ignored."""
    kept = jax.lax.slice_in_dim(e, 0, -1, axis=axis)
    after = [(0, 0)] * e.ndim
    before = [(0, 0)] * e.ndim
    after[axis] = (0, 1)
    before[axis] = (1, 0)
    return jnp.pad(kept, after) - jnp.pad(kept, before)


@pytree
class GridBase:
    """D of a grid of 1 to 3 dimensions as stencils; nodes `[*shape]`, edges `[dimensions, *shape]`.

    Edge `(axis, i)` joins node i to its successor along the axis. The last place of each axis has no successor:
    it is a row of zeros, kept so that all edge arrays are rectangular.

    Example:
        >>> from sparseopt.core.operators import GridBase
        >>> GridBase((2, 3)).difference(jnp.arange(6.0).reshape(2, 3))[1]  # along the second axis
        Array([[-1., -1.,  0.],
               [-1., -1.,  0.]], dtype=float32)
    """

    shape: tuple[int, ...] = static()

    @property
    def node_shape(self) -> tuple[int, ...]:
        """The shape of a node array without channels."""
        return self.shape

    @property
    def edge_shape(self) -> tuple[int, ...]:
        """The shape of an edge array without channels."""
        return (len(self.shape), *self.shape)

    def difference(self, x: FloatArray) -> FloatArray:
        """`D x`."""
        return jnp.stack([_ahead(x, axis) for axis in range(len(self.shape))])

    def divergence(self, e: FloatArray) -> FloatArray:
        """`Dᵀ e`."""
        terms = [_ahead_transpose(e[axis], axis) for axis in range(len(self.shape))]
        return sum(terms[1:], terms[0])

    def laplacian(self, x: FloatArray) -> FloatArray:
        """`DᵀD x`, built from differences so that constants vanish exactly."""
        terms = [_ahead_transpose(_ahead(x, axis), axis) for axis in range(len(self.shape))]
        return sum(terms[1:], terms[0])


@pytree
class Buckets:
    """For every row a list of indices, padded: rows of similar length share one table `[rows, width]`.

    Widths run 1, 2, 3, 4, 6, 8, 12, ..., so padding costs at most half as much again, and one hub of degree
    10,000 costs one row of 12,288. `inverse[row]` is the place of a row in the concatenated tables, None if
    one table serves all rows in order.
    """

    tables: tuple[Any, ...]  # of int32 [rows, width]
    factors: tuple[Any, ...] | None  # of [rows, width], zero where padded; None: padding points to the row itself
    inverse: Any


def bucket_widths(lengths: np.ndarray) -> np.ndarray:
    """The smallest width 1, 2, 3, 4, 6, 8, 12, 16, ... that holds each length.

    Example:
        >>> from sparseopt.core.operators import bucket_widths
        >>> bucket_widths(np.array([1, 2, 5, 9]))
        array([ 1,  2,  6, 12])
    """
    largest = max(int(lengths.max(initial=1)), 1)
    powers = 2 ** np.arange(int(np.ceil(np.log2(largest))) + 1)
    allowed = np.unique(np.concatenate([powers, 3 * powers[:-1]]) if powers.size > 1 else powers)
    return allowed[np.searchsorted(allowed, np.maximum(lengths, 1))]


def build_buckets(indptr: np.ndarray, indices: np.ndarray, factors: np.ndarray | None, pad_with_row: bool) -> Buckets:
    """Tables from the rows of a CSR structure, on the host, without a loop over rows."""
    lengths = np.diff(indptr)
    widths = bucket_widths(lengths)
    if widths.size and widths.max() * widths.size <= 1.25 * widths.sum():
        widths = np.full_like(widths, widths.max())
    order = np.argsort(widths, kind="stable")
    tables, factor_tables = [], []
    for width in np.unique(widths):
        rows = order[np.searchsorted(widths[order], width) : np.searchsorted(widths[order], width, "right")]
        place = indptr[rows][:, None] + np.arange(width)
        valid = np.arange(width) < lengths[rows][:, None]
        place = np.where(valid, place, 0)
        pad = rows[:, None] if pad_with_row else 0
        values = indices[place] if indices.size else np.zeros_like(place)
        tables.append(np.where(valid, values, pad).astype(np.int32))
        if factors is not None:
            found = factors[place] if factors.size else np.zeros(place.shape, factors.dtype)
            factor_tables.append(np.where(valid, found, 0).astype(factors.dtype))
    inverse = None
    if len(tables) > 1:
        inverse = np.empty(order.size, np.int32)
        inverse[order] = np.arange(order.size)
    return Buckets(tuple(tables), None if factors is None else tuple(factor_tables), inverse)


def spread(factor: Any, like: FloatArray) -> FloatArray:
    """A factor with trailing axes of length one for the channels of `like`."""
    return jnp.reshape(factor, factor.shape + (1,) * (like.ndim - factor.ndim)).astype(like.dtype)


def _restore(parts: list[FloatArray], buckets: Buckets) -> FloatArray:
    """The rows of all tables in their own order."""
    if buckets.inverse is None:
        return parts[0]
    return jnp.concatenate(parts)[buckets.inverse]


@pytree
class EdgeBase:
    """D of any graph by gathers; nodes `[n]`, edges `[m]`. Index tables are leaves: arguments, not constants."""

    tails: Any  # int32 [m]
    heads: Any  # int32 [m]
    root_weights: Any  # [m], sqrt(w), or None for weights of 1
    incident: Buckets  # node -> its edges, with signs (times sqrt(w))
    neighbours: Buckets  # node -> its neighbours, with weights, or None
    num_nodes: int = static()

    @property
    def node_shape(self) -> tuple[int, ...]:
        """The shape of a node array without channels."""
        return (self.num_nodes,)

    @property
    def edge_shape(self) -> tuple[int, ...]:
        """The shape of an edge array without channels."""
        return (self.tails.shape[0],)

    def difference(self, x: FloatArray) -> FloatArray:
        """`D x`."""
        rows = x[self.tails] - x[self.heads]
        return rows if self.root_weights is None else rows * spread(self.root_weights, rows)

    def divergence(self, e: FloatArray) -> FloatArray:
        """`Dᵀ e`: every node gathers its edges, since a scatter-add runs one entry at a time on a CPU."""
        assert self.incident.factors is not None
        parts = []
        for table, factors in zip(self.incident.tables, self.incident.factors, strict=True):
            found = e[table]
            parts.append(jnp.sum(found * spread(factors, found), axis=1))
        return _restore(parts, self.incident)

    def laplacian(self, x: FloatArray) -> FloatArray:
        """`DᵀD x` as sums of `w (x_i - x_j)` over neighbours, so that constants vanish exactly."""
        mine = x
        if self.neighbours.inverse is not None:
            # The own value comes along as the first column, so no second permutation is needed.
            parts = []
            for index, table in enumerate(self.neighbours.tables):
                found = x[table]
                apart = found[:, :1] - found[:, 1:]
                if self.neighbours.factors is not None:
                    apart = apart * spread(self.neighbours.factors[index][:, 1:], apart)
                parts.append(jnp.sum(apart, axis=1))
            return _restore(parts, self.neighbours)
        table = self.neighbours.tables[0]
        apart = mine[:, None] - x[table[:, 1:]]
        if self.neighbours.factors is not None:
            apart = apart * spread(self.neighbours.factors[0][:, 1:], apart)
        return jnp.sum(apart, axis=1)


def edge_base(edges: np.ndarray, num_nodes: int, weights: np.ndarray | None, dtype: Any) -> EdgeBase:
    """The tables of `EdgeBase` for checked edges `[m, 2]` and weights `[m]` or None, as host arrays."""
    count = edges.shape[0]
    owner = edges.T.reshape(-1)
    order = np.argsort(owner, kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=num_nodes))])
    signs = np.where(order < count, 1.0, -1.0).astype(dtype)
    edge_of = order % max(count, 1)
    root = None if weights is None else np.sqrt(weights).astype(dtype)
    if root is not None:
        signs = signs * root[edge_of]
    other = edges[:, ::-1].T.reshape(-1)[order]
    # The node itself stands first in its own list.
    starts = indptr[:-1]
    with_self = np.insert(other, starts, np.arange(num_nodes))
    factors = None if weights is None else np.insert(weights.astype(dtype)[edge_of], starts, 0)
    wider = indptr + np.arange(num_nodes + 1)
    return EdgeBase(
        tails=edges[:, 0].astype(np.int32),
        heads=edges[:, 1].astype(np.int32),
        root_weights=root,
        incident=build_buckets(indptr, edge_of, signs, pad_with_row=False),
        neighbours=build_buckets(wider, with_self, factors, pad_with_row=True),
        num_nodes=num_nodes,
    )


@pytree
class Difference:
    """`Δ^(order)` on node arrays, or `Δ^(order-1) Dᵀ` on edge arrays: what maps `Δ^(j)` onto `Δ^(j+order)`.

    Attributes:
        base: D, Dᵀ and L of a graph.
        order: how many factors D or Dᵀ; 0 is the identity.
        from_edges: the input is an edge array (j odd) instead of a node array (j even).

    Example:
        >>> from sparseopt.core.operators import Difference, GridBase
        >>> second = Difference(GridBase((4,)), order=2)  # the Laplacian of a chain
        >>> second.mv(jnp.array([0.0, 1.0, 4.0, 9.0]))
        Array([-1., -2., -2.,  5.], dtype=float32)
        >>> second.in_shape, second.out_shape
        ((4,), (4,))
    """

    base: Any
    order: int = static()
    from_edges: bool = static(default=False)

    def _middle(self) -> tuple[int, bool]:
        """The number of Laplacians between the ends, and whether a D closes the product."""
        remaining = self.order - self.from_edges
        return remaining // 2, remaining % 2 == 1

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The shape that `mv` takes, without channels."""
        return self.base.edge_shape if self.from_edges else self.base.node_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape that `mv` gives, without channels."""
        if self.order == 0:
            return self.in_shape
        return self.base.edge_shape if self._middle()[1] else self.base.node_shape

    def mv(self, x: FloatArray) -> FloatArray:
        """`Δ x`, applied right to left."""
        if self.order == 0:
            return x
        laplacians, ends_on_edges = self._middle()
        if self.from_edges:
            x = self.base.divergence(x)
        for _ in range(laplacians):
            x = self.base.laplacian(x)
        return self.base.difference(x) if ends_on_edges else x

    def rmv(self, e: FloatArray) -> FloatArray:
        """`Δᵀ e`."""
        if self.order == 0:
            return e
        laplacians, ends_on_edges = self._middle()
        if ends_on_edges:
            e = self.base.divergence(e)
        for _ in range(laplacians):
            e = self.base.laplacian(e)
        return self.base.difference(e) if self.from_edges else e


@pytree
class Stack:
    """Several differences of one signal, their rows one below the other: `[rows]`, the layout of each flattened.

    Example:
        >>> from sparseopt.core.operators import Difference, GridBase, Stack
        >>> chain = GridBase((3,))
        >>> both = Stack((Difference(chain, 0), Difference(chain, 2)))
        >>> both.mv(jnp.array([0.0, 1.0, 4.0]))  # the signal, then its Laplacian
        Array([ 0.,  1.,  4., -1., -2.,  3.], dtype=float32)
    """

    maps: tuple[Any, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The rows of each."""
        return tuple(math.prod(part.out_shape) for part in self.maps)

    @property
    def order(self) -> int:
        """The highest, but never 0, which would say that rows are laid out as nodes are."""
        return max(1, *(part.order for part in self.maps))

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The shape that `mv` takes, without channels."""
        return self.maps[0].in_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape that `mv` gives, without channels."""
        return (sum(self.sizes),)

    def mv(self, x: FloatArray) -> FloatArray:
        """All rows."""
        channels = x.shape[len(self.in_shape) :]
        return jnp.concatenate([part.mv(x).reshape(-1, *channels) for part in self.maps])

    def rmv(self, e: FloatArray) -> FloatArray:
        """The transpose: the sum of the transposes."""
        places = list(itertools.accumulate(self.sizes))[:-1]
        parts = zip(self.maps, jnp.split(e, places), strict=True)
        images = [part.rmv(rows.reshape(*part.out_shape, *e.shape[1:])) for part, rows in parts]
        return sum(images[1:], images[0])


@pytree
class Identity:
    """The identity on `[size]`."""

    size: int = static()
    order = 0

    @property
    def out_shape(self) -> tuple[int, ...]:
        """`(size,)`."""
        return (self.size,)

    def mv(self, x: FloatArray) -> FloatArray:
        """X."""
        return x

    def rmv(self, e: FloatArray) -> FloatArray:
        """E."""
        return e


@pytree
class Split:
    """The map `outer inner` of a split penalty, with the diagonal metrics that make its dual step safe.

    Attributes:
        outer: Ψ, acting on `z = inner x`.
        inner: Δ.
        row_scale: `S_r`, one a row of Ψ (a scalar for all).
        column_scale: `C_j`, one a column of Ψ (a scalar for all), with `Ψᵀ S^-1 Ψ <= C`.
    """

    outer: Any
    inner: Any
    row_scale: Any
    column_scale: Any

    def mv(self, x: FloatArray) -> FloatArray:
        """`Ψ Δ x`."""
        return self.outer.mv(self.inner.mv(x))

    def rmv(self, e: FloatArray) -> FloatArray:
        """`Δᵀ Ψᵀ e`."""
        return self.inner.rmv(self.outer.rmv(e))

    def row_shape(self, x: FloatArray) -> tuple[int, ...]:
        """The shape of `mv(x)`, channels included."""
        return (*self.outer.out_shape, *x.shape[len(self.inner.in_shape) :])
