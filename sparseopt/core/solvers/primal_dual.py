"""The primal-dual hybrid gradient method with adaptive steps, and its exact form, the split ADMM.

    minimise over x    f(A x) + penalty(K x)

Both terms are dualised: with the stacked map `K~ = [A; K]`, duals `w = (s, u)` and h the sum of both terms, one step is

    x' = x - M^-1 K~ᵀ w / omega
    w' = v - sigma y,    y = prox(v / sigma, 1 / sigma) of h,    v = w + sigma K~ (2 x' - x),    sigma = omega S

`PrimalDual` uses a number for M, the squared norm of `S^(1/2) K~`, and needs only products. `SplitAdmm` uses
`M = K~ᵀ S K~`, inverted once: this is the alternating direction method of multipliers, and needs few steps however
badly A and K are conditioned. T, the map of `z = (x, w)` to (x', w'), is firmly nonexpansive in the metric of the
method. If f is smooth, T is over-relaxed, and at iterations 10, 20, 40, ... omega is set to the ratio of the lengths
of the last steps of w and x:

    z <- z + 1.8 (T(z) - z)

If f has kinks, this spirals. Then the reflected Halpern iteration is anchored at a point and restarted when its
fixed-point residual has fallen; omega then moves towards the ratio of the distances of w and x from the last restart:

    z <- (k + 1) / (k + 2) (2 T(z) - z) + z_first / (k + 2)

Source: Chambolle and Pock, "A first-order primal-dual algorithm for convex problems with applications to imaging",
2011; Applegate et al., "Practical large-scale linear programming using primal-dual hybrid gradient" (PDLP), NeurIPS
2021, for restarts and omega; Lu and Yang, "Restarted Halpern PDHG for linear programming", 2024, for the reflection;
Eckstein and Bertsekas, "On the Douglas-Rachford splitting method", 1992, for the over-relaxation.
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.base.dense import product, spd_inverse
from sparseopt.core.base.sums import total
from sparseopt.core.base.types import pytree, static
from sparseopt.core.losses.data import DataLoss, as_least_squares
from sparseopt.core.losses.quadratic import Quadratic, is_smooth
from sparseopt.core.operators.maps import Pair, or_identity
from sparseopt.core.operators.matrices import norm_estimate
from sparseopt.core.penalties.protocols import SHORT, dual_step, has_conjugate, is_norm
from sparseopt.core.problem.certify import ROUNDING, Effort, Metric, certificate
from sparseopt.core.problem.problem import Measure, Problem, Progress, needs
from sparseopt.core.problem.units import Units, scales_of, units_of

# The square of the step is this fraction of what the norm allows, since the norm is estimated from below.
MARGIN = 0.95
NORM_STEPS = 40
# A restart is due when the fixed-point residual has fallen to the first fraction of its value at the last restart, or
# to the second and rises again, or when the iterations since the last restart are the third fraction of all.
SUFFICIENT, NECESSARY, ARTIFICIAL = 0.2, 0.8, 0.36
# Over-relaxation for smooth losses; when and how far their omega changes.
RELAXATION, MOVING, LARGEST_FACTOR = 1.8, 40, 4.0
# The solve ends when rounding keeps the residual from falling for this many certificates.
PATIENCE = 8
# The iteration number of a certificate over that of the previous one; its linear solve runs at most this many steps,
# plus the iterations so far divided by this many.
CERTIFICATE_GROWTH, LEAST_SOLVE, SOLVE_SHARE = 1.3, 10, 10
# In float64 a constraint on K x is met this much more closely than the gap.
CLOSER = 1e3
# `SplitAdmm` accepts up to this many unknowns.
CHEAP = 3000


def _maps(problem: Problem, x: Array) -> Pair:
    return Pair(problem.loss.maps(x), or_identity(problem.operator, x))


class Point(NamedTuple):
    """A primal-dual point with its images."""

    x: Any
    duals: tuple[Any, Any]  # s and u
    images: tuple[Any, Any]  # A x and K x
    pulled: Any  # Aᵀ s + Kᵀ u


@pytree
class PrimalDualState:
    """The state of `PrimalDual`."""

    now: Point  # z
    mapped: Point  # T of the previous z
    copies: tuple[Any, Any]  # the last y
    first: Point  # where the iteration was restarted
    units: Units  # the units of x in which columns are about equally long
    metric: Any  # M in these units: a number, or the inverse of the matrix
    scales: tuple[Any, Any]  # S, a number per block, or one per row of K
    omega: Any
    count: Any  # iterations since the restart
    steps: Any
    next_change: Any
    fixed_point: Any  # the fixed-point residual at the last check, and at the last restart
    fixed_point_first: Any
    loss: Any  # the loss as a `DataLoss` if it is a `Quadratic`
    residual: Any
    objective: Any
    gap: Any
    bound: Any  # the best D so far
    next_certificate: Any
    violation: Any  # of a constraint on K x, see `Solution`; None without one
    progress: Any


@pytree
class PrimalDual:
    """The primal-dual method for `solve`: any `DataLoss`, smooth or not, and any penalty of a linear map of x.

    If the penalty has a conjugate, the residual is the relative duality gap, and for a constraint on K x the larger of
    the gap at the nearest point of its set and of the relative distance to it (in float64 a thousand times that), the
    `violation`. A linear solve must first make the dual
    pair feasible; it is repeated less and less often, and the best bound so far is used in between. Otherwise, and
    while the objective is infinite, the residual is the larger of `||K~ x - y|| / ||K~ x||` and
    `||Aᵀ s + Kᵀ u|| / ||Aᵀ s||`, and the gap is NaN; without convexity nothing more is known about the answer. Without
    an operator the answer has the penalty's exact zeros. Columns of different lengths are first scaled to about the
    same length; the columns of your own `mv` and `rmv` are unknown and assumed to be equally long.

    Attributes:
        omega: the first ratio of dual and primal steps; None computes it from the data.
        cadence: iterations between two checks, at which omega may change and a step ends.
    """

    omega: Any = None
    cadence: int = static(default=10)

    def refuses(self, problem: Problem) -> str | None:
        if isinstance(problem.loss, DataLoss | Quadratic):
            return needs(self, problem, operator=True)
        return (
            f"{type(self).__name__} needs the prox of the loss, which a DataLoss and a Quadratic have, given "
            f"{type(problem.loss).__name__}; write the loss as DataLoss(scalar loss, matrix, target), or without an "
            "operator use AcceleratedProximalGradient"
        )

    @property
    def stride(self) -> int:
        return self.cadence

    def _metric(self, normal: Any, x: Array) -> Array:
        # The power method on a matrix that is its own transpose.
        return norm_estimate(normal, lambda e: e, x, NORM_STEPS) ** 2 / MARGIN

    def _inverse(self, state: PrimalDualState, z: Array) -> Array:
        """The inverse of M in the units of x."""
        return z / state.metric

    def _length(self, state: PrimalDualState, apart: Point) -> Array:
        """`<dx, M dx>`."""
        return state.metric * total((apart.x / state.units.of) ** 2)

    def init(self, problem: Problem, start: Float[Array, "..."]) -> PrimalDualState:
        factor = as_least_squares(problem.loss) if isinstance(problem.loss, Quadratic) else None
        problem = problem if factor is None else dataclasses.replace(problem, loss=factor)
        x = jnp.asarray(start)
        maps = _maps(problem, x)
        limits = jnp.finfo(x.dtype)
        images = maps.mv(x)
        units = units_of(problem, x)
        scales = scales_of(problem, x, units.of)

        def normal(z: Array) -> Array:
            """`K~ᵀ S K~` in the units of x."""
            along = maps.mv(units.of * z)
            return units.of * maps.rmv((scales[0] * along[0], scales[1] * along[1]))

        duals = (problem.loss.rows.gradient(images[0]).astype(x.dtype), jnp.zeros_like(images[1]))
        pulled = maps.first.rmv(duals[0])
        first = Point(x, duals, images, pulled)
        far, zero = jnp.full((), jnp.inf, x.dtype), jnp.zeros((), jnp.int32)
        objective = problem.loss.rows.value(images[0]) + problem.penalty.value(images[1])
        state = PrimalDualState(
            now=first,
            mapped=first,
            copies=images,
            first=first,
            units=units,
            metric=self._metric(normal, x),
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
            violation=far if _is_constrained(problem) else None,
            progress=Progress(far, zero),
        )
        if self.omega is not None:
            return dataclasses.replace(state, omega=jnp.asarray(self.omega, x.dtype))
        # The length of the dual over that of its steepest descent step.
        way = units.of**2 * pulled
        # Of length about 1, so that no square overflows.
        way = way / jnp.maximum(jnp.max(jnp.abs(way), initial=0), limits.tiny)
        along = maps.mv(way)
        descent = total(pulled * way) / jnp.maximum(total(along[0] ** 2), limits.tiny)
        apart = Point(descent * way, duals, (descent * along[0], descent * along[1]), pulled)
        return dataclasses.replace(state, omega=self._ratio(state, apart))

    def _ratio(self, state: PrimalDualState, apart: Point) -> Array:
        """The length of the duals over that of x, in their metrics; 1 where either is 0."""
        dual, primal = _dual_length(state, apart), self._length(state, apart)
        known = (dual > 0) & (primal > 0) & jnp.isfinite(dual) & jnp.isfinite(primal)
        return jnp.where(known, jnp.sqrt(jnp.where(known, dual, 1) / jnp.where(known, primal, 1)), 1)

    def step(self, problem: Problem, state: PrimalDualState) -> PrimalDualState:
        problem = problem if state.loss is None else dataclasses.replace(problem, loss=state.loss)
        state = jax.lax.fori_loop(0, self.cadence, lambda _, now: self._advance(problem, now), state)
        state = self._check(problem, state)
        if is_smooth(problem.loss):
            return self._balance(state)
        state = self._restart(state)
        # Reflections do not damp the rounding errors of combined images: compute the images again.
        now, maps = state.now, _maps(problem, state.now.x)
        return dataclasses.replace(state, now=now._replace(images=maps.mv(now.x), pulled=maps.rmv(now.duals)))

    def _advance(self, problem: Problem, state: PrimalDualState) -> PrimalDualState:
        now, maps = state.now, _maps(problem, state.now.x)
        unit = state.units.of
        x = now.x - unit * self._inverse(state, unit * now.pulled) / state.omega
        images = maps.mv(x)
        sigmas = [state.omega * scale for scale in state.scales]
        ahead = [2 * new - old for new, old in zip(images, now.images, strict=True)]
        s, data_copy = dual_step(problem.loss.rows, now.duals[0] + sigmas[0] * ahead[0], sigmas[0])
        u, copy = dual_step(problem.penalty, now.duals[1] + sigmas[1] * ahead[1], sigmas[1])
        mapped = Point(x, (s, u), images, maps.rmv((s, u)))
        if is_smooth(problem.loss):
            following = jax.tree.map(lambda new, old: old + RELAXATION * (new - old), mapped, now)
        else:
            share = (state.count + 1) / (state.count + 2).astype(x.dtype)
            following = jax.tree.map(
                lambda new, old, first: share * (2 * new - old) + (1 - share) * first, mapped, now, state.first
            )
        return dataclasses.replace(
            state,
            now=following,
            mapped=mapped,
            copies=(data_copy, copy),
            count=state.count + 1,
            steps=state.steps + 1,
        )

    def _check(self, problem: Problem, state: PrimalDualState) -> PrimalDualState:
        """The state with a new residual and objective, and with a new certificate if one is due."""
        at, loss, penalty = state.mapped, problem.loss, problem.penalty
        # The answer: without an operator the copy, which has the penalty's zeros.
        plain = problem.operator is None
        x = state.copies[1] if plain else at.x
        limits = jnp.finfo(x.dtype)
        due = state.steps >= state.next_certificate
        image = loss.image(x) if plain else at.images[0]
        rows = x if plain else at.images[1]
        inside = violation = None
        if _is_constrained(problem):
            inside = jnp.where(jnp.isfinite(penalty.value(rows)), rows, penalty.prox(rows, SHORT))
            violation = jnp.max(jnp.abs(inside - rows), initial=0) / jnp.maximum(jnp.max(jnp.abs(rows), initial=0), 1)
        objective = loss.rows.value(image) + penalty.value(rows if inside is None else inside)
        gap, bound = jnp.full_like(state.residual, jnp.inf), state.bound
        if has_conjugate(penalty):
            # Rounding alone does not bring an objective below a bound.
            refuted = bound - objective > 8 * ROUNDING * limits.eps * jnp.abs(objective)
            if violation is not None:  # an objective outside the set may be below the optimum
                refuted = refuted & (violation <= ROUNDING * limits.eps)
            precondition = partial(self._inverse, state) if jnp.ndim(state.metric) else None
            metric = Metric(state.units, state.scales, precondition)
            known = jnp.where(refuted, jnp.inf, objective - bound)
            effort = Effort(due, known, LEAST_SOLVE + state.steps // SOLVE_SHARE)
            found = certificate(problem, x, image, *at.duals, metric, effort, inside)
            bound = jnp.where(due & (refuted | (found.bound > bound)), found.bound, bound)
            # The difference of two numbers is known less accurately than a slack.
            slack = jnp.maximum(jnp.abs(objective - bound), 4 * limits.eps * objective)
            earlier = jnp.where((bound > 0) & ~refuted, slack / jnp.maximum(bound, limits.tiny), jnp.inf)
            gap = jnp.where(due, jnp.minimum(found.gap, earlier), earlier)
        residual, gap = gap, jnp.where(jnp.isfinite(gap), gap, jnp.nan)
        if violation is not None:
            residual = jnp.maximum(residual, (CLOSER if limits.bits == 64 else 1) * violation)
        if not is_norm(penalty):
            # Outside the set of a constraint the objective is infinite.
            pairs = list(zip(at.images, state.copies, strict=True))
            sizes = sum(jnp.maximum(total(a**2), total(y**2)) for a, y in pairs)
            primal = sum(total((a - y) ** 2) for a, y in pairs) / jnp.maximum(sizes, limits.tiny)
            force = loss.pull(at.duals[0])
            largest = jnp.maximum(total(force**2), total((at.pulled - force) ** 2))
            dual = total(at.pulled**2) / jnp.maximum(largest, limits.tiny)
            stationarity = jnp.sqrt(jnp.maximum(primal, dual))
            inside = jnp.isfinite(objective)
            residual = jnp.where(inside & jnp.isfinite(residual), residual, stationarity)
            objective = jnp.where(inside, objective, loss.rows.value(image) + penalty.value(state.copies[1]))
        return dataclasses.replace(
            state,
            next_certificate=jnp.where(due, CERTIFICATE_GROWTH * state.steps, state.next_certificate),
            bound=bound,
            residual=residual,
            gap=gap,
            objective=jnp.minimum(objective, limits.max),
            violation=violation,
            progress=state.progress.after(residual, due),
        )

    def _restart(self, state: PrimalDualState) -> PrimalDualState:
        """The state, restarted if a restart is due."""
        share = state.count / (state.count + 1).astype(state.omega.dtype)
        # The z that was mapped last, recovered from the iteration.
        before = jax.tree.map(
            lambda now, new, first: 2 * new - (now - (1 - share) * first) / share, state.now, state.mapped, state.first
        )
        apart = jax.tree.map(jnp.subtract, before, state.mapped)
        across = sum(total(a * w) for a, w in zip(apart.images, apart.duals, strict=True))
        squared = state.omega * self._length(state, apart) - 2 * across + _dual_length(state, apart) / state.omega
        length = jnp.sqrt(jnp.maximum(squared, 0))
        due = (
            (length <= SUFFICIENT * state.fixed_point_first)
            | ((length <= NECESSARY * state.fixed_point_first) & (length > state.fixed_point))
            | (state.count >= ARTIFICIAL * state.steps)
        )
        way = jax.tree.map(jnp.subtract, state.mapped, state.first)
        omega = jnp.sqrt(state.omega * self._ratio(state, way))
        return dataclasses.replace(
            state,
            now=_choose(due, state.mapped, state.now),
            first=_choose(due, state.mapped, state.first),
            omega=jnp.where(due & (omega > 0) & jnp.isfinite(omega), omega, state.omega),
            count=jnp.where(due, 0, state.count),
            fixed_point=jnp.where(due, jnp.inf, length),
            fixed_point_first=jnp.where(due, length, state.fixed_point_first),
        )

    def _balance(self, state: PrimalDualState) -> PrimalDualState:
        """The state with a new omega from the last step, at iterations 10, 20, 40, ..., so that it settles."""
        before = jax.tree.map(lambda now, new: (now - RELAXATION * new) / (1 - RELAXATION), state.now, state.mapped)
        due = state.steps >= state.next_change
        # Early on the distance from the start says more than the last step.
        since = _choose(state.steps < MOVING, state.first, before)
        ratio = self._ratio(state, jax.tree.map(jnp.subtract, state.mapped, since))
        factor = jnp.clip(ratio / state.omega, 1 / LARGEST_FACTOR, LARGEST_FACTOR)
        return dataclasses.replace(
            state,
            # The iteration in the new metric starts at the point that the old one mapped to.
            now=_choose(due, state.mapped, state.now),
            omega=jnp.where(due, factor * state.omega, state.omega),
            next_change=jnp.where(due, 2 * state.steps, state.next_change),
        )

    def measure(self, problem: Problem, state: PrimalDualState) -> Measure:
        stalled = state.progress.has_stalled(state.residual, PATIENCE)
        return Measure(state.residual, state.objective, state.gap, {"omega": state.omega}, stalled, state.violation)

    def duals(self, problem: Problem, state: PrimalDualState) -> tuple[Array, Array]:
        return state.mapped.duals

    def prox_step(self, problem: Problem, state: PrimalDualState) -> Array:
        return 1 / (state.omega * state.scales[1])

    def extract(self, problem: Problem, state: PrimalDualState) -> Float[Array, "..."]:
        """Without an operator the copy, which has the penalty's zeros and lies in its set."""
        return state.copies[1] if problem.operator is None else state.mapped.x


