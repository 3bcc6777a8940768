"""ADMM for a dense quadratic loss and any penalty with a prox, with a fixed or a rising rho, and pruning with it.

    minimise over x    1/2 <x - c, H (x - c)> + penalty(x)

    b = c + (H + rho I)^-1 ( rho (x - c) - v )              # the quadratic's own minimiser
    x = prox( b + v / rho, 1 / rho )                        # the answer: it has the penalty's zeros
    v = v + rho (b - x)

One iteration costs one product with the inverse, which is computed once. For a pattern, a small rho lets the support
move and a large one makes b and x agree, so rho starts small and rises.

Source: Boyd, Parikh, Chu, Peleato, Eckstein, "Distributed optimization and statistical learning via ADMM", 2011,
sections 3.4.1 and 9.1; for pruning, Boža, "Fast and effective weight update for pruned large language models", 2024,
and Meng, Behdin, Wang, Mazumder, "ALPS: improved optimization for highly sparse one-shot pruning", NeurIPS 2024.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.base.dense import product, spd_inverse
from sparseopt.core.base.thresholds import support_change
from sparseopt.core.base.types import pytree, static
from sparseopt.core.problem.iterate import iterate
from sparseopt.core.problem.problem import PlainSolver, Problem, Solution, Start, needs
from sparseopt.layers.patterns import Pattern
from sparseopt.layers.problem import Pruned, ScaledLayer, refitted


@pytree
class QuadraticAdmmState:
    """One state; `x` is the answer."""

    x: Any
    point: Any  # b + v / rho, where the prox was evaluated
    rho: Any
    inverse: Any  # (H + rho I)^-1
    objective: Any
    residual: Any

    @property
    def dual(self) -> Array:
        """The dual v: after the last two lines of a step, rho times what the prox removed."""
        return self.rho * (self.point - self.x)


@pytree
class QuadraticAdmm(PlainSolver):
    """ADMM with a fixed rho as a solver for `solve`, from an array, with a dual of 0, or from a `Start` with the dual.

    The residual is the fraction of entries that entered or left the support in the last step. The objective is the loss
    at b plus the penalty at x, which needs no further product and equals F(x) if b = x. Together they cost a third of a
    step if the prox is a selection.

    Attributes:
        rho: for a Hessian with a unit diagonal; scale the problem accordingly.
        watch: False computes neither residual nor objective, for a fixed number of steps.
    """

    rho: Any = 0.1
    watch: bool = static(default=True)

    def refuses(self, problem: Problem) -> str | None:
        return needs(self, problem, loss="hessian center value")

    def init(self, problem: Problem, start: Float[Array, "n ..."] | Start) -> QuadraticAdmmState:
        x, dual = (start.x, start.dual) if isinstance(start, Start) else (start, None)
        rho, hessian = jnp.asarray(self.rho, x.dtype), problem.loss.hessian
        point = x if dual is None else x + dual / rho
        inverse = spd_inverse(hessian + rho * jnp.eye(hessian.shape[0], dtype=hessian.dtype))
        objective = problem.loss.value(x) + problem.penalty.value(x) if self.watch else jnp.zeros((), x.dtype)
        return QuadraticAdmmState(x, point, rho, inverse, objective, jnp.full((), jnp.inf, x.dtype))

    def step(self, problem: Problem, state: QuadraticAdmmState) -> QuadraticAdmmState:
        center, rho = problem.loss.center, state.rho
        right = rho * (state.x - center) - state.dual
        moved = product(state.inverse, right)
        point = center + moved + state.dual / rho
        x = problem.penalty.prox(point, 1 / rho)
        objective, residual = state.objective, state.residual
        if self.watch:
            # (H + rho I) (b - c) = right, so the loss at b needs no product.
            objective = 0.5 * jnp.sum(moved * (right - rho * moved)) + problem.penalty.value(x)
            residual = support_change(x, state.x)
        return dataclasses.replace(state, x=x, point=point, objective=objective, residual=residual)


@pytree
class AdmmPruning:
    """`QuadraticAdmm` at `rho`, `rho * growth`, ... with the projection onto the pattern, then a refit.

    Attributes:
        ridge: added to the unit diagonal of the scaled Hessian.
        rho: the first value; `growth` multiplies it from one level to the next.
        growth: see `rho`.
        levels: number of values of rho.
        period: limit on ADMM iterations at one level.
        rest: a level ends if at most this fraction of the entries entered or left the support; negative: never.
        refit_steps: conjugate-gradient steps at the end.
    """

    ridge: Any = 0.01
    rho: Any = 0.1
    growth: Any = 2.0
    levels: int = static(default=5)
    period: int = static(default=4)
    rest: float = static(default=-1.0)
    refit_steps: int = static(default=10)

    def __call__(self, layer: ScaledLayer, pattern: Pattern) -> Pruned:
        loss = layer.ridged(self.ridge)
        found = self.rising(Problem(loss, pattern), layer.center)
        # The set may allow more entries than are non-zero: the mask, not the values, has the exact count.
        mask = pattern.mask(jnp.abs(found.value))
        return refitted(loss, found.value, mask, self.refit_steps, done=found.steps, status=found.status)

    def rising(self, problem: Problem, start: Float[Array, "n ..."]) -> Solution:
        """The last level's solution, with the steps of all; a level starts from the point and the dual of the last.

        The loop over levels is unrolled: XLA on a CPU runs the inverse up to twice as fast outside a loop.
        """
        first: Any = start
        steps = jnp.zeros((), jnp.int32)
        for level in range(self.levels):
            solver = QuadraticAdmm(self.rho * self.growth**level, watch=self.rest >= 0)
            found = iterate(problem, solver, first, tol=self.rest, max_steps=self.period)
            first, steps = Start(found.state.x, found.state.dual), steps + found.steps
        return dataclasses.replace(found, steps=steps)
