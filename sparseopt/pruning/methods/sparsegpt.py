"""Floor 6: SparseGPT, one pass over the inputs with exact compensation, for comparison."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparseopt.core.dense import product, spd_inverse
from sparseopt.core.patterns import NM, RowTopK, TopK
from sparseopt.core.problem import Status
from sparseopt.core.types import pytree, static
from sparseopt.pruning.layer import Pruned, ScaledLayer
from sparseopt.pruning.methods.scores import among
from sparseopt.pruning.patterns import Pattern


@pytree
class SparseGpt:
    """Prune the inputs block by block; each pruned weight's error is passed on to the inputs that follow.

    With `U` the upper Cholesky factor of `(H + ridge I)^-1`, the saliency of entry i of a column is
    `(x_i / U_ii)²`. Within a block of inputs the pattern's share of the least salient is pruned, then input by
    input `x_j -= U_ij x_i / U_ii` for all j > i. A count (of the layer, or of every row) is spread evenly over
    the blocks; an n:m pattern is taken as each block is reached, and m must divide the block.

    Attributes:
        ridge: added to the unit diagonal of the scaled Hessian.
        block: inputs in a block.

    Source: Frantar and Alistarh, "SparseGPT: massive language models can be accurately pruned in one-shot",
    ICML 2023, algorithm 1.
    """

    ridge: Any = 0.01
    block: int = static(default=128)

    def __call__(self, layer: ScaledLayer, pattern: Pattern) -> Pruned:
        if isinstance(pattern, NM) and self.block % pattern.m:
            raise ValueError(f"sparsegpt takes blocks of {self.block} inputs, which {pattern.m} does not divide")
        if not isinstance(pattern, TopK | RowTopK | NM):
            raise ValueError(
                "sparsegpt decides input by input and takes the patterns unstructured, per-row and n:m, not "
                f"{type(pattern).__name__}; method 'best' takes all"
            )
        inputs, outputs = layer.center.shape
        # Whole blocks: padded inputs are independent of the others and have weight 0.
        padding = -inputs % self.block
        hessian = jnp.pad(layer.ridged(self.ridge).hessian, (0, padding))
        hessian = hessian + jnp.diag(jnp.where(jnp.arange(inputs + padding) < inputs, 0.0, 1.0))
        factor = jnp.linalg.cholesky(spd_inverse(hessian)).T
        values = jnp.pad(layer.center, ((0, padding), (0, 0)))
        real = (jnp.arange(inputs + padding) < inputs)[:, None]

        def one_block(carry: tuple[Array, Array], first: Array) -> tuple[tuple[Array, Array], Array]:
            values, done = carry
            rows = jax.lax.dynamic_slice_in_dim(values, first, self.block)
            upper = jax.lax.dynamic_slice_in_dim(factor, first, self.block)
            square = jax.lax.dynamic_slice_in_dim(upper, first, self.block, axis=1)
            exists = jax.lax.dynamic_slice_in_dim(real, first, self.block)
            saliency = (rows / jnp.diagonal(square)[:, None]) ** 2
            if isinstance(pattern, NM):
                wanted = jnp.zeros((), jnp.int32)
                keep = pattern.mask(saliency)
            else:
                wanted = _share(pattern.k, done, first, self.block, inputs, outputs if isinstance(pattern, TopK) else 1)
                keep = dataclasses.replace(pattern, k=wanted).mask(among(exists, saliency))
            kept, errors = _compensate(rows, square, keep)
            values = jax.lax.dynamic_update_slice_in_dim(values, kept, first, 0)
            beyond = jnp.arange(values.shape[0]) >= first + self.block
            values = values - product(jnp.where(beyond[:, None], upper.T, 0), errors)
            return (values, done + wanted), keep

        start = (values, jnp.zeros((), jnp.int32))
        (values, _), kept = jax.lax.scan(one_block, start, jnp.arange(0, inputs + padding, self.block))
        mask = kept.reshape(inputs + padding, outputs)[:inputs]
        return Pruned(jnp.where(mask, values[:inputs], 0), mask, values.shape[0] // self.block, Status.CONVERGED)


def _share(k: Array | int, done: Array, first: Array, block: int, inputs: int, width: int) -> Array:
    """How many entries of a block survive, so that after every block `k` is spent in proportion to the inputs seen.

    Args:
        k: of `inputs * width` entries in all.
        done: spent on the blocks before.
        first: the block's first input.
        block: inputs in a block; the last block may be shorter.
        inputs: of the layer.
        width: entries in an input.
    """
    seen = jnp.minimum(first + block, inputs)
    target = jnp.floor(k * (seen / inputs)).astype(jnp.int32)
    # A product of large counts rounds in float32: never more than the block holds, and never less than what the later
    # blocks could not take.
    room = (seen - first) * width
    least = jnp.maximum(k - (inputs - seen) * width - done, 0)
    return jnp.clip(target - done, least, jnp.minimum(room, k - done))


def _compensate(
    rows: Float[Array, "block out"], upper: Float[Array, "block block"], keep: Bool[Array, "block out"]
) -> tuple[Array, Array]:
    """Prune one block input by input; returns the kept values, and each input's error over `U_ii`."""

    def one_input(rows: Array, index: Array) -> tuple[Array, Array]:
        pivot = upper[index, index]
        error = jnp.where(keep[index], 0, rows[index]) / pivot
        following = jnp.arange(rows.shape[0]) > index
        rows = rows - jnp.where(following, upper[index], 0)[:, None] * error[None, :]
        return rows, error

    rows, errors = jax.lax.scan(one_input, rows, jnp.arange(rows.shape[0]))
    return jnp.where(keep, rows, 0), errors
