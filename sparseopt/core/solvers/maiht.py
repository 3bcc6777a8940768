"""mAIHT, monotone accelerated iterative hard thresholding.

    minimise over x    F(x) = 1/2 <x - c, H (x - c)> + penalty(x)

with any penalty that has a prox; with L0 this is mAIHT, with L1 a monotone FISTA.

Source: Wen, Zuo, Pan, "An Efficient Pruner for Large Language Model with Theoretical Guarantee", ICML 2025,
algorithm 1; the three sequences come from Li and Lin, "Accelerated proximal gradient methods for nonconvex
programming", NeurIPS 2015, algorithm 1.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.base.thresholds import count_nonzero, support_change
from sparseopt.core.base.types import pytree, static
from sparseopt.core.losses.quadratic import safe_step
from sparseopt.core.problem.problem import PlainSolver, Problem, needs, stationarity, steepness


@pytree
class MaihtState:
    """One state; `u` is `x - step * gradient(x)`, all that later steps need of a sequence.

    The extrapolated point Y is an affine combination of X0, X1 and Z, and so is its `u`: Y costs no product with H.
    """

    x: Any  # X1, the answer
    u_previous: Any  # of X0
    u_current: Any  # of X1
    u_candidate: Any  # of Z
    loss: Any
    penalty: Any  # the problem's penalty at the current level
    step_size: Any
    scale: Any  # of the residual "change"
    momentum_previous: Any  # t0
    momentum: Any  # t1
    objective: Any
    residual: Any


@pytree
class Maiht(PlainSolver):
    """mAIHT as a solver for `solve`.

    Each iteration makes an accelerated candidate Z from the extrapolated point and a monitor V, the plain proximal step
    from X1. The better of the two is the next X1, so F never increases at a fixed level.

    Attributes:
        step_size: below `1 / lambda_max(H)`; None uses 0.97 over an upper bound on `lambda_max`.
        target_sparsity: None keeps the penalty's weight. A number makes the level adaptive, as in the paper: before
            every step `weight <- weight * (1 + target_sparsity - fraction of zeros in X1)`.
        monitor: "always" is the paper's iteration: V is the next X1 whenever it is better than Z; two products with H,
            or one if Z is known to be better. "on_increase" computes V only when Z fails to descend from X1: still
            monotone, and mostly one product.
        stop: "support" measures the fraction of entries that entered or left the support in the last step, "change" the
            length of the last step over `step_size`, over the length of the gradient at 0.
        seed: for the random start of the eigenvalue bound.
    """

    step_size: Any = None
    target_sparsity: Any = None
    monitor: Literal["always", "on_increase"] = static(default="on_increase")
    stop: Literal["support", "change"] = static(default="change")
    seed: int = static(default=0)

    def refuses(self, problem: Problem) -> str | None:
        level = "" if self.target_sparsity is None else " weight"
        return needs(self, problem, loss="hessian center gradient value_at", penalty="value prox" + level)

    def init(self, problem: Problem, start: Float[Array, "n ..."]) -> MaihtState:
        loss = problem.loss
        step = safe_step(loss.hessian, self.seed) if self.step_size is None else self.step_size
        step = jnp.asarray(step, start.dtype)
        # The usual start is the minimiser of the loss, where the product is zero.
        at_center = jnp.all(start == loss.center)
        gradient = jax.lax.cond(at_center, lambda: jnp.zeros_like(start), lambda: loss.gradient(start))
        value = loss.value_at(start, gradient)
        u = start - step * gradient
        one = jnp.ones((), start.dtype)
        penalty = jax.tree.map(jnp.asarray, problem.penalty)
        return MaihtState(
            x=start,
            u_previous=u,
            u_current=u,
            u_candidate=u,
            loss=value,
            penalty=penalty,
            step_size=step,
            scale=steepness(loss, start) if self.stop == "change" else one,
            momentum_previous=0 * one,
            momentum=one,
            objective=value + penalty.value(start),
            residual=jnp.full((), jnp.inf, start.dtype),
        )

    def _level(self, state: MaihtState) -> Any:
        """The penalty at the level of the next step."""
        if self.target_sparsity is None:
            return state.penalty
        sparsity = 1 - count_nonzero(state.x) / state.x.size
        weight = state.penalty.weight * (1 + self.target_sparsity - sparsity)
        return dataclasses.replace(state.penalty, weight=weight.astype(state.x.dtype))

    def step(self, problem: Problem, state: MaihtState) -> MaihtState:
        loss, step = problem.loss, state.step_size
        penalty = self._level(state)

        def evaluate(u: Array) -> tuple[Array, Array, Array, Array]:
            x = penalty.prox(u, step)
            gradient = loss.gradient(x)
            value = loss.value_at(x, gradient)
            return x, x - step * gradient, value, value + penalty.value(x)

        back = (state.momentum_previous - 1) / state.momentum
        towards = state.momentum_previous / state.momentum
        candidate = evaluate(
            (1 + back - towards) * state.u_current - back * state.u_previous + towards * state.u_candidate
        )

        def better_of_both() -> tuple[Array, Array, Array, Array]:
            monitor = evaluate(state.u_current)
            # A NaN would lose every comparison: it is kept, and ends the solve as NONFINITE.
            take = (candidate[3] <= monitor[3]) | jnp.isnan(candidate[3])
            return jax.tree.map(lambda z, v: jnp.where(take, z, v), candidate, monitor)

        if self.monitor == "always":
            # F(Z) - F(V) = <Z - V, gradient(Z)> - 1/2 <Z - V, H (Z - V)> + penalty(Z) - penalty(V): if the terms
            # without H are at most zero, Z is better and V needs no product.
            z, u, _, _ = candidate
            v = penalty.prox(state.u_current, step)
            settled = jnp.sum((z - v) * (z - u)) / step + penalty.value(z) - penalty.value(v) <= 0
        else:
            settled = candidate[3] <= state.loss + penalty.value(state.x)
        x, u, value, objective = jax.lax.cond(settled, lambda: candidate, better_of_both)
        return MaihtState(
            x=x,
            u_previous=state.u_current,
            u_current=u,
            u_candidate=candidate[1],
            loss=value,
            penalty=penalty,
            step_size=step,
            scale=state.scale,
            momentum_previous=state.momentum,
            momentum=(1 + jnp.sqrt(1 + 4 * state.momentum**2)) / 2,
            objective=objective,
            residual=support_change(x, state.x)
            if self.stop == "support"
            else stationarity(x, state.x, step, state.scale),
        )

    def solves(self, problem: Problem, state: MaihtState) -> Problem:
        """At the level that the solver chose: the problem's level times a constant factor."""
        if self.target_sparsity is None:
            return problem
        weight = jnp.asarray(problem.penalty.weight)
        ratio = jax.lax.stop_gradient(state.penalty.weight / jnp.where(weight == 0, 1, weight))
        factor = jnp.where(weight == 0, 1, ratio)
        return dataclasses.replace(problem, penalty=dataclasses.replace(problem.penalty, weight=weight * factor))
