"""Patterns, the indicator penalties of sparse sets that can also turn scores into a mask, and a grid.

A pattern also has `mask(score)`, True where an entry survives, with exactly the pattern's count. A score is
non-negative and has the unit of a magnitude: the mask keeps the largest sum of squared scores that the set allows.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparseopt.core.base.arguments import known_numbers, own_refusal
from sparseopt.core.base.thresholds import among, count_nonzero, infinite_unless, kth_largest, n_of_m_mask, top_k_mask
from sparseopt.core.base.types import BoolArray, FloatArray, Scalar, is_traced, pytree, static
from sparseopt.core.penalties.sets import Ended, Support


class _SparseSet:
    """The indicator of a set with `mask(score)` and `_holds(x)`, whether x lies in the set."""

    mask: Any
    _holds: Any

    def refuses(self) -> str | None:
        """Why there are no such arrays, or None."""
        if is_traced(k := getattr(self, "k", 0)):
            return None
        counts = np.asarray(k)
        if counts.dtype.kind in "biuf" and np.all((counts >= 0) & (counts % 1 == 0)):
            return None
        return f"the k of {type(self).__name__} is a whole number of 0 or more, given {k}"

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return infinite_unless(self._holds(x), x)

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        """The projection, whatever the step: `x` on `mask(|x|)`, exactly zero elsewhere."""
        return jnp.where(self.mask(jnp.abs(x)), x, jnp.zeros((), x.dtype)) if x.size else x


class _UnitsTopK(_SparseSet):
    """The arrays that vanish outside `k` units: `_sums(x)` over every unit, and `_spread(kept, shape)` over entries."""

    k: Any
    _sums: Any
    _spread: Any

    def mask(self, score: FloatArray) -> BoolArray:
        """True in exactly the k units whose scores have the largest sums of squares; on a tie the first win.

        Raises:
            ValueError: if the units do not fit the array.
        """
        wide = jnp.promote_types(score.dtype, jnp.float32)
        return self._spread(top_k_mask(self._sums(score.astype(wide) ** 2), self.k), score.shape)

    def _holds(self, x: FloatArray) -> Bool[Array, ""]:
        return count_nonzero(self._sums((x != 0).astype(jnp.float32))) <= self.k


@pytree
class TopK(_SparseSet):
    """Indicator of arrays with at most `k` non-zero entries in all; prox: keep the k largest magnitudes.

    `k` is a leaf: one compiled program works for every count.

    Example:
        >>> so.TopK(2).prox(jnp.array([3.0, -1.0, 2.0, -4.0]), step=1.0)
        Array([ 3.,  0.,  0., -4.], dtype=float32)
    """

    k: Any
    even = True

    def mask(self, score: FloatArray) -> BoolArray:
        return top_k_mask(score, self.k)

    def _holds(self, x: FloatArray) -> Bool[Array, ""]:
        return count_nonzero(x) <= self.k


@pytree
class RowTopK(_SparseSet):
    """Indicator of arrays with at most `k` non-zeros along `axis`, at every position of the other axes.

    For a weight in solver layout `[in, out]` the axis is 0: k inputs for every output row. `k` is a leaf: one number,
    or, for a matrix, one for each of its lines along the axis.

    Example:
        >>> so.RowTopK(1, axis=1).prox(jnp.array([[3.0, -1.0], [2.0, -4.0]]), step=1.0)
        Array([[ 3.,  0.],
               [ 0., -4.]], dtype=float32)
    """

    k: Any
    axis: int = static(default=0)
    even = True

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
        groups = moved.reshape(moved.shape[0] // self.m, self.m, math.prod(moved.shape[1:]))
        return jnp.all(jnp.sum(groups, axis=1, dtype=jnp.int32) <= self.n)


@pytree
class BlockTopK(_UnitsTopK):
    """Indicator of matrices that vanish outside `k` of the blocks of `shape` (rows, columns) that tile them.

    Prox: keep the k blocks of largest energy, the sum of squares. `k` is a leaf, the shape is static.

    Example:
        >>> so.BlockTopK(1, (1, 2)).prox(jnp.array([[3.0, -1.0], [2.0, -4.0]]), step=1.0)
        Array([[ 0.,  0.],
               [ 2., -4.]], dtype=float32)
    """

    k: Any
    shape: tuple[int, int] = static()

    def _sums(self, x: Array) -> Array:
        """The sum over every block, `[block rows, block columns]`.

        In parts, since a TPU stores an array with a last axis of a few columns as if there were 128.
        """
        rows, columns = self.shape
        if x.ndim != 2 or x.shape[0] % rows or x.shape[1] % columns:
            raise ValueError(
                f"blocks of {rows} × {columns} need sides that are their multiples, given an array of shape {x.shape}"
            )
        of_rows = jnp.sum(x.reshape(-1, rows, x.shape[1]), axis=1)
        return sum((of_rows[:, column::columns] for column in range(1, columns)), of_rows[:, ::columns])

    def _spread(self, kept: Array, shape: tuple[int, ...]) -> Bool[Array, "rows columns"]:
        rows, columns = self.shape
        kept = kept[:, jnp.arange(shape[1]) // columns]
        return jnp.broadcast_to(kept[:, None], (len(kept), rows, shape[1])).reshape(shape)


@pytree
class GroupTopK(_UnitsTopK):
    """Indicator of matrices (or vectors) that vanish outside `k` of the groups of their rows, all columns together.

    Prox: keep the k groups of largest energy, the sum of squares. For a weight in solver layout `[in, out]` a group of
    rows is a group of inputs, such as one channel of an MLP or the channels of one attention head.

    Attributes:
        k: groups that survive; a leaf.
        groups: the number of rows in each of consecutive groups, or the label of every row's group: integers 0 to
            G - 1. Static.

    Example:
        >>> so.GroupTopK(1).prox(jnp.array([[3.0, -1.0], [2.0, -4.0]]), step=1.0)
        Array([[ 0.,  0.],
               [ 2., -4.]], dtype=float32)
        >>> so.GroupTopK(1, groups=[0, 1, 0]).prox(jnp.array([3.0, -4.0, 3.0]), step=1.0)
        Array([3., 0., 3.], dtype=float32)
    """

    k: Any
    groups: Any = static(default=1)

    def __post_init__(self) -> None:
        # Static fields must be hashable: labels are kept as a tuple.
        if not isinstance(self.groups, int | tuple):
            labels = np.asarray(self.groups)
            object.__setattr__(self, "groups", tuple(labels.tolist()) if labels.ndim else labels.item())

    def _sums(self, x: Float[Array, "rows ..."]) -> Float[Array, " groups"]:
        """The sum of each group's entries."""
        of_rows = jnp.sum(x, axis=tuple(range(1, x.ndim)))
        if np.ndim(self.groups) == 0:
            if not (x.ndim and self.groups >= 1 and x.shape[0] % self.groups == 0):
                raise ValueError(
                    f"groups of {self.groups} rows need a number of rows that is a multiple, given an array of shape "
                    f"{x.shape}; choose a size that divides the rows, or label every row"
                )
            return jnp.sum(of_rows.reshape(-1, self.groups), axis=1)
        if x.shape[:1] != (len(self.groups),) or set(self.groups) != set(range(len(set(self.groups)))):
            raise ValueError(
                f"groups needs one label for every row, the integers 0 to G - 1, each at least once; given "
                f"{len(self.groups)} labels, {len(set(self.groups))} of them distinct, for an array of shape {x.shape}"
            )
        return jax.ops.segment_sum(of_rows, np.asarray(self.groups), max(self.groups) + 1)

    def _spread(self, kept: Array, shape: tuple[int, ...]) -> BoolArray:
        of_rows = kept[np.asarray(self.groups)] if np.ndim(self.groups) else jnp.repeat(kept, self.groups)
        return jnp.broadcast_to(of_rows.reshape(-1, *[1] * (len(shape) - 1)), shape)


