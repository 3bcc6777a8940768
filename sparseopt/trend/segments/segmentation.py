"""The best segmentation of a series for every number of jumps, with pieces that are constants or lines.

    minimise over 0 < c_1 < ... < c_k < n    sum_i C(c_i, c_(i+1)),    c_0 = 0, c_(k+1) = n

`C(i, j)` is the smallest `sum_l w_l |y_l - b_l|²` over the nodes i to j - 1 with a constant or a line b, from prefix
sums in O(1). Dynamic programming over the last jump gives the optimum for every k.

Source: Bellman, "On the approximation of curves by line segments using dynamic programming", CACM 4 (1961);
Jackson et al., "An algorithm for optimal partitioning of data on an interval", IEEE Signal Processing Letters 12
(2005).
"""

import dataclasses
from typing import Any

import numpy as np

# Up to this many nodes every node is tried as a jump; a table of costs holds the square.
MOST_CUTS = 1_000
# A cost less than this fraction of the sums that it is the difference of is rounding.
ROUNDING = 1e-11


@dataclasses.dataclass(frozen=True)
class Sums:
    """Prefix sums of a series: entry j is the sum over the nodes before j, so that a piece is one difference.

    Attributes:
        mass, time, square: the sums of w, w t and w t², `[n + 1]`.
        value, cross, energy: the sums of w y, w t y and w |y|², `[n + 1, d]`, `[n + 1, d]` and `[n + 1]`.
        times: t, `[n + 1]`; the last one continues the series by a step.
    """

    mass: np.ndarray
    time: np.ndarray
    square: np.ndarray
    value: np.ndarray
    cross: np.ndarray
    energy: np.ndarray
    times: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, weights: np.ndarray | None = None, times: np.ndarray | None = None) -> "Sums":
        """The sums of values `[n, d]` with positive weights `[n]` at increasing times `[n]`; leave missing nodes out.

        Whole numbers as times keep the sums of squares exact.
        """
        n = len(values)
        w = np.ones(n) if weights is None else weights
        t = np.arange(n) - n // 2 if times is None else times
        t = np.append(t, t[-1] + 1).astype(np.float64)

        def summed(rows: np.ndarray) -> np.ndarray:
            return np.concatenate([np.zeros_like(rows[:1]), np.cumsum(rows, axis=0)])

        wt, wy = w * t[:-1], w[:, None] * values
        series = (w, wt, wt * t[:-1], wy, t[:-1, None] * wy, (wy * values).sum(axis=1))
        mass, time, square, value, cross, energy = map(summed, series)
        return cls(mass, time, square, value, cross, energy, t)

    def cost(self, i: Any, j: Any, line: bool, least: int = 1) -> np.ndarray:
        """`C(i, j)` for arrays of i and j; infinite for pieces of fewer than `least` nodes."""
        i, j = np.broadcast_arrays(i, j)
        mass, value, energy = (
            self.mass[j] - self.mass[i],
            self.value[j] - self.value[i],
            self.energy[j] - self.energy[i],
        )
        mass = np.where(j > i, mass, 1)
        fitted = np.einsum("...d,...d->...", value, value) / mass
        if line:
            time = self.time[j] - self.time[i]
            spread = self.square[j] - self.square[i] - time * time / mass
            sloped = (j - i > 1) & (spread > 0)
            cross = self.cross[j] - self.cross[i] - value * (time / mass)[..., None]
            slope = np.einsum("...d,...d->...", cross, cross) / np.where(sloped, spread, 1)
            fitted = fitted + np.where(sloped, slope, 0)
        rest = energy - fitted
        return np.where(j - i >= least, np.where(rest > ROUNDING * energy, rest, 0), np.inf)


def best_segmentations(sums: Sums, most: int, line: bool = False, least: int = 1) -> list[tuple[float, np.ndarray]]:
    """The smallest cost with 0, 1, ..., `most` jumps and the places of the jumps; fewer if no more pieces fit.

    Up to `MOST_CUTS` nodes it is the optimum. In longer series the jumps first lie on a grid of as many nodes, and the
    optimum is that among the best nodes near them.

    Args:
        sums: of the series.
        most: the largest number of jumps.
        line: whether the pieces are lines, else constants.
        least: the fewest nodes of a piece.

    Example:
        >>> from sparseopt.trend.segments.segmentation import Sums, best_segmentations
        >>> sums = Sums.of(np.array([0.0, 0, 0, 5, 5, 2, 2, 2])[:, None])
        >>> [(round(cost, 2), places.tolist()) for cost, places in best_segmentations(sums, 2)]
        [(30.0, []), (10.8, [3]), (0.0, [3, 5])]
    """
    n = len(sums.mass) - 1
    cuts = np.unique(np.linspace(0, n, min(n, MOST_CUTS) + 1).astype(int))
    found = _best_among(sums, cuts, most, line, least)
    if len(cuts) > n or len(found) == 1:
        return found
    # On a grid two places may embrace one jump. Among the best nodes of many and of few places are those of all.
    counts = {(len(found) - 1) >> halved for halved in range(len(found).bit_length())} - {0}
    moved = [_refine(sums, found[count][1], line, least) for count in counts]
    return _best_among(sums, np.unique(np.concatenate([[0, n], *moved])), most, line, least)


def _best_among(sums: Sums, cuts: np.ndarray, most: int, line: bool, least: int) -> list[tuple[float, np.ndarray]]:
    # Row j holds the pieces that end at cut j, so that the search for the last jump runs along memory.
    table = np.full((len(cuts), len(cuts)), np.inf)
    for row in range(1, len(cuts)):
        table[row, :row] = sums.cost(cuts[:row], cuts[row], line, least)
    best, back = table[:, 0].copy(), []
    found = [(float(best[-1]), np.zeros(0, int))]
    for _ in range(most):
        tried = table + best
        back.append(np.argmin(tried, axis=1))
        best = np.take_along_axis(tried, back[-1][:, None], axis=1)[:, 0]
        if not np.isfinite(best[-1]):
            break
        ends = [len(cuts) - 1]
        for last in reversed(back):
            ends.append(int(last[ends[-1]]))
        found.append((float(best[-1]), cuts[ends[:0:-1]]))
    return found


def _refine(sums: Sums, places: np.ndarray, line: bool, least: int) -> np.ndarray:
    """Places on the grid, each moved to its best node while the others stay."""
    n, places = len(sums.mass) - 1, places.copy()
    reach = np.arange(-(n // MOST_CUTS) - 1, n // MOST_CUTS + 2)
    reach = reach[np.argsort(np.abs(reach), kind="stable")]  # of equal costs the place stays
    while True:
        before = places.copy()
        for parity in (0, 1):
            ends = np.concatenate([[0], places, [n]])
            left, right, moved = ends[:-2][parity::2], ends[2:][parity::2], places[parity::2]
            if not moved.size:
                continue
            tried = np.clip(moved[:, None] + reach, left[:, None], right[:, None])
            costs = sums.cost(left[:, None], tried, line, least) + sums.cost(tried, right[:, None], line, least)
            places[parity::2] = np.take_along_axis(tried, np.argmin(costs, axis=1)[:, None], axis=1)[:, 0]
        if np.array_equal(places, before):
            return places
