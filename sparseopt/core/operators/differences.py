"""The graph differences, linear maps that never form a matrix.

    Δ^(1) = D,    Δ^(m+1) = Dᵀ Δ^(m) for odd m,  D Δ^(m) for even m;    L = DᵀD

D has one row per edge, `sqrt(w) * (x[tail] - x[head])` for an edge of weight w. So Δ^(m) is `L^(m/2)` for even m
and `D L^((m-1)/2)` for odd m. A `Difference` composes D, Dᵀ and L, the methods `difference`, `divergence` and
`laplacian` of a base: `GridBase` works with slices, `EdgeBase` with gathers and sums. All arrays may carry trailing
channel axes; the shapes that maps and bases name, such as `in_shape`, leave them out.

Source: Wang, Sharpnack, Smola, Tibshirani, "Trend filtering on graphs", JMLR 2016, section 2.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparseopt.core.base.types import FloatArray, pytree, static


def pad(x: FloatArray, axis: int, before: int, after: int) -> FloatArray:
    """The array with zeros before and after it along one axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, after)
    return jnp.pad(x, widths)


def ahead(x: FloatArray, axis: int) -> FloatArray:
    """`x[i] - x[i + 1]` along an axis, zero in the last place: as many entries as x."""
    first = jax.lax.slice_in_dim(x, 0, -1, axis=axis)
    second = jax.lax.slice_in_dim(x, 1, None, axis=axis)
    return pad(first - second, axis, 0, 1)


def ahead_transpose(e: FloatArray, axis: int) -> FloatArray:
    """The transpose of `ahead`: `e[i] - e[i - 1]`, the last entry of e ignored."""
    kept = jax.lax.slice_in_dim(e, 0, -1, axis=axis)
    return pad(kept, axis, 0, 1) - pad(kept, axis, 1, 0)


def by_spacing(terms: list[FloatArray], spacing: tuple[float, ...] | None, power: int) -> list[FloatArray]:
    """A term for each axis of a grid, over a power of the axis's spacing."""
    return terms if spacing is None else [term * h**-power for term, h in zip(terms, spacing, strict=True)]


def add_up(terms: list[FloatArray]) -> FloatArray:
    """The sum of terms in their order: another order rounds differently."""
    return sum(terms[1:], terms[0])


@pytree
class GridBase:
    """D of a grid of 1 to 3 dimensions as stencils; nodes `[*shape]`, edges `[dimensions, *shape]`.

    Edge `(axis, i)` joins node i to its successor along the axis. The last place of each axis has no successor:
    it is a row of zeros, kept so that all edge arrays are rectangular. Along an axis of spacing h the rows are
    `(x_i - x_(i+1)) / h`.

    Example:
        >>> from sparseopt.core.operators.differences import GridBase
        >>> GridBase((2, 3)).difference(jnp.arange(6.0).reshape(2, 3))[1]  # along the second axis
        Array([[-1., -1.,  0.],
               [-1., -1.,  0.]], dtype=float32)
    """

    shape: tuple[int, ...] = static()
    spacing: tuple[float, ...] | None = static(default=None)  # between neighbours along each axis; None for ones

    @property
    def node_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def edge_shape(self) -> tuple[int, ...]:
        return (len(self.shape), *self.shape)

    def ends(self) -> tuple[Array, Array]:
        """The tail and the head of every edge, as int32 in the edge layout; a row of zeros has one node for both."""
        tails = jnp.arange(math.prod(self.shape), dtype=jnp.int32).reshape(self.shape)
        heads = jnp.stack([tails - ahead(tails, axis) for axis in range(len(self.shape))])
        return jnp.broadcast_to(tails, heads.shape), heads

    def difference(self, x: FloatArray) -> FloatArray:
        return jnp.stack(by_spacing([ahead(x, axis) for axis in range(len(self.shape))], self.spacing, 1))

    def divergence(self, e: FloatArray) -> FloatArray:
        terms = [ahead_transpose(e[axis], axis) for axis in range(len(self.shape))]
        return add_up(by_spacing(terms, self.spacing, 1))

    def laplacian(self, x: FloatArray) -> FloatArray:
        """`DᵀD x`, built from differences so that constants vanish exactly."""

        def stencil(x: FloatArray) -> FloatArray:
            terms = [ahead_transpose(ahead(x, axis), axis) for axis in range(len(self.shape))]
            return add_up(by_spacing(terms, self.spacing, 2))

        # Writing the first row again keeps XLA's CPU compiler from fusing the stencil into what follows and computing
        # it again for every neighbour: two Laplacians took seven times as long.
        first = jax.lax.slice_in_dim(stencil(jax.lax.slice_in_dim(x, 0, min(2, len(x)))), 0, 1)
        return jax.lax.dynamic_update_slice_in_dim(stencil(x), first, 0, axis=0)


