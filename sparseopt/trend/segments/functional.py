"""The jumps of a series at a price per jump, exactly: optimal partitioning with functional pruning.

    minimise over b    sum_i w_i f(b_i; y_i)  +  price #{i : b_i != b_(i+1)}

Let Q_t(m) be the optimum over the first t values if the last piece has the level m. Then

    Q_t(m) = min { Q_(t-1)(m), min_m' Q_(t-1)(m') + price } + w_t f(m; y_t),

the least of a few curves, each the best on an interval of levels. Those that are best nowhere can never be again, so a
step costs as many operations as curves are left, on a flat series about the logarithm of its length. The curves are
parabolas `a m² - 2 b m + c` for the square loss, and `a e^m - b m + c` for counts with the log-rate m.

Source: Maidstone, Hocking, Rigaill, Fearnhead, "On optimal multiple changepoint algorithms for large data", Statistics
and Computing 27 (2017), section 3; Rigaill, "A pruned dynamic programming algorithm", Journal de la SFdS 156 (2015).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.types import precision

# Curves that are kept at first. At a price of 2 log n in units of the noise 9 to 22 were seen, on a steep trend at a
# high price hundreds; the table doubles as long as it overflows.
FIRST_ROOM = 32
# Steps of Newton's method for the ends of an interval; where a curve hardly dips below a level, each halves the rest.
MOST_NEWTON = 60


def optimal_jumps(y: np.ndarray, price: float, weights: np.ndarray | None = None, counts: bool = False) -> np.ndarray:
    """The places of the jumps of the optimum, the index of the first value after each; ascending integers.

    Args:
        y: finite values `[n]`.
        price: of a jump, positive, in units of `w (y - b)²`, or of the loss of counts.
        weights: w >= 0, `[n]`; 0 where missing.
        counts: whether the loss is that of counts, `f = e^b - y b`, for y >= 0; their rates are at least
            `lowest_rate`.

    Example:
        >>> from sparseopt.trend.segments.functional import optimal_jumps
        >>> optimal_jumps(np.array([0.1, -0.1, 0.0, 5.1, 4.9, 5.0]), 1.0).tolist()
        [3]
        >>> optimal_jumps(np.array([1.0, 0, 2, 9, 12, 8]), 3.0, counts=True).tolist()
        [3]
    """
    w = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
    nodes = np.flatnonzero(w > 0)
    z, w = np.asarray(y, np.float64)[nodes], w[nodes]
    if not z.size or np.ptp(z) == 0:
        return np.zeros(0, int)
    # Levels from -1 to 1, or log-rates up to 0: curves of one size.
    scale, first, last = np.ptp(z) / 2, -1.0, 1.0
    if counts:
        scale, first, last = z.max(), np.log(max(z.min(), lowest_rate(z, w)) / z.max()), 0.0
    z = z / scale if counts else (z - z.min()) / scale - 1
    room, places, price = FIRST_ROOM, [len(z)], price / (scale if counts else scale**2)
    # Values of weight 0 behind the last one change nothing, and leave one program for many lengths.
    z, w = (np.pad(each, (0, (1 << (len(each) - 1).bit_length()) - len(each))) for each in (z, w))
    with precision(np.dtype(np.float64)):
        begins, most = _last_pieces(z, w, price, first, last, room, counts)
        while most > room:
            room *= 2
            begins, most = _last_pieces(z, w, price, first, last, room, counts)
    begins = np.asarray(begins)
    while (place := int(begins[places[-1] - 1])) > 0:
        places.append(place)
    return nodes[places[:0:-1]]


def lowest_rate(y: np.ndarray, weights: np.ndarray) -> float:
    """The rate of a piece without a count, whose best log-rate is not finite: its loss there is a rounding error."""
    return float(np.finfo(np.float64).eps * np.average(y, weights=weights))


def _parabolas(a: Any, b: Any, c: Any) -> tuple[Any, Any, Any]:
    """The values, the lowest points, and the intervals below a level, as functions."""
    curved = jnp.where(a > 0, a, 1)

    def below(level: Any, low: Any, high: Any) -> tuple[Any, Any]:
        root = jnp.sqrt(jnp.maximum(b * b - a * (c - level), 0)) / curved
        return jnp.maximum(low, b / curved - root), jnp.minimum(high, b / curved + root)

    return lambda m: (a * m - 2 * b) * m + c, b / curved, below


def _exponentials(a: Any, b: Any, c: Any) -> tuple[Any, Any, Any]:
    curved, some = jnp.where(a > 0, a, 1), b > 0
    lowest = jnp.where(some, jnp.log(jnp.where(some, b, 1) / curved), -jnp.inf)

    def below(level: Any, low: Any, high: Any) -> tuple[Any, Any]:
        """Newton's method from outside, in m on the left and in e^m on the right, where the curve is nearly a line."""

        def step(carry: Any) -> tuple[Any, Any, Any, Any]:
            left, rate, _, count = carry
            # Beyond the lowest point, or below the level, an end stays.
            slope, rise = b - a * jnp.exp(left), a - b / rate
            over = a * jnp.exp(left) - b * left + c - level
            above = a * rate - b * jnp.log(rate) + c - level
            right = jnp.where((above > 0) & (rise > 0), rate - above / jnp.where(rise > 0, rise, 1), rate)
            right = jnp.clip(right, rate / 2, rate)
            moved = jnp.where((over > 0) & (slope > 0), left + over / jnp.where(slope > 0, slope, 1), left)
            moved = jnp.minimum(moved, jnp.maximum(lowest, left))
            eps = 2 * jnp.finfo(left.dtype).eps
            still = (moved - left > eps * (1 + jnp.abs(left))) | (rate - right > eps * rate)
            return moved, right, jnp.any(still), count + 1

        begin = low, jnp.exp(high), jnp.bool_(True), 0
        left, rate, *_ = jax.lax.while_loop(lambda now: now[2] & (now[3] < MOST_NEWTON), step, begin)
        return left, jnp.where(rate < jnp.exp(high), jnp.log(rate), high)

    return lambda m: a * jnp.exp(m) - b * m + c, lowest, below


