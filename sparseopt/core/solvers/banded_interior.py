"""L1 of a banded matrix, such as the differences of a chain, with an interior point method that may run under `jit`.

    minimise over x    1/2 sum_j w_j (x_j - y_j)²  +  sum_r c_r |(Δ x)_r|

Its dual, with `q = Δᵀ u` and `x = y - q / w`, has the multipliers m, p >= 0 of its two bounds, and `Δ x = m - p`:

    minimise over u    sum_j ( q_j² / (2 w_j) - y_j q_j )    subject to    -c_r <= u_r <= c_r

A step solves `(Δ W^-1 Δᵀ + S) du = r` with a positive diagonal S by LAPACK's banded Cholesky factors, in time linear in
the rows, once for Mehrotra's predictor and again for his corrector. Ten to twenty steps are enough at any weight.

x moves by `-W^-1 Δᵀ du`, and is never computed from u: for large c its rounding would spoil Δ x. Where w is 0, q has to
be 0, and the moves of x are further unknowns. If rounding ends a solve, another has all of them as unknowns, since
`Δ W^-1 Δᵀ` has the square of the condition number of Δ.

Source: Kim, Koh, Boyd, Gorinevsky, "l1 trend filtering", SIAM Review 51 (2009), section 6; Mehrotra, "On the
implementation of a primal-dual interior point method", SIAM Journal on Optimization 2 (1992).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback
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
    """A matrix by its diagonals: `table[d, r]` is the entry in row r and column `r + d - before`, 0 outside."""

    table: Any
    before: int = static()
    columns: int = static()

    @classmethod
    def of(cls, matrix: sparse.csr_array) -> "BandedMatrix":
        diagonals, (rows, columns) = sparse.dia_array(matrix), matrix.shape
        low, high = int(min(diagonals.offsets)), int(max(diagonals.offsets))
        table = np.zeros((high - low + 1, rows))
        for offset, entries in zip(diagonals.offsets, diagonals.data, strict=True):
            inside = slice(max(0, -offset), min(rows, columns - offset))
            table[offset - low, inside] = entries[inside.start + offset : inside.stop + offset]
        return cls(table, -low, columns)

    def _padded(self, x: np.ndarray) -> np.ndarray:
        """With zeros for the columns that do not exist."""
        return np.pad(x, (self.before, max(0, self.table.shape[1] + len(self.table) - 1 - self.before - len(x))))

    def mv(self, x: np.ndarray) -> np.ndarray:
        padded, rows = self._padded(x), self.table.shape[1]
        return sum(entries * padded[d : d + rows] for d, entries in enumerate(self.table))

    def rmv(self, u: np.ndarray) -> np.ndarray:
        rows = self.table.shape[1]
        found = np.zeros(max(rows + len(self.table) - 1, self.before + self.columns))
        for d, entries in enumerate(self.table):
            found[d : d + rows] += entries * u
        return found[self.before : self.before + self.columns]

    def square(self, inverse: np.ndarray) -> np.ndarray:
        """The diagonals of `Δ diag(inverse) Δᵀ` from the outermost to the middle, LAPACK's upper form."""
        (width, rows), padded = self.table.shape, self._padded(inverse)
        weighted = np.stack([entries * padded[d : d + rows] for d, entries in enumerate(self.table)])
        found = np.zeros((width, rows), order="F")
        for apart in range(min(width, rows)):
            # Rows r and r + apart share the columns from the later one's first on.
            pairs = weighted[apart:, : rows - apart] * self.table[: width - apart, apart:]
            found[width - 1 - apart, apart:] = pairs.sum(axis=0)
        return found

    def sparse(self) -> sparse.coo_array:
        diagonal, row = np.nonzero(self.table)
        entries = self.table[diagonal, row], (row, row + diagonal - self.before)
        return sparse.coo_array(entries, shape=(self.table.shape[1], self.columns))


def banded_interior(matrix: BandedMatrix, y: Array, weights: Array, caps: Array, tol: Any, max_steps: Any) -> Answer:
    """Solve on the host, in float64, to the relative duality gap `tol`; a batch is solved one by one.

    y is `[n]` or `[n, channels]`, the weights w are `[n]` and the caps c `[rows]`, none negative.
    """
    sizes: list[Any] = [(y.shape, y.dtype), ((*caps.shape, *y.shape[1:]), y.dtype), *[((), jnp.int32)] * 2]
    shapes = [jax.ShapeDtypeStruct(*size) for size in sizes]
    given = (matrix.table, y, weights, caps), jnp.asarray(tol, y.dtype), max_steps

    def solve(arrays: Any, tol: Any, max_steps: Any) -> Answer:
        table, y, weights, caps = (part.astype(np.float64) for part in arrays)
        rows = dataclasses.replace(matrix, table=table)
        return solve_columns(rows, y, weights, caps, float(tol), int(max_steps))

    def on_buffers(_: Any, out: Any, *buffers: Any) -> None:
        for place, part in zip(out, solve(*jax.tree.map(np.asarray, buffers)), strict=True):
            np.asarray(place)[...] = part

    def on_copies(*packed: Any) -> Any:
        found = solve(*jax.tree.map(_unpack, packed))
        return [_pack(np.asarray(part, like.dtype)) for part, like in zip(found, shapes, strict=True)]

    def elsewhere(*given: Any) -> Any:
        like = jax.eval_shape(lambda: [_pack_traced(jnp.zeros(each.shape, each.dtype)) for each in shapes])
        found = jax.pure_callback(on_copies, like, *jax.tree.map(_pack_traced, given), vmap_method="sequential")
        return [_unpack_traced(part, each.dtype) for part, each in zip(found, shapes, strict=True)]

    # On a CPU of one thread `pure_callback` waits for copies that the same thread would have to make.
    found = jax.lax.platform_dependent(
        *given, cpu=buffer_callback(on_buffers, shapes, vmap_method="sequential"), default=elsewhere
    )
    return Answer(*found)


