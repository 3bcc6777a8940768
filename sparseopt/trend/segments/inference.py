"""What a series says about its jumps: intervals of 95 % for places and sizes, and p-values by data thinning.

A piece is a constant or a line fitted apart from its neighbours, with independent noise of a known variance, which
gives the size of a jump or bend between two pieces its deviation and a normal interval.

The places of a jump are those k between its neighbours with

    RSS(k) - min RSS <= 2 variance log(nu / (1 - sqrt(0.95))).

As a function of k the difference is a random walk with a drift away from the true place on either side. Its maximum
exceeds x with the probability `nu exp(-x)`; `nu` is for the overshoot of a walk in steps. A bend lies where its lines
cross, `± quantile deviation / size` with the deviation of the step between them.

Without thinning, the same values chose the places, and the variance is that of the residuals times (1 + r) / (1 - r),
the long-run variance of an autoregression, so the intervals are approximate and there is no p-value. `Thinning` makes
two independent parts of the values: one has the places, and what the other says about them does not depend on the
search.

Source: Siegmund, "Confidence sets in change-point problems", International Statistical Review 56 (1988), and Siegmund
and Yakir, "The Statistics of Gene Mapping" (2007), for nu; Feder, Annals of Statistics 3 (1975), for bends; Neufeld,
Dharamshi, Gao and Witten, "Data thinning for convolution-closed distributions", JMLR 25 (2024).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from sparseopt.core.base.arguments import finite_number, real_array, unknown, whole_number
from sparseopt.trend.segments.segmentation import ROUNDING, Sums

COVERAGE = 0.95
# Values drawn from default_rng(seed) must not meet the same numbers again.
OWN_SEED = 0x7468696E
MOST_R = 0.95  # the largest correlation of neighbouring residuals that counts
MOST_EXACT = 1e9  # trials, whose products are still int64; a normal test of more is as good
LAWS = ("gaussian", "poisson", "binomial")
# What a law needs.
NEEDS = {
    "noise": (
        "gaussian",
        "the standard deviation of the noise, known from elsewhere than these values, a positive number or one for "
        "each channel; if it is not known, leave out thin, which gives approximate intervals",
    ),
    "trials": ("binomial", "the number of trials of each count, a whole number of at least 2 or one for each node"),
}


@dataclasses.dataclass(frozen=True)
class Thinning:
    """Divide a series into two independent parts: `jumps` finds the places on one, and tests them on the other.

    A value y with the node weight w is divided by its law into a part

        gaussian    share y + sqrt(share (1 - share) / w) noise z,  z ~ N(0, 1)
        poisson     Binomial(y, share)
        binomial    Hypergeometric of `round(share trials)` of the trials, of which y succeeded

    and the rest. Both are independent if the law is right: values independent of each other, and with the `noise` that
    is given. If the noise is correlated or larger, the p-values are too small.

    Attributes:
        law: "gaussian", "poisson" for counts, or "binomial" for counts of successes.
        noise: of gaussian values, the standard deviation at node weight 1; a number, or one for each channel.
        trials: of binomial counts; a whole number of at least 2, or one for each node `[n]`.
        share: the fraction of the information that finds the places; between 0 and 1.
        seed: of the random numbers.

    Raises:
        ValueError, TypeError: for invalid settings.

    Source: Neufeld, Dharamshi, Gao and Witten, JMLR 25 (2024), Algorithm 1 and Table 2.

    Example:
        >>> counts = np.random.default_rng(2).poisson(np.repeat([4.0, 12.0], 50))
        >>> so.trend.jumps(counts, thin=so.trend.Thinning("poisson"))
        Jumps: 1 place, 2 constants, noise 2.36; intervals of 95 % and p-values by poisson thinning, share 0.5
          jump at 50: +7.52 (5.99 to 9.05), between 49 and 52, p 1.4e-22
    """

    law: str
    noise: Any = None
    trials: Any = None
    share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.law not in LAWS:
            raise ValueError(unknown("law", self.law, LAWS))
        for name, (law, meaning) in NEEDS.items():
            given = getattr(self, name)
            if law != self.law and given is not None:
                raise ValueError(f"the law {self.law} has no {name}, given {given!r:.100}: leave it out")
            if law == self.law:
                each = real_array(name, np.nan if given is None else given)
                fine = np.isfinite(each) & (each > 0 if name == "noise" else (each >= 2) & (each % 1 == 0))
                if each.ndim > 1 or not fine.all():
                    raise ValueError(f"the law {law} needs {name}, {meaning}; given {given!r:.100}")
        if not 0 < finite_number(self.share) < 1:
            raise ValueError(f"share is between 0 and 1, given {self.share!r}")
        whole_number("seed", self.seed, 0)

    def parts(self, columns: np.ndarray, weights: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Both parts of values `[n, channels]`, 0 where their weight `[n]` is, as values with weights of their own.

        Their means are those of the values; of binomial counts they are the fractions that succeeded.
        """
        seen, part, whole = weights > 0, np.zeros_like(columns), np.ones(len(columns))
        first = self.share * whole
        if self.law == "binomial":
            whole = self._one_for_each("trials", len(columns), "nodes")
            first = np.clip(np.round(self.share * whole), 1, whole - 1)
        part[seen] = self._drawn(columns[seen], weights[seen, None], first[seen, None], whole[seen, None])
        halves = (part, first), (columns - part, whole - first)
        return [(values / size[:, None], weights * size) for values, size in halves]

    def variance(self, mass: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Of a value of weight 1 in pieces with the weights `mass` `[k, 1]` and the sums `value` `[k, channels]`."""
        if self.law == "gaussian":
            return np.broadcast_to(self._one_for_each("noise", value.shape[1], "channels") ** 2, value.shape)
        # A little more than was counted: a piece without a count has a variance too.
        if self.law == "poisson":
            return (value + 0.5) / mass
        level = (value + 1) / (mass + 2)
        return level * (1 - level) * mass / (mass - 1)

    def _one_for_each(self, name: str, count: int, what: str) -> np.ndarray:
        given = real_array(name, getattr(self, name)).astype(np.float64)
        if given.shape not in ((), (count,)):
            raise ValueError(f"{count} {what} need {name} of one number or as many, given {given.size}")
        return np.broadcast_to(given, count)

    def _drawn(self, y: np.ndarray, weights: np.ndarray, first: np.ndarray, whole: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng([self.seed, OWN_SEED])
        if self.law == "gaussian":
            noise = self._one_for_each("noise", y.shape[1], "channels")
            spread = np.sqrt(self.share * (1 - self.share) / weights) * noise
            return self.share * y + spread * rng.standard_normal(y.shape)
        if np.any(weights != 1):
            raise ValueError(f"nodes of the law {self.law} have the weight 1, or 0 if missing: leave out node_weights")
        most: Any = whole if self.law == "binomial" else np.inf
        if (wrong := (y < 0) | (y % 1 != 0) | (y > most)).any():
            meant = "counts 0, 1, 2, ..." + " up to their trials" * (self.law == "binomial")
            raise ValueError(f"the law {self.law} is of {meant}, given {y[wrong][0]} ({wrong.sum()} such)")
        counts = y.astype(np.int64)
        if self.law == "poisson":
            return rng.binomial(counts, self.share)
        return rng.hypergeometric(counts, whole.astype(np.int64) - counts, first.astype(np.int64))


class Limits(NamedTuple):
    """Of sizes `[k, channels]`, of places `[k]` as numbers of observed nodes, and p-values `[k]`, NaN if unknown."""

    low: np.ndarray
    high: np.ndarray
    first: np.ndarray
    last: np.ndarray
    p: np.ndarray


def long_run(residuals: np.ndarray, coefficients: int) -> np.ndarray:
    """(1 + r) / (1 - r) of each channel of weighted residuals `[n, channels]` about this many fitted coefficients.

    r is the correlation of neighbours, at least 0, corrected for the bias of residuals (Kendall, Biometrika 41, 1954).
    """
    r = np.sum(residuals[1:] * residuals[:-1], axis=0) / np.maximum(np.sum(residuals**2, axis=0), 1e-300)
    r = np.clip(r + (1 + 3 * r) * coefficients / len(residuals), 0, MOST_R)
    return (1 + r) / (1 - r)


def limits(
    values: np.ndarray,
    weights: np.ndarray,
    times: np.ndarray,
    model: Any,
    noise: np.ndarray,
    freedom: float,
    least: int,
    thin: Thinning | None,
) -> Limits:
    """Intervals of 95 %, and p-values if the values are the part that did not find the places.

    Args:
        values: of the observed nodes, `[n, channels]`.
        weights: of these nodes, `[n]`.
        times: of these nodes, `[n]`.
        model: has `places` `[k]`, `joined` `[k]` and `line`.
        noise: the variance of a value with weight 1 if there is no thinning, `[channels]`.
        freedom: degrees of freedom of this variance.
        least: the fewest nodes of a piece.
        thin: how the values were divided, or None.
    """
    from scipy import special

    places, joined, line = model.places, model.joined[:, None], model.line
    middle, cuts = values.mean(axis=0), np.concatenate([[0], places, [len(values)]])
    sums = Sums.of(values - middle, weights, times)
    mass, time, square = (np.diff(part[cuts])[:, None] for part in (sums.mass, sums.time, sums.square))
    value, cross = (np.diff(part[cuts], axis=0) for part in (sums.value, sums.cross))
    variance = np.broadcast_to(noise, value.shape) if thin is None else thin.variance(mass, value + mass * middle)
    variance = np.maximum(variance, (ROUNDING * np.ptp(values, axis=0)) ** 2 + 1e-200)
    # Each piece as a level at its mean time and a slope, and the variances of both.
    known = 1 / np.maximum(square - time**2 / mass, 1e-200) if line else np.zeros_like(mass)
    slope = (cross - value * time / mass) * known
    at = sums.times[places][:, None]
    left, right = (at - (time / mass)[side] for side in (slice(None, -1), slice(1, None)))
    levels, of_levels, of_slopes = value / mass, variance / mass, variance * known
    steps = np.diff(levels, axis=0) + slope[1:] * right - slope[:-1] * left
    of_steps = of_levels[1:] + of_levels[:-1] + of_slopes[1:] * right**2 + of_slopes[:-1] * left**2
    bends, of_bends = np.diff(slope, axis=0), of_slopes[1:] + of_slopes[:-1]
    sizes, deviation = np.where(joined, bends, steps), np.sqrt(np.where(joined, of_bends, of_steps))
    tail = (1 + COVERAGE) / 2
    quantile = float(special.stdtrit(freedom, tail) if thin is None else special.ndtri(tail))
    # Where the lines at a bend cross; channels count by what they know of it.
    sharp = np.maximum(np.sum(bends**2 / of_steps, axis=1), 1e-200)
    crossing, reach = at[:, 0] - np.sum(bends * steps / of_steps, axis=1) / sharp, quantile / np.sqrt(sharp)
    first, last = np.searchsorted(times, crossing - reach, "right") - 1, np.searchsorted(times, crossing + reach)
    for index in np.flatnonzero(~model.joined):
        i, j = cuts[index], cuts[index + 2]
        unit = np.sqrt(np.maximum(variance[index], variance[index + 1]))
        local = Sums.of((values[i:j] - values[i:j].mean(axis=0)) / unit, weights[i:j], times[i:j])
        tried = np.arange(1, j - i)
        costs = local.cost(0, tried, line, least) + local.cost(tried, j - i, line, least)
        jump = math.sqrt(np.sum((steps[index] / unit) ** 2) * weights[i:j].mean())
        near = tried[costs - costs.min() <= 2 * math.log(max(_overshoot(jump) / (1 - math.sqrt(COVERAGE)), 1))]
        first[index], last[index] = i + near[0], i + near[-1]
    first, last = np.clip(first, cuts[:-2] + 1, places), np.clip(last, places, cuts[2:] - 1)
    p = np.full(len(places), np.nan)
    if thin is not None and (thin.law == "gaussian" or line or mass.sum() > MOST_EXACT):
        p = _smallest(2 * special.ndtr(-np.abs(sizes) / deviation))
    elif thin is not None:
        p = _smallest(_of_counts(thin.law, value + mass * middle, mass))
    low, high = sizes - quantile * deviation, sizes + quantile * deviation
    return Limits(low, high, first, last, p)


def _overshoot(jump: float) -> float:
    """The `nu` of a random walk whose steps have the deviation `jump` and the drift `-jump² / 2`."""
    from scipy import stats

    half = max(jump / 2, 1e-6)
    below = stats.norm.cdf(half)
    return float((below - 0.5) / half / (half * below + stats.norm.pdf(half)))


def _of_counts(law: str, value: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Exact p-values `[k, channels]` of equal rates in neighbouring pieces, from their counts and trials."""
    from scipy import stats

    counts, trials = np.round(value).astype(int), np.round(mass).astype(int)
    p = np.ones((len(counts) - 1, counts.shape[1]))
    for k, c in np.ndindex(p.shape):
        pair = counts[k : k + 2, c]
        if law == "binomial":
            p[k, c] = stats.fisher_exact([pair, trials[k : k + 2, 0] - pair]).pvalue
        elif pair.any():
            p[k, c] = stats.binomtest(pair[0], pair.sum(), float(mass[k, 0] / mass[k : k + 2].sum())).pvalue
    return p


def _smallest(p: np.ndarray) -> np.ndarray:
    """Of several channels the smallest p-value times their number."""
    return np.minimum(p.min(axis=1, initial=1) * p.shape[1], 1)
