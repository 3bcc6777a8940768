"""The split ADMM for terms `h(Ψ Δ x)`, each a product of two linear maps, and a square that stays in the x-step.

    minimise over x    1/2 sum_j w_j (x_j - y_j)²  +  penalty(Ψ Δ x)

With Ψ = I it is the standard ADMM of trend filtering, with Δ = I Doge-ADMM (see `doge.py`); `loss_admm.py` has another
loss in place of the square, as one more term. One iteration, with z = Δ x, dual g, memory m = rho d (d of the scaled
form), r for the relaxation and the metrics C and S of `Split`:

    v  = Ψ (rho z - m) / S + g
    g' = v - (rho / S) prox(S v / rho, S / rho)
    g  = (1 - r) g + r g'
    x  = (W + rho Δᵀ C Δ)^-1 ( W y + Δᵀ ( C (rho z + (1 - r) m) - Ψᵀ g ) )
    m  = (1 - r) m + rho (z_old - z)

If Ψ = I (S a number, C = 1 / S), the state of the iteration is `w = (rho z + m) / S - g`, and x is an affine
function of it. The iteration w <- (1 - r) w + r (rho z / S - g') is averaged, so `anderson.py` may accelerate it.

Source: Boyd, Parikh, Chu, Peleato, Eckstein, "Distributed optimization and statistical learning via ADMM", 2011,
section 3.4.3; for the diagonal metrics Pock and Chambolle, "Diagonal preconditioning for first order primal-dual
algorithms", 2011.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sparseopt.core.base.sums import relative, rms, total
from sparseopt.core.base.types import pytree, static
from sparseopt.core.operators.maps import Split
from sparseopt.core.penalties.protocols import dual_step, has_conjugate, is_norm
from sparseopt.core.problem.certify import judge
from sparseopt.core.problem.problem import Measure, Problem, Progress, Start, needs
from sparseopt.core.solvers.anderson import continue_from, empty_memory, forget

# The best rho lies near this multiple of rms(dual) / rms(y - x): measured on grids, chains and road graphs.
BALANCE = 3.0
# rho changes at these multiples of 1, 2, 4, ...; from MOVING on it follows the last step instead of the distance.
FIRST_CHANGE = 10
MOVING = 40
LARGEST_FACTOR = 4.0
# Without convexity rho first finds its scale, then grows slowly: a falling rho lets the iterates wander between local
# minima, a large rise freezes them in a poor one.
GENTLE_FACTOR = 1.5
# The solve ends after this many iterations in which the residual did not fall by a tenth and is within this multiple of
# its estimated rounding error.
PATIENCE = 100
ROUNDING_MARGIN = 30.0
# The bound D counts as far from its limit as it moves in this many steps: of 40, 80 and 160 the last took the least
# time on grids of 128 × 128 and 256 × 256 (8 weights, gaps of 1e-3 to 1e-6), since fewer answers had to be tried.
SETTLING = 160


class Term(NamedTuple):
    """A term `function(Ψ Δ x)` with its metrics."""

    function: Any
    outer: Any  # Ψ
    inner: Any  # Δ
    row_scale: Any  # S
    column_scale: Any  # C

    def kept(self, z: Array) -> Array | None:
        """What an iteration keeps of Δ x."""
        return None if self.inner.order == 0 else z


class Block(NamedTuple):
    """What an iteration keeps of a term."""

    inner: Any  # z = Δ x, or None if Δ is the identity
    memory: Any  # m = rho d, which a change of rho leaves unchanged; in `DogeGroups` its copies
    dual: Any  # g, relaxed
    candidate: Any  # g'
    prox: Any  # the last prox, Ψ Δ x at the answer; None for a norm, which does not need it
    rho: Any


class Moving(NamedTuple):
    """What an iteration changes."""

    x: Any
    blocks: tuple[Block, ...]  # of the terms; the last one is the penalty's

    def inner(self, block: Block) -> Array:
        return self.x if block.inner is None else block.inner

    def bare(self) -> "Moving":
        """What the next iteration reads: without the last dual points and proxes."""
        return self._replace(blocks=tuple(block._replace(candidate=None, prox=None) for block in self.blocks))

    def dressed(self, other: "Moving") -> "Moving":
        """With those of another."""
        pairs = zip(self.blocks, other.blocks, strict=True)
        return self._replace(blocks=tuple(b._replace(candidate=o.candidate, prox=o.prox) for b, o in pairs))


class Check(NamedTuple):
    """The result of a check."""

    residual: Any
    objective: Any
    gap: Any
    progress: Any  # counts iterations
    floor: Any  # the estimated rounding error of the residual
    motion: Any  # the rho that the last step asks for, computed when rho may change or is settled


class Mean(NamedTuple):
    """The mean of the iterates since the last restart."""

    sums: Moving
    length: Any  # their number
    restart_gap: Any  # the gap at the last restart


@pytree
class AdmmState:
    """One state of the iteration."""

    now: Moving
    count: Any
    next_change: Any
    check: Any
    unit_noise: Any  # the penalty of the rows of rounding noise of size 1; 0 without a conjugate
    past: Any  # the `Memory` of the acceleration, or None
    mean: Any  # the `Mean` of a loss's iteration, or None

    @property
    def rows(self) -> Block:
        """The block of the penalty."""
        return self.now.blocks[-1]

    @property
    def candidate(self) -> Any:
        """The dual point of the certificate."""
        return self.rows.candidate

    @property
    def rho(self) -> Any:
        return self.rows.rho

    @property
    def sigma(self) -> Any:
        """The rho of a loss; None for the square, which stays in the x-step."""
        return self.now.blocks[0].rho if len(self.now.blocks) > 1 else None


def balanced_rho(split: Split, loss: Any, x: Array, dual: Array) -> Array:
    """`3 rms(dual) / rms(y - x)` in the metrics of the split: near the best rho once x and the dual have their size."""
    on_nodes = split.column_scale if split.inner.order == 0 else jnp.ones((), x.dtype)
    return BALANCE * rms(split.row_scale, dual) / rms(on_nodes, loss.mask_missing(loss.target - x))


def limit(factor: Array, later: Array, penalty: Any) -> Array:
    """A factor of rho within its limits; `later` says that rho follows the last step."""
    gentle = later & (not has_conjugate(penalty))
    least = jnp.where(gentle, 1.0, 1 / LARGEST_FACTOR)
    return jnp.clip(factor, least, jnp.where(gentle, GENTLE_FACTOR, LARGEST_FACTOR))


def step_lengths(term: Term, turned: Array, shifted: Array) -> list[Array]:
    """The squared lengths of a step of the dual and of z in a term's metrics; at least the smallest normal number."""
    steps = ((term.row_scale, turned), (term.column_scale, shifted))
    return [jnp.maximum(total(scale * step**2), jnp.finfo(step.dtype).tiny) for scale, step in steps]


