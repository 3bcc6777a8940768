"""Floor 4: the primal-dual hybrid gradient method with adaptive steps, and its exact form, the split ADMM.

    minimise over x    f(A x) + penalty(K x)

Both terms are dualised: with the stacked map `K~ = [A; K]`, duals `w = (s, u)` and h the sum of both terms, one step is

    x' = x - M^-1 K~ᵀ w / omega
    w' = v - sigma y,    y = prox(v / sigma, 1 / sigma) of h,    v = w + sigma K~ (2 x' - x),    sigma = omega S

`PrimalDual` takes a number for M, the squared norm of `S^(1/2) K~`, and needs products alone. `SplitAdmm` takes
`M = K~ᵀ S K~`, whose inverse is made once: that is the alternating direction method of multipliers, and needs few steps
however badly A and K are conditioned. T, the map of `z = (x, w)` to (x', w'), is firmly nonexpansive in the metric of
the method. Two iterations follow from that. Where f is smooth, T is over-relaxed, and omega is set to the ratio of the
ways that w and x go in a step, at iterations 10, 20, 40, ...:

    z <- z + 1.8 (T(z) - z)

Where f has kinks this spirals. There the reflected Halpern iteration is anchored at a point and restarted where its
fixed-point residual has fallen; then omega moves towards the ratio of the ways that w and x went since the last one:

    z <- (k + 1) / (k + 2) (2 T(z) - z) + z_first / (k + 2)

Source: Chambolle and Pock, "A first-order primal-dual algorithm for convex problems with applications to imaging",
2011; Applegate et al., "Practical large-scale linear programming using primal-dual hybrid gradient" (PDLP), NeurIPS
2021, for restarts and omega; Lu and Yang, "Restarted Halpern PDHG for linear programming", 2024, for the reflection;
Eckstein and Bertsekas, "On the Douglas-Rachford splitting method", 1992, for the over-relaxation.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.certify import PENALTY_MOVE, certificate, has_conjugate, is_convex
from sparseopt.core.dense import product
from sparseopt.core.fidelity import total
from sparseopt.core.losses import Quadratic, is_smooth
from sparseopt.core.matrices import norm_estimate
from sparseopt.core.matrix_losses import LeastSquares, MatrixLoss
from sparseopt.core.operators import or_identity
from sparseopt.core.penalties import Norm
from sparseopt.core.problem import Measure, Problem, Progress, needs
from sparseopt.core.types import pytree, static

# The square of the step is this share of what the norm allows, since the norm is estimated from below.
MARGIN = 0.95
NORM_STEPS = 40
# A restart is due when the fixed-point residual has fallen to the first share of its value at the last restart, or to
# the second share and rises again, or when the iterations since the last restart are the third share of all.
SUFFICIENT, NECESSARY, ARTIFICIAL = 0.2, 0.8, 0.36
# Over-relaxation for smooth losses; when and how far their omega changes.
RELAXATION = 1.8
MOVING, LARGEST_FACTOR = 40, 4.0
# The solve ends where rounding keeps the residual from falling for so many certificates.
PATIENCE = 8
# From one certificate to the next the iterations grow by this share.
CERTIFICATE_GROWTH = 1.3
# The linear solve of a certificate takes so many steps at most, and the iterations so far divided by so much.
LEAST_SOLVE, SOLVE_SHARE = 10, 10


class Point(NamedTuple):
    """A primal-dual point with its images, all that the iteration combines."""

    x: Any
    duals: tuple[Any, Any]  # s and u
    images: tuple[Any, Any]  # A x and K x
    pulled: Any  # Aᵀ s + Kᵀ u


@pytree
class PrimalDualState:
    """One state of the iteration."""

    now: Point  # z
    mapped: Point  # T of the z before
    copies: tuple[Any, Any]  # the last y
    first: Point  # where the iteration was restarted
    metric: Any  # M: a number, or the inverse of the matrix
    scales: tuple[Any, Any]  # S, a number a block
    omega: Any
    count: Any  # iterations since the restart
    steps: Any
    next_change: Any
    fixed_point: Any  # the fixed-point residual at the last check, and at the last restart
    fixed_point_first: Any
    loss: Any  # the loss as a `MatrixLoss`, where it is a `Quadratic`
    residual: Any
    objective: Any
    gap: Any
    bound: Any  # the best lower bound on the optimum so far
    next_certificate: Any
    progress: Any


@pytree
class PrimalDual:
    """The primal-dual method for `solve`: any loss of data, smooth or not, and any penalty behind a linear map.

    Where the penalty has a conjugate, the residual is the relative duality gap. The dual pair is feasible only in the
    limit, so it is first moved and scaled until it is, which costs a linear solve: that happens ever more rarely, and
    in between the best bound so far serves. Elsewhere, and where the objective is infinite, the residual is the larger
    of `||K~ x - y|| / ||K~ x||` and `||Aᵀ s + Kᵀ u|| / ||Aᵀ s||`, and the gap is NaN; without convexity nothing more is
    known of the answer. Without an operator the answer has the penalty's exact zeros.

    Attributes:
        omega: the first ratio of dual and primal steps; None for one from the data.
        cadence: iterations between two checks, where omega may change and a step ends.
    """

    omega: Any = None
    cadence: int = static(default=10)

    def refuses(self, problem: Problem) -> str | None:
        """A loss that is not one of data or quadratic, and a penalty without a prox."""
        return self._refuses_loss(problem.loss) or needs(self, problem, operator=True)

    def _refuses_loss(self, loss: Any) -> str | None:
        if isinstance(loss, MatrixLoss | Quadratic):
            return None
        return (
            f"{type(self).__name__} needs the prox of the loss and takes LeastSquares, Composed and Quadratic, given "
            f"{type(loss).__name__}; write the loss as Composed(scalar loss, matrix, target), or without an operator "
            "use AcceleratedProximalGradient"
        )

    @property
    def stride(self) -> int:
        """Iterations that a step makes: up to the next check."""
        return self.cadence

    def _metric(self, problem: Problem, x: Array, scales: tuple[Array, Array]) -> Array:
        """M, a number."""
        # The power method on `K~ᵀ S K~`, which is its own transpose.
        return norm_estimate(partial(normal, problem, scales), lambda e: e, x, NORM_STEPS) ** 2 / MARGIN

    def _moved(self, state: PrimalDualState, pulled: Array) -> Array:
        """`M^-1 K~ᵀ w`."""
        return pulled / state.metric

    def _length(self, state: PrimalDualState, apart: Point) -> Array:
        """`<dx, M dx>`."""
        return state.metric * total(apart.x**2)

    def init(self, problem: Problem, x0: Float[Array, "..."]) -> PrimalDualState:
        """The start with the loss's own subgradient there, norms of both maps, and the metric."""
        factor = as_data(problem.loss) if isinstance(problem.loss, Quadratic) else None
        problem = _of_data(problem, factor)
        x = jnp.asarray(x0)
        maps = _maps(problem, x)
        limits = jnp.finfo(x.dtype)
        images = (maps[0].mv(x), maps[1].mv(x))
        sizes = [jnp.maximum(norm_estimate(part.mv, part.rmv, x), limits.tiny**0.25) for part in maps]
        scales = ((1 / sizes[0] ** 2).astype(x.dtype), (1 / sizes[1] ** 2).astype(x.dtype))
        duals = (problem.loss.rows.gradient(images[0]).astype(x.dtype), jnp.zeros_like(images[1]))
        pulled = maps[0].rmv(duals[0])
        start = Point(x, duals, images, pulled)
        far, zero = jnp.full((), jnp.inf, x.dtype), jnp.zeros((), jnp.int32)
        objective = problem.loss.rows.value(images[0]) + problem.penalty.value(images[1])
        state = PrimalDualState(
            now=start,
            mapped=start,
            copies=images,
            first=start,
            metric=self._metric(problem, x, scales),
            scales=scales,
            omega=jnp.ones((), x.dtype),
            count=zero,
            steps=zero,
            next_change=zero,
            fixed_point=far,
            fixed_point_first=far,
            loss=factor,
            residual=far,
            objective=objective.astype(x.dtype),
            gap=far * jnp.nan,
            bound=-far,
            next_certificate=jnp.zeros((), x.dtype),
            progress=Progress(far, zero),
        )
        if self.omega is not None:
            return dataclasses.replace(state, omega=jnp.asarray(self.omega, x.dtype))
        # The dual over the length of the steepest descent step that belongs to it.
        along = (maps[0].mv(pulled), maps[1].mv(pulled))
        descent = total(pulled**2) / jnp.maximum(total(along[0] ** 2), limits.tiny)
        apart = Point(descent * pulled, duals, (descent * along[0], descent * along[1]), pulled)
        return dataclasses.replace(state, omega=self._ratio(state, apart))

    def _ratio(self, state: PrimalDualState, apart: Point) -> Array:
        """The distance that the duals travelled over that of x, in their metrics; 1 where either is 0."""
        dual = sum(total(w**2) / s for w, s in zip(apart.duals, state.scales, strict=True))
        primal = self._length(state, apart)
        known = (dual > 0) & (primal > 0) & jnp.isfinite(dual) & jnp.isfinite(primal)
        return jnp.where(known, jnp.sqrt(jnp.where(known, dual, 1) / jnp.where(known, primal, 1)), 1)

    def step(self, problem: Problem, state: PrimalDualState) -> PrimalDualState:
        """`cadence` iterations, a check, and a restart where it is due."""
        problem = _of_data(problem, state.loss)
        state = jax.lax.fori_loop(0, self.cadence, lambda _, now: self._advanced(problem, now), state)
        state = self._checked(problem, state)
        if is_smooth(problem.loss):
            return self._balanced(state)
        state = self._restarted(state)
        # Reflections do not damp the rounding errors of images that are combined and never made anew.
        maps, now = _maps(problem, state.now.x), state.now
        images = (maps[0].mv(now.x), maps[1].mv(now.x))
        pulled = maps[0].rmv(now.duals[0]) + maps[1].rmv(now.duals[1])
        return dataclasses.replace(state, now=now._replace(images=images, pulled=pulled))

    def _advanced(self, problem: Problem, state: PrimalDualState) -> PrimalDualState:
        """One iteration."""
        now, maps = state.now, _maps(problem, state.now.x)
        x = now.x - self._moved(state, now.pulled) / state.omega
        images = tuple(part.mv(x) for part in maps)
        copies, duals = [], []
        for term, scale, w, new, old in zip(
            (problem.loss.rows, problem.penalty), state.scales, now.duals, images, now.images, strict=True
        ):
            sigma = state.omega * scale
            v = w + sigma * (2 * new - old)
            if isinstance(term, Norm) and getattr(term, "nearest", True):
                # By Moreau's identity, without the rounding error of a long step.
                duals.append(term.project_dual(v))
                copies.append((v - duals[-1]) / sigma)
            else:
                copies.append(term.prox(v / sigma, 1 / sigma))
                duals.append(v - sigma * copies[-1])
        pulled = maps[0].rmv(duals[0]) + maps[1].rmv(duals[1])
        mapped = Point(x, (duals[0], duals[1]), (images[0], images[1]), pulled)
        following = self._reflected(problem, state, mapped)
        return dataclasses.replace(
            state,
            now=following,
            mapped=mapped,
            copies=(copies[0], copies[1]),
            count=state.count + 1,
            steps=state.steps + 1,
        )

    def _reflected(self, problem: Problem, state: PrimalDualState, mapped: Point) -> Point:
        """The point from which the next iteration goes on."""
        if is_smooth(problem.loss):
            return jax.tree.map(lambda new, old: old + RELAXATION * (new - old), mapped, state.now)
        share = (state.count + 1) / (state.count + 2).astype(mapped.x.dtype)
        return jax.tree.map(
            lambda new, old, first: share * (2 * new - old) + (1 - share) * first, mapped, state.now, state.first
        )

    def _checked(self, problem: Problem, state: PrimalDualState) -> PrimalDualState:
        """The state with a fresh residual and objective; a certificate is found ever more rarely, since it may cost."""
        at, loss, penalty = state.mapped, problem.loss, problem.penalty
        # The answer: without an operator the copy, which has the penalty's zeros.
        plain = problem.operator is None
        x = state.copies[1] if plain else at.x
        limits = jnp.finfo(x.dtype)
        due = state.steps >= state.next_certificate
        gap = objective = jnp.full_like(state.residual, jnp.inf)
        if has_conjugate(penalty):
            image = loss.image(x) if plain else at.images[0]
            scales = (state.scales[0], PENALTY_MOVE * state.scales[1])
            objective, gap = certificate(
                problem,
                x,
                image,
                *at.duals,
                scales=scales,
                precondition=self._precondition(state),
                due=due,
                most_steps=LEAST_SOLVE + state.steps // SOLVE_SHARE,
            )
        # A bound on the optimum serves every x; only the difference of two numbers is known less well.
        found = jnp.where(due & jnp.isfinite(gap), objective / (1 + gap), -jnp.inf)
        bound = jnp.maximum(state.bound, found)
        slack = jnp.maximum(objective - bound, 4 * limits.eps * objective)
        earlier = jnp.where(bound > 0, slack / jnp.maximum(bound, limits.tiny), jnp.inf)
        residual = jnp.where(due, jnp.minimum(gap, earlier), earlier)
        gap = jnp.where(jnp.isfinite(residual), residual, jnp.nan)
        if not isinstance(penalty, Norm):
            # Outside the set of a constraint the objective is infinite and says nothing.
            missed = [total((a - y) ** 2) for a, y in zip(at.images, state.copies, strict=True)]
            sizes = [jnp.maximum(total(a**2), total(y**2)) for a, y in zip(at.images, state.copies, strict=True)]
            primal = sum(missed) / jnp.maximum(sum(sizes), limits.tiny)
            force = _maps(problem, at.x)[0].rmv(at.duals[0])
            largest = jnp.maximum(total(force**2), total((at.pulled - force) ** 2))
            dual = total(at.pulled**2) / jnp.maximum(largest, limits.tiny)
            stationarity = jnp.sqrt(jnp.maximum(primal, dual))
            known = jnp.isfinite(objective) & jnp.isfinite(residual)
            residual = jnp.where(known, residual, stationarity)
            objective = jnp.where(known, objective, loss.rows.value(at.images[0]) + penalty.value(state.copies[1]))
        return dataclasses.replace(
            state,
            next_certificate=jnp.where(due, CERTIFICATE_GROWTH * state.steps, state.next_certificate),
            bound=bound,
            residual=residual,
            gap=gap,
            objective=jnp.minimum(objective, limits.max),
            progress=state.progress.after(residual, due),
        )

    def _precondition(self, state: PrimalDualState) -> Any:
        """For the certificate's linear solve: none."""
        del state

    def _restarted(self, state: PrimalDualState) -> PrimalDualState:
        """The state from which the next step starts, restarted where a restart is due."""
        share = state.count / (state.count + 1).astype(state.omega.dtype)
        # The z that was mapped last, from what the iteration made of it.
        before = jax.tree.map(
            lambda now, new, first: 2 * new - (now - (1 - share) * first) / share, state.now, state.mapped, state.first
        )
        apart = jax.tree.map(jnp.subtract, before, state.mapped)
        across = sum(total(a * w) for a, w in zip(apart.images, apart.duals, strict=True))
        dual = sum(total(w**2) / s for w, s in zip(apart.duals, state.scales, strict=True))
        squared = state.omega * self._length(state, apart) - 2 * across + dual / state.omega
        length = jnp.sqrt(jnp.maximum(squared, 0))
        due = (
            (length <= SUFFICIENT * state.fixed_point_first)
            | ((length <= NECESSARY * state.fixed_point_first) & (length > state.fixed_point))
            | (state.count >= ARTIFICIAL * state.steps)
        )
        way = jax.tree.map(jnp.subtract, state.mapped, state.first)
        omega = jnp.sqrt(state.omega * self._ratio(state, way))
        start = jax.tree.map(lambda new, now: jnp.where(due, new, now), state.mapped, state.now)
        return dataclasses.replace(
            state,
            now=start,
            first=jax.tree.map(lambda new, old: jnp.where(due, new, old), state.mapped, state.first),
            omega=jnp.where(due & (omega > 0) & jnp.isfinite(omega), omega, state.omega),
            count=jnp.where(due, 0, state.count),
            fixed_point=jnp.where(due, jnp.inf, length),
            fixed_point_first=jnp.where(due, length, state.fixed_point_first),
        )

    def _balanced(self, state: PrimalDualState) -> PrimalDualState:
        """The state with omega as the last way asks for, at iterations 10, 20, 40, ..., so that it settles."""
        before = jax.tree.map(lambda now, new: (now - RELAXATION * new) / (1 - RELAXATION), state.now, state.mapped)
        due = state.steps >= state.next_change
        # In the beginning the distance from the start tells more than the last step.
        early = state.steps < MOVING
        since = jax.tree.map(lambda a, b: jnp.where(early, a, b), state.first, before)
        ratio = self._ratio(state, jax.tree.map(jnp.subtract, state.mapped, since))
        factor = jnp.clip(ratio / state.omega, 1 / LARGEST_FACTOR, LARGEST_FACTOR)
        return dataclasses.replace(
            state,
            # A new metric: its iteration starts at the point that the old one mapped to.
            now=jax.tree.map(lambda new, now: jnp.where(due, new, now), state.mapped, state.now),
            omega=jnp.where(due, factor * state.omega, state.omega),
            next_change=jnp.where(due, 2 * state.steps, state.next_change),
        )

    def measure(self, problem: Problem, state: PrimalDualState) -> Measure:
        """What this step's check found."""
        stalled = state.progress.stalled(state.residual, PATIENCE)
        nonconvex = not is_convex(problem.penalty)
        return Measure(state.residual, state.objective, state.gap, {"omega": state.omega}, stalled, nonconvex)

    def duals(self, problem: Problem, state: PrimalDualState) -> tuple[Array, Array]:
        """The pair (s, u)."""
        del problem
        return state.mapped.duals

    def prox_step(self, problem: Problem, state: PrimalDualState) -> Array:
        """`1 / sigma` of the penalty."""
        del problem
        return 1 / (state.omega * state.scales[1])

    def extract(self, problem: Problem, state: PrimalDualState) -> Float[Array, "..."]:
        """The current x; without an operator its copy, which has the penalty's zeros and lies in its set."""
        return state.copies[1] if problem.operator is None else state.mapped.x


def as_data(loss: Quadratic) -> LeastSquares:
    """`1/2 <x - c, H (x - c)>` as `1/2 ||A x - A c||²` with `Aᵀ A = H`."""
    values, vectors = jnp.linalg.eigh(loss.hessian)
    matrix = jnp.sqrt(jnp.maximum(values, 0))[:, None] * vectors.T
    return LeastSquares(matrix, product(matrix, loss.center))


def _of_data(problem: Problem, factor: LeastSquares | None) -> Problem:
    return problem if factor is None else dataclasses.replace(problem, loss=factor)


def _maps(problem: Problem, x: Array) -> tuple[Any, Any]:
    """A and K."""
    return problem.loss.maps(x), or_identity(problem.operator, x)


def normal(problem: Problem, scales: tuple[Array, Array], x: Array) -> Array:
    """`K~ᵀ S K~ x`."""
    parts = [s * part.rmv(part.mv(x)) for s, part in zip(scales, _maps(problem, x), strict=True)]
    return parts[0] + parts[1]
