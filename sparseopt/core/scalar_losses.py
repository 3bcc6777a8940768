"""Floor 2: what a loss of one observation at every node is, `sum_j w_j f(x_j; y_j)`, beside the square.

Every loss is scaled so that `f >= 0`, with 0 at the best x for the observation alone (half the deviance of its
distribution). A loss is a frozen pytree; its methods on arrays are elementwise:

    value(x, y)         f(x; y)
    derivative(x, y)    a subgradient in x, 0 where 0 is one
    prox(x, y, step)    argmin_u 1/2 (u - x)² + step f(u; y),    step >= 0, one for all or one an entry
    dual_range(y)       the ends of the domain of the conjugate f*(s; y) = sup_x s x - f(x; y)
    slack(x, s, y)      f(x; y) + f*(s; y) - s x for s in that domain: never negative, 0 iff s is a subgradient at x
    mean(x)             the mean of the observation at x

Four more run on the host, on NumPy columns `[n]`: `wrong`, `location`, `curvature` and `span`.

Two further members are optional, for a loss of your own too:

    smooth              True where the derivative of f in x is continuous; a loss without it counts as not smooth
    refuses()           on the host: why the loss's own parameters are no good, or None

The losses are in `count_and_label_losses.py` and, for functions of `x - y`, in `residual_losses.py`.
"""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float

FloatArray = Float[Array, "..."]


@runtime_checkable
class ScalarLoss(Protocol):
    """What the trend filter asks of a loss; see the head of this file for the elementwise methods."""

    expected: str  # what an observation must be, for the error text
    unbounded: str  # which observations alone in a component have no finite fit, for the error text
    span_holds_fit: bool  # whether a fit of order 0 lies within `span`

    def value(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """The loss, entry by entry."""

    def derivative(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """A subgradient in x."""

    def prox(self, x: FloatArray, y: FloatArray, step: Any) -> FloatArray:
        """`argmin_u 1/2 (u - x)² + step value(u, y)`, entry by entry."""

    def dual_range(self, y: FloatArray) -> tuple[Any, Any]:
        """The ends of the conjugate's domain."""

    def slack(self, x: FloatArray, dual: FloatArray, y: FloatArray) -> FloatArray:
        """`value(x, y) + conjugate(dual, y) - dual x`, without cancellation."""

    def mean(self, x: FloatArray) -> FloatArray:
        """The mean of an observation at x."""

    def wrong(self, y: np.ndarray) -> np.ndarray:
        """Where y lies outside the domain."""

    def location(self, y: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The constant of least loss of every label `0..max`; infinite where there is none."""

    def curvature(self, y: np.ndarray, weights: np.ndarray, fit: np.ndarray) -> np.ndarray:
        """A guess at the second derivative at the answer, positive `[n]`, from the constant fit."""

    def span(self, y: np.ndarray) -> tuple[float, float]:
        """The least and the largest fit that the observations suggest one by one."""
