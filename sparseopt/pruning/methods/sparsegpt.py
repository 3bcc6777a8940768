"""Floor 6: SparseGPT, one pass over the inputs with exact compensation; kept for comparison."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparseopt.core.dense import product, spd_inverse
from sparseopt.core.penalties import NM, TopK
from sparseopt.core.solve import Status
from sparseopt.core.types import pytree, static
from sparseopt.pruning.layer import Pruned, ScaledLayer
from sparseopt.pruning.patterns import Pattern


@pytree
class SparseGpt:
    """Prune the inputs block by block; each pruned weight's error is passed on to the inputs that follow.

    With `U` the upper Cholesky factor of `(H + ridge I)^-1`, the saliency of entry i of a column is
    `(x_i / U_ii)²`. Within a block of inputs the pattern's share of the least salient is pruned, then input by
    input `x_j -= U_ij x_i / U_ii` for all j > i. An n:m pattern is taken as each block is reached; m must divide
    the block.

    Attributes:
        ridge: added to the unit diagonal of the scaled hessian.
        block: inputs a block.

    Source: Frantar and Alistarh, "SparseGPT: massive language models can be accurately pruned in one-shot",
    ICML 2023, algorithm 1.
    """

    ridge: Any = 0.01
    block: int = static(default=128)

    def __call__(self, layer: ScaledLayer, pattern: Pattern) -> Pruned:
        """One pass.

        Raises:
            ValueError: for a pattern other than unstructured or n:m, or an m that does not divide the block.
        """
        if isinstance(pattern, NM) and self.block % pattern.m:
            raise ValueError(f"sparsegpt takes blocks of {self.block} inputs, which {pattern.m} does not divide")
        if not isinstance(pattern, (NM, TopK)):
            raise ValueError(f"sparsegpt takes unstructured and n:m patterns, given {pattern!r}")
        inputs, outputs = layer.center.shape
        # Whole blocks: inputs that do not exist have no neighbours and weigh nothing.
        padding = -inputs % self.block
        hessian = jnp.pad(layer.ridged(self.ridge).hessian, (0, padding))
        hessian = hessian + jnp.diag(jnp.where(jnp.arange(inputs + padding) < inputs, 0.0, 1.0))
        factor = jnp.linalg.cholesky(spd_inverse(hessian)).T
        values = jnp.pad(layer.center, ((0, padding), (0, 0)))
        real = (jnp.arange(inputs + padding) < inputs)[:, None]

        def one_block(carry: tuple[Array, Array], first: Array) -> tuple[tuple[Array, Array], Array]:
            values, left = carry
            rows = jax.lax.dynamic_slice_in_dim(values, first, self.block)
            upper = jax.lax.dynamic_slice_in_dim(factor, first, self.block)
            square = jax.lax.dynamic_slice_in_dim(upper, first, self.block, axis=1)
            exists = jax.lax.dynamic_slice_in_dim(real, first, self.block)
            saliency = (rows / jnp.diagonal(square)[:, None]) ** 2
            if isinstance(pattern, TopK):
                # The count of the blocks so far is the pattern's share of their entries, rounded down.
                share = pattern.k / (inputs * outputs)
                seen = jnp.minimum(first + self.block, inputs) * outputs
                last = first + self.block >= inputs
                wanted = jnp.where(last, left, left - (pattern.k - jnp.floor(share * seen).astype(jnp.int32)))
                keep = TopK(wanted).mask(jnp.where(exists, jnp.maximum(saliency, jnp.finfo(saliency.dtype).tiny), 0))
            else:
                wanted = jnp.zeros((), jnp.int32)
                keep = pattern.mask(saliency)
            kept, errors = _compensate(rows, square, keep)
            values = jax.lax.dynamic_update_slice_in_dim(values, kept, first, 0)
            beyond = jnp.arange(values.shape[0]) >= first + self.block
            values = values - product(jnp.where(beyond[:, None], upper.T, 0), errors)
            return (values, left - wanted), keep

        start = (values, jnp.asarray(pattern.k if isinstance(pattern, TopK) else 0, jnp.int32))
        (values, _), kept = jax.lax.scan(one_block, start, jnp.arange(0, inputs + padding, self.block))
        mask = kept.reshape(inputs + padding, outputs)[:inputs]
        return Pruned(jnp.where(mask, values[:inputs], 0), mask, values.shape[0] // self.block, Status.CONVERGED)


def _compensate(
    rows: Float[Array, "block out"], upper: Float[Array, "block block"], keep: Bool[Array, "block out"]
) -> tuple[Array, Array]:
    """Prune one block input by input; the values kept, and each input's error over `U_ii`."""

    def one_input(rows: Array, index: Array) -> tuple[Array, Array]:
        pivot = upper[index, index]
        error = jnp.where(keep[index], 0, rows[index]) / pivot
        following = jnp.arange(rows.shape[0]) > index
        rows = rows - jnp.where(following, upper[index], 0)[:, None] * error[None, :]
        return rows, error

    rows, errors = jax.lax.scan(one_input, rows, jnp.arange(rows.shape[0]))
    return jnp.where(keep, rows, 0), errors
