"""The loss of one observation, `f(x; y)`: what it needs, the package's losses and their names (`so.scalar`).

Every loss is scaled so that `f >= 0`, with 0 at the best x for the observation alone: half the deviance of its
distribution. Its conjugate is `f*(s; y) = max over x of s x - f(x; y)`. The trend filter uses one at every node, and
`data.py` combines many observations with a matrix. Losses of residuals are in `residuals.py`.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.arguments import fits, own_refusal, unknown
from sparseopt.core.base.types import FloatArray, pytree
from sparseopt.core.losses.residuals import Absolute, Huber, Quantile, Squared, weighted_means

__all__ = ["Absolute", "Huber", "Logistic", "Poisson", "Quantile", "ScalarLoss", "Squared", "SquaredHinge"]


@runtime_checkable
class ScalarLoss(Protocol):
    """The loss of one observation, a frozen pytree; its methods on arrays are elementwise.

    Further members are optional: `smooth`, True if the derivative of f in x is continuous (a loss without it counts as
    not smooth); `is_square`, True for `Squared`; `adds_up`, True if the losses of several observations of one x sum, up
    to a constant, to the loss of their weighted mean with their total weight; `counts` and `labels`, True if it
    observes them; `known_variance`, True if the mean of an observation determines its variance; and `refuses()`, which
    says on the host why the loss's own parameters cannot be used, or None.
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
        """On the host: the constant with the smallest loss for every label `0..max`; infinite if none is finite."""

    def curvature(self, y: np.ndarray, weights: np.ndarray, fit: np.ndarray) -> np.ndarray:
        """On the host: a positive guess `[n]`, from the constant fit, of the second derivative at the answer."""

    def span(self, y: np.ndarray) -> tuple[float, float]:
        """On the host: the smallest and the largest fit that single observations suggest."""


def wright_omega(z: FloatArray) -> FloatArray:
    """The w > 0 with `w + log w = z`, to a few eps, entry by entry.

    Source: Fritsch, Shafer and Crowley, "Solution of the transcendental equation w e^w = x", 1973, a step of order
    four.
    """
    # Below this w is e^z to rounding, and log w must stay finite.
    z = jnp.maximum(z, 0.9 * jnp.log(jnp.finfo(z.dtype).tiny))
    small = jnp.exp(jnp.minimum(z, 1))
    w = jnp.where(z < 1, small / (1 + small), z - jnp.log(jnp.maximum(z, 1)))
    for _ in range(2):
        error = z - w - jnp.log(w)
        wide = (1 + w) * (1 + w + 2 / 3 * error)
        w = w * (1 + error / (1 + w) * (wide - error / 2) / (wide - error))
    return w


def _poisson_slack(mean: FloatArray, x: FloatArray) -> FloatArray:
    """`mean log(mean / e^x) - mean + e^x`, the divergence of Poisson distributions."""
    apart = jnp.log(jnp.where(mean > 0, mean, 1)) - x
    near = mean * (apart + jnp.expm1(-jnp.maximum(apart, -1)))
    return jnp.where((mean > 0) & (apart >= -1), jnp.maximum(near, 0), mean * (apart - 1) + jnp.exp(x))


