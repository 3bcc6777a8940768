"""SparseGPT, one pass over the inputs with exact compensation, for comparison."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparseopt.core.base.dense import product, spd_inverse_factor
from sparseopt.core.base.types import pytree, static
from sparseopt.core.penalties.patterns import NM, RowTopK, TopK, Within, without_support
from sparseopt.core.problem.problem import Status
from sparseopt.layers.patterns import Pattern, taken
from sparseopt.layers.problem import Pruned, ScaledLayer


@pytree
class SparseGpt:
    """Prune the inputs block by block; each pruned weight's error is passed on to the inputs that follow.

    With `U` the upper Cholesky factor of `(H + ridge I)^-1`, the saliency of entry i of a column is `(x_i / U_ii)²`.
    Within a block of inputs the pattern's fraction of the least salient entries is pruned, then input by input
    `x_j -= U_ij x_i / U_ii` for all j > i. A count (of the layer, or of every row) is spread evenly over the blocks.
    Each group of an n:m pattern is chosen when it is reached, which is the paper's block of m; m must divide the block.
    Within a given support the count is spread in proportion to the block's weights in the support, and what the
    compensation moves to other entries is pruned in turn.

    Attributes:
        ridge: added to the unit diagonal of the scaled Hessian.
        block: inputs in a block.

    Source: Frantar and Alistarh, "SparseGPT: massive language models can be accurately pruned in one-shot",
    ICML 2023, algorithm 1.
    """

    ridge: Any = 0.01
    block: int = static(default=128)

    def __call__(self, layer: ScaledLayer, pattern: Pattern) -> Pruned:
        given, support = without_support(pattern)
        what = "sparsegpt decides input by input and accepts the patterns unstructured, per-row and n:m"
        plain = taken(given, TopK | RowTopK | NM, what, "method 'best' accepts all")
        groups = plain if isinstance(plain, NM) else None
        if groups is not None and self.block % groups.m:
            raise ValueError(f"sparsegpt uses blocks of {self.block} inputs, which {groups.m} does not divide")
        inputs, outputs = layer.center.shape
        # Whole blocks: padded inputs are independent of the others and have weight 0.
        padding = -inputs % self.block
        hessian = jnp.pad(layer.ridged(self.ridge).hessian, (0, padding))
        hessian = hessian + jnp.diag((jnp.arange(inputs + padding) >= inputs).astype(hessian.dtype))
        factor = spd_inverse_factor(hessian)
        values = jnp.pad(layer.center, ((0, padding), (0, 0)))
        # No weight of a padded input may stay.
        candidates = jnp.ones((inputs, 1), jnp.bool_) if support is None else support
        candidates = jnp.pad(candidates, ((0, padding), (0, 0)))
        # The counts are the layer's, or every output's.
        whole = isinstance(plain, TopK)
        tiles = candidates.reshape(-1, self.block, candidates.shape[1])
        room = jnp.sum(tiles, axis=(1, 2) if whole else 1, dtype=jnp.int32)
        if whole and support is None:
            room = room * outputs
        seen = jnp.cumsum(room, axis=0)

        def one_block(
            carry: tuple[Array, Array], place: tuple[Array, Array, Array]
        ) -> tuple[tuple[Array, Array], Array]:
            (values, done), (first, seen_here, room_here) = carry, place
            rows = jax.lax.dynamic_slice_in_dim(values, first, self.block)
            upper = jax.lax.dynamic_slice_in_dim(factor, first, self.block)
            square = jax.lax.dynamic_slice_in_dim(upper, first, self.block, axis=1)
            possible = jax.lax.dynamic_slice_in_dim(candidates, first, self.block)
            keep = jnp.zeros(rows.shape, bool)
            if groups is None:
                wanted = _share(jnp.minimum(plain.k, seen[-1]), done, seen_here, room_here, seen[-1])
                here, done = dataclasses.replace(plain, k=wanted), done + wanted
                keep = Within(here, possible).mask((rows / jnp.diagonal(square)[:, None]) ** 2)
            kept, errors, keep = _compensate(rows, square, keep, possible, groups)
            return (pass_beyond(values, upper, first, kept, errors), done), keep

        places = (jnp.arange(0, inputs + padding, self.block), seen, room)
        (values, _), kept = jax.lax.scan(one_block, (values, jnp.zeros_like(room[0])), places)
        mask = kept.reshape(inputs + padding, outputs)[:inputs]
        return Pruned(jnp.where(mask, values[:inputs], 0), mask, values.shape[0] // self.block, Status.CONVERGED)


def _share(k: Array, done: Array, seen: Array, room: Array, total: Array) -> Array:
    """How many entries of a block survive, so that after every block `k` is spent in proportion to the entries seen.

    Args:
        k: survivors among `total` entries.
        done: spent on the blocks before.
        seen: entries of the blocks before and of this one.
        room: entries of this one.
        total: entries of all blocks.
    """
    target = jnp.floor(k * (seen / jnp.maximum(total, 1))).astype(jnp.int32)
    # A product of large counts rounds in float32: never more than the block holds, and never less than what the later
    # blocks cannot hold.
    least = jnp.maximum(k - (total - seen) - done, 0)
    return jnp.clip(target - done, least, jnp.minimum(room, k - done))


def _compensate(
    rows: Float[Array, "block out"],
    upper: Float[Array, "block block"],
    keep: Bool[Array, "block out"],
    possible: Bool[Array, "block #out"],
    groups: NM | None,
) -> tuple[Array, Array, Array]:
    """Prune one block input by input; returns the kept values, each input's error over `U_ii`, and the mask.

    The given mask is for a count; the groups of an n:m pattern are chosen here, so that they see the corrections of
    the inputs before them.
    """

    def with_group(groups: NM, rows: Array, keep: Array, index: Array) -> Array:
        pivots = jax.lax.dynamic_slice_in_dim(jnp.diagonal(upper), index, groups.m)
        values = jax.lax.dynamic_slice_in_dim(rows, index, groups.m)
        within = Within(groups, jax.lax.dynamic_slice_in_dim(possible, index, groups.m))
        return jax.lax.dynamic_update_slice_in_dim(keep, within.mask((values / pivots[:, None]) ** 2), index, 0)

    def one_input(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], Array]:
        rows, keep = carry
        if groups is not None:
            chosen = partial(with_group, groups)
            keep = jax.lax.cond(index % groups.m == 0, chosen, lambda _, keep, __: keep, rows, keep, index)
        rows, error = pass_on(rows, upper, index, jnp.where(keep[index], rows[index], 0))
        return (rows, keep), error

    (rows, keep), errors = jax.lax.scan(one_input, (rows, keep), jnp.arange(rows.shape[0]))
    return rows, errors, keep


def pass_on(
    rows: Float[Array, "block out"], upper: Float[Array, "block block"], index: Array, new: Float[Array, " out"]
) -> tuple[Float[Array, "block out"], Float[Array, " out"]]:
    """The rows with row `index` at `new`, its error compensated by the rows after it, and that error over `U_ii`."""
    error = (rows[index] - new) / upper[index, index]
    following = jnp.arange(rows.shape[0]) > index
    return (rows - jnp.where(following, upper[index], 0)[:, None] * error).at[index].set(new), error


def pass_beyond(
    values: Float[Array, "in out"],
    upper: Float[Array, "block in"],
    first: Array,
    rows: Float[Array, "block out"],
    errors: Float[Array, "block out"],
) -> Float[Array, "in out"]:
    """The values with a block of rows put in at `first`, its errors over `U_ii` compensated by the rows beyond."""
    values = jax.lax.dynamic_update_slice_in_dim(values, rows, first, 0)
    beyond = jnp.arange(len(values)) >= first + len(rows)
    return values - product(jnp.where(beyond[:, None], upper.T, 0), errors)
