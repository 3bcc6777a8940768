"""Floor 1: the pieces of a graph that chosen edges join, and means over them.

Labels fall until they are constant on pieces: an edge gives the larger label of its ends the smaller one, and labels of
labels halve the way to the least (Shiloach and Vishkin, "An O(log n) parallel connectivity algorithm", 1982).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Labels of labels in a turn: a gather costs a small part of what the minima over edges cost.
JUMPS = 3


def piece_labels(
    tails: Int[Array, " m"], heads: Int[Array, " m"], joins: Bool[Array, " m"], num_nodes: int
) -> Int[Array, " n"]:
    """The least node of the piece that each node lies in.

    Args:
        tails: one end of each edge.
        heads: the other one.
        joins: which edges join their ends.
        num_nodes: n.

    Example:
        >>> from sparseopt.core.pieces import piece_labels
        >>> piece_labels(jnp.arange(4), jnp.arange(1, 5), jnp.array([True, False, True, True]), 5)
        Array([0, 0, 2, 2, 2], dtype=int32)
    """

    def turn(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        labels, _ = carry
        a, b = labels[tails], labels[heads]
        least = jnp.where(joins, jnp.minimum(a, b), num_nodes)
        fallen = labels.at[jnp.maximum(a, b)].min(least, mode="promise_in_bounds")
        for _ in range(JUMPS):
            fallen = fallen[fallen]
        return fallen, jnp.any(fallen != labels)

    start = jnp.arange(num_nodes, dtype=jnp.int32), jnp.ones((), bool)
    return jax.lax.while_loop(lambda carry: carry[1], turn, start)[0]


def piece_means(sums: Float[Array, " n"], weights: Float[Array, " n"], labels: Int[Array, " n"]) -> Float[Array, " n"]:
    """The sum of `sums` over that of `weights`, at every node that of its piece; 0 where the weights add up to 0.

    Example:
        >>> from sparseopt.core.pieces import piece_means
        >>> piece_means(jnp.array([1.0, 3.0, 5.0]), jnp.ones(3), jnp.array([0, 0, 2]))
        Array([2., 2., 5.], dtype=float32)
    """
    over = jax.ops.segment_sum(weights, labels, labels.size)
    means = jax.ops.segment_sum(sums, labels, labels.size) / jnp.where(over > 0, over, 1)
    return jnp.where(over > 0, means, 0)[labels]
