"""Thresholds of entries, and exact selection of the k largest.

Every function is elementwise or a reduction, so it works on arrays of any shape, sharded ones too: counts and
thresholds come from sums, never from gathering or sorting a whole array.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparseopt.core.base.types import BoolArray, Count, FloatArray, Scalar

Numbers = Scalar | FloatArray
# Entries of the sample that starts a selection: their ranks are known to 3 % of the size.
SAMPLE = 1024


def hard_threshold(x: FloatArray, threshold: Numbers) -> FloatArray:
    """Keep the entries with `|x| >= threshold`, set the others to exactly zero.

    It solves `argmin_u 1/2 (u - x)² + step * weight * [u != 0]` for `threshold = sqrt(2 * step * weight)`
    (not `step * weight`). On a tie, where both answers are minimisers, the entry is kept.

    Source: Blumensath and Davies, "Iterative thresholding for sparse approximations", 2008, eq. 2.
    """
    return jnp.where(jnp.abs(x) >= threshold, x, jnp.zeros((), x.dtype))


def soft_threshold(x: FloatArray, threshold: Numbers) -> FloatArray:
    """Move every entry towards zero by `threshold`, stopping at zero.

    It solves `argmin_u 1/2 (u - x)² + step * weight * |u|` for `threshold = step * weight`.

    Source: Donoho and Johnstone, "Ideal spatial adaptation by wavelet shrinkage", 1994.
    """
    # A threshold of 0 leaves x unchanged, with a derivative of 1 even at 0.
    return jnp.where((jnp.abs(x) <= threshold) & (jnp.asarray(threshold) > 0), 0, x - jnp.sign(x) * threshold)


def infinite_unless(inside: BoolArray, x: FloatArray) -> FloatArray:
    """The value of an indicator, of the dtype of x."""
    return jnp.where(inside, 0.0, jnp.inf).astype(x.dtype)


def largest_ratio(size: FloatArray, weight: Numbers) -> Float[Array, ""]:
    """The largest `size / weight` of non-negative sizes and weights; 0 / 0 counts as 0, and `size / 0` as +inf."""
    weight = jnp.where(size > 0, jnp.asarray(weight, size.dtype), 1)
    return jnp.max(size / weight, initial=0)


def count_each(*masks: BoolArray) -> list[Int[Array, ""]]:
    """The number of True entries of each mask, int32; all masks have one shape and are read in one pass.

    One reduction with several results: XLA on CPU fuses it with the computation of the masks, whereas a plain integer
    sum first writes the mask to memory.
    """
    return jax.lax.reduce(
        [mask.astype(jnp.int32) for mask in masks],
        [jnp.zeros((), jnp.int32) for _ in masks],
        lambda total, new: [a + b for a, b in zip(total, new, strict=True)],
        tuple(range(masks[0].ndim)),
    )


def count_nonzero(x: FloatArray) -> Int[Array, ""]:
    """The exact number of non-zero entries, int32."""
    positive, negative = count_each(x > 0, x < 0)
    return positive + negative


def support_change(x: FloatArray, previous: FloatArray) -> Float[Array, ""]:
    """The fraction of the entries that entered or left the support."""
    entered, left = count_each((x != 0) & (previous == 0), (x == 0) & (previous != 0))
    return ((entered + left) / x.size).astype(x.dtype)


def _as_bits(x: FloatArray) -> Array:
    """The bit patterns, which are ordered like the values if these are not negative."""
    unsigned = {16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}[x.dtype.itemsize * 8]
    return jax.lax.bitcast_convert_type(x, unsigned)


def _separate(x: FloatArray, k: Count) -> tuple[Array, Int[Array, ""]]:
    """A level (a bit pattern) with at least k entries of `x >= 0` at or above it, and their number: k unless tied.

    Each pass counts the entries at three levels inside the bracket that holds the answer. The first three levels come
    from a sorted sample, later ones from interpolation between the counts at the bracket's ends. Every third pass uses
    the quarters, which bounds the number of passes for any data. Smooth data need six or seven passes. For a k above
    the size the level is 0.
    """
    bits, above = _as_bits(x), _as_bits(jnp.asarray(jnp.inf, x.dtype)) + 1
    kind = jnp.float32
    # An odd stride does not stay in a few columns of a matrix. From an array over several devices, known places are
    # fetched one by one, whereas a slice of the flattened array would first gather all of it.
    taken = np.unravel_index(np.arange(0, bits.size, (bits.size // SAMPLE) | 1), bits.shape or (1,))
    sample = jnp.sort(jnp.atleast_1d(bits)[taken])
    share = 1 - jnp.asarray(k).astype(kind) / bits.size
    around = jnp.arange(-1, 2, dtype=kind)
    places = jnp.round(sample.size * (share + around / math.sqrt(sample.size)))
    # Neighbouring levels if these are equal: a tie is bracketed from both sides.
    guesses = sample[jnp.clip(places, 0, sample.size - 1).astype(jnp.int32)] + jnp.arange(3, dtype=bits.dtype)

    def narrow(carry: tuple) -> tuple:
        low, high, at_low, at_high, passes = carry
        width, inside = high - low, (at_low - at_high).astype(kind)
        aim = ((at_low - k).astype(kind) + 0.5) / inside + jnp.minimum(1 / 64 + 2 / jnp.sqrt(inside), 0.25) * around
        parts = jnp.where(passes % 3 == 2, jnp.arange(1, 4, dtype=kind) / 4, jnp.clip(aim, 0, 1))
        steps = jnp.where(passes == 0, guesses, (parts * width.astype(kind)).astype(bits.dtype))
        levels = low + jnp.clip(steps, 1, width - 1)
        counts = jnp.stack(count_each(*(bits >= level for level in levels)))
        enough = counts >= k
        return (
            jnp.max(jnp.where(enough, levels, low)),
            jnp.min(jnp.where(enough, high, levels)),
            jnp.min(jnp.where(enough, counts, at_low)),
            jnp.max(jnp.where(enough, at_high, counts)),
            passes + 1,
        )

    def going(carry: tuple) -> Bool[Array, ""]:
        low, high, at_low, *_ = carry
        return (at_low > k) & (high - low > 1)

    zero, size = jnp.zeros((), jnp.int32), jnp.asarray(bits.size, jnp.int32)
    low, _, count, *_ = jax.lax.while_loop(going, narrow, (jnp.zeros((), bits.dtype), above, size, zero, zero))
    return low, count


def kth_largest(x: FloatArray, k: Count) -> Float[Array, ""]:
    """The k-th largest entry of a non-negative array, `k` in 1..size, exactly; +inf for `k = 0`.

    `k` may be traced: one compiled program works for every sparsity. Equal entries count separately. For `k > size` the
    answer is the smallest entry. The order of NaN entries is undefined.
    """
    level, _ = _separate(x, k)
    # No entry is left at or above the level for k = 0.
    return jnp.min(jnp.where((_as_bits(x) >= level) & (jnp.asarray(k) > 0), x, jnp.asarray(jnp.inf, x.dtype)))


def top_k_mask(score: FloatArray, k: Count) -> BoolArray:
    """True at exactly the `k` largest entries of a non-negative `score`; among equal scores the first win.

    `k` may be traced. `k <= 0` gives an empty mask and `k >= size` a full one.

    Example:
        >>> from sparseopt.core.base.thresholds import top_k_mask
        >>> top_k_mask(jnp.array([1.0, 4.0, 2.0, 2.0]), 2)  # of the two equal scores the first
        Array([False,  True,  True, False], dtype=bool)
    """
    bits = _as_bits(score)
    level, count = _separate(score, k)

    def first_of_tied() -> BoolArray:
        above = bits > level
        return above | _first_true(bits == level, jnp.asarray(k) - count_each(above)[0])

    # Ties at the level are rare.
    return jax.lax.cond(count <= k, lambda: bits >= level, first_of_tied)


def _first_true(mask: BoolArray, count: Int[Array, ""]) -> BoolArray:
    """The first `count` True entries in the order of the flattened array.

    Totals along the first axis say in which row the last one lies, and only that row is searched: a running count over
    the whole array would gather it from all devices.
    """
    if mask.ndim <= 1:
        return mask & (jnp.cumsum(mask, dtype=jnp.int32).reshape(mask.shape) <= count)
    totals = jnp.sum(mask, axis=tuple(range(1, mask.ndim)), dtype=jnp.int32)
    until = jnp.cumsum(totals, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(until <= count, dtype=jnp.int32), mask.shape[0] - 1)
    last = jax.lax.dynamic_index_in_dim(mask, row, keepdims=False)
    last = _first_true(last, count - (until - totals)[row])
    number = jnp.arange(mask.shape[0]).reshape(-1, *[1] * (mask.ndim - 1))
    return (mask & (number < row)) | (last[None] & (number == row))


def among(candidates: BoolArray, score: FloatArray) -> FloatArray:
    """Non-negative scores that rank every candidate, even one of score 0, above all other entries."""
    return jnp.where(candidates, jnp.maximum(score, jnp.finfo(score.dtype).tiny), 0)


def n_of_m_mask(score: FloatArray, n: int, m: int, axis: int = 0) -> BoolArray:
    """True at the `n` largest scores of every `m` consecutive entries along `axis`; on a tie the first win.

    Raises:
        ValueError: if `0 <= n <= m`, `m >= 1` fails or `m` does not divide the length of `axis`.
    """
    length = score.shape[axis]
    if not (m >= 1 and 0 <= n <= m):
        raise ValueError(f"an n:m pattern needs 0 <= n <= m and m >= 1, given {n}:{m}")
    if length % m:
        raise ValueError(
            f"the pattern {n}:{m} needs a length divisible by {m} along axis {axis}, "
            f"given an array of shape {score.shape} with length {length}; choose an m that divides {length}"
        )
    moved = jnp.moveaxis(score, axis, 0)
    grouped = moved.reshape(length // m, m, *moved.shape[1:])
    # The rank of an entry is the number of group members that beat it: m² comparisons, no sort, no gather.
    mine, other = grouped[:, :, None], grouped[:, None, :]
    earlier = (jnp.arange(m)[None, :] < jnp.arange(m)[:, None]).reshape(1, m, m, *([1] * (grouped.ndim - 2)))
    rank = jnp.sum((other > mine) | ((other == mine) & earlier), axis=2, dtype=jnp.int32)
    return jnp.moveaxis((rank < n).reshape(moved.shape), 0, axis)
