"""Floor 6: masks from scores, shared by the methods."""

import jax.numpy as jnp
from jaxtyping import Array

from sparseopt.core.problem import Status
from sparseopt.pruning.layer import Pruned, ScaledLayer


def keep_values(layer: ScaledLayer, mask: Array) -> Pruned:
    """The dense values where the mask is True."""
    return Pruned(jnp.where(mask, layer.center, 0), mask, 1, Status.CONVERGED)


def among(candidates: Array, score: Array) -> Array:
    """Scores that rank every candidate, also one of score 0, above all others."""
    return jnp.where(candidates, jnp.maximum(score, jnp.finfo(score.dtype).tiny), 0)
