"""Floor 4: ADMM for a dense quadratic loss and any penalty with a prox, with a rising rho.

    minimise over x    1/2 <x - c, H (x - c)> + penalty(x)

    b = c + (H + rho I)^-1 ( rho (x - c) - v )              # the quadratic's own minimiser
    x = prox( b + v / rho, 1 / rho )                        # the answer: it has the penalty's zeros
    v = v + rho (b - x)

For an indicator of sparse arrays the problem is not convex: a small rho lets the support move, a large one makes
b and x agree. rho starts small and is multiplied every few steps. One iteration costs one product with the inverse
of `H + rho I`; the inverse is made anew at every rho, by products alone (see `core.dense`).

Source: Boyd, Parikh, Chu, Peleato, Eckstein, "Distributed optimization and statistical learning via ADMM", 2011,
sections 3.4.1 and 9.1; for pruning, Boza, "Fast and effective weight update for pruned large language models",
2024, and Meng, Behdin, Wang, Mazumder, "ALPS", NeurIPS 2024, with a rising rho.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.dense import product, spd_inverse
from sparseopt.core.solve import Measure, Problem
from sparseopt.core.thresholds import count_each
from sparseopt.core.types import pytree, static


@pytree
class QuadraticAdmmState:
    """One state; `x` is the answer."""

    x: Any
    point: Any  # b + v / rho, where the prox was taken
    inverse: Any  # (H + rho I)^-1
    rho: Any
    count: Any
    objective: Any
    residual: Any

    @property
    def dual(self) -> Array:
        """The dual v: after the last two lines of a step, rho times what the prox took away."""
        return self.rho * (self.point - self.x)


@pytree
class QuadraticAdmm:
    """ADMM with a rising rho as a solver for `solve`.

    The residual is the share of entries that entered or left the support in the last step. The objective is the
    loss at b plus the penalty at x: both known without a further product, and equal to F(x) where b = x. Taking
    them costs a third of a step where the prox is a selection.

    Attributes:
        rho: the first; a Hessian of unit diagonal is taken for granted, so scale the problem.
        growth: what rho is multiplied with.
        period: steps at one rho.
        watch: False leaves residual and objective out, and they stay as they were at the start: for a fixed number
            of steps.
    """

    rho: Any = 0.1
    growth: Any = 2.0
    period: int = static(default=4)
    watch: bool = static(default=True)

    def init(self, problem: Problem, x0: Float[Array, "n ..."]) -> QuadraticAdmmState:
        """V = 0 and the first inverse."""
        rho = jnp.asarray(self.rho, x0.dtype)
        far = jnp.full((), jnp.inf, x0.dtype)
        objective = problem.loss.value(x0) + problem.penalty.value(x0) if self.watch else jnp.zeros((), x0.dtype)
        inverse = _shifted_inverse(problem, rho)
        return QuadraticAdmmState(x0, x0, inverse, rho, jnp.zeros((), jnp.int32), objective, far)

    def step(self, problem: Problem, state: QuadraticAdmmState) -> QuadraticAdmmState:
        """One iteration; every `period`-th makes a new inverse first."""
        center = problem.loss.center
        due = (state.count > 0) & (state.count % self.period == 0)
        rho = jnp.where(due, state.rho * self.growth, state.rho).astype(state.x.dtype)
        inverse = jax.lax.cond(due, lambda: _shifted_inverse(problem, rho), lambda: state.inverse)
        right = rho * (state.x - center) - state.dual
        moved = product(inverse, right)
        point = center + moved + state.dual / rho
        x = problem.penalty.prox(point, 1 / rho)
        objective, residual = state.objective, state.residual
        if self.watch:
            # (H + rho I) (b - c) = right, so the loss at b needs no product.
            objective = 0.5 * jnp.sum(moved * (right - rho * moved)) + problem.penalty.value(x)
            entered, left = count_each((x != 0) & (state.x == 0), (x == 0) & (state.x != 0))
            residual = ((entered + left) / x.size).astype(x.dtype)
        return QuadraticAdmmState(x, point, inverse, rho, state.count + 1, objective, residual)

    def measure(self, problem: Problem, state: QuadraticAdmmState) -> Measure:
        """How much of the support moved; there is no gap."""
        del problem
        return Measure(state.residual, state.objective, jnp.full_like(state.objective, jnp.nan), {"rho": state.rho})

    def extract(self, problem: Problem, state: QuadraticAdmmState) -> Float[Array, "n ..."]:
        """X, with the penalty's zeros."""
        del problem
        return state.x


def _shifted_inverse(problem: Problem, rho: Array) -> Array:
    hessian = problem.loss.hessian
    return spd_inverse(hessian + rho * jnp.eye(hessian.shape[0], dtype=hessian.dtype))
