"""Floor 6: Wanda, weights scored by their size times the norm of their input."""

import jax.numpy as jnp

from sparseopt.core.patterns import RowTopK, TopK
from sparseopt.core.thresholds import top_k_mask
from sparseopt.core.types import pytree
from sparseopt.pruning.layer import Pruned, ScaledLayer
from sparseopt.pruning.methods.scores import among, keep_values
from sparseopt.pruning.patterns import Pattern


@pytree
class Wanda:
    """Keep the largest `|W_ij| ||X_j||` among the inputs of each output; no refit.

    With an unstructured pattern every output row keeps the same number of weights, and where the exact count
    does not divide, the largest next scores fill up.

    Source: Sun, Liu, Bair, Kolter, "A simple and effective pruning approach for LLMs", ICLR 2024, eq. 1.
    """

    def __call__(self, layer: ScaledLayer, pattern: Pattern) -> Pruned:
        """Score, mask, keep the values."""
        score = jnp.abs(layer.center)
        if not isinstance(pattern, TopK):
            return keep_values(layer, pattern.mask(score))
        each, left = pattern.k // score.shape[1], pattern.k % score.shape[1]
        mask = RowTopK(each).mask(score)
        following = RowTopK(each + 1).mask(score) & ~mask
        extra = top_k_mask(jnp.max(among(following, score), axis=0), left)
        return keep_values(layer, mask | (following & extra[None, :]))
