"""Floor 4: the split ADMM of a fidelity and a penalty behind a product of two linear maps.

    minimise over x    loss(x) + penalty(Ψ Δ x),        loss(x) = 1/2 sum_j w_j (x_j - y_j)²

With Ψ = I it is the standard ADMM of trend filtering, with Δ = I it is Doge-ADMM (see `doge.py`), and between
them Doge-ADMM with a linear solve. One iteration, with z = Δ x, dual g, memory d, and `s_r = rho / S_r`:

    s  = Ψ (z - d) + g / s_r
    g' = s_r (s - prox(s, 1 / s_r))                     # in the subdifferential of the penalty at the prox
    g  = (1 - relaxation) g + relaxation g'
    x  = (W + rho Δᵀ C Δ)^-1 ( W y + Δᵀ ( rho C (z + (1 - relaxation) d) - Ψᵀ g ) )
    d  = (1 - relaxation) d + z_old - z

C and S are the metrics of `Split`. Source: Boyd, Parikh, Chu, Peleato, Eckstein, "Distributed optimization and
statistical learning via ADMM", 2011, section 3.4.3; the primal-dual reading with diagonal metrics is that of
Pock and Chambolle, "Diagonal preconditioning for first order primal-dual algorithms", 2011.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.fidelity import total
from sparseopt.core.penalties import Norm
from sparseopt.core.solve import Measure, Problem
from sparseopt.core.types import pytree, static

# Measured over the test problems: the best rho lies near this multiple of the ratio of dual to primal distance.
BALANCE = 3.0
FIRST_CHECK = 10
LARGEST_CHANGE = 4.0


@pytree
class Start:
    """Where a split ADMM starts: the point, the dual point (row shape), and rho; None rho lets the solver choose."""

    x: Any
    dual: Any
    rho: Any


@pytree
class AdmmState:
    """One state of the iteration; the certificate and the best gap belong to the last check."""

    x: Any
    inner: Any  # z = Δ x, or None where Δ is the identity
    memory: Any  # d
    dual: Any  # g, relaxed
    candidate: Any  # g'
    value: Any  # the prox, Ψ Δ x at the answer; None for a norm
    rho: Any
    count: Any
    next_change: Any
    residual: Any
    objective: Any
    gap: Any
    best: Any
    since_best: Any
    floor: Any


@pytree
class Admm:
    """The split ADMM as a solver for `solve`; `problem.operator` is a `Split`, `problem.loss` a `NodeSquares`.

    For a `Norm` the residual is the relative duality gap, `gap = (P(x) - D(g')) / P(x)`, which bounds the
    relative suboptimality. For any other penalty it is a stationarity residual and the gap is NaN.

    rho is adapted at steps 10, 20, 40, ..., `changes` times at most, then it stays, so the convergence theory
    of a fixed rho holds from there on.

    Attributes:
        node_solve: solves the x-step for a given rho.
        rho: start value; overridden by a `Start` that carries one.
        relaxation: in (0, 2).
        cadence: steps between two certificates; each costs one product with the operator and one with its
            transpose.
        changes: how often rho may change; 0 keeps it.
        patience: steps without a better gap, near the rounding level, after which the solver says that
            precision limits the answer.
    """

    node_solve: Any
    rho: Any
    relaxation: Any = 1.7
    cadence: int = static(default=5)
    changes: int = static(default=8)
    patience: int = static(default=100)

    def init(self, problem: Problem, x0: Start) -> AdmmState:
        """d = 0, g = the start's dual."""
        dtype = x0.x.dtype
        inner = problem.operator.inner
        zero, far = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)
        z = x0.x if inner.order == 0 else inner.mv(x0.x)
        return AdmmState(
            x=x0.x,
            inner=None if inner.order == 0 else z,
            memory=jnp.zeros_like(z),
            dual=x0.dual,
            candidate=x0.dual,
            value=None if isinstance(problem.penalty, Norm) else problem.operator.outer.mv(z),
            rho=jnp.asarray(self.rho if x0.rho is None else x0.rho, dtype),
            count=jnp.zeros((), jnp.int32),
            next_change=jnp.full((), FIRST_CHECK if self.changes else -1, jnp.int32),
            residual=far,
            objective=zero,
            gap=jnp.full((), jnp.nan, dtype),
            best=far,
            since_best=jnp.zeros((), jnp.int32),
            floor=zero,
        )

    def step(self, problem: Problem, state: AdmmState) -> AdmmState:
        """One iteration, and a certificate at every `cadence`-th."""
        split, loss = problem.operator, problem.loss
        outer, inner = split.outer, split.inner
        relaxation = jnp.asarray(self.relaxation, state.x.dtype)
        keep = 1 - relaxation
        z, d, rho = (state.x if inner.order == 0 else state.inner), state.memory, state.rho
        previous = state.dual
        dual_step = rho / split.row_scale
        s = outer.mv(z - d) + state.dual / dual_step
        prox = problem.penalty.prox(s, 1 / dual_step)
        candidate = dual_step * (s - prox)
        norm = isinstance(problem.penalty, Norm)
        if norm:
            candidate = problem.penalty.project_dual(candidate)
        dual = keep * state.dual + relaxation * candidate
        pulled = rho * split.column_scale * (z + keep * d) - outer.rmv(dual)
        x = self.node_solve.solve(loss, split, loss.weigh(loss.center) + inner.rmv(pulled), rho, state.x)
        z_new = x if inner.order == 0 else inner.mv(x)
        state = AdmmState(
            x=x,
            inner=None if inner.order == 0 else z_new,
            memory=keep * d + z - z_new,
            dual=dual,
            candidate=candidate,
            value=None if norm else prox,
            rho=rho,
            count=state.count + 1,
            next_change=state.next_change,
            residual=state.residual,
            objective=state.objective,
            gap=state.gap,
            best=state.best,
            since_best=state.since_best,
            floor=state.floor,
        )
        due = state.count % self.cadence == 0
        moved = dual - previous, z_new - z
        return jax.lax.cond(due, lambda s, m: self._check(problem, s, m), lambda s, m: s, state, moved)

    def _check(self, problem: Problem, state: AdmmState, moved: Any) -> AdmmState:
        """Certificate, rounding level, and, where it is due, a new rho."""
        import dataclasses

        split, loss, penalty = problem.operator, problem.loss, problem.penalty
        x, g = state.x, state.candidate
        rows = split.mv(x)
        pulled = split.rmv(g)
        eps = jnp.finfo(x.dtype).eps
        tiny = jnp.finfo(x.dtype).tiny
        if isinstance(penalty, Norm):
            objective = loss.value(x) + penalty.value(rows)
            scale = jnp.maximum(objective, tiny)
            gap = (loss.slack(x, pulled) + total(penalty.slack(rows, g))) / scale
            residual = gap
            size = jnp.sqrt(total(x * x) / x.size)
            floor = eps * (1 + penalty.value(jnp.broadcast_to(split.row_scale * size, rows.shape)) / scale)
        else:
            objective = loss.value(x) + penalty.value(state.value)
            gap = jnp.full_like(objective, jnp.nan)
            force = loss.gradient(x) + pulled
            apart = rows - state.value

            def relative(a: Array, b: Array) -> Array:
                return jnp.sqrt(total(a * a) / jnp.maximum(total(b * b), tiny))

            residual = jnp.maximum(relative(force, loss.weigh(loss.center)), relative(apart, rows))
            floor = jnp.full_like(objective, eps)
        better = residual < 0.9 * state.best
        rho, dual, memory, following = self._rebalance(problem, state, moved)
        return dataclasses.replace(
            state,
            dual=dual,
            memory=memory,
            rho=rho,
            next_change=following,
            residual=residual,
            objective=objective,
            gap=gap,
            best=jnp.where(better, residual, state.best),
            since_best=jnp.where(better, 0, state.since_best + self.cadence),
            floor=floor,
        )

    def _rebalance(self, problem: Problem, state: AdmmState, step_moved: Any) -> tuple[Array, Array, Array, Array]:
        """rho from the ratio of distances travelled, `||g||_S / ||Δ (y - x)||_C`, changed by a bounded factor.

        The dual vector `rho d - g` is what the change keeps.
        """
        split, loss = problem.operator, problem.loss
        due = state.count == state.next_change
        tiny = jnp.finfo(state.x.dtype).tiny
        node_scale = split.column_scale if split.inner.order == 0 else jnp.ones((), state.x.dtype)

        def mean_square(scale: Array, x: Array) -> Array:
            scale = jnp.broadcast_to(scale, x.shape)
            return total(scale * x * x) / jnp.maximum(total(scale), tiny)

        moved = mean_square(node_scale, loss.observed(loss.center - state.x))
        ratio = jnp.sqrt(mean_square(split.row_scale, state.candidate) / jnp.maximum(moved, tiny))
        r = jnp.sqrt(total(split.row_scale * step_moved[0]**2) / jnp.maximum(total(split.column_scale*step_moved[1]**2), tiny))
        import os
        E = float(os.environ.get("EXPO","0.5")); FROM=int(os.environ.get("FROM","40"))
        ratio = jnp.where(state.count >= FROM, ratio**(1-E) * (r / BALANCE)**E, ratio)
        wanted = jnp.clip(BALANCE * ratio / state.rho, 1 / LARGEST_CHANGE, LARGEST_CHANGE)
        factor = jnp.where(due & (ratio > 0), wanted, 1)
        rho = state.rho * factor
        last = FIRST_CHECK * 2 ** max(self.changes - 1, 0)
        doubled = jnp.where(state.next_change < last, 2 * state.next_change, -1)
        following = jnp.where(due, doubled, state.next_change)
        return rho, state.dual, state.memory / factor, following

    def measure(self, problem: Problem, state: AdmmState) -> Measure:
        """What the last check found."""
        del problem
        return Measure(state.residual, state.objective, state.gap)

    def extract(self, problem: Problem, state: AdmmState) -> Float[Array, "..."]:
        """x."""
        del problem
        return state.x
