"""Fits of order 0 with the mean of each piece at its nodes, and the early stops and short floats they allow.

large float64 signal -> a float32 solve to a loose gap -> means of its pieces -> judged in float64 -> more if needed

The iterate keeps small differences inside the pieces, which cost the more, the stronger the penalty. The means have
none, so what is left of their gap is how far the dual's bound is from its limit. So a solve stops where that bound
settles, and continues while the means are not good enough.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.compile import Jitted
from sparseopt.core.losses.data import DataLoss
from sparseopt.core.losses.scalar import ScalarLoss
from sparseopt.core.penalties.protocols import has_conjugate
from sparseopt.core.problem.certify import judge, promote
from sparseopt.core.problem.problem import Problem, Status
from sparseopt.trend.base.fit import Fit, start_at
from sparseopt.trend.base.ground import Data, Ground, data_of
from sparseopt.trend.base.pieces import TrendSolution, average_pieces
from sparseopt.trend.methods.choice import choose
from sparseopt.trend.methods.split_plan import resume

# Objectives that differ by this many eps are equal up to rounding.
ROUNDING = 8
# A solve without means, and the last of one with means, stops at a gap of BELOW times the tolerance, since float64 may
# see a slightly larger one.
BELOW = 0.95
# The next stop is chosen for means of a gap of AIM times the tolerance, as if it were proportional to the distance of
# the bound, but by a factor of at most MOST: one false piece may cost a hundred times the rest, and is soon corrected.
# Below LEAST times the tolerance the means are given up.
FIRST_STOP, AIM, MOST, LEAST = 1.0, 0.7, 3.0, 0.02


def short_fit(asked: Fit) -> TrendSolution:
    """The fit of a request by its method, which begins in float32."""
    asked = dataclasses.replace(asked, method=choose(asked))
    working, found = in_float32(asked), None
    plan = asked.method.plan(working).pace(working)

    def solve(tol: float, max_steps: int, settles: bool) -> TrendSolution:
        nonlocal found
        if found is None:
            found = plan.fit_asked(dataclasses.replace(working, tol=tol, max_steps=max_steps), settles)
        else:
            limits, pace = (tol, max_steps), (working.settings.relaxation, settles)
            found, _ = resume(plan, working.data, working.rows, found.state, limits, pace)
        return found

    return stop_early(asked, solve, FIRST_STOP if has_means(asked) else 0)[0]


def has_means(asked: Fit) -> bool:
    """Whether the means of pieces lower the gap of a fit."""
    return asked.order == 0 and asked.is_l1


def stop_early(
    asked: Fit, solve: Callable[[float, int, bool], TrendSolution], early: float
) -> tuple[TrendSolution, float]:
    """The fit of a request by `solve(tol, max_steps, settles)`, which resumes, and a first stop for similar requests.

    `early` is the multiple of the tolerance to which the bound settles first, 0 for a solve without means. If a solve
    in float32 ends before the tolerance, it continues in float64.
    """
    steps = 0
    while True:
        settles = early > LEAST
        found = solve((early if settles else BELOW) * asked.tol, asked.max_steps - steps, settles)
        steps += int(found.steps)
        left = asked.max_steps - steps
        # The iterate may be good enough first, but people look for pieces.
        fit = certify(asked, found, settles and left > 0)
        missed = float(fit.gap) / asked.tol
        if missed <= 1 or left <= 0 or not settles or int(found.status) == Status.NONFINITE:
            break
        early = next_stop(early, missed)
    if not missed <= 1 and left > 0 and found.value.dtype != asked.dtype:
        # What overflows in float32 is no start.
        start = None if int(fit.status) == Status.NONFINITE else start_at(fit)
        rest = dataclasses.replace(asked, start=start, max_steps=left)
        fit = choose(rest).plan(rest).fit_asked(rest)
        fit = take_piece_means(asked, fit)
        steps += int(fit.steps)
    elif not missed <= 1 and left <= 0:
        fit = dataclasses.replace(fit, status=jnp.asarray(Status.MAX_STEPS, jnp.int32))
    return dataclasses.replace(fit, steps=jnp.asarray(steps, jnp.int32)), next_stop(early, missed)


def next_stop(early: float, missed: float) -> float:
    """A stop for later, after one at which the gap of the means was `missed` times the tolerance."""
    return early * min(max(AIM / max(missed, AIM / MOST), 1 / MOST), MOST)


def in_float32(asked: Fit) -> Fit:
    """The request in float32."""
    weights = None if asked.weights is None else asked.weights.astype(np.float32)
    with np.errstate(over="ignore"):
        return dataclasses.replace(asked, values=asked.values.astype(np.float32), weights=weights)


def certify(asked: Fit, found: TrendSolution, level: bool = False) -> TrendSolution:
    """A fit in another precision as one of the request: judged there, at order 0 with the means of its pieces.

    They are taken unless they raise the objective, or always if it has to be `level`.
    """
    value, dual = found.value.astype(asked.dtype), asked.rows.project_dual(found.dual.astype(asked.dtype))
    return _with_means(asked, dataclasses.replace(found, value=value, dual=dual), False, level)


def take_piece_means(asked: Fit, found: TrendSolution) -> TrendSolution:
    """A fit of order 0 with the mean of each piece at its nodes, judged again, unless that raises the objective.

    The means E b are weighted as the loss is. Let P be the objective with the square loss, b* its optimum, and take the
    pieces of b*. If E b jumps in the directions of b*,

        P(E b) = P(b*) + 1/2 ||E (b - b*)||_w²  <=  P(b*) + 1/2 ||b - b*||_w²  <=  P(b)

    so the means lower the objective. The dual point and its bound stay the same.
    """
    return _with_means(asked, found, judged=True)


def _with_means(asked: Fit, found: TrendSolution, judged: bool, level: bool = False) -> TrendSolution:
    """The fit, or with the means of its pieces; `judged` says whether its objective, gap and status are known.

    A `level` fit has the means even if they raise the objective.
    """
    found, means = (found, None) if asked.order else _means(asked, found)
    certified, points = has_conjugate(asked.rows), () if means is None else (means,)
    # Without a certificate the objective of a fit is not that of its value alone.
    known = judged and (certified or means is None)
    points = points if known else (found.value, *points)
    if not points:
        return found
    given = asked.arrays, asked.data if asked.square else None
    ends = _judge_at(asked.ground, asked.loss, given, asked.rows, points, (found.dual, found.status), asked.tol)
    if not judged:
        objective, gap, status = ends[0]
        found = dataclasses.replace(found, objective=objective, gap=gap, residual=gap, status=status)
    before = float(found.objective if known else ends[0][0])
    objective, gap, status = ends[-1]
    # It is infinite for a value that violates a constraint by rounding.
    limit = before * (1 + ROUNDING * float(np.finfo(asked.dtype).eps))
    if means is None or not (math.isfinite(objective) and (level or float(objective) <= limit)):
        return found
    found = dataclasses.replace(found, value=means, objective=objective)
    if not (certified and asked.square):
        return found  # the gap is still a bound
    return dataclasses.replace(found, status=status, residual=gap, gap=gap)


def _means(asked: Fit, found: TrendSolution) -> tuple[TrendSolution, jax.Array | None]:
    """The fit, and the means of its pieces on the nodes; None if they are its values."""
    geometry, channels = asked.geometry, asked.channels
    columns = np.asarray(geometry.gather(found.value, 0)).reshape(geometry.num_nodes, -1)
    joined, between = ~np.asarray(found.nonzero), geometry.between(columns)
    if found.dual is None:
        # A fit that was known without an iteration is level. XLA reads its smallest differences as 0.
        return dataclasses.replace(found, nonzero=found.nonzero | between.reshape(joined.shape)), None
    joined = joined if channels else joined[..., None]
    if not (joined & between).any():
        return found, None
    level, labels = np.empty(columns.shape), None
    for channel, column in enumerate(columns.T.astype(np.float64)):
        # A penalty that couples channels gives them the same pieces.
        if labels is None or not np.array_equal(joined[..., channel], joined[..., channel - 1]):
            labels = geometry.labels(joined[..., channel])
        level[:, channel] = average_pieces(column, labels, asked.mass, asked.ground.anchored)
    return found, asked.on_nodes(level)


@Jitted
def _judge_at(
    ground: Ground,
    family: ScalarLoss,
    given: tuple[tuple[Any, Any], Data | None],
    penalty: Any,
    points: tuple[jax.Array, ...],
    proof: tuple[Any, Any],
    tol: Any,
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """The objective at each point, its relative duality gap for the square loss, else NaN, and the status then.

    `given` are the signal with its weights, and its data if they are known; `proof` the dual and the status so far.
    """
    (arrays, data), (dual, status), found = given, proof, []
    square, loss = getattr(family, "is_square", False), DataLoss(family, None, *arrays)
    if square:
        data = data_of(ground, *arrays) if data is None else data
        loss = data.loss
    for x in points:
        if data is not None and ground.present is not None:
            x = jnp.where(ground.present, x, data.shift)  # padding costs nothing there
        if square and has_conjugate(penalty):
            objective, gap = judge(Problem(loss, penalty, ground.operator), x, dual)
            found.append((objective, gap, promote(status, gap, objective, tol)))
        else:
            objective = loss.value(x) + penalty.value(ground.operator.mv(x))
            found.append((objective, jnp.full_like(objective, jnp.nan), status))
    return found
