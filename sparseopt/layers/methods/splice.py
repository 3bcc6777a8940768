"""Splicing as a pruning method, from any other method's support."""

from typing import Any

import jax.numpy as jnp

from sparseopt.core.base.types import pytree, static
from sparseopt.core.problem.iterate import iterate
from sparseopt.core.problem.problem import Problem, Status
from sparseopt.core.solvers.splice import Splice
from sparseopt.layers.methods.scores import Wanda
from sparseopt.layers.patterns import Pattern
from sparseopt.layers.problem import Pruned, ScaledLayer, refitted


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

    Source: as in `sparseopt.core.solvers.splice`.
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