def spread(factor: Any, like: FloatArray) -> FloatArray:
    """A factor with trailing axes of length one for the channels of `like`."""
    return jnp.reshape(factor, factor.shape + (1,) * (like.ndim - factor.ndim)).astype(like.dtype)


@pytree
class EdgeBase:
    """D of any graph with gathers and scattered sums; nodes `[n]`, edges `[m]`.

    Sums are scattered edge by edge: tables that let every node gather its edges took four times as long on a CPU.
    """

    tails: Any  # int32 [m]
    heads: Any  # int32 [m]
    root_weights: Any  # [m], sqrt(w), or None for weights of 1
    num_nodes: int = static()

    @property
    def node_shape(self) -> tuple[int, ...]:
        return (self.num_nodes,)

    @property
    def edge_shape(self) -> tuple[int, ...]:
        return (self.tails.shape[0],)

    def ends(self) -> tuple[Array, Array]:
        """The tail and the head of every edge; a row of zeros has one node for both."""
        tails, heads = jnp.asarray(self.tails), jnp.asarray(self.heads)
        return tails, heads if self.root_weights is None else jnp.where(self.root_weights != 0, heads, tails)

    def _weigh(self, e: FloatArray) -> FloatArray:
        return e if self.root_weights is None else e * spread(self.root_weights, e)

    def difference(self, x: FloatArray) -> FloatArray:
        return self._weigh(x[self.tails] - x[self.heads])

    def divergence(self, e: FloatArray) -> FloatArray:
        e = self._weigh(e)
        zero = jnp.zeros((self.num_nodes, *e.shape[1:]), e.dtype)
        return zero.at[self.tails].add(e, mode="promise_in_bounds").at[self.heads].add(-e, mode="promise_in_bounds")

    def laplacian(self, x: FloatArray) -> FloatArray:
        return self.divergence(self.difference(x))


def edge_base(edges: np.ndarray, num_nodes: int, weights: np.ndarray | None, dtype: Any) -> EdgeBase:
    """The `EdgeBase` of checked edges `[m, 2]` and weights `[m]` or None, of host arrays."""
    root = None if weights is None else np.sqrt(weights).astype(dtype)
    return EdgeBase(edges[:, 0].astype(np.int32), edges[:, 1].astype(np.int32), root, num_nodes)


@pytree
class Difference:
    """`Δ^(order)` on node arrays, or `Δ^(order-1) Dᵀ` on edge arrays: what maps `Δ^(j)` onto `Δ^(j+order)`.

    Example:
        >>> from sparseopt.core.operators.differences import Difference, GridBase
        >>> second = Difference(GridBase((4,)), order=2)  # the Laplacian of a chain
        >>> second.mv(jnp.array([0.0, 1.0, 4.0, 9.0]))
        Array([-1., -2., -2.,  5.], dtype=float32)
        >>> second.in_shape, second.out_shape
        ((4,), (4,))
    """

    base: Any  # D, Dᵀ and L of a graph
    order: int = static()  # the number of factors D or Dᵀ, at least 1
    from_edges: bool = static(default=False)  # the input is an edge array (j odd) instead of a node array (j even)

    @property
    def _to_edges(self) -> bool:
        return (self.order - self.from_edges) % 2 == 1

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.base.edge_shape if self.from_edges else self.base.node_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.base.edge_shape if self._to_edges else self.base.node_shape

    def mv(self, x: FloatArray) -> FloatArray:
        return self._product(x, self.from_edges, self._to_edges)

    def rmv(self, e: FloatArray) -> FloatArray:
        return self._product(e, self._to_edges, self.from_edges)

    def _product(self, x: FloatArray, from_edges: bool, to_edges: bool) -> FloatArray:
        if from_edges:
            x = self.base.divergence(x)
        for _ in range((self.order - self.from_edges) // 2):
            x = self.base.laplacian(x)
        return self.base.difference(x) if to_edges else x
