"""Floor 6: a cheap estimate of the model's loss at each sparsity of one linear.

    loss(s)  =  1/2 sum_c F_c ||X (V_s - W)_c||² / tokens          nats a token, to second order

with F the outputs' sensitivity and V_s a fair answer at sparsity s: a few ADMM steps from the answer at the previous
sparsity, with one rho and so one inverse for the whole path, then conjugate gradients on the support. Only some output
rows are used, evenly spaced, as a sample of all. A path of levels then costs about as much as one solve of the linear.
An allocation uses the differences along the path, not the absolute values.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.constraints import Support
from sparseopt.core.dense import product
from sparseopt.core.patterns import TopK
from sparseopt.core.problem import Problem
from sparseopt.core.solvers.quadratic_admm import QuadraticAdmm
from sparseopt.core.solvers.refit import Refit
from sparseopt.pruning.compiled import Compiled
from sparseopt.pruning.layer import scale_layer

RIDGE, RHO = 0.1, 0.4
ADMM_STEPS, REFIT_STEPS = 3, 2
OUTLIER = 5.0
# Rows taken at least, of linears that have as many.
ROWS = 192


def estimated_losses(
    weight: Float[Array, "out in"],
    gram: Float[Array, "in in"],
    sensitivity: Float[Array, "out"],
    output_weights: Float[Array, "out"],
    levels: Float[Array, "levels"],
) -> Float[Array, "levels"]:
    """The formula above at ascending shares of zeros.

    The Gram is `XᵀX` over the number of tokens, the sensitivity is F; the answers are those for the output weights, as
    in `LayerJob`.
    """
    every = max(1, weight.shape[0] // ROWS)
    share = weight.shape[0] / len(range(0, weight.shape[0], every))
    layer = scale_layer(weight[::every], gram, output_weights[::every])
    loss = layer.ridged(RIDGE)
    solver = QuadraticAdmm(rho=RHO, watch=False)

    def level(state: Any, sparsity: Array) -> tuple[Any, Array]:
        kept = jnp.round((1 - sparsity) * layer.center.size).astype(jnp.int32)
        problem = Problem(loss, TopK(kept))
        # The dual belongs to the previous count.
        state = replace(state, point=state.x)
        state = jax.lax.fori_loop(0, ADMM_STEPS, lambda _, s: solver.step(problem, s), state)
        fixed, refit = Problem(loss, Support(state.x != 0)), Refit()
        found = refit.init(fixed, state.x)
        found = jax.lax.fori_loop(0, REFIT_STEPS, lambda _, s: refit.step(fixed, s), found)
        change = (found.x - layer.center) / layer.output_scale
        errors = jnp.sum(change * product(layer.hessian, change), axis=0)
        return replace(state, x=found.x), 0.5 * share * jnp.sum(errors * sensitivity[::every])

    start = solver.init(Problem(loss, TopK(layer.center.size)), layer.center)
    return jax.lax.scan(level, start, levels)[1]


def outlier_share(
    weights: dict[str, Float[Array, "out in"]], grams: dict[str, Float[Array, "in in"]]
) -> Float[Array, ""]:
    """Share of a block's weights whose score `|W_ij| ||X_j||` is above `OUTLIER` times the block's mean score.

    Weights and Grams of the inputs go by the linears' names.

    Source: Yin et al., "Outlier weighed layerwise sparsity (OWL)", ICML 2024, eq. 1.
    """
    scores = [jnp.abs(weight) * jnp.sqrt(jnp.diagonal(grams[name])) for name, weight in weights.items()]
    size = sum(score.size for score in scores)
    mean = sum(jnp.sum(score) for score in scores) / size
    return sum(jnp.sum(score > OUTLIER * mean, dtype=jnp.int32) for score in scores) / jnp.asarray(size)


losses_of_linear = Compiled(estimated_losses)
outliers_of_block = Compiled(outlier_share)
