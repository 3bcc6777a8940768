"""Floor 6: magnitude pruning."""

import jax.numpy as jnp

from sparseopt.core.types import pytree
from sparseopt.pruning.layer import DEAD_SCALE, Pruned, ScaledLayer, ranking_scale
from sparseopt.pruning.methods.scores import keep_values
from sparseopt.pruning.patterns import Pattern


@pytree
class Magnitude:
    """Keep the largest `|W_ij|` in the pattern; of calibration data, it only matters which inputs are dead.

    Source: Han, Pool, Tran, Dally, "Learning both weights and connections", 2015.
    """

    def __call__(self, layer: ScaledLayer, pattern: Pattern) -> Pruned:
        """Score, mask, keep the values."""
        size = jnp.abs(layer.center) / (ranking_scale(layer.scale)[:, None] * layer.output_scale)
        # As in every method, the weights of dead inputs are pruned first.
        score = jnp.where(layer.scale[:, None] > 0, size, DEAD_SCALE * size)
        return keep_values(layer, pattern.mask(score))
