"""The split ADMM for any convex loss of the nodes, with a second copy of x.

    minimise over x    loss(x) + penalty(Ψ Δ x),        loss(x) = sum_j w_j f(x_j; y_j)

The iteration of `admm.py`, with the loss of x as one more term in place of the square: loss and penalty enter only
through their proxes. The rho of the loss is sigma, its metrics are `S = 1 / M` and `C = M`, and

    x  = (sigma M + rho Δᵀ C Δ)^-1 ( what pulls at x )

With a conjugate the iteration restarts from its own average, when the gap of the better of average and iterate is a
fifth of the gap at the last restart, or after a third of all steps. For absolute losses, whose iterates otherwise
spiral around the answer, this saves two thirds of the steps or more.

Source: as `admm.py`; for the restarts, Applegate, Hinder, Lu and Lubin, "Faster first-order primal-dual methods for
linear programming using restarts and sharpness", 2023.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sparseopt.core.base.sums import relative, rms
from sparseopt.core.base.types import pytree
from sparseopt.core.operators.maps import Identity
from sparseopt.core.penalties.protocols import has_conjugate
from sparseopt.core.problem.certify import judge
from sparseopt.core.problem.problem import Measure, Problem, Start
from sparseopt.core.solvers.admm import (
    BALANCE,
    LARGEST_FACTOR,
    MOVING,
    Admm,
    AdmmState,
    Mean,
    Moving,
    Term,
    limit,
    restart,
    step_lengths,
)

# The iteration restarts at this fraction of the gap at the last restart, or this fraction of all steps after it.
RESTART_GAP = 0.2
RESTART_LENGTH = 0.36


@pytree
class LossAdmm(Admm):
    """The split ADMM for a `DataLoss`, as a solver for `solve`; `problem.operator` is a `Split`.

    With a conjugate the residual is the relative duality gap, never below the relative suboptimality
    `(P(x) - P*) / P*`. For any other penalty it is a stationarity residual, the largest of
    `||p' + ΔᵀΨᵀ g'|| / ||p'||`, `||x - copy|| / ||x||` and `||Ψ Δ x - prox|| / ||Ψ Δ x||`; the gap is NaN.

    rho and sigma change as rho does in `Admm`, which describes the other attributes.

    Attributes:
        sigma: the first value, if the `Start` has none; about the mean curvature of the loss.
        anchor: an `Anchor` for a penalty with a conjugate; None otherwise.
        metric: M, `[*nodes]` or with channels, with mean 1; None for ones, which the cosine x-step needs.
    """

    sigma: Any = dataclasses.field(kw_only=True)
    anchor: Any = dataclasses.field(kw_only=True)
    metric: Any = dataclasses.field(default=None, kw_only=True)

    def refuses(self, problem: Problem) -> str | None:
        return self._refuses_split(problem, "value prox")

    def _terms(self, problem: Problem) -> tuple[Term, ...]:
        metric, same = 1.0 if self.metric is None else self.metric, Identity(problem.loss.target.shape)
        return Term(problem.loss, same, same, 1 / metric, metric), *super()._terms(problem)

    def _first_duals(self, problem: Problem, start: Start) -> tuple[tuple[Array, Any], ...]:
        pulled = -problem.operator.rmv(start.dual)
        return (pulled, self.sigma if start.sigma is None else start.sigma), *super()._first_duals(problem, start)

    def _x_step(self, problem: Problem, now: Moving, pulled: Array) -> Array:
        sigma, rho = (block.rho for block in now.blocks)
        return self.node_solve.solve(self.metric, problem.operator, pulled / sigma, rho / sigma, now.x)

    def _begin(self, problem: Problem, start: Start) -> AdmmState:
        state = super()._begin(problem, start)
        if not has_conjugate(problem.penalty):
            return state
        nothing = jax.tree.map(jnp.zeros_like, state.now)
        mean = Mean(nothing, jnp.zeros((), jnp.int32), jnp.full((), jnp.inf, state.now.x.dtype))
        return dataclasses.replace(state, mean=mean)

    def _certify(self, problem: Problem, state: AdmmState) -> tuple[AdmmState, tuple[Array, Array, Array, Array]]:
        """As `Admm`, with the state restarted if a restart is due."""
        far = jnp.finfo(state.now.x.dtype).max
        if not has_conjugate(problem.penalty):
            residual, objective = self._stationarity(problem, state)
            floor = jnp.full_like(residual, jnp.finfo(residual.dtype).eps)
            return state, (residual, objective, jnp.full_like(residual, jnp.nan), floor)
        now, mean = state.now, _mean(state)
        # A loop: the program is compiled once, and holds one set of rows at a time.
        points = jnp.stack([self._within(problem, x) for x in (now.x, mean.x)])
        duals = jnp.stack([now.blocks[-1].candidate, mean.blocks[-1].candidate])
        objectives, gaps = jax.lax.map(lambda pair: judge(problem, pair[0], pair[1], self.anchor), (points, duals))
        least = jnp.min(gaps)
        due = (least <= RESTART_GAP * state.mean.restart_gap) | (state.mean.length >= RESTART_LENGTH * state.count)
        take = due & (gaps[1] < gaps[0])
        # e^x may overflow early in a solve, far from the answer; that is no failure.
        objective = jnp.minimum(jnp.where(take, objectives[1], objectives[0]), far)
        gap = jnp.where(take, gaps[1], gaps[0])
        state = dataclasses.replace(
            state,
            now=jax.tree.map(lambda a, b: jnp.where(take, a, b), mean, now),
            mean=restart(state.mean, due, least),
        )
        residual, floor = gap, self._floor(state, objective)
        if now.blocks[-1].prox is not None:
            # The rows of x may lie slightly outside a set.
            stationarity, at_copies = self._stationarity(problem, state)
            inside = jnp.isfinite(gap) | (objective < far)
            residual, objective = jnp.where(inside, gap, stationarity), jnp.where(inside, objective, at_copies)
            gap = jnp.where(inside, gap, jnp.nan)
        return state, (residual, objective, gap, floor)

    def _stationarity(self, problem: Problem, state: AdmmState) -> tuple[Array, Array]:
        x, split, (copy, rows) = state.now.x, problem.operator, state.now.blocks
        found = split.mv(x)
        apart = jnp.maximum(relative(x - copy.prox, x), relative(found - rows.prox, found))
        balance = relative(copy.candidate + split.rmv(rows.candidate), copy.candidate)
        objective = jnp.minimum(problem.loss.value(x) + problem.penalty.value(rows.prox), jnp.finfo(x.dtype).max)
        return jnp.maximum(balance, apart), objective

    def _choose_rho(self, problem: Problem, state: AdmmState, before: Moving) -> tuple[tuple[Array, ...], Array]:
        def motion(term: Term, new: Any, old: Any) -> Array:
            turned, shifted = new.dual - old.dual, state.now.inner(new) - before.inner(old)
            dual_length, primal_length = step_lengths(term, turned, shifted)
            return jnp.sqrt(dual_length / primal_length)

        parts = zip(self._terms(problem), state.now.blocks, before.blocks, strict=True)
        of_loss, of_rows = (motion(*part) for part in parts)
        (copy, rows), early = state.now.blocks, state.count < MOVING
        metric = jnp.ones((), of_rows.dtype) if self.metric is None else self.metric
        apart = rms(metric, copy.candidate / (metric * copy.rho))
        distance = BALANCE * rms(problem.operator.row_scale, rows.candidate) / apart
        rho_factor = limit(jnp.where(early, distance, of_rows) / rows.rho, ~early, problem.penalty)
        sigma_factor = jnp.where(early, 1, of_loss / copy.rho)
        return (jnp.clip(sigma_factor, 1 / LARGEST_FACTOR, LARGEST_FACTOR), rho_factor), of_rows

    def measure(self, problem: Problem, state: AdmmState) -> Measure:
        found = super().measure(problem, state)
        return found._replace(extra={**found.extra, "sigma": state.now.blocks[0].rho})

    def duals(self, problem: Problem, state: AdmmState) -> tuple[Array, Array]:
        return state.now.blocks[0].candidate, state.candidate


def _mean(state: AdmmState) -> Moving:
    """The mean of the iterates, at the present rho."""
    found = jax.tree.map(lambda s: s / state.mean.length, state.mean.sums)
    pairs = zip(found.blocks, state.now.blocks, strict=True)
    return found._replace(blocks=tuple(block._replace(rho=now.rho) for block, now in pairs))
