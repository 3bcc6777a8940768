"""The problem, how a solve ends, the solver protocol and the solution.

    minimise over x    loss(x) + penalty(operator x)

A solver is a frozen pytree with four pure methods; the loop, the stopping rule, the history and the status are in
`iterate.py`. Everything runs under `jit`, `vmap` and `grad`; under `vmap` each lane stops independently.
"""

import enum
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseopt.core.base.arguments import finite_number, is_positive
from sparseopt.core.base.types import FloatArray, is_traced, pytree
from sparseopt.core.operators.matrices import Matrix, linear_map
from sparseopt.core.penalties.entries import L1
from sparseopt.core.penalties.protocols import is_composite
from sparseopt.core.penalties.sums import Sum, stack
from sparseopt.system.report import Fact, html_facts, spread

# The numbers of solvers that must be above 0.
POSITIVE = ("step_size", "omega", "rho", "sigma")
# A residual within this multiple of eps may be as low as the precision allows.
NEAR_ROUNDING = 1e3


@pytree
class Problem:
    """`minimise loss(x) + penalty(operator x)`; without an operator the penalty acts on x itself.

    Attributes:
        loss: `value(x)` and `gradient(x)`, and what else the chosen solver needs.
        penalty: `value(z)` and `prox(z, step)` for z = operator x. None is no penalty, stored as `L1(0.0)`.
        operator: None, a dense matrix `[rows, columns]`, a SciPy sparse matrix, or an object with `mv(x)` and its
            transpose `rmv(e)`. A matrix is stored as a linear map.

    Example:
        >>> loss = so.LeastSquares(None, jnp.array([0.0, 0.2, 3.0, 3.1]))
        >>> differences = np.diff(np.eye(4), axis=0)
        >>> so.solve(so.Problem(loss, so.L1(0.5), differences)).check().value.round(2)
        Array([0.35, 0.35, 2.8 , 2.8 ], dtype=float32)
    """

    loss: Any
    penalty: Any
    operator: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "operator", linear_map(self.operator))
        if self.penalty is None:
            object.__setattr__(self, "penalty", L1(0.0))
        if getattr(self.loss, "intercept", False) and self.operator is None and not isinstance(self.penalty, Sum):
            matrix = self.loss.matrix
            if isinstance(matrix, Matrix) and hasattr(self.penalty, "prox"):
                both = stack([self.penalty, L1(0.0)], [matrix.shape[1] - 1, 1])
                object.__setattr__(self, "penalty", both)

    def value(self, x: FloatArray) -> Float[Array, ""]:
        """The objective at x: `loss(x) + penalty(operator x)`, +inf outside a constraint."""
        return self.loss.value(x) + self.penalty.value(x if self.operator is None else self.operator.mv(x))


def unfold(problem: Problem, x: FloatArray) -> Problem:
    """A problem with a `Composite` penalty as one with its inner penalty and its operator."""
    return Problem(problem.loss, *problem.penalty.parts(x))


class Status(enum.IntEnum):
    """How a solve ended. `Status(int(solution.status))` names it; `.advice` says what to try.

    Example:
        >>> so.Status(1).name
        'MAX_STEPS'
        >>> so.Status.NONFINITE.advice
        'a value became infinite or NaN: check the input for non-finite or huge values, or use a smaller step size'
    """

    CONVERGED = 0
    MAX_STEPS = 1
    NONFINITE = 2
    PRECISION = 3
    STATIONARY = 4

    @staticmethod
    def reached(statuses: Any) -> np.ndarray:
        """Whether solves reached their tolerance, with a certificate or without: booleans in the shape of statuses."""
        return np.isin(statuses, (Status.CONVERGED, Status.STATIONARY))

    @property
    def advice(self) -> str:
        return {
            Status.CONVERGED: "the residual reached the tolerance",
            Status.MAX_STEPS: "the step limit was reached before the tolerance: raise max_steps, raise tol, give "
            "float64 arrays if these are float32, or try another method; if the problem has constraints, check that "
            "some x meets all of them",
            Status.NONFINITE: "a value became infinite or NaN: check the input for non-finite or huge values, "
            "or use a smaller step size",
            Status.PRECISION: "rounding keeps the residual above the tolerance, and it no longer falls; "
            "use float64, or raise tol",
            Status.STATIONARY: "the stationarity residual reached the tolerance; there is no certificate: the problem "
            "is not known to be convex, the solver computes no gap, or no dual point proved one",
        }[self]


