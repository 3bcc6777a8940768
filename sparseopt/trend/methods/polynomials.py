"""With free ends, the polynomial with the smallest loss and its proof, and on a chain L1 fits as linear programmes.

    minimise over c    sum_j w_j f((B c)_j; y_j)        with orthonormal polynomials in the columns of B

c is the answer if and only if some g has `Bᵀ g = 0` and, node by node, `g_j` in `w_j ∂f((B c)_j; y_j)`. A smooth loss
leaves one g, its gradient. A loss with the two slopes `low < 0 < high` is a linear programme, solved in its dual, whose
multipliers are c:

    minimise over g    <g, y>    subject to    Bᵀ g = 0,    w_j low <= g_j <= w_j high

If the polynomial meets more than k + 1 observations, as with rounded data, many g prove it. The one whose u with
`D^(k+1)ᵀ u = -g` has the smallest `max |u|` solves a second linear programme. That `max |u|` is the smallest weight of
L1 at which the polynomial is the fit. For a smaller weight the fit has the multipliers b of a third one:

    minimise over g, u    <g, y>    subject to    g + D^(k+1)ᵀ u = 0,    |u| <= weight,    w_j low <= g_j <= w_j high

Source: Koenker and Bassett, "Regression quantiles", Econometrica 46 (1978), for this programme.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from sparseopt.core.base.compile import Jitted
from sparseopt.core.base.types import precision
from sparseopt.core.losses.residuals import LossOfTwoSlopes, has_two_slopes
from sparseopt.core.losses.scalar import ScalarLoss
from sparseopt.trend.base.penalties import leaves_as

# Newton's method: its steps, the relative decrease of the loss that ends it, and the curvature, over the one at the
# start, below which the loss has no minimum, only a limit.
NEWTON_STEPS, DECREASE, FLAT = 200, 1e-15, 1e-8
# The accuracy of the linear programmes, with slopes and distances of size 1; and the relative
# distance below which a polynomial meets an observation.
LINEAR_TOL, MEETS = 1e-10, 1e-12


def best_polynomials(
    loss: ScalarLoss, geometry: Any, order: int, columns: np.ndarray, weights: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The polynomials of degree `order` with the smallest loss, and the g that prove it: `[n, channels]` in float64.

    If several g prove it, the result proves it for the smallest weight of L1. `columns` are the observations
    `[n, channels]`, `weights` is `[n]`, and `start` the best constants, `[n, channels]`. A ValueError if the loss has
    no minimum.
    """
    basis = geometry.polynomials(order)
    difference = geometry.difference(order + 1, np.float64)
    with precision(np.dtype(np.float64)):
        found = []
        for y, constant in zip(columns.T, start.T.astype(np.float64), strict=True):
            if has_two_slopes(loss):
                found.append(_by_simplex(loss, difference, basis, y, weights, constant))
            else:
                found.append(_by_newton(loss, basis, y, weights, constant))
    fits, gradients = zip(*found, strict=True)
    return np.stack(fits, axis=1), np.stack(gradients, axis=1)


