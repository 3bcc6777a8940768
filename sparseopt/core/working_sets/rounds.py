"""Rounds over working sets on the host: sparse regression at the cost of the few columns that matter.

    minimise over x    sum_i w_i f((A x)_i; b_i) + sum_j g_j(x_j)

for a smooth f and a g of `EntryTerms`. A round solves the problem on few columns, those that are in use and those whose
gradients are furthest out (`restricted`; a loss that is no square by its quadratic model, with a line search). One
product with all columns then gives the duality gap, and the next set. Large matrices are searched in two stages: rounds
on a sixteenth of the columns, which is copied, between rounds on all.

Source: Johnson and Guestrin, "Blitz: a principled meta-algorithm for scaling sparse optimization", ICML 2015; Massias,
Gramfort and Salmon, "Celer: a fast solver for the lasso with dual extrapolation", ICML 2018; Lee, Sun and Saunders,
"Proximal Newton-type methods for minimizing composite functions", SIAM J. Optim. 24 (2014).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.problem.padding import COARSE, round_up
from sparseopt.core.working_sets.columns import Chosen, Columns, LazyPull, inner, times
from sparseopt.core.working_sets.columns import round_up as filled_up
from sparseopt.core.working_sets.concave import EntryPenalty, minimise_concave
from sparseopt.core.working_sets.entry_terms import EntryTerms
from sparseopt.core.working_sets.groups import GroupTerms, minimise_groups
from sparseopt.core.working_sets.restricted import Enough, minimise

# The first set, of dense and of sparse columns; its growth over the support, and the least growth. Up to ALL columns
# there is no choice of them if their Gram matrix takes no more than ALL_WORK products, whose time is that of a round.
FIRST, GROWTH, ROOM, ALL, ALL_WORK = (32, 256), 1.5, 1.1, 128, 3e7
# From MANY entries of the matrix on the rounds run on one part in PARTS of the columns first, at least SMALL_PART.
MANY, PARTS, SMALL_PART = 5e6, 16, 256
# Above LARGE columns, and where the cube of their number is more than LARGE_WORK times the entries of the matrix, 1,000
# gradient steps take less time than the set.
LARGE, LARGE_WORK = 512, 8000
# Along a path columns of the last set stay while there are at most this many times the wanted ones.
KEPT = 1.5
# How exactly a restricted problem is solved: what is left to gain, and its own gap, as fractions of the gap of all, and
# of the tolerance; of a quadratic model, its gap as a fraction of what the last model may promise.
OF_GAP, OWN, OF_TOL, INNER = 1e-5, 0.3, 0.1, 0.1
# The tolerance of a stage, as fractions of the tolerance and of the gap.
OF_STAGE = 0.3, 0.3
# Rounds; those in a row that may bring nothing; columns without a weight whose gradients are compared with rounding.
MOST_ROUNDS, PATIENCE, MOST_WRONG = 100, 4, 512
EPS, TINY = float(np.finfo(np.float64).eps), float(np.finfo(np.float64).tiny)
# What rounding allows, in eps of the matrix; what of it may show in a gap.
ALLOWED, VISIBLE = 128, 1e-9
# Models in a round; a round ends when the last model promised less than this fraction of the gap, the second if it has
# all columns; the least curvature of an observation, as a fraction of the mean.
MOST_MODELS, MODEL, FLAT = 30, (0.1, 1e-3), 1e-6
# The shortest step of a line search.
LEAST_SHARE = 1e-12
# Of a loss that is no square the whole support is polished if the gap asked for is at most this.
DEEP = 1e-9
# Steps of that, and on the entries without a weight.
MOST_POLISH = 8

# Of the problem on chosen columns.
MINIMISERS: dict[type, Any] = {EntryTerms: minimise, EntryPenalty: minimise_concave, GroupTerms: minimise_groups}


class At(NamedTuple):
    """A loss at an image z."""

    value: float
    slope: np.ndarray  # the derivative by every entry of z, weights included
    curve: Any  # the second derivatives, or for squares the weights, maybe one number


class SquareFit:
    """`1/2 sum_i w_i (z_i - b_i)²`."""

    def __init__(self, target: np.ndarray, weights: np.ndarray | None) -> None:
        self.target, self.gram_weights = target, 1.0 if weights is None else weights
        self.at_zero = self.at(np.zeros_like(target)).value
        self.mass = float(np.sum(np.broadcast_to(self.gram_weights, target.shape)))

    def at(self, z: np.ndarray) -> At:
        apart = z - self.target
        slope = self.gram_weights * apart if np.ndim(self.gram_weights) else apart
        return At(0.5 * float(apart @ slope), slope, self.gram_weights)

    def slack(self, z: np.ndarray, now: At, share: float) -> float:
        return (1 - share) ** 2 * now.value

    def nothing(self, rounding: float) -> float:
        """What rounding leaves of a loss of 0: of a square the square of the error of z."""
        return rounding**2 * self.at_zero


class SmoothFit:
    """`sum_i w_i f(z_i; b_i)` for any smooth `ScalarLoss`."""

    gram_weights = None

    def __init__(self, scalar: Any, target: np.ndarray, weights: np.ndarray | None) -> None:
        self.size = target.size
        size = round_up(self.size, COARSE)
        weights = np.ones(self.size) if weights is None else weights
        more = size - self.size
        self.given = jax.device_put(
            (scalar, np.append(target, np.repeat(target[-1:], more)), np.append(weights, np.zeros(more)))
        )
        self.more = np.zeros(more)
        self.at_zero = self.at(np.zeros(self.size)).value

    def at(self, z: np.ndarray) -> At:
        value, slope, curve = _loss_at(*self.given, np.append(z, self.more))
        return At(float(value), np.asarray(slope)[: self.size], np.asarray(curve)[: self.size])

    def nothing(self, rounding: float) -> float:
        """As of `SquareFit`."""
        return rounding * self.at_zero

    def slack(self, z: np.ndarray, now: At, share: float) -> float:
        return float(_loss_slack(*self.given, np.append(z, self.more), share))


@jax.jit
def _loss_at(scalar: Any, target: Any, weights: Any, z: Any) -> tuple:
    slope, curve = jax.jvp(partial(scalar.derivative, y=target), (z,), (jnp.ones_like(z),))
    value = jnp.sum(jnp.where(weights > 0, weights * scalar.value(z, target), 0))
    return value, jnp.where(weights > 0, weights * slope, 0), jnp.where(weights > 0, weights * curve, 0)


@jax.jit
def _loss_slack(scalar: Any, target: Any, weights: Any, z: Any, share: Any) -> Any:
    slack = scalar.slack(z, share * scalar.derivative(z, target), target)
    return jnp.sum(jnp.where(weights > 0, weights * slack, 0))


class Part(NamedTuple):
    """The problem on some of its columns."""

    fit: Any
    columns: Columns
    terms: Any  # EntryTerms, EntryPenalty or GroupTerms

    def take(self, places: np.ndarray) -> "Part":
        return Part(self.fit, self.columns.take(places), self.terms.take(places))

    @property
    def centres(self) -> bool:
        """Whether columns may be moved, since an intercept without a term takes it up."""
        return self.columns.ones and self.columns.count - 1 in self.terms.free


class Point(NamedTuple):
    """Where a search stands, besides x."""

    z: np.ndarray  # A x
    now: At
    gradient: np.ndarray  # of the loss, by x


class Proof(NamedTuple):
    """The objective, its relative duality gap, and the dual of the penalty that proves it; None if no gap is known."""

    objective: float
    gap: float
    dual: np.ndarray | None


class Memory(NamedTuple):
    """What the solves along a path share."""

    chosen: Chosen
    pull: LazyPull


def certify(part: Part, x: np.ndarray, point: Point) -> Proof:
    """The gap of x with the scaled gradient of the loss as its dual point."""
    (fit, columns, terms), (z, now, gradient) = part, point
    primal, c, left, mean = now.value + terms.value(x), gradient, 0.0, 0.0
    if not terms.convex:
        return Proof(primal, terms.residual(x, gradient), None)
    if primal <= fit.nothing(ALLOWED * columns.eps):  # none is negative: the optimum is 0 as far as it is known
        return Proof(primal, EPS, None)
    for places in (terms.free, terms.sided):
        slopes = c[places]
        if places is terms.sided:
            slopes = np.where(np.isfinite(terms.low[places]), np.minimum(slopes, 0), np.maximum(slopes, 0))
        wrong = slopes.nonzero()[0]
        if wrong.size > MOST_WRONG:
            return Proof(primal, np.inf, None)
        if wrong.size:
            # No multiple of the dual helps: what remains must be rounding.
            ids, size = places[wrong], np.abs(slopes[wrong])
            length = np.linalg.norm(now.slope) + np.linalg.norm(now.curve * z)
            if (size > ALLOWED * columns.eps * columns.lengths(ids) * length).any():
                return Proof(primal, np.inf, None)
            c = c.copy() if c is gradient else c
            lost = 2 * size @ np.abs(x[ids])
            if lost > VISIBLE * primal and ids[0] == columns.count - 1 and isinstance(fit, SquareFit):
                # The rounding of a large intercept: residuals whose mean is 0 are the better dual.
                mean = c[-1] / fit.mass
                c -= mean * columns.sums(fit.gram_weights)
            else:
                left += float(lost)
            c[ids] = 0
    share = 1 / max(terms.gauge(-c), 1.0)
    dual = -share * c
    # The mean adds `share (1 - share / 2) mean²` times the mass to the slack of the loss.
    slack = fit.slack(z, now, share) + terms.slack(x, dual) + left
    slack += share * (1 - 0.5 * share) * mean**2 * fit.mass if mean else 0.0
    bound = primal - slack
    return Proof(primal, slack / bound if bound > 0 else np.inf, dual)


def rounds(
    part: Part,
    x: np.ndarray,
    point: Point,
    tol: float,
    most: int = MOST_ROUNDS,
    memory: Memory | None = None,
    *,
    yields: bool = False,
) -> tuple[Point, list[Proof]]:
    """Solve the problem on these columns: the last point, and the proof at the start and after every round.

    x changes in place. `memory` is of other solves with these columns, for one stage. With `yields` it ends where steps
    on all entries would take less time.
    """
    fit, columns, terms = part
    p = columns.count
    staged, whole = columns.matrix.size >= MANY and memory is None, p <= ALL and point.z.size * p * p <= ALL_WORK
    chosen = Chosen(columns, fit.gram_weights, part.centres) if memory is None else memory.chosen
    proofs, best, waited = [], (np.inf, np.inf), 0
    while True:
        proof = certify(part, x, point)
        proofs.append(proof)
        gap = proof.gap
        # The gap has to fall, or without one the objective.
        falls = gap < 0.9 * best[0] if np.isfinite(gap) else proof.objective < (1 - 1e-9) * best[1]
        best, waited = ((min(gap, best[0]), proof.objective), 0) if falls else (best, waited + 1)
        if gap <= tol or len(proofs) > most or waited > PATIENCE:
            return point, proofs
        used = np.count_nonzero(terms.held(x))
        # No larger than a size of Gram matrices, if that leaves some room.
        size = max(FIRST[columns.sparse], min(GROWTH * used + 32, filled_up(int(ROOM * used + 32))))
        size = p if whole else int(size)
        if yields and size > max(LARGE, (LARGE_WORK * columns.matrix.size) ** (1 / 3)):
            return point, proofs
        part_size = max(SMALL_PART, p // PARTS, 2 * used + 32)
        # A part that is nearly all of the columns would not be searched faster.
        in_stages = staged and part_size <= p // 2
        wanted = _wanted(part, x, point.gradient, part_size if in_stages else size)
        if memory and size < p and (both := np.union1d(wanted, chosen.ids)).size <= KEPT * size:
            wanted = both
        loose = min(gap, 1.0)
        if in_stages:
            of_part, below = x[wanted], point._replace(gradient=point.gradient[wanted])
            (z, now, _), _ = rounds(part.take(wanted), of_part, below, max(OF_STAGE[0] * tol, OF_STAGE[1] * loose))
            x[:] = 0
            x[wanted] = of_part
        else:
            # Of columns that are nearly dependent a step over one entry gains little, however far the optimum is.
            finer = 10.0 ** (-3 * waited) * proof.objective
            gain = max(OF_TOL * tol, OF_GAP * loose) * finer
            if not terms.convex:
                gain = (max(tol, loose) * OF_TOL * terms.scale) ** 2
            enough = Enough(max(OF_TOL * tol, OWN * loose) * finer, gain, 0.0)
            ends = (enough, MODEL[size == p] * loose * proof.objective)
            z, now = _improve(part, chosen.choose(wanted), chosen, x, point, ends)
        point = Point(z, now, memory.pull(now.slope, terms, x) if memory else columns.pull(now.slope))


def _wanted(part: Part, x: np.ndarray, gradient: np.ndarray, size: int) -> np.ndarray:
    """The columns that are held, and those whose gradients are furthest out, sorted; `size` has room for the former."""
    if size >= part.columns.count:
        return np.arange(part.columns.count)
    score = part.terms.scores(x, -gradient)
    return part.terms.completed(np.sort(np.argpartition(-score, size - 1)[:size]))


def _improve(
    part: Part, ids: np.ndarray, chosen: Chosen, x: np.ndarray, point: Point, exact: tuple[Enough, float]
) -> tuple[np.ndarray, At]:
    """Solve the problem on the chosen columns, changing x; return the image, and the loss there.

    `exact` is how much a solution may leave to gain, and the last model may have promised.
    """
    fit, terms, rows = part.fit, part.terms.take(ids), chosen.rows
    last = np.flatnonzero(ids == part.columns.count - 1) if chosen.centred else np.zeros(0, int)
    w = x[ids]
    # In terms of centred columns the intercept is the mean.
    w[last] += chosen.means @ w
    if chosen.weights is not None:
        if part.columns.narrow:
            # Errors of a gradient in float32 would be steps along columns that are nearly dependent.
            q = rows @ point.now.slope
        else:
            q = point.gradient[ids].copy()
            if last.size:
                q -= chosen.means * q[last[0]]
        enough = exact[0]._replace(loss=point.now.value)
        w = MINIMISERS[type(terms)](chosen.gram, q, w, terms, enough, times(rows, fit.gram_weights))
        seen = np.flatnonzero(w)
        z = rows.T @ w if 2 * seen.size > w.size or part.columns.sparse else w[seen] @ rows[seen]
        now = fit.at(z)
    else:
        w, z, now = _newton_models(fit, rows, terms, (w, point.z, point.now), exact)
    pieces = np.append(terms.free, terms.sided[w[terms.sided] != 0])
    if terms.by_entry and chosen.weights is None and exact[0].gain <= DEEP * now.value:
        pieces = np.union1d(pieces, ((w != 0) & (w > terms.low) & (w < terms.high)).nonzero()[0])
    if pieces.size:
        w, z, now = _polished(fit, rows, terms, (w, z, now), pieces)
    w[last] -= chosen.means @ w
    x[:] = 0
    x[ids] = w
    return z, now


# The entries of the chosen columns, the image and the loss there.
Stand = tuple[np.ndarray, np.ndarray, At]


def _newton_models(fit: Any, rows: Any, terms: EntryTerms, stand: Stand, exact: tuple[Enough, float]) -> Stand:
    """Quadratic models of the loss, each followed by a line search that never rises."""
    (w, z, now), (enough, small) = stand, exact
    least = 0.0  # of the curvatures
    for _ in range(MOST_MODELS):
        curve = np.maximum(now.curve, max(FLAT * (now.curve.mean() or 1.0), least))
        q = rows @ now.slope
        enough = enough._replace(loss=0.5 * float(now.slope @ (now.slope / curve)), gap=min(enough.gap, INNER * small))
        new = MINIMISERS[type(terms)](inner(rows, rows, curve), q, w, terms, enough, times(rows, curve))
        way, before = new - w, terms.value(w)
        along = rows.T @ way
        level, predicted = now.value + before, float(q @ way) + terms.value(new) - before
        rounding = 4 * EPS * level
        if predicted > rounding:  # a step that gains less than this shows in the gradient only
            break
        share, moved = 1.0, new
        while True:
            at = fit.at(z + share * along)
            if at.value + terms.value(moved) <= level + 1e-4 * share * predicted + rounding:
                break
            if least == 0 and np.isfinite(at.slope).all():
                # The mean curvature on the way of the step: the next model is not flatter.
                least = float(along @ (at.slope - now.slope)) / (share * float(along @ along))
            share *= 0.5
            moved = w + share * way
            if share < LEAST_SHARE:
                break
        if share < LEAST_SHARE:
            if least == 0:
                break
            continue
        w, z, now = moved, z + share * along, at
        if -predicted <= max(small, enough.gain, rounding):
            break
    return w, z, now


def _polished(fit: Any, rows: Any, terms: EntryTerms, stand: Stand, ids: np.ndarray) -> Stand:
    """Newton's method on some entries until their gradients vanish on their pieces, which no objective shows.

    A dual point is only feasible if those of entries without a weight do.
    """
    w, z, now = stand
    part, best = rows[ids], np.inf
    ridge, pull = terms.ridge[ids], terms.weight[ids] * np.sign(w[ids])
    for _ in range(MOST_POLISH):
        gradient = part @ now.slope + ridge * w[ids] + pull
        size = float(np.linalg.norm(gradient))
        if size == 0 or size > 0.5 * best:
            break
        best, kept = size, (w, z, now)
        hessian = inner(part, part, np.maximum(now.curve, FLAT * (np.mean(now.curve) or 1.0)))
        way = -np.linalg.lstsq(hessian + np.diag(ridge), gradient)[0]
        w = w.copy()
        w[ids] += way
        w = terms.inside(w)
        if (pull * w[ids] < 0).any():
            return kept
        z = z + part.T @ (w[ids] - kept[0][ids])
        now = fit.at(z)
    else:
        return w, z, now
    return (w, z, now) if size < best or size == 0 else kept
