"""Floor 4: ADMM for a dense quadratic loss and any penalty with a prox, and its continuation to a rising rho.

    minimise over x    1/2 <x - c, H (x - c)> + penalty(x)

    b = c + (H + rho I)^-1 ( rho (x - c) - v )              # the quadratic's own minimiser
    x = prox( b + v / rho, 1 / rho )                        # the answer: it has the penalty's zeros
    v = v + rho (b - x)

One iteration costs one product with the inverse of `H + rho I`, which is made once, by products alone (see
`core.dense`). For an indicator of sparse arrays the problem is not convex: a small rho lets the support move, a
large one makes b and x agree. So rho starts small and rises, and each rho starts where the one before ended.

Source: Boyd, Parikh, Chu, Peleato, Eckstein, "Distributed optimization and statistical learning via ADMM", 2011,
sections 3.4.1 and 9.1; for pruning, Boza, "Fast and effective weight update for pruned large language models",
2024, and Meng, Behdin, Wang, Mazumder, "ALPS", NeurIPS 2024, with a rising rho.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.dense import product, spd_inverse
from sparseopt.core.iterate import iterate
from sparseopt.core.problem import Measure, Problem, Solution, needs
from sparseopt.core.thresholds import count_each
from sparseopt.core.types import pytree, static


@pytree
class QuadraticAdmmState:
    """One state; `x` is the answer."""

    x: Any
    point: Any  # b + v / rho, where the prox was taken
    rho: Any
    inverse: Any  # (H + rho I)^-1
    objective: Any
    residual: Any

    @property
    def dual(self) -> Array:
        """The dual v: after the last two lines of a step, rho times what the prox took away."""
        return self.rho * (self.point - self.x)


@pytree
class DualStart:
    """Where an ADMM starts: the point and the dual, both of its shape."""

    x: Any
    dual: Any


@pytree
class QuadraticAdmm:
    """ADMM at one rho as a solver for `solve`; it starts at an array, with a dual of 0, or at a `DualStart`.

    The residual is the share of entries that entered or left the support in the last step. The objective is the
    loss at b plus the penalty at x: both known without a further product, and equal to F(x) where b = x. Taking
    them costs a third of a step where the prox is a selection.

    Attributes:
        rho: a Hessian of unit diagonal is taken for granted, so scale the problem.
        watch: False leaves residual and objective out, and they stay as they were at the start: for a fixed number
            of steps.
    """

    rho: Any = 0.1
    watch: bool = static(default=True)

    def refuses(self, problem: Problem) -> str | None:
        """An operator, a loss that is not quadratic, and a penalty without a prox."""
        return needs(self, problem, loss="hessian center value")

    def init(self, problem: Problem, x0: Float[Array, "n ..."] | DualStart) -> QuadraticAdmmState:
        """The inverse, and a point that stands for the dual."""
        x = x0.x if isinstance(x0, DualStart) else x0
        rho, hessian = jnp.asarray(self.rho, x.dtype), problem.loss.hessian
        point = x + x0.dual / rho if isinstance(x0, DualStart) else x
        inverse = spd_inverse(hessian + rho * jnp.eye(hessian.shape[0], dtype=hessian.dtype))
        objective = problem.loss.value(x) + problem.penalty.value(x) if self.watch else jnp.zeros((), x.dtype)
        return QuadraticAdmmState(x, point, rho, inverse, objective, jnp.full((), jnp.inf, x.dtype))

    def step(self, problem: Problem, state: QuadraticAdmmState) -> QuadraticAdmmState:
        """One iteration."""
        center, rho = problem.loss.center, state.rho
        right = rho * (state.x - center) - state.dual
        moved = product(state.inverse, right)
        point = center + moved + state.dual / rho
        x = problem.penalty.prox(point, 1 / rho)
        objective, residual = state.objective, state.residual
        if self.watch:
            # (H + rho I) (b - c) = right, so the loss at b needs no product.
            objective = 0.5 * jnp.sum(moved * (right - rho * moved)) + problem.penalty.value(x)
            entered, left = count_each((x != 0) & (state.x == 0), (x == 0) & (state.x != 0))
            residual = ((entered + left) / x.size).astype(x.dtype)
        return dataclasses.replace(state, x=x, point=point, objective=objective, residual=residual)

    def measure(self, problem: Problem, state: QuadraticAdmmState) -> Measure:
        """How much of the support moved; there is no gap."""
        del problem
        return Measure(state.residual, state.objective, jnp.full_like(state.objective, jnp.nan))

    def extract(self, problem: Problem, state: QuadraticAdmmState) -> Float[Array, "n ..."]:
        """X, with the penalty's zeros."""
        del problem
        return state.x


def solve_rising(
    problem: Problem,
    x0: Float[Array, "n ..."],
    *,
    rho: Float[Array, ""] | float,
    growth: Float[Array, ""] | float,
    levels: int,
    period: int,
    rest: float = -1.0,
) -> Solution:
    """`QuadraticAdmm` at `rho`, `rho * growth`, ..., each from the point and the dual where the one before ended.

    The levels are written out in the program: XLA on a CPU runs the inverse up to twice as fast outside of a loop.

    Args:
        problem: a `Quadratic` and a penalty.
        x0: the first point.
        rho: the first.
        growth: from one level to the next.
        levels: how many.
        period: steps at one level.
        rest: go on to the next level when at most this share of the entries changed sides in a step; negative: never.

    Returns:
        The last level's solution, with the steps of all.

    Example:
        >>> from sparseopt.core.solvers.quadratic_admm import solve_rising
        >>> problem = so.Problem(so.Quadratic(jnp.eye(3), jnp.array([3.0, 0.1, -2.0])), so.TopK(2))
        >>> found = solve_rising(problem, problem.loss.center, rho=0.1, growth=2.0, levels=3, period=4)
        >>> np.float64(found.value).round(3).tolist()
        [3.0, 0.0, -2.0]
    """
    start: Any = x0
    steps = jnp.zeros((), jnp.int32)
    for level in range(levels):
        solver = QuadraticAdmm(rho * growth**level, watch=rest >= 0)
        found = iterate(problem, solver, start, tol=rest, max_steps=period)
        start, steps = DualStart(found.state.x, found.state.dual), steps + found.steps
    return dataclasses.replace(found, steps=steps)
