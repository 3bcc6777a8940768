"""Floor 7: the methods that Doge-ADMM is compared with, for experiments only, all on the core's one ADMM.

    minimise over b    1/2 ||y - b||²  +  weight ||Δ^(k+1) b||_1

Each method splits some differences off and keeps the others in the penalty:

| method | split z | penalty step | source |
|---|---|---|---|
| admm | `Δ^(k+1) b` | soft threshold | Boyd et al. 2011, section 6.4.1 |
| gtf_admm, k even | `L^(k/2) b` | total variation | Wang et al. 2016 |
| gtf_admm, k odd | `L^((k+1)/2) b` | soft threshold | Wang et al. 2016 |
| fast_admm | `Δ^(k) b` | total variation | Ramdas and Tibshirani 2016 |
| doge_groups | `Δ^(k+1-B) b`, a copy a group of rows | closed form, row by row | Bu, Wu, Zuo, section 2.2 |
| doge | the same, without stored copies | the same | `core/solvers/doge_groups.py` says why |

The total variation is that of the last difference, `weight ||E z||_1` with E = D (k even) or Dᵀ (k odd).
So gtf_admm is fast_admm where k is even, and admm where k is odd: four names, three algorithms at each order.
On a chain the total variation step has an exact answer in O(n). On other graphs it is an optimisation of its
own, done here by Doge-ADMM from the answer of the step before until its duality gap is small.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseopt.core.fidelity import NodeSquares, total
from sparseopt.core.mesh import Devices
from sparseopt.core.operators import Difference, Split
from sparseopt.core.penalties import L1
from sparseopt.core.problem import Measure, Problem, Solution
from sparseopt.core.solve import solve
from sparseopt.core.solvers.admm import Admm, AdmmState, Start, standard_split
from sparseopt.core.solvers.doge import doge_split
from sparseopt.core.solvers.node_solve import Diagonal
from sparseopt.core.types import precision, pytree, static
from sparseopt.trend.filter import trend_filter
from sparseopt.trend.graph import Graph
from sparseopt.trend.ground import leaves_as
from sparseopt.trend.job import Job
from sparseopt.trend.layout import layout_of
from sparseopt.trend.methods import METHODS, PURE, chosen
from sparseopt.trend.methods.admm import node_solve
from sparseopt.trend.methods.doge import split_of
from sparseopt.trend.plan import FIRST_RHO
from sparseopt.trend.signal import Signal

FloatArray = Float[Array, "..."]
Method = Literal["auto", "doge", "admm", "gtf_admm", "fast_admm", "doge_groups"]
Stop = Literal["gap", "change"]
Settings = Literal["tuned", "published"]
PUBLISHED_RHO = 1.0
INNER_CADENCE = 5


@pytree
class LastDifference:
    """`weight ||E z||_1` together with the answer of its proximal step, as the outer ADMM sees it.

    The dual ball is `{Eᵀu : |u| <= weight}`. The step's dual answer u is kept, so the point `Eᵀu` that certifies
    the outer gap lies in the ball whatever the accuracy of the inner solve.

    Attributes:
        weight: of the penalty.
        last: E.
        potential: u, the dual answer.
        answer: the prox.
    """

    nearest = False
    weight: Any
    last: Difference
    potential: Any
    answer: Any

    def value(self, x: FloatArray) -> Float[Array, ""]:
        """The penalty."""
        return self.weight * total(jnp.abs(self.last.mv(x)))

    def prox(self, x: FloatArray, step: Any) -> FloatArray:
        """The answer that was found beforehand."""
        del x, step
        return self.answer

    def project_dual(self, dual: FloatArray) -> FloatArray:
        """`Eᵀu`, which is `dual` up to rounding."""
        del dual
        return self.last.rmv(self.potential)

    def slack(self, x: FloatArray, dual: FloatArray) -> FloatArray:
        """`weight |E x| - u E x`, row by row."""
        del dual
        rows = self.last.mv(x)
        return self.weight * jnp.abs(rows) - self.potential * rows


class NestedState(NamedTuple):
    """The outer state, where the next inner solve starts, and the inner steps so far."""

    outer: AdmmState
    guess: Any
    potential: Any
    inner_rho: Any
    inner_steps: Any


@pytree
class NestedAdmm:
    """ADMM with an optimisation inside each penalty step: `argmin_z 1/2 ||z - v||² + (weight / rho) ||E z||_1`.

    The inner solve runs Doge-ADMM to a relative duality gap and starts from the last answer. Its dual u gives
    `z = v - Eᵀu`, so Moreau's identity holds exactly in the outer iteration.

    Attributes:
        outer: the outer ADMM; its x-step, rho and checks.
        split: of E, for the inner solve.
        inner_tol: relative duality gap of an inner solve.
        inner_limit: most steps of one inner solve.
    """

    outer: Admm
    split: Split
    inner_tol: Any
    inner_limit: int = static(default=2000)

    def init(self, problem: Problem, x0: Start) -> NestedState:
        """U = 0."""
        z = problem.operator.inner.mv(x0.x)
        potential = jnp.zeros_like(self.split.mv(z))
        outer = self.outer.init(self._solved(problem, potential, z), x0)
        return NestedState(outer, z, potential, outer.rho, jnp.zeros((), jnp.int32))

    def _solved(self, problem: Problem, potential: FloatArray, answer: FloatArray) -> Problem:
        penalty = LastDifference(problem.penalty.weight, self.split.outer, potential, answer)
        return Problem(problem.loss, penalty, problem.operator)

    def step(self, problem: Problem, state: NestedState) -> NestedState:
        """One inner solve, then one outer iteration with its answer."""
        outer = state.outer
        z = outer.x if outer.inner is None else outer.inner
        v = z + (outer.dual - outer.memory) / outer.rho
        level = problem.penalty.weight / outer.rho
        start = Start(state.guess, jnp.clip(state.potential / outer.rho, -level, level), state.inner_rho)
        found = solve(
            Problem(NodeSquares(v), L1(level), self.split),
            Admm(Diagonal(), state.inner_rho, self.outer.relaxation, INNER_CADENCE),
            start,
            tol=self.inner_tol,
            max_steps=self.inner_limit,
        )
        potential = outer.rho * jnp.clip(found.state.candidate, -level, level)
        answer = v - self.split.rmv(potential) / outer.rho
        outer = self.outer.iterate(self._solved(problem, potential, answer), outer)
        return NestedState(outer, found.value, potential, found.state.rho, state.inner_steps + found.steps)

    def measure(self, problem: Problem, state: NestedState) -> Measure:
        """The outer measure and the inner steps so far."""
        now = self.outer.measure(problem, state.outer)
        return now._replace(extra={**now.extra, "inner_steps": state.inner_steps.astype(now.residual.dtype)})

    def extract(self, problem: Problem, state: NestedState) -> FloatArray:
        """The fit."""
        return self.outer.extract(problem, state.outer)


class ChangeState(NamedTuple):
    """A solver's state and the fit before its last step."""

    state: Any
    before: Any


