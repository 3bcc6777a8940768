"""Total variation on a graph, and its higher orders, as a penalty of the core; its prox is a trend filter.

    value(x) = sum_i w_i |(Δ^(k+1) x)_i|        isotropic: w sum_j ||(D x)_j||_2 over the differences of every node j
    prox(x, step) = argmin over u    1/2 ||u - x||² + step * value(u)

Source: Rudin, Osher and Fatemi, "Nonlinear total variation based noise removal algorithms", 1992; for proxes that are
inexact and warm-started, Schmidt, Le Roux and Bach, "Convergence rates of inexact proximal-gradient methods", 2011.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseopt.core.base.arguments import positive_number, whole_number
from sparseopt.core.base.types import FloatArray, Scalar, is_traced, pytree, static
from sparseopt.core.operators.differences import Difference
from sparseopt.core.penalties.entries import L1
from sparseopt.core.penalties.groups import GroupL2
from sparseopt.core.problem.problem import Start, Status
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.method import MOST_STEPS
from sparseopt.trend.base.penalties import check_parameters, on_rows, require_penalty
from sparseopt.trend.base.signal import geometry_at
from sparseopt.trend.methods.choice import AUTO
from sparseopt.trend.solver import TrendSolver, trend_solver

# The error of a prox is at most this fraction of the last change of the prox, so that it vanishes as a solve converges;
# but its gap need not go below this many eps.
CLOSER, LEAST_TOL = 0.2, 10.0


@pytree
class ProxMemory:
    """The final state of a prox of `TotalVariation`: the start of the next one, and its accuracy."""

    u: Any  # the prox
    # On the rows, no entry larger than its weight; `Δᵀ dual` is a subgradient of the value at u, up to the gap.
    dual: Any
    rho: Any  # of its iterations, at a step of 1; 0 before the first
    tol: Any  # the gap for the next prox to reach, if it is less than the penalty's tolerance
    # The relative duality gap. With P the objective, u lies within `sqrt(2 gap P)` of the exact prox, in Euclidean
    # norm.
    gap: Any
    steps: Any  # the number of its iterations
    all_steps: Any  # the number of iterations of all proxes so far
    status: Any  # a `Status`: CONVERGED if the gap reached its tolerance


@pytree
class Rows:
    """`Δ^(k+1)` for arrays in the caller's shape."""

    differences: Difference
    shape: tuple[int, ...] = static()
    channels: tuple[int, ...] = static()

    def mv(self, x: FloatArray) -> FloatArray:
        return self.differences.mv(x.reshape(*self.differences.in_shape, *self.channels))

    def rmv(self, e: FloatArray) -> FloatArray:
        return self.differences.rmv(e).reshape(self.shape)


