"""ADMM for a dense quadratic loss and any penalty with a prox, with a fixed or a rising rho.

    minimise over x    1/2 <x - c, H (x - c)> + penalty(x)

    b = c + (H + rho I)^-1 ( rho (x - c) - v )              # the quadratic's own minimiser
    x = prox( b + v / rho, 1 / rho )                        # the answer: it has the penalty's zeros
    v = v + rho (b - x)

One iteration costs one product with the inverse, which is computed once. For an indicator of sparse arrays, a small rho
lets the support move and a large one makes b and x agree, so rho starts small and rises.

Source: Boyd, Parikh, Chu, Peleato, Eckstein, "Distributed optimization and statistical learning via ADMM", 2011,
sections 3.4.1 and 9.1; for pruning, Boža, "Fast and effective weight update for pruned large language models", 2024,
and Meng, Behdin, Wang, Mazumder, "ALPS", NeurIPS 2024, with a rising rho.
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


def solve_rising(
    problem: Problem,
    start: Float[Array, "n ..."],
    *,
    rho: Float[Array, ""] | float,
    growth: Float[Array, ""] | float,
    levels: int,
    period: int,
    rest: float = -1.0,
) -> Solution:
    """`QuadraticAdmm` at `rho`, `rho * growth`, ..., each from the point and the dual where the one before ended.

    The loop over levels is unrolled: XLA on a CPU runs the inverse up to twice as fast outside a loop. A level runs at
    most `period` steps, and ends when at most the fraction `rest` of the entries entered or left the support (negative:
    never). The answer is the last level's solution, with the steps of all.

    Example:
        >>> from sparseopt.core.solvers.rising_admm import solve_rising
        >>> problem = so.Problem(so.Quadratic(jnp.eye(3), jnp.array([3.0, 0.1, -2.0])), so.TopK(2))
        >>> found = solve_rising(problem, problem.loss.center, rho=0.1, growth=2.0, levels=3, period=4)
        >>> np.float64(found.value).round(3).tolist()
        [3.0, 0.0, -2.0]
    """
    first: Any = start
    steps = jnp.zeros((), jnp.int32)
    for level in range(levels):
        solver = QuadraticAdmm(rho * growth**level, watch=rest >= 0)
        found = iterate(problem, solver, first, tol=rest, max_steps=period)
        first, steps = Start(found.state.x, found.state.dual), steps + found.steps
    return dataclasses.replace(found, steps=steps)