@pytree
class UntilChange:
    """Any solver, stopped once `||b_new - b_old|| / ||b_old||` is small: cheap to see, and no bound on anything."""

    solver: Any

    def init(self, problem: Problem, x0: Any) -> ChangeState:
        """The solver's start."""
        state = self.solver.init(problem, x0)
        return ChangeState(state, self.solver.extract(problem, state))

    def step(self, problem: Problem, state: ChangeState) -> ChangeState:
        """The solver's iteration; a step of the ADMM makes many."""
        advance = getattr(self.solver, "iterate", self.solver.step)
        return ChangeState(advance(problem, state.state), self.solver.extract(problem, state.state))

    def measure(self, problem: Problem, state: ChangeState) -> Measure:
        """The solver's measure with the change for a residual."""
        now = self.solver.measure(problem, state.state)
        moved = self.solver.extract(problem, state.state) - state.before
        tiny = jnp.finfo(moved.dtype).tiny
        change = jnp.sqrt(total(moved * moved) / jnp.maximum(total(state.before * state.before), tiny))
        return now._replace(residual=change, stalled=False)

    def extract(self, problem: Problem, state: ChangeState) -> FloatArray:
        """The solver's answer."""
        return self.solver.extract(problem, state.state)


class Assembled(NamedTuple):
    """What `solve` takes, and the name of the algorithm in it."""

    problem: Problem
    solver: Any
    start: Start
    algorithm: str


