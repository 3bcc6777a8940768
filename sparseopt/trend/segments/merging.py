"""Pieces of a signal on any graph at a price for each edge between two pieces: merging, and minimum cuts.

    minimise over the pieces P    sum over P of min_b sum over i in P of w_i f(b; y_i)
                                  +  price #{edges between pieces}  +  piece_price #{P}

first pieces -> neighbours merge, those first that save the least -> the boundaries move -> as long as that pays

The problem is NP-hard, so the answer is a local minimum: no two pieces gain by merging. While the levels b stay,
the best boundary between two neighbours is a minimum cut. All boundaries move at once: each node near one belongs to
the territory of the nearest, in which it may change sides, so one cut of the whole graph has them all.

Source: Koepfler, Lopez, Morel, "A multiscale algorithm for image segmentation by variational method", SIAM Journal on
Numerical Analysis 31 (1994), for merging; Boykov, Veksler, Zabih, "Fast approximate energy minimization via graph
cuts", IEEE PAMI 23 (2001), section 5, for cuts.
"""

import dataclasses

import numpy as np
from scipy import sparse

# Merges of nearly equal scores, up to this factor above the least one so far, happen in one round.
TOGETHER = 1.2
# A territory reaches this many edges from its boundary; capacities of a flow are whole numbers with this price.
REACH, UNIT = 8, 10_000
# Turns of merging and moving; on pictures of steps 2 to 5 were seen.
MOST_TURNS = 50


