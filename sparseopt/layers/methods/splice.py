"""Splicing, the exchange of kept entries for pruned ones if the loss predicts a gain, and pruning with it.

    minimise over x    1/2 <x - c, H (x - c)>    subject to x in a sparse set with a mask (TopK, NM, ...)

With x the minimiser on its support and g = H (x - c), removing entry i costs about `1/2 h_i x_i²` and adding entry j
gains about `1/2 g_j² / h_j`. The curvature h lies between `1 / [H⁻¹]_ii` (all other entries free) and `H_ii` (none
free); their geometric mean is used. One step finds the set's mask for these costs and damped gains, refits with
conjugate gradients, and keeps the new support only if the loss fell; otherwise the gains are damped more.

Source: Zhu, Wen, Zhu, Zhang, Wang, "A polynomial algorithm for best-subset selection problem", PNAS 2020, with
curvatures of the inverse as in Hassibi and Stork, "Optimal brain surgeon", 1993.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.base.dense import spd_inverse
from sparseopt.core.base.types import pytree, static
from sparseopt.core.penalties.sets import Support
from sparseopt.core.problem.iterate import iterate
from sparseopt.core.problem.problem import Measure, PlainSolver, Problem, Status, needs
from sparseopt.core.solvers.refit import Refit
from sparseopt.layers.methods.scores import Wanda
from sparseopt.layers.patterns import Pattern
from sparseopt.layers.problem import Pruned, ScaledLayer, refitted

# Damping of the gains after a rejected step.
DAMPING = 0.7


@pytree
class SpliceState:
    """The state of `Splice`."""

    x: Any
    mask: Any
    curvature: Any  # h, [n, 1]
    damping: Any
    loss: Any
    swapped: Any  # fraction of entries in the last exchange, 0 if it was rejected
    rejected: Any  # rejections in a row


@pytree
class Splice(PlainSolver):
    """Splicing as a solver for `solve`; the loss never increases. `problem.penalty` needs a `mask(score)`.

    The residual is the fraction of entries exchanged by the last accepted step; it is +inf after a rejected step,
    and 0 after `patience` of them in a row.

    Attributes:
        refit_steps: conjugate-gradient steps after each exchange.
        damping: factor of the gains at the first step, in (0, 1].
        patience: rejected steps in a row that end the search.
    """

    refit_steps: int = static(default=5)
    damping: Any = 1.0
    patience: int = static(default=4)

    def refuses(self, problem: Problem) -> str | None:
        reason = needs(self, problem, loss="hessian gradient value_at", penalty="")
        if reason or callable(getattr(problem.penalty, "mask", None)):
            return reason
        return (
            f"Splice exchanges entries of a sparse set and needs a penalty with mask(score), such as TopK or NM, given "
            f"{type(problem.penalty).__name__}; use Maiht or ProximalGradient for a penalty with a prox"
        )

    def init(self, problem: Problem, start: Float[Array, "n columns"]) -> SpliceState:
        """The support of start, or its largest entries if it has too many, refitted."""
        hessian = problem.loss.hessian
        free = 1 / jnp.diagonal(spd_inverse(hessian))
        curvature = jnp.sqrt(jnp.maximum(free, 0) * jnp.diagonal(hessian))[:, None]
        mask = problem.penalty.mask(jnp.abs(start))
        x, loss = self._refit(problem, start, mask)
        zero = jnp.zeros((), x.dtype)
        return SpliceState(x, mask, curvature, jnp.asarray(self.damping, x.dtype), loss, zero, jnp.zeros((), jnp.int32))

    def step(self, problem: Problem, state: SpliceState) -> SpliceState:
        gradient = problem.loss.gradient(state.x)
        # Square roots, since a mask ranks by squares and may add them up.
        cost = jnp.sqrt(state.curvature) * jnp.abs(state.x)
        gain = jnp.sqrt(state.damping / state.curvature) * jnp.abs(gradient)
        mask = problem.penalty.mask(jnp.where(state.mask, cost, gain))
        x, loss = self._refit(problem, state.x, mask)
        better = loss < state.loss
        swapped = jnp.sum(mask != state.mask, dtype=jnp.int32) / mask.size
        return SpliceState(
            x=jnp.where(better, x, state.x),
            mask=jnp.where(better, mask, state.mask),
            curvature=state.curvature,
            damping=jnp.where(better, state.damping, state.damping * DAMPING),
            # A NaN is kept, so that the solve ends as NONFINITE.
            loss=jnp.where(better | jnp.isnan(loss), loss, state.loss),
            swapped=jnp.where(better, swapped, 0).astype(x.dtype),
            rejected=jnp.where(better, 0, state.rejected + 1),
        )

    def _refit(self, problem: Problem, x: Array, mask: Array) -> tuple[Array, Array]:
        fixed = Problem(problem.loss, Support(mask))
        solver = Refit()
        start = solver.init(fixed, jnp.where(mask, x, 0))
        state = jax.lax.fori_loop(0, self.refit_steps, lambda _, s: solver.step(fixed, s), start)
        return state.x, state.objective

    def measure(self, problem: Problem, state: SpliceState) -> Measure:
        residual = jnp.where(state.rejected > 0, jnp.inf, state.swapped)
        residual = jnp.where(state.rejected >= self.patience, 0, residual)
        return Measure(residual, state.loss, jnp.full_like(state.loss, jnp.nan), {"damping": state.damping})


@pytree
class SplicePruning:
    """A first method's support, improved by exchanges of kept for pruned weights, then refitted.

    Attributes:
        first: the method that finds the first support.
        ridge: added to the unit diagonal of the scaled Hessian.
        rounds: limit on exchanges; 0 leaves the first support.
        rest: stop when an accepted exchange moves at most this fraction of the entries.
        inner_steps: conjugate-gradient steps after each exchange.
        refit_steps: conjugate-gradient steps at the end.
    """

    first: Any = Wanda()
    ridge: Any = 0.01
    rounds: int = static(default=20)
    rest: float = static(default=5e-5)
    inner_steps: int = static(default=5)
    refit_steps: int = static(default=10)

    def __call__(self, layer: ScaledLayer, pattern: Pattern) -> Pruned:
        loss = layer.ridged(self.ridge)
        first = self.first(layer, pattern)
        problem = Problem(loss, pattern)
        found = iterate(problem, Splice(self.inner_steps), first.values, tol=self.rest, max_steps=self.rounds)
        status = jnp.where(first.status == Status.NONFINITE, first.status, found.status)
        steps = first.steps + found.steps
        return refitted(loss, found.value, found.state.mask, self.refit_steps, done=steps, status=status)
