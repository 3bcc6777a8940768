"""The quadratic problem of a working set: coordinate steps in a compiled loop, then Newton steps on the support.

    minimise over w    1/2 <w - start, G (w - start)> + <q, w - start> + sum_j g_j(w_j)

with g of `EntryTerms`. Coordinate steps find the support; a Newton step solves the linear system on it exactly, up to
the first entry that would leave its piece.

Source: Friedman, Hastie and Tibshirani, "Regularization paths for generalized linear models via coordinate descent",
JSS 33 (2010), for steps on the Gram matrix; Bertrand, Klopfenstein, Bannier, Gidel and Massias, "Beyond L1", 2022, for
coordinate steps followed by an acceleration on the support.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseopt.core.working_sets.columns import Product, in_size
from sparseopt.core.working_sets.entry_terms import EntryTerms

# Coordinate passes between two Newton steps, fewer of many entries; and one for every SLOW entries, since a Newton step
# takes as long as so many of them. Most of these pairs.
PASSES, LEAST_PASSES, MOST_STEPS, SLOW, MOST_PAIRS = 6, 2, 2048, 64, 100
# Newton steps in a row: NEWTON_WORK is what the squares of their sizes may add up to. Of few entries there may be many,
# since badly conditioned columns need them; of FEW or less their cost does not depend on the size.
# The first pair may use FIRST_WORK of that, since its support still changes, and the next one twice as much.
FEW, NEWTON_WORK, FIRST_WORK = 64, 20 * 64**2, 0.25
# A column of zeros with no ridge: any positive number sends the entry to its resting place.
TINY = 1e-150
# Newton steps in a row of groups and of penalties that are not convex, and the shares of one that are tried.
MOST_NEWTON, SHARES = 10, (1.0, 0.5, 0.1)
# Supports above LARGE of sparse columns use conjugate gradients to a relative residual of CG_TOL.
LARGE, CG_TOL, MOST_CG = 256, 1e-10, 200
# Pairs in one step under `jit`.
TRACED_PAIRS = 4
# A Hessian that is not positive definite up to rounding is shifted by these multiples of its diagonal.
SHIFTS = (0.0, 1e-12, 1e-9, 1e-6)


class Enough(NamedTuple):
    """When a restricted problem is solved: by its own duality gap, or without one by what a step could gain."""

    gap: float
    gain: float
    loss: float  # of the quadratic at the start, of which the gap depends

    def reached(self, start: tuple, w: np.ndarray, q: np.ndarray, terms: Any) -> bool:
        """Whether the gap is, from the first w and q and the last; the dual point is the scaled gradient."""
        loss = self.loss + 0.5 * float((start[1] + q) @ (w - start[0]))
        share = 1 / max(terms.gauge(-q), 1.0)
        return (1 - share) ** 2 * loss + terms.slack(w, -share * q) <= self.gap


@jax.jit
def coordinate_steps(
    gram: Float[Array, "k k"], both: Float[Array, "2 k"], terms: Float[Array, "4 k"], steps: Any, count: Any
) -> Float[Array, "2 k"]:
    """W and the gradient q after `steps` exact minimisations over one entry, in turn over the first `count`."""
    weight, ridge, low, high = terms
    square = jnp.diagonal(gram)
    divisor = jnp.maximum(square + ridge, TINY)

    def step(_: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        w, q, j = carry
        z = w[j] * (divisor[j] - ridge[j]) - q[j]
        new = jnp.sign(z) * jnp.maximum(jnp.abs(z) - weight[j], 0) / divisor[j]
        new = jnp.clip(new, low[j], high[j])
        return w.at[j].set(new), q + (new - w[j]) * gram[j], jnp.where(j + 1 == count, 0, j + 1)

    w, q, _ = jax.lax.fori_loop(0, steps, step, (*both, 0))
    return jnp.stack([w, q])


def traced_minimise(gram: Array, q: Array, w: Array, terms: Array) -> Array:
    """The same steps under `jit`, TRACED_PAIRS times, with one Newton step after coordinate passes."""
    count = w.size
    weight, ridge, low, high = terms

    def value(w: Array) -> Array:
        return jnp.sum(weight * jnp.abs(w) + 0.5 * ridge * w * w)

    def pair(_: Any, both: Array) -> Array:
        w, q = coordinate_steps(gram, both, terms, PASSES * count, count)
        moving = ((w != 0) | (weight == 0)) & (w > low) & (w < high)
        both_move = moving[:, None] & moving
        hessian = jnp.where(both_move, gram, 0) + jnp.diag(jnp.where(moving, ridge, 1))
        hessian += SHIFTS[1] * jnp.diag(jnp.diagonal(hessian))
        slope = jnp.where(moving, q + ridge * w + weight * jnp.sign(w), 0)
        way = -jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(hessian), True), slope)
        sign = jnp.where(weight > 0, jnp.sign(w), 0)
        ends = jnp.where(sign > 0, jnp.maximum(low, 0), low), jnp.where(sign < 0, jnp.minimum(high, 0), high)
        full = w + way
        leaves = moving & ((full < ends[0]) | (full > ends[1]))
        end = jnp.where(full < ends[0], ends[0], ends[1])
        share = jnp.where(leaves, (end - w) / jnp.where(leaves, way, 1), 1)
        first = jnp.min(share)
        clipped = jnp.where(leaves, end, full)
        edge = jnp.where(leaves & (share <= first), end, w + first * way)

        def better(old: tuple, new: Array) -> tuple:
            w, q = old
            q_new = q + gram @ (new - w)
            change = 0.5 * (q + q_new) @ (new - w) + value(new) - value(w)
            return jax.tree.map(lambda a, b: jnp.where(change < 0, a, b), (new, q_new), old)

        return jnp.stack(better(better((w, q), edge), clipped))

    return jax.lax.fori_loop(0, TRACED_PAIRS, pair, jnp.stack([w, q]))[0]


def minimise(
    gram: np.ndarray, q: np.ndarray, w: np.ndarray, terms: EntryTerms, enough: Enough, times: Product | None = None
) -> np.ndarray:
    """The w that is good enough.

    The Gram matrix may be filled up with zeros to a size of `round_up`, which is done here otherwise. `times` is given
    where it is far cheaper than the product with the matrix: then Newton steps of LARGE supports use it alone.
    It stops earlier where rounding leaves nothing to gain, and after MOST_PAIRS.
    """
    count = q.size
    padded = in_size(gram, count)
    size, gram = len(padded), padded[:count, :count]
    packed = np.zeros((4, size))
    packed[:, :count] = terms.all
    passes = max(LEAST_PASSES, min(PASSES, MOST_STEPS // count), count // SLOW if times is None else 0)
    start = w, q
    for pair in range(MOST_PAIRS):
        before, both = (w, q), np.zeros((2, size))
        both[:, :count] = w, q
        w, q = np.array(coordinate_steps(padded, both, packed, passes * count, count))[:, :count]
        w, q = _newton(gram, times, q, w, terms, NEWTON_WORK * min(1.0, FIRST_WORK * (pair + 1)))
        if enough.reached(start, w, q, terms) or _change(*before, w, q, terms) >= -1e-15 * abs(terms.value(w)):
            break
    return w


def effort(count: int) -> tuple[int, int]:
    """Passes over so many entries and, in groups or of penalties that are not convex, Newton steps after them."""
    return max(PASSES, count // SLOW), max(1, min(MOST_NEWTON, NEWTON_WORK // count**2))


def _change(w: np.ndarray, q: np.ndarray, new: np.ndarray, q_new: np.ndarray, terms: EntryTerms) -> float:
    """How much the objective changes between two points with their gradients."""
    return 0.5 * float((q + q_new) @ (new - w)) + terms.value(new) - terms.value(w)


def _newton(
    gram: np.ndarray, times: Product | None, q: np.ndarray, w: np.ndarray, terms: EntryTerms, most: float
) -> tuple[np.ndarray, np.ndarray]:
    """Newton steps on the entries that are on a smooth piece of g, until one ends inside all pieces."""
    work = 0.0
    while work < most:
        moving = (w != 0) | (terms.weight == 0) if terms.weightless else w != 0
        if terms.bounded:
            moving &= (w > terms.low) & (w < terms.high)
        free = moving.nonzero()[0]
        if not free.size:
            break
        work += max(free.size, FEW) ** 2
        at, sign = w[free], np.sign(w[free])
        _, ridge, low, high = terms.all[:, free]
        slope = q[free] + ridge * at + terms.weight[free] * sign
        if times is not None and free.size > LARGE:
            change_of = times
            way: Any = _conjugate(times, free, gram.diagonal()[free], slope, ridge, w.size)
        else:
            rows = gram[free]
            change_of = partial(_by_rows, free, rows)
            way = newton_direction(rows[:, free], slope, ridge)
        if way is None:
            break
        # The piece of every entry.
        if terms.weightless:
            sign = np.where(terms.weight[free] > 0, sign, 0)
        low, high = np.where(sign > 0, np.maximum(low, 0), low), np.where(sign < 0, np.minimum(high, 0), high)
        full = at + way
        leaves = (full < low) | (full > high)
        ended = not leaves.any()
        ends = np.where(full < low, low, high)
        target = np.where(leaves, ends, full)
        new, q_new, change = _moved(change_of, q, w, terms, free, target)
        if not ended and change >= 0:
            share = np.where(leaves, (ends - at) / np.where(leaves, way, 1), 1)
            target = np.where(leaves & (share <= share.min()), ends, at + share.min() * way)
            new, q_new, change = _moved(change_of, q, w, terms, free, target)
        if change >= 0:
            break
        w, q = new, q_new
        if ended:
            break
    return w, q


def _by_rows(free: np.ndarray, rows: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The Gram matrix times a vector that is 0 but for the free entries, whose rows are given."""
    return v[free] @ rows


