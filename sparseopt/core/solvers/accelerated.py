"""The monotone accelerated proximal gradient method, with backtracking and restarts.

    minimise over x    F(x) = loss(x) + penalty(x)

    y = x + (t_old - 1) / t (x - x_old)
    z = prox(y - gradient(y) / L, 1 / L)          # L grows until loss(z) <= its quadratic model at y, then shrinks
    x = z if F(z) <= F(x), else x unchanged and t = 1, so that the next step is a plain one from x

The momentum is also dropped when it points uphill, `<y - z, z - x> > 0`. A loss whose image is affine in x needs one
product with its matrix and one with the transpose per iteration: the image of y is a combination of known ones.

Source: Beck and Teboulle, "A fast iterative shrinkage-thresholding algorithm for linear inverse problems", 2009, and
"Fast gradient-based algorithms for constrained total variation image denoising", 2009, for the monotone form;
O'Donoghue and Candes, "Adaptive restart for accelerated gradient schemes", 2015; Scheinberg, Goldfarb and Bai, "Fast
first-order methods for composite convex optimization with backtracking", 2014, for the shrinking L.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.base.types import pytree, static
from sparseopt.core.losses.data import DataLoss
from sparseopt.core.losses.quadratic import is_indefinite, is_smooth, with_image
from sparseopt.core.penalties.protocols import cold_memory, has_conjugate, is_composite, prox_from
from sparseopt.core.problem.certify import Metric, certificate, composite_gap, proximal_gap
from sparseopt.core.problem.problem import Measure, Problem, Progress, ProxSolver, needs
from sparseopt.core.problem.units import Units, units_of

# The factors of L when its quadratic model fails, and after every iteration.
GROWTH, SHRINKAGE = 1.5, 0.97
MOST_BACKTRACKS = 60
# The solve ends when the residual, near the rounding level, has not fallen for this many checks.
PATIENCE = 20


@pytree
class AcceleratedState:
    """The state of `AcceleratedProximalGradient`."""

    x: Any
    image: Any  # of x
    x_old: Any
    image_old: Any
    momentum: Any  # (t_old - 1) / t, the fraction of x - x_old that is added
    t: Any
    indefinite: Any  # whether a `Quadratic` is known not to be convex
    units: Any  # the units of x in which L is one number, and the length of the columns then
    columns: Any  # units in which the columns are about equally long, for the certificate
    curvature: Any  # L
    objective: Any
    scale: Any  # the length of the gradient at 0, for the stationarity residual
    residual: Any
    gap: Any
    progress: Any
    prox_memory: Any  # what the next prox starts from, if the penalty has an `IterativeProx`

    @property
    def step_size(self) -> Array:
        """A step for which the answer is a fixed point of the proximal gradient step."""
        return jnp.min(self.units.of) ** 2 / self.curvature


@pytree
class AcceleratedProximalGradient(ProxSolver):
    """Accelerated proximal gradient descent for `solve`: any smooth loss, any penalty with a prox, no operator.

    F never increases by more than its rounding error. The residual is the relative duality gap if the penalty has a
    conjugate and the loss is least squares, a scalar loss on `A x` or a `Quadratic`, and for a `Composite` penalty with
    the first two losses. Otherwise, and if a dual point cannot be scaled into the conjugate's domain, it is
    `L ||x - prox(x - gradient / L)||` over the length of the gradient at 0, which is 0 at stationary points, and the
    gap is NaN. Both are computed every `cadence` iterations, at the end of a step.

    Attributes:
        step_size: 1 / L, constant; None finds it by backtracking.
        cadence: iterations between two checks. A check costs one product with the transpose, and one prox.
    """

    step_size: Any = None
    cadence: int = static(default=10)
    # Rows and columns of zeros in the matrix of a loss change nothing but the rounding of sums.
    ignores_zeros = True

    def refuses(self, problem: Problem) -> str | None:
        if (reason := needs(self, problem, loss="value gradient")) or is_smooth(problem.loss):
            return reason
        inner = type(getattr(problem.loss, "scalar", problem.loss)).__name__
        return f"AcceleratedProximalGradient needs a smooth loss, given {inner}, which has kinks; use PrimalDual"

    @property
    def stride(self) -> int:
        return self.cadence

    def init(self, problem: Problem, start: Float[Array, "..."]) -> AcceleratedState:
        loss, start = with_image(problem.loss), jnp.asarray(start)
        image, zero, one = loss.image(start), jnp.zeros_like(start), jnp.ones((), start.dtype)
        units = columns = Units(jnp.ones_like(start), one)
        if _is_data(loss) and has_conjugate(problem.penalty):
            # One step per entry needs a penalty that accepts them, and finds another answer if there are many.
            units = columns = units_of(problem, start)
        if self.step_size is not None or not getattr(problem.penalty, "separable", False):
            # One step for all entries, set by the longest column.
            units = Units(jnp.ones_like(start), columns.size / jnp.min(columns.of))
        at_zero = units.of * loss.gradient_at(zero, loss.image_of_zero(zero, image))
        if self.step_size is None:
            here = units.of * loss.gradient_at(start, image)
            # A first guess at L from below: one step of the power method along the gradient, by a finite difference.
            size = jnp.linalg.norm(here.reshape(-1))
            probe = units.of * here / jnp.where(size > 0, size, 1)
            there, share = loss.image(start - probe), one
            if _is_data(loss):
                # Where an exponential loss is not yet far steeper.
                share = (1 / jnp.maximum(jnp.max(jnp.abs(there - image), initial=0), 1)).astype(start.dtype)
                there = image + share * (there - image)
            curvature = 2 * loss.divergence(start - share * probe, there, start, image) / share**2
            curvature = jnp.where(jnp.isfinite(curvature) & (curvature > 0), curvature, 1)
        else:
            curvature = 1 / jnp.asarray(self.step_size, start.dtype)
        far = jnp.full((), jnp.inf, start.dtype)
        return AcceleratedState(
            x=start,
            image=image,
            x_old=start,
            image_old=image,
            momentum=0 * one,
            t=one,
            indefinite=is_indefinite(problem.loss.hessian) if self._has_quadratic_gap(problem) else jnp.asarray(False),
            units=units,
            columns=columns,
            curvature=curvature.astype(start.dtype),
            objective=(loss.value_at(start, image) + problem.penalty.value(start)).astype(start.dtype),
            scale=jnp.linalg.norm(at_zero.reshape(-1)),
            residual=far,
            gap=far * jnp.nan,
            progress=Progress(far, jnp.zeros((), jnp.int32)),
            prox_memory=cold_memory(problem.penalty, start),
        )

    def _has_quadratic_gap(self, problem: Problem) -> bool:
        return has_conjugate(problem.penalty) and hasattr(problem.loss, "scaled_slack")

    def step(self, problem: Problem, state: AcceleratedState) -> AcceleratedState:
        problem = dataclasses.replace(problem, loss=with_image(problem.loss))
        state = jax.lax.fori_loop(0, self.cadence, lambda _, now: self._advance(problem, now), state)
        return self._check(problem, state)

    def _advance(self, problem: Problem, state: AcceleratedState) -> AcceleratedState:
        loss, penalty = problem.loss, problem.penalty
        y, affine = state.x + state.momentum * (state.x - state.x_old), getattr(loss, "affine_image", True)
        image_y = state.image + state.momentum * (state.image - state.image_old) if affine else loss.image(y)
        gradient = loss.gradient_at(y, image_y)
        unit, squares = state.units.of, state.units.of**2
        eps = jnp.finfo(y.dtype).eps
        attempts = 1 if self.step_size is not None else 1 + MOST_BACKTRACKS

        def attempt(curvature: Array, memory: Any) -> tuple[Array, Any, Array, Array, Any]:
            z, memory = _step(problem, y, gradient, squares / curvature, memory)
            image = loss.image(z)
            length = jnp.sum(((z - y) / unit) ** 2)
            # A step near the rounding error of y says nothing about the curvature.
            lost = length <= (100 * eps) ** 2 * jnp.sum((y / unit) ** 2)
            modelled = 0.5 * curvature * length * (1 + 1e3 * eps)
            return z, image, lost | (loss.divergence(z, image, y, image_y) <= modelled), lost, memory

        def failing(carry: tuple) -> Array:
            _, (_, _, holds, _, _), count = carry
            return ~holds & (count < attempts)

        def search(carry: tuple) -> tuple:
            curvature, (*_, memory), count = carry
            curvature = jnp.where(count > 0, GROWTH * curvature, curvature)
            return curvature, attempt(curvature, memory), count + 1

        # The loop makes the first attempt too: traced twice, it would be compiled twice.
        no = jnp.zeros((), bool)
        carry = (state.curvature, (y, image_y, no, no, state.prox_memory), jnp.zeros((), jnp.int32))
        curvature, (z, image, _, lost, memory), _ = jax.lax.while_loop(failing, search, carry)
        objective = loss.value_at(z, image) + penalty.value(z)
        # From a start outside a constraint's set, at +inf, every step is accepted; so is a NaN, which ends the solve.
        taken = ~(objective > state.objective + 8 * eps * jnp.abs(state.objective))
        uphill = jnp.sum((y - z) * (z - state.x) / squares) > 0
        again = ~taken | uphill
        following = 1.0 if self.step_size is not None else jnp.where(lost, 1, SHRINKAGE)
        t = (1 + jnp.sqrt(1 + 4 * following * state.t**2)) / 2
        momentum = jnp.where(again, 0, (state.t - 1) / t)

        def choose(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, old)

        return dataclasses.replace(
            state,
            x=choose(z, state.x),
            image=choose(image, state.image),
            x_old=state.x,
            image_old=state.image,
            momentum=momentum,
            t=jnp.where(again, 1, t),
            curvature=curvature * following,
            objective=choose(objective, state.objective),
            prox_memory=memory,
        )

    def _check(self, problem: Problem, state: AcceleratedState) -> AcceleratedState:
        loss, penalty, x = problem.loss, problem.penalty, state.x
        gradient = loss.gradient_at(x, state.image)
        curvature = state.curvature
        close, memory = _step(problem, x, gradient, state.units.of**2 / curvature, state.prox_memory)
        apart = (x - close) / state.units.of
        tiny = jnp.finfo(x.dtype).tiny
        residual = curvature * jnp.linalg.norm(apart.reshape(-1)) / jnp.maximum(state.scale, tiny)
        # A step that has vanished moves nothing, wherever x is.
        residual = jnp.where(jnp.min(state.units.of) ** 2 / curvature > 0, residual, jnp.inf)
        gap = jnp.full_like(residual, jnp.nan)
        if has_conjugate(penalty) and _is_data(loss):
            gap = certificate(problem, x, state.image, loss.rows.gradient(state.image), None, Metric(state.columns)).gap
        elif is_composite(penalty) and _is_data(loss):
            gap = composite_gap(problem, x, state.image, penalty.dual(memory), curvature)
        elif self._has_quadratic_gap(problem):
            gap = proximal_gap(loss, penalty, x, state.image, gradient, state.objective)
            # The conjugate of a loss that is not convex is infinite; nor is one convex that is far below 0.
            far = state.objective < -1e3 * jnp.finfo(x.dtype).eps * loss.value(jnp.zeros_like(x))
            gap, residual = (
                jnp.where(state.indefinite | far, bad, now) for bad, now in ((jnp.nan, gap), (jnp.inf, residual))
            )
        gap = jnp.where(jnp.isfinite(gap), gap, jnp.nan)
        residual = jnp.where(jnp.isnan(gap), residual, gap)
        progress = state.progress.after(residual)
        return dataclasses.replace(state, residual=residual, gap=gap, progress=progress, prox_memory=memory)

    def measure(self, problem: Problem, state: AcceleratedState) -> Measure:
        # An iterative prox has a gap near eps, so its error, and the residual, is near the root of eps.
        level = None if state.prox_memory is None else float(jnp.finfo(state.residual.dtype).eps) ** 0.5
        stalled = state.progress.has_stalled(state.residual, PATIENCE, level)
        return Measure(state.residual, state.objective, state.gap, {"curvature": state.curvature}, stalled)


def _is_data(loss: Any) -> bool:
    return isinstance(loss, DataLoss)


def _step(problem: Problem, x: Array, gradient: Array, steps: Array, memory: Any) -> tuple[Array, Any]:
    """The proximal gradient step; a penalty whose entries are coupled gets one number."""
    step = steps if getattr(problem.penalty, "separable", False) else jnp.max(steps)
    return prox_from(problem.penalty, x - steps * gradient, step, memory)


# The factors of the concavity at the first level of both paths, and the levels of a path.
NEARLY_CONVEX, VERY_CONCAVE, LEVELS = 1 / 30, 10.0, 10


@pytree
class GraduatedState(AcceleratedState):
    """The state of `GraduatedProximalGradient`."""

    first: Any  # the start of both paths
    end: Any  # of the first path
    end_objective: Any
    level: Any  # the number of steps so far


@pytree
class GraduatedProximalGradient(AcceleratedProximalGradient):
    """`AcceleratedProximalGradient` for a concave penalty, whose answer depends less on where it starts.

    The penalty needs `with_concavity(factor)`, a copy with the same slope at 0 and its concavity times the factor. Two
    paths lead from the start to the problem's own penalty, one from a penalty that is nearly convex and one from a very
    concave one, one step at each level. The solve then starts at the better of their ends. Until then the
    residual is +inf.

    Source: Blake and Zisserman, "Visual reconstruction", 1987, for graduated concavity; Mazumder, Friedman and Hastie,
    "SparseNet: coordinate descent with nonconvex penalties", 2011, for paths from L1 to MCP.
    """

    def init(self, problem: Problem, start: Float[Array, "..."]) -> GraduatedState:
        state = super().init(problem, start)
        level = jnp.zeros((), jnp.int32)
        return GraduatedState(**vars(state), first=state.x, end=state.x, end_objective=state.objective, level=level)

    def step(self, problem: Problem, state: Any) -> Any:
        level, kind = state.level, state.x.dtype
        left = 1 - (level % LEVELS + 1).astype(kind) / LEVELS
        factor = jnp.where(level < LEVELS, NEARLY_CONVEX, VERY_CONCAVE).astype(kind) ** left
        graduating = level < 2 * LEVELS
        penalty = problem.penalty.with_concavity(jnp.where(graduating, factor, 1))
        # The first path has ended: it starts again. The second has: the better end is the start.
        again, ended = level == LEVELS, level == 2 * LEVELS
        better = again | (ended & (state.objective < state.end_objective))
        end = jnp.where(better, state.x, state.end)
        state = dataclasses.replace(
            state, end=end, end_objective=jnp.where(better, state.objective, state.end_objective)
        )
        start = jnp.where(again, state.first, end)
        plain = {field.name: getattr(state, field.name) for field in dataclasses.fields(AcceleratedState)}
        plain = jax.lax.cond(
            again | ended, lambda: vars(AcceleratedProximalGradient.init(self, problem, start)), lambda: plain
        )
        # At a new level the objective of the last one says nothing.
        plain["objective"] = jnp.where(graduating, jnp.inf, plain["objective"])
        state = dataclasses.replace(state, **plain, level=level + 1)
        return super().step(dataclasses.replace(problem, penalty=penalty), state)

    def measure(self, problem: Problem, state: Any) -> Measure:
        graduating = state.level <= 2 * LEVELS
        objective = with_image(problem.loss).value_at(state.x, state.image) + problem.penalty.value(state.x)
        now = super().measure(problem, state)
        return now._replace(
            residual=jnp.where(graduating, jnp.inf, now.residual),
            objective=jnp.where(graduating, objective, now.objective),
            stalled=now.stalled & ~graduating,
        )
