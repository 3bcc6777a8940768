"""The methods that Doge-ADMM is compared with, all on the core's one ADMM.

    minimise over b    1/2 ||y - b||²  +  weight ||Δ^(k+1) b||_1

Each method splits some differences off and keeps the others in the penalty:

| method | split z | penalty step | source |
|---|---|---|---|
| admm | `Δ^(k+1) b` | soft threshold | Boyd et al. 2011, section 6.4.1 |
| gtf_admm, k even | `L^(k/2) b` | total variation | Wang et al. 2016 |
| gtf_admm, k odd | `L^((k+1)/2) b` | soft threshold | Wang et al. 2016 |
| fast_admm | `Δ^(k) b` | total variation | Ramdas and Tibshirani 2016 |
| doge_groups | `Δ^(k+1-B) b`, one copy for each group of rows | closed form, row by row | Bu, Wu, Zuo, section 2.2 |
| doge | the same, without stored copies | the same | `core/solvers/doge.py` says why |

The total variation is that of the last difference, `weight ||E z||_1` with E = D (k even) or Dᵀ (k odd).
So gtf_admm is fast_admm where k is even, and admm where k is odd: four names, three algorithms at each order.
The total variation step is itself an optimisation problem, solved here by Doge-ADMM from the answer of the step before
until its duality gap is small.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import sparseopt as so
from sparseopt.core.base.sums import total
from sparseopt.core.base.types import precision
from sparseopt.core.operators.differences import Difference
from sparseopt.core.operators.maps import Identity, Split, standard_split
from sparseopt.core.operators.normal_solves import Diagonal
from sparseopt.core.problem.problem import Measure, Start
from sparseopt.core.solvers.admm import Admm, AdmmState, Moving
from sparseopt.core.solvers.doge import doge_split
from sparseopt.trend.base.fit import Fit
from sparseopt.trend.base.penalties import leaves_as
from sparseopt.trend.methods.choice import METHODS
from sparseopt.trend.methods.doge_plan import split_of
from sparseopt.trend.methods.split_plan import FIRST_RHO

Method = Literal["doge", "admm", "gtf_admm", "fast_admm", "doge_groups"]
Stop = Literal["gap", "change"]
Settings = Literal["tuned", "published"]
METHOD_NAMES = {
    "doge": "Doge-ADMM",
    "admm": "original ADMM",
    "gtf_admm": "GTF-ADMM",
    "fast_admm": "fast ADMM",
    "doge_groups": "Doge-ADMM with its copies",
}
DOUBLE = np.dtype(np.float64)
PUBLISHED_RHO = 1.0
CADENCE = 5


def method_label(method: str, settings: str) -> str:
    """The method for legends."""
    return METHOD_NAMES[method] + (", published settings" if settings == "published" else "")


@so.pytree
class LastDifference:
    """`weight ||E z||_1`, whose proximal step `NestedAdmm` takes; its dual ball is `{Eᵀu : |u| <= weight}`.

    The dual point of a step is `Eᵀu` of the potential u, which lies in the ball however accurate the inner solve was.
    """

    weight: Any
    last: Difference
    potential: Any = None

    def value(self, x: Array) -> Array:
        return self.weight * total(jnp.abs(self.last.mv(x)))

    def prox(self, x: Array, step: Any) -> Array:
        raise NotImplementedError("NestedAdmm takes the proximal step")

    def project_dual(self, dual: Array) -> Array:
        """`Eᵀu`, which `dual` is up to rounding."""
        del dual
        return self.last.rmv(self.potential)

    def slack(self, x: Array, dual: Array) -> Array:
        """`weight |E x| - u E x`, row by row."""
        del dual
        rows = self.last.mv(x)
        return self.weight * jnp.abs(rows) - self.potential * rows


class Nested(NamedTuple):
    """The memory of the outer ADMM, where the next inner solve starts, and the inner steps so far."""

    memory: Any
    guess: Any
    potential: Any
    rho: Any
    steps: Any


@so.pytree
class NestedAdmm(Admm):
    """ADMM with an optimisation inside each penalty step: `argmin_z 1/2 ||z - v||² + (weight / rho) ||E z||_1`.

    The inner solve runs Doge-ADMM on the split of E, to a relative duality gap, from the last answer. Its dual
    u gives `z = v - Eᵀu`, so Moreau's identity holds exactly in the outer iteration. The penalty is a `LastDifference`.
    """

    split: Split = dataclasses.field(kw_only=True)
    inner_tol: Any = dataclasses.field(kw_only=True)
    inner_limit: int = so.static(default=2000)

    def init(self, problem: so.Problem, start: Any) -> AdmmState:
        z = problem.operator.inner.mv(start.x)
        nested = Nested(jnp.zeros_like(z), z, jnp.zeros_like(self.split.mv(z)), None, jnp.zeros((), jnp.int32))
        state = super().init(_with_potential(problem, nested), start)
        rows = state.rows._replace(memory=nested._replace(rho=state.rho))
        return dataclasses.replace(state, now=state.now._replace(blocks=(rows,)))

    def _advance(self, problem: so.Problem, now: Moving) -> Moving:
        (rows,) = now.blocks
        nested, rho, level = rows.memory, rows.rho, problem.penalty.weight / rows.rho
        v = now.inner(rows) + (rows.dual - nested.memory) / rho
        found = so.solve(
            so.Problem(so.LeastSquares(None, v), so.L1(level), self.split),
            Admm(Diagonal(), nested.rho, self.relaxation, CADENCE),
            Start(nested.guess, jnp.clip(nested.potential / rho, -level, level), nested.rho),
            tol=self.inner_tol,
            max_steps=self.inner_limit,
        )
        potential = rho * jnp.clip(found.state.candidate, -level, level)
        nested = Nested(nested.memory, found.value, potential, found.state.rho, nested.steps + found.steps)
        now = now._replace(blocks=(rows._replace(memory=nested.memory),))
        after = super()._advance(_with_potential(problem, nested), now)
        (rows,) = after.blocks
        return after._replace(blocks=(rows._replace(memory=nested._replace(memory=rows.memory)),))

    def _certify(self, problem: so.Problem, state: AdmmState) -> tuple[AdmmState, tuple[Array, Array, Array, Array]]:
        # At the start the problem has its potential, and the state no inner solve yet.
        return super()._certify(_with_potential(problem, state.rows.memory), state)


def _with_potential(problem: so.Problem, nested: Any) -> so.Problem:
    if not isinstance(nested, Nested):
        return problem
    return dataclasses.replace(problem, penalty=dataclasses.replace(problem.penalty, potential=nested.potential))


class ChangeState(NamedTuple):
    """A solver's state and the fit before its last step."""

    state: Any
    before: Any


