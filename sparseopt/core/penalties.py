"""Floor 2: penalties. A penalty is a frozen pytree with a `value` and a `prox`; nothing else is asked of it.

The contract: `prox(x, step)` returns the minimiser over u of

    1/2 ||u - x||² + step * value(u)

and `value(x)` is a scalar that includes the weight. An indicator (Support, and the
sparse sets of `patterns.py`) has value 0 on its set, +inf off it.
Sources are named at each scalar formula in `thresholds.py`.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.thresholds import (
    FloatArray,
    Scalar,
    count_nonzero,
    hard_threshold,
    mcp_prox,
    mcp_value,
    scad_prox,
    scad_value,
    soft_threshold,
)
from sparseopt.core.types import pytree, static


@runtime_checkable
class Penalty(Protocol):
    """What a solver asks of a penalty. Write your own as a frozen pytree with these two methods.

    A penalty whose value is a sum over entries may also say so, with a class attribute `separable = True`: it then
    promises that `prox` takes an array of steps, one an entry. `proximal_adam` asks for it; without the attribute a
    penalty counts as coupled.
    """

    def value(self, x: FloatArray) -> Float[Array, ""]:
        """The penalty of `x`, its weight included: a scalar, 0 at x = 0 for a penalty on size."""

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        """The minimiser over u of `1/2 ||u - x||² + step * value(u)`, of the shape and dtype of `x`."""


@runtime_checkable
class Norm(Penalty, Protocol):
    """A convex penalty with `value(t x) = |t| value(x)`: it has a dual ball, and so a duality gap.

    For every `dual` in the ball, `<dual, x> <= value(x)`. A class whose `project_dual` gives some point of the ball and
    not the nearest says so by a class attribute `nearest = False`.
    """

    def project_dual(self, dual: FloatArray) -> FloatArray:
        """The nearest point of the dual ball."""

    def slack(self, x: FloatArray, dual: FloatArray) -> FloatArray:
        """Terms, none negative for a dual in the ball, that add up to `value(x) - <dual, x>`."""


@pytree
class L0:
    """`weight * ||x||_0`, the number of non-zeros; prox: hard threshold at `sqrt(2 * step * weight)`.

    Example:
        >>> so.L0(0.5).prox(jnp.array([-3.0, 0.9, 1.0]), step=1.0)  # keeps |x| >= 1
        Array([-3.,  0.,  1.], dtype=float32)
    """

    weight: Any
    separable = True

    def value(self, x: FloatArray) -> Float[Array, ""]:
        """`weight` times the exact number of non-zero entries."""
        return self.weight * count_nonzero(x).astype(x.dtype)

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        """Keep `|x| >= sqrt(2 * step * weight)`."""
        return hard_threshold(x, jnp.sqrt(2 * jnp.asarray(step * self.weight, x.dtype)))


@pytree
class L1:
    """`weight * ||x||_1`; prox: soft threshold at `step * weight`. The weight may be an array that broadcasts to x.

    Example:
        >>> so.L1(1.0).prox(jnp.array([-3.0, 0.5, 2.0]), step=1.0)
        Array([-2.,  0.,  1.], dtype=float32)
    """

    weight: Any
    separable = True

    def value(self, x: FloatArray) -> Float[Array, ""]:
        """The sum of `weight |x|`."""
        return jnp.sum(self.weight * jnp.abs(x))

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        """Shrink every entry by `step * weight`."""
        return soft_threshold(x, jnp.asarray(step * self.weight, x.dtype))

    def project_dual(self, dual: FloatArray) -> FloatArray:
        """Clip to `[-weight, weight]`."""
        weight = jnp.asarray(self.weight, dual.dtype)
        return jnp.clip(dual, -weight, weight)

    def slack(self, x: FloatArray, dual: FloatArray) -> FloatArray:
        """`weight |x| - dual x`, entry by entry."""
        return jnp.asarray(self.weight, x.dtype) * jnp.abs(x) - dual * x


@pytree
class MCP:
    """Minimax concave penalty: `weight |x| - x² / (2 gamma)` up to `|x| = gamma weight`, constant beyond.

    Its prox is `mcp_prox`, continuous for `step < gamma`; as gamma grows it becomes L1.

    Example:
        >>> so.MCP(1.0, gamma=2.0).prox(jnp.array([0.5, 1.5, 4.0]), step=1.0)  # large entries stay as they are
        Array([0., 1., 4.], dtype=float32)
    """

    weight: Any
    gamma: Any = 3.0
    separable = True

    def value(self, x: FloatArray) -> Float[Array, ""]:
        """The sum of `mcp_value`."""
        return jnp.sum(mcp_value(x, self.weight, self.gamma))

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        """`mcp_prox`, entry by entry."""
        return mcp_prox(x, self.weight, self.gamma, step)

    def slope(self, x: FloatArray) -> FloatArray:
        """The derivative of the value in `|x|`: `weight - |x| / gamma`, 0 from `gamma weight` on."""
        return jnp.maximum(self.weight - jnp.abs(x) / self.gamma, 0)


@pytree
class SCAD:
    """Smoothly clipped absolute deviation: slope `weight` to `|x| = weight`, falling to 0 at `a weight`.

    Needs `a > 2`; its prox is `scad_prox`, continuous for `step < a - 1`.

    Example:
        >>> so.SCAD(1.0).prox(jnp.array([0.5, 2.0, 4.0]), step=1.0)  # large entries stay as they are
        Array([0., 1., 4.], dtype=float32)
    """

    weight: Any
    a: Any = 3.7
    separable = True

    def value(self, x: FloatArray) -> Float[Array, ""]:
        """The sum of `scad_value`."""
        return jnp.sum(scad_value(x, self.weight, self.a))

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        """`scad_prox`, entry by entry."""
        return scad_prox(x, self.weight, self.a, step)

    def slope(self, x: FloatArray) -> FloatArray:
        """The derivative of the value in `|x|`: `weight`, falling from `|x| = weight` to 0 at `a weight`."""
        return jnp.clip((self.a * self.weight - jnp.abs(x)) / (self.a - 1), 0, self.weight)


@pytree
class GroupL2:
    """`weight * sum of ||x_g||_2` over the slices of `axis`: channels of one row vanish together.

    Prox: `x_g * max(0, 1 - step * weight / ||x_g||)`. Source: Yuan and Lin, "Model selection and estimation in
    regression with grouped variables", 2006.

    Example:
        >>> so.GroupL2(1.0).prox(jnp.array([[3.0, 4.0], [0.5, 0.5]]), step=1.0)  # rows shrink together
        Array([[2.4, 3.2],
               [0. , 0. ]], dtype=float32)
    """

    weight: Any
    axis: int = static(default=-1)

    def _length(self, x: FloatArray) -> FloatArray:
        squares = jnp.sum(x * x, axis=self.axis, keepdims=True)
        # The root has no finite slope at 0: a slice of zeros gets 0, a subgradient of its length.
        return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), squares)

    def value(self, x: FloatArray) -> Float[Array, ""]:
        """`weight` times the sum of lengths."""
        return jnp.sum(self.weight * self._length(x))

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        """Shorten every slice by `step * weight`, to exactly zero where it is shorter."""
        length = self._length(x)
        threshold = jnp.asarray(step * self.weight, x.dtype)
        kept = length > threshold
        return jnp.where(kept, x * (1 - threshold / jnp.where(kept, length, 1)), 0)

    def project_dual(self, dual: FloatArray) -> FloatArray:
        """Scale slices longer than `weight` back to it."""
        length = self._length(dual)
        weight = jnp.asarray(self.weight, dual.dtype)
        return dual * jnp.where(length > weight, weight / jnp.where(length > 0, length, 1), 1)

    def slack(self, x: FloatArray, dual: FloatArray) -> FloatArray:
        """`weight ||x_g|| - <dual_g, x_g>`, slice by slice."""
        weight = jnp.asarray(self.weight, x.dtype)
        return weight * self._length(x) - jnp.sum(dual * x, axis=self.axis, keepdims=True)


@pytree
class Support:
    """Indicator of arrays that are zero where `mask` is False; prox: set those entries to zero.

    Example:
        >>> so.Support(jnp.array([True, False, True])).prox(jnp.array([1.0, 2.0, 3.0]), step=1.0)
        Array([1., 0., 3.], dtype=float32)
    """

    mask: Any
    separable = True

    def value(self, x: FloatArray) -> Float[Array, ""]:
        """0 where x vanishes off the mask, +inf elsewhere."""
        outside = count_nonzero(jnp.where(self.mask, 0, x))
        return jnp.where(outside == 0, 0.0, jnp.inf).astype(x.dtype)

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        """The projection: `x` on the mask, exactly zero off it, whatever the step."""
        del step
        return jnp.where(self.mask, x, jnp.zeros((), x.dtype))


@pytree
class Lifted:
    """`penalty(Ψ_i x)` for a group of rows that share no column; see `lift`."""

    penalty: Any
    rows: Any
    row_squares: Any

    def value(self, x: FloatArray) -> Float[Array, ""]:
        """The penalty of the rows."""
        return self.penalty.value(self.rows.mv(x))

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        """`x + Ψ_iᵀ ((u - s) / |a|²)` with `s = Ψ_i x` and u the prox of s at `step |a|²`, row by row."""
        s = self.rows.mv(x)
        squares = jnp.reshape(self.row_squares, self.row_squares.shape + (1,) * (s.ndim - self.row_squares.ndim))
        u = self.penalty.prox(s, step * squares)
        return x + self.rows.rmv((u - s) / squares)


def lift(penalty: Penalty, group: Any) -> Lifted:
    """The penalty on the values of a group's rows, as a penalty on the array that they act on.

    For one row a and any scalar penalty p, `argmin_v 1/2 ||v - x||² + step p(aᵀv)` is
    `x + a (u - s) / |a|²` with `s = aᵀx` and `u = argmin_u 1/2 (u - s)² + step |a|² p(u)`: v moves along a only.
    Rows without a common column do not feel each other.

    Args:
        penalty: any penalty that acts on every entry (or every slice of channels) on its own; its prox is called
            with one step a row.
        group: a `RowTable`, or any linear map with `row_squares()` whose rows share no column.

    Source: Bu, Wu, Zuo, "Doge-ADMM", section 3; for orthogonal rows, Combettes and Pesquet, 2007, prop. 11.

    Example:
        >>> from sparseopt.core.grouping import group_table
        >>> chain = so.Graph.chain(4)
        >>> pairs, _ = group_table(chain.matrix(1), chain.groups(1), 0, jnp.float32)  # the edges 0-1 and 2-3
        >>> so.lift(so.L1(1.0), pairs).prox(jnp.array([0.0, 1.0, 5.0, 9.0]), step=1.0)
        Array([0.5, 0.5, 6. , 8. ], dtype=float32)
    """
    return Lifted(penalty, group, jnp.asarray(group.row_squares()))


@pytree
class Sum:
    """Penalties on consecutive slices of rows, as one penalty on all; see `stacked`."""

    penalties: tuple[Any, ...]
    sizes: tuple[int, ...] = static()  # rows of each

    def _parts(self, x: Any) -> list[Any]:
        """Slices of an array by rows; of a number, one that serves all, as many as there are penalties."""
        if jnp.ndim(x) == 0:
            return [x] * len(self.sizes)
        return jnp.split(x, list(itertools.accumulate(self.sizes))[:-1])

    def value(self, x: FloatArray) -> Float[Array, ""]:
        """The sum of the values."""
        values = [penalty.value(part) for penalty, part in zip(self.penalties, self._parts(x), strict=True)]
        return jnp.sum(jnp.stack(values))

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        """Slice by slice, since no row is in two of them."""
        parts = zip(self.penalties, self._parts(x), self._parts(step), strict=True)
        return jnp.concatenate([penalty.prox(part, size) for penalty, part, size in parts])


@pytree
class NormSum(Sum):
    """A `Sum` of norms, which is a norm."""

    def project_dual(self, dual: FloatArray) -> FloatArray:
        """Slice by slice."""
        parts = zip(self.penalties, self._parts(dual), strict=True)
        return jnp.concatenate([penalty.project_dual(part) for penalty, part in parts])

    def slack(self, x: FloatArray, dual: FloatArray) -> FloatArray:
        """The terms of all slices, in one row."""
        parts = zip(self.penalties, self._parts(x), self._parts(dual), strict=True)
        return jnp.concatenate([penalty.slack(part, u).reshape(-1) for penalty, part, u in parts])


def stacked(penalties: Sequence[Penalty], sizes: Sequence[int]) -> Sum:
    """The sum of penalties that act on consecutive slices of rows, of the given sizes; a `Norm` if all are.

    Example:
        >>> from sparseopt.core.penalties import stacked
        >>> stacked([so.L1(1.0), so.L1(2.0)], [2, 1]).prox(jnp.array([3.0, 0.5, 3.0]), step=1.0)
        Array([2., 0., 1.], dtype=float32)
    """
    kind = NormSum if all(isinstance(penalty, Norm) for penalty in penalties) else Sum
    return kind(tuple(penalties), tuple(int(size) for size in sizes))