@functools.partial(jax.jit, static_argnames=("room", "counts"))
def _last_pieces(
    y: Any, w: Any, price: Any, first: Any, last: Any, room: int, counts: bool
) -> tuple[jax.Array, jax.Array]:
    """Where the last piece of the optimum over the first t values begins, for every t, and the most curves kept.

    Row i of the table is the curve of a, b and c on [low, high], ascending from `first` to `last`, and where its piece
    begins; rows that are not used have low > high.
    """
    empty = jnp.array([3.0, -3.0, 0.0, 0.0, 0.0, 0.0])
    zeros = jnp.zeros(4)
    table = jnp.tile(empty, (room, 1)).at[0].set(jnp.concatenate([jnp.stack([first, last]), zeros]))
    # In every curve, and so without an effect: they keep the numbers small.
    constants = w * y * jnp.where(counts, jnp.log(jnp.where(y > 0, y, 1)) - 1, y)

    def step(carry: Any, now: Any) -> tuple[Any, jax.Array]:
        table, most = carry
        y, w, constant, t = now
        low, high, a, b, c, begin = table.T
        a, b, c = a + w, b + w * y, c + constant
        value, lowest, below = (_exponentials if counts else _parabolas)(a, b, c)
        least = jnp.where(low < high, value(jnp.clip(lowest, low, high)), jnp.inf)
        best = jnp.argmin(least)
        level = least[best] + price
        # Where a curve stays below the price of a jump from the best one.
        left, right = below(level, low, high)
        left, right = jnp.where(a > 0, left, low), jnp.where(a > 0, right, high)
        kept = (least <= level) & (left < right)
        # Between them the jump is better.
        edge = jax.lax.cummax(jnp.where(kept, right, first))
        before = jnp.concatenate([jnp.reshape(first, 1), edge[:-1]])
        gap = kept & (before < left)
        place = jnp.cumsum(kept.astype(jnp.int32) + gap)
        count, ends = place[-1], edge[-1] < last
        rows = jnp.stack([left, right, a, b, c, begin], axis=1)
        flat, zero, at = jnp.full(room, level), jnp.zeros(room), jnp.full(room, t + 1.0)
        jumps = jnp.stack([before, left, zero, zero, flat, at], axis=1)
        behind = jnp.stack([edge[-1], last, zero[0], zero[0], level, t + 1.0])
        table = jnp.tile(empty, (room, 1))
        table = table.at[jnp.where(kept, place - 1, room)].set(rows, mode="drop")
        table = table.at[jnp.where(gap, place - 2, room)].set(jumps, mode="drop")
        table = table.at[jnp.where(ends, count, room)].set(behind, mode="drop")
        return (table, jnp.maximum(most, count + ends)), begin[best]

    steps = y, w, constants, jnp.arange(len(y), dtype=y.dtype)
    (_, most), begins = jax.lax.scan(step, (table, jnp.int32(0)), steps)
    return begins.astype(jnp.int32), most
