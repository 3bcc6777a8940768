"""L1 of a banded matrix, such as the differences of a chain, with an interior point method that may run under `jit`.

    minimise over x    1/2 sum_j w_j (x_j - y_j)²  +  sum_r c_r |(Δ x)_r|

Its dual, with `q = Δᵀ u` and `x = y - q / w`, has the multipliers m, p >= 0 of its two bounds, and `Δ x = m - p`:

    minimise over u    sum_j ( q_j² / (2 w_j) - y_j q_j )    subject to    -c_r <= u_r <= c_r

A step solves `(Δ W^-1 Δᵀ + S) du = r` with a positive diagonal S by LAPACK's banded Cholesky factors, in time linear in
the rows, once for Mehrotra's predictor and again for his corrector. Ten to twenty steps are enough at any weight.

x moves by `-W^-1 Δᵀ du`, and is never computed from u: for large c its rounding would spoil Δ x. Where w is 0, q has to
be 0 and the moves of x are further unknowns.

Source: Kim, Koh, Boyd, Gorinevsky, "l1 trend filtering", SIAM Review 51 (2009), section 6; Mehrotra, "On the
implementation of a primal-dual interior point method", SIAM Journal on Optimization 2 (1992).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy import sparse

from sparseopt.core.base.types import pytree, static

# No problem took half as many steps, except when rounding forbids the tolerance; a solve also ends after this many
# steps without a smaller gap.
MOST_STEPS, PATIENCE = 60, 6
# Of the tolerance, since the caller computes the gap again.
SHARE = 0.9
# How far a step goes towards the nearest bound.
NEARLY = 0.995
# Added to the diagonal, as fractions of it, until rounding leaves the factors positive.
RIDGES = (0.0, 1e-15, 1e-13, 1e-11)
# Where w is 0, the certificate holds for x within this many ranges of y.
REACH = 10.0


class Answer(NamedTuple):
    """What an interior point method found."""

    x: Any  # `[n]` or `[n, channels]`
    u: Any  # `[rows]` or `[rows, channels]`
    steps: Any  # of all channels together
    ended: Any  # whether it ended before the step limit


@pytree
class BandedMatrix:
    """Δ in the CSR format, whose rows are in an order that keeps `Δ Δᵀ` banded."""

    data: Any
    indices: Any
    starts: Any
    columns: int = static()

    @classmethod
    def of(cls, matrix: sparse.csr_array) -> "BandedMatrix":
        return cls(matrix.data, matrix.indices, matrix.indptr, matrix.shape[1])


def banded_interior(matrix: BandedMatrix, y: Array, weights: Array, caps: Array, tol: Any, max_steps: Any) -> Answer:
    """Solve on the host, in float64, to the relative duality gap `tol`; a batch is solved one by one.

    y is `[n]` or `[n, channels]`, the weights w are `[n]` and the caps c `[rows]`, none negative.
    """
    sizes: list[Any] = [(y.shape, y.dtype), ((len(matrix.starts) - 1, *y.shape[1:]), y.dtype), *[((), jnp.int32)] * 2]
    shapes = [jax.ShapeDtypeStruct(*size) for size in sizes]
    given = (matrix.data, matrix.indices, matrix.starts), (y, weights, caps), (jnp.asarray(tol, y.dtype), max_steps)

    def solve(packed: Any) -> Any:
        table, arrays, (tol, max_steps) = jax.tree.map(_unpack, packed)
        rows = sparse.csr_array(table, shape=(len(table[2]) - 1, matrix.columns))
        y, weights, caps = (part.astype(np.float64) for part in arrays)
        found = solve_columns(rows, y, weights, caps, float(tol), int(max_steps))
        return [_pack(np.asarray(part, like.dtype)) for part, like in zip(found, shapes, strict=True)]

    like = jax.eval_shape(lambda: jax.tree.map(_pack_traced, [jnp.zeros(each.shape, each.dtype) for each in shapes]))
    found = jax.pure_callback(solve, like, jax.tree.map(_pack_traced, given), vmap_method="sequential")
    return Answer(*(_unpack_traced(part, each.dtype) for part, each in zip(found, shapes, strict=True)))


# The thread of a callback need not have the caller's 64-bit types, and JAX would shorten its arrays: float64 travels as
# pairs of 32 bits.


def _pack_traced(x: Any) -> Array:
    x = jnp.asarray(x)
    return jax.lax.bitcast_convert_type(x, jnp.uint32) if x.dtype == jnp.float64 else x


def _unpack_traced(x: Array, dtype: Any) -> Array:
    return jax.lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint32 else x


def _pack(x: np.ndarray) -> np.ndarray:
    return x[..., None].view(np.uint32) if x.dtype == np.float64 else x


def _unpack(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return np.ascontiguousarray(x).view(np.float64)[..., 0] if x.dtype == np.uint32 else x


def solve_columns(
    matrix: sparse.csr_array, y: np.ndarray, weights: np.ndarray, caps: np.ndarray, tol: float, max_steps: int
) -> Answer:
    """Each channel of y for itself; arguments as in `banded_interior`."""
    kept = caps > 0
    program = _Program(matrix[kept], weights, caps[kept])
    columns = y.reshape(len(y), -1).T
    # What is not finite comes back as it is.
    sane = np.isfinite(weights).all() and np.isfinite(caps).all() and np.isfinite(y).all()
    answers = [program.solve(column, tol, max_steps) for column in columns] if sane else []
    fit, u = np.full(y.shape, np.nan), np.zeros((len(caps), len(columns)))
    for channel, answer in enumerate(answers):
        fit.reshape(len(y), -1)[:, channel], u[kept, channel] = answer.x, answer.u
    steps, ended = sum(answer.steps for answer in answers), all(answer.ended for answer in answers)
    return Answer(fit, u.reshape(len(caps), *y.shape[1:]), np.int32(steps), np.int32(ended))


class _Program:
    """The tables of a matrix, weights `[n]` and positive caps `[rows]`."""

    def __init__(self, matrix: sparse.csr_array, weights: np.ndarray, caps: np.ndarray) -> None:
        self.matrix, self.adjoint, self.caps = matrix, sparse.csr_array(matrix.T), caps
        self.seen = weights > 0
        self.inverse = np.where(self.seen, 1 / np.where(self.seen, weights, 1), 0)
        square = matrix @ sparse.diags_array(self.inverse) @ self.adjoint
        self.system = _Banded(square) if self.seen.all() else _Bordered(square, matrix, ~self.seen)

    def solve(self, y: np.ndarray, tol: float, max_steps: int) -> Answer:
        caps, seen, inverse = self.caps, self.seen, self.inverse
        if not seen.all():
            places = np.arange(len(y))
            y = np.interp(places, places[seen], y[seen]) if seen.any() else np.zeros_like(y)
        count, x, u, reach = 2 * len(caps), y.copy(), np.zeros(len(caps)), REACH * np.ptp(y)
        rows = self.matrix @ x
        size = np.abs(rows).mean() if rows.size else 0.0
        if size == 0 or max_steps <= 0:
            return Answer(x, u, 0, size == 0)
        m, p = np.maximum(rows, 0) + size, np.maximum(-rows, 0) + size
        # Moved with u, since c - u would be lost to rounding for large c.
        above, below = caps.copy(), caps.copy()
        best, since, last = (np.inf, x, u), 0, min(max_steps, MOST_STEPS)
        for step in range(last + 1):
            pull = self.adjoint @ u
            apart = np.where(seen, x - y, 0) + inverse * pull
            # The primal objective at x over the dual one at u.
            gap = np.sum(caps * np.abs(rows) - u * rows) + np.sum(apart[seen] ** 2 / inverse[seen]) / 2
            gap += reach * np.sum(np.abs(pull[~seen]))
            lower = y[seen] @ pull[seen] - np.sum(inverse * pull**2) / 2
            relative = gap / lower if lower > 0 else np.inf
            since = since + 1 if relative >= best[0] < np.inf else 0
            if since == 0:
                best = relative, x, u
            if relative <= SHARE * tol or since == PATIENCE or step == last:
                break
            of_m, of_p, left = m / above, p / below, rows - m + p
            newton = self.system.factorise(of_m + of_p)
            if newton is None:
                break
            mean = (above @ m + below @ p) / count
            # Predictor: the full step to complementarity 0.
            du, _ = newton(left + m - p, pull)
            dm, dp = of_m * du - m, -of_p * du - p
            share = min(1.0, *map(_longest, (above, below, m, p), (-du, du, dm, dp)))
            after = (above - share * du) @ (m + share * dm) + (below + share * du) @ (p + share * dp)
            target = mean * (after / count / mean) ** 3
            # Corrector: to the target, with the predictor's error of second order.
            to_m, to_p = (target + du * dm) / above, (target - du * dp) / below
            du, moved = newton(left + m - p - to_m + to_p, pull)
            dm, dp = of_m * du - m + to_m, -of_p * du - p + to_p
            share = min(1.0, NEARLY * min(map(_longest, (above, below, m, p), (-du, du, dm, dp))))
            if not np.isfinite(du @ du):
                break
            u, m, p = u + share * du, m + share * dm, p + share * dp
            above, below = above - share * du, below + share * du
            x = x - share * inverse * (self.adjoint @ du)
            x[~seen] += share * moved
            rows = self.matrix @ x
        return Answer(best[1], np.clip(best[2], -caps, caps), step, relative <= tol or step < max_steps)


def _longest(value: np.ndarray, move: np.ndarray) -> float:
    """The largest step along a move that keeps positive numbers from being negative."""
    return 1 / max(-float((move / value).min()), 1e-300)


# A solve of the Newton system for the right-hand side of the rows and `Δᵀ u`: du, and the move of x where w is 0.
Newton = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class _Banded:
    """`Δ W^-1 Δᵀ + S`, by LAPACK's banded Cholesky factors."""

    def __init__(self, square: sparse.sparray) -> None:
        table = sparse.coo_array(square)
        upper = table.row <= table.col
        row, column = table.row[upper], table.col[upper]
        self.width = int(np.max(column - row, initial=0))
        self.band = np.zeros((self.width + 1, square.shape[0]), order="F")
        self.band[self.width + row - column, column] = table.data[upper]

    def factorise(self, diagonal: np.ndarray) -> Newton | None:
        from scipy.linalg.lapack import dpbtrf, dpbtrs

        for ridge in RIDGES:
            matrix = self.band.copy(order="F")
            matrix[-1] = matrix[-1] * (1 + ridge) + diagonal
            factor, failed = dpbtrf(matrix, overwrite_ab=1)
            if not failed:
                return lambda right, pull: (dpbtrs(factor, right)[0], np.zeros(0))
        return None