def _by_newton(
    loss: ScalarLoss, basis: np.ndarray, y: np.ndarray, weights: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    at = jnp.asarray(np.where(weights > 0, y, loss.mean(jnp.asarray(start))))
    told, fit = partial(expand, leaves_as(loss, np.float64), at, weights), start
    value, slope, curvature = (np.asarray(part) for part in told(fit))
    first = curvature.max()
    for _ in range(NEWTON_STEPS):
        hessian = basis.T @ (curvature[:, None] * basis)
        hessian += max(curvature.max(), first) * 1e-9 * np.eye(len(hessian))
        move = -basis @ np.linalg.solve(hessian, basis.T @ slope)
        fall, share = -slope @ move, 1.0
        while share > 1e-12:
            after, slope_after, curvature_after = (np.asarray(part) for part in told(fit + share * move))
            if after <= value - 1e-4 * share * fall:
                break
            share /= 2
        else:
            break
        enough = value - after <= DECREASE * abs(value)
        fit, value, slope, curvature = fit + share * move, after, slope_after, curvature_after
        if enough:
            break
    least = np.linalg.eigvalsh(basis.T @ (curvature[:, None] * basis))[0]
    if not loss.span_holds_fit and not least > FLAT * first:
        raise ValueError(
            f"with free ends no fit exists at order {basis.shape[1] - 1}: {type(loss).__name__} falls without end "
            'along a polynomial, as for labels that one polynomial separates; lower the order, or use ends="graph"'
        )
    return fit, _balance(basis, slope, (weights > 0).astype(np.float64))


@Jitted
def expand(loss: ScalarLoss, y: Any, weights: Any, fit: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The loss of a fit, and node by node its slope and its curvature."""
    slope, curvature = jax.jvp(lambda x: loss.derivative(x, y), (fit,), (jnp.ones_like(fit),))
    return jnp.sum(weights * loss.value(fit, y)), weights * slope, weights * curvature


def _balance(basis: np.ndarray, gradient: np.ndarray, room: np.ndarray) -> np.ndarray:
    """`gradient`, orthogonal to the basis with the smallest change; a node with more room may change more."""
    moved = room[:, None] * basis
    return gradient - moved @ np.linalg.lstsq(moved.T @ basis, basis.T @ gradient)[0]


def _by_simplex(
    loss: LossOfTwoSlopes, difference: Any, basis: np.ndarray, y: np.ndarray, weights: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    seen, columns = np.flatnonzero(weights > 0), np.sqrt(np.sum(weights > 0)) * basis
    (bounds, largest), (apart, unit) = _bounds(loss, weights), _scale(y - start, weights > 0)
    low, high = bounds.T
    found = _optimum(apart[seen], bounds[seen], A_eq=columns[seen].T, b_eq=np.zeros(columns.shape[1]))
    fit, gradient = start + unit * (columns @ found.eqlin.marginals), np.zeros(len(y))
    gradient[seen] = found.x
    met = (weights > 0) & (np.abs(y - fit) <= MEETS * (np.abs(fit).max() + unit))
    if np.sum(met) > columns.shape[1]:
        gradient = _least_congested(difference, gradient, np.where(met[:, None], bounds, gradient[:, None]))
    # Without its rounding error the fit costs nothing where it meets an observation.
    fit = np.where(met, y, fit)
    return fit, largest * _balance(basis, gradient, np.minimum(gradient - low, high - gradient))


def _least_congested(difference: Any, gradient: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The g within bounds `[n, 2]` whose u with `D^(k+1)ᵀ u = -g` has the smallest `max |u|`; `gradient` is one g."""
    matrix = difference.matrix()
    rows, n = matrix.shape
    size = np.abs(np.asarray(difference.potential(jnp.asarray(gradient)))).max()
    if size == 0:
        return gradient
    # The unknowns are u / size, g and the bound on the former.
    eye, nothing = sparse.eye_array(rows), sparse.csr_array((rows, n))
    last = np.ones((rows, 1))
    found = _optimum(
        np.r_[np.zeros(rows + n), 1.0],
        np.concatenate([np.tile([-np.inf, np.inf], (rows, 1)), bounds, [[0, np.inf]]]),
        A_ub=sparse.block_array([[eye, nothing, -last], [-eye, nothing, -last]], format="csc"),
        b_ub=np.zeros(2 * rows),
        A_eq=sparse.hstack([size * matrix.T, sparse.eye_array(n), sparse.csr_array((n, 1))], format="csc"),
        b_eq=np.zeros(n),
    )
    return np.clip(found.x[rows:-1], *bounds.T)


def linear_fits(
    loss: LossOfTwoSlopes,
    geometry: Any,
    order: int,
    row_weights: Any,
    columns: np.ndarray,
    weights: np.ndarray,
    null: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The L1 fits of a loss with two slopes, `[n, channels]`, and their duals u, `[rows, channels]`, in float64.

    `row_weights` of L1 are positive, a number or `[rows]`; `null` is from `best_polynomials`, the rest as there.
    """
    matrix = geometry.matrix(order + 1)
    rows, n = matrix.shape
    row_weights, (bounds, largest) = np.broadcast_to(row_weights, (rows,)), _bounds(loss, weights)
    # The unknowns are u / row_weights and g.
    maps = sparse.hstack([matrix.T @ sparse.diags_array(row_weights / largest), sparse.eye_array(n)], format="csc")
    every = np.concatenate([np.tile([-1.0, 1.0], (rows, 1)), bounds])
    fits, duals = [], []
    for y, polynomial in zip(columns.T, null.T, strict=True):
        apart, unit = _scale(y - polynomial, weights > 0)
        cost = np.r_[np.zeros(rows), np.where(weights > 0, apart, 0)]
        found = _optimum(cost, every, "highs-ipm", A_eq=maps, b_eq=np.zeros(n))
        fits.append(polynomial + unit * found.eqlin.marginals)
        duals.append(row_weights * found.x[:rows])
    return np.stack(fits, axis=1), np.stack(duals, axis=1)


def _bounds(loss: LossOfTwoSlopes, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """The bounds of g over the largest weight, `[n, 2]`, and that weight."""
    largest = weights.max()
    return np.stack([float(slope) * weights / largest for slope in loss.dual_range(jnp.zeros(()))], axis=1), largest


def _scale(apart: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, float]:
    """Distances over their typical size, and that size: outliers must not set the scale."""
    sizes = np.abs(apart[seen])
    unit = float(np.median(sizes) or np.mean(sizes) or 1.0)
    return apart / unit, unit


def _optimum(cost: np.ndarray, bounds: np.ndarray, method: str = "highs-ds", **constraints: Any) -> Any:
    from scipy.optimize import linprog

    options = {"dual_feasibility_tolerance": LINEAR_TOL, "primal_feasibility_tolerance": LINEAR_TOL}
    found = linprog(cost, bounds=bounds, method=method, options=options, **constraints)
    if found.x is None:
        raise RuntimeError(f"HiGHS found no answer to the linear programme of this loss: {found.message}")
    return found
