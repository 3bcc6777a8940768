"""Groups of entries that vanish together, on working sets: steps on one group at a time, and Newton steps.

    minimise over w    1/2 <w - start, G (w - start)> + <q, w - start> + sum_g weight_g ||w_g|| + sum_j entry_j |w_j|

A group's step minimises a bound of the quadratic by its largest curvature on the group. Newton steps on the groups that
are not 0, where the objective is smooth, end what these begin.

Source: Yuan and Lin, "Model selection and estimation in regression with grouped variables", JRSS B 68 (2006), eq. 2.4;
Simon, Friedman, Hastie and Tibshirani, "A sparse-group lasso", JCGS 22 (2013);
Qin, Scheinberg and Goldfarb, "Efficient block-coordinate descent algorithms for the group lasso", 2013.
"""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparseopt.core.base.types import is_traced
from sparseopt.core.penalties.groups import GroupL2, SparseGroup
from sparseopt.core.working_sets.columns import Product, in_size, round_up
from sparseopt.core.working_sets.entry_terms import Terms, without_intercept
from sparseopt.core.working_sets.restricted import MOST_PAIRS, SHARES, TINY, Enough, effort, newton_direction

# Up to this size the curvatures of groups are computed together.
NARROW = 32
# How many times larger than the mean one the largest group may be for passes to be cheap.
UNLIKE = 4


def groups_of(penalty: Any, size: int) -> "GroupTerms | None":
    """The terms of a known `GroupL2` or `SparseGroup` of labels, maybe with an intercept; None for other penalties."""
    if is_traced(penalty) or not size:
        return None
    if (part := without_intercept(penalty, size)) is None:
        return None
    penalty, rows = part
    if type(penalty) is GroupL2:
        weights, entries = penalty.weight, 0.0
    elif type(penalty) is SparseGroup:
        weights, entries = penalty.group_weight, penalty.weight
    else:
        return None
    count, more = penalty.num_groups or 0, size - rows
    if penalty.groups is None or np.shape(penalty.groups) != (rows,):
        return None
    if np.shape(weights) not in ((), (1,), (count,)) or np.shape(entries) not in ((), (1,), (rows,)):
        return None
    labels = np.append(np.asarray(penalty.groups), np.full(more, count)).astype(np.int64)
    given = ((weights, count), (entries, rows))
    of_groups, of_entries = (np.append(np.broadcast_to(number, to), np.zeros(more)) for number, to in given)
    return GroupTerms(labels, of_groups.astype(np.float64), of_entries.astype(np.float64))


