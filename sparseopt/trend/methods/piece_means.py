"""Fits of order 0 with the mean of each piece at its nodes, and the early stops and short floats they allow.

large float64 signal -> a float32 solve to a loose gap -> means of its pieces -> judged in float64 -> more if needed

The iterate keeps small differences inside the pieces, which cost the more, the stronger the penalty; the means have a
gap of about its square. So a solve stops early, and continues while the means are not good enough.
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
from sparseopt.trend.base.ground import Ground, data_of, prepare
from sparseopt.trend.base.job import Job, start_at
from sparseopt.trend.base.pieces import TrendSolution, average_pieces, edges_between, labels_of
from sparseopt.trend.methods.choice import choose
from sparseopt.trend.methods.plan import resume

# Objectives that differ by this many eps are equal up to rounding.
ROUNDING = 8
# The means are first tried at a gap of EARLY times the root of the tolerance; a solve without means, and the last of
# one with means, stops at BELOW times the tolerance, since float64 may see a slightly larger gap.
EARLY, BELOW = 0.01, 0.95
# The next stop is chosen for means of a gap of AIM times the tolerance, as if it were proportional to the iterate's
# gap, but by a factor of at most MOST: one false piece may cost a hundred times the rest, and is soon corrected.
AIM, MOST = 0.7, 3.0


def short_fit(job: Job) -> TrendSolution:
    """The fit of a job by its method, which begins in float32."""
    job = dataclasses.replace(job, method=choose(job))
    working, found = in_float32(job), None
    plan = job.method.plan(working).pace(working)

    def solve(tol: float, max_steps: int) -> TrendSolution:
        nonlocal found
        if found is None:
            found = plan.fit_job(dataclasses.replace(working, tol=tol, max_steps=max_steps))
        else:
            data = prepare(working.ground, *working.arrays)
            found, _ = resume(plan, data, working.rows, found.state, (tol, max_steps), working.settings.relaxation)
        return found

    return stop_early(job, solve, EARLY / math.sqrt(job.tol) if has_means(job) else BELOW)[0]


def has_means(job: Job) -> bool:
    """Whether the means of pieces lower the gap of a fit."""
    return job.order == 0 and job.is_l1


def stop_early(job: Job, solve: Callable[[float, int], TrendSolution], early: float) -> tuple[TrendSolution, float]:
    """The fit of a job by `solve(tol, max_steps)`, which resumes where it stopped, and a first stop for similar jobs.

    `early` is the multiple of the tolerance at which it stops first. If a solve in float32 ends before the tolerance,
    it continues in float64.
    """
    early, steps = max(early, BELOW), 0
    while True:
        found = solve(early * job.tol, job.max_steps - steps)
        steps += int(found.steps)
        reached, fit = float(found.gap) / job.tol, certify(job, found)
        missed, left = float(fit.gap) / job.tol, job.max_steps - steps
        if missed <= 1 or left <= 0 or early <= BELOW or int(found.status) != Status.CONVERGED:
            break
        early = max(next_stop(min(early, reached), missed), BELOW)
    if not missed <= 1 and left > 0 and found.value.dtype != job.dtype:
        # What overflows in float32 is no start.
        start = None if int(fit.status) == Status.NONFINITE else start_at(fit)
        rest = dataclasses.replace(job, start=start, max_steps=left)
        fit = choose(rest).plan(rest).fit_job(rest)
        fit = take_piece_means(job, fit)
        steps += int(fit.steps)
    elif not missed <= 1 and left <= 0:
        fit = dataclasses.replace(fit, status=jnp.asarray(Status.MAX_STEPS, jnp.int32))
    return dataclasses.replace(fit, steps=jnp.asarray(steps, jnp.int32)), next_stop(early, missed)


def next_stop(early: float, missed: float) -> float:
    """A stop for later, after one at which the gap of the means was `missed` times the tolerance."""
    return early * min(max(AIM / max(missed, AIM / MOST), 1 / MOST), MOST)


def in_float32(job: Job) -> Job:
    """The job in float32."""
    signal, short = job.signal, np.dtype(np.float32)
    weights = None if signal.weights is None else signal.weights.astype(short)
    with np.errstate(over="ignore"):
        signal = dataclasses.replace(signal, values=signal.values.astype(short), weights=weights)
    return dataclasses.replace(job, dtype=short, signal=signal)


def certify(job: Job, found: TrendSolution) -> TrendSolution:
    """A fit in another precision as one of the job: judged there, at order 0 with the means of its pieces."""
    value, dual = found.value.astype(job.dtype), job.rows.project_dual(found.dual.astype(job.dtype))
    proof = dual, found.status
    objective, gap, status = _judge_at(job.ground, job.loss, job.rows, job.arrays, value, proof, job.tol)
    found = dataclasses.replace(
        found, value=value, dual=dual, objective=objective, gap=gap, residual=gap, status=status
    )
    return take_piece_means(job, found)


def take_piece_means(job: Job, found: TrendSolution) -> TrendSolution:
    """A fit of order 0 with the mean of each piece at its nodes, judged again, unless that raises the objective.

    The means E b are weighted as the loss is. Let P be the objective with the square loss, b* its optimum, and take the
    pieces of b*. If E b jumps in the directions of b*,

        P(E b) = P(b*) + 1/2 ||E (b - b*)||_w²  <=  P(b*) + 1/2 ||b - b*||_w²  <=  P(b)

    so the means lower the objective. The dual point and its bound stay the same.
    """
    if job.order:
        return found
    graph, layout, signal, channels = job.graph, job.layout, job.signal, job.channels
    columns = np.asarray(layout.gather(found.value, 0)).reshape(graph.num_nodes, -1)
    joined, between = ~np.asarray(found.nonzero), edges_between(graph, columns)
    if found.dual is None:
        # A fit that was known without an iteration is level. XLA reads its smallest differences as 0.
        return dataclasses.replace(found, nonzero=found.nonzero | between.reshape(joined.shape))
    joined = joined if channels else joined[..., None]
    if not (joined & between).any():
        return found
    level, labels = np.empty(columns.shape), None
    for channel, column in enumerate(columns.T.astype(np.float64)):
        # A penalty that couples channels gives them the same pieces.
        if labels is None or not np.array_equal(joined[..., channel], joined[..., channel - 1]):
            labels = labels_of(graph, joined[..., channel])
        level[:, channel] = average_pieces(column, labels, signal.mass, job.ground.anchored)
    value = job.on_nodes(level)

    def judge_at(at: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        return _judge_at(job.ground, job.loss, job.rows, job.arrays, at, (found.dual, found.status), job.tol)

    objective, gap, status = judge_at(value)
    certified = has_conjugate(job.rows)
    # Without a certificate the reported objective is not the objective of the value alone.
    before = float(found.objective if certified else judge_at(found.value)[0])
    # It is infinite for a value that violates a constraint by rounding.
    if not (math.isfinite(objective) and float(objective) <= before * (1 + ROUNDING * float(np.finfo(job.dtype).eps))):
        return found
    found = dataclasses.replace(found, value=value, objective=objective)
    if not (certified and job.square):
        return found  # the gap is still a bound
    return dataclasses.replace(found, status=status, residual=gap, gap=gap)


@Jitted
def _judge_at(
    ground: Ground,
    family: ScalarLoss,
    penalty: Any,
    arrays: tuple[Any, Any],
    x: Any,
    proof: tuple[Any, jax.Array],
    tol: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The objective at x, the relative duality gap for the square loss, else NaN, and the status then.

    `arrays` are the signal and its weights, `proof` the dual and the status so far.
    """
    (y, weights), (dual, status) = arrays, proof
    loss: Any = DataLoss(family, None, y, weights)
    if getattr(family, "is_square", False):
        data = data_of(ground, y, weights)
        loss = data.loss
        if ground.present is not None:
            x = jnp.where(ground.present, x, data.shift)  # padding costs nothing there
        if has_conjugate(penalty):
            objective, gap = judge(Problem(loss, penalty, ground.operator), x, dual)
            return objective, gap, promote(status, gap, objective, tol)
    objective = loss.value(x) + penalty.value(ground.operator.mv(x))
    return objective, jnp.full_like(objective, jnp.nan), status
