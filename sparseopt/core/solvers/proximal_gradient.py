"""The plain proximal gradient step, `x <- prox(x - step * gradient(x))`.

With L0 it is iterative hard thresholding (Blumensath and Davies, 2008), with L1 ISTA, with `Support` the
projected gradient refit of the mAIHT paper.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.base.types import pytree, static
from sparseopt.core.losses.quadratic import safe_step
from sparseopt.core.penalties.protocols import cold_memory, prox_from
from sparseopt.core.problem.problem import Problem, ProxSolver, needs, relative_change


@pytree
class ProximalGradientState:
    """The point, its gradient step `u = x - step * gradient(x)`, and the measures there."""

    x: Any
    u: Any
    step_size: Any
    objective: Any
    residual: Any
    prox_memory: Any  # what the next prox starts from, if the penalty has an `IterativeProx`


@pytree
class ProximalGradient(ProxSolver):
    """Proximal gradient descent as a solver for `solve`; one product with H per step.

    F decreases by at least `(1/(2 step) - L/2) ||x_new - x||²` a step when `step < 1/L`.
    The residual is the relative length of the last step.

    Attributes:
        step_size: below `1 / lambda_max(H)`; None uses `0.97` over a safe bound on it.
        seed: for the random start of the eigenvalue bound.
    """

    step_size: Any = None
    seed: int = static(default=0)

    def refuses(self, problem: Problem) -> str | None:
        return needs(self, problem, loss="gradient value_at" + (" hessian" if self.step_size is None else ""))

    def init(self, problem: Problem, start: Float[Array, "n ..."]) -> ProximalGradientState:
        step = safe_step(problem.loss.hessian, self.seed) if self.step_size is None else self.step_size
        memory = cold_memory(problem.penalty, start)
        return self._at(problem, start, jnp.asarray(step, start.dtype), jnp.full((), jnp.inf, start.dtype), memory)

    def step(self, problem: Problem, state: ProximalGradientState) -> ProximalGradientState:
        x, memory = prox_from(problem.penalty, state.u, state.step_size, state.prox_memory)
        return self._at(problem, x, state.step_size, relative_change(x, state.x), memory)

    def _at(self, problem: Problem, x: Array, step: Array, residual: Array, memory: Any) -> ProximalGradientState:
        gradient = problem.loss.gradient(x)
        objective = problem.loss.value_at(x, gradient) + problem.penalty.value(x)
        return ProximalGradientState(x, x - step * gradient, step, objective, residual, memory)
