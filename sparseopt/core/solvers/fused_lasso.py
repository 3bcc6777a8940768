"""The exact fused lasso on a chain, the penalty step in the ADMM of Ramdas and Tibshirani.

Their ADMM splits Δ^(k) off and keeps the last difference E, D (k even) or Dᵀ (k odd), in the penalty `weight ||E z||_1`
of z = Δ^(k) x: it is `Admm` with Ψ = I and the penalty `ChainTotalVariation`, whose prox is exact in O(n).

Source: Ramdas and Tibshirani, "Fast and flexible ADMM algorithms for trend filtering", 2016; Johnson, "A dynamic
programming algorithm for the fused lasso and L0-segmentation", 2013.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.base.sums import total
from sparseopt.core.base.thresholds import largest_ratio
from sparseopt.core.base.types import FloatArray, pytree
from sparseopt.core.operators.component_means import piece_means
from sparseopt.core.operators.differences import Difference

# Replaces a row in place under XLA; `.at[row].set` is a scatter, which copies the table on a CPU.
_replaced = partial(jax.lax.dynamic_update_index_in_dim, axis=0)


@jax.custom_jvp
def fused_lasso(y: Float[Array, " n"], levels: Float[Array, " m"]) -> Float[Array, " n"]:
    """`argmin_x 1/2 ||x - y||² + sum_i levels[i] |x[i] - x[i-1]|` with `x[-1] = x[n] = 0` outside the chain.

    `levels` has n + 1 entries; 0 at both ends leaves the ends free. The derivative of the cost of nodes 0 to i, as a
    function of x[i], is piecewise linear. It is stored as knots where slope and intercept change, clipped from both
    sides at the level of the next difference; the clipping points give the answer backwards:
    `x[i] = clip(x[i+1], low[i], high[i])`. A node adds two knots, and each is removed once.

    The derivative is the mean over each run of equal values, and 0 on a run that an end holds at 0.

    Example:
        >>> from sparseopt.core.solvers.fused_lasso import fused_lasso
        >>> levels = jnp.array([0.0, 1.0, 1.0, 0.0])
        >>> fused_lasso(jnp.array([0.0, 1.0, 6.0]), levels)
        Array([1., 1., 5.], dtype=float32)
        >>> jax.grad(lambda y: fused_lasso(y, levels)[0])(jnp.array([0.0, 1.0, 6.0]))
        Array([0.5, 0.5, 0. ], dtype=float32)
    """
    return _fused_lasso(y, levels, None, y.shape[0])


@jax.jit
def fused_pieces(y: Float[Array, " n"], masses: Float[Array, " n"], weight: Any, count: Any) -> Float[Array, " n"]:
    """`argmin_x 1/2 sum_i masses[i] (x[i] - y[i])² + weight sum_i |x[i] - x[i-1]|` over the first `count` nodes.

    The masses are positive; later nodes cost no time, and their answer has no meaning. Sources as `fused_lasso`.
    """
    place = jnp.arange(y.shape[0] + 1)
    return _fused_lasso(y, jnp.where((place > 0) & (place < count), weight, 0).astype(y.dtype), masses, count)


@fused_lasso.defjvp
def _fused_lasso_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    x, levels = fused_lasso(*primals), primals[1]
    signs = jnp.sign(jnp.diff(jnp.pad(x, 1)))
    pull = signs * tangents[1]
    runs = jnp.cumsum(signs[:-1].at[0].set(0) != 0)
    held = (signs == 0) & (levels > 0)
    held = (held[0] & (runs == 0)) | (held[-1] & (runs == runs[-1]))
    free = jnp.where(held, 0, jnp.ones_like(x))
    return x, piece_means(tangents[0] - pull[:-1] + pull[1:], free, runs)


# One lane after another under vmap, where the writes in place would become copies of the tables.
@jax.custom_batching.sequential_vmap
def _fused_lasso(y: Float[Array, " n"], levels: Float[Array, " m"], masses: Any, count: Any) -> Float[Array, " n"]:
    n = y.shape[0]
    middle = jnp.asarray(n + 1, jnp.int32)
    knots = jnp.zeros((2 * n + 4, 3), y.dtype)  # place, change of slope, change of intercept
    knots = knots.at[n + 1, 2].set(levels[0]).at[n + 2, 2].set(levels[0])

    # One flat loop: each turn removes a knot, or cuts on one side and moves to the other side or the next node. It
    # writes before it reads the next knot, or XLA would copy the table in every turn. The derivative from the right is
    # stored with the opposite sign, so that both sides are treated alike.
    def fresh(node: Array, on_left: Array) -> Array:
        node = jnp.minimum(node, n - 1)
        mass = jnp.ones((), y.dtype) if masses is None else masses[node]
        pull = mass * y[node]
        intercept = -levels[node] - jnp.where(on_left, pull, -pull)
        return jnp.stack([jnp.where(on_left, mass, -mass), intercept, jnp.asarray(-jnp.inf, y.dtype)])

    def turn(carry: tuple) -> tuple:
        node, on_left, first, last, piece, knot, knots, cuts = carry
        after = levels[node + 1]
        slope, intercept, passed = piece[0], piece[1], piece[2]
        remove = (first <= last) & (slope * knot[0] + intercept <= -after)
        # Inside a jump of the derivative the cut is the place of the jump; `passed` is signed by the side.
        side = jnp.where(on_left, 1.0, -1.0).astype(y.dtype)
        cut = side * jnp.maximum(side * (-after - intercept) / slope, passed)
        place = jnp.where(on_left, first - 1, last + 1)
        knots = _replaced(knots, jnp.stack([cut, slope, intercept + after]), jnp.where(remove, 0, place))
        cuts = _replaced(cuts, cut[None], jnp.where(remove, 2 * n, 2 * node + ~on_left))
        first = first + (remove & on_left)
        last = last - (remove & ~on_left)
        next_node = node + (~remove & ~on_left)
        next_left = jnp.where(remove, on_left, ~on_left)
        turned = next_node > node
        # The cuts of both sides become the outermost knots once the node is finished.
        first, last = first - turned, last + turned
        removed = jnp.stack([slope + knot[1], intercept + knot[2], side * knot[0]])
        piece = jnp.where(remove, removed, fresh(next_node, next_left))
        knot = jax.lax.dynamic_index_in_dim(knots, jnp.where(next_left, first, last), keepdims=False)
        return next_node, next_left, first, last, piece, knot, knots, cuts

    left = jnp.ones((), bool)
    zero = jnp.zeros((), jnp.int32)
    cuts = jnp.zeros((2 * n + 1, 1), y.dtype)
    start = (zero, left, middle, middle + 1, fresh(zero, left), knots[n + 1], knots, cuts)
    cuts = jax.lax.while_loop(lambda carry: carry[0] < count, turn, start)[-1][:-1].reshape(n, 2)

    def backwards(following: Array, cut: Array) -> tuple[Array, Array]:
        here = jnp.clip(following, cut[0], cut[1])
        return here, here

    return jax.lax.scan(backwards, jnp.zeros((), y.dtype), cuts, reverse=True)[1]


@pytree
class ChainTotalVariation:
    """`weight * ||E z||_1` on a chain; E is D on nodes `[n]`, or Dᵀ on edges `[1, n]`, in the layout of `GridBase`.

    Dᵀ sees a 0 at both ends of the line of edges. The prox is exact (`fused_lasso`), channel by channel. The dual ball
    is `{Eᵀu : |u| <= weight}`.

    Attributes:
        weight: a number.
        last: E.
    """

    nearest = False
    weight: Any
    last: Difference

    def _line(self, z: FloatArray) -> FloatArray:
        """`[n]` or `[n - 1]` from the layout of nodes or edges."""
        return z[0, :-1] if self.last.from_edges else z

    def _potential(self, dual: FloatArray) -> FloatArray:
        """The u with `Eᵀu = dual`, in the layout of the rows of E; for Dᵀ the free constant centres it."""
        sums = jnp.cumsum(self._line(dual), axis=0)
        ends = [(0, 0)] * (sums.ndim - 1)
        if self.last.from_edges:
            sums = -jnp.pad(sums, [(1, 0), *ends])
            return sums - 0.5 * (sums.max(axis=0) + sums.min(axis=0))
        return jnp.pad(sums[:-1], [(0, 1), *ends])[None]

    def potential(self, dual: FloatArray) -> FloatArray:
        """The u with `Eᵀu = dual`, clipped to the weight."""
        weight = jnp.asarray(self.weight, dual.dtype)
        return jnp.clip(self._potential(dual), -weight, weight)

    def dual_at(self, x: FloatArray, dual: FloatArray) -> FloatArray:
        """The u of an exact fit x with `Eᵀu = dual`: known where E x is not 0, even if the dual is lost to rounding."""
        apart = self.last.mv(x)
        return jnp.where(apart == 0, self.potential(dual), jnp.asarray(self.weight, x.dtype) * jnp.sign(apart))

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return self.weight * total(jnp.abs(self.last.mv(x)))

    def prox(self, x: FloatArray, step: Any) -> FloatArray:
        line, pinned = self._line(x), self.last.from_edges
        level = jnp.asarray(step * self.weight, x.dtype)
        end = level if pinned else jnp.zeros_like(level)
        levels = jnp.full((line.shape[0] + 1,), level).at[0].set(end).at[-1].set(end)
        columns = jax.vmap(fused_lasso, (1, None), 1)(line.reshape(line.shape[0], -1), levels)
        found = columns.reshape(line.shape)
        return jnp.pad(found, [(0, 1)] + [(0, 0)] * (line.ndim - 1))[None] if pinned else found

    def project_dual(self, dual: FloatArray) -> FloatArray:
        """`Eᵀu` for the clipped potential u: in the ball, and `dual` itself if it lies in the ball."""
        return self.last.rmv(self.potential(dual))

    def slack(self, x: FloatArray, dual: FloatArray) -> FloatArray:
        """`weight |E x| - u E x`, difference by difference."""
        apart = self.last.mv(x)
        return jnp.asarray(self.weight, x.dtype) * jnp.abs(apart) - self.potential(dual) * apart

    def dual_norm(self, dual: FloatArray) -> Float[Array, ""]:
        """The largest `|u| / weight` with `Eᵀu = dual`. For D the dual must sum to 0, which is not checked."""
        return largest_ratio(jnp.abs(self._potential(dual)), self.weight)
