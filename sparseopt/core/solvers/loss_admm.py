"""The split ADMM for any convex loss of the nodes, with a second copy of x.

    minimise over x    loss(x) + penalty(Ψ Δ x),        loss(x) = sum_j w_j f(x_j; y_j)

The iteration of `admm.py` for the stacked map `[I; Ψ Δ]`: loss and penalty enter only through their proxes, and the
x-step is that of the square loss. With z = Δ x, duals p of the loss and g of the penalty, memories c and d,
`t_j = sigma M_j`, `s_r = rho / S_r` and the relaxation r:

    v  = t (x - c) + p,            p' = v - t prox(v / t, 1 / t)          # a subgradient of the loss at its prox
    v  = s Ψ (z - d) + g,          g' = v - s prox(v / s, 1 / s)          # one of the penalty
    p, g relaxed as in `admm.py`
    x  = (T + rho Δᵀ C Δ)^-1 ( t (x + (1 - r) c) - p + Δᵀ ( rho C (z + (1 - r) d) - Ψᵀ g ) )
    c  = (1 - r) c + x_old - x,    d  = (1 - r) d + z_old - z

With a conjugate the iteration restarts from its own average, when the better of average and iterate has a fifth of the
gap at the last restart, or after a third of all steps. For absolute losses, whose iterates otherwise spiral around the
answer, this saves two thirds of the steps or more.

Source: as `admm.py`; for the restarts Applegate, Hinder, Lu and Lubin, "Faster first-order primal-dual methods for
linear programming using restarts and sharpness", 2023.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.base.sums import total
from sparseopt.core.base.types import pytree, static
from sparseopt.core.penalties.protocols import Norm, dual_step, has_conjugate
from sparseopt.core.problem.certify import judge
from sparseopt.core.problem.problem import Measure, Problem, Progress
from sparseopt.core.solvers.admm import (
    BALANCE,
    FIRST_CHANGE,
    LARGEST_FACTOR,
    MOVING,
    PATIENCE,
    ROUNDING_MARGIN,
    Check,
    limited,
    refuses_unsplit,
    relative,
    rms,
    scheduled,
)

MOST_CHANGES = 9
# The iteration restarts at this fraction of the gap at the last restart, or this fraction of all steps after it.
RESTART_GAP = 0.2
RESTART_LENGTH = 0.36


@pytree
class LossStart:
    """Where the solve starts: the point, the dual point (row shape), rho and sigma; None for the solver's defaults."""

    x: Any
    dual: Any
    rho: Any = None
    sigma: Any = None


class Iterate(NamedTuple):
    """An iterate, or an average of iterates."""

    x: Any
    inner: Any  # z = Δ x, or None where Δ is the identity
    loss_memory: Any  # c
    memory: Any  # d
    loss_dual: Any  # p, relaxed
    dual: Any  # g, relaxed
    loss_candidate: Any  # p'
    candidate: Any  # g'


@pytree
class LossAdmmState:
    """The state of `LossAdmm`."""

    now: Iterate
    copies: Any  # the last proxes of loss and penalty; None for a norm, which does not need them
    sums: Any  # the sum of iterates since the last restart; None without a conjugate
    length: Any  # their number
    restart_gap: Any  # the gap at the last restart
    sigma: Any
    rho: Any
    count: Any
    next_change: Any
    check: Any

    @property
    def candidate(self) -> Any:
        """The dual point of the certificate, for a warm start."""
        return self.now.candidate


