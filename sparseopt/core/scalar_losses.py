"""Floor 2: the loss of one observation at every node, `sum_j w_j f(x_j; y_j)`, other than the square.

Every loss is scaled so that `f >= 0`, with 0 at the best x for the observation alone: half the deviance of its
distribution. Its conjugate is `f*(s; y) = max over x of s x - f(x; y)`. The losses are in `count_and_label_losses.py`
and, for functions of `x - y`, in `residual_losses.py`.
"""

from typing import Any, Protocol, runtime_checkable

import numpy as np

from sparseopt.core.types import FloatArray


@runtime_checkable
class ScalarLoss(Protocol):
    """What the trend filter and `Composed` need of a loss, a frozen pytree; its methods on arrays are elementwise.

    Two further members are optional: `smooth`, True if the derivative of f in x is continuous (a loss without it counts
    as not smooth), and `refuses()`, which says on the host why the loss's own parameters cannot be used, or None.
    """

    expected: str  # what an observation must be, for the error text
    unbounded: str  # which observations alone in a component have no finite fit, for the error text
    span_holds_fit: bool  # whether a fit of order 0 lies within `span`

    def value(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """`f(x; y)`."""

    def derivative(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """A subgradient in x, 0 where 0 is one."""

    def prox(self, x: FloatArray, y: FloatArray, step: Any) -> FloatArray:
        """`argmin_u 1/2 (u - x)² + step f(u; y)`; `step >= 0` is one number, or one per entry."""

    def dual_range(self, y: FloatArray) -> tuple[Any, Any]:
        """The ends of the domain of the conjugate."""

    def slack(self, x: FloatArray, dual: FloatArray, y: FloatArray) -> FloatArray:
        """`f(x; y) + f*(dual; y) - dual x >= 0` for a dual in that domain; 0 iff it is a subgradient at x."""

    def mean(self, x: FloatArray) -> FloatArray:
        """The mean of an observation at x."""

    def wrong(self, y: np.ndarray) -> np.ndarray:
        """On the host: where y lies outside the domain."""

    def location(self, y: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """On the host: the constant of least loss for every label `0..max`; infinite if none is finite."""

    def curvature(self, y: np.ndarray, weights: np.ndarray, fit: np.ndarray) -> np.ndarray:
        """On the host: a positive guess `[n]`, from the constant fit, of the second derivative at the answer."""

    def span(self, y: np.ndarray) -> tuple[float, float]:
        """On the host: the least and the largest fit that single observations suggest."""