class GroupTerms(Terms):
    """The penalty of a vector of entries, `sum_g weights_g ||x_g|| + sum_j entries_j |x_j|`.

    Attributes:
        free: the entries without a weight, as that of an intercept.
    """

    convex, by_entry = True, False

    def __init__(self, labels: np.ndarray, weights: np.ndarray, entries: np.ndarray) -> None:
        self.labels, self.weights, self.entries = labels, weights, entries
        self.plain = not entries.any()
        free = (weights[labels] == 0) & (entries == 0)
        self.free, self.sided = np.flatnonzero(free), np.zeros(0, np.int64)
        self.opens = np.bincount(labels, free, weights.size) > 0  # whether a group has such entries
        self.weight = self.ridge = self.low = np.zeros(labels.size)  # of the free ones

    def take(self, places: np.ndarray) -> "GroupTerms":
        """Of places that are whole groups."""
        part = copy.copy(self)
        kept, labels = np.unique(self.labels[places], return_inverse=True)
        part.__init__(labels.reshape(-1), self.weights[kept], self.entries[places])  # type: ignore[misc]
        return part

    def sums(self, x: np.ndarray) -> np.ndarray:
        """`[groups]`."""
        return np.bincount(self.labels, x, self.weights.size)

    def lengths(self, x: np.ndarray) -> np.ndarray:
        """`[groups]`."""
        return np.sqrt(self.sums(x * x))

    def shrunk(self, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The soft threshold by weights of the entries."""
        return x if self.plain else np.sign(x) * np.maximum(np.abs(x) - weights, 0)

    def completed(self, places: np.ndarray) -> np.ndarray:
        """All entries of the groups of these."""
        chosen = np.zeros(self.weights.size, bool)
        chosen[self.labels[places]] = True
        return chosen[self.labels].nonzero()[0]

    def value(self, x: np.ndarray) -> float:
        return float(self.weights @ self.lengths(x) + self.entries @ np.abs(x))

    def slack(self, x: np.ndarray, u: np.ndarray) -> float:
        lost = self.weights * self.lengths(x) + self.sums(self.entries * np.abs(x) - u * x)
        return float(np.maximum(lost, 0).sum())

    def gauge(self, u: np.ndarray) -> float:
        """The smallest t >= 0 for which `u / t` lies in the domain of the conjugate, but for `free`.

        The largest t with `||soft(u_g, t entries_g)|| = t weights_g`, by Newton's method from below.
        """
        if self.plain:
            seen = self.weights > 0
            return float((self.lengths(u)[seen] / self.weights[seen]).max(initial=0))
        size = np.abs(u)
        size[self.free] = 0
        level, last, rest = np.zeros(self.weights.size), -1.0, size
        while level.max(initial=0) > last * (1 + 1e-15):
            last = level.max(initial=0)
            along, across = self.sums(size * rest), self.weights * self.lengths(rest) + self.sums(self.entries * rest)
            level = np.maximum(level, np.divide(along, across, out=np.zeros_like(level), where=across > 0))
            rest = np.maximum(size - level[self.labels] * self.entries, 0)
        return float(last) * (1 + 1e-15)

    def scores(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        score = self.lengths(self.shrunk(u, self.entries)) / np.maximum(self.weights, TINY)
        return np.where(self.held(x), np.inf, score[self.labels])

    def held(self, x: np.ndarray) -> np.ndarray:
        """Whether the group of each entry is not 0 or has entries without a weight."""
        return ((self.lengths(x) > 0) | self.opens)[self.labels]


@jax.jit
def group_steps(
    gram: Float[Array, "k k"],
    both: Float[Array, "2 k"],
    entries: Float[Array, " k"],
    table: Int[Array, "m s"],
    numbers: Float[Array, "2 m"],
    steps: Any,
    count: Any,
) -> Float[Array, "2 k"]:
    """W and the gradient q after `steps` steps on one group, in turn over the first `count` rows of the table."""
    weight, curvature = numbers

    def step(_: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        w, q, j = carry
        places = table[j]
        at = w.at[places].get(mode="fill", fill_value=0)
        z = at - q.at[places].get(mode="fill", fill_value=0) / curvature[j]
        z = jnp.sign(z) * jnp.maximum(jnp.abs(z) - entries.at[places].get(mode="fill", fill_value=0) / curvature[j], 0)
        length = jnp.sqrt(jnp.sum(z * z))
        move = z * jnp.maximum(1 - weight[j] / (curvature[j] * jnp.maximum(length, TINY)), 0) - at
        q += move @ gram.at[places].get(mode="fill", fill_value=0)
        return w.at[places].add(move, mode="drop"), q, jnp.where(j + 1 == count, 0, j + 1)

    w, q, _ = jax.lax.fori_loop(0, steps, step, (*both, 0))
    return jnp.stack([w, q])


def minimise_groups(
    gram: np.ndarray, q: np.ndarray, w: np.ndarray, terms: GroupTerms, enough: Enough, _: Product | None = None
) -> np.ndarray:
    """The w at which a further step on every group would gain at most `enough`; the Gram matrix is as in `minimise`."""
    count, padded = q.size, in_size(gram, q.size)
    size, gram = len(padded), padded[:count, :count]
    table, numbers = _table(gram, terms, size)
    groups, entries = terms.weights.size, np.zeros(size)
    entries[:count] = terms.entries
    curvature = numbers[1, :groups]
    start, passes, most = (w, q), *effort(count)
    if table.shape[1] * groups > UNLIKE * count:  # small groups cost as much as the largest
        passes, most = effort(1)
    for _pair in range(MOST_PAIRS):
        before, both = w, np.zeros((2, size))
        both[:, :count] = w, q
        w, q = np.array(group_steps(padded, both, entries, table, numbers, passes * groups, groups))[:, :count]
        w, q = _newton(gram, q, w, terms, most)
        if enough.reached(start, w, q, terms):
            break
        at = curvature[terms.labels]
        z = terms.shrunk(w - q / at, terms.entries / at)
        shrunk = np.maximum(1 - terms.weights / (curvature * np.maximum(terms.lengths(z), TINY)), 0)
        move = terms.lengths(z * shrunk[terms.labels] - w)
        if curvature @ (move * move) <= enough.gain or (before == w).all():
            break
    return w


def _table(gram: np.ndarray, terms: GroupTerms, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The places `[m, s]` of every group, filled up with `size`; the weights and largest curvatures `[2, m]`."""
    sizes = np.bincount(terms.labels, minlength=terms.weights.size)
    order = np.argsort(terms.labels, kind="stable")
    rank = np.arange(order.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    wide = 1 << int(sizes.max() - 1).bit_length()
    table = np.full((round_up(sizes.size), wide), size)
    table[terms.labels[order], rank] = order
    numbers = np.ones((2, len(table)))
    numbers[0, : sizes.size] = terms.weights
    numbers[1, : sizes.size] = _curvatures(gram, np.minimum(table[: sizes.size], len(gram)), sizes)
    return table, numbers


def _curvatures(gram: np.ndarray, table: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The largest of every group; wide ones apart, since a block of each in their size would take much memory."""
    found = np.empty(sizes.size)
    narrow = sizes <= NARROW
    places = table[narrow, :NARROW]
    inside = places < len(gram)
    places = np.where(inside, places, 0)
    blocks = gram[places[:, :, None], places[:, None, :]] * (inside[:, :, None] & inside[:, None, :])
    if narrow.any():
        found[narrow] = np.linalg.eigvalsh(blocks)[:, -1]
    for group in (~narrow).nonzero()[0]:
        own = table[group, : sizes[group]]
        found[group] = np.linalg.eigvalsh(gram[np.ix_(own, own)])[-1]
    return np.maximum(found * (1 + 1e-9), TINY)


def _newton(
    gram: np.ndarray, q: np.ndarray, w: np.ndarray, terms: GroupTerms, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Newton steps on the entries on smooth pieces: those of groups that are not 0, and those without a weight."""
    kinked = terms.entries > 0
    for _ in range(most):
        length = terms.lengths(w)
        smooth = ((length > 0) | terms.opens)[terms.labels] & ((w != 0) | ~kinked)
        free = smooth.nonzero()[0]
        if not free.size:
            break
        at, labels, rows = w[free], terms.labels[free], gram[free]
        weight, of = terms.weights[labels], np.where(length > 0, length, 1)[labels]
        unit = at / of
        hessian = rows[:, free]
        first, second = _pairs(labels)
        # Of a length the second derivative is (I - u uᵀ) / length.
        hessian[first, second] -= (weight / of)[first] * unit[first] * unit[second]
        slope = q[free] + weight * unit + terms.entries[free] * np.sign(at)
        way = newton_direction(hessian, slope, weight / of)
        if way is None:
            break
        for share in SHARES:
            new = w.copy()
            new[free] += share * way
            # A group that turns by a right angle and more becomes 0, and so does an entry that would change its sign.
            turned = (terms.sums(new * w) <= 0) & (terms.weights > 0)
            new[turned[terms.labels] | (kinked & (new * w < 0))] = 0
            q_new = q + (new[free] - at) @ rows
            change = 0.5 * float((q + q_new) @ (new - w)) + terms.value(new) - terms.value(w)
            if change < 0:
                break
        else:
            break
        near = share == 1 and np.abs(new - w).max() <= 1e-9 * np.abs(new).max()
        w, q = new, q_new
        if near:
            break
    return w, q


def _pairs(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of places with the same label."""
    order = np.argsort(labels, kind="stable")
    sizes = np.unique(labels, return_counts=True)[1]
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)  # of the group of every place, in this order
    counts = np.repeat(sizes, sizes)
    first = np.repeat(np.arange(labels.size), counts)
    inside = np.arange(first.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return order[first], order[starts[first] + inside]
