"""Floor 2.5: a scalar loss at every node, with weights and missing values, and its part of a duality gap."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.fidelity import total
from sparseopt.core.types import pytree

FloatArray = Float[Array, "..."]


@pytree
class NodeLoss:
    """`value(x) = sum_j w_j f(x_j; signal_j)`; a weight of 0 marks a missing observation.

    Attributes:
        family: f, a `ScalarLoss`.
        signal: `[*nodes]` or `[*nodes, channels]`.
        weights: `[*nodes]` (with a trailing axis of length 1 where there are channels), or None for ones.
        low: lower end of the box in which the fit is taken to lie at missing nodes; a scalar, `[channels]` or None.
        high: its upper end.
    """

    family: Any
    signal: Any
    weights: Any = None
    low: Any = None
    high: Any = None

    matrix = None  # that of a `MatrixLoss`: the identity

    @property
    def smooth(self) -> bool:
        """Whether f has a continuous derivative."""
        return getattr(self.family, "smooth", False)

    @property
    def rows(self) -> "NodeLoss":
        """The loss as a function of `z = x`."""
        return self

    def weigh(self, x: FloatArray) -> FloatArray:
        """`w * x`."""
        return x if self.weights is None else self.weights * x

    def value(self, x: FloatArray) -> Float[Array, ""]:
        """The loss at x."""
        return total(self.weigh(self.family.value(x, self.signal)))

    def gradient(self, x: FloatArray) -> FloatArray:
        """A subgradient at x."""
        return self.weigh(self.family.derivative(x, self.signal))

    def prox(self, x: FloatArray, step: Any) -> FloatArray:
        """`argmin_u 1/2 ||u - x||² + step value(u)`; step is one number or one an entry."""
        return self.family.prox(x, self.signal, self.weigh(jnp.broadcast_to(step, x.shape)))

    def slope(self, q: FloatArray) -> FloatArray:
        """`-q / w`, 0 at missing nodes."""
        if self.weights is None:
            return -q
        seen = self.weights > 0
        return jnp.where(seen, -q / jnp.where(seen, self.weights, 1), 0)

    def feasible_share(self, q: FloatArray, anchor: FloatArray) -> Float[Array, ""]:
        """The largest share s in [0, 1] with `anchor + s (q - anchor)` in the domain of the conjugate of -q.

        The domain is convex, so every smaller share is in it too. `anchor`, of the kind of q, must be in it.
        Missing nodes have no say: their conjugate is that of the box.
        """
        slope, safe = self.slope(q), self.slope(anchor)
        low, high = self.family.dual_range(self.signal)
        outside = (slope < low) | (slope > high)
        end = jnp.where(slope > high, high, low)
        apart = jnp.where(outside, slope - safe, 1)
        share = jnp.clip(jnp.where(outside, (end - safe) / apart, 1), 0, 1)
        least = jnp.min(share)
        # A share that lies on the boundary is pulled inside by its rounding error.
        return jnp.where(least < 1, least * (1 - 4 * jnp.finfo(q.dtype).eps), 1)

    def slack(self, x: FloatArray, q: FloatArray) -> Float[Array, ""]:
        """`value(x) + conjugate(-q) + <q, x>` for q in the domain, by terms that are not negative.

        At a missing node the conjugate is that of the box, and the term is `q x - min(q low, q high)`.
        """
        slack = self.weigh(self.family.slack(x, self.slope(q), self.signal))
        if self.weights is None:
            return total(slack)
        boxed = q * x - jnp.minimum(q * self.low, q * self.high)
        return total(jnp.where(self.weights > 0, slack, boxed))
