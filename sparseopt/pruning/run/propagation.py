"""Propagated error: what a linear should give so that it corrects what the layers before it have lost."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from sparseopt.core.base.dense import product, spd_inverse
from sparseopt.core.base.mesh import over, put, whole
from sparseopt.layers.compiled import Compiled
from sparseopt.layers.problem import scaled_gram
from sparseopt.layers.split import Cut
from sparseopt.pruning.base.grams import Grams

# Relative to each input's own square; a smaller one follows the drift of single tokens.
PROPAGATION_RIDGE = 0.1


def drifted_target(
    weight: Float[Array, "out in"],
    gram: Float[Array, "in in"],
    drift: Float[Array, "in in"],
    strength: float | Array,
    ridge: float | Array,
) -> Float[Array, "out in"]:
    """Propagated error: the target that corrects what the layers before have lost, float32.

        minimise over W'    1/2 ||X~ W'ᵀ - X Wᵀ||²  +  ridge/2 ||(W' - W) e||²                              [out, in]

    with X~ the inputs in the pruned model, X those in the dense one, e the norms of X~. The minimiser is
    `W' = W - ((Gram + ridge e²)⁻¹ drift Wᵀ)ᵀ`, with Gram `X~ᵀX~` and drift `X~ᵀ(X~ - X)`; strength is the part of the
    way from W to it.

    Source: the normal equations of Frantar and Alistarh, "SparseGPT", 2023, with a second input, as in Li, Yin, Lee,
    Xiao, Panda, "GPTAQ: efficient finetuning-free quantization for asymmetric calibration", 2025.
    """
    hessian, _, inverse = scaled_gram(gram)
    shifted = spd_inverse(hessian + ridge * jnp.eye(len(hessian), dtype=jnp.float32))
    moved = product(inverse[:, None] * drift, weight.astype(jnp.float32).T)
    return weight - strength * (inverse[:, None] * product(shifted, moved)).T


propagated_target = Compiled(drifted_target)


def propagated(weight: np.ndarray, grams: Grams, share: float, mesh: Mesh | None) -> np.ndarray:
    """The `drifted_target` of a weight, in its dtype, from Grams with a drift; devices of a mesh share the rows."""
    target: Any = weight
    if mesh is not None:
        # Each output has its own target: rows of zeros after them change none.
        target = put(Cut(mesh, len(weight)).padded(weight), over(mesh))
    found = propagated_target(target, grams.gram, grams.drift, np.float32(share), np.float32(PROPAGATION_RIDGE))
    return whole(found)[: len(weight)].astype(weight.dtype)