@pytree
class Within(_SparseSet):
    """Indicator of the arrays of another pattern that also vanish off a support, such as the zeros of a pruned weight.

    Prox: the pattern's prox of x with zeros off the support, which projects onto both. The mask lies in the support: if
    that has fewer entries than the pattern asks for, all of them survive, and the count is smaller.

    Attributes:
        pattern: any other pattern.
        support: True where an entry may be non-zero, in the shape of the arrays.

    Example:
        >>> from sparseopt.core.penalties.patterns import Within
        >>> Within(so.TopK(2), jnp.array([True, True, True, False])).prox(jnp.array([3.0, -1.0, 2.0, -4.0]), step=1.0)
        Array([3., 0., 2., 0.], dtype=float32)
    """

    pattern: Any
    support: Any

    def mask(self, score: FloatArray) -> BoolArray:
        return self.pattern.mask(among(self.support, score)) & self.support

    def _holds(self, x: FloatArray) -> Bool[Array, ""]:
        return (self.pattern.value(x) == 0) & (count_nonzero(jnp.where(self.support, 0, x)) == 0)


# Whole numbers up to this size are exact in float32.
MOST = 2**24


@pytree
class Grid(Ended):
    """Indicator of arrays whose entries are whole multiples of `scale`, from `low * scale` to `high * scale`.

    With a pattern or a `Support`, the arrays must lie in it too. Prox: the nearest such array, exactly. Without a
    pattern, every entry moves to its nearest grid point; with one, the pattern keeps the entries that gain most, where
    `near` instead of 0 gains `x² - (x - near)²`. Not convex.

    Attributes:
        scale: the distance of neighbouring points, an array that broadcasts to x; a negative one reverses the grid, and
            0 leaves only 0.
        low: the smallest multiple, a whole number from -2**24.
        high: the largest multiple, up to 2**24.
        pattern: any pattern, or a `Support`; None for all arrays. 0 must then be on the grid.

    Example:
        >>> so.Grid(0.5, -8, 7).prox(jnp.array([-9.0, 0.3, 0.7]), step=1.0)
        Array([-4. ,  0.5,  0.5], dtype=float32)
        >>> so.Grid(0.5, -8, 7, so.TopK(1)).prox(jnp.array([-0.2, 0.3, 0.7]), step=1.0)
        Array([0. , 0. , 0.5], dtype=float32)
    """

    scale: Any
    low: Any
    high: Any
    pattern: Any = None
    least = ()
    bounds = ("scale", "low", "high")

    @property
    def separable(self) -> bool:
        return self.pattern is None or getattr(self.pattern, "separable", False)

    def refuses(self) -> str | None:
        if reason := super().refuses():
            return reason
        for name in self.bounds:
            if not is_traced(given := getattr(self, name)) and not np.all(np.isfinite(known_numbers(self, name))):
                return f"the {name} of a Grid must be finite, given {given}"
        low, high = known_numbers(self, "low"), known_numbers(self, "high")
        if any(np.any((ends % 1 != 0) & ~np.isnan(ends) | (np.abs(ends) > MOST)) for ends in (low, high)):
            return f"low and high of a Grid are whole numbers of at most {MOST}, given {self.low} and {self.high}"
        if np.any(low > high):
            return f"a Grid runs from low to high >= low, given {self.low} to {self.high}"
        if self.pattern is None:
            return None
        if not isinstance(self.pattern, Pattern | Support):
            return f"the pattern of a Grid is one such as TopK(k), or a Support, given {type(self.pattern).__name__}"
        if self.excludes_zero:
            return f"a pattern needs 0 on the Grid, which runs from {self.low} to {self.high}"
        return own_refusal(self.pattern)

    def nearest(self, x: FloatArray) -> FloatArray:
        """The nearest point of the grid for every entry, whatever the pattern."""
        # In 16 bits a quotient would round to the next multiple.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        scale = jnp.asarray(self.scale, wide)
        flat = scale == 0
        multiple = jnp.clip(jnp.round(x.astype(wide) / jnp.where(flat, 1, scale)), self.low, self.high)
        # Never a negative zero.
        return jnp.where(flat | (multiple == 0), 0, scale * multiple).astype(x.dtype)

    def value(self, x: FloatArray) -> Float[Array, ""]:
        inside = jnp.zeros((), x.dtype) if self.pattern is None else self.pattern.value(x)
        return inside + infinite_unless(jnp.all(self.nearest(x) == x), x)

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        """The projection, whatever the step."""
        near = self.nearest(x)
        if self.pattern is None:
            return near
        if self.separable:
            return self.pattern.prox(near, step)
        if not x.size:
            return x
        # The root of what an entry gains, `near (2 x - near)`, since a pattern sums squares of scores; from its
        # factors, which neither overflow nor underflow.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        one, other = near.astype(wide), 2 * x.astype(wide) - near.astype(wide)
        gain = jnp.sqrt(jnp.abs(one)) * jnp.sqrt(jnp.abs(other))
        return jnp.where(self.pattern.mask(jnp.where(one * jnp.sign(other) > 0, gain, 0)), near, 0)


