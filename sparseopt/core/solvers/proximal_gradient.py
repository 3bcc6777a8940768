"""The plain proximal gradient step, `x <- prox(x - step * gradient(x))`.

With L0 it is iterative hard thresholding (Blumensath and Davies, 2008), with L1 ISTA, with `Support` the
projected gradient refit of the mAIHT paper.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.base.types import pytree, static
from sparseopt.core.losses.quadratic import safe_step, with_image
from sparseopt.core.penalties.protocols import cold_memory, prox_from
from sparseopt.core.problem.problem import Problem, ProxSolver, needs, stationarity, steepness


@pytree
class ProximalGradientState:
    """The point, its gradient step `u = x - step * gradient(x)`, and the measures there."""

    x: Any
    u: Any
    step_size: Any
    scale: Any  # of the residual
    objective: Any
    residual: Any
    prox_memory: Any  # what the next prox starts from, if the penalty has an `IterativeProx`


@pytree
class ProximalGradient(ProxSolver):
    """Proximal gradient descent as a solver for `solve`; one product with H per step.

    F decreases by at least `(1/(2 step) - L/2) ||x_new - x||²` a step when `step < 1/L`.
    The residual is `||x_new - x|| / step` over the length of the gradient at 0.

    Attributes:
        step_size: below `1 / lambda_max(H)`; None uses `0.97` over a safe bound on it.
        seed: for the random start of the eigenvalue bound.
    """

    step_size: Any = None
    seed: int = static(default=0)

    def refuses(self, problem: Problem) -> str | None:
        return needs(self, problem, loss="value gradient" + (" hessian" if self.step_size is None else ""))

    def init(self, problem: Problem, start: Float[Array, "n ..."]) -> ProximalGradientState:
        step = safe_step(problem.loss.hessian, self.seed) if self.step_size is None else self.step_size
        memory, scale = cold_memory(problem.penalty, start), steepness(problem.loss, start)
        far = jnp.full((), jnp.inf, start.dtype)
        return self._at(problem, start, jnp.asarray(step, start.dtype), scale, far, memory)

    def step(self, problem: Problem, state: ProximalGradientState) -> ProximalGradientState:
        step, scale = state.step_size, state.scale
        x, memory = prox_from(problem.penalty, state.u, step, state.prox_memory)
        return self._at(problem, x, step, scale, stationarity(x, state.x, step, scale), memory)

    def _at(
        self, problem: Problem, x: Array, step: Array, scale: Array, residual: Array, memory: Any
    ) -> ProximalGradientState:
        loss = with_image(problem.loss)
        image = loss.image(x)
        objective = loss.value_at(x, image) + problem.penalty.value(x)
        u = x - step * loss.gradient_at(x, image)
        return ProximalGradientState(x, u, step, scale, objective, residual, memory)
