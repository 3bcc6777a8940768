"""The `Job`: the caller's arguments of the trend filter, checked on the host before any work."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from sparseopt.core.base.arguments import (
    is_positive,
    positive_number,
    require_memory,
    whole_number,
)
from sparseopt.core.losses.residuals import Squared, has_two_slopes, is_square
from sparseopt.core.losses.scalar import ScalarLoss
from sparseopt.core.penalties.entries import L1
from sparseopt.core.problem.problem import Solution, Start
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.ground import Ground, Terms, ground_of, on_rows, strength
from sparseopt.trend.base.layout import Layout

# Steps are counted in int32, and the last check may be one cadence later.
MOST_STEPS = 10**9
# Residual, objective, gap and rho per step of a history.
STEP_BYTES = 4 * 8


@runtime_checkable
class Method(Protocol):
    """A method with its settings."""

    name: str  # for callers
    single: bool = False  # whether it takes only one penalty, and the square loss
    one_metric: bool = False  # whether its x-step may need one metric for all nodes
    over_devices: bool = False  # whether it works over several devices
    on_host: bool = False  # whether it works on the host: without a start, a history and traced values
    short_from: float = math.inf  # from so many nodes on a signal in float64 is first solved in float32
    merges: bool = False  # whether a path of exact fits at order 0 may replace it
    balances_rho: bool = False  # whether it computes rho again at every level of a path, from the start
    keeps_rho_from: int = 0  # from this order on it keeps the rho of the previous level of a path, for a norm

    def refuses(self, job: "Job") -> str | None:
        """Why it cannot do a job, and what to do; None if it can. It does not look at the values of the signal."""
        if self.single and not job.square:
            return f"method={self.name!r} solves the square loss only; with loss={job.loss} use auto, doge, admm"
        if self.single and job.several:
            return f"method={self.name!r} solves single orders; with several penalties use auto, doge, admm"
        return job.layout.refuses(job, self)

    def plan(self, job: "Job") -> Any:
        """The host work for a job: a pytree, cached for similar jobs; a plain object for a method on the host."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every splitting method lets one set.

    Args:
        rho: the first ADMM parameter; None chooses it from the data.
        relaxation: over-relaxation in (0, 2).
        cadence: steps between two checks; None takes 10 for Doge, whose steps are cheap, and 5 for other methods. A
            start that is the fit itself is checked after one step.
    """

    rho: float | None = None
    relaxation: float = 1.7
    cadence: int | None = None

    def __post_init__(self) -> None:
        relaxed = is_positive(self.relaxation) and self.relaxation < 2
        if not (relaxed and (self.rho is None or is_positive(self.rho))):
            raise ValueError(
                f"rho must be positive and finite and relaxation in (0, 2), given rho={self.rho!r}, "
                f"relaxation={self.relaxation!r}"
            )
        if self.cadence is not None:
            object.__setattr__(self, "cadence", whole_number("cadence", self.cadence, 1, MOST_STEPS))


DEFAULTS = Settings()


@dataclasses.dataclass(frozen=True)
class Job:
    """A requested fit. Fields without a comment are arguments of `trend_filter`, checked here."""

    layout: Layout  # of the graph's arrays
    terms: Terms  # the penalties by their orders, ascending; None for a penalty that is not known yet
    dtype: np.dtype  # of the computation
    channels: tuple[int, ...] = ()  # () or the number of channels
    weighted: bool = False  # whether nodes have weights or miss values
    signal: Any = None  # a checked `Signal`; None if it is not known yet
    loss: ScalarLoss = dataclasses.field(default_factory=Squared)
    method: Any = None  # a `Method`; None for the one that is expected to be the fastest
    tol: float = 1e-6
    max_steps: int = 20_000
    start: Solution | Start | None = None  # a `Start` is one in the layout
    history: bool = False
    assumed: float | None = None  # the strength by which a method is chosen; None computes it
    graph: Graph = dataclasses.field(init=False)  # of the layout
    order: int = dataclasses.field(init=False)  # the highest penalised order, at least 0
    several: bool = dataclasses.field(init=False)  # whether there are several penalties, or one on b itself
    penalty: Any = dataclasses.field(init=False)  # the penalty, if there is only one
    square: bool = dataclasses.field(init=False)  # whether the loss is the square
    is_l1: bool = dataclasses.field(init=False)  # whether that penalty is L1
    settings: Settings = dataclasses.field(init=False)  # of the method

    def __post_init__(self) -> None:
        def fill(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        fill("graph", self.layout.graph)
        fill("order", max(0, *self.terms))
        fill("several", len(self.terms) > 1 or -1 in self.terms)
        fill("penalty", next(iter(self.terms.values())))
        fill("is_l1", isinstance(self.penalty, L1))
        fill("square", is_square(self.loss))
        fill("settings", self.method if isinstance(self.method, Settings) else DEFAULTS)
        if self.several and not self.square:
            raise ValueError(f"several penalties take the square loss, given loss={self.loss}")
        smooth = getattr(self.loss, "smooth", False)
        if self.graph.free and not (smooth or (self.graph.is_chain and has_two_slopes(self.loss))):
            raise ValueError(
                f"free ends at order {self.order} take smooth losses, and on a chain Absolute and Quantile, "
                f'given {type(self.loss).__name__}: take Huber, or ends="graph"'
            )
        positive_number("tol", self.tol)
        fill("max_steps", whole_number("max_steps", self.max_steps, 1, MOST_STEPS))
        if self.history:
            what = f"a history of max_steps={self.max_steps:,} steps"
            require_memory(STEP_BYTES * self.max_steps, what, "lower max_steps")
        start: Any = self.start
        if start is not None and not isinstance(start, Start):
            if not isinstance(start, Solution):
                raise TypeError(f"start is a Solution of trend_filter, given {start!r:.100}; tol is a keyword")
            if not np.all(np.isfinite(np.asarray(start.value))):
                raise ValueError("start holds values that are not finite; start without it")

    def at(self, weight: float) -> "Job":
        """The job with another weight of its penalty."""
        return dataclasses.replace(self, terms={self.order: dataclasses.replace(self.penalty, weight=float(weight))})

    @functools.cached_property
    def ground(self) -> Ground:
        return ground_of(self.layout, tuple(self.terms), self.dtype, bool(self.channels))

    @functools.cached_property
    def strength(self) -> float:
        """The penalty's weight over the noise of the signal; 1 if the signal is not known."""
        if self.assumed is not None or self.signal is None:
            return 1.0 if self.assumed is None else self.assumed
        return float(strength(self.ground, *self.arrays, self.rows))

    @functools.cached_property
    def arrays(self) -> tuple[Any, Any]:
        """The signal and its weights, whose last axis is 1 long where there are channels, or None."""
        weights: Any = self.signal.weights
        if weights is not None:
            weights = self.layout.put(self.layout.rows(weights.reshape(-1, *(1 for _ in self.channels)), 0))
        return self.on_nodes(self.signal.values), weights

    def on_nodes(self, values: np.ndarray) -> jax.Array:
        """Values at the nodes, whether they have an axis of channels or not, in the layout and the dtype."""
        nodes = self.layout.rows(values.reshape(-1, *self.channels), 0)
        return self.layout.put(nodes.astype(self.dtype, copy=False))

    @functools.cached_property
    def rows(self) -> Any:
        return on_rows(self.terms, self.layout, self.dtype, bool(self.channels))

    def first(self) -> Start | None:
        """The point of `start` and the dual of its rows in the layout; None without one."""
        solution, signal, layout = self.start, self.signal, self.layout
        if isinstance(solution, Start):
            return solution
        if solution is None or signal is None:
            return None
        value, dual = np.asarray(solution.value), solution.dual
        if held := layout.holds(dual):
            rows = tuple(jax.eval_shape(self.ground.operator.mv, self.arrays[0]).shape)
        else:
            rows = (sum(layout.count(k + 1) for k in self.terms), *self.channels)
            # Fits that are known without an iteration and those of a path have no dual.
            dual = np.zeros(rows, self.dtype) if dual is None else np.asarray(dual)
        require_start(value, dual, signal.values.size, rows)
        if not held:
            dual = layout.put(self._each(dual, layout.count, layout.lay_out_dual), self.order + 1)
        return start_at(dataclasses.replace(solution, value=self.on_nodes(value), dual=dual))

    def list_rows(self, found: Any) -> Any:
        """A fit with its rows in the order of `graph.matrix(order + 1)`; the dual of several penalties by orders.

        Over several devices the dual stays as it is, on them.
        """
        layout, dual = self.layout, found.dual

        def shape(order: int) -> tuple[int, ...]:
            return layout.difference(order, self.dtype).out_shape

        def listed(part: np.ndarray, order: int) -> np.ndarray:
            return layout.list_dual(part.reshape(*shape(order), *self.channels), order)

        if dual is not None and not layout.several_devices:
            dual = layout.put(self._each(np.asarray(dual), lambda order: math.prod(shape(order)), listed))
        return dataclasses.replace(
            found, nonzero=layout.list_rows(np.asarray(found.nonzero), self.order + 1), dual=dual
        )

    def _each(self, dual: np.ndarray, size: Callable[[int], int], change: Callable[[Any, int], Any]) -> np.ndarray:
        """The dual changed for the rows of every penalty, which are so many; those of several penalties are flat."""
        if not self.several:
            return change(dual, self.order + 1)
        orders = [k + 1 for k in self.terms]
        parts = np.split(dual, np.cumsum([size(order) for order in orders])[:-1])
        return np.concatenate(
            [change(part, order).reshape(-1, *self.channels) for part, order in zip(parts, orders, strict=True)]
        )


def start_at(fit: Any) -> Start:
    """The start at a fit in the layout."""
    return Start(fit.value, fit.dual, getattr(fit.state, "rho", None), sigma=getattr(fit.state, "sigma", None))


def require_start(value: Any, dual: Any, size: int, rows: tuple[int, ...]) -> None:
    """Raise a ValueError unless a start has so many values, and a dual of this shape."""
    if np.size(value) != size or np.shape(dual) != rows:
        raise ValueError(
            f"start needs a solution of the same graph and order, with {size} values and whose dual has the shape "
            f"{rows}, given {np.size(value)} and {np.shape(dual)}"
        )