@pytree
class Admm:
    """The split ADMM as a solver for `solve`; `problem.operator` is a `Split`, `problem.loss` a `DataLoss`.

    With a conjugate the residual is the relative duality gap `(P(x) - D(g')) / D(g')`, never below the relative
    suboptimality `(P(x) - P*) / P*` (+inf while D is not positive). For any other penalty it is a stationarity
    residual, the larger of `||W (x - y) + ΔᵀΨᵀ g'|| / ||W y||` and `||Ψ Δ x - prox||` over the larger of `||Ψ Δ x||`,
    which may be 0, and `||Ψ Δ y||` of the observed y; the gap is NaN. Both are computed at every `cadence`-th
    iteration, at the end of a step.

    rho changes at the checks of steps 10, 20, 40, ..., or the next ones, at most `changes` times, by a factor of at
    most 4. Then it stays, so the convergence theory of a fixed rho holds from there on. The first two changes set it to
    `3 rms(g') / rms(y - x)`, later ones to the ratio of the last dual and primal steps in their metrics. For a penalty
    that is not a norm the later ones only raise it, by at most a half.

    The acceleration extrapolates after every check, only with a conjugate and Ψ = I: without convexity an extrapolation
    may jump to a worse minimum, and with another Ψ it was measured to gain little.

    Attributes:
        node_solve: solves the x-step for a given rho.
        rho: the first value, if the `Start` has none.
        relaxation: in (0, 2).
        cadence: steps between two checks; a check costs one product with the operator and one with its transpose.
        changes: how often rho may change; 0 keeps it.
        acceleration: how many differences of checked steps Anderson acceleration remembers; 0 for none.
        settles: whether the residual is `unsettled` instead of the gap, for an answer that is rounded afterwards: what
            rounding leaves of the gap is the distance of D from its limit.
        sets: an object whose `within(penalty, x)` moves x into the sets that the penalty allows, for its gap; or None.
    """

    node_solve: Any
    rho: Any
    relaxation: Any = 1.7
    cadence: int = static(default=5)
    changes: int = static(default=9)
    acceleration: int = static(default=0)
    settles: Any = False
    sets: Any = None

    def _accelerates(self, problem: Problem) -> bool:
        return self.acceleration > 0 and has_conjugate(problem.penalty) and problem.operator.outer.order == 0

    def refuses(self, problem: Problem) -> str | None:
        if not getattr(problem.loss, "is_square", True):
            return f"{type(self).__name__} solves the square loss, given {problem.loss.name}"
        return self._refuses_split(problem, "target weigh mask_missing slack gradient value")

    def _refuses_split(self, problem: Problem, loss: str) -> str | None:
        """Why it refuses a problem: its operator is not a `Split`, or its loss lacks one of these methods."""
        if isinstance(problem.operator, Split):
            if getattr(problem.loss, "matrix", None) is not None:
                return f"{type(self).__name__} needs a loss of x itself, given one with a matrix: use PrimalDual"
            return needs(self, problem, operator=True, loss=loss)
        given = "none" if problem.operator is None else type(problem.operator).__name__
        return (
            f"{type(self).__name__} needs a Split as the problem's operator, given {given}; sparseopt.trend_filter "
            "makes it for a graph, and Maiht and ProximalGradient solve problems without an operator"
        )

    def _terms(self, problem: Problem) -> tuple[Term, ...]:
        """What the iteration dualises, in the order of `Moving.blocks`."""
        split = problem.operator
        return (Term(problem.penalty, split.outer, split.inner, split.row_scale, split.column_scale),)

    def _first_duals(self, problem: Problem, start: Start) -> tuple[tuple[Array, Any], ...]:
        """The dual and the rho of every term."""
        return ((start.dual, self.rho if start.rho is None else start.rho),)

    def _x_step(self, problem: Problem, now: Moving, pulled: Array) -> Array:
        """The next x from what pulls at it."""
        loss, rho = problem.loss, now.blocks[-1].rho
        right = loss.weigh(loss.target) + pulled
        return self.node_solve.solve(loss.weights, problem.operator, right, rho, now.x)

    def init(self, problem: Problem, start: Start | AdmmState) -> AdmmState:
        """From a start, or from a state, to continue with another tolerance or penalty.

        It has a check as if it were the first; for a norm without a certificate, which every step computes.
        """
        state = start if isinstance(start, AdmmState) else self._begin(problem, start)
        far = jnp.full((), jnp.inf, state.now.x.dtype)
        residual, objective, gap, floor = far, far, far, jnp.zeros_like(far)
        if not has_conjugate(problem.penalty):
            state, (residual, objective, gap, floor) = self._certify(problem, state)
        progress = Progress(jnp.full_like(residual, jnp.inf), jnp.zeros((), jnp.int32))
        check = Check(residual, objective, gap, progress, floor, state.check.motion)
        return dataclasses.replace(state, check=check)

    def _begin(self, problem: Problem, start: Start) -> AdmmState:
        """The initial state: memory 0, dual and candidate from the start."""
        x, blocks = start.x, []
        dtype, norm = x.dtype, is_norm(problem.penalty)
        far = jnp.full((), jnp.inf, dtype)
        for term, (dual, rho) in zip(self._terms(problem), self._first_duals(problem, start), strict=True):
            z = term.inner.mv(x)
            prox = None if norm else term.outer.mv(z)
            blocks.append(Block(term.kept(z), jnp.zeros_like(z), dual, dual, prox, jnp.asarray(rho, dtype)))
        noise = jnp.zeros((), dtype)
        if has_conjugate(problem.penalty):
            # Of alternating sign, which differences along a chain amplify.
            signs = 1 - 2 * (sum(jnp.indices(start.dual.shape, sparse=True)) % 2)
            noise = problem.penalty.value((problem.operator.row_scale * signs).astype(dtype))
            noise = jnp.where(jnp.isfinite(noise), noise, 0)  # the value of a set may be +inf
        next_change = jnp.full((), FIRST_CHANGE if self.changes else -1, jnp.int32)
        return AdmmState(
            now=Moving(x, tuple(blocks)),
            count=jnp.zeros((), jnp.int32),
            next_change=next_change if start.settled is None else jnp.where(start.settled, -1, next_change),
            check=Check(far, far, far, Progress(far, jnp.zeros((), jnp.int32)), 0 * far, blocks[-1].rho),
            unit_noise=noise,
            past=empty_memory(z, x, self.acceleration) if self._accelerates(problem) else None,
            mean=None,
        )

    @property
    def stride(self) -> int:
        return self.cadence

    def step(self, problem: Problem, state: AdmmState) -> AdmmState:
        if state.past is not None:
            split = problem.operator
            # While rho finds its scale the memory would be dropped. A loop of at most one turn, since `cond` copies.
            due = (state.count > 0) & ((state.next_change < 0) | (state.next_change > MOVING))
            state = jax.lax.fori_loop(0, due.astype(jnp.int32), lambda _, now: continue_from(split, now), state)

        def advance(_: Any, last: tuple[Moving, Mean | None]) -> tuple[Moving, Mean | None]:
            now, mean = self._advance(problem, last[0]), last[1]
            if mean is not None:
                mean = mean._replace(sums=jax.tree.map(jnp.add, mean.sums, now), length=mean.length + 1)
            return now, mean

        before = state.now, state.mean
        if state.mean is not None:
            before = jax.lax.fori_loop(0, self.cadence - 1, advance, before)
        elif self.cadence > 1:
            # What no iteration reads would cost half of its memory traffic.
            ahead = jax.lax.fori_loop(
                0, self.cadence - 2, lambda _, last: self._advance(problem, last).bare(), state.now.bare()
            )
            before = self._advance(problem, ahead.dressed(state.now)), None
        now, mean = advance(None, before)
        state = dataclasses.replace(state, now=now, mean=mean, count=state.count + self.cadence)
        return self._check(problem, state, before[0])

    def _advance(self, problem: Problem, now: Moving) -> Moving:
        """One iteration."""
        keep = 1 - jnp.asarray(self.relaxation, now.x.dtype)
        terms, blocks, pulled = self._terms(problem), list[Block](), jnp.zeros((), now.x.dtype)
        for term, block in zip(terms, now.blocks, strict=True):
            z, m, rho = now.inner(block), block.memory, block.rho
            pushed = term.outer.mv(rho * z - m) / term.row_scale + block.dual
            candidate, found = dual_step(term.function, pushed, rho / term.row_scale)
            dual = keep * block.dual + (1 - keep) * candidate
            back = term.column_scale * (rho * z + keep * m) - term.outer.rmv(dual)
            pulled = pulled + term.inner.rmv(back)
            blocks.append(block._replace(dual=dual, candidate=candidate, prox=None if block.prox is None else found))
        x = self._x_step(problem, now, pulled)
        for index, (term, block) in enumerate(zip(terms, blocks, strict=True)):
            z = term.inner.mv(x)
            memory = keep * block.memory + block.rho * (now.inner(block) - z)
            blocks[index] = block._replace(inner=term.kept(z), memory=memory)
        return Moving(x, tuple(blocks))

    def _check(self, problem: Problem, state: AdmmState, before: Moving) -> AdmmState:
        """The state with a fresh check, and a new rho if one is due; `before` is the iteration before the last."""
        due, next_change = _schedule(state.count, state.next_change, self.changes)
        ones = tuple(jnp.ones_like(block.rho) for block in state.now.blocks)
        asked = due | (state.next_change < 0)
        wanted, motion = jax.lax.cond(
            asked, lambda: self._choose_rho(problem, state, before), lambda: (ones, state.check.motion)
        )
        state, (residual, objective, gap, floor) = self._certify(problem, state)
        progress = state.check.progress.after(residual, self.cadence)
        residual = jnp.where(self.settles, unsettled(state.check, objective, gap, self.cadence), residual)
        factors = [jnp.where(due, factor, 1) for factor in wanted]
        blocks = [
            block._replace(rho=block.rho * factor) for block, factor in zip(state.now.blocks, factors, strict=True)
        ]
        return dataclasses.replace(
            state,
            now=state.now._replace(blocks=tuple(blocks)),
            next_change=next_change,
            check=Check(residual, objective, gap, progress, floor, motion),
            past=None if state.past is None else forget(state.past, factors[-1] != 1),
            mean=None if state.mean is None else restart(state.mean, due, jnp.inf),
        )

    def _certify(self, problem: Problem, state: AdmmState) -> tuple[AdmmState, tuple[Array, Array, Array, Array]]:
        """The state, and its residual, objective, gap, and the rounding error to expect in the residual."""
        loss, penalty = problem.loss, problem.penalty
        x, g, unknown = state.now.x, state.candidate, jnp.full((), jnp.nan, state.now.x.dtype)
        x = self._within(problem, x)
        objective, gap = judge(problem, x, g) if has_conjugate(penalty) else (unknown, unknown)
        residual = gap
        if not is_norm(penalty):
            rows, pulled = jax.lax.optimization_barrier((problem.operator.mv(x), problem.operator.rmv(g)))
            balance = relative(loss.gradient(x) + pulled, loss.weigh(loss.target))
            of_signal = problem.operator.mv(loss.mask_missing(loss.target))
            stationarity = jnp.maximum(balance, relative(rows - state.rows.prox, rows, of_signal))
            # The rows of x may lie slightly outside a set.
            inside = jnp.isfinite(objective)
            residual, gap = jnp.where(inside, gap, stationarity), jnp.where(inside, gap, unknown)
            objective = jnp.where(inside, objective, loss.value(x) + penalty.value(state.rows.prox))
        return state, (residual, objective, gap, self._floor(state, objective))

    def _within(self, problem: Problem, x: Array) -> Array:
        return x if self.sets is None else self.sets.within(problem.penalty, x)

    def _floor(self, state: AdmmState, objective: Array) -> Array:
        # A row of x known to eps |x| costs its penalty that much: no answer in this precision is better.
        x, limits = state.now.x, jnp.finfo(objective.dtype)
        noise = state.unit_noise * jnp.sqrt(total(x * x) / x.size)
        return limits.eps * (1 + noise / jnp.maximum(objective, limits.tiny))

    def _choose_rho(self, problem: Problem, state: AdmmState, before: Moving) -> tuple[tuple[Array, ...], Array]:
        """The factor for every rho, and the rho that the last iteration asks for."""
        (term,), rows, (old,) = self._terms(problem), state.rows, before.blocks
        # The candidate, unlike the relaxed dual, forgets an extrapolation at once. Without convexity there is none, and
        # the relaxed dual moves less, so that rho grows more gently.
        convex = has_conjugate(problem.penalty)
        turned = rows.candidate - old.candidate if convex else rows.dual - old.dual
        dual_length, primal_length = step_lengths(term, turned, state.now.inner(rows) - before.inner(old))
        motion = jnp.sqrt(dual_length / primal_length)
        distance = balanced_rho(problem.operator, problem.loss, state.now.x, rows.candidate)
        wanted = jnp.where(state.count < MOVING, distance, motion) / state.rho
        tiny = jnp.finfo(motion.dtype).tiny
        still = (dual_length <= tiny) | (primal_length <= tiny)
        return (limit(wanted, state.count >= MOVING, problem.penalty),), jnp.where(still, state.rho, motion)

    def measure(self, problem: Problem, state: AdmmState) -> Measure:
        check = state.check
        best, waited = check.progress
        stalled = (best <= ROUNDING_MARGIN * check.floor) & (waited >= PATIENCE)
        return Measure(check.residual, check.objective, check.gap, {"rho": state.rho}, stalled)

    def duals(self, problem: Problem, state: AdmmState) -> tuple[Array | None, Array]:
        return None, state.candidate

    def prox_step(self, problem: Problem, state: AdmmState) -> Array:
        return problem.operator.row_scale / state.rho

    def extract(self, problem: Problem, state: AdmmState) -> Array:
        return state.now.x


def _schedule(count: Array, next_change: Array, changes: int) -> tuple[Array, Array]:
    """Whether rho changes now, and the next change after a check; -1 for none."""
    due = (next_change >= 0) & (count >= next_change)
    last = FIRST_CHANGE * 2 ** max(changes - 1, 0)
    return due, jnp.where(due, jnp.where(next_change < last, 2 * next_change, -1), next_change)


def unsettled(last: Check, objective: Array, gap: Array, steps: int) -> Array:
    """How far the bound D is from its limit, relative to it, if it goes on as in the steps since the last check.

    At least the square of the gap, since D may rest far below; at most the gap.
    """
    bound, before = objective / (1 + gap), last.objective / (1 + last.gap)
    moved = jnp.where(jnp.minimum(before, bound) > 0, SETTLING / steps * jnp.abs(bound - before) / bound, jnp.inf)
    return jnp.minimum(jnp.maximum(moved, gap * gap), gap)


def restart(mean: Mean, due: Array, gap: Any) -> Mean:
    """The mean, restarted at this gap if a restart is due."""
    sums = jax.tree.map(lambda s: jnp.where(due, 0, s), mean.sums)
    return Mean(sums, jnp.where(due, 0, mean.length), jnp.where(due, gap, mean.restart_gap))
