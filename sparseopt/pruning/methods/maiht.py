"""Floor 6: mAIHT as a pruning method, in the paper's settings and in the best."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sparseopt.core.constraints import Support
from sparseopt.core.iterate import iterate
from sparseopt.core.losses import largest_eigenvalue_bound
from sparseopt.core.patterns import TopK
from sparseopt.core.penalties import L0
from sparseopt.core.problem import Problem, Status
from sparseopt.core.solvers.aiht import STEP_FRACTION, Maiht
from sparseopt.core.solvers.proximal_gradient import ProximalGradient
from sparseopt.core.solvers.refit import Refit
from sparseopt.core.thresholds import count_nonzero, kth_largest, top_k_mask
from sparseopt.core.types import pytree, static
from sparseopt.pruning.layer import Pruned, ScaledLayer
from sparseopt.pruning.methods.scores import among
from sparseopt.pruning.patterns import Pattern


@pytree
class MaihtPruning:
    """mAIHT, then the exact count, then a refit of the kept weights on their support.

    Unstructured: L0, or a penalty of yours, with the paper's adaptive level. n:m: the same three sequences with
    the projection onto the pattern as prox, so every iterate has it.

    Attributes:
        ridge: added to the unit diagonal of the scaled hessian.
        monitor: see `Maiht`.
        max_steps: mAIHT iterations at most.
        rest: stop when at most this share of the entries changed sides in a step; negative: never.
        refit: "gradient" is the paper's projected gradient, "cg" conjugate gradients.
        refit_steps: steps of the refit.
        undershoot: how far below the asked sparsity the level aims (the final count prunes the rest), above
            35 % sparsity and below. The level starts low, where the first threshold keeps 95 %, 97 % or 99 % of
            the entries, by the sparsity asked for, and the iteration raises it.
        penalty: chooses the support by its prox in place of L0; a frozen dataclass with a field `weight`, which
            is the level and is set by the sparsity asked for. Unstructured patterns only.
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
        """Solve, count, refit."""
        loss = layer.ridged(self.ridge)
        step = STEP_FRACTION / largest_eigenvalue_bound(loss.hessian, jax.random.key(self.seed))
        penalty: Any = pattern
        target = None
        if isinstance(pattern, TopK):
            sparsity = 1 - pattern.k / layer.center.size
            undershoot = jnp.where(sparsity > 0.35, *self.undershoot)
            target = sparsity - undershoot
            first = jnp.where(sparsity > 0.35, 0.95, jnp.where(sparsity < 0.15, 0.99, 0.97))
            if self.penalty is None:
                penalty = L0(self._first_level(layer, first, step))
            else:
                penalty = _at_sparsity(self.penalty, layer.center, step, 1 - first)
        solver = Maiht(step, target, self.monitor, "support")
        found = iterate(Problem(loss, penalty), solver, layer.center, tol=self.rest, max_steps=self.max_steps)
        mask = self._exact_mask(found.value, layer, pattern)
        refit = ProximalGradient(step) if self.refit == "gradient" else Refit()
        start = jnp.where(mask, found.value, 0)
        kept = iterate(Problem(loss, Support(mask)), refit, start, tol=-1.0, max_steps=self.refit_steps)
        status = jnp.where(found.status == Status.NONFINITE, found.status, kept.status)
        # A fixed number of steps was asked for: running all of them is the method ending as it should.
        status = jnp.where(status == Status.MAX_STEPS, Status.CONVERGED, status)
        return Pruned(kept.value, mask, found.steps, status)

    def _first_level(self, layer: ScaledLayer, share: Array, step: Array) -> Array:
        """The weight at which the threshold keeps this share of the entries of |center|."""
        kept = (share * layer.center.size).astype(jnp.int32) + 1
        threshold = kth_largest(jnp.abs(layer.center), kept)
        return threshold**2 / (2 * step)

    def _exact_mask(self, x: Array, layer: ScaledLayer, pattern: Pattern) -> Array:
        """The pattern's exact count: the largest of x; if x is too sparse, then the largest dense weights."""
        if not isinstance(pattern, TopK):
            return pattern.mask(jnp.abs(x))
        alive = jnp.minimum(pattern.k, count_nonzero(x))
        first = top_k_mask(jnp.abs(x), alive)
        return jax.lax.cond(
            alive < pattern.k,
            lambda: first | top_k_mask(among(x == 0, jnp.abs(layer.center)), pattern.k - alive),
            lambda: first,
        )


def _at_sparsity(penalty: Any, x: Array, step: Array, sparsity: Array) -> Any:
    """The penalty at the level where its prox at x leaves this share of zeros, found by bisection on log2(level)."""

    def at(exponent: Array) -> Any:
        return dataclasses.replace(penalty, weight=jnp.exp2(exponent))

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        enough = 1 - count_nonzero(at(middle).prox(x, step)) / x.size >= sparsity
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    low, high = jax.lax.fori_loop(0, 20, halve, (jnp.float32(-60), jnp.float32(60)))
    return at((low + high) / 2)
