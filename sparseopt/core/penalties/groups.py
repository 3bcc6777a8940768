"""Penalties on the lengths of groups of entries, and on the singular values of a matrix."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseopt.core.base.arguments import Limited
from sparseopt.core.base.dense import product
from sparseopt.core.base.thresholds import largest_ratio, soft_threshold
from sparseopt.core.base.types import FloatArray, Scalar, is_traced, pytree, static

# An axis as short as those of a grid is summed slice by slice.
FEW = 3


class _Grouped(Limited):
    """How an array falls into groups: the slices of `axis` (one or several), or with `groups` the rows of one label.

    A number for every group has the shape of the array with `axis` of length 1, or `[num_groups]`.
    """

    axis: int | tuple[int, ...]
    groups: Any
    num_groups: int | None
    even = True

    def __post_init__(self) -> None:
        if isinstance(self.axis, list):  # of a config
            object.__setattr__(self, "axis", tuple(self.axis))
        # In trees that JAX rebuilds `num_groups` is set, and leaves may be anything: they are not checked.
        given = self.groups
        whole = isinstance(given, np.ndarray) and given.dtype.kind in "iu" and given.ndim == 1
        if given is None or not (self.num_groups is None or isinstance(given, list | tuple) or whole):
            return
        name = type(self).__name__
        if is_traced(self.groups):
            raise ValueError(f"traced labels do not show how many groups there are: give {name} num_groups")
        labels = np.asarray(self.groups)
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
            raise ValueError(
                f"{name} needs one label for every row, an integer from 0 on, given groups of shape {labels.shape}, "
                f"{labels.dtype}" + (f", from {labels.min()}" if labels.size else "")
            )
        count = int(labels.max(initial=-1)) + 1
        if self.num_groups is not None and count > self.num_groups:
            raise ValueError(f"{name} has num_groups={self.num_groups} and a label {count - 1}; labels count from 0")
        object.__setattr__(self, "groups", self.groups if isinstance(self.groups, jax.Array) else labels)
        object.__setattr__(self, "num_groups", count if self.num_groups is None else self.num_groups)

    @property
    def group_axes(self) -> tuple[int, ...]:
        """The axes of a slice."""
        return tuple(np.atleast_1d(self.axis).tolist())

    def _sums(self, x: FloatArray) -> FloatArray:
        """The sum over each slice, whose axes are kept with length 1, or over each label."""
        if self.groups is None:
            axes = self.group_axes
            if 0 in axes and 0 < x.shape[0] <= FEW:
                # XLA for CPUs sums over a short first axis slowly: isotropic total variation took twice the time.
                parts = [x[i : i + 1] for i in range(x.shape[0])]
                x, axes = sum(parts[1:], parts[0]), tuple(i for i in axes if i != 0)
            return jnp.sum(x, axis=axes, keepdims=True)
        if x.ndim == 0 or x.shape[0] != np.shape(self.groups)[0]:
            raise ValueError(
                f"{np.shape(self.groups)[0]} labels need an array of as many rows, given the shape {x.shape}"
            )
        # A running sum, so 16-bit floats are summed in 32 bits.
        rows = jnp.sum(x.reshape(x.shape[0], -1), axis=1, dtype=jnp.promote_types(x.dtype, jnp.float32))
        return jax.ops.segment_sum(rows, self.groups, self.num_groups).astype(x.dtype)

    def _spread(self, numbers: FloatArray, x: FloatArray) -> FloatArray:
        """The number of each group, at all entries of the group."""
        if self.groups is None:
            return numbers
        return jnp.asarray(numbers)[self.groups].reshape(-1, *(1 for _ in x.shape[1:]))

    def _lengths(self, x: FloatArray) -> FloatArray:
        squares = self._sums(x * x)
        # The root has no finite slope at 0: a group of zeros gets 0, a subgradient of the length.
        return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), squares)

    def _shorten(self, x: FloatArray, threshold: FloatArray) -> FloatArray:
        """Every group shortened by the threshold, to exactly zero if it is shorter than that."""
        if self.groups is not None and threshold.ndim > 1:
            raise ValueError(
                f"labelled groups need one step and one weight per group, given thresholds of shape {threshold.shape}"
            )
        length = self._lengths(x)
        kept = (length > threshold) | (threshold <= 0)
        scale = 1 - threshold / jnp.where(length > 0, length, 1)
        return jnp.where(self._spread(kept, x), x * self._spread(scale, x), 0)


@pytree
class GroupL2(_Grouped):
    """`weight * sum of ||x_g||_2` over groups of entries that vanish together.

    The groups are the slices of `axis`, one axis or several, such as the channels of a row, or the rows that share a
    label in `groups`, integers `[rows]`; the trailing axes of x belong to their row. There may be one weight per group.
    Labels may change between calls of a compiled program if `num_groups`, by default found from them, does not.

    Prox: `x_g * max(0, 1 - step * weight / ||x_g||)`. Source: Yuan and Lin, "Model selection and estimation in
    regression with grouped variables", 2006.

    Raises:
        ValueError: for labels that are not a row of integers from 0 on; for traced labels without `num_groups`; in the
            methods, for an array with another number of rows.

    Example:
        >>> so.GroupL2(1.0).prox(jnp.array([[3.0, 4.0], [0.5, 0.5]]), step=1.0)  # rows shrink together
        Array([[2.4, 3.2],
               [0. , 0. ]], dtype=float32)
        >>> so.GroupL2(1.0, groups=[0, 1, 0]).prox(jnp.array([3.0, 0.5, 4.0]), step=1.0)  # the first and the last
        Array([2.4, 0. , 3.2], dtype=float32)
    """

    weight: Any
    axis: int | tuple[int, ...] = static(default=-1)
    groups: Any = None
    num_groups: int | None = static(default=None)

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return jnp.sum(self.weight * self._lengths(x))

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        return self._shorten(x, jnp.asarray(step * self.weight, x.dtype))

    def project_dual(self, dual: FloatArray) -> FloatArray:
        length = self._lengths(dual)
        weight = jnp.asarray(self.weight, dual.dtype)
        return dual * self._spread(jnp.where(length > weight, weight / jnp.where(length > 0, length, 1), 1), dual)

    def slack(self, x: FloatArray, dual: FloatArray) -> FloatArray:
        return jnp.asarray(self.weight, x.dtype) * self._lengths(x) - self._sums(dual * x)

    def dual_norm(self, dual: FloatArray) -> Float[Array, ""]:
        return largest_ratio(self._lengths(dual), self.weight)


@pytree
class SparseGroup(_Grouped):
    """`weight * ||x||_1 + group_weight * sum of ||x_g||_2`: few groups, and few entries in each of them.

    Groups are given as in `GroupL2`, with the same errors. `weight` may be an array that broadcasts to x, and
    `group_weight` one number per group.

    Prox: soft threshold at `step * weight`, then the prox of `GroupL2`. Sources: Friedman, Hastie and Tibshirani, "A
    note on the group lasso and a sparse group lasso", 2010; Simon, Friedman, Hastie and Tibshirani, "A sparse-group
    lasso", 2013.

    Example:
        >>> penalty = so.SparseGroup(1.0, group_weight=1.0)
        >>> penalty.prox(jnp.array([[4.0, -5.0, 0.5], [1.5, 1.5, 1.5]]), step=1.0)
        Array([[ 2.4, -3.2,  0. ],
               [ 0. ,  0. ,  0. ]], dtype=float32)
    """

    weight: Any
    group_weight: Any
    axis: int | tuple[int, ...] = static(default=-1)
    groups: Any = None
    num_groups: int | None = static(default=None)
    least = ("weight", "group_weight")

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return jnp.sum(self.weight * jnp.abs(x)) + jnp.sum(self.group_weight * self._lengths(x))

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        shrunk = soft_threshold(x, jnp.asarray(step * self.weight, x.dtype))
        return self._shorten(shrunk, jnp.asarray(step * self.group_weight, x.dtype))

    def project_dual(self, dual: FloatArray) -> FloatArray:
        return dual - self.prox(dual, 1.0)

    def slack(self, x: FloatArray, dual: FloatArray) -> FloatArray:
        weight, group_weight = jnp.asarray(self.weight, x.dtype), jnp.asarray(self.group_weight, x.dtype)
        return self._sums(weight * jnp.abs(x) - dual * x) + group_weight * self._lengths(x)

    def dual_norm(self, dual: FloatArray) -> Float[Array, ""]:
        """The largest t with `||soft(dual_g, t weight)|| = t group_weight`, with Newton's method from below.

        With `s = soft(|dual_g|, t weight)` a step is `t = <|dual_g|, s> / value(s)`: without cancellation, and never
        above the dual norm.
        """
        largest = jnp.max(jnp.abs(dual), initial=0)
        size = jnp.abs(dual) / jnp.where(largest > 0, largest, 1)  # its squares neither overflow nor vanish
        weight, group_weight = jnp.asarray(self.weight, dual.dtype), jnp.asarray(self.group_weight, dual.dtype)

        def reached(s: FloatArray) -> FloatArray:
            along = self._sums(size * s)
            return jnp.where(along > 0, along / (self._sums(weight * s) + group_weight * self._lengths(s)), 0)

        def raised(carry: tuple[FloatArray, Array]) -> tuple[FloatArray, Array]:
            level, _ = carry
            higher = jnp.maximum(level, reached(jnp.maximum(size - self._spread(level, size) * weight, 0)))
            return higher, jnp.any(higher > level * (1 + 2 * jnp.finfo(dual.dtype).eps))

        level, _ = jax.lax.while_loop(lambda carry: carry[1], raised, (reached(size), jnp.asarray(True)))
        return largest * jnp.max(level, initial=0)


@pytree
class NuclearNorm(Limited):
    """`weight * sum of the singular values` of a matrix `[m, n]`; prox: soft threshold of the singular values.

    16-bit floats are decomposed in 32 bits; an array of other shapes is a ValueError. Source: Cai, Candès and Shen,
    "A singular value thresholding algorithm for matrix completion", 2010, theorem 2.1.

    Example:
        >>> so.NuclearNorm(1.0).prox(jnp.array([[3.0, 0.0], [0.0, 0.5]]), step=1.0)  # of rank 1
        Array([[2., 0.],
               [0., 0.]], dtype=float32)
    """

    weight: Any
    even = True
    couples_rows = True

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return jnp.asarray(self.weight * jnp.sum(jnp.linalg.svd(_wide(x), compute_uv=False)), x.dtype)

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        wide = _wide(x)
        return threshold_singular_values(wide, jnp.asarray(step * self.weight, wide.dtype)).astype(x.dtype)

    def project_dual(self, dual: FloatArray) -> FloatArray:
        left, values, right = _decomposed(_wide(dual))
        return product(left * jnp.minimum(values, self.weight), right).astype(dual.dtype)

    def slack(self, x: FloatArray, dual: FloatArray) -> FloatArray:
        """`weight s_i - <dual, l_i r_iᵀ> s_i` over the singular values and vectors of x."""
        left, values, right = _decomposed(_wide(x))
        along = jnp.sum(left * product(_wide(dual), right.T), axis=0)
        return ((self.weight - along) * values).astype(x.dtype)

    def dual_norm(self, dual: FloatArray) -> Float[Array, ""]:
        return largest_ratio(jnp.linalg.svd(_wide(dual), compute_uv=False), self.weight).astype(dual.dtype)


def _wide(x: FloatArray) -> FloatArray:
    if x.ndim != 2:
        raise ValueError(f"singular values need a matrix [m, n], given the shape {x.shape}")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


_decomposed = partial(jnp.linalg.svd, full_matrices=False)


@jax.custom_jvp
def threshold_singular_values(x: Float[Array, "m n"], threshold: Scalar) -> Float[Array, "m n"]:
    """`sum of max(s_i - threshold, 0) l_i r_iᵀ` over the singular values and vectors of x.

    Its derivative is written out: JAX would differentiate the vectors, which have infinite derivatives where singular
    values are equal.
    """
    left, values, right = _decomposed(x)
    return product(left * jnp.maximum(values - threshold, 0), right)


@threshold_singular_values.defjvp
def _threshold_singular_values_jvp(primals: tuple, tangents: tuple) -> tuple[FloatArray, FloatArray]:
    """With f(s) = max(s - threshold, 0), entry i, j of `Lᵀ dX R` is scaled by a difference quotient of f.

    The quotient is between s_i and s_j in the symmetric part, between s_i and -s_j (f is continued oddly) in the other,
    and f(s) / s where dX leaves the span of L or R. All lie in [0, 1]. Source: Candès, Sing-Long and Trzasko, "Unbiased
    risk estimates for singular value thresholding and spectral estimators", 2013, section 3.
    """
    (x, threshold), (x_dot, threshold_dot) = primals, tangents
    left, values, right = _decomposed(x)
    kept, shrunk = values >= threshold, jnp.maximum(values - threshold, 0)
    both = (kept[:, None] & kept).astype(x.dtype)

    def quotient(rise: FloatArray, run: FloatArray, at_zero: FloatArray) -> FloatArray:
        return jnp.where(run == 0, at_zero, rise / jnp.where(run == 0, 1, run))

    # Between two kept values the quotient is 1, without the cancellation of close values.
    apart = jnp.where(both > 0, 1, quotient(shrunk[:, None] - shrunk, values[:, None] - values, both))
    together = quotient(shrunk[:, None] + shrunk, values[:, None] + values, both)
    own = quotient(shrunk, values, kept.astype(x.dtype))
    inner = product(product(left.T, x_dot), right.T)
    moved = 0.5 * (apart * (inner + inner.T) + together * (inner - inner.T)) - jnp.diag(kept * threshold_dot)
    beyond_left = product(x_dot, right.T) - product(left, inner)
    beyond_right = product(left.T, x_dot) - product(inner, right)
    change = product(product(left, moved) + beyond_left * own, right) + product(left * own, beyond_right)
    return product(left * shrunk, right), change
