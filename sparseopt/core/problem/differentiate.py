"""The implicit derivative of a solution with respect to every leaf of its problem, by one linear solve.

Where the active set (the rows of `operator x` that the penalty holds at its kink, the entries that a pattern keeps) is
locally constant, which is almost everywhere, the optimality conditions are smooth equations. At a tie the answer is a
one-sided derivative; if the solution is not unique, it is the one with the shortest change.

Without an operator, with `T = prox(x - t gradient(x), t)`, `J` the Jacobian of the prox, `H` the Hessian of the loss
and `p` the movement of the prox with its own parameters, the derivative of `x = T(x)` is

    dx - J (dx - t H dx) = r = p - t J dgradient

With an operator K, dual u, and `K x = prox(K x + t u, t)`, `N = I - J`,

    H dx + Kᵀ du = r = -dgradient - dKᵀ u
    N K dx - t J du = q = p - N dK x

A loss that is not smooth adds one more such block, for its dual. Second and higher derivatives differentiate the linear
systems, at an x and a u that move with the problem. Both systems are solved through symmetric ones,

    (J - J² + t J H J) z = J (r + N r - t H N r),        dx = N r + J z

    H dx + (1/t) Kᵀ N s = r + (1/t) Kᵀ q
    (1/t) N K dx - (1/t) N J s = (1/t) N q,        du = (N s - q) / t

and so are their transposes. If H is the identity, dx is eliminated, and conjugate gradients need a tenth of the time;
with r the first right-hand side,

    (N K Kᵀ N + t N J) s = N (K r - q),        dx = r - Kᵀ N s

If K is the first difference of a graph, J a mask and H diagonal, x is constant on the pieces that zero rows join,
and on each dx is the sum of r over the sum of H.

Source: Bertrand et al., "Implicit differentiation for fast hyperparameter selection in non-smooth convex learning",
JMLR 2022; for the linear solves Hestenes and Stiefel, 1952, and Paige and Saunders, "Solution of sparse indefinite
systems of linear equations", 1975.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from sparseopt.core.base.types import FloatArray
from sparseopt.core.losses.data import DataLoss
from sparseopt.core.losses.quadratic import is_smooth
from sparseopt.core.operators.component_means import piece_labels, piece_means
from sparseopt.core.operators.differences import Difference
from sparseopt.core.operators.maps import or_identity
from sparseopt.core.operators.matrices import norm_estimate
from sparseopt.core.penalties.protocols import has_conjugate, is_norm

# The step limit of a linear solve, per unknown and in total.
PER_UNKNOWN, MOST_STEPS = 8, 20_000
# The residual at which conjugate gradients stop, and what rounding allows in eps, relative to the right-hand side. The
# solver's own residual moves the active set by more.
ENOUGH, ROUNDING = 1e-9, 8


class Found(NamedTuple):
    """What a solver knows about a solution besides its value; None if unknown."""

    loss_dual: Any  # the subgradient of a loss `f(A x)` at A x
    dual: Any  # the subgradient of the penalty at `operator x`
    step_size: Any  # one at which the solution is a fixed point, of the proximal gradient step or of the penalty's prox


@jax.custom_jvp
def attach(problem: Any, value: FloatArray, objective: Array, found: Found) -> tuple[FloatArray, Array, Found]:
    """`value`, `objective` and the duals in `found` with their derivatives with respect to the problem's leaves.

    The duals have derivatives only if the others need them.
    """
    return value, objective, found


@attach.defjvp
def _attach_jvp(primals: tuple, tangents: tuple) -> tuple:
    problem, *answer = primals
    # A derivative of this derivative sees the answer as the function of the problem that it is.
    x, objective, found = attach(problem, *answer)
    tangent, change, turned = _tangent(problem, tangents[0], x, found)
    still = jax.tree.map(jnp.zeros_like, found)
    still = still._replace(**{name: turn.astype(getattr(found, name).dtype) for name, turn in turned.items()})
    return (x, objective, found), (tangent.astype(x.dtype), change.astype(objective.dtype), still)


def _along(function: Callable[[Any], Any], tree: Any, moved: Any) -> Any:
    """The derivative of a function of a pytree along a tangent of its leaves."""
    return jax.jvp(function, (tree,), (moved,))[1]


def _value_along(term: Any, term_moved: Any, x: FloatArray, dx: FloatArray) -> Array:
    """The derivative of `term.value(x)` if both move."""
    return _along(lambda both: both[0].value(both[1]), (term, x), (term_moved, dx.astype(x.dtype)))


class _Term(NamedTuple):
    """One term `h(K x)`, linearised at the solution."""

    mv: Any
    rmv: Any
    copy: Any  # K x as the prox returns it, exactly at its kinks and inside its set
    jacobian: Any
    step: Any
    pushed: Any  # p
    rows_moved: Any  # dK x
    pulled_moved: Any  # dKᵀ u

    @property
    def wanted(self) -> FloatArray:
        """`p - N dK x`, the right-hand side of this term's equation."""
        return self.pushed - self.free(self.rows_moved)

    def free(self, e: FloatArray) -> FloatArray:
        """`N e`."""
        return e - self.jacobian(e)


