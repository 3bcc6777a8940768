"""Losses of the residual `x - y`, see `scalar.py`: square, Huber, absolute and quantile."""

from typing import Any, TypeGuard

import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.arguments import is_positive
from sparseopt.core.base.types import FloatArray, pytree

HOST_STEPS = 100


def weighted_means(y: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The weighted mean of every label, which needs a positive weight."""
    return np.bincount(labels, weights * y) / np.bincount(labels, weights)


def weighted_quantiles(y: np.ndarray, weights: np.ndarray, labels: np.ndarray, level: float) -> np.ndarray:
    """The lower weighted quantile of every label, `min {y_i : sum of w_j over y_j <= y_i >= level sum of w_j}`.

    Every label needs a positive weight.
    """
    order = np.lexsort((y, labels))
    mass, counts = np.bincount(labels, weights), np.bincount(labels)
    reached = np.cumsum(weights[order])
    ends = np.cumsum(counts)
    before = np.concatenate([[0.0], reached[ends[:-1] - 1]])
    place = np.searchsorted(reached, before + level * mass)
    # Rounding of the sums must not select an observation of another label.
    return y[order[np.clip(place, ends - counts, ends - 1)]]


def _mean_distance(y: np.ndarray, weights: np.ndarray, fit: np.ndarray) -> float:
    return float(np.average(np.abs(y - fit), weights=weights))


class _LossOfResiduals:
    """What losses of `x - y` have in common."""

    expected = "finite numbers"
    unbounded = "no observation"
    span_holds_fit = True

    def mean(self, x: FloatArray) -> FloatArray:
        """`x` itself: the mean, median or quantile that the loss fits."""
        return x

    def wrong(self, y: np.ndarray) -> np.ndarray:
        return ~np.isfinite(y)

    def span(self, y: np.ndarray) -> tuple[float, float]:
        return float(y.min()), float(y.max())


@pytree
class Squared(_LossOfResiduals):
    """`f = (x - y)² / 2`: the fit is a mean."""

    smooth = is_square = adds_up = True

    def value(self, x: FloatArray, y: FloatArray) -> FloatArray:
        return (x - y) ** 2 / 2

    def derivative(self, x: FloatArray, y: FloatArray) -> FloatArray:
        return x - y

    def prox(self, x: FloatArray, y: FloatArray, step: Any) -> FloatArray:
        return x + step / (1 + step) * (y - x)

    def dual_range(self, y: FloatArray) -> tuple[Any, Any]:
        return -jnp.inf, jnp.inf

    def slack(self, x: FloatArray, dual: FloatArray, y: FloatArray) -> FloatArray:
        return (x - y - dual) ** 2 / 2

    def location(self, y: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return weighted_means(y, weights, labels)

    def curvature(self, y: np.ndarray, weights: np.ndarray, fit: np.ndarray) -> np.ndarray:
        return np.ones(y.shape)


@pytree
class Huber(_LossOfResiduals):
    """`f = r² / 2` for `|r| = |x - y| <= delta`, `delta |r| - delta² / 2` beyond: delta caps the pull of an outlier.

    Source: Huber, "Robust estimation of a location parameter", Annals of Mathematical Statistics 35 (1964).

    Example:
        >>> so.scalar.Huber(1.0).value(jnp.array([0.5, 3.0]), 0.0)
        Array([0.125, 2.5  ], dtype=float32)
    """

    delta: Any = 1.0
    smooth = True

    def refuses(self) -> str | None:
        if is_positive(self.delta):
            return None
        return (
            "the Huber loss needs a positive, finite delta, the distance beyond which outliers count less; given "
            f"{self.delta}"
        )

    def _delta(self, x: FloatArray) -> FloatArray:
        return jnp.asarray(self.delta, x.dtype)

    def value(self, x: FloatArray, y: FloatArray) -> FloatArray:
        delta, size = self._delta(x), jnp.abs(x - y)
        near = jnp.minimum(size, delta)
        return near * near / 2 + delta * (size - near)

    def derivative(self, x: FloatArray, y: FloatArray) -> FloatArray:
        return jnp.clip(x - y, -self._delta(x), self._delta(x))

    def prox(self, x: FloatArray, y: FloatArray, step: Any) -> FloatArray:
        """Shrink `x - y` by the factor `1 + step`, but move x by at most `step delta`."""
        apart, step = x - y, jnp.asarray(step, x.dtype)
        reach = step * self._delta(x)
        return x - jnp.clip(apart * (step / (1 + step)), -reach, reach)

    def dual_range(self, y: FloatArray) -> tuple[Any, Any]:
        return -self._delta(y), self._delta(y)

    def slack(self, x: FloatArray, dual: FloatArray, y: FloatArray) -> FloatArray:
        """Half the square of `derivative - dual`; beyond delta, plus the distance times the missing slope."""
        delta = self._delta(x)
        near = jnp.clip(x - y, -delta, delta)
        far = jnp.abs(x - y - near)
        return (near - dual) ** 2 / 2 + far * jnp.maximum(delta - dual * jnp.sign(near), 0)

    def location(self, y: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Huber's estimate, with Newton's method within delta of the median."""
        delta = float(self.delta)
        fit = weighted_quantiles(y, weights, labels, 0.5)
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
        """`delta / |r|` for the mean |r|, at most 1."""
        apart = _mean_distance(y, weights, fit)
        return np.full(y.shape, float(self.delta) / max(apart, float(self.delta)))


class LossOfTwoSlopes(_LossOfResiduals):
    """`f = scale max(level (y - x), (level - 1) (y - x))`: the fit is a quantile."""

    smooth = False
    level: Any
    scale: float

    def _slopes(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        level = jnp.asarray(self.level, x.dtype)
        return -self.scale * level, self.scale * (1 - level)

    def value(self, x: FloatArray, y: FloatArray) -> FloatArray:
        below, above = self._slopes(x)
        return jnp.maximum(below * (x - y), above * (x - y))

    def derivative(self, x: FloatArray, y: FloatArray) -> FloatArray:
        below, above = self._slopes(x)
        return jnp.where(x < y, below, jnp.where(x > y, above, 0))

    def prox(self, x: FloatArray, y: FloatArray, step: Any) -> FloatArray:
        """Move x towards y by `step` times the slope on its side, but not beyond y."""
        below, above = (jnp.asarray(step, x.dtype) * slope for slope in self._slopes(x))
        # y itself, not x - (x - y), if the prox ends there.
        ends = (x - y >= below) & (x - y <= above)
        return jnp.where(ends, y, x - jnp.clip(x - y, below, above))

    def dual_range(self, y: FloatArray) -> tuple[Any, Any]:
        return self._slopes(y)

    def slack(self, x: FloatArray, dual: FloatArray, y: FloatArray) -> FloatArray:
        """The distance to y times the difference between the slope on that side and `dual`."""
        below, above = self._slopes(x)
        lacks = jnp.where(x < y, dual - below, above - dual)
        return jnp.abs(x - y) * jnp.maximum(lacks, 0)

    def location(self, y: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return weighted_quantiles(y, weights, labels, float(self.level))

    def curvature(self, y: np.ndarray, weights: np.ndarray, fit: np.ndarray) -> np.ndarray:
        """The mean slope at the quantile over the mean distance: there a square with that curvature pulls as hard."""
        apart, level = _mean_distance(y, weights, fit), float(self.level)
        return np.full(y.shape, 2 * self.scale * level * (1 - level) / apart if apart > 0 else 1.0)


def has_two_slopes(loss: Any) -> TypeGuard[LossOfTwoSlopes]:
    """Whether a loss of one observation is the absolute loss or a quantile's."""
    return isinstance(loss, LossOfTwoSlopes)


@pytree
class Absolute(LossOfTwoSlopes):
    """`f = |x - y|`: the fit is a median instead of a mean, and tolerates outliers of any size.

    Example:
        >>> so.scalar.Absolute().prox(jnp.array([3.0, 0.5]), jnp.zeros(2), step=1.0)
        Array([2., 0.], dtype=float32)
    """

    level = 0.5
    scale = 2.0


@pytree
class Quantile(LossOfTwoSlopes):
    """`f = max(level (y - x), (level - 1) (y - x))`, 0 < level < 1: the fit is a quantile of that level.

    About the fraction `level` of the observations lies below the fit. Level 1/2 is half of `Absolute`.

    Source: Koenker and Bassett, "Regression quantiles", Econometrica 46 (1978).

    Example:
        >>> so.scalar.Quantile(0.75).value(jnp.array([-2.0, 2.0]), 0.0)
        Array([1.5, 0.5], dtype=float32)
    """

    level: Any
    scale = 1.0

    def refuses(self) -> str | None:
        if is_positive(self.level) and self.level < 1:
            return None
        return (
            "the quantile loss needs a level between 0 and 1, both excluded, the fraction of observations below the "
            f"fit; given {self.level}"
        )
