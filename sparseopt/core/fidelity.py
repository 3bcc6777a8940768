"""Floor 2: the node-weighted squared distance to a signal, and sums that keep their accuracy in float32."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.mesh import parts_at_work
from sparseopt.core.types import pytree

FloatArray = Float[Array, "..."]
BLOCK = 256


def total(x: FloatArray) -> Float[Array, ""]:
    """The sum of all entries: of float64 at once, of shorter floats by blocks of 256 in two or more levels.

    The relative error on entries of one sign is about `256 eps` in the worst case and a few eps in practice,
    where one running sum over a million float32 entries loses three digits. To sum float32 entries in float64 would
    serve as well, but XLA for CPUs (jaxlib 0.10.2) gets such sums wrong where it fuses them with stencils of three
    axes.
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
    """`total` of an array of which some axis is cut into equal parts: axis by axis, and a cut one within its parts.

    Which one that is cannot be told here; an axis of so many parts is taken for one, where it is none to no harm.
    """
    for axis in reversed(range(x.ndim)):
        pieces = parts if x.shape[axis] % parts == 0 else 1
        x = x.reshape(*x.shape[:axis], pieces, -1, *x.shape[axis + 1 :])
        while x.shape[axis + 1] > 1:
            size = min(BLOCK, x.shape[axis + 1])
            widths = [(0, 0)] * x.ndim
            widths[axis + 1] = (0, -x.shape[axis + 1] % size)
            x = jnp.pad(x, widths)
            x = x.reshape(*x.shape[: axis + 1], -1, size, *x.shape[axis + 2 :]).sum(axis=axis + 2)
        x = x.reshape(*x.shape[: axis + 1], *x.shape[axis + 2 :])
    return jnp.sum(x)


@pytree
class NodeSquares:
    """`value(x) = 1/2 sum_j w_j (x_j - center_j)²`; a weight of 0 marks a missing observation.

    Attributes:
        center: the signal, `[*nodes]` or `[*nodes, channels]`.
        weights: `[*nodes]` (with a trailing axis of length 1 where there are channels), or None for ones.
        low: lower end of the box in which the fit is known, or taken, to lie at missing nodes; a scalar or None.
        high: its upper end.
        padding: the entries of the arrays over those of the nodes, where they are padded; None for 1.
    """

    center: Any
    weights: Any = None
    low: Any = None
    high: Any = None
    padding: Any = None

    def mean_square(self, x: FloatArray) -> Float[Array, ""]:
        """The mean of `x²` over the nodes."""
        mean = total(x * x) / x.size
        return mean if self.padding is None else mean * self.padding

    def weigh(self, x: FloatArray) -> FloatArray:
        """`w * x`."""
        return x if self.weights is None else self.weights * x

    def gradient(self, x: FloatArray) -> FloatArray:
        """`w * (x - center)`."""
        return self.weigh(x - self.center)

    def value(self, x: FloatArray) -> Float[Array, ""]:
        """The loss at x."""
        apart = x - self.center
        return 0.5 * total(self.weigh(apart) * apart)

    def observed(self, x: FloatArray) -> FloatArray:
        """X where it is observed, 0 at missing nodes."""
        return x if self.weights is None else jnp.where(self.weights > 0, x, 0)

    def slack(self, x: FloatArray, q: FloatArray) -> Float[Array, ""]:
        """`value(x) + conjugate(-q) + <q, x>` for q the transposed operator at a dual point, term by term.

        At an observed node the term is `1/2 w (x - center + q / w)²`. At a missing node the conjugate is that
        of the box, and the term is `q x - min(q low, q high)`. Nothing cancels, so float32 suffices.
        """
        if self.weights is None:
            return 0.5 * total((x - self.center + q) ** 2)
        seen = self.weights > 0
        weights = jnp.where(seen, self.weights, 1)
        squares = 0.5 * weights * (x - self.center + q / weights) ** 2
        boxed = q * x - jnp.minimum(q * self.low, q * self.high)
        return total(jnp.where(seen, squares, boxed))
