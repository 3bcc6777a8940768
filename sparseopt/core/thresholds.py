"""Floor 1: the scalar mathematics of the proximal operators, and exact selection of the k largest entries.

Every function is elementwise or a reduction, so it works on arrays of any shape and layout, also on arrays
that are sharded over devices: counts and thresholds come from sums, never from gathering or sorting.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

FloatArray = Float[Array, "..."]
BoolArray = Bool[Array, "..."]
Scalar = Float[Array, ""] | float
Count = Int[Array, ""] | int


def hard_threshold(x: FloatArray, threshold: Scalar | FloatArray) -> FloatArray:
    """Keep the entries with `|x| >= threshold`, set the others to exactly zero.

    It solves `argmin_u 1/2 (u - x)² + step * weight * [u != 0]` for `threshold = sqrt(2 * step * weight)`
    (not `step * weight`). On a tie, where both answers are minimisers, the entry is kept.

    Source: Blumensath and Davies, "Iterative thresholding for sparse approximations", 2008, eq. 2.

    Example:
        >>> from sparseopt.core.thresholds import hard_threshold
        >>> hard_threshold(jnp.array([-3.0, 0.5, 1.0]), 1.0)
        Array([-3.,  0.,  1.], dtype=float32)
    """
    return jnp.where(jnp.abs(x) >= threshold, x, jnp.zeros((), x.dtype))


def soft_threshold(x: FloatArray, threshold: Scalar | FloatArray) -> FloatArray:
    """Move every entry towards zero by `threshold`, stopping at zero.

    It solves `argmin_u 1/2 (u - x)² + step * weight * |u|` for `threshold = step * weight`.

    Source: Donoho and Johnstone, "Ideal spatial adaptation by wavelet shrinkage", 1994.

    Example:
        >>> from sparseopt.core.thresholds import soft_threshold
        >>> soft_threshold(jnp.array([-3.0, 0.5, 2.0]), 1.0)
        Array([-2.,  0.,  1.], dtype=float32)
    """
    # x - clip(x) returns exact zeros inside the threshold and needs no sign().
    return x - jnp.clip(x, -threshold, threshold)


def mcp_value(x: FloatArray, weight: Scalar | FloatArray, gamma: Scalar | FloatArray) -> FloatArray:
    """`weight |x| - x² / (2 gamma)` for `|x| <= gamma weight`, else `gamma weight² / 2`, entry by entry.

    Source: Zhang, "Nearly unbiased variable selection under minimax concave penalty", 2010, eq. 2.1.
    """
    size = jnp.minimum(jnp.abs(x), jnp.asarray(gamma * weight, x.dtype))
    return weight * size - size * size / (2 * gamma)


def mcp_prox(
    x: FloatArray, weight: Scalar | FloatArray, gamma: Scalar | FloatArray, step: Scalar | FloatArray
) -> FloatArray:
    """`argmin_u 1/2 (u - x)² + step * mcp_value(u)`, a global minimiser for every step.

    For `step < gamma`: 0 up to `|x| = step weight`, `soft(x, step weight) / (1 - step / gamma)` up to
    `|x| = gamma weight`, x beyond. For `step >= gamma` the piece between is concave, and the answer is the
    hard threshold at `weight sqrt(gamma step)`, where both ends cost the same.

    Example:
        >>> from sparseopt.core.thresholds import mcp_prox
        >>> mcp_prox(jnp.array([0.5, 1.5, 4.0]), weight=1.0, gamma=2.0, step=1.0)
        Array([0., 1., 4.], dtype=float32)
    """
    gamma, step = jnp.asarray(gamma, x.dtype), jnp.asarray(step, x.dtype)
    weight = jnp.asarray(weight, x.dtype)
    convex = step < gamma
    firm = soft_threshold(x, step * weight) / jnp.where(convex, 1 - step / gamma, 1)
    firm = jnp.where(jnp.abs(x) > gamma * weight, x, firm)
    return jnp.where(convex, firm, hard_threshold(x, weight * jnp.sqrt(gamma * step)))


def scad_value(x: FloatArray, weight: Scalar | FloatArray, a: Scalar | FloatArray) -> FloatArray:
    """`weight |x|` to `weight`, a parabola to `a weight`, `(a + 1) weight² / 2` beyond, entry by entry.

    Source: Fan and Li, "Variable selection via nonconcave penalized likelihood", 2001, eq. 2.
    """
    size = jnp.minimum(jnp.abs(x), jnp.asarray(a * weight, x.dtype))
    over = jnp.maximum(size - weight, 0)
    return weight * size - over * over / (2 * (a - 1))


def scad_prox(
    x: FloatArray, weight: Scalar | FloatArray, a: Scalar | FloatArray, step: Scalar | FloatArray
) -> FloatArray:
    """`argmin_u 1/2 (u - x)² + step * scad_value(u)`, a global minimiser for every step.

    Each of the three pieces of the penalty has a minimiser on its own interval; the best of them wins. On the
    concave part of a piece the ends, which the neighbours hold too, are its minimisers.

    Example:
        >>> from sparseopt.core.thresholds import scad_prox
        >>> scad_prox(jnp.array([0.5, 1.5, 4.0]), weight=1.0, a=3.7, step=1.0)
        Array([0. , 0.5, 4. ], dtype=float32)
    """
    a, step = jnp.asarray(a, x.dtype), jnp.asarray(step, x.dtype)
    weight = jnp.asarray(weight, x.dtype)
    size = jnp.abs(x)
    inner = jnp.clip(size - step * weight, 0, weight)
    bend = (a - 1) - step
    middle = ((a - 1) * size - step * a * weight) / jnp.where(bend > 0, bend, 1)
    middle = jnp.where(bend > 0, jnp.clip(middle, weight, a * weight), inner)
    outer = jnp.maximum(size, a * weight)
    best, cost = inner, 0.5 * (inner - size) ** 2 + step * scad_value(inner, weight, a)
    for other in (middle, outer):
        other_cost = 0.5 * (other - size) ** 2 + step * scad_value(other, weight, a)
        best, cost = jnp.where(other_cost < cost, other, best), jnp.minimum(cost, other_cost)
    # Far out the penalty is flat: x itself, free of the rounding of three compared costs.
    return jnp.where(size > (a + step) * weight, x, jnp.sign(x) * best)


def count_each(*masks: BoolArray) -> list[Int[Array, ""]]:
    """How many entries of each mask are True, int32; all masks have one shape and are read in one pass.

    One reduction with several results: XLA on CPU fuses it with what makes the masks, where a plain integer sum
    first writes the mask out as an array.
    """
    return jax.lax.reduce(
        [mask.astype(jnp.int32) for mask in masks],
        [jnp.zeros((), jnp.int32) for _ in masks],
        lambda total, new: [a + b for a, b in zip(total, new, strict=True)],
        tuple(range(masks[0].ndim)),
    )


def count_nonzero(x: FloatArray) -> Int[Array, ""]:
    """The exact number of non-zero entries, int32.

    Example:
        >>> from sparseopt.core.thresholds import count_nonzero
        >>> int(count_nonzero(jnp.array([0.0, -1.0, 2.0])))
        2
    """
    positive, negative = count_each(x > 0, x < 0)
    return positive + negative


def kth_largest(x: FloatArray, k: Count) -> Float[Array, ""]:
    """The k-th largest entry of a non-negative array, `k` in 1..size, exactly; +inf for `k = 0`.

    Magnitudes have the order of their bit patterns, so the answer is found two bits at a time, each pair by one
    pass that counts the entries above three candidates. `k` may be traced: one compiled program serves every
    sparsity. Equal entries count one each. For `k > size` the answer is 0. The order of NaN entries is undefined;
    inputs are checked on the host before.

    Example:
        >>> from sparseopt.core.thresholds import kth_largest
        >>> float(kth_largest(jnp.array([1.0, 4.0, 2.0]), 2))
        2.0
    """
    width = x.dtype.itemsize * 8
    unsigned = {16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}[width]
    bits = jax.lax.bitcast_convert_type(x, unsigned)
    k = jnp.asarray(k)
    rounds = width // 2

    def decide(round_index: jax.Array, found: jax.Array) -> jax.Array:
        shift = (2 * (rounds - 1 - round_index)).astype(bits.dtype)
        candidates = [found | (jnp.asarray(digit, bits.dtype) << shift) for digit in (1, 2, 3)]
        counts = count_each(*(bits >= candidate for candidate in candidates))
        digit = sum((count >= k).astype(bits.dtype) for count in counts)
        return found | (digit << shift)

    found = jax.lax.fori_loop(0, rounds, decide, jnp.zeros((), bits.dtype))
    value = jax.lax.bitcast_convert_type(found, x.dtype)
    return jnp.where(k > 0, value, jnp.asarray(jnp.inf, x.dtype))


def top_k_mask(score: FloatArray, k: Count) -> BoolArray:
    """True at exactly `k` entries of the largest non-negative `score`; among equal scores the first win.

    `k` may be traced. `k <= 0` gives an empty mask and `k >= size` a full one.

    Example:
        >>> from sparseopt.core.thresholds import top_k_mask
        >>> top_k_mask(jnp.array([1.0, 4.0, 2.0, 2.0]), 2)  # of the two equal scores the first
        Array([False,  True,  True, False], dtype=bool)
    """
    threshold = kth_largest(score, k)
    above = score > threshold
    tied = score == threshold
    number_above, number_tied = count_each(above, tied)
    room = jnp.asarray(k) - number_above

    def first_of_tied() -> BoolArray:
        rank = jnp.cumsum(tied.reshape(-1), dtype=jnp.int32).reshape(score.shape)
        return above | (tied & (rank <= room))

    # Ties at the threshold are rare, and the running count that breaks them is the dearest step.
    return jax.lax.cond(number_tied <= room, lambda: above | tied, first_of_tied)


def n_of_m_mask(score: FloatArray, n: int, m: int, axis: int = 0) -> BoolArray:
    """True at the `n` largest scores of every `m` consecutive entries along `axis`; on a tie the first win.

    Raises:
        ValueError: if `0 <= n <= m`, `m >= 1` fails or `m` does not divide the length of `axis`.

    Example:
        >>> from sparseopt.core.thresholds import n_of_m_mask
        >>> n_of_m_mask(jnp.array([4.0, 3.0, 2.0, 1.0]), 1, 2)
        Array([ True, False,  True, False], dtype=bool)
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