@pytree
class LossAdmm:
    """The split ADMM for a `DataLoss`, as a solver for `solve`; `problem.operator` is a `Split`.

    With a conjugate the residual is the relative duality gap, never below the relative suboptimality
    `(P(x) - P*) / P*`. For any other penalty it is a stationarity residual, the largest of
    `||p' + ΔᵀΨᵀ g'|| / ||p'||`, `||x - copy|| / ||x||` and `||Ψ Δ x - prox|| / ||Ψ Δ x||`; the gap is NaN. Both are
    computed every `cadence` iterations, at the end of a step.

    rho and sigma change at steps 10, 20, 40, ..., at most nine times, by a factor of at most 4.
    """

    node_solve: Any  # solves `(M + rho / sigma Δᵀ C Δ) x = right`
    anchor: Any  # an `Anchor` for a penalty with a conjugate; None otherwise
    rho: Any  # the start value, unless the `LossStart` has one
    sigma: Any  # the same; about the mean curvature of the loss
    metric: Any = None  # M, `[*nodes]` or with channels, of mean 1; None for ones, which the cosine x-step needs
    relaxation: Any = 1.7  # in (0, 2)
    cadence: int = static(default=5)  # iterations between two checks

    def refuses(self, problem: Problem) -> str | None:
        return refuses_unsplit(self, problem, "value prox")

    def init(self, problem: Problem, start: LossStart) -> LossAdmmState:
        dtype = start.x.dtype
        split = problem.operator
        far = jnp.full((), jnp.inf, dtype)
        z = start.x if split.inner.order == 0 else split.inner.mv(start.x)
        convex, norm = has_conjugate(problem.penalty), isinstance(problem.penalty, Norm)
        loss_dual = -split.rmv(start.dual)
        now = Iterate(
            x=start.x,
            inner=None if split.inner.order == 0 else z,
            loss_memory=jnp.zeros_like(start.x),
            memory=jnp.zeros_like(z),
            loss_dual=loss_dual,
            dual=start.dual,
            loss_candidate=loss_dual,
            candidate=start.dual,
        )
        objective = problem.loss.value(start.x) + problem.penalty.value(split.outer.mv(z))
        objective = jnp.minimum(objective, jnp.finfo(dtype).max).astype(dtype)
        return LossAdmmState(
            now=now,
            copies=None if norm else (start.x, split.outer.mv(z)),
            sums=jax.tree.map(jnp.zeros_like, now) if convex else None,
            length=jnp.zeros((), jnp.int32),
            restart_gap=far,
            sigma=jnp.asarray(self.sigma if start.sigma is None else start.sigma, dtype),
            rho=jnp.asarray(self.rho if start.rho is None else start.rho, dtype),
            count=jnp.zeros((), jnp.int32),
            next_change=jnp.full((), FIRST_CHANGE, jnp.int32),
            check=Check(far, objective, far, Progress(far, jnp.zeros((), jnp.int32)), 0 * far),
        )

    @property
    def stride(self) -> int:
        return self.cadence

    def step(self, problem: Problem, state: LossAdmmState) -> LossAdmmState:
        state = jax.lax.fori_loop(0, self.cadence - 1, lambda _, last: self._advanced(problem, last)[0], state)
        return self._checked(problem, *self._advanced(problem, state))

    def _advanced(self, problem: Problem, state: LossAdmmState) -> tuple[LossAdmmState, tuple[Array, ...]]:
        """The state after one iteration, and the changes of duals and points."""
        split, loss, penalty, now = problem.operator, problem.loss, problem.penalty, state.now
        keep = 1 - jnp.asarray(self.relaxation, now.x.dtype)
        x, z = now.x, (now.x if now.inner is None else now.inner)
        c, d, rho, sigma = now.loss_memory, now.memory, state.rho, state.sigma
        loss_step = sigma if self.metric is None else sigma * self.metric
        loss_candidate, copy = dual_step(loss, loss_step * (x - c) + now.loss_dual, loss_step)
        loss_dual = keep * now.loss_dual + (1 - keep) * loss_candidate

        row_step = rho / split.row_scale
        candidate, prox = dual_step(penalty, row_step * split.outer.mv(z - d) + now.dual, row_step)
        dual = keep * now.dual + (1 - keep) * candidate

        pulled = rho * split.column_scale * (z + keep * d) - split.outer.rmv(dual)
        right = loss_step * (x + keep * c) - loss_dual + split.inner.rmv(pulled)
        x_new = self.node_solve.solve(self.metric, split, right / sigma, rho / sigma, x)
        z_new = x_new if now.inner is None else split.inner.mv(x_new)
        moved = (dual - now.dual, z_new - z, loss_dual - now.loss_dual, x_new - x)
        now = Iterate(
            x=x_new,
            inner=None if now.inner is None else z_new,
            loss_memory=keep * c + x - x_new,
            memory=keep * d + z - z_new,
            loss_dual=loss_dual,
            dual=dual,
            loss_candidate=loss_candidate,
            candidate=candidate,
        )
        state = dataclasses.replace(
            state,
            now=now,
            copies=None if state.copies is None else (copy, prox),
            sums=None if state.sums is None else jax.tree.map(jnp.add, state.sums, now),
            length=state.length + 1,
            count=state.count + 1,
        )
        return state, moved

    def _checked(self, problem: Problem, state: LossAdmmState, moved: tuple[Array, ...]) -> LossAdmmState:
        rho_factor, sigma_factor = self._factors(problem, state, moved)
        if state.sums is None:
            residual, objective = self._stationarity(problem, state)
            gap = jnp.full_like(residual, jnp.nan)
            floor = jnp.full_like(residual, jnp.finfo(residual.dtype).eps)
        else:
            state, objective, residual, floor = self._restarted(problem, state)
            gap = residual
            if state.copies is not None:
                # The rows of x may lie outside a set, by little.
                stationarity, at_copies = self._stationarity(problem, state)
                inside = jnp.isfinite(gap) | (objective < jnp.finfo(gap.dtype).max)
                residual, objective = jnp.where(inside, gap, stationarity), jnp.where(inside, objective, at_copies)
                gap = jnp.where(inside, gap, jnp.nan)
        due, next_change = scheduled(state.count, state.next_change, MOST_CHANGES)
        rho_factor, sigma_factor = jnp.where(due, rho_factor, 1), jnp.where(due, sigma_factor, 1)
        # rho d and sigma c are dual quantities, which a change keeps. The sums belong to the old iteration.
        now = state.now._replace(memory=state.now.memory / rho_factor, loss_memory=state.now.loss_memory / sigma_factor)
        return dataclasses.replace(
            state,
            now=now,
            sums=jax.tree.map(lambda s: jnp.where(due, 0, s), state.sums),
            length=jnp.where(due, 0, state.length),
            restart_gap=jnp.where(due, jnp.inf, state.restart_gap),
            rho=state.rho * rho_factor,
            sigma=state.sigma * sigma_factor,
            next_change=next_change,
            check=Check(residual, objective, gap, state.check.progress.after(residual, self.cadence), floor),
        )

    def _restarted(self, problem: Problem, state: LossAdmmState) -> tuple[LossAdmmState, Array, Array, Array]:
        """The state, restarted if a restart is due, its objective, its gap, and the gap's rounding error."""
        now, mean = state.now, jax.tree.map(lambda s: s / state.length, state.sums)
        # A loop: the program is compiled once, and holds one set of rows at a time.
        objectives, gaps = jax.lax.map(
            lambda point: judge(problem, point[0], point[1], self.anchor),
            (jnp.stack([now.x, mean.x]), jnp.stack([now.candidate, mean.candidate])),
        )
        least = jnp.min(gaps)
        due = (least <= RESTART_GAP * state.restart_gap) | (state.length >= RESTART_LENGTH * state.count)
        take = due & (gaps[1] < gaps[0])
        # e^x may overflow early in a solve, far from the answer; that is no failure.
        objective = jnp.minimum(jnp.where(take, objectives[1], objectives[0]), jnp.finfo(now.x.dtype).max)
        # Rows of x are known to eps |x|, and so is their penalty: no answer in this precision is better.
        size = problem.operator.row_scale * jnp.sqrt(total(now.x * now.x) / now.x.size)
        noise = problem.penalty.value(jnp.broadcast_to(size, now.candidate.shape))
        limits = jnp.finfo(now.x.dtype)
        state = dataclasses.replace(
            state,
            now=jax.tree.map(lambda a, b: jnp.where(take, a, b), mean, now),
            sums=jax.tree.map(lambda s: jnp.where(due, 0, s), state.sums),
            length=jnp.where(due, 0, state.length),
            restart_gap=jnp.where(due, least, state.restart_gap),
        )
        floor = limits.eps * (1 + noise / jnp.maximum(objective, limits.tiny))
        return state, objective, jnp.where(take, gaps[1], gaps[0]), floor

    def _stationarity(self, problem: Problem, state: LossAdmmState) -> tuple[Array, Array]:
        split, now, (copy, prox) = problem.operator, state.now, state.copies
        rows = split.mv(now.x)
        apart = jnp.maximum(relative(now.x - copy, now.x), relative(rows - prox, rows))
        balance = relative(now.loss_candidate + split.rmv(now.candidate), now.loss_candidate)
        objective = jnp.minimum(problem.loss.value(now.x) + problem.penalty.value(prox), jnp.finfo(now.x.dtype).max)
        return jnp.maximum(balance, apart), objective

    def _factors(self, problem: Problem, state: LossAdmmState, moved: tuple[Array, ...]) -> tuple[Array, Array]:
        """The factors of rho and sigma."""
        split, now = problem.operator, state.now
        tiny = jnp.finfo(now.x.dtype).tiny
        metric = jnp.ones((), now.x.dtype) if self.metric is None else self.metric

        def length(scale: Any, x: Array) -> Array:
            return jnp.sqrt(jnp.maximum(total(scale * x * x), tiny))

        apart = rms(metric, now.loss_candidate / (metric * state.sigma))
        distance = BALANCE * rms(split.row_scale, now.candidate) / apart
        motion = length(split.row_scale, moved[0]) / length(split.column_scale, moved[1])
        loss_motion = length(1 / metric, moved[2]) / length(metric, moved[3])
        early = state.count < MOVING
        rho_factor = jnp.where(early, distance, motion) / state.rho
        sigma_factor = jnp.where(early, 1, loss_motion / state.sigma)
        rho_factor = limited(rho_factor, ~early, problem.penalty)
        return rho_factor, jnp.clip(sigma_factor, 1 / LARGEST_FACTOR, LARGEST_FACTOR)

    def measure(self, problem: Problem, state: LossAdmmState) -> Measure:
        check, extra = state.check, {"rho": state.rho, "sigma": state.sigma}
        best, waited = check.progress
        stalled = (best <= ROUNDING_MARGIN * check.floor) & (waited >= PATIENCE)
        return Measure(check.residual, check.objective, check.gap, extra, stalled)

    def duals(self, problem: Problem, state: LossAdmmState) -> tuple[Array, Array]:
        return state.now.loss_candidate, state.now.candidate

    def prox_step(self, problem: Problem, state: LossAdmmState) -> Array:
        return problem.operator.row_scale / state.rho

    def extract(self, problem: Problem, state: LossAdmmState) -> Float[Array, "..."]:
        return state.now.x