def _linearise(given: Any, given_moved: Any, term: Any, term_moved: Any, x: FloatArray, dual: Any, step: Any) -> _Term:
    """`term(given x)` with its dual, at a step for which `given x` is the prox; None uses a balanced step."""
    maps, maps_moved = or_identity(given, x), or_identity(given_moved, x)
    rows, tiny = maps.mv(x), jnp.finfo(x.dtype).tiny
    if step is None:
        step = jnp.sqrt(jnp.maximum(jnp.sum(rows**2), tiny) / jnp.maximum(jnp.sum(dual**2), tiny))
        # The derivatives do not depend on it.
        step = jax.lax.stop_gradient(jnp.clip(step, 1e-6, 1e6))
    point = rows + step * dual
    copy, jacobian = jax.linearize(lambda point: term.prox(point, step), point)
    if getattr(term, "separable", False):
        diagonal = jacobian(jnp.ones_like(point))
        jacobian = partial(jnp.multiply, diagonal)
    return _Term(
        mv=maps.mv,
        rmv=maps.rmv,
        copy=copy,
        jacobian=jacobian,
        step=step,
        pushed=_along(lambda term: term.prox(point, step), term, term_moved),
        rows_moved=_along(lambda maps: maps.mv(x), maps, maps_moved),
        pulled_moved=_along(lambda maps: maps.rmv(dual), maps, maps_moved),
    )


def _tangent(problem: Any, moved: Any, x: FloatArray, found: Found) -> tuple[FloatArray, Array, dict[str, Any]]:
    """The derivatives of x, of the objective, and of the duals that were needed, by their names."""
    loss, penalty = problem.loss, problem.penalty
    linearised = partial(_linearise, problem.operator, moved.operator, penalty, moved.penalty, x)
    # Any step will do for a convex penalty; for others it must be short enough.
    step = None if has_conjugate(penalty) else found.step_size
    if not is_smooth(loss):
        term = linearised(_needed(found.dual), step)
        rows, along_rows = jax.jvp(lambda loss: loss.rows, (loss,), (moved.loss,))
        data = _linearise(loss.matrix, moved.loss.matrix, rows, along_rows, x, _needed(found.loss_dual), None)
        dx, *turns = _solution(jnp.zeros_like, -term.pulled_moved - data.pulled_moved, (term, data))
        changed = _value_along(rows, along_rows, data.copy, data.mv(dx) + data.rows_moved)
    else:
        gradient, hessian = jax.linearize(loss.gradient, x)
        right, turns = -_along(lambda loss: loss.gradient(x), loss, moved.loss), []
        if problem.operator is None:
            term = linearised(-gradient, _short_step(hessian, x) if found.step_size is None else found.step_size)
            dx = _fixed_point(hessian, right, term)
        else:
            term = linearised(_needed(found.dual), step)
            dx, *turns = _saddle_point(problem, hessian, right - term.pulled_moved, term)
        changed = _value_along(loss, moved.loss, x, dx)
    changed += _value_along(penalty, moved.penalty, term.copy, term.mv(dx) + term.rows_moved)
    return dx, changed, dict(zip(("dual", "loss_dual"), turns, strict=False))


