"""Floor 5: the cold start of a fit: the signal, or the component means if they are the fit or close to it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sparseopt.core.operators import Split, Stack
from sparseopt.core.penalties import Norm
from sparseopt.core.solvers.admm import Start
from sparseopt.trend.ground import Data, Ground

CG_STEPS = 1000
CG_TOLERANCE = 1e-12
# Rounds of smoothing, and steps per round; after each round the signal is tried as a proof that the means are not the
# fit.
ROUNDS, SMOOTHINGS = 4, 16


def inverse_laplacian(ground: Ground, right: Array, times: int) -> tuple[Array, Array]:
    """`(L^+)^times right` for a right-hand side whose sums over every component are 0, and whether it is accurate.

    By cosines on grids; by conjugate gradients elsewhere, which may not converge in 1,000 steps.
    """
    base, nothing = ground.highest.base, jnp.zeros((), bool)
    if ground.cosine is not None:
        return ground.cosine.filtered(right, lambda level: jnp.where(level > 0, level, jnp.inf) ** -times), ~nothing
    limit = max(CG_TOLERANCE, 2 * float(jnp.finfo(right.dtype).eps))

    def balanced(x: Array) -> Array:
        """Restore sums of 0, to rounding, for the next solve."""
        if ground.labels is None:
            return x - jnp.mean(x, axis=0)
        nothing = jnp.zeros((ground.components, *x.shape[1:]), x.dtype)
        sums, sizes = nothing.at[ground.labels].add(x), nothing.at[ground.labels].add(1)
        return x - (sums / sizes)[ground.labels]

    def solved(_: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x, failed = carry
        found, _ = jax.scipy.sparse.linalg.cg(
            base.laplacian, x, tol=limit, maxiter=CG_STEPS, M=lambda residual: residual / ground.degrees
        )
        left = jnp.linalg.norm(base.laplacian(found) - x)
        return balanced(found), failed | ~(left <= 100 * limit * jnp.linalg.norm(x))

    found, failed = jax.lax.fori_loop(0, times, solved, (right, nothing))
    return found, ~failed


def null_space_dual(ground: Ground, pull: Array) -> tuple[Array, Array]:
    """The shortest u with `Δ^(k+1)ᵀ u = pull`, and whether it is accurate.

    If u lies in the dual ball, the component means are the fit. With 2m factors in Δ, `u = (L^+)^m pull`, with
    2m + 1 factors `u = D (L^+)^(m+1) pull`.
    """
    halves, odd = divmod(ground.highest.order, 2)
    z, solved = inverse_laplacian(ground, pull, halves + odd)
    return (ground.highest.base.difference(z) if odd else z), solved


def cold_start(ground: Ground, split: Split, penalty: Any, data: Data, weights: Any) -> Start:
    """The centred signal with a dual of 0; or, if the weight may be large enough, the means and their dual.

    The means are the fit only if `penalty(Δ z) >= <pull, z>` for all z. One z usually disproves that: the pull itself
    where smoothing is weak, else the smoothed pull.
    """
    centre = data.centred.center
    nothing = jnp.zeros(split.row_shape(centre), centre.dtype)
    if not isinstance(penalty, Norm) or isinstance(ground.operator, Stack):
        return Start(centre, nothing)
    apart = data.loss.center - data.means
    pull = apart if weights is None else weights * apart
    # Scaled to size 1, so that no square overflows: both sides of the comparison are homogeneous.
    size = jnp.max(jnp.abs(pull))
    size = jnp.where(size > 0, size, 1)
    pull = pull / size

    def rules_out(z: Array) -> Array:
        return penalty.value(ground.highest.mv(z)) < size * jnp.sum(pull * z)

    def smoothed(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """`z` after some steps of a lazy random walk."""
        laplacian = ground.highest.base.laplacian
        z, rounds, _ = carry
        z = jax.lax.fori_loop(0, SMOOTHINGS, lambda _, last: last - laplacian(last) / (2 * ground.degrees), z)
        return z, rounds + 1, rules_out(z)

    first = (pull, jnp.zeros((), jnp.int32), rules_out(pull))
    *_, ruled_out = jax.lax.while_loop(lambda carry: ~carry[2] & (carry[1] < ROUNDS), smoothed, first)

    def means() -> Start:
        # A batch runs this branch for every lane: where the means are ruled out there is nothing to solve.
        dual, solved = null_space_dual(ground, jnp.where(ruled_out, 0, pull))
        dual = penalty.project_dual(size * dual)
        kept = solved & ~ruled_out
        return Start(jnp.where(kept, data.means - data.shift, centre), jnp.where(kept, dual, 0))

    return jax.lax.cond(ruled_out, lambda: Start(centre, nothing), means)