@pytree(eq=False)
class TotalVariation:
    """`sum_i w_i |(Δ^(k+1) x)_i|` of a signal x on a graph: the penalty of the trend filter, on x itself.

    Order 0 is the total variation: on a grid the anisotropic one, with `axis=0` the isotropic one, the sum of the
    lengths of the gradient. The prox is the fit of `trend_filter(x, graph, L1(step * weight), order)`, to the relative
    duality gap `tol`. `prox_from` starts where the last prox ended, with an error of at most a fifth of the last
    change; its memory reports its accuracy (see `ProxMemory`).

    x has the shape `[n]` in the graph's node order, or `[*shape]` on a grid, or either with trailing channels, which
    are penalised separately. The host work is done once, here. All methods run under `jit` and `vmap`. The prox has
    derivatives in x, step and weight, from the optimality conditions of the fit.

    `AcceleratedProximalGradient` certifies its answer with a duality gap if the loss is a `DataLoss`: the dual point of
    the last prox is one for the whole problem. In float32 that gap ends near 1e-4 or 1e-5. For other losses CONVERGED
    means that the optimality conditions hold to the tolerance. The penalty is convex, but not a `Norm`, since
    projecting onto its dual ball is expensive; nor is it separable. For a loss with kinks or a cheap loss (a product
    costs less than about 20 iterations of a prox), use `L1` with the operator `graph.matrix(order + 1)`: deblurring
    then took a fifth of the time.

    Args:
        graph: the graph of x, with at least one edge.
        weight: w >= 0, one number or one for each row of `graph.matrix(order + 1)`; a leaf.
        order: k >= 0; 0 favours piecewise constants, 1 piecewise linear signals.
        tol: the relative duality gap of a prox; a leaf.
        max_steps: the step limit of a prox.
        method: as in `trend_solver`.
        dtype: of the iterations, float32 or float64; None for JAX's default.
        channels: the length of the last axis of x; None for an x without channels.
        axis: None for L1; or an axis of `GroupL2`, with one weight: 0 for isotropic total variation on a grid, -1 to
            couple the channels, (0, -1) for both.
        solver: the solver of an earlier TotalVariation, instead of graph, order, method, dtype and channels. JAX and
            `dataclasses.replace` use it.

    Example:
        >>> penalty = so.TotalVariation(so.Graph.chain(6), 0.6)
        >>> penalty.prox(jnp.array([0.1, -0.1, 0.0, 5.1, 4.9, 5.0]), step=0.5).round(3)
        Array([0.1, 0.1, 0.1, 4.9, 4.9, 4.9], dtype=float32)
    """

    weight: Any
    tol: Any
    solver: TrendSolver
    max_steps: int = static()
    axis: int | tuple[int, ...] | None = static()

    def __init__(
        self,
        graph: Graph | None = None,
        weight: Any = 1.0,
        order: int = 0,
        tol: Any = 1e-6,
        max_steps: int = 20_000,
        method: str = AUTO,
        dtype: Any = None,
        channels: int | None = None,
        *,
        axis: int | tuple[int, ...] | None = None,
        solver: TrendSolver | None = None,
    ) -> None:
        if solver is None:
            geometry, order = geometry_at(graph, order)
            penalty = _penalty(weight, axis)
            require_penalty(penalty, geometry, order, channels is not None)
            if not is_traced(weight):
                check_parameters(penalty, np.dtype(np.float64), geometry.count(order + 1))
            if not is_traced(tol):
                positive_number("tol", tol)
            max_steps = whole_number("max_steps", max_steps, 1, MOST_STEPS)
            solver = trend_solver(graph, order, method, dtype, channels)
        elif (graph, order, method, dtype, channels) != (None, 0, AUTO, None, None):
            raise ValueError(
                "another graph, order, method, dtype or number of channels needs another plan: make a new "
                "TotalVariation, without a solver"
            )
        fields = {"weight": weight, "tol": tol, "solver": solver, "max_steps": max_steps}
        fields["axis"] = None if axis is None else GroupL2(1.0, axis).axis
        for name, given in fields.items():
            object.__setattr__(self, name, given)

    def value(self, x: FloatArray) -> Float[Array, ""]:
        inner, rows = self.parts(x)
        return inner.value(rows.mv(x))

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        return self.prox_from(x, step, self.memory(x))[0]

    def memory(self, x: FloatArray) -> ProxMemory:
        kind, rows = _wide(x), jax.eval_shape(self.parts(x)[1].mv, x)
        far, none = jnp.full((), jnp.inf, kind), jnp.zeros((), jnp.int32)
        return ProxMemory(
            u=jnp.full_like(x, jnp.inf, kind),
            dual=jnp.zeros(rows.shape, kind),
            rho=0 / far,
            tol=far,
            gap=far,
            steps=none,
            all_steps=none,
            status=jnp.full((), Status.MAX_STEPS, jnp.int32),
        )

    def prox_from(self, x: FloatArray, step: Scalar, memory: ProxMemory) -> tuple[FloatArray, ProxMemory]:
        """The prox, started where the last one ended; the memory has no derivatives."""
        kind = _wide(x)
        inner, rows = self.parts(x)
        step, weight = jnp.asarray(step, kind), jnp.asarray(self.weight)
        # The weights are proportional to the step, and so are the dual and its rho.
        dual = step * memory.dual
        start = Start(x - rows.rmv(dual), dual, step * memory.rho)
        tol = jnp.minimum(memory.tol, self.tol)
        found = self.solver.fit_laid_out(x, _penalty(step * weight, self.axis), None, tol, self.max_steps, start)
        u, size = found.value, jnp.where(step > 0, step, 1)
        # A gap of g leaves an error of sqrt(2 g P).
        limits, moved = jnp.finfo(kind), jnp.sum((u - memory.u) ** 2)
        enough = CLOSER**2 * moved / (2 * jnp.maximum(found.objective, limits.tiny))
        after = ProxMemory(
            u=u,
            dual=inner.project_dual(found.dual.astype(kind) / size),
            rho=memory.rho if found.state is None else found.state.rho / size,
            tol=jnp.maximum(enough, LEAST_TOL * limits.eps),
            gap=found.gap,
            steps=found.steps,
            all_steps=memory.all_steps + found.steps,
            status=found.status,
        )
        after = jax.tree.map(lambda new, old: jax.lax.stop_gradient(new).astype(old.dtype), after, memory)
        return u.astype(x.dtype), after

    def parts(self, x: FloatArray) -> tuple[L1 | GroupL2, Rows]:
        """The penalty on the rows, and `Δ^(k+1)` for arrays like x."""
        solver = self.solver
        if x.shape not in solver.shapes:
            raise ValueError(
                f"this TotalVariation needs an x of shape {' or '.join(map(str, solver.shapes))}, given {x.shape}; "
                "give the number of channels of x when it is made"
            )
        inner = on_rows({solver.order: _penalty(self.weight, self.axis)}, solver.geometry, _wide(x), bool(solver.axes))
        return inner, Rows(solver.plans[0].ground.highest, x.shape, solver.axes)

    def dual(self, memory: ProxMemory) -> FloatArray:
        return memory.dual


def _penalty(weight: Any, axis: int | tuple[int, ...] | None) -> L1 | GroupL2:
    return L1(weight) if axis is None else GroupL2(weight, axis)


def _wide(x: FloatArray) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