class _Bordered:
    """With the moves of x where w is 0 as further unknowns, placed among the rows, by banded LU factors.

    [Δ W^-1 Δᵀ + S   -Δ_0] [  du ]   [  right ]
    [    Δ_0ᵀ          0 ] [ dx_0] = [-Δ_0ᵀ u ]
    """

    def __init__(self, square: sparse.sparray, matrix: sparse.csr_array, missing: np.ndarray) -> None:
        border = sparse.csr_array(matrix[:, missing])
        whole = sparse.coo_array(sparse.block_array([[square, -border], [border.T, None]]))
        middles = [row.mean() for row in np.split(matrix.indices, matrix.indptr[1:-1])]
        order = np.argsort(np.concatenate([middles, np.flatnonzero(missing)]), kind="stable")
        self.place, self.count, self.missing = np.argsort(order), matrix.shape[0], missing
        row, column = self.place[whole.row], self.place[whole.col]
        self.width = int(np.max(np.abs(row - column), initial=0))
        self.band = np.zeros((3 * self.width + 1, len(order)), order="F")
        self.band[2 * self.width + row - column, column] = whole.data

    def factorise(self, diagonal: np.ndarray) -> Newton | None:
        from scipy.linalg.lapack import dgbtrf, dgbtrs

        matrix, width, place = self.band.copy(order="F"), self.width, self.place
        matrix[2 * width, place[: self.count]] += diagonal
        factor, pivots, failed = dgbtrf(matrix, width, width, overwrite_ab=1)

        def solve(right: np.ndarray, pull: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            whole = np.empty(len(place))
            whole[place] = np.concatenate([right, -pull[self.missing]])
            found = dgbtrs(factor, width, width, whole, pivots)[0][place]
            return found[: self.count], found[self.count :]

        return None if failed else solve
