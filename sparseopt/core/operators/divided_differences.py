"""Divided differences with free ends: on a chain, at times that need not be even, and along a grid's axes.

    (D^(1) x)_i = x_i - x_(i+1),        D^(m+1) = D^(1) diag( m / (t_(i+m) - t_i) ) D^(m)

`D^(m)` has `n - m` rows, of full rank, and vanishes on the polynomials in t of degree below m, and on nothing else. At
the times 0, 1, 2, ... its rows are the binomial coefficients of sign +, -, +, ...: `D^(2)` has 1, -2, 1. It is the
operator of R's genlasso and glmgen (their `pos` or `x` is t) up to the sign `(-1)^m`, which affects no penalty here.

Source: Kim, Koh, Boyd, Gorinevsky, "l1 trend filtering", SIAM Review 51 (2009), for even times; Tibshirani, "Adaptive
piecewise polynomial estimation via trend filtering", Annals of Statistics 42 (2014), section 6, and Ramdas and
Tibshirani, "Fast and flexible ADMM algorithms for trend filtering", 2016, for any times; Sadhanala, Wang, Hu,
Tibshirani, "Multivariate trend filtering for lattice data", 2021, for grids.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from sparseopt.core.base.arguments import real_array
from sparseopt.core.base.types import FloatArray, pytree, static
from sparseopt.core.operators.differences import pad, spread
from sparseopt.core.operators.maps import Stack

# Nearly equal times make nearly parallel rows, up to this many times their neighbours; a solve loses the square in
# digits. On chains of 24 nodes with two or three near times, at orders 1 to 3 and weights of 0.5, 5 and 50 % of the
# largest, "auto" certified 21 of 39 fits in float64 up to this ratio, 5 of 21 up to ten times it and 0 of 48 beyond; in
# float32 45 of 66 up to it and 0 of 24 beyond.
LARGEST_RATIO = {"float32": 5e4, "float64": 5e5}


@pytree
class DividedDifference:
    """`D^(order)` along an axis of arrays of a shape, which it shortens by `order`: `[n]` to `[n - order]` on a chain.

    Example:
        >>> from sparseopt.core.operators.divided_differences import divided_difference
        >>> bend = divided_difference(None, 5, 2, jnp.float32)
        >>> bend.mv(jnp.array([0.0, 1.0, 2.0, 3.0, 5.0]))  # straight, then a bend
        Array([0., 0., 1.], dtype=float32)
        >>> uneven = divided_difference(np.array([0.0, 1.0, 2.0, 3.0, 5.0]), 5, 2, jnp.float32)
        >>> uneven.mv(jnp.array([0.0, 1.0, 2.0, 3.0, 5.0]))  # straight in those times
        Array([0., 0., 0.], dtype=float32)
    """

    # `m / (t_(i+m) - t_i)`, `[n - m]`, for m = 1, 2, ..., each applied after that many differences; none for the times
    # 0, 1, 2, ...
    scales: tuple[Any, ...]
    in_shape: tuple[int, ...] = static()
    order: int = static()  # at least 1
    axis: int = static(default=0)  # 0 if there are scales
    unit: float = static(default=1.0)  # what divides the rows

    @property
    def out_shape(self) -> tuple[int, ...]:
        return tuple(n - self.order * (i == self.axis) for i, n in enumerate(self.in_shape))

    def _scale(self, x: FloatArray, taken: int) -> Any:
        """The factor of x, the result of `taken` differences."""
        return spread(self.scales[taken - 1], x) if taken <= len(self.scales) else 1

    def mv(self, x: FloatArray) -> FloatArray:
        for taken in range(1, self.order + 1):
            x = jax.lax.slice_in_dim(x, 0, -1, axis=self.axis) - jax.lax.slice_in_dim(x, 1, None, axis=self.axis)
            x = x * self._scale(x, taken)
        return x / self.unit

    def rmv(self, e: FloatArray) -> FloatArray:
        for taken in range(self.order, 0, -1):
            e = e * self._scale(e, taken)
            e = pad(e, self.axis, 0, 1) - pad(e, self.axis, 1, 0)
        return e / self.unit

    def potential(self, pull: FloatArray) -> FloatArray:
        """The only e of a chain with `rmv(e) = pull`, for a pull orthogonal to polynomials of degree below `order`."""
        for taken in range(1, self.order + 1):
            pull = jnp.cumsum(pull, axis=0)[:-1]
            pull = pull / self._scale(pull, taken)
        return pull

    def steps(self) -> list[sparse.csr_array]:
        """A matrix for each difference of a line and the scale after it, in their order, on the host in float64."""
        found = []
        for taken in range(1, self.order + 1):
            rows = self.in_shape[self.axis] - taken
            step = sparse.diags_array([1.0, -1.0], offsets=[0, 1], shape=(rows, rows + 1))
            if taken <= len(self.scales):
                step = sparse.diags_array(np.asarray(self.scales[taken - 1], np.float64)) @ step
            found.append(sparse.csr_array(step))
        return found

    def matrix(self) -> sparse.csr_array:
        """The map on the host, in float64."""
        line = functools.reduce(lambda found, step: step @ found, self.steps()) / self.unit
        before, after = (math.prod(part) for part in (self.in_shape[: self.axis], self.in_shape[self.axis + 1 :]))
        if before * after > 1:
            line = sparse.kron(sparse.kron(sparse.eye_array(before), line), sparse.eye_array(after))
        found = sparse.csr_array(line)
        found.eliminate_zeros()  # zeros of small blocks, which SciPy keeps dense
        found.sort_indices()
        return found


def axis_differences(shape: tuple[int, ...], order: int, spacing: tuple[float, ...] | None = None) -> Stack:
    """The plain differences of an order, at least 1, along every axis of a grid, over that power of the axis's spacing.

    It maps `[*shape]` to `[rows]`: axis by axis the differences of all its lines, in row-major order. An axis of
    at most `order` nodes has none. It vanishes on the sums of products of polynomials of degree below `order` in each
    axis, and on nothing else. `spacing` is None for ones.

    Example:
        >>> from sparseopt.core.operators.divided_differences import axis_differences
        >>> bends = axis_differences((3, 3), order=2)
        >>> bends.mv(jnp.outer(jnp.arange(3.0), jnp.array([0.0, 1.0, 4.0])))  # lines down, parabolas across
        Array([0., 0., 0., 0., 2., 4.], dtype=float32)
    """
    units = [1.0] * len(shape) if spacing is None else [h**order for h in spacing]
    kept = [axis for axis, n in enumerate(shape) if n > order]
    return Stack(tuple(DividedDifference((), shape, order, axis, units[axis]) for axis in kept), order)


def divided_difference(times: np.ndarray | None, n: int, order: int, dtype: Any) -> DividedDifference:
    """The map for checked times, of host arrays.

    A ValueError if squares of its rows overflow or vanish, or if times are nearly equal; see `LARGEST_RATIO`.
    """
    if times is None or order < 2:
        return DividedDifference((), (n,), order)
    limits, scales = np.finfo(dtype), [m / (times[m:] - times[:-m]) for m in range(1, order)]
    # In logarithms, since the product of the scales may overflow.
    high = sum(np.log10(2 * scale.max()) for scale in scales)
    low = sum(np.log10(scale.min()) for scale in scales)
    if high > np.log10(float(limits.max)) / 2 or low < np.log10(float(limits.tiny)) / 2:
        raise ValueError(
            f"divided differences of order {order} at these times reach from 1e{low:.0f} to 1e{high:.0f}, whose "
            f"squares are beyond {limits.dtype}: divide the times by a typical step"
        )
    _require_apart(times, scales, order, limits)
    return DividedDifference(tuple(scale.astype(dtype) for scale in scales), (n,), order)


def _require_apart(times: np.ndarray, scales: list[np.ndarray], order: int, limits: Any) -> None:
    """Raise a ValueError if rows are too large compared with their neighbours."""
    from scipy import ndimage

    size = np.zeros(len(times))
    for scale in scales:
        size = np.maximum(size[:-1], size[1:]) + np.log10(scale)
    excess = size - ndimage.minimum_filter1d(size, 2 * order + 1)
    row = int(np.argmax(excess))
    if excess[row] > np.log10(LARGEST_RATIO[limits.dtype.name]):
        steps = np.diff(times[row : row + len(scales) + 1])
        first = row + int(np.argmin(steps))
        raise ValueError(
            f"the times of the nodes {first} and {first + 1} are {steps.min():.3g} apart, much closer than their "
            f"neighbours, too close for differences of order {order} in {limits.dtype}: use one node, "
            "with the mean of their values and the sum of their weights"
        )


def check_times(times: Any, n: int) -> np.ndarray:
    """The times of n nodes, `[n]` in float64; a ValueError unless they are finite and increase."""
    found = real_array("times", times).astype(np.float64)
    if found.shape != (n,):
        raise ValueError(f"{n} nodes need as many times, [{n}], given the shape {found.shape}")
    if not np.isfinite(found).all():
        first = int(np.argmin(np.isfinite(found)))
        raise ValueError(f"times are finite, given {found[first]} at node {first}: leave such nodes out")
    late = found[1:] <= found[:-1]
    if late.any():
        first = int(np.argmax(late))
        raise ValueError(
            f"times increase from node to node, given {found[first]:.9g} and then {found[first + 1]:.9g} at node "
            f"{first + 1} ({int(late.sum())} such): sort by time, and average the values of equal times"
        )
    return found


def polynomial_basis(times: np.ndarray | None, n: int, count: int) -> np.ndarray:
    """Orthonormal columns `[n, count]` that span the polynomials in t of degree below `count <= n`."""
    if n == 1:
        return np.ones((1, 1))
    times = np.arange(n, dtype=np.float64) if times is None else times
    # Legendre polynomials on [-1, 1] keep the columns far from parallel.
    centred = 2 * (times - times[0]) / (times[-1] - times[0]) - 1
    return np.linalg.qr(np.polynomial.legendre.legvander(centred, count - 1))[0]
