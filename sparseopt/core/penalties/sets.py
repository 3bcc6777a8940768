"""Constraints, the indicators of simple sets: value 0 on the set, +inf off it; the prox projects."""

from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import sparse

from sparseopt.core.base.arguments import Limited, known_numbers
from sparseopt.core.base.thresholds import count_nonzero, infinite_unless, largest_ratio, soft_threshold
from sparseopt.core.base.types import FloatArray, Scalar, pytree


@pytree
class Support:
    """Indicator of arrays that are zero where `mask` is False; prox: set those entries to exactly zero.

    Example:
        >>> so.Support(jnp.array([True, False, True])).prox(jnp.array([1.0, 2.0, 3.0]), step=1.0)
        Array([1., 0., 3.], dtype=float32)
    """

    mask: Any
    separable = True
    convex = True

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return infinite_unless(count_nonzero(jnp.where(self.mask, 0, x)) == 0, x)

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        return jnp.where(self.mask, x, jnp.zeros((), x.dtype))


# The status of `scipy.optimize.linprog`.
INFEASIBLE = 2


def _is_empty(matrix: Any, low: Any, high: Any, total: float | None = None) -> bool:
    """Whether no x has `low <= matrix x <= high` (and the sum `total`): a linear program on the host."""
    from scipy.optimize import linprog

    rows = sparse.csr_array(matrix)
    low, high = (np.broadcast_to(end, rows.shape[:1]) for end in (low, high))
    below, above = np.isfinite(low), np.isfinite(high)
    ends = np.concatenate([-low[below], high[above]])
    # HiGHS has an absolute tolerance: every row in units of its end.
    units = 1 / np.where(ends == 0, 1, np.abs(ends))
    sides = sparse.diags_array(units) @ sparse.vstack([-rows[below], rows[above]])
    sums: dict[str, Any] = {} if total is None else {"A_eq": rows.sum(axis=0)[None] / total, "b_eq": [1.0]}
    nothing = np.zeros(rows.shape[1])
    return linprog(nothing, sides, units * ends, bounds=(None, None), **sums).status == INFEASIBLE


class Ended(Limited):
    """A set between two ends, low and high."""

    low: Any
    high: Any

    def misses(self, matrix: Any) -> bool:
        """Whether no x has `matrix x` in the set; on the host."""
        return self.excludes_zero and _is_empty(matrix, known_numbers(self, "low"), known_numbers(self, "high"))

    @property
    def excludes_zero(self) -> bool:
        return bool(np.any(known_numbers(self, "low") > 0) or np.any(known_numbers(self, "high") < 0))


