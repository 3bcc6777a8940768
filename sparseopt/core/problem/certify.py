"""The duality gap, for every solver and front-end.

For any s in the domain of f* and u in the domain of penalty*, with `Aᵀ s + Kᵀ u = 0`, weak duality bounds the optimum
P* of `f(A x) + penalty(K x)` from below by `D = -f*(s) - penalty*(u)`. The gap P - D is a sum of two Fenchel slacks.
None of their terms is negative, so nothing cancels:

    P(x) - D = [f(A x) + f*(s) - <s, A x>] + [penalty(K x) + penalty*(u) - <u, K x>]

If a pair (s, u) violates the equation, a short move first restores it; if it lies outside the domains, the largest
factor that brings it inside scales it. The equation must hold up to the rounding of its sums, in units in which the
columns of A are equally long: an error in it shifts the bound by the product with the answer, whose length is unknown.
Otherwise nothing is claimed.

Source: Rockafellar, "Convex analysis", 1970, section 31; the scaling comes from Fercoq, Gramfort and Salmon, "Mind the
duality gap", ICML 2015.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.base.sums import total
from sparseopt.core.base.types import FloatArray, pytree
from sparseopt.core.operators.maps import or_identity
from sparseopt.core.operators.matrices import norm_estimate
from sparseopt.core.penalties.protocols import feasible, gauge, is_norm
from sparseopt.core.problem.problem import Status, unfold
from sparseopt.core.problem.units import Units, units_of

# Steps of a linear solve for a change.
CG_STEPS = 500
# A certificate first moves u this much less than s: the bound loses the square of a move of s, but a move of u scales
# both. The rest is small, and moves both alike, which needs fewer steps.
PENALTY_MOVE = 1e-3
# While the slack is at most CLOSE times the objective, the first ALONG moves of u stay tangent to its dual ball: the
# entry or group that is furthest out sets the final scaling. Entries within SURFACE of the surface count as on it.
CLOSE, ALONG, SURFACE = 1e-5, 3, 1e-4
# The moves; the error of the equation that may remain, in eps times the lengths of its columns and of the dual.
ROUNDS, ROUNDING = 6, 8
# The later moves are made if the slack is at most the first fraction of the objective, and the second of the slack of
# the best bound so far. They run some steps more than the first one, whose use is limited.
PROMISING, BETTER, MORE_STEPS = 0.1, 0.1, 50
# More than a one-sided domain asks for, so that a rounded move still meets it.
MARGIN = 1.1


def relative_gap(slack: Float[Array, ""], objective: Float[Array, ""], least: Any = None) -> Float[Array, ""]:
    """`(P - D) / D` from the slack `P - D` and the objective P; +inf if D is not positive.

    It is an upper bound on `(P - P*) / P*`. `least` is a floor for D, so that a problem with optimum 0 can converge.
    """
    floor = jnp.finfo(objective.dtype).tiny if least is None else least
    bound = objective - slack
    gap = slack / jnp.maximum(bound, floor)
    # No loss and no penalty is negative: what rounding makes negative proves nothing.
    return jnp.where(((bound > 0) | (slack <= floor)) & (objective >= 0), gap, jnp.inf)


@jax.jit
def promote(status: Array, gap: Array, objective: Array, tol: Any) -> Array:
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


@pytree
class Anchor:
    """A dual point u in the domain of the penalty's conjugate, and its image `Kᵀ u`, inside the loss's domain."""

    dual: Any
    pulled: Any


def judge(
    problem: Any, x: FloatArray, dual: FloatArray, anchor: Anchor | None = None, null: Any = False
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The objective at x, and its relative duality gap with a dual point, for a loss of x itself, so that `s = -Kᵀ u`.

    Args:
        problem: its loss is a `DataLoss` without a matrix, its penalty has a conjugate.
        x: the point.
        dual: u, in the domain of the penalty's conjugate up to rounding.
        anchor: u is moved towards it until it lies in the domain of the loss's conjugate; None if that has no ends.
        null: whether no penalty sees x: its rows are 0 up to rounding, and count as 0.
    """
    loss, penalty, operator = problem.loss, problem.penalty, problem.operator
    if not is_norm(penalty):
        dual = feasible(penalty, dual)
    # Without the barrier XLA would repeat a product in each sum that reads it.
    rows, pulled = jax.lax.optimization_barrier((operator.mv(x), operator.rmv(dual)))
    rows = jnp.where(null, 0, rows)
    if anchor is not None:
        share = loss.feasible_share(pulled, anchor.pulled)
        dual = anchor.dual + share * (dual - anchor.dual)
        pulled = anchor.pulled + share * (pulled - anchor.pulled)
    objective = loss.value(x) + penalty.value(rows)
    slack = loss.slack(x, pulled) + total(penalty.slack(rows, dual))
    # Neither loss nor penalty is ever negative, so an objective of 0 needs no dual.
    return objective, jnp.where(objective == 0, 0, relative_gap(slack, objective))


