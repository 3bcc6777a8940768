"""`regions`, the parts of a picture, a map or a graph that a person would mark, each with a level of its own.

With every channel scaled to variance 1, the chosen division into k connected parts minimises

    n d / f  log max(RSS / (n d), 1/100)  +  log(n) (2 + 2 d) (k - 1)  +  3/2 (c - k + 1)

for n observed nodes, d channels and c edges between parts. On a chain c = k - 1, and this is the criterion of `jumps`
for constants, with the same f for correlated noise. On other graphs a boundary has a price for its length, since
it may go on in several ways at each of its edges.

A smooth signal has no parts, so it is a candidate: (W + s L²) b = W y with the Laplacian L and the node weights W. Each
of its degrees of freedom, the trace of the solve, costs log(n).

Source: Leclerc, "Constructing simple stable descriptions for image partitioning", International Journal of Computer
Vision 3 (1989), for the price of a boundary's length; Buja, Hastie, Tibshirani, Annals of Statistics 17 (1989), for
the trace.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import sparse

from sparseopt.core.base.types import Observer
from sparseopt.core.penalties.entries import L1
from sparseopt.core.penalties.groups import GroupL2
from sparseopt.system.report import Fact, html_facts
from sparseopt.trend.base.fit import signal_on
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.signal import PLAIN_COPIES, check_graph
from sparseopt.trend.filter import trend_filter
from sparseopt.trend.segments.find import DIFFERENCES, FLOOR, PLACE, VALUE, scaled, worth
from sparseopt.trend.segments.merging import Nodes, best_pieces

# The price of a further edge of a boundary. Of 240 fields of white and of correlated noise, 16 × 16 and 32 × 32, prices
# of 2, 1.5, 1 and .5 found parts in 0, 0, 1 and 34. At 2, steps of .7 to 1 deviations counted as a smooth signal; at 1,
# boundaries were rough, and a smooth blob had parts.
EDGE = 1.5
# The weights of total variation, in units of the noise, whose pieces are merged, its gap, and the turns in which the
# variance follows from the parts, until it changes by less than the fraction SAME.
STARTS, START_TOL, TURNS, SAME = (1.0, 3.0), 1e-3, 5, 0.02
# The values of s. Off complete grids the solves are conjugate gradients, of at most this many steps from the one
# before, and the trace is that of this many random signs (Hutchinson, 1990).
SMOOTHING, MOST_STEPS, PROBES, CG_TOL = 8.0 ** np.arange(8), 500, 2, 1e-3
# More parts than this are counted, not listed.
LISTED = 20
PAIR_COLUMNS = ("first", "second", "edges", "step")  # of the table


@dataclasses.dataclass(frozen=True, repr=False)
class Regions:
    """The parts of a signal on a graph.

    Attributes:
        pieces: the part of every node, integers from 0 in the order of the first nodes, in the shape of the nodes.
        levels: the mean of each part, `[k]` or `[k, channels]`.
        counts: the number of observed nodes of each part, `[k]`.
        edges: the edges between parts, as rows of `graph.edges`, ascending.
        fit: the signal of the levels, in the shape of the signal.
        noise: the standard deviation of the residuals at node weight 1, `[]` or `[channels]`.
        smooth: whether a smooth signal explains the values better than any parts; then there is one part.
        graph: the graph.
    """

    pieces: np.ndarray
    levels: np.ndarray
    counts: np.ndarray
    edges: np.ndarray
    fit: np.ndarray
    noise: np.ndarray
    smooth: bool
    graph: Graph

    def table(self) -> list[dict[str, Any]]:
        """A row `first`, `second`, `edges`, `step` for each two parts that meet, as for `pandas.DataFrame`."""
        ends = np.sort(self.pieces.reshape(-1)[self.graph.edges[self.edges]], axis=1)
        pairs, counts = np.unique(ends, axis=0, return_counts=True)
        steps = self.levels[pairs[:, 1]] - self.levels[pairs[:, 0]]
        rows = zip(*pairs.T.tolist(), counts.tolist(), steps.tolist(), strict=True)
        return [dict(zip(PAIR_COLUMNS, row, strict=True)) for row in rows]

    def facts(self) -> list[Fact]:
        """The level and the size of each part, of the largest if there are many."""
        large = np.argsort(-self.counts, kind="stable")[:LISTED]
        found = [
            Fact(f"part {k}", ", ".join(f"{level:.4g}" for level in np.ravel(self.levels[k])) + f", {self.counts[k]:,}")
            for k in large
        ]
        rest = len(self.counts) - len(large)
        return [*found, Fact("others", f"{rest:,} smaller parts")] if rest else found

    def plot(self, axis: Any = None) -> Any:
        """Draw the parts of a grid with two axes in their levels, with their boundaries; returns the matplotlib axes.

        Several channels are drawn as their mean.
        """
        import matplotlib.pyplot as plt

        shape = self.graph.shape
        if shape is None or len(shape) != 2:
            raise ValueError(f"the plot is of grids with two axes, given {self.graph!r}: draw `pieces` on your own map")
        axis = plt.subplots(layout="constrained")[1] if axis is None else axis
        picture = axis.imshow(self.fit.reshape(*shape, -1).mean(axis=-1), cmap="viridis", interpolation="nearest")
        axis.figure.colorbar(picture, ax=axis, label="level")
        draw_boundaries(axis, self.pieces.reshape(shape))
        return axis

    def __repr__(self) -> str:
        return "\n".join([self._title(), *(f"  {fact}" for fact in self.facts())])

    def _repr_html_(self) -> str:
        return html_facts(self._title(), self.facts())

    def _title(self) -> str:
        count, noise = len(self.counts), ", ".join(f"{value:.3g}" for value in np.ravel(self.noise))
        why = ", smooth" * self.smooth
        return f"Regions: {count} part{'s' * (count > 1)}{why}, {len(self.edges):,} edges between parts, noise {noise}"


def draw_boundaries(axis: Any, pieces: np.ndarray) -> None:
    """Draw the boundaries of the parts `[height, width]` of a picture on its matplotlib axes."""
    ends = Graph.grid(pieces.shape).edges
    i, j = np.divmod(ends[np.diff(pieces.reshape(-1)[ends])[:, 0] != 0], pieces.shape[1])
    # A boundary crosses the middle of its edge.
    middle, across = np.stack([j.mean(axis=1), i.mean(axis=1)]), np.stack([np.ptp(i, axis=1), np.ptp(j, axis=1)]) / 2
    lines = np.stack([middle - across, middle + across, middle + np.nan], axis=2).reshape(2, -1)
    axis.plot(*lines, "w-", linewidth=1)


def regions(
    y: Any, graph: Graph, *, node_weights: Any = None, missing: str = "nan", observer: Observer | None = None
) -> Regions:
    """Find the parts of a picture, a map or a graph that a person would mark, with nothing to set.

    Each part is connected and has a level of its own, without shrinkage; how many there are is chosen by the criterion
    of `jumps` for constants, with a price for the length of boundaries; The mathematics, "Regions of a graph", has it.
    For series `jumps` finds lines and bends as well.

    Args:
        y: `[n]` or `[n, channels]`; on a grid, also `[*shape]` or `[*shape, channels]`. Channels have the same parts,
            and each counts in units of its own deviation.
        graph: any graph with an edge.
        node_weights: w >= 0, `[n]`; 0 marks a missing observation, which is in the part of its neighbours.
        missing: "nan" treats NaN as missing; "error" raises.
        observer: called with what is done next, the number of these that are finished, and the most there may be.

    Returns:
        `Regions`; a local minimum of the criterion, see `L0` in `trend_filter`.

    Raises:
        ValueError, TypeError: for invalid input, and for graphs without an edge.

    Example:
        >>> picture = np.zeros((20, 20))
        >>> picture[5:12, 4:15] = 3.0
        >>> picture += np.random.default_rng(0).standard_normal((20, 20))
        >>> found = so.trend.regions(picture, so.Graph.grid((20, 20)))
        >>> found
        Regions: 2 parts, 40 edges between parts, noise 0.984
          part 0: -0.04452, 323
          part 1: 2.997, 77
        >>> found.table()
        [{'first': 0, 'second': 1, 'edges': 40, 'step': 3.041...}]
    """
    if check_graph(graph).num_edges == 0:
        raise ValueError(f"parts are of graphs with edges, given {graph!r}: every node is a part of its own")
    asked = signal_on(graph, 0, y, node_weights, missing, np.float64, PLAIN_COPIES)
    mass, columns, observed = asked.mass, asked.columns, asked.mass > 0
    seen = scaled(columns[observed], mass[observed])
    values = np.zeros((len(mass), seen.shape[1]))
    values[observed] = seen
    nodes = Nodes(values, mass / mass[observed].mean(), np.asarray(graph.edges))
    told = observer or (lambda what, done, total: None)
    labels, smooth = _choose(nodes, graph, told) if seen.size else (nodes.parts(np.zeros(len(mass))), False)
    levels = dataclasses.replace(nodes, values=columns).means(labels)
    fit, counts = levels[labels], np.bincount(labels, observed)
    freedom = max(int(observed.sum()) - len(levels), 1)
    noise = np.sqrt(np.sum(mass[:, None] * (columns - fit) ** 2, axis=0) / freedom)
    shape = asked.channels
    return Regions(
        labels.reshape(asked.shape[: len(asked.shape) - len(shape)]),
        levels.reshape(-1, *shape),
        counts.astype(int),
        np.flatnonzero(np.diff(labels[nodes.edges])),
        fit.reshape(asked.shape),
        noise.reshape(shape),
        smooth,
        graph,
    )


def _choose(nodes: Nodes, graph: Graph, told: Observer) -> tuple[np.ndarray, bool]:
    """The parts with the smallest criterion, and whether a smooth signal has a smaller one."""
    w, (size, d) = nodes.mass, nodes.values.shape
    n, energy = int(np.count_nonzero(w)), float(np.sum(w[:, None] * nodes.values**2))
    log_n, alone, both = math.log(n), nodes.parts(np.zeros(size)), nodes.edges[np.all(w[nodes.edges] > 0, axis=1)]

    def unexplained(rss: float, f: float) -> float:
        return n * d / f * math.log(max(rss / (n * d), FLOOR))

    def rss_of(labels: np.ndarray) -> float:
        return energy + 2 * nodes.loss(labels)

    def criterion(labels: np.ndarray, f: float) -> float:
        more = int(labels.max()) + 1 - graph.num_components
        price = log_n * (PLACE + VALUE * d) * more + EDGE * (nodes.cut(labels) - more)
        return unexplained(rss_of(labels), f) + price

    rough = np.median(np.abs(np.diff(nodes.values[both], axis=1))) if len(both) else 0.0
    noise = max(DIFFERENCES * float(rough), math.sqrt(FLOOR))
    first, turns = [], itertools.count()
    for index, start in enumerate(STARTS):
        told("first parts", index, len(STARTS))
        penalty = L1(start * noise) if d == 1 else GroupL2(start * noise)
        found = trend_filter(nodes.values, graph, penalty, tol=START_TOL, node_weights=None if n == size else w)
        first.append(found.pieces())

    def search(starts: list[np.ndarray], f: float, first_variance: float) -> Iterator[np.ndarray]:
        """The best parts while the variance, in which prices are, follows from them."""
        yield alone
        for labels in starts:
            variance = first_variance
            for _ in range(TURNS):
                told("turn", next(turns), (len(STARTS) + 1) * TURNS)
                piece_price = (log_n * (PLACE + VALUE * d) - EDGE) / 2
                labels = best_pieces(nodes, f * variance * EDGE / 2, labels, f * variance * piece_price)
                yield labels
                before, variance = variance, max(rss_of(labels) / (n * d), FLOOR)
                if abs(variance - before) <= SAME * before:
                    break

    tried = list(search(first, 1.0, noise**2))
    labels = min(tried, key=lambda each: criterion(each, 1.0))
    rest = np.sqrt(w)[:, None] * (nodes.values - nodes.means(labels)[labels])
    near = np.sum(rest[both[:, 0]] * rest[both[:, 1]]) / max(len(both), 1)
    r = max(float(near / max(np.sum(rest**2) / n, 1e-300)), 0.0)
    f = worth(r)
    tried += search([labels], f, max(rss_of(labels) / (n * d), FLOOR))
    labels = min(tried, key=lambda each: criterion(each, f))
    smooth = [unexplained(rss, f) + log_n * d * more for rss, more in _smooth(nodes, graph, told) if 1 <= more <= n / 4]
    return (alone, True) if min(smooth, default=math.inf) < criterion(labels, f) else (labels, False)


def _smooth(nodes: Nodes, graph: Graph, told: Observer) -> Iterator[tuple[float, float]]:
    """The RSS of smooth signals, and their degrees of freedom beside the mean of each component."""
    from scipy import fft
    from scipy.sparse.linalg import cg

    w, values, shape = nodes.mass, nodes.values, graph.shape
    if shape is not None and graph.spacing is None and graph.weights is None and np.all(w == 1):
        waves = fft.dctn(values.reshape(*shape, -1), axes=range(len(shape)), norm="ortho")
        each = [2 - 2 * np.cos(np.pi * np.arange(size) / size) for size in shape]
        squares = sum(np.meshgrid(*each, indexing="ij")) ** 2
        energy = np.sum(waves**2, axis=-1)
        for s in SMOOTHING:
            kept = 1 / (1 + s * squares)
            yield float(np.sum((1 - kept) ** 2 * energy)), float(kept.sum()) - 1
        return
    differences = graph.matrix(1)
    laplacian = differences.T @ differences
    square, weights = laplacian @ laplacian, sparse.diags_array(w)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (len(w), PROBES))
    right = np.concatenate([w[:, None] * values, w[:, None] * signs], axis=1)
    b = np.concatenate([values, signs], axis=1)
    for index, s in enumerate(SMOOTHING):
        told("smooth signal", index, len(SMOOTHING))
        matrix = (weights + s * square).tocsr()
        jacobi = sparse.diags_array(1 / matrix.diagonal())
        solved = [
            cg(matrix, column, guess, rtol=CG_TOL, maxiter=MOST_STEPS, M=jacobi)[0]
            for column, guess in zip(right.T, b.T, strict=True)
        ]
        b = np.stack(solved, axis=1)
        fit, probes = b[:, : values.shape[1]], b[:, values.shape[1] :]
        yield (
            float(np.sum(w[:, None] * (values - fit) ** 2)),
            float(np.sum(w[:, None] * signs * probes)) / PROBES - graph.num_components,
        )
