"""`jumps`, the places of a series that a person would mark: its jumps and its bends.

The models are the best segmentations into 1, 2, ... pieces, once of constants and once of lines, the same lines made to
meet, and polynomials, which have no places. With every channel scaled to variance 1, the chosen one minimises

    n d / f  log max(RSS / (n d), 1/100)  +  log(n) (2 k + 2 v + c)

for n observed nodes, d channels, k places, v values that the further pieces add (d a place for constants and for lines
that meet, else 2 d), and c slopes or coefficients of the whole series. BIC has the
price 1 for each of these; what a search for places chose costs twice that. A person does not see steps below a tenth of
the series' own deviation, hence the floor.

Correlated noise wanders as if it jumped. If r is the correlation of neighbouring residuals of the model chosen with
f = 1, n values are worth n (1 - r) / (1 + r); f = (1 + r) / (1 - r), but at most 2, since what a model misses is
correlated as well. If a polynomial is best, what jumps would explain is a curve, so only lines that meet are left.

Source: Yao, "Estimating the number of change-points via Schwarz' criterion", Statistics & Probability Letters 6 (1988);
Zhang and Siegmund, Biometrics 63 (2007), for prices above BIC's.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from sparseopt.core.base.arguments import real_array, whole_number
from sparseopt.system.report import Fact, html_facts
from sparseopt.trend.base.fit import signal_on
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.signal import PLAIN_COPIES, check_graph
from sparseopt.trend.segments.inference import Thinning, limits, long_run
from sparseopt.trend.segments.joined import fit_pieces, values_of
from sparseopt.trend.segments.segmentation import Sums, best_segmentations

# The prices, the floor and the bound on f of the criterion; the highest degree of its polynomials.
PLACE, VALUE, FLOOR, MOST_F, DEGREES = 2.0, 2.0, 0.01, 2.0, 12
# An outlier is this many deviations of the noise from the median around it; if more than a tenth of the values are,
# they are the signal. 1.05 is 1 / (sqrt(2) 0.6745), for differences of normal noise.
FAR, MOST_OUTLIERS, DIFFERENCES = 6.0, 0.1, 1.05
COLUMNS = ("place", "kind", "size", "low", "high", "first", "last", "p")


@dataclasses.dataclass(frozen=True, repr=False)
class Jumps:
    """The jumps and bends of a series.

    Attributes:
        places: the node of the first value after each jump or bend, ascending `[k]`.
        kinds: "jump", or "bend" where two lines meet, `[k]`.
        sizes: of a jump the step of the fit, in the unit of the signal; of a bend the change of the slope, in that unit
            over the unit of time. `[k]` or `[k, channels]`.
        fit: the least squares fit with these places, in the shape of the signal.
        line: whether the pieces are lines, else constants.
        noise: the standard deviation of the residuals at node weight 1, `[]` or `[channels]`.
        outliers: the nodes whose values count as missing, ascending.
        low: the lower end of the interval of 95 % of each size, in the shape of `sizes`.
        high: its upper end.
        first: the first node of the interval of 95 % of each place, `[k]`.
        last: its last node.
        p: the p-value of each place, `[k]`, for no jump or bend between its pieces, not corrected for the number of
            places; NaN without `thin`.
        thin: how the values were divided, `fit` and `sizes` are then of the part that did not find the places; None if
            all of them did both, which makes the intervals approximate.
    """

    places: np.ndarray
    kinds: tuple[str, ...]
    sizes: np.ndarray
    fit: np.ndarray
    line: bool
    noise: np.ndarray
    outliers: np.ndarray
    low: np.ndarray
    high: np.ndarray
    first: np.ndarray
    last: np.ndarray
    p: np.ndarray
    thin: Thinning | None = None

    def table(self, names: Any = None) -> list[dict[str, Any]]:
        """A row of the `COLUMNS` for each place, as for `pandas.DataFrame`; `names` as for `facts`."""
        places, first, last = (
            each.tolist() if names is None else [names[node] for node in each]
            for each in (self.places, self.first, self.last)
        )
        sizes = self.sizes.tolist(), self.low.tolist(), self.high.tolist()
        rows = zip(places, self.kinds, *sizes, first, last, self.p.tolist(), strict=True)
        return [dict(zip(COLUMNS, row, strict=True)) for row in rows]

    def facts(self, names: Any = None) -> list[Fact]:
        """A sentence for each place; `names` of the nodes `[n]`, such as dates, instead of their numbers."""
        found = []
        for row in self.table(names):
            sizes = zip(*(np.ravel(row[name]) for name in ("size", "low", "high")), strict=True)
            text = ", ".join(f"{size:+.4g} ({low:.3g} to {high:.3g})" for size, low, high in sizes)
            text = f"{'slope ' * (row['kind'] == 'bend')}{text}, between {row['first']} and {row['last']}"
            text += "" if self.thin is None else f", p {row['p']:.2g}"
            found.append(Fact(f"{row['kind']} at {row['place']}", text))
        return found

    def plot(self, y: Any = None, times: Any = None, axis: Any = None) -> Any:
        """Draw the fit with its jumps and bends marked; returns the matplotlib axes.

        Args:
            y: the signal, drawn as dots; None for none.
            times: of the nodes `[n]`, numbers or dates; None for 0, 1, 2, ...
            axis: to draw on; None for new axes.
        """
        import matplotlib.pyplot as plt

        axis = plt.subplots(layout="constrained")[1] if axis is None else axis
        fit, breaks = self.fit.reshape(len(self.fit), -1), self.places[np.array(self.kinds) == "jump"]
        at = np.arange(len(fit)) if times is None else np.asarray(times)
        for channel, values in enumerate(fit.T):
            if y is not None:
                axis.plot(at, np.reshape(y, fit.shape)[:, channel], ".", color=f"C{channel}", alpha=0.4)
            # Without a stroke across a jump.
            line = np.insert(np.asarray(values, float), breaks, np.nan)
            axis.plot(np.insert(at, breaks, at[breaks]), line, color=f"C{channel}", linewidth=2)
        for kind, dash in (("jump", "--"), ("bend", ":")):
            for number, place in enumerate(at[self.places[np.array(self.kinds) == kind]]):
                axis.axvline(place, color="0.4", linestyle=dash, linewidth=1, label=None if number else kind)
        for number, (first, last) in enumerate(zip(at[self.first], at[self.last], strict=True)):
            label = None if number else "95 % interval of a place"
            axis.axvspan(first, last, color="0.4", alpha=0.15, linewidth=0, label=label)
        if len(self.places):
            axis.legend()
        return axis

    def __repr__(self) -> str:
        return "\n".join([self._title(), *(f"  {fact}" for fact in self.facts())])

    def _repr_html_(self) -> str:
        return html_facts(self._title(), self.facts())

    @property
    def basis(self) -> str:
        """What the intervals and p-values rest on."""
        if self.thin is None:
            return "approximate intervals of 95 %"
        return f"intervals of 95 % and p-values by {self.thin.law} thinning, share {self.thin.share:g}"

    def _title(self) -> str:
        count, pieces = len(self.places), len(self.places) + 1
        noise = ", ".join(f"{value:.3g}" for value in np.ravel(self.noise))
        shape = ("line" if self.line else "constant") + "s" * (pieces > 1)
        left = f", {len(self.outliers)} outlier{'s' * (len(self.outliers) > 1)}" * bool(len(self.outliers))
        basis = f"; {self.basis}" * bool(count)
        return f"Jumps: {count or 'no'} place{'s' * (count != 1)}, {pieces} {shape}, noise {noise}{left}{basis}"


@dataclasses.dataclass(frozen=True)
class _Model:
    """A model with its cost and what it pays beside it, in units of log n; a polynomial has a degree and no places."""

    cost: float
    price: float
    places: np.ndarray
    joined: np.ndarray
    line: bool
    degree: int = 0


def jumps(
    y: Any,
    graph: Graph | None = None,
    *,
    node_weights: Any = None,
    missing: str = "nan",
    max_jumps: int | None = None,
    least: int = 3,
    thin: Thinning | None = None,
) -> Jumps:
    """Find the jumps of a series that a person would mark, and the bends between lines.

    The pieces between them are constants or lines, whichever explains the series better, fitted by least squares; how
    many there are is chosen by a criterion, with nothing to set; The mathematics, "Jumps of a series", has it.

    Args:
        y: `[n]` or `[n, channels]`. Channels jump together, and each counts in units of its own deviation.
        graph: a chain, whose times a line follows; None for the times 0, 1, 2, ...
        node_weights: w >= 0, `[n]`; 0 marks a missing observation.
        missing: "nan" treats NaN as missing; "error" raises.
        max_jumps: the most places; None for half the root of n, rounded up.
        least: the fewest observed values between two places, at least 2. One or two values that are six deviations of
            the noise away from those around them are outliers, which count as missing.
        thin: a `Thinning` finds the places on a part of each value and tests them on the independent rest. None: all
            values find the places, so the intervals are approximate and there are no p-values.

    Returns:
        `Jumps`. In series of more than 1,000 values the search begins on a grid of as many nodes, and then moves each
        place to its best node, so pieces that are shorter than the grid's steps may be missed.

    Raises:
        ValueError, TypeError: for invalid input, and for graphs other than chains.

    Example:
        >>> y = np.repeat([0.0, 4.0, 1.0], 100) + np.random.default_rng(0).standard_normal(300)
        >>> so.trend.jumps(y)
        Jumps: 2 places, 3 constants, noise 1.02; approximate intervals of 95 %
          jump at 100: +3.868 (3.58 to 4.16), between 100 and 100
          jump at 200: -3.087 (-3.38 to -2.79), between 200 and 200
        >>> so.trend.jumps(np.abs(np.arange(60.0) - 20)).kinds
        ('bend',)
    """
    if graph is None:
        graph = Graph.chain(max(len(np.atleast_1d(real_array("a signal", y))), 1))
    if not check_graph(graph).geometry.line:
        raise ValueError(
            f"jumps are found on series, given {graph!r}: leave out the graph or give a Graph.chain; on other graphs "
            "so.trend.regions(y, graph) finds the parts between the jumps"
        )
    if not isinstance(thin, Thinning | None):
        raise TypeError(f"thin is a so.trend.Thinning, such as Thinning('poisson'), given {thin!r:.100}")
    asked = signal_on(graph, 0, y, node_weights, missing, np.float64, PLAIN_COPIES)
    least = whole_number("least", least, 2)
    # The part of the values that chooses the places, and the one that says what is there.
    parts = [(asked.columns, asked.mass)] if thin is None else thin.parts(asked.columns, asked.mass)
    nodes = np.flatnonzero(asked.mass)
    far = _outliers(parts[0][0][nodes], min(least - 1, 2))
    outliers, nodes = nodes[far], nodes[~far]
    most = math.ceil(math.sqrt(nodes.size) / 2) if max_jumps is None else whole_number("max_jumps", max_jumps, 0)
    times = np.arange(len(asked.mass)) if graph.times is None else graph.times
    step = 1.0 if graph.times is None or len(times) < 2 else float(np.median(np.diff(times)))
    times = (times - times[len(times) // 2]) / step
    (seen, weights), (values, mass) = ((part[nodes], size[nodes]) for part, size in (parts[0], parts[-1]))
    weights = weights / weights.mean()
    seen = scaled(seen, weights)
    model = _choose(Sums.of(seen, weights, times[nodes]), seen, weights, most, least)
    middle = np.average(values, axis=0, weights=mass)
    sums = Sums.of(np.where(np.ptp(values, axis=0) > 0, values - middle, 0), mass, times[nodes])
    ends = fit_pieces(sums, model.places, model.joined, model.line)[1]
    fit = middle + values_of(sums, model.places, ends, times)
    lengths = np.diff(sums.times[np.concatenate([[0], model.places, [-1]]).astype(int)]) * step
    bends = np.diff((ends[:, 1] - ends[:, 0]) / lengths[:, None], axis=0)
    sizes = np.where(model.joined[:, None], bends, ends[1:, 0] - ends[:-1, 1])
    coefficients = (1 + model.line) * len(ends) - model.joined.sum()
    freedom, rest = max(nodes.size - coefficients, 1), np.sqrt(mass)[:, None] * (values - fit[nodes])
    noise = np.sqrt(np.sum(rest**2, axis=0) / freedom)
    known = limits(values, mass, times[nodes], model, noise**2 * long_run(rest, coefficients), freedom, least, thin)
    # Slopes are by the unit of the times. Pieces that meet have a size that pieces apart may miss.
    unit = np.where(model.joined, step, 1.0)[:, None]
    low, high = np.minimum(known.low / unit, sizes), np.maximum(known.high / unit, sizes)
    # A place between two observed nodes is anywhere after the first of them.
    first, last = np.append(-1, nodes)[known.first] + 1, nodes[known.last]
    shape, kinds = asked.channels, tuple("bend" if joined else "jump" for joined in model.joined)
    sizes, low, high = (each.reshape(-1, *shape) for each in (sizes, low, high))
    fit, noise = fit.reshape(asked.shape), noise.reshape(shape)
    places = nodes[model.places]
    return Jumps(places, kinds, sizes, fit, model.line, noise, outliers, low, high, first, last, known.p, thin)


def scaled(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The channels `[n, channels]` that are not constant, with the mean 0 and the variance 1."""
    centred = values - np.average(values, axis=0, weights=weights)
    scale = np.sqrt(np.average(centred**2, axis=0, weights=weights)) * (np.ptp(centred, axis=0) > 0)
    return centred[:, scale > 0] / scale[scale > 0]