def _needed(dual: Any) -> FloatArray:
    if dual is None:
        raise TypeError(
            "this solver returns no dual point, which derivatives of a solution with an operator or with a loss "
            "that is not smooth need; solve with PrimalDual or SplitAdmm"
        )
    return dual


def _short_step(hessian: Any, x: FloatArray) -> Array:
    curvature = norm_estimate(hessian, lambda e: e, x) ** 2
    return jax.lax.stop_gradient(0.9 / jnp.maximum(curvature, jnp.finfo(x.dtype).tiny))


def _saddle_point(problem: Any, hessian: Any, right: FloatArray, term: _Term) -> tuple[FloatArray, ...]:
    """The changes dx and du with an operator, for a smooth loss."""
    if _has_pieces(problem):
        pulled = term.rmv(term.wanted / term.step)
        dx = _constant_on_pieces(problem.operator, hessian, right + pulled, term)
        # The dual moves by the shortest way that balances this.
        return dx, _solution(None, right - hessian(dx), (term,))[1]
    # Half the squared distance to a point has the identity as its Hessian.
    square = _is_diagonal(problem.loss) and problem.loss.is_square and problem.loss.weights is None
    return _solution(None if has_conjugate(problem.penalty) and square else hessian, right, (term,))


def _fixed_point(hessian: Any, right: FloatArray, term: _Term) -> FloatArray:
    """The change dx without an operator, for a smooth loss."""

    def system(dx: FloatArray) -> FloatArray:
        return term.free(dx) + term.step * term.jacobian(hessian(dx))

    def on_support(right: FloatArray) -> FloatArray:
        return term.jacobian(_minres(lambda z: system(term.jacobian(z)), term.jacobian(right)))

    def solve(_: Any, right: FloatArray) -> FloatArray:
        free = term.free(right)
        return free + on_support(right + free - term.step * hessian(free))

    def solve_transposed(_: Any, right: FloatArray) -> FloatArray:
        held = on_support(right)
        return right + held - term.step * hessian(held)

    wanted = term.wanted + term.step * term.jacobian(right)
    return jax.lax.custom_linear_solve(system, wanted, solve, solve_transposed)


def _is_diagonal(loss: Any) -> bool:
    return isinstance(loss, DataLoss) and loss.matrix is None


def _has_pieces(problem: Any) -> bool:
    """Whether the solution is constant on the pieces that zero rows join, and free otherwise."""
    operator, penalty = problem.operator, problem.penalty
    first = isinstance(operator, Difference) and operator.order == 1 and not operator.from_edges
    # A norm that is a sum over entries is linear on either side of 0: its J is a mask.
    mask = is_norm(penalty) and getattr(penalty, "separable", False)
    return first and hasattr(operator.base, "ends") and mask and _is_diagonal(problem.loss)


def _constant_on_pieces(operator: Any, hessian: Any, right: FloatArray, term: _Term) -> FloatArray:
    tails, heads = (end.reshape(-1) for end in operator.base.ends())
    shape = (math.prod(operator.in_shape), -1)
    joins = (term.jacobian(jnp.ones_like(term.copy)) < 1).reshape(tails.size, -1)
    curvature = hessian(jnp.ones_like(right)).reshape(shape)
    labels = jax.vmap(lambda joins: piece_labels(tails, heads, joins, shape[0]), 1, 1)(joins)
    return jax.vmap(piece_means, 1, 1)(right.reshape(shape), curvature, labels).reshape(right.shape)