def _at_zero_end(penalty: Any, dual: FloatArray) -> Array:
    """Which entries lie beyond an end of the conjugate's domain that is 0, so that scaling does not help."""
    return (feasible(penalty, dual) == 0) & (dual != 0)


class Certificate(NamedTuple):
    """What a dual pair proves at x.

    Attributes:
        gap: the relative duality gap, +inf if the pair is not feasible or D is not positive.
        bound: D, a lower bound on the optimum; -inf if the pair is not feasible.
    """

    gap: Float[Array, ""]
    bound: Float[Array, ""]


class Metric(NamedTuple):
    """How a pair is moved.

    Attributes:
        units: the units of x.
        scales: one over the squared norms of A and of K in these units: how easily s and u move.
        precondition: an approximate inverse of the scaled sum of `Aᵀ A` and `Kᵀ K` in these units, or None.
    """

    units: Units
    scales: tuple[Any, Any] | None = None
    precondition: Any = None


class Effort(NamedTuple):
    """What the moves may cost.

    Attributes:
        due: False leaves the pair unchanged, for a gap that is not used.
        known: the slack of a known bound; work ends if no much better one is in sight.
        most_steps: step limit of each linear solve.
    """

    due: Any = True
    known: Any = jnp.inf
    most_steps: Any = CG_STEPS


