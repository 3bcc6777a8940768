"""The solver `WorkingSet`: rounds on the host for arrays that are known, and a pure form with a static size.

Both choose columns, take coordinate and Newton steps on them (`restricted`), and measure the gap with all.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.types import known_on_cpu, precision, pytree, static
from sparseopt.core.operators.matrices import Dense, SparseMatrix, WithOnes
from sparseopt.core.problem.certify import certificate
from sparseopt.core.problem.problem import Measure, PlainSolver, Problem, Progress, Solution, Status, needs
from sparseopt.core.working_sets.columns import Chosen, LazyPull, columns_of
from sparseopt.core.working_sets.concave import LEVEL_ROUNDS, LEVEL_TOL, EntryPenalty, of_entries
from sparseopt.core.working_sets.entry_terms import EntryTerms
from sparseopt.core.working_sets.groups import groups_of
from sparseopt.core.working_sets.restricted import traced_minimise
from sparseopt.core.working_sets.rounds import (
    ALLOWED,
    EPS,
    FLAT,
    MOST_ROUNDS,
    PATIENCE,
    TINY,
    Memory,
    Part,
    Point,
    Proof,
    SmoothFit,
    SquareFit,
    rounds,
)


@pytree
class WorkingSetState:
    """The state of `WorkingSet` under `jit` and `vmap`."""

    x: Any
    image: Any  # of x
    objective: Any
    gap: Any
    dual: Any
    progress: Any


@pytree
class WorkingSet(PlainSolver):
    """Coordinate and Newton steps on few columns at a time, for a smooth loss of a matrix and a penalty on entries.

    The loss is a `DataLoss` with a matrix and a target `[rows]`; the penalty is L1, ElasticNet, Box or Nonnegative,
    with numbers that may differ between entries, or with known arrays a GroupL2 or SparseGroup of labels. The residual
    is the relative duality gap. A step is a round: one product with all columns, and the solution on the columns that
    matter, about as many as the answer has non-zeros.
    With least squares and known arrays it also takes L0, MCP, SCAD, LogSum and LHalf, of which it finds a point that no
    change of one entry improves; from zeros by way of penalties that are nearly convex. The residual is then the length
    of the steps to the minimisers over each entry, in units of the columns' lengths, over that of the gradient at 0.

    With known arrays on a CPU the set grows as far as it must, and a few small programs serve all sizes. Under `jit`,
    `vmap` and `grad` and on other devices it has a static size: an answer with more non-zeros than that is not found,
    and the status is MAX_STEPS.

    Attributes:
        most: the size of the set under `jit`.
    """

    most: int = static(default=128)

    def refuses(self, problem: Problem) -> str | None:
        """Why it cannot solve a problem, or None."""
        shape: tuple[int, ...] = problem.loss.start_shape() if hasattr(problem.loss, "start_shape") else ()
        concave = len(shape) == 1 and of_entries(problem.penalty, shape[0])
        grouped = len(shape) == 1 and groups_of(problem.penalty, shape[0]) is not None
        asked = "value prox" if concave or grouped else "value prox entry_terms"
        if reason := needs(self, problem, loss="value gradient scalar matrix", penalty=asked):
            return reason
        if not (isinstance(problem.loss.matrix, Dense | SparseMatrix | WithOnes) and np.ndim(problem.loss.target) == 1):
            return (
                "WorkingSet needs a dense or SciPy sparse matrix and a target [rows]; use AcceleratedProximalGradient"
            )
        known = known_on_cpu(problem) and np.size(problem.loss.target)
        if grouped and not known:
            return "WorkingSet takes groups with known arrays on a CPU; use AcceleratedProximalGradient"
        if concave and not (problem.loss.is_square and known):
            return (
                "WorkingSet takes a penalty that is not convex with least squares and known arrays on a CPU; use "
                "AcceleratedProximalGradient"
            )
        return None if problem.loss.smooth else "WorkingSet needs a smooth loss; use PrimalDual"

    def on_host(
        self, problem: Problem, start: Any, tol: float, max_steps: int, history: bool, *, yields: bool = False
    ) -> Solution | None:
        """The solution by the form without a static size, of arrays that are known; None without rows.

        With `yields` it ends unsolved where gradient steps on all entries would take less time.
        """
        if not np.size(problem.loss.target):
            return None
        return HostSolve(problem, start, yields=yields).at(problem.penalty, tol, max_steps, history)

    def init(self, problem: Problem, start: Any) -> WorkingSetState:
        image = problem.loss.image(start)
        far = jnp.full((), jnp.inf, start.dtype)
        return self._checked(
            problem, WorkingSetState(start, image, far, far, start, Progress(far, jnp.zeros((), jnp.int32)))
        )

    def _checked(self, problem: Problem, state: WorkingSetState) -> WorkingSetState:
        loss, x = problem.loss, state.x
        objective = loss.value_at(x, state.image) + problem.penalty.value(x)
        slope = loss.rows.gradient(state.image)
        gap = certificate(problem, x, state.image, slope).gap
        return dataclasses.replace(
            state, objective=objective, gap=gap, dual=-loss.pull(slope), progress=state.progress.after(gap)
        )

    def step(self, problem: Problem, state: WorkingSetState) -> WorkingSetState:
        loss, x, c = problem.loss, state.x, -state.dual
        size = min(self.most, x.size)
        terms = jnp.stack(
            [jnp.broadcast_to(jnp.asarray(row, x.dtype), x.shape) for row in problem.penalty.entry_terms()]
        )
        weight = jnp.maximum(terms[0], jnp.finfo(x.dtype).tiny)
        outwards = jnp.where(c < 0, x < terms[3], x > terms[2])
        score = jnp.where((x != 0) | (terms[0] == 0), jnp.inf, jnp.where(outwards, jnp.abs(c), 0) / weight)
        _, wanted = jax.lax.top_k(score, size)
        rows, part, w = loss.matrix.take(wanted), terms[:, wanted], x[wanted]
        data = loss.rows
        derivative = partial(data.scalar.derivative, y=data.target)
        curve = jax.jvp(derivative, (state.image,), (jnp.ones_like(state.image),))[1]
        curve = data.weigh(jnp.maximum(curve, FLAT * jnp.mean(curve)))
        gram = (rows * curve) @ rows.T
        new = traced_minimise(gram, c[wanted], w, part)
        way = new - w
        along = way @ rows
        shares = jnp.append(0.5 ** jnp.arange(12, dtype=x.dtype), 0)

        def objective(share: Any) -> Any:
            moved = jnp.where(share == 1, new, w + share * way)
            weight, ridge = part[:2]
            return data.value(state.image + share * along) + jnp.sum(weight * jnp.abs(moved) + 0.5 * ridge * moved**2)

        values = jax.vmap(objective)(shares)
        # A decrease below the rounding of the objective, the last of the values, says nothing: Newton's step is taken.
        low = values[jnp.nanargmin(values)] >= values[-1] * (1 - 4 * jnp.finfo(x.dtype).eps)
        near = low & (values[0] <= values[-1] * (1 + 4 * jnp.finfo(x.dtype).eps))
        share = jnp.where(near, 1, shares[jnp.nanargmin(values)])
        x = x.at[wanted].set(jnp.where(share == 1, new, w + share * way))
        return self._checked(problem, dataclasses.replace(state, x=x, image=loss.image(x)))

    def measure(self, problem: Problem, state: WorkingSetState) -> Measure:
        return Measure(state.gap, state.objective, state.gap, stalled=state.progress.has_stalled(state.gap, PATIENCE))

    def duals(self, problem: Problem, state: WorkingSetState) -> tuple[None, Any]:
        return None, state.dual


class HostSolve:
    """A problem on the host whose penalty may change: every solve begins where the last one ended."""

    def __init__(self, problem: Problem, start: Any, *, keeps: bool = False, yields: bool = False) -> None:
        """With `keeps` columns, Gram matrix and products serve the next solve, too; `yields` is that of `rounds`."""
        loss = problem.loss
        self.loss, self.kind, self.columns = loss, np.dtype(start.dtype), columns_of(loss.matrix)
        self.x = np.array(start, np.float64)
        target, weights = np.asarray(loss.target, np.float64), None
        if loss.weights is not None:
            weights = np.broadcast_to(loss.weights, target.shape).astype(np.float64)
            # Any number in the domain of the loss, for one that is missing.
            target = np.where(weights > 0, target, target[np.argmax(weights)] if weights.any() else 0.0)
        with precision(np.dtype(np.float64)):
            self.fit: Any = SquareFit(target, weights) if loss.is_square else SmoothFit(loss.scalar, target, weights)
        self.memory, self.scale, self.keeps, self.yields = None, 1.0, keeps, yields
        self.at_zero: Point | None = None  # the point of zeros
        self.squares: Any = None
        if keeps or of_entries(problem.penalty, self.x.size):
            part = Part(self.fit, self.columns, self.terms(problem.penalty))
            chosen = Chosen(self.columns, self.fit.gram_weights, part.centres)
            self.memory = Memory(chosen, LazyPull(self.columns))
        self.now: Point | None = None

    def terms(self, penalty: Any) -> Any:
        if (groups := groups_of(penalty, self.x.size)) is not None:
            return groups
        if not of_entries(penalty, self.x.size):
            return EntryTerms(self.x.size, *penalty.entry_terms())
        if self.squares is None:
            self.squares = self.columns.squares(self.fit.gram_weights)
            at_zero = self.columns.pull(self.fit.at(np.zeros_like(self.fit.target)).slope)
            self.scale = float(np.linalg.norm(at_zero / np.sqrt(np.maximum(self.squares, TINY))))
        return EntryPenalty(penalty, self.x.size, self.squares, self.scale)

    def _led(self, part: Part, point: Point) -> Point:
        """The best end of the ways to a penalty that is not convex, where x is then: from zeros, and from x."""
        if self.at_zero is None:
            at = self.fit.at(np.zeros_like(point.z))
            self.at_zero = Point(np.zeros_like(point.z), at, self.columns.pull(at.slope)) if self.x.any() else point
        ways = [(np.zeros_like(self.x), self.at_zero, path) for path in part.terms.paths()]
        if self.x.any():
            ways.append((self.x.copy(), point, [part.terms]))
        ends = []
        for x, end, path in ways:
            for terms in path:
                level = part._replace(terms=terms)
                end, proofs = rounds(level, x, end, LEVEL_TOL, LEVEL_ROUNDS, self.memory, yields=self.yields)
            ends.append((proofs[-1].objective, x, end))
        _, self.x[:], point = min(ends, key=lambda end: end[0])
        return point

    def begin(self) -> Point:
        """The image of x, the loss there and the gradient; a matrix that is not finite is found here."""
        if self.now is None:
            with precision(np.dtype(np.float64)):
                z = self.columns.image(self.x)
                at = self.fit.at(z)
            self.now = Point(z, at, self.columns.pull(at.slope))
            if not np.isfinite(self.now.gradient).all() and (reason := self.loss.refuses_matrix()):
                raise ValueError(reason)
        return self.now

    def at(self, penalty: Any, tol: float, max_steps: int, history: bool = False) -> Solution:
        """The solution with a penalty."""
        terms, x, kind = self.terms(penalty), self.x, self.kind
        with precision(np.dtype(np.float64)):
            if self.now is None:
                x[:] = terms.inside(x)
                zero = terms.inside(np.zeros_like(x))
                # A start that is worse than 0 would only cost steps.
                if x.any() and not zero.any() and not self.begin().now.value + terms.value(x) <= self.fit.at_zero:
                    self.now, x[:] = None, 0
            point = self.begin()
            if self.memory:
                point = point._replace(gradient=self.memory.pull(point.now.slope, terms, x))
            part = Part(self.fit, self.columns, terms)
            if max_steps and not terms.convex and (self.keeps or not x.any()):
                point = self._led(part, point)
            most = min(max_steps, MOST_ROUNDS)
            self.now, proofs = rounds(part, x, point, tol, most, self.memory, yields=self.yields)
            proof = proofs[-1]
            with np.errstate(over="ignore"):
                value = x.astype(kind)
            if kind != x.dtype and np.isfinite(value).all():
                proof = self._rounded(part, value.astype(np.float64), proof)
        found = _solution(value, proof, proofs, tol, max_steps, history)
        return found if terms.convex else _without_gap(found)

    def _rounded(self, part: Part, x: np.ndarray, proof: Proof) -> Proof:
        """The proof of a rounded x: the bound stays, the objective rises."""
        (fit, columns, terms), z = part, self.columns.image(x)
        now = fit.at(z)
        objective = now.value + terms.value(x)
        if not terms.convex:
            return Proof(objective, terms.residual(x, columns.pull(now.slope)), None)
        if objective <= fit.nothing(ALLOWED * columns.eps):
            return Proof(objective, EPS, proof.dual)
        bound = proof.objective / (1 + proof.gap)
        return Proof(objective, max(proof.gap + (objective - proof.objective) / max(bound, TINY), 0.0), proof.dual)


def _solution(x: np.ndarray, proof: Proof, proofs: list[Proof], tol: float, max_steps: int, history: bool) -> Solution:
    """The answer of the host."""
    steps, kind = len(proofs) - 1, x.dtype
    if proof.gap <= tol:
        status = Status.CONVERGED
    elif not (np.isfinite(x).all() and np.isfinite(proof.objective)):
        status = Status.NONFINITE
    else:
        status = Status.MAX_STEPS if steps >= max_steps else Status.PRECISION
    record: Any = None
    if history:
        rows = np.full((2, max_steps), np.nan, kind)
        rows[:, :steps] = [one.gap for one in proofs[1:]], [one.objective for one in proofs[1:]]
        record = Measure(rows[0], rows[1], rows[0], stalled=None)
    with np.errstate(over="ignore"):
        gap, objective = (np.asarray(number).astype(kind) for number in (proof.gap, proof.objective))
        dual = None if proof.dual is None else proof.dual.astype(kind)
    return Solution(x, np.int32(status), np.int32(steps), gap, objective, gap, record, dual=dual)


def _without_gap(found: Solution) -> Solution:
    """Of a penalty that is not convex: the residual says how far x is from a stationary point."""
    status = np.int32(Status.STATIONARY) if found.status == Status.CONVERGED else found.status
    record: Any = found.history
    if record is not None:
        record = record._replace(gap=np.full_like(record.gap, np.nan))
    return dataclasses.replace(found, status=status, gap=np.full_like(found.gap, np.nan), history=record)