# The thread of a `pure_callback` need not have the caller's 64-bit types, and JAX would shorten its arrays: float64
# travels as pairs of 32 bits.


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
    matrix: BandedMatrix, y: np.ndarray, weights: np.ndarray, caps: np.ndarray, tol: float, max_steps: int
) -> Answer:
    """Each channel of y for itself; arguments as in `banded_interior`."""
    program, columns = _Program(matrix, weights, caps), y.reshape(len(y), -1).T
    # What is not finite comes back as it is.
    sane = np.isfinite(weights).all() and np.isfinite(caps).all() and np.isfinite(y).all()
    answers = [program.solve(column, tol, max_steps) for column in columns] if sane else []
    fit, u = np.full(y.shape, np.nan), np.zeros((len(caps), len(columns)))
    for channel, answer in enumerate(answers):
        fit.reshape(len(y), -1)[:, channel], u[:, channel] = answer.x, answer.u
    steps, ended = sum(answer.steps for answer in answers), all(answer.ended for answer in answers)
    return Answer(fit, u.reshape(len(caps), *y.shape[1:]), np.int32(steps), np.int32(ended))


class _Program:
    """The tables of a matrix, weights `[n]` and caps `[rows]`."""

    def __init__(self, matrix: BandedMatrix, weights: np.ndarray, caps: np.ndarray) -> None:
        self.weights, self.seen = weights, weights > 0
        # A row without a cap has entries of 0 and a cap of 1: its u and its multipliers stay 0.
        self.caps = np.where(caps > 0, caps, 1)
        self.matrix = dataclasses.replace(matrix, table=np.where(caps > 0, matrix.table, 0))

    @functools.cached_property
    def quick(self) -> "_Bordered":
        """With the moves of x where w is 0 alone as further unknowns."""
        return _Bordered(self.matrix, self.weights, ~self.seen)

    @functools.cached_property
    def careful(self) -> "_Bordered":
        """With all moves of x as further unknowns: `Δ W^-1 Δᵀ`, which squares the condition number, is not formed."""
        return _Bordered(self.matrix, self.weights, np.ones(len(self.weights), bool))

    def solve(self, y: np.ndarray, tol: float, max_steps: int) -> Answer:
        seen, places = self.seen, np.arange(len(y))
        if not seen.all():
            y = np.interp(places, places[seen], y[seen]) if seen.any() else np.zeros_like(y)
        size = np.abs(self.matrix.mv(y)).mean()
        if size == 0 or max_steps <= 0:
            return Answer(y, np.zeros(len(self.caps)), 0, size == 0)
        with np.errstate(all="ignore"):  # where rounding ends a solve
            gap, answer = self._run(self.quick, y, size, tol, max_steps)
            left = max_steps - answer.steps
            if gap > tol and left > 0:
                # For very large c.
                again, other = self._run(self.careful, y, size, tol, left)
                best = other if again < gap else answer
                answer = best._replace(steps=answer.steps + other.steps, ended=other.ended)
        return answer

    def _run(self, system: "_Bordered", y: np.ndarray, size: float, tol: float, max_steps: int) -> tuple[float, Answer]:
        """The smallest relative gap, and its point."""
        caps, seen, weights, border = self.caps, self.seen, self.weights, system.border
        count, x, u, reach = 2 * len(caps), y.copy(), np.zeros(len(caps)), REACH * np.ptp(y)
        rows = self.matrix.mv(x)
        m, p = np.maximum(rows, 0) + size, np.maximum(-rows, 0) + size
        # Moved with u, since c - u would be lost to rounding for large c.
        above, below = caps.copy(), caps.copy()
        best, since, last = (np.inf, x.copy(), u), 0, min(max_steps, MOST_STEPS)
        for step in range(last + 1):
            pull = self.matrix.rmv(u)
            apart = weights * (x - y) + pull
            # The primal objective at x over the dual one at u.
            gap = np.sum(caps * np.abs(rows) - u * rows) + np.sum(apart[seen] ** 2 / weights[seen]) / 2
            gap += reach * np.sum(np.abs(pull[~seen]))
            lower = y[seen] @ pull[seen] - np.sum(pull[seen] ** 2 / weights[seen]) / 2
            relative = gap / lower if lower > 0 else np.inf
            since += 1
            if relative < best[0]:
                best, since = (relative, x.copy(), u), 0
            if relative <= SHARE * tol or since == PATIENCE or step == last:
                break
            of_m, of_p, left = m / above, p / below, rows - m + p
            newton = system.factorise(of_m + of_p)
            if newton is None:
                break
            mean = (above @ m + below @ p) / count
            # Predictor: the full step to complementarity 0.
            du, _ = newton(left + m - p, apart)
            dm, dp = of_m * du - m, -of_p * du - p
            share = min(1.0, *map(_longest, (above, below, m, p), (-du, du, dm, dp)))
            after = (above - share * du) @ (m + share * dm) + (below + share * du) @ (p + share * dp)
            target = mean * (after / count / mean) ** 3
            # Corrector: to the target, with the predictor's error of second order.
            to_m, to_p = (target + du * dm) / above, (target - du * dp) / below
            du, moved = newton(left + m - p - to_m + to_p, apart)
            dm, dp = of_m * du - m + to_m, -of_p * du - p + to_p
            share = min(1.0, NEARLY * min(map(_longest, (above, below, m, p), (-du, du, dm, dp))))
            if not np.isfinite(du @ du):
                break
            u, m, p = u + share * du, m + share * dm, p + share * dp
            above, below = above - share * du, below + share * du
            inner = share * self.matrix.rmv(du)
            x = np.where(border, x, x - inner / weights) if border.any() else x - inner / weights
            x[border] += share * moved
            rows = self.matrix.mv(x)
        return best[0], Answer(best[1], np.clip(best[2], -caps, caps), step, best[0] <= tol or step < max_steps)


