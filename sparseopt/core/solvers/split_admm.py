"""Floor 4: the split ADMM for few unknowns: the primal-dual method with the exact x-step, see `primal_dual.py`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sparseopt.core.dense import product, spd_inverse
from sparseopt.core.fidelity import total
from sparseopt.core.problem import Problem
from sparseopt.core.solvers.primal_dual import Point, PrimalDual, PrimalDualState, normal
from sparseopt.core.types import pytree

# Up to this many unknowns the exact step (one inverse, then a product with it every step) is possible.
CHEAP = 3000


@pytree
class SplitAdmm(PrimalDual):
    """The split ADMM for `solve`: `PrimalDual` with the exact x-step, for problems of up to 3,000 unknowns.

    It inverts `Aᵀ A / ||A||² + Kᵀ K / ||K||²` once, by products alone, and multiplies with the inverse every step.
    """

    def refuses(self, problem: Problem) -> str | None:
        """What `PrimalDual` refuses, and problems that are too large."""
        if reason := super().refuses(problem):
            return reason
        size = math.prod(problem.loss.start_shape())
        if size <= CHEAP:
            return None
        return (
            f"SplitAdmm inverts a matrix of all unknowns and takes up to {CHEAP:,}, given {size:,}; use PrimalDual, "
            "whose steps are products with the operator"
        )

    def _metric(self, problem: Problem, x: Array, scales: tuple[Array, Array]) -> Array:
        """The inverse of `K~ᵀ S K~`, with a ridge at the rounding level."""

        def column(unit: Array) -> Array:
            return normal(problem, scales, unit.reshape(x.shape)).reshape(-1)

        gram = jax.vmap(column)(jnp.eye(x.size, dtype=x.dtype))
        ridge = 10 * jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(jnp.diag(gram))) * x.size**0.5
        return spd_inverse((gram + gram.T) / 2 + ridge * jnp.eye(x.size, dtype=x.dtype))

    def _moved(self, state: PrimalDualState, pulled: Array) -> Array:
        return product(state.metric, pulled.reshape(-1)).reshape(pulled.shape)

    def _precondition(self, state: PrimalDualState) -> Any:
        return lambda e: self._moved(state, e)

    def _length(self, state: PrimalDualState, apart: Point) -> Array:
        return state.scales[0] * total(apart.images[0] ** 2) + state.scales[1] * total(apart.images[1] ** 2)
