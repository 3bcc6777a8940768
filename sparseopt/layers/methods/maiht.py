"""mAIHT as a pruning method; the defaults are the settings of the paper."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sparseopt.core.base.thresholds import among, count_nonzero, kth_largest, top_k_mask
from sparseopt.core.base.types import pytree, static
from sparseopt.core.losses.quadratic import safe_step
from sparseopt.core.penalties.entries import L0
from sparseopt.core.penalties.patterns import TopK, without_support
from sparseopt.core.penalties.sets import Support
from sparseopt.core.problem.iterate import iterate
from sparseopt.core.problem.problem import Problem
from sparseopt.core.solvers.maiht import Maiht
from sparseopt.core.solvers.proximal_gradient import ProximalGradient
from sparseopt.layers.patterns import Pattern
from sparseopt.layers.problem import Pruned, ScaledLayer, refitted


@pytree
class MaihtPruning:
    """mAIHT, then the exact count, then a refit of the kept weights on their support.

    Unstructured: L0, or your own penalty, with the paper's adaptive level. Other patterns: the same three sequences
    with the projection onto the pattern as prox, so every iterate has the pattern.

    Attributes:
        ridge: added to the unit diagonal of the scaled Hessian.
        monitor: as in `Maiht`.
        max_steps: limit on mAIHT iterations.
        rest: stop when at most this fraction of the entries changed sides in a step; negative: never.
        refit: "gradient" is the paper's projected gradient, "cg" conjugate gradients.
        refit_steps: steps of the refit.
        undershoot: how far below the given sparsity the level aims, above 35 % sparsity and below; the final count
            prunes the rest. The level starts low, where the first threshold keeps 95 %, 97 % or 99 % of the entries,
            depending on the sparsity, and the iteration raises it.
        seed: for the random start of the eigenvalue bound.
        penalty: replaces L0 in the choice of the support; a frozen dataclass with a prox and a field `weight`, the
            level, which the sparsity sets. Unstructured patterns only.
    """

    ridge: Any = 0.1
    undershoot: Any = (0.015, 0.01)
    monitor: Literal["always", "on_increase"] = static(default="always")
    max_steps: int = static(default=20)
    rest: float = static(default=-1.0)
    refit: Literal["gradient", "cg"] = static(default="gradient")
    refit_steps: int = static(default=30)
    seed: int = static(default=0)
    penalty: Any = None

    def __call__(self, layer: ScaledLayer, pattern: Pattern) -> Pruned:
        loss = layer.ridged(self.ridge)
        step = safe_step(loss.hessian, self.seed)
        penalty: Any = pattern
        target = None
        plain, support = without_support(pattern)
        if isinstance(plain, TopK):
            sparsity = 1 - plain.k / layer.center.size
            undershoot = jnp.where(sparsity > 0.35, *self.undershoot)
            target = sparsity - undershoot
            first = jnp.where(sparsity > 0.35, 0.95, jnp.where(sparsity < 0.15, 0.99, 0.97))
            penalty = self._first_penalty(layer, support, first, step)
        solver = Maiht(step, target, self.monitor, "support")
        found = iterate(Problem(loss, penalty), solver, layer.center, tol=self.rest, max_steps=self.max_steps)
        mask = _exact_mask(found.value, layer, pattern)
        return refitted(
            loss, found.value, mask, self.refit_steps, done=found.steps, status=found.status,
            solver=ProximalGradient(step) if self.refit == "gradient" else None,
        )  # fmt: skip

    def _first_penalty(self, layer: ScaledLayer, support: Array | None, share: Array, step: Array) -> Any:
        """The penalty at the level whose threshold keeps this fraction of |center|.

        Zeros, dead inputs and entries off the support do not count: a level of 0 would stay 0.
        """
        usable = (layer.center != 0) & (layer.scale[:, None] > 0)
        usable = usable if support is None else usable & support
        center, kept = jnp.where(usable, layer.center, 0), count_nonzero(usable)
        if self.penalty is None:
            threshold = kth_largest(jnp.abs(center), (share * kept).astype(jnp.int32) + 1)
            penalty: Any = L0(threshold**2 / (2 * step))
        else:
            penalty = _at_sparsity(self.penalty, center, step, 1 - share * kept / center.size)
        return penalty if support is None else OnSupport(penalty.weight, penalty, support)


@pytree
class OnSupport:
    """A penalty on the entries of a support; the others must be zero. Its level is `weight`, not the penalty's own."""

    weight: Any
    penalty: Any
    support: Any

    def value(self, x: Array) -> Array:
        on_support = Support(self.support)
        return self._penalty().value(on_support.prox(x, 1.0)) + on_support.value(x)

    def prox(self, x: Array, step: Array) -> Array:
        return self._penalty().prox(Support(self.support).prox(x, step), step)

    def _penalty(self) -> Any:
        return dataclasses.replace(self.penalty, weight=self.weight)


def _exact_mask(x: Array, layer: ScaledLayer, pattern: Pattern) -> Array:
    """The pattern's exact count: the largest of x; if x is too sparse, also the largest dense weights."""
    plain, support = without_support(pattern)
    if not isinstance(plain, TopK):
        return pattern.mask(jnp.abs(x))
    alive = jnp.minimum(plain.k, count_nonzero(x))
    first = top_k_mask(jnp.abs(x), alive)
    others = x == 0 if support is None else (x == 0) & support
    mask = jax.lax.cond(
        alive < plain.k,
        lambda: first | top_k_mask(among(others, jnp.abs(layer.center)), plain.k - alive),
        lambda: first,
    )
    return mask if support is None else mask & support


def _at_sparsity(penalty: Any, x: Array, step: Array, sparsity: Array) -> Any:
    """The penalty at the level where its prox at x has this fraction of zeros, by bisection on log2(level)."""

    def at(exponent: Array) -> Any:
        return dataclasses.replace(penalty, weight=jnp.exp2(exponent))

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        enough = 1 - count_nonzero(at(middle).prox(x, step)) / x.size >= sparsity
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    low, high = jax.lax.fori_loop(0, 20, halve, (jnp.float32(-60), jnp.float32(60)))
    return at((low + high) / 2)