def _longest(value: np.ndarray, move: np.ndarray) -> float:
    """The largest step along a move that keeps positive numbers from being negative."""
    return 1 / max(-float((move / value).min()), 1e-300)


# A solve of the Newton system for the right-hand side of the rows and `W (x - y) + Δᵀ u`: du and the border's moves.
Newton = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class _Bordered:
    """The Newton system with the moves of x on a border b of the nodes as further unknowns, placed among the rows.

        [Δ_a W_a^-1 Δ_aᵀ + S  -Δ_b] [ du ]   [     right      ]
        [       Δ_bᵀ           W_b] [dx_b] = [-(W (x - y) + Δᵀ u)_b]

    a are the other nodes. Without a border LAPACK's Cholesky factors solve it, with one its LU factors.
    """

    def __init__(self, matrix: BandedMatrix, weights: np.ndarray, border: np.ndarray) -> None:
        self.border, self.count = border, matrix.table.shape[1]
        if not border.any():
            self.band, self.width = matrix.square(1 / weights), len(matrix.table) - 1
            return
        rows = sparse.csr_array(matrix.sparse())
        inner, outer = rows[:, ~border], sparse.csr_array(rows[:, border])
        square = inner @ sparse.diags_array(1 / weights[~border]) @ inner.T
        table = sparse.coo_array(sparse.block_array([[square, -outer], [outer.T, sparse.diags_array(weights[border])]]))
        middles = np.arange(self.count) + (len(matrix.table) - 1) / 2 - matrix.before
        order = np.argsort(np.concatenate([middles, np.flatnonzero(border)]), kind="stable")
        self.place = np.argsort(order)
        row, column = self.place[table.row], self.place[table.col]
        self.width = int(np.max(np.abs(row - column), initial=0))
        # LAPACK's form for LU factors, with room for pivots above.
        self.band = np.zeros((3 * self.width + 1, len(order)), order="F")
        self.band[2 * self.width + row - column, column] = table.data

    def factorise(self, diagonal: np.ndarray) -> Newton | None:
        """With this diagonal S; None if it fails."""
        from scipy.linalg.lapack import dgbtrf, dgbtrs, dpbtrf, dpbtrs

        matrix, width = self.band.copy(order="F"), self.width
        if not self.border.any():
            matrix[-1] += diagonal
            factor, failed = dpbtrf(matrix, overwrite_ab=1)
            return None if failed else lambda right, _: (dpbtrs(factor, right)[0], np.zeros(0))
        place = self.place
        matrix[2 * width, place[: self.count]] += diagonal
        factor, pivots, failed = dgbtrf(matrix, width, width, overwrite_ab=1)

        def solve(right: np.ndarray, apart: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            whole = np.empty(len(place))
            whole[place] = np.concatenate([right, -apart[self.border]])
            found = dgbtrs(factor, width, width, whole, pivots)[0][place]
            return found[: self.count], found[self.count :]

        return None if failed else solve