class Measure(NamedTuple):
    """What a solver reports after each check.

    Attributes:
        residual: the stopping measure.
        objective: loss plus penalty.
        gap: a relative duality gap or NaN.
        extra: any other scalars for the history, as a pytree.
        stalled: True ends the solve with `Status.PRECISION`: rounding keeps the residual from falling further.
        violation: how far `operator x` is outside a constraint, see `Solution`; None if the answer lies inside.
    """

    residual: Float[Array, ""]
    objective: Float[Array, ""]
    gap: Float[Array, ""]
    extra: Any = None
    stalled: Any = False
    violation: Any = None


class Progress(NamedTuple):
    """How a residual falls, to detect that rounding keeps it from falling further."""

    best: Any  # the smallest residual so far
    waited: Any  # checks since it last fell by a tenth

    def after(self, residual: Array, looked: Any = True) -> "Progress":
        """The progress after a check; a check with `looked` False does not count."""
        better = residual < 0.9 * self.best
        return Progress(jnp.where(better, residual, self.best), jnp.where(better, 0, self.waited + looked))

    def has_stalled(self, residual: Array, patience: int, level: float | None = None) -> Array:
        """Whether the last `patience` checks near the rounding level brought no progress.

        A last residual above twice the best does not end a solve. Residuals up to `level` count as near the rounding
        level; None is `NEAR_ROUNDING * eps`.
        """
        near = self.best <= (NEAR_ROUNDING * jnp.finfo(residual.dtype).eps if level is None else level)
        return near & (self.waited >= patience) & (residual <= 2 * self.best)


@runtime_checkable
class Solver(Protocol):
    """The four methods that `solve` calls. All are pure; `problem` is passed in so that a solver holds no data.

    The other members are optional:

    * `refuses(problem) -> str | None` is the only place where a solver states what a problem must have: what is wrong
      and what to do, or None if it can solve it. It looks at the problem's structure (types, attributes, whether there
      is an operator) and never at values, so it works on tracers; `solve` calls it first. A solver without it accepts
      every problem.
    * `stride`, an attribute: the number of iterations in a step, for a solver whose measure is expensive. Steps are
      then counted in iterations.
    * `duals(problem, state)`: the subgradients that the solver found, of a loss `f(A x)` at `A x` and of the penalty at
      `operator x`; None for one that it does not find. Derivatives of a solution with an operator need them.
    * `solves(problem, state)`: the problem that the answer solves, if it is not the one given, such as one at another
      level; derivatives follow from it.
    * `on_host(problem, start, tol, max_steps, history)`: the solution by another way, for arrays that are known and on
      a CPU, with NumPy arrays; None if there is none.
    * `prox_step(problem, state)`, or an attribute `step_size` of the state: the step of the penalty's prox, one number
      or one per entry. Derivatives for a penalty that is not convex need it.
    """

    def init(self, problem: Problem, start: Any) -> Any:
        """The state before the first step: a pytree of fixed structure, shapes and dtypes."""

    def step(self, problem: Problem, state: Any) -> Any:
        """The state after one iteration, or after `stride` of them."""

    def measure(self, problem: Problem, state: Any) -> Measure:
        """Residual, objective and gap of a state; cheap, since it runs after every step."""

    def extract(self, problem: Problem, state: Any) -> Any:
        """The answer in a state."""


class PlainSolver:
    """For solvers without a certificate, whose state has the answer `x` and the numbers of its measure."""

    def measure(self, problem: Problem, state: Any) -> Measure:
        return Measure(state.residual, state.objective, jnp.full_like(state.objective, jnp.nan))

    def extract(self, problem: Problem, state: Any) -> Any:
        return state.x


class ProxSolver(PlainSolver):
    """For solvers that use the prox of the penalty, from a `prox_memory` in the state if it is iterative."""

    def solves(self, problem: Problem, state: Any) -> Problem:
        """With the inner penalty of a `Composite` and its operator."""
        return unfold(problem, state.x) if is_composite(problem.penalty) else problem

    def duals(self, problem: Problem, state: Any) -> tuple[None, Any]:
        return None, problem.penalty.dual(state.prox_memory) if is_composite(problem.penalty) else None


def steepness(loss: Any, x: FloatArray) -> Float[Array, ""]:
    """The length of the gradient at 0, in units of which `stationarity` is measured; x is any array of that shape."""
    return jnp.linalg.norm(loss.gradient(jnp.zeros_like(x)))


def stationarity(x: FloatArray, previous: FloatArray, step: Any, scale: Any) -> Float[Array, ""]:
    """The length of a step over the step size, so that a tiny step size does not make it small, over `scale`."""
    tiny = jnp.finfo(x.dtype).tiny
    return jnp.linalg.norm(x - previous) / jnp.maximum(step, tiny) / jnp.maximum(scale, tiny)


