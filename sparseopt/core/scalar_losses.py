"""Floor 2: losses of one observation at every node, `sum_j w_j f(x_j; y_j)`, beside the square.

Every loss is scaled so that `f >= 0`, with 0 at the best x for the observation alone (half the deviance of its
distribution). A loss is a frozen pytree; its methods on arrays are elementwise:

    value(x, y)         f(x; y)
    derivative(x, y)    a subgradient in x, 0 where 0 is one
    prox(x, y, step)    argmin_u 1/2 (u - x)² + step f(u; y),    step >= 0, one for all or one an entry
    dual_range(y)       the ends of the domain of the conjugate f*(s; y) = sup_x s x - f(x; y)
    slack(x, s, y)      f(x; y) + f*(s; y) - s x for s in that domain: never negative, 0 iff s is a subgradient at x
    mean(x)             the mean of the observation at x

Four more run on the host, on NumPy columns `[n]`: `wrong`, `location`, `curvature` and `span`.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy
from jaxtyping import Array, Float

from sparseopt.core.types import pytree

FloatArray = Float[Array, "..."]
HOST_STEPS = 100


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


def _means(y: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.bincount(labels, weights * y) / np.bincount(labels, weights)


def weighted_medians(y: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The lower weighted median of every label; every label needs a positive weight.

    Example:
        >>> from sparseopt.core.scalar_losses import weighted_medians
        >>> weighted_medians(np.array([3.0, 1.0, 2.0, 9.0]), np.ones(4), np.array([0, 0, 0, 1]))
        array([2., 9.])
    """
    order = np.lexsort((y, labels))
    mass = np.bincount(labels, weights)
    reached = np.cumsum(weights[order])
    ends = np.cumsum(np.bincount(labels))
    before = np.concatenate([[0.0], reached[ends[:-1] - 1]])
    place = np.searchsorted(reached, before + mass / 2)
    return y[order[np.minimum(place, ends - 1)]]


def wright_omega(z: FloatArray) -> FloatArray:
    """The w > 0 with `w + log w = z`, to a few eps, entry by entry.

    Source: Fritsch, Shafer and Crowley, "Solution of the transcendental equation w e^w = x", 1973, whose step is of
    order four.

    Example:
        >>> from sparseopt.core.scalar_losses import wright_omega
        >>> wright_omega(jnp.array([1.0])).round(3)
        Array([1.], dtype=float32)
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
class PoissonLoss:
    """Counts with log-rate x: `f = e^x - y x + (y log y - y)`, half the Poisson deviance.

    Example:
        >>> loss = so.PoissonLoss()
        >>> loss.mean(jnp.log(jnp.array([3.0])))
        Array([3.], dtype=float32)
    """

    expected = "counts, finite and not negative"
    unbounded = "no positive count"
    span_holds_fit = False

    def value(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """The divergence of the rate e^x from y."""
        return _poisson_slack(y, x)

    def derivative(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """`e^x - y`."""
        return jnp.exp(x) - y

    def prox(self, x: FloatArray, y: FloatArray, step: Any) -> FloatArray:
        """`u + step e^u = x + step y`, by `wright_omega`."""
        step = jnp.broadcast_to(jnp.asarray(step, x.dtype), x.shape)
        level = x + step * y
        log_step = jnp.log(jnp.where(step > 0, step, 1))
        omega = wright_omega(level + log_step)  # step e^u
        # Each form is exact where the other cancels.
        u = jnp.where(omega > 1, jnp.log(omega) - log_step, level - omega)
        return jnp.where(step > 0, u, x)

    def dual_range(self, y: FloatArray) -> tuple[Any, Any]:
        """`s + y`, a mean, is not negative."""
        return -y, jnp.inf

    def slack(self, x: FloatArray, dual: FloatArray, y: FloatArray) -> FloatArray:
        """The divergence of the rate e^x from the mean `dual + y`."""
        return _poisson_slack(jnp.maximum(dual + y, 0), x)

    def mean(self, x: FloatArray) -> FloatArray:
        """e^x."""
        return jnp.exp(x)

    def wrong(self, y: np.ndarray) -> np.ndarray:
        """Negative or infinite."""
        return ~(np.isfinite(y) & (y >= 0))

    def location(self, y: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The logarithm of the mean."""
        with np.errstate(divide="ignore"):
            return np.log(_means(y, weights, labels))

    def curvature(self, y: np.ndarray, weights: np.ndarray, fit: np.ndarray) -> np.ndarray:
        """The mean of the observed and the constant rate."""
        del weights
        return (y + np.exp(fit)) / 2

    def span(self, y: np.ndarray) -> tuple[float, float]:
        """Logarithms of the counts, 0 read as 1/2."""
        return float(np.log(max(y.min(), 0.5))), float(np.log(max(y.max(), 0.5)))