@so.pytree
class UntilChange:
    """Any solver, stopped once `||b_new - b_old|| / ||b_old||` is small: cheap to see, and no bound on anything."""

    solver: Any

    def init(self, problem: so.Problem, start: Any) -> ChangeState:
        state = self.solver.init(problem, start)
        return ChangeState(state, self.solver.extract(problem, state))

    def step(self, problem: so.Problem, state: ChangeState) -> ChangeState:
        return ChangeState(self.solver.step(problem, state.state), self.solver.extract(problem, state.state))

    def measure(self, problem: so.Problem, state: ChangeState) -> Measure:
        """The solver's measure with the change for a residual."""
        now = self.solver.measure(problem, state.state)
        moved = self.solver.extract(problem, state.state) - state.before
        tiny = jnp.finfo(moved.dtype).tiny
        change = jnp.sqrt(total(moved * moved) / jnp.maximum(total(state.before * state.before), tiny))
        return now._replace(residual=change, stalled=False)

    def extract(self, problem: so.Problem, state: ChangeState) -> Array:
        return self.solver.extract(problem, state.state)


class Assembled(NamedTuple):
    """What `solve` takes, and the name of the algorithm in it."""

    problem: so.Problem
    solver: Any
    start: Start
    algorithm: str


def algorithm_of(method: str, order: int) -> str:
    """The algorithm of a method: that of `gtf_admm` is `fast_admm` at even orders and `admm` at odd ones."""
    if method != "gtf_admm":
        return method
    return "fast_admm" if order % 2 == 0 else "admm"


