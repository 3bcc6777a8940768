"""Conjugate gradients on a fixed support.

    minimise over x    1/2 <x - c, H (x - c)>    subject to x = 0 off the mask of `Support(mask)`

Every column is a separate problem with its own step sizes; the columns share only the product with H.

Source: Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", 1952.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.base.dense import product
from sparseopt.core.base.types import pytree
from sparseopt.core.penalties.sets import Support
from sparseopt.core.problem.problem import Measure, PlainSolver, Problem, needs


@pytree
class RefitState:
    """The iterate, the masked residual (the negative gradient), the direction, squared residuals per column."""

    x: Any
    residual: Any
    direction: Any
    squares: Any  # [columns]
    first_squares: Any
    objective: Any


@pytree
class Refit(PlainSolver):
    """CG refit as a solver for `solve`: one product with H per step; the loss never increases.

    The residual is `||masked gradient|| / ||masked gradient at the start||` over all columns. A start with entries off
    the mask is projected first. Diagonal scaling is left to the caller.
    """

    def refuses(self, problem: Problem) -> str | None:
        if (reason := needs(self, problem, loss="hessian gradient value_at")) or isinstance(problem.penalty, Support):
            return reason
        return (
            f"Refit solves on a fixed support and needs a Support as its penalty, given "
            f"{type(problem.penalty).__name__}; use sparseopt.Support(mask), or Maiht or ProximalGradient for another "
            "penalty"
        )

    def init(self, problem: Problem, start: Float[Array, "n ..."]) -> RefitState:
        x = problem.penalty.prox(start, 1.0)
        gradient = problem.loss.gradient(x)
        residual = problem.penalty.prox(-gradient, 1.0)
        squares = jnp.sum(residual**2, axis=0)
        objective = problem.loss.value_at(x, gradient)
        return RefitState(x, residual, residual, squares, jnp.sum(squares), objective)

    def step(self, problem: Problem, state: RefitState) -> RefitState:
        image = product(problem.loss.hessian, state.direction)
        curvature = jnp.sum(state.direction * image, axis=0)
        # A solved column, or a direction in the null space of H, does not move.
        length = jnp.where(curvature > 0, state.squares / jnp.where(curvature > 0, curvature, 1), 0)
        residual = problem.penalty.prox(state.residual - length * image, 1.0)
        squares = jnp.sum(residual**2, axis=0)
        ratio = jnp.where(state.squares > 0, squares / jnp.where(state.squares > 0, state.squares, 1), 0)
        return RefitState(
            x=state.x + length * state.direction,
            residual=residual,
            direction=residual + ratio * state.direction,
            squares=squares,
            first_squares=state.first_squares,
            # With the exact line search each step lowers the loss by half its length times the squared residual.
            objective=state.objective - 0.5 * jnp.sum(length * state.squares),
        )

    def measure(self, problem: Problem, state: RefitState) -> Measure:
        relative = jnp.sqrt(jnp.sum(state.squares) / jnp.where(state.first_squares > 0, state.first_squares, 1))
        return Measure(relative, state.objective, jnp.full_like(state.objective, jnp.nan))