def worth(r: float) -> float:
    """The f of the criterion, how many values with this correlation of neighbours are worth one."""
    return min((1 + r) / max(1 - r, 1e-9), MOST_F)


def _outliers(values: np.ndarray, reach: int) -> np.ndarray:
    """Which nodes are far from the median of `2 reach + 1` around them; a step or a line is where its median is.

    Source: Hampel, "The influence curve and its role in robust estimation", JASA 69 (1974).
    """
    if len(values) <= 2 * reach:
        return np.zeros(len(values), bool)
    padded = np.pad(values, ((reach, reach), (0, 0)), mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=0)
    noise = DIFFERENCES * np.median(np.abs(np.diff(values, axis=0)), axis=0)
    limit = FAR * np.maximum(noise, math.sqrt(FLOOR) * values.std(axis=0))
    far = np.any(np.abs(values - np.median(around, axis=-1)) > limit, axis=1)
    return far & (far.mean() <= MOST_OUTLIERS)


def _choose(sums: Sums, values: np.ndarray, weights: np.ndarray, most: int, least: int) -> _Model:
    """The model with the smallest criterion, or if that is a polynomial, the best one of lines that meet."""
    n, d = values.shape
    flat = _Model(0.0, 0.0, np.zeros(0, int), np.zeros(0, bool), False)
    if d == 0 or n < 2 * least:
        return flat

    def criterion(model: _Model, f: float = 1.0) -> float:
        return n * d / f * math.log(max(model.cost / (n * d), FLOOR)) + math.log(n) * model.price

    pieces = list(_piecewise(sums, d, most, least))
    smooth = list(_polynomials(sums, values, weights, d))
    first = min(pieces + smooth, key=criterion)
    fit = values_of(sums, first.places, fit_pieces(sums, first.places, first.joined, first.line)[1], sums.times[:-1])
    if first.degree:
        root, basis = np.sqrt(weights)[:, None], _basis(sums, first.degree)
        fit = basis @ np.linalg.lstsq(root * basis, root * values, rcond=None)[0]
    rest = np.sqrt(weights)[:, None] * (values - fit)
    r = max(float(np.sum(rest[1:] * rest[:-1]) / max(np.sum(rest**2), 1e-300)), 0.0)
    f = worth(r)
    best = min(pieces, key=lambda model: criterion(model, f))
    tried = [best, *_some_joined(sums, best, d)]
    best = min(tried, key=lambda model: criterion(model, f))
    if min(criterion(model, f) for model in smooth) < criterion(best, f):
        meeting = [model for model in pieces if model.line and model.joined.all()]
        best = min(meeting, key=lambda model: criterion(model, f))
    return best


