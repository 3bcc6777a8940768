"""A convex penalty that is a sum over entries, as coordinate descent sees it: four numbers for every entry.

    g_j(x) = weight_j |x| + ridge_j / 2 x²    for low_j <= x <= high_j, +inf elsewhere

A penalty of this form has a method `entry_terms()`, which returns the four. Here they are NumPy arrays on the host.
"""

import copy
from typing import Any

import numpy as np

from sparseopt.core.penalties.entries import L1
from sparseopt.core.penalties.sums import Sum


def without_intercept(penalty: Any, size: int) -> tuple[Any, int] | None:
    """A penalty and how many entries it acts on, if it is alone or `Problem` added an intercept's; None for others."""
    if not isinstance(penalty, Sum):
        return penalty, size
    first, *rest = penalty.penalties
    alone = len(rest) == 1 and isinstance(rest[0], L1) and not np.any(np.asarray(rest[0].weight) != 0)
    return (first, size - 1) if alone else None


class Terms:
    """What the rounds ask of a penalty of a vector; here what is true of a sum over entries without bounds."""

    free: np.ndarray  # the entries without any term, as an intercept

    def held(self, x: np.ndarray) -> np.ndarray:
        """Whether each entry has left its resting place or has none."""
        held = x != 0
        held[self.free] = True
        return held

    def completed(self, places: np.ndarray) -> np.ndarray:
        """Places that are chosen together with these, too."""
        return places

    def inside(self, x: np.ndarray) -> np.ndarray:
        """The point of the domain that is closest to x."""
        return x


class EntryTerms(Terms):
    """The terms of a vector of entries, `[p]` each.

    Attributes:
        free: the entries without any term, `[f]`.
        plain: whether all of them are `weight |x|`.
    """

    convex = by_entry = True

    def __init__(self, size: int, weight: Any, ridge: Any = 0.0, low: Any = -np.inf, high: Any = np.inf) -> None:
        self.all = np.empty((4, size))
        for row, given in zip(self.all, (weight, ridge, low, high), strict=True):
            row[:] = given
        self.weight, self.ridge, self.low, self.high = self.all
        self.ridged = bool(self.ridge.any())
        self.bounded = bool(np.isfinite(self.all[2:]).any())
        self.plain = not self.ridged and not self.bounded
        without = (self.weight == 0) & (self.ridge == 0)
        self.weightless = bool((self.weight == 0).any())
        ends = np.isfinite(self.all[2:]).sum(axis=0) if self.bounded else np.zeros(size)
        self.free, self.sided = np.flatnonzero(without & (ends == 0)), np.flatnonzero(without & (ends == 1))

    def take(self, places: np.ndarray) -> "EntryTerms":
        """Some of the entries; what is said of all may be said of them too, though it need not be so."""
        part = copy.copy(self)
        part.all = self.all[:, places]
        part.weight, part.ridge, part.low, part.high = part.all
        if self.free.size:
            part.free = np.flatnonzero(np.isin(places, self.free))
        if self.sided.size:
            part.sided = np.flatnonzero(np.isin(places, self.sided))
        return part

    def value(self, x: np.ndarray) -> float:
        """The penalty at an x within the bounds."""
        total = self.weight @ np.abs(x)
        return float(total + 0.5 * (self.ridge @ (x * x)) if self.ridged else total)

    def inside(self, x: np.ndarray) -> np.ndarray:
        return np.clip(x, self.low, self.high) if self.bounded else x

    def best(self, u: np.ndarray) -> np.ndarray:
        """The x at which `u x - g(x)` is largest, for a u in the domain of the conjugate."""
        beyond = np.sign(u) * np.maximum(np.abs(u) - self.weight, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            x = np.where(beyond == 0, 0.0, beyond / self.ridge)
        # Without a ridge the end is a bound; an infinite one is met only by rounding.
        x = np.clip(x, self.low, self.high)
        return np.where(np.isfinite(x), x, np.clip(0.0, self.low, self.high))

    def slack(self, x: np.ndarray, u: np.ndarray) -> float:
        """`g(x) + g*(u) - <u, x>`, a sum of terms that are not negative, for a u in the domain of the conjugate."""
        if self.plain:
            seen = np.flatnonzero(x)
            return float(np.maximum(self.weight[seen] * np.abs(x[seen]) - u[seen] * x[seen], 0).sum())
        best = self.best(u)
        apart = x - best
        middle = 0.5 * self.ridge * (x + best)
        terms = self.weight * (np.abs(x) - np.abs(best)) + apart * (middle - u)
        return float(np.maximum(terms, 0).sum())

    def gauge(self, u: np.ndarray) -> float:
        """The smallest t >= 0 for which `u / t` lies in the domain of the conjugate, but for `free` and `sided`."""
        size = np.abs(u)
        if not self.plain:
            open_end = (self.ridge == 0) & ~np.isfinite(np.where(u > 0, self.high, self.low))
            size = np.where(open_end, size, 0)
        if not self.weightless:
            return float((size / self.weight).max(initial=0))
        weighted = self.weight > 0
        return float((size[weighted] / self.weight[weighted]).max(initial=0))

    def scores(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        """How much every entry would gain by a move, in no unit; infinite where it has left its resting place."""
        ways = np.abs(u)
        if self.bounded:
            ways = np.where(u > 0, np.where(x < self.high, u, 0), np.where(x > self.low, -u, 0))
        weight = self.weight
        if self.weightless:
            weight = np.maximum(weight, 1e-12 * np.max(ways, initial=0) + np.finfo(np.float64).tiny)
        score = ways / weight
        score[self.held(x)] = np.inf
        return score