def algorithm_of(method: str, graph: Graph, order: int) -> str:
    """`gtf_admm` is another method's algorithm: `fast_admm` at even orders, `admm` at odd ones."""
    if method != "gtf_admm":
        return method
    return "fast_admm" if order % 2 == 0 else "admm"


def assemble(
    y: np.ndarray,
    graph: Graph,
    penalty: Any,
    order: int,
    method: Method,
    settings: Settings = "tuned",
    cadence: int = 5,
    inner_tol: float = 1e-8,
) -> Assembled:
    """Problem, solver and start of a method for a signal without missing values; call it under `precision`.

    Args:
        y: `[*shape]` of a grid or `[n]`, float64.
        graph: where it lives.
        penalty: `L1` for `fast_admm` and for what it stands for, else any.
        order: k.
        method: which.
        settings: "tuned" chooses rho from the data, adapts and over-relaxes as `trend_filter` does; "published"
            holds rho at 1 without relaxation and, for `doge`, counts a copy of every column for every group, as
            `doge_groups` stores it whatever the settings; there the two have the same iterates.
        cadence: steps between two checks.
        inner_tol: relative gap of the inner solves of `fast_admm`.

    Raises:
        ValueError: for a penalty that the method cannot have.
    """
    kind = np.dtype(np.float64)
    values = np.asarray(y, kind).reshape(graph.num_nodes)
    job = Job(layout_of(graph), {order: penalty}, kind, signal=Signal(values, None, values.shape))
    algorithm = chosen(job, PURE).name if method == "auto" else algorithm_of(method, graph, order)
    penalty = leaves_as(penalty, kind)
    tuned = settings == "tuned"

    def set_up(solver: Callable[[Any, Any], Admm]) -> Admm:
        rho = jnp.asarray(FIRST_RHO * job.strength if tuned else PUBLISHED_RHO, kind)
        relaxation = jnp.asarray(1.7 if tuned else 1.0, kind)
        made = solver(rho, relaxation)
        return dataclasses.replace(made, cadence=cadence, changes=9 if tuned else 0, acceleration=0)

    centre, _ = job.arrays
    loss = NodeSquares(centre)
    if algorithm == "fast_admm" and not isinstance(penalty, L1):
        raise ValueError(f'method="{method}" at order {order} solves the L1 penalty, given {penalty}')
    if algorithm == "fast_admm" and METHODS[algorithm].refuses(job):
        return _nested(loss, job, penalty, set_up, inner_tol)
    plan = METHODS[algorithm].plan(job)
    split, penalty = plan.split, plan.taken(penalty)
    if algorithm == "doge" and not tuned:
        split = graph.cached(("published", order), lambda: _copies_everywhere(job))
    start = Start(centre, jnp.zeros(split.row_shape(centre), kind))
    return Assembled(Problem(loss, penalty, split), set_up(plan.solver), start, algorithm)


def _copies_everywhere(job: Job) -> Split:
    """The split of Doge-ADMM where every group has a copy of every column."""
    block = job.order + 1
    groups = int(job.graph.groups(block).max()) + 1
    return jax.tree.map(jnp.asarray, split_of(job, block, "groups", groups))