class _Interval(Ended):
    """Indicator of `low <= x <= high`, plus `weight * ||x||_1`."""

    weight: Any
    separable = True
    bounds = ("low", "high")

    def refuses(self) -> str | None:
        if reason := super().refuses():
            return reason
        low, high = np.broadcast_arrays(known_numbers(self, "low"), known_numbers(self, "high"))
        if (wrong := low > high).any():
            return (
                f"the bounds of {type(self).__name__} must be low <= high, given {low[wrong][0]} and {high[wrong][0]}"
            )
        return None

    def _bounds(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        return jnp.asarray(self.low, x.dtype), jnp.asarray(self.high, x.dtype)

    def value(self, x: FloatArray) -> Float[Array, ""]:
        low, high = self._bounds(x)
        return jnp.sum(self.weight * jnp.abs(x)) + infinite_unless(jnp.all((x >= low) & (x <= high)), x)

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        # On a line, the clipped prox of a convex function is the prox of the function on the interval.
        return jnp.clip(soft_threshold(x, jnp.asarray(step * self.weight, x.dtype)), *self._bounds(x))

    def slack(self, x: FloatArray, dual: FloatArray) -> FloatArray:
        """The largest `weight (|x| - |c|) + dual (c - x)` over the three points c; +inf where x is outside."""
        low, high = self._bounds(x)
        weight, nearest = jnp.asarray(self.weight, x.dtype), jnp.clip(jnp.zeros((), x.dtype), low, high)
        gains = []
        for c in (low, high, nearest):
            # Towards an infinite bound nothing is gained, if the conjugate is finite.
            c = jnp.where(jnp.isfinite(c), c, nearest)
            gains.append(weight * (jnp.abs(x) - jnp.abs(c)) + dual * (c - x))
        return jnp.maximum(jnp.maximum(*gains[:2]), gains[2]) + infinite_unless((x >= low) & (x <= high), x)

    def dual_norm(self, dual: FloatArray) -> Float[Array, ""]:
        """0 for finite bounds; the largest `|dual| / weight` of entries that point to an infinite bound."""
        low, high = self._bounds(dual)
        unbounded = jnp.where(dual > 0, high == jnp.inf, low == -jnp.inf)
        return largest_ratio(jnp.where(unbounded, jnp.abs(dual), 0), self.weight)

    def entry_terms(self) -> tuple[Any, Any, Any, Any]:
        return self.weight, 0.0, self.low, self.high


@pytree
class Nonnegative(_Interval):
    """Indicator of `x >= 0`, plus `weight * sum x`; prox: `max(x - step * weight, 0)`.

    The weight, not negative, may be an array that broadcasts to x. The conjugate is 0 for `u <= weight`, +inf
    elsewhere.

    Example:
        >>> so.Nonnegative().prox(jnp.array([-3.0, 0.5, 2.0]), step=1.0)
        Array([0. , 0.5, 2. ], dtype=float32)
    """

    weight: Any = 0.0
    low = 0.0
    high = np.inf
    keeps_zeros = True


@pytree
class Nonpositive(_Interval):
    """Indicator of `x <= 0`, plus `weight * sum |x|`; as `Nonnegative` otherwise."""

    weight: Any = 0.0
    low = -np.inf
    high = 0.0
    keeps_zeros = True


@pytree
class Box(_Interval):
    """Indicator of `low <= x <= high`, plus `weight * ||x||_1`; prox: soft threshold, then clip.

    All three may be arrays that broadcast to x. Needs `low <= high`; a bound may be infinite. The conjugate is the
    largest `u c - weight |c|` over the two bounds and the point between them nearest to 0, summed over entries. It is
    finite everywhere if the bounds are.

    Example:
        >>> so.Box(-1.0, 2.0, weight=0.5).prox(jnp.array([-3.0, 0.25, 1.5, 9.0]), step=1.0)
        Array([-1.,  0.,  1.,  2.], dtype=float32)
    """

    low: Any
    high: Any
    weight: Any = 0.0
    may_be_infinite = True  # of its numbers the bounds


@pytree
class Simplex(Limited):
    """Indicator of `{x >= 0, sum x = radius}`, over all entries together; prox: `max(x - level, 0)`.

    The level that makes the sum right is `max over j of ((sum of the j largest) - radius) / j`, found by sorting. The
    conjugate is `radius * max u`, finite everywhere. Source: Duchi, Shalev-Shwartz, Singer and Chandra, "Efficient
    projections onto the l1-ball for learning in high dimensions", 2008, figure 1.

    Example:
        >>> so.Simplex().prox(jnp.array([1.0, 0.5, -2.0]), step=1.0)
        Array([0.75, 0.25, 0.  ], dtype=float32)
    """

    radius: Any = 1.0
    least = ()
    above = MappingProxyType({"radius": 0})
    excludes_zero = True

    def misses(self, matrix: Any) -> bool:
        """Whether no x has `matrix x` in the set; on the host."""
        return _is_empty(matrix, 0.0, np.inf, float(self.radius))

    def value(self, x: FloatArray) -> Float[Array, ""]:
        """0 if no entry is negative and the sum is the radius up to `8 eps sqrt(x.size)` of it, +inf otherwise."""
        allowed = 8 * jnp.finfo(x.dtype).eps * x.size**0.5 * self.radius
        return infinite_unless(jnp.all(x >= 0) & (jnp.abs(jnp.sum(x) - self.radius) <= allowed), x)

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(-1)
        radius = jnp.asarray(self.radius, wide.dtype)
        # Shifting all entries leaves the projection unchanged; without it, entries far above the radius lose the level.
        below = wide - jax.lax.stop_gradient(jnp.max(wide))
        fixed = jax.lax.stop_gradient(below)
        sums = jnp.cumsum(jnp.sort(fixed, descending=True))
        kept = fixed > jnp.max((sums - radius) / jnp.arange(1, wide.size + 1, dtype=wide.dtype))
        point, count = jnp.where(kept, below, 0), jnp.maximum(jnp.sum(kept), 1).astype(wide.dtype)
        # A rounded level shifts many entries the same way, and so their sum: the second pass corrects that.
        for _ in range(2):
            point = jnp.where(kept, jnp.maximum(point - (jnp.sum(point) - radius) / count, 0), 0)
        return point.reshape(x.shape).astype(x.dtype)

    def slack(self, x: FloatArray, dual: FloatArray) -> FloatArray:
        return x * (jnp.max(dual) - dual) + self.value(x)

    def dual_norm(self, dual: FloatArray) -> Float[Array, ""]:
        return jnp.zeros((), dual.dtype)
