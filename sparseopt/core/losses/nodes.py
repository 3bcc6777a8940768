"""Losses of a signal at the nodes, with weights and missing values, and sums that are accurate in float32."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.base.mesh import parts_at_work
from sparseopt.core.base.types import FloatArray, pytree
from sparseopt.core.operators.differences import padded

BLOCK = 256


def total(x: FloatArray) -> Float[Array, ""]:
    """The sum of all entries: of float64 at once, of shorter floats by blocks of 256 in two or more levels.

    The relative error on entries of one sign is about `256 eps` in the worst case and a few eps in practice; a running
    sum over a million float32 entries loses three digits. Summing float32 entries in float64 would also work, but XLA
    for CPUs (jaxlib 0.10.2) gets such sums wrong when it fuses them with stencils of three axes.
    """
    if x.dtype == jnp.float64:
        return jnp.sum(x)
    if (parts := parts_at_work()) > 1:
        return _total_apart(x, parts)
    flat = x.reshape(-1)
    while flat.size > BLOCK:
        flat = jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK).sum(axis=1)
    return jnp.sum(flat)


def _total_apart(x: FloatArray, parts: int) -> Float[Array, ""]:
    """`total` of an array of which one axis is cut into equal parts: axis by axis, the cut one within its parts.

    Which axis is cut is not known here. Every axis that `parts` divides is treated as cut, which does no harm.
    """
    for axis in reversed(range(x.ndim)):
        pieces = parts if x.shape[axis] % parts == 0 else 1
        x = x.reshape(*x.shape[:axis], pieces, -1, *x.shape[axis + 1 :])
        while x.shape[axis + 1] > 1:
            size = min(BLOCK, x.shape[axis + 1])
            x = padded(x, axis + 1, 0, -x.shape[axis + 1] % size)
            x = x.reshape(*x.shape[: axis + 1], -1, size, *x.shape[axis + 2 :]).sum(axis=axis + 2)
        x = x.reshape(*x.shape[: axis + 1], *x.shape[axis + 2 :])
    return jnp.sum(x)


class _AtNodes:
    """Node weights, of which 0 marks a missing observation, and the box that holds the fit at missing nodes."""

    weights: Any
    low: Any
    high: Any

    def weigh(self, x: FloatArray) -> FloatArray:
        return x if self.weights is None else self.weights * x

    def _total_slack(self, slack: FloatArray, x: FloatArray, q: FloatArray) -> Float[Array, ""]:
        """The sum of `slack`, with `q x - min(q low, q high)` at missing nodes, where the conjugate is the box's.

        Where x lies outside the box, the box reaches to it: no term may be negative and cancel others.
        """
        if self.weights is None:
            return total(slack)
        low, high = jnp.minimum(self.low, x), jnp.maximum(self.high, x)
        return total(jnp.where(self.weights > 0, slack, q * x - jnp.minimum(q * low, q * high)))


@pytree
class NodeSquares(_AtNodes):
    """`value(x) = 1/2 sum_j w_j (x_j - center_j)²`; a weight of 0 marks a missing observation."""

    center: Any  # the signal, `[*nodes]` or `[*nodes, channels]`
    weights: Any = None  # `[*nodes]` (with a trailing axis of length 1 where there are channels), or None for ones
    # Lower end of the box that holds, or is assumed to hold, the fit at missing nodes; a scalar or None.
    low: Any = None
    high: Any = None  # its upper end
    padding: Any = None  # the number of entries of an array over the number of nodes, if arrays are padded; None for 1

    def mean_square(self, x: FloatArray) -> Float[Array, ""]:
        """The mean of `x²` over the nodes."""
        mean = total(x * x) / x.size
        return mean if self.padding is None else mean * self.padding

    def gradient(self, x: FloatArray) -> FloatArray:
        return self.weigh(x - self.center)

    def value(self, x: FloatArray) -> Float[Array, ""]:
        apart = x - self.center
        return 0.5 * total(self.weigh(apart) * apart)

    def observed(self, x: FloatArray) -> FloatArray:
        """`x` where it is observed, 0 at missing nodes."""
        return x if self.weights is None else jnp.where(self.weights > 0, x, 0)

    def slack(self, x: FloatArray, q: FloatArray) -> Float[Array, ""]:
        """`value(x) + conjugate(-q) + <q, x>` for q the transposed operator at a dual point, term by term.

        At an observed node the term is `1/2 w (x - center + q / w)²`. Nothing cancels, so float32 suffices.
        """
        if self.weights is None:
            return 0.5 * total((x - self.center + q) ** 2)
        weights = jnp.where(self.weights > 0, self.weights, 1)
        return self._total_slack(0.5 * weights * (x - self.center + q / weights) ** 2, x, q)


@pytree
class NodeLoss(_AtNodes):
    """`value(x) = sum_j w_j f(x_j; signal_j)`; a weight of 0 marks a missing observation."""

    family: Any  # f, a `ScalarLoss`
    signal: Any  # `[*nodes]` or `[*nodes, channels]`
    weights: Any = None  # `[*nodes]` (with a trailing axis of length 1 where there are channels), or None for ones
    # Lower end of the box that is assumed to hold the fit at missing nodes; a scalar, `[channels]` or None.
    low: Any = None
    high: Any = None  # its upper end

    matrix = None  # that of a `MatrixLoss`: the identity

    @property
    def smooth(self) -> bool:
        return getattr(self.family, "smooth", False)

    @property
    def rows(self) -> "NodeLoss":
        return self

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return total(self.weigh(self.family.value(x, self.signal)))

    def gradient(self, x: FloatArray) -> FloatArray:
        return self.weigh(self.family.derivative(x, self.signal))

    def prox(self, x: FloatArray, step: Any) -> FloatArray:
        """`argmin_u 1/2 ||u - x||² + step value(u)`; step is one number, or one per entry."""
        return self.family.prox(x, self.signal, self.weigh(jnp.broadcast_to(step, x.shape)))

    def slope(self, q: FloatArray) -> FloatArray:
        """`-q / w`, 0 at missing nodes."""
        if self.weights is None:
            return -q
        seen = self.weights > 0
        return jnp.where(seen, -q / jnp.where(seen, self.weights, 1), 0)

    def feasible_share(self, q: FloatArray, anchor: FloatArray) -> Float[Array, ""]:
        """The largest share s in [0, 1] with `anchor + s (q - anchor)` in the domain of the conjugate of -q.

        The domain is convex, so it holds every smaller share too. `anchor` must lie in it. Missing nodes do not limit
        the share: their conjugate is that of the box.
        """
        slope, safe = self.slope(q), self.slope(anchor)
        low, high = self.family.dual_range(self.signal)
        outside = (slope < low) | (slope > high)
        end = jnp.where(slope > high, high, low)
        apart = jnp.where(outside, slope - safe, 1)
        share = jnp.clip(jnp.where(outside, (end - safe) / apart, 1), 0, 1)
        least = jnp.min(share)
        # A share on the boundary is pulled inside by its rounding error.
        return jnp.where(least < 1, least * (1 - 4 * jnp.finfo(q.dtype).eps), 1)

    def slack(self, x: FloatArray, q: FloatArray) -> Float[Array, ""]:
        """`value(x) + conjugate(-q) + <q, x>` for q in the domain, by terms that are not negative."""
        return self._total_slack(self.weigh(self.family.slack(x, self.slope(q), self.signal)), x, q)
