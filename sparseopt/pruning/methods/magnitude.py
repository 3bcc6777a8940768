"""Floor 6: magnitude pruning."""

import jax.numpy as jnp

from sparseopt.core.types import pytree
from sparseopt.pruning.layer import Pruned, ScaledLayer
from sparseopt.pruning.methods.scores import keep_values
from sparseopt.pruning.patterns import Pattern


@pytree
class Magnitude:
    """Keep the largest `|W_ij|` in the pattern; no calibration data enters.

    Source: Han, Pool, Tran, Dally, "Learning both weights and connections", 2015.
    """

    def __call__(self, layer: ScaledLayer, pattern: Pattern) -> Pruned:
        """Score, mask, keep the values."""
        scale = layer.scale[:, None] * layer.output_scale
        # A dead input hides its weight's size (center is 0 there) and is pruned first in every method.
        score = jnp.where(scale > 0, jnp.abs(layer.center) / jnp.where(scale > 0, scale, 1), 0)
        return keep_values(layer, pattern.mask(score))
