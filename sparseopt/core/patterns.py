"""Floor 2: patterns, the indicator penalties of sparse sets that can also turn scores into a mask.

A pattern has also `mask(score)`, True where an entry survives, with exactly the pattern's count. A score is
non-negative and has the unit of a magnitude: the mask keeps the largest sum of squared scores that the set allows.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparseopt.core.thresholds import count_nonzero, infinite_unless, kth_largest, n_of_m_mask, top_k_mask
from sparseopt.core.types import BoolArray, FloatArray, Scalar, pytree, static


class _SparseSet:
    """The penalty of a pattern with `mask(score)` and `_holds(x)`, whether x lies in the set."""

    mask: Any
    _holds: Any

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return infinite_unless(self._holds(x), x)

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        """The projection, whatever the step: `x` on `mask(|x|)`, exactly zero elsewhere."""
        return jnp.where(self.mask(jnp.abs(x)), x, jnp.zeros((), x.dtype))


@pytree
class TopK(_SparseSet):
    """Indicator of arrays with at most `k` non-zero entries in all; prox: keep the k largest magnitudes.

    `k` is a leaf: one compiled program works for every count.

    Example:
        >>> so.TopK(2).prox(jnp.array([3.0, -1.0, 2.0, -4.0]), step=1.0)
        Array([ 3.,  0.,  0., -4.], dtype=float32)
    """

    k: Any

    def mask(self, score: FloatArray) -> BoolArray:
        return top_k_mask(score, self.k)

    def _holds(self, x: FloatArray) -> Bool[Array, ""]:
        return count_nonzero(x) <= self.k


@pytree
class RowTopK(_SparseSet):
    """Indicator of arrays with at most `k` non-zeros along `axis`, at every position of the other axes.

    For a weight in solver layout `[in, out]` the axis is 0: k inputs for every output row. `k` is a leaf.

    Example:
        >>> so.RowTopK(1, axis=1).prox(jnp.array([[3.0, -1.0], [2.0, -4.0]]), step=1.0)
        Array([[ 3.,  0.],
               [ 0., -4.]], dtype=float32)
    """

    k: Any
    axis: int = static(default=0)

    def mask(self, score: FloatArray) -> BoolArray:
        moved = jnp.moveaxis(score, self.axis, 0)
        mask = _top_k_of_columns(moved.reshape(moved.shape[0], -1), self.k)
        return jnp.moveaxis(mask.reshape(moved.shape), 0, self.axis)

    def _holds(self, x: FloatArray) -> Bool[Array, ""]:
        return jnp.all(jnp.sum(x != 0, axis=self.axis, dtype=jnp.int32) <= self.k)


@pytree
class NM(_SparseSet):
    """Indicator of the n:m pattern: at most `n` non-zeros in every `m` consecutive entries along `axis`.

    For a weight in solver layout `[in, out]` the axis is 0, so the groups run along the inputs of one output.

    Example:
        >>> so.NM(2, 4).prox(jnp.array([3.0, -1.0, 2.0, -4.0]), step=1.0)
        Array([ 3.,  0.,  0., -4.], dtype=float32)
    """

    n: int = static()
    m: int = static()
    axis: int = static(default=0)

    def mask(self, score: FloatArray) -> BoolArray:
        return n_of_m_mask(score, self.n, self.m, self.axis)

    def _holds(self, x: FloatArray) -> Bool[Array, ""]:
        moved = jnp.moveaxis(x != 0, self.axis, 0)
        groups = moved.reshape(moved.shape[0] // self.m, self.m, -1)
        return jnp.all(jnp.sum(groups, axis=1, dtype=jnp.int32) <= self.n)


@pytree
class BlockTopK(_SparseSet):
    """Indicator of matrices that vanish outside `k` of the blocks of `shape` (rows, columns) that tile them.

    Prox: keep the k blocks of largest energy, the sum of squares. `k` is a leaf, the shape is static.

    Example:
        >>> so.BlockTopK(1, (1, 2)).prox(jnp.array([[3.0, -1.0], [2.0, -4.0]]), step=1.0)
        Array([[ 0.,  0.],
               [ 2., -4.]], dtype=float32)
    """

    k: Any
    shape: tuple[int, int] = static()

    def _tiles(self, x: Array) -> Array:
        """The blocks, `[block rows, rows, block columns, columns]`."""
        rows, columns = self.shape
        if x.ndim != 2 or x.shape[0] % rows or x.shape[1] % columns:
            raise ValueError(
                f"blocks of {rows} x {columns} tile matrices of such multiples only, given an array of shape {x.shape}"
            )
        return x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)

    def mask(self, score: Float[Array, "rows columns"]) -> Bool[Array, "rows columns"]:
        """True in exactly the k blocks whose scores have the largest sums of squares; on a tie the first win.

        Raises:
            ValueError: if the blocks do not tile the array.
        """
        wide = jnp.promote_types(score.dtype, jnp.float32)
        energy = jnp.sum(self._tiles(score).astype(wide) ** 2, axis=(1, 3))
        kept = top_k_mask(energy, self.k)
        return jnp.broadcast_to(kept[:, None, :, None], self._tiles(score).shape).reshape(score.shape)

    def _holds(self, x: Float[Array, "rows columns"]) -> Bool[Array, ""]:
        return jnp.sum(jnp.any(self._tiles(x != 0), axis=(1, 3)), dtype=jnp.int32) <= self.k


Pattern = TopK | RowTopK | NM | BlockTopK


def _top_k_of_columns(score: Float[Array, "n columns"], k: Int[Array, ""] | int) -> Bool[Array, "n columns"]:
    """`top_k_mask` of every column, with one branch for all: under vmap both branches would run."""
    threshold = jax.vmap(kth_largest, in_axes=(1, None))(score, k)
    above, tied = score > threshold, score == threshold
    number_above = jnp.sum(above, axis=0, dtype=jnp.int32)
    room = jnp.asarray(k) - number_above

    def first_of_tied() -> BoolArray:
        return above | (tied & (jnp.cumsum(tied, axis=0, dtype=jnp.int32) <= room))

    crowded = jnp.any(jnp.sum(tied, axis=0, dtype=jnp.int32) > room)
    return jax.lax.cond(crowded, first_of_tied, lambda: above | tied)