def _piecewise(sums: Sums, d: int, most: int, least: int) -> Iterator[_Model]:
    for line in (False, True):
        for cost, places in best_segmentations(sums, most, line, least):
            k, broken = len(places), np.zeros(len(places), bool)
            yield _Model(cost, k * (PLACE + VALUE * d * (1 + line)) + d * line, places, broken, line)
            if line and k:
                met = fit_pieces(sums, places, ~broken, True)[0]
                yield _Model(met, k * (PLACE + VALUE * d) + d, places, ~broken, True)


def _some_joined(sums: Sums, model: _Model, d: int) -> Iterator[_Model]:
    """Lines that meet at 1, 2, ... of the places of a model, those first where meeting costs the least."""
    if not model.line or model.joined.any():
        return
    k = len(model.places)
    order = np.argsort([fit_pieces(sums, model.places, np.arange(k) == i, True)[0] for i in range(k)])
    for count in range(1, k + 1):
        joined = np.isin(np.arange(k), order[:count])
        cost = fit_pieces(sums, model.places, joined, True)[0]
        yield dataclasses.replace(model, cost=cost, price=model.price - VALUE * d * count, joined=joined)


def _basis(sums: Sums, degree: int) -> np.ndarray:
    t = sums.times[:-1]
    return np.polynomial.chebyshev.chebvander(2 * (t - t[0]) / (t[-1] - t[0]) - 1, degree)


def _polynomials(sums: Sums, values: np.ndarray, weights: np.ndarray, d: int) -> Iterator[_Model]:
    """Polynomials of degree 2 and more, up to a fourth of the observations."""
    root, most = np.sqrt(weights)[:, None], max(min(DEGREES, len(values) // 4), 2)
    explained = np.cumsum(np.sum((np.linalg.qr(root * _basis(sums, most))[0].T @ (root * values)) ** 2, axis=1))
    for degree in range(2, most + 1):
        cost = max(float(sums.energy[-1] - explained[degree]), 0.0)
        yield _Model(cost, d * degree, np.zeros(0, int), np.zeros(0, bool), True, degree)
