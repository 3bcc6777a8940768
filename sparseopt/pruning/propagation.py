"""Floor 6: propagated error: a layer's target is moved so that it corrects what the layers before it lost.

    minimise over W'    1/2 ||X~ W'ᵀ - X Wᵀ||²  +  r/2 ||(W' - W) e||²                                  [out, in]

with X~ the inputs in the pruned model, X those in the dense one, e the norms of X~. In terms of the Gram `X~ᵀX~` and
the drift `X~ᵀ(X~ - X)` the minimiser is `W' = W - ((Gram + r e²)⁻¹ drift Wᵀ)ᵀ`. Every method then approximates W' on
the inputs X~, so it regresses on the pruned model's inputs towards the dense model's outputs.

Source: the normal equations of Frantar and Alistarh, "SparseGPT", 2023, with a second input, as in Li, Yin, Lee, Xiao,
Panda, "GPTAQ: efficient finetuning-free quantization for asymmetric calibration", 2025.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.dense import product, spd_inverse
from sparseopt.pruning.compiled import Compiled
from sparseopt.pruning.layer import scaled_gram

# Relative to each input's own square; a smaller one follows the drift of single tokens.
PROPAGATION_RIDGE = 0.1


def drifted_target(
    weight: Float[Array, "out in"],
    gram: Float[Array, "in in"],
    drift: Float[Array, "in in"],
    strength: float | Array,
    ridge: float | Array,
) -> Float[Array, "out in"]:
    """`W - strength ((Gram + ridge e²)⁻¹ drift Wᵀ)ᵀ`, float32; strength 1 is the minimiser above, with ridge r."""
    hessian, _, inverse = scaled_gram(gram)
    shifted = spd_inverse(hessian + ridge * jnp.eye(len(hessian), dtype=jnp.float32))
    moved = product(inverse[:, None] * drift, weight.astype(jnp.float32).T)
    return weight - strength * (inverse[:, None] * product(shifted, moved)).T


propagated_target = Compiled(drifted_target)
