"""The exact fused lasso on a chain, by dynamic programming in linear time.

Source: Johnson, "A dynamic programming algorithm for the fused lasso and L0-segmentation", Journal of Computational and
Graphical Statistics 22 (2013).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Replaces a row in place under XLA; `.at[row].set` is a scatter, which copies the table on a CPU.
_replaced = partial(jax.lax.dynamic_update_index_in_dim, axis=0)
# The mass of a node without one, over the mean, which is pulled to the last value before it. A mass of 0 would leave
# its value open.
LIGHT = 1e-9


def fused_lasso(y: Float[Array, " n"], weights: tuple[Array, Array], masses: Any = None) -> Float[Array, " n"]:
    """`argmin_x 1/2 sum_i m[i] (x[i] - y[i])² + sum_i fall[i] max(x[i] - x[i+1], 0) + rise[i] max(x[i+1] - x[i], 0)`.

    The weights are fall and rise, `[n-1]` each and finite; the masses m are 0 where y is missing, or None for ones. The
    derivative of the cost of nodes 0 to i, as a function of x[i], is piecewise linear. It is stored as knots where
    slope and intercept change, clipped from both sides at the weights of the next difference; the clipping points give
    the answer backwards, `x[i] = clip(x[i+1], low[i], high[i])`. A node adds two knots, and each is removed once. A
    batch is solved one by one.

    Example:
        >>> from sparseopt.core.solvers.fused_lasso import fused_lasso
        >>> fused_lasso(jnp.array([0.0, 1.0, 6.0]), (jnp.ones(2), jnp.ones(2)))
        Array([1., 1., 5.], dtype=float32)
        >>> fused_lasso(jnp.array([2.0, 1.0, 6.0]), (1e3 * jnp.ones(2), jnp.zeros(2)))  # isotonic regression
        Array([1.5, 1.5, 6. ], dtype=float32)
    """
    if masses is not None:
        seen, places = masses > 0, jnp.arange(y.shape[0])
        last = jax.lax.cummax(jnp.where(seen, places, -1))
        y = y[jnp.where(last < 0, jnp.argmax(seen), last)]
        masses = jnp.where(seen, masses, LIGHT * jnp.sum(masses) / jnp.maximum(jnp.sum(seen), 1))
    return _fused_lasso(y, jnp.pad(jnp.stack(weights), ((0, 0), (1, 1))), masses, y.shape[0])


@jax.jit
def fused_pieces(y: Float[Array, " n"], masses: Float[Array, " n"], weight: Any, count: Any) -> Float[Array, " n"]:
    """`fused_lasso` of the first `count` nodes, with one weight and positive masses.

    Later nodes cost no time, and their answer has no meaning.
    """
    place = jnp.arange(y.shape[0] + 1)
    levels = jnp.where((place > 0) & (place < count), weight, 0).astype(y.dtype)
    return _fused_lasso(y, jnp.stack([levels, levels]), masses, count)


def fused_dual(pull: Array, rows: Array, weights: tuple[Array, Array]) -> Array:
    """The u of an exact fit with `Dᵀu = pull`, `[n - 1]` or `[n - 1, channels]`; `rows` are the differences `D x`.

    It is known where they are not 0, even if it is lost to rounding in the sums along the chain. The weights are those
    of `fused_lasso`, or infinite.
    """
    fall, rise = (level.reshape(-1, *(1 for _ in rows.shape[1:])) for level in weights)
    sums = jnp.cumsum(pull, axis=0)[:-1]
    return jnp.where(rows == 0, jnp.clip(sums, -rise, fall), jnp.where(rows > 0, fall, -rise))


# One lane after another under vmap, where the writes in place would become copies of the tables.
@jax.custom_batching.sequential_vmap
def _fused_lasso(y: Float[Array, " n"], levels: Float[Array, "2 m"], masses: Any, count: Any) -> Float[Array, " n"]:
    n = y.shape[0]
    middle = jnp.asarray(n + 1, jnp.int32)
    knots = jnp.zeros((2 * n + 4, 3), y.dtype)  # place, change of slope, change of intercept
    knots = knots.at[n + 1 : n + 3, 2].set(levels[:, 0])

    def level(node: Array, on_left: Array) -> Array:
        """The weight of the difference before a node: of a fall, or of a rise on the right."""
        return levels[(~on_left).astype(jnp.int32), node]

    # One flat loop: each turn removes a knot, or cuts on one side and moves to the other side or the next node. It
    # writes before it reads the next knot, or XLA would copy the table in every turn. The derivative from the right is
    # stored with the opposite sign, so that both sides are treated alike.
    def fresh(node: Array, on_left: Array) -> Array:
        node = jnp.minimum(node, n - 1)
        mass = jnp.ones((), y.dtype) if masses is None else masses[node]
        pull = mass * y[node]
        intercept = -level(node, on_left) - jnp.where(on_left, pull, -pull)
        return jnp.stack([jnp.where(on_left, mass, -mass), intercept, jnp.asarray(-jnp.inf, y.dtype)])

    def turn(carry: tuple) -> tuple:
        node, on_left, first, last, piece, knot, knots, cuts = carry
        after = level(node + 1, on_left)
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