def _solution(hessian: Any, right: FloatArray, terms: tuple[_Term, ...]) -> tuple[FloatArray, ...]:
    """The changes dx, and du of every term; a `hessian` of None is the identity, with one term and a convex penalty.

    The system's matrix and right-hand side carry the solution's own derivatives; it is not symmetric, so it and its
    transpose are solved through a symmetric one.
    """
    curved = (lambda dx: dx) if hessian is None else hessian
    find = partial(_eliminate, terms[0]) if hessian is None else partial(_saddle_solution, hessian, terms)

    def system(unknowns: tuple) -> tuple:
        dx, *turns = unknowns
        parts = list(zip(terms, turns, strict=True))
        top = sum((term.rmv(du) for term, du in parts), start=curved(dx))
        return (top, *(term.free(term.mv(dx)) - term.step * term.jacobian(du) for term, du in parts))

    def solve(_: Any, right: tuple) -> tuple:
        top, *wanted = right
        parts = list(zip(terms, wanted, strict=True))
        dx, *moves = find(sum((term.rmv(w / term.step) for term, w in parts), start=top), wanted)
        return (dx, *((move - w) / term.step for (term, w), move in zip(parts, moves, strict=True)))

    def solve_transposed(_: Any, right: tuple) -> tuple:
        top, *wanted = right
        dx, *moves = find(top, wanted)
        return (dx, *((term.mv(dx) - w + move) / term.step for term, w, move in zip(terms, wanted, moves, strict=True)))

    # As one vector: JAX has no rule for a right-hand side of which only a part moves.
    flat, unravel = ravel_pytree((right, *(term.wanted for term in terms)))

    def of_vectors(function: Callable[..., tuple]) -> Callable[..., Array]:
        return lambda *given: ravel_pytree(function(*given[:-1], unravel(given[-1])))[0]

    ways = of_vectors(solve), of_vectors(solve_transposed)
    return unravel(jax.lax.custom_linear_solve(of_vectors(system), flat, *ways))


def _eliminate(term: _Term, top: FloatArray, wanted: list[FloatArray]) -> tuple[FloatArray, FloatArray]:
    """`_saddle_solution` if H is the identity and the penalty is convex."""

    def system(s: FloatArray) -> FloatArray:
        return term.free(term.mv(term.rmv(term.free(s))) + term.step * term.jacobian(s))

    b = term.free(term.mv(top) - wanted[0])
    enough = max(ENOUGH, ROUNDING * float(jnp.finfo(b.dtype).eps))
    s = term.free(jax.scipy.sparse.linalg.cg(system, b, tol=enough, maxiter=_most_steps(b.size))[0])
    return top - term.rmv(s), term.step * s


def _saddle_solution(
    hessian: Any, terms: tuple[_Term, ...], top: FloatArray, wanted: list[FloatArray]
) -> tuple[FloatArray, ...]:
    """The changes dx, and N s of every term, by the symmetric system for these right-hand sides.

    Its unknowns are scaled so that the blocks are about as large as the curvature.
    """
    tiny = jnp.finfo(top.dtype).tiny
    curvature = norm_estimate(hessian, lambda e: e, top) ** 2 if hessian is not jnp.zeros_like else 1.0
    sizes = [jnp.maximum(norm_estimate(term.mv, term.rmv, top, 10), tiny) for term in terms]
    scales = [jnp.mean(term.step) * curvature / size for term, size in zip(terms, sizes, strict=True)]

    def system(unknowns: tuple) -> tuple:
        dx, *parts = unknowns
        image, rest = hessian(dx), []
        for term, scale, s in zip(terms, scales, parts, strict=True):
            weight = scale / term.step
            image = image + term.rmv(weight * term.free(s))
            rest.append(weight * term.free(term.mv(dx) - scale * term.jacobian(s)))
        return (image, *rest)

    scaled = [scale / term.step * term.free(w) for term, scale, w in zip(terms, scales, wanted, strict=True)]
    dx, *parts = _minres(system, (top, *scaled))
    return (dx, *(scale * term.free(s) for term, scale, s in zip(terms, scales, parts, strict=True)))


def _most_steps(size: int) -> int:
    return min(PER_UNKNOWN * size + 20, MOST_STEPS)


def _minres(system: Callable[[Any], Any], right: Any) -> Any:
    """Paige and Saunders' MINRES for symmetric, possibly singular and indefinite, consistent systems of pytrees.

    It stops at a residual of a few eps times the length of the right-hand side, or at the step limit.
    """
    b, unravel = ravel_pytree(right)

    def matvec(v: Array) -> Array:
        return ravel_pytree(system(unravel(v)))[0]

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
        return (at.phi > 4 * limits.eps * length) & (at.steps < _most_steps(b.size))

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
    v, steps = b / jnp.maximum(length, limits.tiny), jnp.zeros((), jnp.int32)
    start = Turn(nothing, nothing, v, nothing, nothing, zero, length, zero - 1, zero, zero, zero, zero, steps)
    return unravel(jax.lax.while_loop(going, turn, start).x)