def _moved(
    times: Product, q: np.ndarray, w: np.ndarray, terms: EntryTerms, free: np.ndarray, target: Any
) -> tuple[np.ndarray, np.ndarray, float]:
    """The point with other free entries, its gradient, and the change of the objective."""
    new = w.copy()
    new[free] = target
    q_new = q + times(new - w)
    return new, q_new, _change(w, q, new, q_new, terms)


def _conjugate(
    times: Product, free: np.ndarray, squares: np.ndarray, gradient: np.ndarray, ridge: np.ndarray, size: int
) -> np.ndarray:
    """Newton's direction by conjugate gradients; one that has not converged descends, too."""
    from scipy.sparse.linalg import LinearOperator, cg

    whole, shape = np.zeros(size), (free.size, free.size)

    def hessian(v: np.ndarray) -> np.ndarray:
        whole[free] = v
        return times(whole)[free] + ridge * v

    scale = 1 / np.maximum(squares + ridge, TINY)
    inverse = LinearOperator(shape, lambda v: scale * v, dtype=np.float64)
    of = LinearOperator(shape, hessian, dtype=np.float64)
    return cg(of, -gradient, rtol=CG_TOL, maxiter=MOST_CG, M=inverse)[0]


def newton_direction(hessian: np.ndarray, gradient: np.ndarray, ridge: np.ndarray) -> np.ndarray | None:
    """Newton's direction for a Hessian with `ridge` on its diagonal; None if that is not positive definite."""
    from scipy.linalg.lapack import dpotrf, dpotrs  # here: it takes as long to import as NumPy

    hessian = np.ascontiguousarray(hessian)
    diagonal = hessian.reshape(-1)[:: ridge.size + 1]
    diagonal += ridge
    diagonal[diagonal == 0] = 1  # a column of zeros, whose entry stays
    squares = diagonal.copy()
    for shift in SHIFTS:
        if shift:
            diagonal[:] = squares * (1 + shift)
        factor, failed = dpotrf(hessian, lower=1)
        if not failed:
            return dpotrs(factor, -gradient, lower=1)[0]
    return None