def _is_constrained(problem: Problem) -> bool:
    """Whether the penalty of `K x` may be infinite, and has a certificate all the same."""
    penalty = problem.penalty
    return problem.operator is not None and has_conjugate(penalty) and not is_norm(penalty)


def _choose(condition: Array, yes: Point, no: Point) -> Point:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _dual_length(state: PrimalDualState, apart: Point) -> Array:
    return total(apart.duals[0] ** 2) / state.scales[0] + total(apart.duals[1] ** 2 / state.scales[1])


@pytree
class SplitAdmm(PrimalDual):
    """The split ADMM for `solve`: `PrimalDual` with the exact x-step, for problems of up to 3,000 unknowns.

    It inverts `Aᵀ A / ||A||² + Kᵀ K / ||K||²` once and multiplies with the inverse in every step.
    """

    def refuses(self, problem: Problem) -> str | None:
        if reason := super().refuses(problem):
            return reason
        size = math.prod(problem.loss.start_shape())
        if size <= CHEAP:
            return None
        return (
            f"SplitAdmm inverts a matrix of all unknowns and accepts up to {CHEAP:,}, given {size:,}; use PrimalDual, "
            "whose steps are products with the operator"
        )

    def _metric(self, normal: Any, x: Array) -> Array:
        """The inverse of a matrix, with a ridge at the rounding level."""

        def column(unit: Array) -> Array:
            return normal(unit.reshape(x.shape)).reshape(-1)

        gram = jax.vmap(column)(jnp.eye(x.size, dtype=x.dtype))
        ridge = 10 * jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(jnp.diag(gram))) * x.size**0.5
        return spd_inverse((gram + gram.T) / 2 + ridge * jnp.eye(x.size, dtype=x.dtype))

    def _inverse(self, state: PrimalDualState, z: Array) -> Array:
        return product(state.metric, z.reshape(-1)).reshape(z.shape)

    def _length(self, state: PrimalDualState, apart: Point) -> Array:
        return state.scales[0] * total(apart.images[0] ** 2) + total(state.scales[1] * apart.images[1] ** 2)
