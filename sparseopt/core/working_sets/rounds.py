"""Rounds over working sets on the host: sparse regression at the cost of the few columns that matter.

    minimise over x    sum_i w_i f((A x)_i; b_i) + sum_j g_j(x_j)

for a smooth f and a g of `EntryTerms`. A round solves the problem on few columns, those that are in use and those whose
gradients are furthest out (`restricted`; a loss that is no square by its quadratic model, with a line search). One
product with all columns then gives the duality gap, and the next set. Many columns are searched in two stages: rounds
on a sixteenth of them, which is copied, between rounds on all.

Source: Johnson and Guestrin, "Blitz: a principled meta-algorithm for scaling sparse optimization", ICML 2015; Massias,
Gramfort and Salmon, "Celer: a fast solver for the lasso with dual extrapolation", ICML 2018; Lee, Sun and Saunders,
"Proximal Newton-type methods for minimizing composite functions", SIAM J. Optim. 24 (2014).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.working_sets.columns import Chosen, Columns, LazyPull, inner
from sparseopt.core.working_sets.entry_terms import EntryTerms
from sparseopt.core.working_sets.restricted import minimise

# The first set; its growth over the support; up to ALL columns there is no choice of them.
FIRST, GROWTH, ALL = 32, 1.5, 64
# From MANY columns on the rounds run on one part in PARTS first, at least SMALL_PART.
MANY, PARTS, SMALL_PART = 2000, 16, 256
# Along a path columns of the last set stay while there are at most this many times the wanted ones.
KEPT = 1.3
# How exactly a restricted problem is solved, as a fraction of the gap and of the tolerance.
OF_GAP, OF_TOL = 1e-5, 0.1
# Rounds; those in a row that may bring nothing; columns without a weight whose gradients are compared with rounding.
MOST_ROUNDS, PATIENCE, MOST_WRONG = 100, 4, 512
EPS, TINY = float(np.finfo(np.float64).eps), float(np.finfo(np.float64).tiny)
# What rounding allows, in eps of the matrix.
ALLOWED = 128
# Models in a round; a round ends when the last model promised less than this fraction of the gap; the least curvature
# of an observation, as a fraction of the mean.
MOST_MODELS, MODEL, FLAT = 30, 0.01, 1e-4
# The shortest step of a line search.
LEAST_SHARE = 1e-12
# Steps of Newton's method on the entries without a weight.
MOST_POLISH = 8


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
        size = _round_up(self.size)
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


def _round_up(size: int) -> int:
    """The next power of two, or three quarters of one."""
    whole = 1 << max(size - 1, 63).bit_length()
    return whole if size > 0.75 * whole else int(0.75 * whole)


@jax.jit
def _loss_at(scalar: Any, target: Any, weights: Any, z: Any) -> tuple:
    slope, curve = jax.jvp(partial(scalar.derivative, y=target), (z,), (jnp.ones_like(z),))
    value = jnp.sum(jnp.where(weights > 0, weights * scalar.value(z, target), 0))
    return value, jnp.where(weights > 0, weights * slope, 0), jnp.where(weights > 0, weights * curve, 0)


@jax.jit
def _loss_slack(scalar: Any, target: Any, weights: Any, z: Any, share: Any) -> Any:
    slack = scalar.slack(z, share * scalar.derivative(z, target), target)
    return jnp.sum(jnp.where(weights > 0, weights * slack, 0))


class Found(NamedTuple):
    """What the rounds on some columns found, besides x."""

    z: np.ndarray  # A x
    now: At
    gradient: np.ndarray
    objectives: list[float]  # at the start and after every round
    gaps: list[float]
    dual: np.ndarray | None  # of the penalty, in the domain of its conjugate; None if no gap is known


class Proof(NamedTuple):
    """The objective, its relative duality gap, and the dual of the penalty that proves it."""

    objective: float
    gap: float
    dual: np.ndarray | None


def certify(
    fit: Any, columns: Columns, terms: EntryTerms, x: np.ndarray, z: np.ndarray, now: At, gradient: np.ndarray
) -> Proof:
    """The gap of x with the scaled gradient of the loss as its dual point."""
    primal, c, left = now.value + terms.value(x), gradient, 0.0
    if (
        primal <= ALLOWED * columns.eps * fit.at_zero
    ):  # no objective is negative: the optimum is 0 as far as it is known
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
            left += 2 * float(size @ np.abs(x[ids]))
            c = c.copy() if c is gradient else c
            c[ids] = 0
    share = 1 / max(terms.gauge(-c), 1.0)
    dual = -share * c
    slack = fit.slack(z, now, share) + terms.slack(x, dual) + left
    bound = primal - slack
    return Proof(primal, slack / bound if bound > 0 else np.inf, dual)


def centres(columns: Columns, terms: EntryTerms) -> bool:
    """Whether columns may be moved, since an intercept without a term takes it up."""
    return columns.ones and columns.count - 1 in terms.free


class Memory(NamedTuple):
    """What the solves along a path share."""

    chosen: Chosen
    pull: LazyPull


def rounds(
    fit: Any,
    columns: Columns,
    terms: EntryTerms,
    x: np.ndarray,
    start: tuple[np.ndarray, At, np.ndarray],
    tol: float,
    most: int = MOST_ROUNDS,
    memory: Memory | None = None,
) -> Found:
    """Solve the problem on these columns; x changes in place.

    `start` is `A x`, the loss there and its gradient. `memory` is of other solves with these columns, for one stage.
    """
    p = columns.count
    staged = p >= MANY and memory is None
    chosen = Chosen(columns, fit.gram_weights, centres(columns, terms)) if memory is None else memory.chosen
    z, now, c = start
    proofs, best, waited = [], (np.inf, np.inf), 0
    while True:
        proof = certify(fit, columns, terms, x, z, now, c)
        proofs.append(proof)
        gap = proof.gap
        # The gap has to fall, or without one the objective.
        known = np.isfinite(gap)
        falls = gap < 0.9 * best[0] if known else proof.objective < (1 - 1e-9) * best[1]
        best, waited = ((min(gap, best[0]), proof.objective), 0) if falls else (best, waited + 1)
        if gap <= tol or len(proofs) > most or waited > PATIENCE:
            return Found(z, now, c, [one.objective for one in proofs], [one.gap for one in proofs], proof.dual)
        used = np.count_nonzero(x)
        size = p if p <= ALL else int(max(FIRST, GROWTH * used + 32))
        part_size = max(SMALL_PART, p // PARTS, 2 * used + 32)
        # A part that is nearly all of the columns would not be searched faster.
        in_stages = staged and part_size <= p // 2
        size = part_size if in_stages else size
        wanted = np.arange(p)
        if size < p:
            score = terms.scores(x, -c)
            wanted = np.sort(np.argpartition(-score, size - 1)[:size])
            wanted = np.union1d(wanted, terms.free) if terms.free.size else wanted
            if memory and (both := np.union1d(wanted, chosen.ids)).size <= KEPT * size:
                wanted = both
        loose = min(gap, 1.0)
        if in_stages:
            part = x[wanted]
            below = (z, now, c[wanted])
            inner_tol = max(0.3 * tol, 0.02 * loose)
            z, now, *_ = rounds(fit, columns.take(wanted), terms.take(wanted), part, below, inner_tol)
            x[:] = 0
            x[wanted] = part
        else:
            enough = max(OF_TOL * tol, OF_GAP * loose) * proof.objective
            z, now = _improve(fit, chosen, terms, x, z, now, c, wanted, enough, loose * proof.objective)
        c = memory.pull(now.slope, terms, x) if memory else columns.pull(now.slope)


def _improve(
    fit: Any,
    chosen: Chosen,
    terms: EntryTerms,
    x: np.ndarray,
    z: np.ndarray,
    now: At,
    c: np.ndarray,
    wanted: np.ndarray,
    enough: float,
    apart: float,
) -> tuple[np.ndarray, At]:
    """Solve the problem on the wanted columns, changing x; return the image, and the loss there."""
    ids = chosen.choose(wanted)
    part, rows = terms.take(ids), chosen.rows
    last = np.flatnonzero(ids == chosen.columns.count - 1) if chosen.centred else np.zeros(0, int)
    w = x[ids]
    # In terms of centred columns the intercept is the mean.
    w[last] += chosen.means @ w
    if chosen.weights is not None:
        q = c[ids].copy()
        if last.size:
            q -= chosen.means * q[last[0]]
        w = minimise(chosen.gram, q, w, part, enough)
        seen = np.flatnonzero(w)
        z = rows.T @ w if 2 * seen.size > w.size or chosen.columns.sparse else w[seen] @ rows[seen]
        now = fit.at(z)
    else:
        w, z, now = _newton_models(fit, rows, part, w, z, now, enough, apart)
    if part.free.size or part.sided.size:
        w, z, now = _polished(fit, rows, part, w, z, now)
    w[last] -= chosen.means @ w
    x[:] = 0
    x[ids] = w
    return z, now


def _newton_models(
    fit: Any, rows: Any, terms: EntryTerms, w: np.ndarray, z: np.ndarray, now: At, enough: float, apart: float
) -> tuple[np.ndarray, np.ndarray, At]:
    """Quadratic models of the loss, each followed by a line search that never rises."""
    least = 0.0  # of the curvatures
    for _ in range(MOST_MODELS):
        curve = np.maximum(now.curve, max(FLAT * (now.curve.mean() or 1.0), least))
        q = rows @ now.slope
        new = minimise(inner(rows, rows, curve), q, w, terms, enough)
        way, before = new - w, terms.value(w)
        along = rows.T @ way
        level, predicted = now.value + before, float(q @ way) + terms.value(new) - before
        rounding = 4 * EPS * level
        if predicted >= 0:
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
        if -predicted <= max(MODEL * apart, enough, rounding):
            break
    return w, z, now


def _polished(
    fit: Any, rows: Any, terms: EntryTerms, w: np.ndarray, z: np.ndarray, now: At
) -> tuple[np.ndarray, np.ndarray, At]:
    """Newton's method on the entries without a weight until their gradients vanish, which no objective shows.

    A dual point is only feasible if they do.
    """
    ids = np.append(terms.free, terms.sided[(w[terms.sided] != 0)])
    part, best = rows[ids], np.inf
    for _ in range(MOST_POLISH):
        gradient = part @ now.slope
        size = float(np.linalg.norm(gradient))
        if size == 0 or size > 0.5 * best:
            break
        best, kept = size, (w, z, now)
        hessian = inner(part, part, np.maximum(now.curve, FLAT * (np.mean(now.curve) or 1.0)))
        way = -np.linalg.lstsq(hessian, gradient)[0]
        w = w.copy()
        w[ids] += way
        w = terms.inside(w)
        z = z + part.T @ (w[ids] - kept[0][ids])
        now = fit.at(z)
    else:
        return w, z, now
    return (w, z, now) if size < best or size == 0 else kept
