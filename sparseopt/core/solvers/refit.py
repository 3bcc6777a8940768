"""Floor 4: conjugate gradients on a fixed support.

    minimise over x    1/2 <x - c, H (x - c)>    subject to x = 0 off the mask of `Support(mask)`

Every column is a problem of its own with its own step sizes; the columns share only the product with H.

Source: Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", 1952, on the
masked operator `M H M`, which is symmetric positive semidefinite.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.constraints import Support
from sparseopt.core.losses import HIGHEST
from sparseopt.core.problem import Measure, Problem, needs
from sparseopt.core.types import pytree


@pytree
class RefitState:
    """The iterate, the masked residual (the negative gradient), the direction, squared residuals a column."""

    x: Any
    residual: Any
    direction: Any
    squares: Any  # [columns]
    first_squares: Any
    objective: Any


@pytree
class Refit:
    """CG refit as a solver for `solve`; one product with H a step, the loss never increases.

    The residual is `||masked gradient|| / ||masked gradient at the start||` over all columns. A start with
    entries off the mask is projected onto it first. Any diagonal scaling is left to the caller.
    """

    def refuses(self, problem: Problem) -> str | None:
        """An operator, a loss that is not quadratic, and every penalty but a `Support`."""
        return needs(self, problem, loss="hessian gradient value_at") or self._refuses_penalty(problem.penalty)

    def _refuses_penalty(self, penalty: Any) -> str | None:
        if isinstance(penalty, Support):
            return None
        return (
            f"Refit solves on a fixed support and needs a Support as its penalty, given {type(penalty).__name__}; use "
            "sparseopt.Support(mask), or Maiht or ProximalGradient for another penalty"
        )

    def init(self, problem: Problem, x0: Float[Array, "n ..."]) -> RefitState:
        """One product at the masked start."""
        x = problem.penalty.prox(x0, 1.0)
        gradient = problem.loss.gradient(x)
        residual = problem.penalty.prox(-gradient, 1.0)
        squares = jnp.sum(residual**2, axis=0)
        objective = problem.loss.value_at(x, gradient)
        return RefitState(x, residual, residual, squares, jnp.sum(squares), objective)

    def step(self, problem: Problem, state: RefitState) -> RefitState:
        """One CG step in every column that still has a residual."""
        product = jnp.matmul(problem.loss.hessian, state.direction, precision=HIGHEST)
        curvature = jnp.sum(state.direction * product, axis=0)
        # A column that is solved, or a direction in the null space of H, moves no further.
        length = jnp.where(curvature > 0, state.squares / jnp.where(curvature > 0, curvature, 1), 0)
        residual = problem.penalty.prox(state.residual - length * product, 1.0)
        squares = jnp.sum(residual**2, axis=0)
        ratio = jnp.where(state.squares > 0, squares / jnp.where(state.squares > 0, state.squares, 1), 0)
        return RefitState(
            x=state.x + length * state.direction,
            residual=residual,
            direction=residual + ratio * state.direction,
            squares=squares,
            first_squares=state.first_squares,
            # Exact line search: each step lowers the loss by half its length times the squared residual.
            objective=state.objective - 0.5 * jnp.sum(length * state.squares),
        )

    def measure(self, problem: Problem, state: RefitState) -> Measure:
        """Relative masked gradient, and the loss by its exact decrements."""
        scale = jnp.where(state.first_squares > 0, state.first_squares, 1)
        relative = jnp.sqrt(jnp.sum(state.squares) / scale)
        return Measure(relative, state.objective, jnp.full_like(state.objective, jnp.nan))

    def extract(self, problem: Problem, state: RefitState) -> Float[Array, "n ..."]:
        """The refitted array, exactly zero off the mask."""
        return state.x
