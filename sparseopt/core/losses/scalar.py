"""The loss of one observation, `f(x; y)`: what it needs, those there are, and their names. Public as `so.scalar`.

Every loss is scaled so that `f >= 0`, with 0 at the best x for the observation alone: half the deviance of its
distribution. Its conjugate is `f*(s; y) = max over x of s x - f(x; y)`. The trend filter takes one at every node, and
`data.py` those of many observations with a matrix.
"""

from typing import Any, Protocol, runtime_checkable

import numpy as np

from sparseopt.core.base.arguments import own_refusal, unknown
from sparseopt.core.base.types import FloatArray
from sparseopt.core.losses.counts_and_labels import Logistic, Poisson, SquaredHinge
from sparseopt.core.losses.residuals import Absolute, Huber, Quantile, Squared

__all__ = ["Absolute", "Huber", "Logistic", "Poisson", "Quantile", "ScalarLoss", "Squared", "SquaredHinge"]


@runtime_checkable
class ScalarLoss(Protocol):
    """The loss of one observation, a frozen pytree; its methods on arrays are elementwise.

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


# Those that need no parameter, by their names in configs, on the command line and in the estimator.
LOSSES: dict[str, ScalarLoss] = {
    "square": Squared(),
    "poisson": Poisson(),
    "logistic": Logistic(),
    "squared_hinge": SquaredHinge(),
    "huber": Huber(),
    "absolute": Absolute(),
}


def checked_scalar(loss: Any) -> ScalarLoss:
    """The loss of one observation, by object or name; a ValueError or TypeError for what is none."""
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(unknown("loss", loss, LOSSES))
        return LOSSES[loss]
    if isinstance(getattr(loss, "scalar", None), ScalarLoss):
        raise TypeError(
            "a loss here is that of one observation, given one of data, which are the signal: write "
            f"sparseopt.scalar.{loss.scalar}"
        )
    if isinstance(loss, type) or not isinstance(loss, ScalarLoss):
        raise TypeError(
            f"a loss is a name or an object with the methods of `ScalarLoss`, such as sparseopt.scalar.Poisson(); the "
            f'square is "square"; given {loss!r}'
        )
    if reason := own_refusal(loss):
        raise ValueError(reason)
    return loss