def assemble(
    y: np.ndarray,
    graph: so.Graph,
    penalty: Any,
    order: int,
    method: Method,
    settings: Settings = "tuned",
    cadence: int = CADENCE,
    inner_tol: float = 1e-8,
) -> Assembled:
    """Problem, solver and start of a method for a float64 signal without missing values; call it under `precision`.

    `settings` "tuned" chooses rho from the data, adapts and over-relaxes as `trend_filter` does; "published" holds rho
    at 1 without relaxation and, for `doge`, counts a copy of every column for every group, as `doge_groups` stores it
    with both settings; the iterates of the two are then the same. `cadence` is the number of steps between two checks,
    `inner_tol` the relative gap of the inner solves of `fast_admm`.

    Raises:
        ValueError: for a penalty that the method does not take.
    """
    values = np.asarray(y, DOUBLE).reshape(graph.num_nodes)
    asked = Fit(graph.geometry, {order: penalty}, values)
    algorithm = algorithm_of(method, order)
    penalty = leaves_as(penalty, DOUBLE)
    tuned = settings == "tuned"

    def set_up(solver: Callable[[Any, Any], Admm]) -> Admm:
        rho = FIRST_RHO * asked.strength if tuned else PUBLISHED_RHO
        made = solver(jnp.asarray(rho, DOUBLE), jnp.asarray(1.7 if tuned else 1.0, DOUBLE))
        return dataclasses.replace(made, cadence=cadence, changes=9 if tuned else 0, acceleration=0)

    centre, _ = asked.arrays
    if algorithm == "fast_admm" and not isinstance(penalty, so.L1):
        raise ValueError(f'method="{method}" at order {order} solves the L1 penalty, given {penalty}')
    if algorithm == "fast_admm":
        split, last, solve_nodes = graph.geometry.cache(("nested", order), lambda: _prepare_nested(asked))
        penalty = LastDifference(penalty.weight, last.outer)
        solver = set_up(partial(NestedAdmm, solve_nodes, split=last, inner_tol=jnp.asarray(inner_tol, DOUBLE)))
    else:
        plan = METHODS[algorithm].plan(asked)
        split, solver = plan.split, set_up(plan.solver)
        if algorithm == "doge" and not tuned:
            split = graph.geometry.cache(("published", order), lambda: _copies_everywhere(asked))
    start = Start(centre, jnp.zeros(split.row_shape(centre), DOUBLE))
    return Assembled(so.Problem(so.LeastSquares(None, centre), penalty, split), solver, start, algorithm)


def _copies_everywhere(asked: Fit) -> Split:
    """The split of Doge-ADMM where every group has a copy of every column."""
    block = asked.order + 1
    return jax.tree.map(jnp.asarray, split_of(asked, block, int(asked.geometry.groups(block).max()) + 1))


def _prepare_nested(asked: Fit) -> tuple[Split, Split, Any]:
    """The outer split of `fast_admm`, the inner one, and the x-step of the outer one."""
    order, geometry = asked.order, asked.geometry
    base, on_edges = geometry.base(DOUBLE), order % 2 == 1
    inner, outer = geometry.difference(order, DOUBLE), Difference(base, 1, on_edges)
    last = doge_split(outer, Identity(outer.in_shape), geometry.sums(1, on_edges), DOUBLE)
    split = standard_split(inner, DOUBLE)
    solve = (
        geometry.x_step((order,), np.ones(()), weighted=False, channels=False, dtype=DOUBLE) if order else Diagonal()
    )
    return jax.tree.map(jnp.asarray, (split, last, solve))


def fit(
    y: np.ndarray,
    graph: so.Graph,
    penalty: Any,
    order: int,
    method: Method,
    *,
    settings: Settings = "tuned",
    stop: Stop = "gap",
    tol: float = 1e-4,
    max_steps: int = 20_000,
    inner_tol: float | None = None,
) -> so.Solution:
    """The fit of any method; `trend_filter` itself where it has the method, its settings and its stopping rule.

    `stop` is "gap" for the relative duality gap, checked at every fifth step, or "change" for the relative change of
    the fit in a step, checked at each. `inner_tol` is by default a tenth of `tol`: with a looser one the over-relaxed
    iteration comes to rest above the optimum, which its certificate shows. The rest is as in `assemble`.

    Raises:
        ValueError: for channels or a penalty that the method does not take.
    """
    algorithm = algorithm_of(method, order)
    if settings == "tuned" and stop == "gap" and algorithm != "fast_admm":
        return so.trend_filter(y, graph, penalty, order, algorithm, tol=tol, max_steps=max_steps)
    if np.size(y) != graph.num_nodes:
        raise ValueError(f"a baseline takes one channel, given shape {np.shape(y)} on {graph.num_nodes} nodes")
    inner = tol / 10 if inner_tol is None else inner_tol
    with precision(DOUBLE):
        made = assemble(y, graph, penalty, order, method, settings, CADENCE if stop == "gap" else 1, inner)
        solver = made.solver if stop == "gap" else UntilChange(made.solver)
        found = so.solve(made.problem, solver, made.start, tol=jnp.asarray(tol, jnp.float64), max_steps=max_steps)
        return jax.device_get(found)