@dataclasses.dataclass(frozen=True)
class Nodes:
    """The nodes to be divided.

    Attributes:
        values: finite `[n, d]`, 0 where missing.
        mass: w >= 0, `[n]`.
        edges: `[m, 2]`.
        counts: whether the loss is that of counts with the log-rate b, `e^b - y b`; else `|y - b|² / 2`.
    """

    values: np.ndarray
    mass: np.ndarray
    edges: np.ndarray
    counts: bool = False

    def sums(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mass `[k]` and the weighted sum of the values `[k, d]` of every piece."""
        return np.bincount(labels, self.mass), _summed(labels, self.mass[:, None] * self.values)

    def means(self, labels: np.ndarray) -> np.ndarray:
        """The weighted mean of the values of every piece, `[k, d]`, 0 where nothing is observed."""
        mass, total = self.sums(labels)
        return total / np.where(mass > 0, mass, 1)[:, None]

    def saved(self, mass: np.ndarray, total: np.ndarray) -> np.ndarray:
        """By how much a piece of that mass and sum is better at its best level than at 0, plus a constant."""
        seen = np.where(mass > 0, mass, 1)[..., None]
        if self.counts:
            return np.sum(total * np.log(np.where(total > 0, total, 1) / seen), axis=-1)
        return np.sum(total * total / seen, axis=-1) / 2

    def loss(self, labels: np.ndarray) -> float:
        """The loss of the pieces at their best levels, plus a constant."""
        return -float(np.sum(self.saved(*self.sums(labels))))

    def cut(self, labels: np.ndarray) -> int:
        """The number of edges between pieces."""
        return int(np.count_nonzero(np.diff(labels[self.edges])))

    def objective(self, labels: np.ndarray, price: float, piece_price: float = 0.0) -> float:
        return self.loss(labels) + price * self.cut(labels) + piece_price * (int(labels.max()) + 1)

    def excess(self, nodes: np.ndarray, mass: np.ndarray, total: np.ndarray) -> np.ndarray:
        """The loss of each node at the best level of a piece of that mass and sum, plus a constant of the node."""
        seen, y = np.where(mass > 0, mass, 1)[:, None], self.values[nodes]
        if self.counts:
            rate = np.maximum(total / seen, np.finfo(float).tiny)
            each = rate - y * np.log(rate)
        else:
            each = (total / seen - y) ** 2 / 2
        return self.mass[nodes] * each.sum(axis=1)

    def parts(self, labels: np.ndarray) -> np.ndarray:
        """The connected parts of the pieces."""
        return _components(len(self.mass), *self.edges[np.diff(labels[self.edges])[:, 0] == 0].T)


def best_pieces(nodes: Nodes, price: float, labels: np.ndarray, piece_price: float = 0.0) -> np.ndarray:
    """The piece of every node, `0..k-1`, from first pieces `labels`; each is connected.

    Example:
        >>> from sparseopt.trend.segments.merging import Nodes, best_pieces
        >>> y, edges = np.array([[0.1], [-0.1], [5.0], [5.2]]), np.array([[0, 1], [1, 2], [2, 3], [3, 0]])
        >>> best_pieces(Nodes(y, np.ones(4), edges), 1.0, np.arange(4)).tolist()
        [0, 0, 1, 1]
    """
    labels = merge(nodes, price, nodes.parts(labels), piece_price)
    best = nodes.objective(labels, price, piece_price)
    for _ in range(MOST_TURNS):
        following = merge(nodes, price, move(nodes, price, labels), piece_price)
        objective = nodes.objective(following, price, piece_price)
        if not objective < best:
            break
        labels, best = following, objective
    return labels


def merge(nodes: Nodes, price: float, labels: np.ndarray, piece_price: float = 0.0) -> np.ndarray:
    """Pieces merged with neighbours as long as a merge costs less than the prices that it saves."""
    level, (mass, total) = 0.0, nodes.sums(labels)
    pairs, links = _between(labels, nodes.edges)
    while len(pairs):
        a, b = pairs.T
        alone = nodes.saved(mass, total)
        score = (alone[a] + alone[b] - nodes.saved(mass[a] + mass[b], total[a] + total[b])) / (
            price * links + piece_price
        )
        if not score.min() <= 1:
            break
        level = max(level, TOGETHER * score.min())
        least = np.full(len(mass), min(level, 1.0))
        np.minimum.at(least, a, score)
        np.minimum.at(least, b, score)
        chosen = (score <= least[a]) & (score <= least[b])
        new = _components(len(mass), a[chosen], b[chosen])
        labels, mass, total = new[labels], np.bincount(new, mass), _summed(new, total)
        pairs, links = _between(new, pairs, links)
    return labels


def move(nodes: Nodes, price: float, labels: np.ndarray) -> np.ndarray:
    """The parts of the pieces after the boundaries have moved, where they are the best for the present levels."""
    n, edges = len(labels), nodes.edges
    i, j = np.concatenate([edges, edges[:, ::-1]]).T
    mass, total = nodes.sums(labels)
    cross = labels[i] != labels[j]
    # The piece on the other side of the nearest boundary, -1 where it is far.
    other = np.full(n, -1)
    other[i[cross]] = labels[j[cross]]
    inside_i, inside_j = i[~cross], j[~cross]
    for _ in range(REACH):
        far = (other[inside_i] < 0) & (other[inside_j] >= 0)
        if not far.any():
            break
        other[inside_i[far]] = other[inside_j[far]]
    low, high = np.minimum(labels, other), np.maximum(labels, other)
    # Of two territories that meet, the nodes of one stay.
    territory = np.where(other >= 0, low * (labels.max() + 1) + high, -1)
    free = other >= 0
    free[i[(territory[i] < territory[j]) & (other[i] >= 0)]] = False
    at = np.flatnonzero(free)
    if not at.size:
        return labels
    costs = np.stack([nodes.excess(at, mass[side[at]], total[side[at]]) for side in (low, high)], axis=1) / price
    place = np.full(n, -1)
    place[at] = np.arange(len(at))
    fixed = free[i] & ~free[j]
    for column, side in enumerate((low, high)):
        costs[:, column] += np.bincount(place[i[fixed]], labels[j[fixed]] != side[i[fixed]], len(at))
    inner = free[i] & free[j]
    lower = _cut(costs, place[i[inner]], place[j[inner]])
    labels = labels.copy()
    labels[at] = np.where(lower, low[at], high[at])
    return nodes.parts(labels)


def _cut(costs: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Which nodes are on the first side in the minimum of `costs [n, 2]` plus 1 for each edge, given both ways, cut."""
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    n, gain = len(costs), costs[:, 1] - costs[:, 0]
    # More than all edges of a node together cannot matter. Capacities are int32.
    most = np.minimum(np.bincount(i, minlength=n) + 1, 100_000)
    gain = np.round(UNIT * np.clip(gain, -most, most)).astype(np.int32)
    first, second = np.flatnonzero(gain > 0), np.flatnonzero(gain < 0)
    rows = np.concatenate([np.full(len(first), n), second, i])
    columns = np.concatenate([first, np.full(len(second), n + 1), j])
    data = np.concatenate([gain[first], -gain[second], np.full(len(i), UNIT, np.int32)])
    graph = sparse.csr_array((data, (rows, columns)), shape=(n + 2, n + 2))
    left = graph - maximum_flow(graph, n, n + 1).flow
    left.eliminate_zeros()
    side = np.zeros(n + 2, bool)
    side[breadth_first_order(left, n, return_predecessors=False)] = True
    return side[:n]


def _between(labels: np.ndarray, pairs: np.ndarray, links: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of labels that differ, each once, and the links between them."""
    ends = np.sort(labels[pairs], axis=1)
    apart = ends[:, 0] != ends[:, 1]
    size = labels.max() + 1
    key, place = np.unique(ends[apart] @ [size, 1], return_inverse=True)
    weights = None if links is None else links[apart]
    return np.stack(np.divmod(key, size), axis=1), np.bincount(place, weights, len(key))


def _components(n: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    from scipy.sparse.csgraph import connected_components

    joined = sparse.coo_array((np.ones(len(i), bool), (i, j)), shape=(n, n))
    return connected_components(joined, directed=False)[1].astype(np.int64)


def _summed(labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(labels, column) for column in rows.T], axis=1)
