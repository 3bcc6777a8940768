"""The jumps of a series at a price per jump, exactly: optimal partitioning with functional pruning.

    minimise over b    sum_i w_i (y_i - b_i)²  +  price #{i : b_i != b_(i+1)}

Let Q_t(m) be the optimum over the first t values if the last piece has the level m. Then

    Q_t(m) = min { Q_(t-1)(m), min_m' Q_(t-1)(m') + price } + w_t (y_t - m)²,

the least of a few parabolas, each the best on an interval of levels. Those that are best nowhere can never be again,
so a step costs as many operations as parabolas are left, on a flat series about the logarithm of its length.

Source: Maidstone, Hocking, Rigaill, Fearnhead, "On optimal multiple changepoint algorithms for large data", Statistics
and Computing 27 (2017), section 3; Rigaill, "A pruned dynamic programming algorithm", Journal de la SFdS 156 (2015).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.types import precision

# Parabolas that are kept at first. At a price of 2 log n in units of the noise 9 to 22 were seen, on a steep trend at a
# high price hundreds; the table doubles as long as it overflows.
FIRST_ROOM = 32


def optimal_jumps(y: np.ndarray, price: float, weights: np.ndarray | None = None) -> np.ndarray:
    """The places of the jumps of the optimum, the index of the first value after each; ascending integers.

    Args:
        y: finite values `[n]`.
        price: of a jump, positive, in units of w y².
        weights: w >= 0, `[n]`; 0 where missing.

    Example:
        >>> from sparseopt.trend.segments.functional import optimal_jumps
        >>> optimal_jumps(np.array([0.1, -0.1, 0.0, 5.1, 4.9, 5.0]), 1.0).tolist()
        [3]
    """
    w = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
    nodes = np.flatnonzero(w > 0)
    z, w = np.asarray(y, np.float64)[nodes], w[nodes]
    if not z.size or np.ptp(z) == 0:
        return np.zeros(0, int)
    # Around 0, and of at most 1: parabolas of one size.
    scale = np.ptp(z) / 2
    z, room, places = (z - z.min()) / scale - 1, FIRST_ROOM, [len(z)]
    # Values of weight 0 behind the last one change nothing, and leave one program for many lengths.
    z, w = (np.pad(each, (0, (1 << (len(each) - 1).bit_length()) - len(each))) for each in (z, w))
    with precision(np.dtype(np.float64)):
        last, most = _last_pieces(z, w, price / scale**2, room)
        while most > room:
            room *= 2
            last, most = _last_pieces(z, w, price / scale**2, room)
    last = np.asarray(last)
    while (place := int(last[places[-1] - 1])) > 0:
        places.append(place)
    return nodes[places[:0:-1]]


@functools.partial(jax.jit, static_argnames="room")
def _last_pieces(y: Any, w: Any, price: Any, room: int) -> tuple[jax.Array, jax.Array]:
    """Where the last piece of the optimum over the first t values begins, for every t, and the most parabolas kept.

    Row i of the table is the parabola `a m² - 2 b m + c` on [low, high], ascending, and where its piece begins; rows
    that are not used have low > high.
    """
    empty = jnp.array([3.0, -3.0, 0.0, 0.0, 0.0, 0.0])
    table = jnp.tile(empty, (room, 1)).at[0].set(jnp.array([-1.0, 1.0, 0.0, 0.0, 0.0, 0.0]))

    def step(carry: Any, now: Any) -> tuple[Any, jax.Array]:
        table, most = carry
        y, w, t = now
        low, high, a, b, c, begin = table.T
        a, b, c = a + w, b + w * y, c + w * y * y
        curved = jnp.where(a > 0, a, 1)
        m = jnp.clip(b / curved, low, high)
        least = jnp.where(low < high, (a * m - 2 * b) * m + c, jnp.inf)
        best = jnp.argmin(least)
        level = least[best] + price
        # Where a parabola stays below the price of a jump from the best one.
        root = jnp.sqrt(jnp.maximum(b * b - a * (c - level), 0)) / curved
        left = jnp.where(a > 0, jnp.maximum(low, b / curved - root), low)
        right = jnp.where(a > 0, jnp.minimum(high, b / curved + root), high)
        kept = (least <= level) & (left < right)
        # Between them the jump is better.
        edge = jax.lax.cummax(jnp.where(kept, right, -1.0))
        before = jnp.concatenate([jnp.array([-1.0]), edge[:-1]])
        gap = kept & (before < left)
        place = jnp.cumsum(kept.astype(jnp.int32) + gap)
        count, ends = place[-1], edge[-1] < 1
        rows = jnp.stack([left, right, a, b, c, begin], axis=1)
        flat, zero, at = jnp.full(room, level), jnp.zeros(room), jnp.full(room, t + 1.0)
        jumps = jnp.stack([before, left, zero, zero, flat, at], axis=1)
        last = jnp.stack([edge[-1], jnp.ones(()), zero[0], zero[0], level, t + 1.0])
        table = jnp.tile(empty, (room, 1))
        table = table.at[jnp.where(kept, place - 1, room)].set(rows, mode="drop")
        table = table.at[jnp.where(gap, place - 2, room)].set(jumps, mode="drop")
        table = table.at[jnp.where(ends, count, room)].set(last, mode="drop")
        return (table, jnp.maximum(most, count + ends)), begin[best]

    steps = y, w, jnp.arange(len(y), dtype=y.dtype)
    (_, most), last = jax.lax.scan(step, (table, jnp.int32(0)), steps)
    return last.astype(jnp.int32), most
