"""Floor 3.25: the duality gap, for every solver and front-end.

For any s in the domain of f* and u in that of penalty*, with `Aᵀ s + Kᵀ u = 0`, weak duality bounds the optimum P* of
`f(A x) + penalty(K x)` from below by `D = -f*(s) - penalty*(u)`. The gap P - D is a sum of two Fenchel slacks. None of
their terms is negative, so nothing cancels:

    P(x) - D = [f(A x) + f*(s) - <s, A x>] + [penalty(K x) + penalty*(u) - <u, K x>]

A pair (s, u) that violates the equation is first moved, by the shortest change that restores it; one outside the
domains is scaled by the largest factor that brings it inside.

Source: Rockafellar, "Convex analysis", 1970, section 31; the scaling is that of Fercoq, Gramfort and Salmon, "Mind the
duality gap", ICML 2015.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.fidelity import total
from sparseopt.core.matrices import norm_estimate
from sparseopt.core.operators import or_identity
from sparseopt.core.penalties import Composite, Conjugate, Norm, gauge
from sparseopt.core.problem import Status, unfolded
from sparseopt.core.types import FloatArray

# Steps of the linear solve for the shortest change.
CG_STEPS = 500
# A certificate moves u this much less than s: the bound loses the square of a move of s, but a move of u scales both.
PENALTY_MOVE = 1e-3


def relative_gap(slack: Float[Array, ""], objective: Float[Array, ""], least: Any = None) -> Float[Array, ""]:
    """`(P - D) / D` from the slack `P - D` and the objective P; +inf where D is not positive.

    It is an upper bound on `(P - P*) / P*`. `least` is a floor for D, so that a problem of optimum 0 can converge.
    """
    floor = jnp.finfo(objective.dtype).tiny if least is None else least
    bound = objective - slack
    gap = slack / jnp.maximum(bound, floor)
    return jnp.where((bound > 0) | (slack <= floor), gap, jnp.inf)


@jax.jit
def promoted(status: Array, gap: Array, objective: Array, tol: Any) -> Array:
    """The status of a solve whose gap was computed again, in another precision or in other units.

    A gap within the tolerance counts as convergence, however the solve ended. A larger gap after convergence is a limit
    of the precision. A NaN is a failure.
    """
    status = jnp.where((status == Status.CONVERGED) & ~(gap <= tol), Status.PRECISION, status)
    status = jnp.where((status != Status.NONFINITE) & (gap <= tol), Status.CONVERGED, status)
    return jnp.where(jnp.isnan(gap) | ~jnp.isfinite(objective), Status.NONFINITE, status).astype(jnp.int32)


def stationary(status: Array) -> Array:
    """The status of a solve without a certificate: convergence means a stationary point."""
    return jnp.where(status == Status.CONVERGED, Status.STATIONARY, status).astype(jnp.int32)


def has_conjugate(penalty: Any) -> bool:
    """Whether a penalty has what a duality gap needs."""
    return isinstance(penalty, Conjugate | Norm)


def is_convex(penalty: Any) -> bool:
    """Whether a penalty is known to be convex, by what it has or because it says so."""
    return has_conjugate(penalty) or isinstance(penalty, Composite) or getattr(penalty, "convex", False)


def _unpenalised(penalty: Any, like: FloatArray) -> Array:
    """Where a norm has weight 0, so that its dual ball is flat; nowhere for another penalty."""
    if not isinstance(penalty, Norm):
        return jnp.zeros(like.shape, bool)
    return penalty.project_dual(jnp.ones_like(like)) == 0


class Certificate(NamedTuple):
    """What a dual pair proves at x.

    Attributes:
        objective: at x.
        gap: the relative duality gap.
        bound: D.
        missing: the norm of `Aᵀ s + Kᵀ u`: at any x the optimum is at least `bound - 2 missing ||x||`.
    """

    objective: Float[Array, ""]
    gap: Float[Array, ""]
    bound: Float[Array, ""]
    missing: Float[Array, ""]


def certificate(
    problem: Any,
    x: FloatArray,
    image: FloatArray,
    loss_dual: FloatArray,
    dual: FloatArray,
    *,
    scales: tuple[Any, Any] = (1.0, 1.0),
    precondition: Any = None,
    due: Any = True,
    most_steps: Any = CG_STEPS,
) -> Certificate:
    """The objective at x and the relative duality gap by the dual pair, moved and scaled until it is feasible.

    Args:
        problem: its loss is a `MatrixLoss`, its penalty has a conjugate.
        x: the point.
        image: `A x`.
        loss_dual: s, in the domain of f*, of the shape of `A x`.
        dual: u, in the domain of the penalty's conjugate, of the shape of `K x`.
        scales: how easily s and u move: the changes, divided by the roots of these, are as short as possible.
        precondition: an approximate inverse of the scaled sum of `Aᵀ A` and `Kᵀ K`, or None.
        due: False leaves the pair unchanged, for a gap that is not used.
        most_steps: of the linear solve; its residual is added to the gap.
    """
    loss, penalty = problem.loss, problem.penalty
    maps = or_identity(problem.operator, x)
    rows, y = loss.rows, maps.mv(x)
    limits = jnp.finfo(x.dtype)
    # An entry of s may move where it lies inside the domain, or where the domain reaches beyond 0 on either side.
    low, high = rows.family.dual_range(rows.signal)
    slope = rows.slope(-loss_dual)
    loose = (slope > low) & (slope < high) | ((low < 0) & (high > 0))
    loose = jnp.broadcast_to(loose & (True if rows.weights is None else rows.weights > 0), loss_dual.shape)
    fixed = _unpenalised(penalty, y)
    dual = jnp.where(fixed, 0, dual)

    def moved(z: FloatArray) -> tuple[FloatArray, FloatArray]:
        return scales[0] * jnp.where(loose, loss.image(z), 0), scales[1] * jnp.where(fixed, 0, maps.mv(z))

    def normal(z: FloatArray) -> FloatArray:
        e, v = moved(z)
        return loss.pull(e) + maps.rmv(v)

    slack = rows.slack(image, -loss_dual) + total(penalty.slack(y, dual))
    length = jnp.sqrt(total(x * x))
    apart = loss.pull(loss_dual) + maps.rmv(dual)
    # What is missing may add a twentieth to the gap at most.
    enough = jnp.where(due, 0.025 * jnp.abs(slack) / jnp.maximum(length, limits.tiny), jnp.inf)
    enough = jnp.maximum(enough, 4 * limits.eps * jnp.sqrt(total(loss.pull(loss_dual) ** 2)))
    z, _ = jax.scipy.sparse.linalg.cg(normal, apart, tol=0.0, atol=enough, maxiter=most_steps, M=precondition)
    e, v = moved(z)
    # Back into the domain: s can leave it by little, where it lies at an end.
    loss_dual, dual = rows.weigh(jnp.clip(rows.slope(e - loss_dual), low, high)), dual - v
    left = jnp.sqrt(total((loss.pull(loss_dual) + maps.rmv(dual)) ** 2))
    # The domain of f* is convex and contains 0, so that a share of s lies in it too.
    share = 1 / jnp.maximum(gauge(penalty, jnp.where(fixed, 0, dual)), 1)
    objective = rows.value(image) + penalty.value(y)
    slack = jnp.maximum(rows.slack(image, -share * loss_dual) + total(penalty.slack(y, share * dual)), 0)
    # What is missing shifts the bound by at most its length times the distance to the answer, at most 2 ||x||.
    gap = relative_gap(slack + 2 * left * length, objective, limits.eps * rows.value(jnp.zeros_like(image)))
    return Certificate(objective, gap, objective - slack, left)


def proximal_gap(
    loss: Any, penalty: Any, x: FloatArray, image: FloatArray, gradient: FloatArray, objective: Float[Array, ""]
) -> Float[Array, ""]:
    """The relative gap at x of a problem without an operator, by the scaled gradient of a loss with `scaled_slack`."""
    share = 1 / jnp.maximum(gauge(penalty, -gradient), 1)
    slack = loss.scaled_slack(x, image, share) + total(penalty.slack(x, -share * gradient))
    least = jnp.finfo(x.dtype).eps * loss.value(jnp.zeros_like(x))
    return relative_gap(jnp.maximum(slack, 0), objective, least)


def composite_gap(
    problem: Any, x: FloatArray, image: FloatArray, dual: FloatArray, curvature: Float[Array, ""]
) -> Float[Array, ""]:
    """The relative gap of a `MatrixLoss` and a `Composite` penalty by the subgradient `dual` of a prox near x."""
    problem = unfolded(problem, x)
    size = norm_estimate(problem.operator.mv, problem.operator.rmv, x, 10)
    scales = (1 / curvature, PENALTY_MOVE / jnp.maximum(size, jnp.finfo(x.dtype).tiny) ** 2)
    return certificate(problem, x, image, problem.loss.rows.gradient(image), dual, scales=scales).gap