@pytree
class Poisson:
    """Counts with log-rate x: `f = e^x - y x + (y log y - y)`, half the Poisson deviance.

    Example:
        >>> loss = so.scalar.Poisson()
        >>> loss.mean(jnp.log(jnp.array([3.0])))
        Array([3.], dtype=float32)
    """

    expected = "counts, finite and not negative"
    unbounded = "no positive count"
    span_holds_fit = False
    smooth = counts = adds_up = known_variance = True

    def value(self, x: FloatArray, y: FloatArray) -> FloatArray:
        return _poisson_slack(y, x)

    def derivative(self, x: FloatArray, y: FloatArray) -> FloatArray:
        return jnp.exp(x) - y

    def prox(self, x: FloatArray, y: FloatArray, step: Any) -> FloatArray:
        """`u + step e^u = x + step y`, with `wright_omega`."""
        step = jnp.broadcast_to(jnp.asarray(step, x.dtype), x.shape)
        level = x + step * y
        log_step = jnp.log(jnp.where(step > 0, step, 1))
        omega = wright_omega(level + log_step)  # step e^u
        # Each form is accurate where the other cancels.
        u = jnp.where(omega > 1, jnp.log(omega) - log_step, level - omega)
        return jnp.where(step > 0, u, x)

    def dual_range(self, y: FloatArray) -> tuple[Any, Any]:
        """`s + y`, a mean, is not negative."""
        return -y, jnp.inf

    def slack(self, x: FloatArray, dual: FloatArray, y: FloatArray) -> FloatArray:
        """The divergence of the rate e^x from the mean `dual + y`."""
        return _poisson_slack(jnp.maximum(dual + y, 0), x)

    def mean(self, x: FloatArray) -> FloatArray:
        return jnp.exp(x)

    def wrong(self, y: np.ndarray) -> np.ndarray:
        return ~(np.isfinite(y) & (y >= 0))

    def location(self, y: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.log(weighted_means(y, weights, labels))

    def curvature(self, y: np.ndarray, weights: np.ndarray, fit: np.ndarray) -> np.ndarray:
        """The mean of the observed and of the constant rate."""
        return (y + np.exp(fit)) / 2

    def span(self, y: np.ndarray) -> tuple[float, float]:
        """The logarithms of the counts or rates, with half the smallest other one for 0, or 1/2 if there is none."""
        seen = y[y > 0] if (y > 0).any() else np.ones(1)
        return float(np.log(seen.min() / (1 if y.min() > 0 else 2))), float(np.log(seen.max()))


@pytree
class Logistic:
    """Labels 0 or 1, or proportions y in [0, 1] of ones, with log-odds x: half the binomial deviance.

        f = log(1 + e^x) - y x  +  (y log y + (1 - y) log(1 - y))

    The last term is 0 for labels. m labels of the proportion y have the sum `m f(x; y)`, up to a constant.

    Example:
        >>> loss = so.scalar.Logistic()
        >>> loss.mean(jnp.array([0.0]))
        Array([0.5], dtype=float32)
    """

    expected = "labels 0 or 1 or proportions between them"
    unbounded = "only one of the labels 0 and 1"
    span_holds_fit = False
    smooth = labels = adds_up = known_variance = True

    def value(self, x: FloatArray, y: FloatArray) -> FloatArray:
        kind, divided = jnp.result_type(x, y), (y > 0) & (y < 1)
        of_label = jax.nn.softplus(jnp.where(y > 0, -x, x)).astype(kind)

        # The terms of a proportion nearly cancel if the fit is good; the terms of the divergence do not.
        def divergence() -> FloatArray:
            return jnp.where(divided, self.slack(x, jnp.zeros_like(x), y), of_label).astype(kind)

        return jax.lax.cond(jnp.any(divided), divergence, lambda: of_label)

    def derivative(self, x: FloatArray, y: FloatArray) -> FloatArray:
        return jax.nn.sigmoid(x) - y

    def prox(self, x: FloatArray, y: FloatArray, step: Any) -> FloatArray:
        """`u + step sigmoid(u) = x + step y`, with a monotone Newton's method."""
        step = jnp.asarray(step, x.dtype)
        level = x + step * y
        # On u <= 0 the left side is convex; the other half is its mirror image.
        mirrored = level > step / 2
        level = jnp.where(mirrored, step - level, level)
        # e^u >= sigmoid(u) >= e^u / 2: the root for e^u lies at most log 2 below.
        u = jnp.minimum(level - wright_omega(level + jnp.log(jnp.maximum(step, jnp.finfo(x.dtype).tiny))), 0)
        for _ in range(4):
            p = jax.nn.sigmoid(u)
            u = jnp.minimum(u - (u - level + step * p) / (1 + step * p * (1 - p)), 0)
        return jnp.where(mirrored, -u, u)

    def dual_range(self, y: FloatArray) -> tuple[Any, Any]:
        """`s + y`, a probability, lies in [0, 1]."""
        return -y, 1 - y

    def slack(self, x: FloatArray, dual: FloatArray, y: FloatArray) -> FloatArray:
        """The divergence of the probability at x from `dual + y`."""
        p, q = jnp.clip(dual + y, 0, 1), jnp.clip(1 - y - dual, 0, 1)
        # Two divergences whose linear terms cancel: each is accurate where p is near.
        return _poisson_slack(p, -jax.nn.softplus(-x)) + _poisson_slack(q, -jax.nn.softplus(x))

    def mean(self, x: FloatArray) -> FloatArray:
        return jax.nn.sigmoid(x)

    def wrong(self, y: np.ndarray) -> np.ndarray:
        return ~((y >= 0) & (y <= 1))

    def location(self, y: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
        of_ones, of_zeros = np.bincount(labels, weights * y), np.bincount(labels, weights * (1 - y))
        with np.errstate(divide="ignore"):
            return np.log(of_ones) - np.log(of_zeros)

    def curvature(self, y: np.ndarray, weights: np.ndarray, fit: np.ndarray) -> np.ndarray:
        """`p (1 - p)` of the constant fit."""
        return 1 / (2 + np.exp(fit) + np.exp(-fit))

    def span(self, y: np.ndarray) -> tuple[float, float]:
        """Log-odds of 1:100 and 100:1, or the log-odds of a proportion that is further from 1/2."""
        inner = y[(y > 0) & (y < 1)]
        odds = np.concatenate([[0.01, 100], inner / (1 - inner)])
        return float(np.log(odds.min())), float(np.log(odds.max()))


@pytree
class SquaredHinge:
    """Labels -1 or 1 with score x: `f = max(0, 1 - y x)² / 2`.

    Unlike with `Logistic`, a label whose margin `y x` is at least 1 has no pull, so the fit is finite even if all
    labels are equal.

    Source: Cortes and Vapnik, "Support-vector networks", Machine Learning 20 (1995), with the power 2; Zhang,
    "Statistical behavior and consistency of classification methods based on convex risk minimization", Annals of
    Statistics 32 (2004), for the probabilities.

    Example:
        >>> so.scalar.SquaredHinge().value(jnp.array([-1.0, 0.0, 3.0]), 1.0)
        Array([2. , 0.5, 0. ], dtype=float32)
    """

    expected = "labels -1 or 1"
    unbounded = "no label"
    span_holds_fit = True
    smooth = labels = True

    def value(self, x: FloatArray, y: FloatArray) -> FloatArray:
        lack = jnp.maximum(1 - y * x, 0)
        return lack * lack / 2

    def derivative(self, x: FloatArray, y: FloatArray) -> FloatArray:
        return -y * jnp.maximum(1 - y * x, 0)

    def prox(self, x: FloatArray, y: FloatArray, step: Any) -> FloatArray:
        """Shrink `x - y` by the factor `1 + step` if the margin is below 1."""
        step = jnp.asarray(step, x.dtype)
        return x + y * jnp.maximum(1 - y * x, 0) * (step / (1 + step))

    def dual_range(self, y: FloatArray) -> tuple[Any, Any]:
        """`s y` is not positive."""
        return jnp.where(y > 0, -jnp.inf, 0), jnp.where(y > 0, 0, jnp.inf)

    def slack(self, x: FloatArray, dual: FloatArray, y: FloatArray) -> FloatArray:
        """Half the square of `derivative - dual`, plus `-y dual` times the excess of the margin over 1."""
        pull, lack = jnp.maximum(-y * dual, 0), 1 - y * x
        return (jnp.maximum(lack, 0) - pull) ** 2 / 2 + pull * jnp.maximum(-lack, 0)

    def mean(self, x: FloatArray) -> FloatArray:
        """`x`, clipped to [-1, 1]: the label 1 has the probability `(1 + mean) / 2`."""
        return jnp.clip(x, -1, 1)

    def wrong(self, y: np.ndarray) -> np.ndarray:
        return ~(np.abs(y) == 1)

    def location(self, y: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The mean: in [-1, 1] the loss is half the square of `x - y`."""
        return weighted_means(y, weights, labels)

    def curvature(self, y: np.ndarray, weights: np.ndarray, fit: np.ndarray) -> np.ndarray:
        return np.ones(y.shape)

    def span(self, y: np.ndarray) -> tuple[float, float]:
        """[-1, 1], at whose ends no label has a pull."""
        return -1.0, 1.0


# The losses that need no parameter, by their names in configs, on the command line and in the estimator.
LOSSES: dict[str, ScalarLoss] = {
    "square": Squared(),
    "poisson": Poisson(),
    "logistic": Logistic(),
    "squared_hinge": SquaredHinge(),
    "huber": Huber(),
    "absolute": Absolute(),
}


def check_scalar_loss(loss: Any) -> ScalarLoss:
    """The loss of one observation, by object or name; a ValueError or TypeError for anything else."""
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(unknown("loss", loss, LOSSES))
        return LOSSES[loss]
    if isinstance(getattr(loss, "scalar", None), ScalarLoss):
        raise TypeError(
            "a loss here is for one observation, given one with data, but the data are the signal: write "
            f"sparseopt.scalar.{loss.scalar}"
        )
    if not fits(loss, ScalarLoss):
        raise TypeError(
            f"a loss is a name or an object with the methods of `ScalarLoss`, such as sparseopt.scalar.Poisson(); the "
            f'square is "square"; given {loss!r}'
        )
    if reason := own_refusal(loss):
        raise ValueError(reason)
    return loss
