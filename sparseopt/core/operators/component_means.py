"""The connected components of a part of a graph's edges: the label of each node, and means over components."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Labels of labels per round: a gather is much cheaper than the minima over edges.
JUMPS = 3


def piece_labels(
    tails: Int[Array, " m"], heads: Int[Array, " m"], joins: Bool[Array, " m"], num_nodes: int
) -> Int[Array, " n"]:
    """The smallest node of the piece of each node; `joins` says which edges join their ends.

    Labels fall until they are constant on pieces: the larger label at the ends of an edge becomes the smaller one, and
    labels of labels halve the distance to the smallest (Shiloach and Vishkin, "An O(log n) parallel connectivity
    algorithm", 1982).

    Example:
        >>> from sparseopt.core.operators.component_means import piece_labels
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
    """At every node, the sum of `sums` over the sum of `weights` of its piece; 0 where the weights add up to 0."""
    over = jax.ops.segment_sum(weights, labels, labels.size)
    means = jax.ops.segment_sum(sums, labels, labels.size) / jnp.where(over > 0, over, 1)
    return jnp.where(over > 0, means, 0)[labels]