def _nested(loss: NodeSquares, job: Job, penalty: L1, set_up: Any, inner_tol: float) -> Assembled:
    """`fast_admm` where the inner total variation has no closed form."""
    kind = loss.center.dtype
    split, last, node_solve = job.graph.cached(("nested", job.order), lambda: _prepare_nested(job))
    start = Start(loss.center, jnp.zeros(split.row_shape(loss.center), kind))
    solver = NestedAdmm(set_up(partial(Admm, node_solve)), last, jnp.asarray(inner_tol, kind))
    return Assembled(Problem(loss, penalty, split), solver, start, "fast_admm")


def _prepare_nested(job: Job) -> tuple[Split, Split, Any]:
    """The outer split, the inner one, and the x-step of the outer one."""
    order, kind, graph = job.order, job.dtype, job.graph
    base, on_edges = graph.base(kind), order % 2 == 1
    last = doge_split(
        Difference(base, 1, on_edges), Difference(base, 0, on_edges), graph.sums(1, on_edges), "coefficients", kind
    )
    split = standard_split(Difference(base, order), Difference(base, 0, on_edges), kind)
    solve = node_solve(job, (order,), np.ones(()), graph.shape is not None) if order else Diagonal()
    return jax.tree.map(jnp.asarray, (split, last, solve))


def fit(
    y: np.ndarray,
    graph: Graph,
    penalty: Any,
    order: int,
    method: Method,
    *,
    settings: Settings = "tuned",
    stop: Stop = "gap",
    tol: float = 1e-4,
    max_steps: int = 20_000,
    inner_tol: float | None = None,
    dtype: Any = np.float64,
    devices: Devices = None,
) -> Solution:
    """The fit of any method; `trend_filter` itself where it has the method, its settings and its stopping rule.

    Args:
        y: the signal, with a last axis of channels only where `trend_filter` does the work.
        graph: where it lives.
        penalty: as in `assemble`.
        order: k.
        method: which.
        settings: as in `assemble`.
        stop: "gap" for the relative duality gap, checked at every fifth step; "change" for the relative change of
            the fit in a step, checked at each.
        tol: what the stopping rule compares with.
        max_steps: step limit.
        inner_tol: relative gap of the inner solves of `fast_admm`, None for a tenth of `tol`. With a coarser one
            the over-relaxed iteration comes to rest above the optimum, which its certificate shows.
        dtype: of the computation; the baselines have float64 alone.
        devices: as in `trend_filter`; the baselines have one alone.

    Raises:
        ValueError: for a combination that does not exist.
    """
    algorithm = algorithm_of(method, graph, order)
    chain = graph.shape is not None and len(graph.shape) == 1
    if settings == "tuned" and stop == "gap" and (algorithm != "fast_admm" or chain):
        if devices is not None and method == "auto":
            algorithm = "auto"  # which takes what works on many
        return trend_filter(y, graph, penalty, order, algorithm, tol, max_steps, dtype=dtype, devices=devices)
    if devices is not None:
        raise ValueError(
            f"method={method!r} with settings={settings!r} and stop={stop!r} is a baseline: it works on one device, "
            f"given devices={devices!r}"
        )
    if np.dtype(dtype) != np.float64 or np.size(y) != graph.num_nodes:
        raise ValueError(
            f"method={method!r} with settings={settings!r} and stop={stop!r} is a baseline: it takes float64 and one "
            f"channel, given {np.dtype(dtype)} and the shape {np.shape(y)} on {graph.num_nodes} nodes"
        )
    inner = tol / 10 if inner_tol is None else inner_tol
    with precision(np.dtype(np.float64)):
        made = assemble(y, graph, penalty, order, method, settings, 5 if stop == "gap" else 1, inner)
        solver = made.solver if stop == "gap" else UntilChange(made.solver)
        found = solve(made.problem, solver, made.start, tol=jnp.asarray(tol, jnp.float64), max_steps=max_steps)
        return jax.device_get(found)
