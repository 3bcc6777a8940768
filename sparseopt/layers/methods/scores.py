"""Methods that rank the weights by a score and keep the dense values, and what they share with SparseGPT."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from sparseopt.core.base.thresholds import among, count_nonzero, top_k_mask
from sparseopt.core.base.types import pytree
from sparseopt.core.penalties.patterns import GroupTopK, RowTopK, TopK, without_support
from sparseopt.core.problem.problem import Status
from sparseopt.layers.patterns import Pattern, taken
from sparseopt.layers.problem import Pruned, ScaledLayer


@pytree
class Magnitude:
    """Keep the largest `|W_ij|` in the pattern, whatever the inputs are; on a tie the first inputs win.

    Source: Han, Pool, Tran, Dally, "Learning both weights and connections", 2015.
    """

    def __call__(self, layer: ScaledLayer, pattern: Pattern) -> Pruned:
        return _dense_values(layer, pattern.mask(jnp.abs(layer.weight)))


@pytree
class Wanda:
    """Keep the largest `|W_ij| ||X_j||` among the inputs of each output; no refit.

    With an unstructured pattern every output row keeps the same number of weights; the rest of the exact count goes to
    the rows whose next score is largest.

    Source: Sun, Liu, Bair, Kolter, "A simple and effective pruning approach for LLMs", ICLR 2024, eq. 1.
    """

    def __call__(self, layer: ScaledLayer, pattern: Pattern) -> Pruned:
        plain, support = without_support(pattern)
        score = jnp.abs(layer.center)
        if not isinstance(plain, TopK):
            return _dense_values(layer, pattern.mask(score))
        if support is not None:
            # An output with fewer weights in the support than its share keeps all of them; the rest of its share goes
            # to the best others.
            restricted = dataclasses.replace(layer, center=among(support, score))
            mask = self(restricted, plain).mask & support
            more = top_k_mask(among(support & ~mask, score), plain.k - count_nonzero(mask))
            return _dense_values(layer, (mask | more) & support)
        each, left = plain.k // score.shape[1], plain.k % score.shape[1]
        mask = RowTopK(each).mask(score)
        following = RowTopK(each + 1).mask(score) & ~mask
        extra = top_k_mask(jnp.max(among(following, score), axis=0), left)
        return _dense_values(layer, mask | (following & extra[None, :]))


@pytree
class Flap:
    """Keep the groups of inputs j with the largest sums of `var(X_j) ||W_:j||²`; no refit.

    An input that hardly varies adds nearly the same vector to the outputs of every token. The paper moves that constant
    into a bias, which most model families do not have, so here it is dropped.

    Source: An, Zhao, Yu, Tang, Wang, "Fluctuation-based adaptive structured pruning for large language models",
    AAAI 2024, the metric WIFV.
    """

    reads_variances = True

    def __call__(self, layer: ScaledLayer, pattern: Pattern) -> Pruned:
        what = "flap ranks whole groups of inputs and accepts the pattern group:C only"
        taken(without_support(pattern)[0], GroupTopK, what, "method 'wanda' accepts all")
        if layer.variances is None:
            raise ValueError(
                "flap ranks inputs by their variance, which a Gram does not have; give input_variances, or use "
                "method 'wanda'"
            )
        return _dense_values(layer, pattern.mask(jnp.abs(layer.center) * jnp.sqrt(layer.variances)[:, None]))


def _dense_values(layer: ScaledLayer, mask: Array) -> Pruned:
    return Pruned(jnp.where(mask, layer.center, 0), mask, 1, Status.CONVERGED)