def certificate(
    problem: Any,
    x: FloatArray,
    image: FloatArray,
    loss_dual: FloatArray,
    dual: FloatArray | None = None,
    metric: Metric | None = None,
    effort: Effort | None = None,
    inside: FloatArray | None = None,
) -> Certificate:
    """The relative duality gap at x with the dual pair, moved and scaled until it is feasible.

    With `inside` it is the gap of `f(A x) + penalty(inside)`: a term `<u, inside - K x>` joins the two slacks.

    Args:
        problem: its loss is a `DataLoss`, its penalty has a conjugate.
        x: the point.
        image: `A x`.
        loss_dual: s, in the domain of f*, of the shape of `A x`.
        dual: u, in the domain of the penalty's conjugate, of the shape of `K x`; None for `-Aᵀ s`, without an operator.
        metric: in which the pair is moved; None uses the metric of the columns of A.
        effort: what the moves may cost; None uses the default.
        inside: a point of the penalty's domain near `K x`, which may lie outside; None for `K x`.
    """
    loss, penalty, plain = problem.loss, problem.penalty, problem.operator is None
    maps = or_identity(problem.operator, x)
    rows, mapped = loss.rows, maps.mv(x)
    y = mapped if inside is None else inside
    # Whether u has a ball in which it can move.
    bounded = not plain and is_norm(penalty)
    limits = jnp.finfo(x.dtype)
    units, scales, precondition = Metric(units_of(problem, x)) if metric is None else metric
    due, known, most_steps = Effort() if effort is None else effort
    scales = (1 / units.size**2, 1.0) if scales is None else scales
    objective = rows.value(image) + penalty.value(y)
    length = jnp.sqrt(total((x / units.of) ** 2))
    low, high = rows.scalar.dual_range(rows.target)
    seen = True if rows.weights is None else rows.weights > 0
    above, below = (_at_zero_end(penalty, sign * jnp.ones_like(y)) for sign in (1, -1))

    def settle(s: FloatArray, u: Any) -> tuple[FloatArray, FloatArray, Array, FloatArray]:
        """The pair within the ends that are 0, u from the equation if possible; the cut entries; the equation's error.

        Products with A cost most, so the error of the equation is kept.
        """
        slope = jnp.clip(rows.slope(-s), jnp.where(low < 0, -jnp.inf, low), jnp.where(high > 0, jnp.inf, high))
        s = rows.weigh(slope)
        pulled = loss.pull(s)
        u = -pulled if plain else u
        cut = _at_zero_end(penalty, u)
        u = jnp.where(cut, 0, u)
        return s, u, cut, units.of * (pulled + maps.rmv(u))

    def allowed(s: FloatArray, u: FloatArray) -> Array:
        length = jnp.sqrt(total(s * s) / scales[0])
        return ROUNDING * limits.eps * (length if plain else length + jnp.sqrt(total(u * u / scales[1])))

    def rounded(s: FloatArray) -> Array:
        """The accuracy of the objective: the rounding of `<s, A x>`, and the penalty of the rounding of `K x`."""
        error = ROUNDING * limits.eps * jnp.max(jnp.abs(x / units.of), initial=0) / jnp.sqrt(scales[1])
        of_penalty = penalty.value(jnp.broadcast_to(error, y.shape).astype(y.dtype))
        of_loss = ROUNDING * limits.eps * length * jnp.sqrt(total(s * s) / scales[0])
        return 16 * of_loss + jnp.where(plain | ~jnp.isfinite(of_penalty), 0, of_penalty)

    def shift(s: FloatArray, u: FloatArray) -> tuple[FloatArray, FloatArray, Array, FloatArray]:
        """For domains with one end at 0: s plus a multiple of the image of positive x, which for A >= 0 meets them."""
        way = loss.image(units.of * (above.astype(x.dtype) - below))
        gains, beyond = -loss.pull(way), -loss.pull(s) - u
        ratio = jnp.where(beyond != 0, -beyond / jnp.where(gains != 0, gains, 1), 0)
        short = jnp.max(ratio)
        works = jnp.all((beyond == 0) | (ratio > 0)) & (short > 0)
        return settle(s + jnp.where(works, MARGIN * short, 0) * way, u)

    def distance(s: FloatArray, u: FloatArray) -> Array:
        return jnp.abs(rows.slack(image, -s) + total(penalty.slack(y, u)))

    def going(carry: tuple[Array, FloatArray, FloatArray, Array, FloatArray]) -> Array:
        index, s, u, _, apart = carry
        lacks = jnp.sqrt(total(apart**2)) > allowed(s, u)
        promising = distance(s, u) <= jnp.maximum(jnp.minimum(PROMISING * objective, BETTER * known), rounded(s))
        return due & lacks & (index < ROUNDS) & ((index == 0) | promising)

    def move(carry: tuple[Array, FloatArray, FloatArray, Array, FloatArray]) -> tuple:
        index, s, u, held, apart = carry
        first = index == 0
        if plain and not is_norm(penalty):
            s, u, cut, apart = jax.lax.cond(first, lambda s, u: (s, u, held, apart), shift, s, u)
            held = held | cut
        slope = rows.slope(-s)
        loose = seen & ((slope > low) & (slope < high) | (low < 0) & (high > 0))
        # Without an operator u follows from s, except where it is held.
        kept = first | held | (not plain)
        of_u = scales[1] * jnp.where(first, PENALTY_MOVE, 0.0 if plain else 1.0)

        off = distance(s, u)
        along = (index < ALONG) & (off <= CLOSE * objective) if bounded else None

        def within(v: FloatArray) -> FloatArray:
            """The part of a move of u that stays in a norm's dual ball to first order: nothing outwards."""
            if along is None:
                return v
            return jnp.where(along, jax.jvp(penalty.project_dual, ((1 + SURFACE) * u,), (v,))[1], v)

        def changes(z: FloatArray) -> tuple[FloatArray, FloatArray]:
            z = units.of * jnp.where(kept, z, 0) if plain else units.of * z
            return scales[0] * jnp.where(loose, loss.image(z), 0), of_u * jnp.where(held, 0, within(maps.mv(z)))

        def normal(z: FloatArray) -> FloatArray:
            e, v = changes(z)
            back = units.of * (loss.pull(e) + maps.rmv(v))
            return jnp.where(kept, back, 0) if plain else back

        def inverse(z: FloatArray) -> FloatArray:
            return jnp.where(kept, precondition(jnp.where(kept, z, 0)), 0) if plain else precondition(z)

        if plain:
            apart = jnp.where(first | (above & below), apart, MARGIN * apart)
        # The first move need not be exact.
        enough = 0.025 * off / jnp.maximum(length, limits.tiny)
        enough = jnp.maximum(jnp.where(first, enough, 0), 0.25 * allowed(s, u))
        steps = jnp.where(first, most_steps // 4, most_steps + MORE_STEPS)
        z, _ = jax.scipy.sparse.linalg.cg(
            normal, apart, tol=0.0, atol=enough, maxiter=steps, M=None if precondition is None else inverse
        )
        e, v = changes(z)
        if along is not None:
            # The projection on a ball with corners, as of singular values, is not differentiable everywhere.
            fine = ~along | jnp.isfinite(total(e) + total(v))
            e, v = jnp.where(fine, e, 0), jnp.where(fine, v, 0)
            index = jnp.where(fine, index, ALONG - 1)
        s, u, cut, apart = settle(s - e, u - v)
        return index + 1, s, u, held | cut, apart

    start, held = 0, above & below
    if dual is None:
        loss_dual, dual, cut, apart = settle(loss_dual, None)
        start, held = 1, held | cut
    else:
        dual = jnp.where(held, 0, dual)
        apart = units.of * (loss.pull(loss_dual) + maps.rmv(dual))
    carry = jnp.asarray(start), loss_dual, dual, held, apart
    _, loss_dual, dual, _, apart = jax.lax.while_loop(going, move, carry)
    left = jnp.sqrt(total(apart**2))
    feasible = left <= allowed(loss_dual, dual)
    # The domains are convex and contain 0, so that a fraction of the pair lies in them too.
    slope = rows.slope(-loss_dual)
    beyond = jnp.maximum(slope / jnp.where(high > 0, high, jnp.inf), slope / jnp.where(low < 0, low, -jnp.inf))
    share = 1 / jnp.maximum(jnp.maximum(gauge(penalty, dual), jnp.max(beyond, initial=0)), 1)
    loss_dual, dual = rows.weigh(jnp.clip(share * slope, low, high)), share * dual
    slack = jnp.maximum(rows.slack(image, -loss_dual) + total(penalty.slack(y, dual)), 0)
    if inside is not None:
        slack = jnp.abs(slack + total(dual * (inside - mapped)))
    # What rounding leaves of the equation, for an answer up to twice as long as x.
    slack = slack + 2 * left * length
    gap = relative_gap(slack, objective)
    # If P is its own rounding error, and tiny beside the loss at 0, the optimum is 0 as far as it is known.
    least = 16 * ROUNDING * limits.eps * rows.value(jnp.zeros_like(image))
    nothing = jnp.maximum(objective, slack) <= jnp.minimum(rounded(loss_dual), least)
    gap = jnp.where(nothing, jnp.minimum(gap, limits.eps), gap)
    # The bound may outlive an objective that is much larger than the last one, and is rounded as that.
    bound = objective - slack - 4 * limits.eps * jnp.abs(objective)
    return Certificate(jnp.where(feasible, gap, jnp.inf), jnp.where(feasible, bound, -jnp.inf))


def proximal_gap(
    loss: Any, penalty: Any, x: FloatArray, image: FloatArray, gradient: FloatArray, objective: Float[Array, ""]
) -> Float[Array, ""]:
    """The relative gap at x without an operator, from the scaled gradient of a loss with `scaled_slack`."""
    share = 1 / jnp.maximum(gauge(penalty, -gradient), 1)
    slack = loss.scaled_slack(x, image, share) + total(penalty.slack(x, -share * gradient))
    least = jnp.finfo(x.dtype).eps * loss.value(jnp.zeros_like(x))
    return relative_gap(jnp.maximum(slack, 0), objective, least)


def composite_gap(
    problem: Any, x: FloatArray, image: FloatArray, dual: FloatArray, curvature: Float[Array, ""]
) -> Float[Array, ""]:
    """The relative gap of a `DataLoss` and a `Composite` penalty with the subgradient `dual` of a prox near x."""
    problem = unfold(problem, x)
    size = norm_estimate(problem.operator.mv, problem.operator.rmv, x, 10)
    scales = (1 / curvature, 1 / jnp.maximum(size, jnp.finfo(x.dtype).tiny) ** 2)
    units = Units(jnp.ones_like(x), jnp.sqrt(curvature))
    return certificate(problem, x, image, problem.loss.rows.gradient(image), dual, Metric(units, scales)).gap
