"""ADMM with a rising rho as a pruning method."""

from typing import Any

import jax.numpy as jnp

from sparseopt.core.base.types import pytree, static
from sparseopt.core.problem.problem import Problem
from sparseopt.core.solvers.rising_admm import solve_rising
from sparseopt.layers.patterns import Pattern
from sparseopt.layers.problem import Pruned, ScaledLayer, refitted


@pytree
class AdmmPruning:
    """ADMM with the projection onto the pattern as prox, then a refit of the kept weights.

    Attributes:
        ridge: added to the unit diagonal of the scaled Hessian.
        rho: the first value; `growth` multiplies it from one level to the next.
        growth: see `rho`.
        levels: number of values of rho.
        period: limit on ADMM iterations at one level.
        rest: as in `solve_rising`.
        refit_steps: conjugate-gradient steps at the end.

    Source: Boža, "Fast and effective weight update for pruned large language models", 2024; Meng, Behdin, Wang,
    Mazumder, "ALPS: improved optimization for highly sparse one-shot pruning", NeurIPS 2024.
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
        found = solve_rising(
            Problem(loss, pattern),
            layer.center,
            rho=self.rho,
            growth=self.growth,
            levels=self.levels,
            period=self.period,
            rest=self.rest,
        )
        # The set may allow more entries than are non-zero: the mask, not the values, has the exact count.
        mask = pattern.mask(jnp.abs(found.value))
        return refitted(loss, found.value, mask, self.refit_steps, done=found.steps, status=found.status)
