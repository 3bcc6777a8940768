"""Floor 2.75: the implicit derivative of a solution in every leaf of its problem.

At a solution the active set (which rows of `operator x` the penalty holds at its kink, which entries a pattern keeps)
is locally constant almost everywhere. There the optimality conditions are smooth equations, and the implicit function
theorem gives the derivative by one linear solve; the iterations are never unrolled.

Without an operator, with `T = prox(x - t gradient(x), t)`, `J` the Jacobian of the prox, `H` the Hessian of the loss
and `p` the movement of the prox with its own parameters, `dx = T'(x) dx + ...` becomes the symmetric system

    (J - J² + t J H J) z = J (p - t H p - t dgradient),        dx = p + J z

which lives on the support alone where J is a mask. With an operator K, dual u, `v = K x + t u` and `N = I - J`,

    H dx + (1/t) Kᵀ N s = -dgradient - dKᵀ u + (1/t) Kᵀ p
    (1/t) N K dx - (1/t) N J s = (1/t) N (p - dK x)

For L1 behind an operator J is a mask and this is the projection onto the null space of the rows that are zero. A loss
that is not smooth adds one more such block. Where the active set changes, at a tie, the answer is the derivative on one
of the two sides; where the solution is not unique it is that of the shortest change.

Source: for fixed points of the proximal gradient step, Bertrand et al., "Implicit differentiation for fast
hyperparameter selection in non-smooth convex learning", JMLR 2022; for the linear solves Paige and Saunders, "Solution
of sparse indefinite systems of linear equations", 1975.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from sparseopt.core.losses import is_smooth
from sparseopt.core.matrices import norm_estimate
from sparseopt.core.operators import or_identity

FloatArray = Float[Array, "..."]
# Steps of a linear solve: this many per unknown, at most this many in all.
PER_UNKNOWN, MOST_STEPS = 8, 20_000


class Found(NamedTuple):
    """What a solver knows about a solution besides its value; None for what it does not know."""

    loss_dual: Any  # the subgradient of a loss `f(A x)` at A x
    dual: Any  # that of the penalty at `operator x`
    step_size: Any  # one for which the solution is a fixed point of the proximal gradient step


@jax.custom_jvp
def attached(problem: Any, value: FloatArray, objective: Array, found: Found) -> tuple[FloatArray, Array]:
    """`value` and `objective`, with the derivatives of the solution in the leaves of the problem."""
    del problem, found
    return value, objective


@attached.defjvp
def _attached_jvp(primals: tuple, tangents: tuple) -> tuple:
    problem, x, objective, found = primals
    moved = tangents[0]
    smooth = is_smooth(problem.loss)
    if problem.operator is not None or not smooth:
        if found.dual is None or not (smooth or found.loss_dual is not None):
            raise TypeError(
                "this solver returns no dual point, which derivatives of a solution with an operator or with a loss "
                "that is not smooth need; solve with PrimalDual or SplitAdmm"
            )
        tangent, change = _saddle_tangent(problem, moved, x, found)
    else:
        tangent, change = _fixed_point_tangent(problem, moved, x, found.step_size)
    return (x, objective), (tangent.astype(x.dtype), change.astype(objective.dtype))


def _along(function: Callable[[Any], Any], tree: Any, moved: Any) -> Any:
    """The derivative of a function of a pytree along a movement of its leaves."""
    return jax.jvp(function, (tree,), (moved,))[1]


def _fixed_point_tangent(problem: Any, moved: Any, x: FloatArray, step: Any) -> tuple[FloatArray, Array]:
    loss, penalty = problem.loss, problem.penalty
    gradient, hessian = jax.linearize(loss.gradient, x)
    turned = _along(lambda loss: loss.gradient(x), loss, moved.loss)
    if step is None:
        # For a convex penalty every step serves; for others it must be short enough.
        step = 0.9 / jnp.maximum(norm_estimate(hessian, lambda e: e, x) ** 2, jnp.finfo(x.dtype).tiny)
    point = x - step * gradient
    _, jacobian = jax.linearize(lambda point: penalty.prox(point, step), point)
    pushed = _along(lambda penalty: penalty.prox(point, step), penalty, moved.penalty)

    def system(z: FloatArray) -> FloatArray:
        on_support = jacobian(z)
        return on_support - jacobian(on_support) + step * jacobian(hessian(on_support))

    z = _solved(system, jacobian(pushed - step * hessian(pushed) - step * turned))
    dx = pushed + jacobian(z)
    return dx, _value_along(loss, moved.loss, x, dx) + _value_along(penalty, moved.penalty, x, dx)


def _value_along(term: Any, term_moved: Any, x: FloatArray, dx: FloatArray) -> Array:
    """The derivative of `term.value(x)` where both move."""
    return jax.jvp(lambda term, x: term.value(x), (term, x), (term_moved, dx.astype(x.dtype)))[1]


class _Block(NamedTuple):
    """One term `h(K x)`, linearised at the solution."""

    mv: Any
    rmv: Any
    copy: Any  # K x as the prox gives it, at its kinks and inside its set exactly
    jacobian: Any
    step: Any
    pushed: Any  # p
    rows_moved: Any  # dK x
    pulled_moved: Any  # dKᵀ u
    scale: Any  # of the unknown s, so that the system is balanced


def _saddle_tangent(problem: Any, moved: Any, x: FloatArray, found: Found) -> tuple[FloatArray, Array]:
    loss, penalty = problem.loss, problem.penalty
    operator, operator_moved = or_identity(problem.operator, x), or_identity(moved.operator, x)
    tiny = jnp.finfo(x.dtype).tiny
    nothing = jnp.zeros_like(x)
    if is_smooth(loss):
        _, hessian = jax.linearize(loss.gradient, x)
        turned = _along(lambda loss: loss.gradient(x), loss, moved.loss)
        curvature = norm_estimate(hessian, lambda e: e, x) ** 2
    else:
        hessian, turned, curvature = (lambda _: nothing), nothing, jnp.ones((), x.dtype)

    def block(maps: Any, maps_moved: Any, term: Any, term_moved: Any, dual: FloatArray) -> _Block:
        rows = maps.mv(x)
        step = jnp.sqrt(jnp.maximum(jnp.sum(rows**2), tiny) / jnp.maximum(jnp.sum(dual**2), tiny))
        step = jnp.clip(step, 1e-6, 1e6)
        point = rows + step * dual
        copy, jacobian = jax.linearize(lambda point: term.prox(point, step), point)
        pushed = _along(lambda term: term.prox(point, step), term, term_moved)
        size = jnp.maximum(norm_estimate(maps.mv, maps.rmv, x, 10), tiny)
        return _Block(
            maps.mv,
            maps.rmv,
            copy,
            jacobian,
            step,
            pushed,
            _along(lambda maps: maps.mv(x), maps, maps_moved),
            _along(lambda maps: maps.rmv(dual), maps, maps_moved),
            step * curvature / size,
        )

    blocks = [block(operator, operator_moved, penalty, moved.penalty, found.dual)]
    if not is_smooth(loss):
        rows, along_rows = jax.jvp(lambda loss: loss.rows, (loss,), (moved.loss,))
        matrix, matrix_moved = or_identity(loss.matrix, x), or_identity(moved.loss.matrix, x)
        blocks.append(block(matrix, matrix_moved, rows, along_rows, found.loss_dual))

    def system(unknowns: tuple) -> tuple:
        dx, *parts = unknowns
        top, rest = hessian(dx), []
        for at, s in zip(blocks, parts, strict=True):
            free = s - at.jacobian(s)
            weight = at.scale / at.step
            top = top + weight * at.rmv(free)
            image = at.mv(dx) - at.scale * at.jacobian(s)
            rest.append(weight * (image - at.jacobian(image)))
        return (top, *rest)

    right, rest = -turned, []
    for at in blocks:
        right = right - at.pulled_moved + at.rmv(at.pushed) / at.step
        image = at.pushed - at.rows_moved
        rest.append(at.scale / at.step * (image - at.jacobian(image)))
    dx = _solved(system, (right, *rest))[0]
    objective = _value_along(penalty, moved.penalty, blocks[0].copy, blocks[0].mv(dx) + blocks[0].rows_moved)
    if is_smooth(loss):
        return dx, objective + _value_along(loss, moved.loss, x, dx)
    return dx, objective + _value_along(rows, along_rows, blocks[1].copy, blocks[1].mv(dx) + blocks[1].rows_moved)


def _solved(system: Callable[[Any], Any], right: Any) -> Any:
    """The solution of a symmetric linear system on pytrees, itself linear and transposable in `right`."""
    flat, unravel = ravel_pytree(right)

    def matvec(v: Array) -> Array:
        return ravel_pytree(system(unravel(v)))[0]

    return unravel(jax.lax.custom_linear_solve(matvec, flat, solve=_minres, symmetric=True))


def _minres(matvec: Callable[[Array], Array], b: Float[Array, " n"]) -> Float[Array, " n"]:
    """Paige and Saunders' MINRES for symmetric, possibly singular and indefinite, consistent systems.

    It stops when the residual is a few eps of the length of the right-hand side, or at the step limit.
    """
    limits = jnp.finfo(b.dtype)
    length = jnp.linalg.norm(b)

    class Turn(NamedTuple):
        x: Array
        v_old: Array
        v: Array
        w_old: Array
        w: Array
        beta: Array
        phi: Array  # the length of the residual
        cosine: Array
        sine: Array
        dbar: Array
        epsilon: Array
        largest: Array  # a lower bound on the norm of the matrix
        steps: Array

    def going(at: Turn) -> Array:
        return (at.phi > 4 * limits.eps * length) & (at.steps < min(PER_UNKNOWN * b.size + 20, MOST_STEPS))

    def turn(at: Turn) -> Turn:
        product = matvec(at.v) - at.beta * at.v_old
        alpha = jnp.vdot(at.v, product)
        product = product - alpha * at.v
        beta = jnp.linalg.norm(product)
        delta = at.cosine * at.dbar + at.sine * alpha
        gbar = at.sine * at.dbar - at.cosine * alpha
        gamma = jnp.hypot(gbar, beta)
        # A direction in the null space of a singular system, along which the solution would grow without bound.
        flat = gamma <= limits.eps**0.6 * at.largest
        gamma = jnp.where(flat, jnp.inf, gamma)
        cosine, sine = gbar / gamma, beta / gamma
        w = (at.v - at.epsilon * at.w_old - delta * at.w) / gamma
        # An invariant subspace: nothing is left to gain.
        ended = beta <= limits.eps * jnp.maximum(jnp.abs(alpha), limits.tiny)
        return Turn(
            x=at.x + cosine * at.phi * w,
            v_old=at.v,
            v=product / jnp.maximum(beta, limits.tiny),
            w_old=at.w,
            w=w,
            beta=beta,
            phi=jnp.where(ended | flat, 0, sine * at.phi),
            cosine=cosine,
            sine=sine,
            dbar=-at.cosine * beta,
            epsilon=at.sine * beta,
            largest=jnp.maximum(at.largest, jnp.hypot(alpha, beta)),
            steps=at.steps + 1,
        )

    nothing, zero = jnp.zeros_like(b), jnp.zeros((), b.dtype)
    start = Turn(
        x=nothing,
        v_old=nothing,
        v=b / jnp.maximum(length, limits.tiny),
        w_old=nothing,
        w=nothing,
        beta=zero,
        phi=length,
        cosine=zero - 1,
        sine=zero,
        dbar=zero,
        epsilon=zero,
        largest=zero,
        steps=jnp.zeros((), jnp.int32),
    )
    return jax.lax.while_loop(going, turn, start).x