@pytree
class LogisticLoss:
    """Labels 0 or 1 with log-odds x: `f = log(1 + e^x) - y x`, half the binomial deviance.

    Example:
        >>> loss = so.LogisticLoss()
        >>> loss.mean(jnp.array([0.0]))
        Array([0.5], dtype=float32)
    """

    expected = "labels 0 or 1"
    unbounded = "only one of the labels 0 and 1"
    span_holds_fit = False

    def value(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """`log(1 + e^x) - y x`."""
        return y * jax.nn.softplus(-x) + (1 - y) * jax.nn.softplus(x)

    def derivative(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """`1 / (1 + e^-x) - y`."""
        return jax.nn.sigmoid(x) - y

    def prox(self, x: FloatArray, y: FloatArray, step: Any) -> FloatArray:
        """`u + step sigmoid(u) = x + step y`, by Newton's method from where it is monotone."""
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
        p = jnp.clip(dual + y, 0, 1)
        entropy = xlogy(p, p) + xlogy(1 - p, 1 - p)
        return jnp.maximum(entropy + p * jax.nn.softplus(-x) + (1 - p) * jax.nn.softplus(x), 0)

    def mean(self, x: FloatArray) -> FloatArray:
        """`1 / (1 + e^-x)`."""
        return jax.nn.sigmoid(x)

    def wrong(self, y: np.ndarray) -> np.ndarray:
        """Neither 0 nor 1."""
        return ~((y == 0) | (y == 1))

    def location(self, y: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The log-odds of the mean."""
        of_ones, of_zeros = np.bincount(labels, weights * y), np.bincount(labels, weights * (1 - y))
        with np.errstate(divide="ignore"):
            return np.log(of_ones) - np.log(of_zeros)

    def curvature(self, y: np.ndarray, weights: np.ndarray, fit: np.ndarray) -> np.ndarray:
        """`p (1 - p)` of the constant fit."""
        del y, weights
        return 1 / (2 + np.exp(fit) + np.exp(-fit))

    def span(self, y: np.ndarray) -> tuple[float, float]:
        """Log-odds of 1 to 100 and of 100 to 1."""
        del y
        return -float(np.log(100)), float(np.log(100))


@pytree
class HuberLoss:
    """`f = r² / 2` for `|r| = |x - y| <= delta`, `delta |r| - delta² / 2` beyond: outliers pull with force delta.

    Source: Huber, "Robust estimation of a location parameter", Annals of Mathematical Statistics 35 (1964).

    Example:
        >>> so.HuberLoss(1.0).value(jnp.array([0.5, 3.0]), 0.0)
        Array([0.125, 2.5  ], dtype=float32)
    """

    delta: Any = 1.0
    expected = "finite numbers"
    unbounded = "no observation"
    span_holds_fit = True

    def _delta(self, x: FloatArray) -> FloatArray:
        return jnp.asarray(self.delta, x.dtype)

    def value(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """Quadratic near y, linear beyond."""
        delta, size = self._delta(x), jnp.abs(x - y)
        near = jnp.minimum(size, delta)
        return near * near / 2 + delta * (size - near)

    def derivative(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """`x - y`, clipped to `[-delta, delta]`."""
        return jnp.clip(x - y, -self._delta(x), self._delta(x))

    def prox(self, x: FloatArray, y: FloatArray, step: Any) -> FloatArray:
        """Shrink by `1 + step` towards y, by `step delta` at most."""
        apart, step = x - y, jnp.asarray(step, x.dtype)
        reach = step * self._delta(x)
        return x - jnp.clip(apart * (step / (1 + step)), -reach, reach)

    def dual_range(self, y: FloatArray) -> tuple[Any, Any]:
        """`[-delta, delta]`."""
        return -self._delta(y), self._delta(y)

    def slack(self, x: FloatArray, dual: FloatArray, y: FloatArray) -> FloatArray:
        """Half the square of `derivative - dual`, and beyond delta what the slopes lack."""
        delta = self._delta(x)
        near = jnp.clip(x - y, -delta, delta)
        far = jnp.abs(x - y - near)
        return (near - dual) ** 2 / 2 + far * jnp.maximum(delta - dual * jnp.sign(near), 0)

    def mean(self, x: FloatArray) -> FloatArray:
        """X, the centre of a symmetric distribution."""
        return x

    def wrong(self, y: np.ndarray) -> np.ndarray:
        """Infinite."""
        return ~np.isfinite(y)

    def location(self, y: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Huber's estimate, by Newton's method between the medians less and plus delta."""
        delta = float(self.delta)
        fit = weighted_medians(y, weights, labels)
        low, high = fit - delta, fit + delta
        for _ in range(HOST_STEPS):
            apart = y - fit[labels]
            pull = np.bincount(labels, weights * np.clip(apart, -delta, delta))
            low, high = np.where(pull >= 0, fit, low), np.where(pull <= 0, fit, high)
            slope = np.bincount(labels, weights * (np.abs(apart) <= delta))
            following = fit + pull / np.where(slope > 0, slope, 1)
            inside = (slope > 0) & (following >= low) & (following <= high)
            following = np.where(inside, following, low / 2 + high / 2)
            if np.all(np.abs(following - fit) <= 2 * np.spacing(np.abs(fit))):
                break
            fit = following
        return fit

    def curvature(self, y: np.ndarray, weights: np.ndarray, fit: np.ndarray) -> np.ndarray:
        """The share of the nodes' pull that is linear: `delta / |r|` for the mean |r|, at most 1."""
        apart = np.average(np.abs(y - fit), weights=weights)
        return np.full(y.shape, float(self.delta) / max(apart, float(self.delta)))

    def span(self, y: np.ndarray) -> tuple[float, float]:
        """Of the data."""
        return float(y.min()), float(y.max())


@pytree
class AbsoluteLoss:
    """`f = |x - y|`: the fit is a median where the square's is a mean, and takes outliers of any size.

    Example:
        >>> so.AbsoluteLoss().prox(jnp.array([3.0, 0.5]), jnp.zeros(2), step=1.0)
        Array([2., 0.], dtype=float32)
    """

    expected = "finite numbers"
    unbounded = "no observation"
    span_holds_fit = True

    def value(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """`|x - y|`."""
        return jnp.abs(x - y)

    def derivative(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """The sign of `x - y`."""
        return jnp.sign(x - y)

    def prox(self, x: FloatArray, y: FloatArray, step: Any) -> FloatArray:
        """Towards y by `step`, to y at most."""
        step = jnp.asarray(step, x.dtype)
        # y itself, not x - (x - y), where the prox ends there.
        return jnp.where(jnp.abs(x - y) <= step, y, x - jnp.clip(x - y, -step, step))

    def dual_range(self, y: FloatArray) -> tuple[Any, Any]:
        """`[-1, 1]`."""
        del y
        return -1.0, 1.0

    def slack(self, x: FloatArray, dual: FloatArray, y: FloatArray) -> FloatArray:
        """`|x - y| - dual (x - y)`."""
        return jnp.maximum(jnp.abs(x - y) - dual * (x - y), 0)

    def mean(self, x: FloatArray) -> FloatArray:
        """X, the centre of a symmetric distribution."""
        return x

    def wrong(self, y: np.ndarray) -> np.ndarray:
        """Infinite."""
        return ~np.isfinite(y)

    def location(self, y: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The lower median."""
        return weighted_medians(y, weights, labels)

    def curvature(self, y: np.ndarray, weights: np.ndarray, fit: np.ndarray) -> np.ndarray:
        """One over the mean distance: there the square's pull is that of the absolute loss."""
        apart = np.average(np.abs(y - fit), weights=weights)
        return np.full(y.shape, 1 / apart if apart > 0 else 1.0)

    def span(self, y: np.ndarray) -> tuple[float, float]:
        """Of the data."""
        return float(y.min()), float(y.max())