@pytree
class Start:
    """Where a split ADMM starts; None for the solver's own rho, and for sigma, the rho of a loss."""

    x: Any
    dual: Any  # in row shape
    rho: Any = None
    settled: Any = None  # whether rho stays unchanged; None for False
    sigma: Any = None


def needs(
    solver: Any, problem: Problem, *, operator: bool = False, loss: str = "", penalty: str = "value prox"
) -> str | None:
    """Why a solver refuses a problem that lacks something, or cannot run with its own numbers; None if it can.

    `operator` says whether the solver accepts one; `loss` and `penalty` name the methods and fields that it uses.
    """
    for name in POSITIVE:
        given = getattr(solver, name, None)
        if given is not None and not (is_traced(given) or np.ndim(given) or is_positive(given)):
            return f"the {name} of {type(solver).__name__} must be positive and finite, given {given!r}"
    cadence = finite_number(getattr(solver, "cadence", 1))
    if not (cadence % 1 == 0 and cadence >= 1):
        return f"the cadence of {type(solver).__name__} is a whole number of at least 1, given {solver.cadence!r}"
    if problem.operator is not None and not operator:
        return (
            f"{type(solver).__name__} uses the prox of the penalty alone and solves problems without an operator, "
            f"given the operator {type(problem.operator).__name__}; use PrimalDual or SplitAdmm, or "
            "sparseopt.trend_filter for the differences of a graph"
        )
    for part, given, wanted in (("loss", problem.loss, loss.split()), ("penalty", problem.penalty, penalty.split())):
        if absent := [name for name in wanted if not hasattr(given, name)]:
            return (
                f"{type(solver).__name__} needs a {part} with {', '.join(wanted)}, given {type(given).__name__} "
                f"without {', '.join(absent)}; give the {part} what is missing, or use another solver"
            )
    return None


@pytree
class Solution:
    """What `solve` returns.

    Attributes:
        value: the answer.
        status: a `Status` as an int32 scalar (an array of them under vmap).
        steps: the number of iterations.
        residual: the solver's stopping measure at the end.
        objective: loss plus penalty at the end; with a violation, the penalty at the nearest point of its set.
        gap: relative duality gap, NaN if the solver has no certificate.
        history: a `Measure` of arrays `[max_steps]`, NaN beyond `steps`, or None if it was not requested (its `stalled`
            is None).
        state: the solver's last state, for a warm start or inspection.
        dual: the subgradient of the penalty at `operator x`, if the solver finds one; for a `Composite` penalty, the
            subgradient of its inner penalty.
        violation: for a constraint on `operator x`, its largest distance from the set over `max(1, max |operator x|)`;
            None otherwise.
    """

    value: Any
    status: Any
    steps: Any
    residual: Any
    objective: Any
    gap: Any
    history: Any = None
    state: Any = None
    dual: Any = None
    violation: Any = None

    def _repr_html_(self) -> str:
        return html_facts(type(self).__name__, self._facts())

    def _facts(self) -> list[Fact]:
        """How it ended, in short; for a batch the ranges."""
        ended = ", ".join(Status(int(status)).name for status in np.unique(self.status))
        entries = [np.asarray(leaf) for leaf in jax.tree.leaves(self.value)]
        zeros, size = sum(int((leaf == 0).sum()) for leaf in entries), sum(leaf.size for leaf in entries)
        gap = spread(self.gap) if np.isfinite(self.gap).all() else "no certificate"
        figures = {"steps": self.steps, "residual": self.residual, "objective": self.objective}
        figures |= {} if self.violation is None else {"violation": self.violation}
        ends = [Fact(name, spread(values)) for name, values in figures.items()]
        return [
            Fact("status", ended),
            Fact("relative duality gap", gap),
            *ends,
            Fact("zeros", f"{zeros:,} of {size:,}"),
        ]

    def check(self) -> "Solution":
        """Return self if every lane converged, with a certificate or to a stationary point.

        Raises:
            RuntimeError: otherwise, saying how the worst lane ended and what to try.
        """
        ended = set(np.unique(self.status))
        order = (Status.NONFINITE, Status.MAX_STEPS, Status.PRECISION, Status.STATIONARY, Status.CONVERGED)
        worst = next(status for status in order if status in ended)
        if not Status.reached(worst):
            raise RuntimeError(
                f"not converged ({worst.name}) after {int(jnp.max(self.steps))} steps with residual "
                f"{float(jnp.max(self.residual)):.3g}: {worst.advice}"
            )
        return self