Pattern = TopK | RowTopK | NM | BlockTopK | GroupTopK | Within


def is_pattern(penalty: Any) -> bool:
    """Whether a penalty is a pattern, with a `mask` for scores."""
    return isinstance(penalty, Pattern)


def without_support(pattern: Pattern) -> tuple[Pattern, BoolArray | None]:
    """A pattern, and the support that it is `Within`, or None."""
    return (pattern.pattern, pattern.support) if isinstance(pattern, Within) else (pattern, None)


def _top_k_of_columns(score: Float[Array, "n columns"], k: Int[Array, ""] | int) -> Bool[Array, "n columns"]:
    """`top_k_mask` of every column, with one branch for all: under vmap both branches would run."""
    threshold = jax.vmap(kth_largest, in_axes=(1, 0))(score, jnp.broadcast_to(k, score.shape[1:]))
    above, tied = score > threshold, score == threshold
    number_above = jnp.sum(above, axis=0, dtype=jnp.int32)
    room = jnp.asarray(k) - number_above

    def first_of_tied() -> BoolArray:
        return above | (tied & (jnp.cumsum(tied, axis=0, dtype=jnp.int32) <= room))

    crowded = jnp.any(jnp.sum(tied, axis=0, dtype=jnp.int32) > room)
    return jax.lax.cond(crowded, first_of_tied, lambda: above | tied)
