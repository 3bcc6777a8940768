"""The `Fit`: a signal and what is asked about it, checked on the host before any work."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sparseopt.core.base.arguments import (
    positive_number,
    require_memory,
    whole_number,
)
from sparseopt.core.losses.residuals import Squared
from sparseopt.core.losses.scalar import ScalarLoss
from sparseopt.core.penalties.entries import L1
from sparseopt.core.problem.problem import Solution, Start
from sparseopt.trend.base.geometry import Geometry
from sparseopt.trend.base.ground import Data, Ground, prepare
from sparseopt.trend.base.method import DEFAULTS, MOST_STEPS, Settings
from sparseopt.trend.base.penalties import Terms, couples_rows, on_rows, without_bounds
from sparseopt.trend.base.signal import check_signal, geometry_at, require_determined

# What `Fit` computes of the signal alone.
OF_SIGNALS = ("ground", "arrays", "data")
# Residual, objective, gap and rho per step of a history.
STEP_BYTES = 4 * 8


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fit that is asked for. Fields without a comment are arguments of `trend_filter`, checked here."""

    geometry: Geometry  # of the graph at the order
    terms: Terms  # the penalties by their orders, ascending; None for one that is not known yet
    # The signal `[n]` or `[n, channels]` in the dtype of the computation, and its node weights `[n]` or None for ones,
    # both 0 where missing; stand-ins, with `pure`, for signals that are not known yet.
    values: np.ndarray
    weights: np.ndarray | None = None
    shape: tuple[int, ...] = ()  # the caller's shape, which the answer gets
    pure: bool = False  # whether fits are pure JAX, of signals that are not known yet
    loss: ScalarLoss = dataclasses.field(default_factory=Squared)
    method: Any = None  # a `Method`; None for the one that is expected to be the fastest
    tol: float = 1e-6
    max_steps: int = 20_000
    start: Solution | Start | None = None  # a `Start` is one in the layout of arrays
    history: bool = False
    assumed: float | None = None  # the strength by which a method is chosen; None computes it
    dtype: np.dtype = dataclasses.field(init=False)  # of the computation
    channels: tuple[int, ...] = dataclasses.field(init=False)  # () or the number of channels
    weighted: bool = dataclasses.field(init=False)  # whether nodes have weights or miss values
    order: int = dataclasses.field(init=False)  # the highest penalised order, at least 0
    several: bool = dataclasses.field(init=False)  # whether there are several penalties, or one on b itself
    penalty: Any = dataclasses.field(init=False)  # the penalty, if there is only one
    coupled: bool = dataclasses.field(init=False)  # whether a penalty couples all rows, which then need one metric
    square: bool = dataclasses.field(init=False)  # whether the loss is the square
    is_l1: bool = dataclasses.field(init=False)  # whether that penalty is L1
    settings: Settings = dataclasses.field(init=False)  # of the method

    def __post_init__(self) -> None:
        def fill(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        fill("dtype", self.values.dtype)
        fill("channels", self.values.shape[1:])
        fill("weighted", self.weights is not None)
        fill("order", max(0, *self.terms))
        fill("several", len(self.terms) > 1 or -1 in self.terms)
        fill("penalty", next(iter(self.terms.values())))
        fill("coupled", any(map(couples_rows, self.terms.values())))
        fill("is_l1", isinstance(self.penalty, L1))
        fill("square", getattr(self.loss, "is_square", False))
        fill("settings", self.method if isinstance(self.method, Settings) else DEFAULTS)
        if self.several and not self.square and without_bounds(self.terms) is None:
            raise ValueError(
                f"several penalties need the square loss, given loss={self.loss}; at order 0 bounds, or a signal that "
                "only rises or falls, need no penalty more"
            )
        if reason := self.geometry.refuses_loss(self.loss, self.order):
            raise ValueError(reason)
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

    def require_complete(self) -> None:
        """Raise a ValueError if nodes are missing, which no penalty ties to others."""
        if not self.complete:
            raise ValueError("without a penalty the fit is not defined at missing nodes: raise the penalty's weight")

    def at(self, weight: float, method: Any = None) -> "Fit":
        """The request with another weight of its penalty, and another method if one is given."""
        terms = {self.order: dataclasses.replace(self.penalty, weight=float(weight))}
        other = dataclasses.replace(self, terms=terms, method=self.method if method is None else method)
        # What has been computed of the signal stays.
        vars(other).update({name: vars(self)[name] for name in OF_SIGNALS if name in vars(self)})
        return other

    def without(self, out: np.ndarray) -> "Fit":
        """The request with the nodes `out`, booleans `[n]`, missing; a ValueError if the rest determine no fit."""
        weights = np.where(out, 0, self.mass)
        require_determined(weights, self.geometry, self.order)
        values = np.where((weights > 0).reshape(-1, *(1 for _ in self.channels)), self.values, 0)
        return dataclasses.replace(self, values=values.astype(self.dtype), weights=weights.astype(self.dtype))

    @property
    def columns(self) -> np.ndarray:
        """The values, `[n, channels]` in float64."""
        return self.values.reshape(len(self.values), -1).astype(np.float64)

    @property
    def mass(self) -> np.ndarray:
        """The node weights, `[n]` in float64."""
        return np.ones(len(self.values)) if self.weights is None else self.weights.astype(np.float64)

    @property
    def complete(self) -> bool:
        """Whether every node is observed."""
        return self.weights is None or bool(self.weights.all())

    @functools.cached_property
    def ground(self) -> Ground:
        return self.geometry.ground(tuple(self.terms), self.dtype, bool(self.channels))

    @functools.cached_property
    def strength(self) -> float:
        """The penalty's (mean) weight, the largest of several, over the noise of the signal."""
        if self.assumed is not None:
            return self.assumed
        means = [float(np.mean(getattr(penalty, "weight", 1.0))) for penalty in self.terms.values()]
        return max(mean or 1.0 for mean in means) / float(self.data.noise)

    @functools.cached_property
    def arrays(self) -> tuple[Any, Any]:
        """The signal and its weights, whose last axis is 1 long if there are channels, or None."""
        weights: Any = self.weights
        if weights is not None:
            weights = self.geometry.put(self.geometry.rows(weights.reshape(-1, *(1 for _ in self.channels)), 0))
        return self.on_nodes(self.values), weights

    @functools.cached_property
    def data(self) -> Data:
        """The signal prepared for a solve, once for whatever chooses, solves and judges."""
        return prepare(self.ground, *self.arrays)

    def on_nodes(self, values: np.ndarray) -> jax.Array:
        """Values at the nodes, whether they have an axis of channels or not, in the layout and the dtype."""
        nodes = self.geometry.rows(values.reshape(-1, *self.channels), 0)
        return self.geometry.put(nodes.astype(self.dtype, copy=False))

    @functools.cached_property
    def rows(self) -> Any:
        return on_rows(self.terms, self.geometry, self.dtype, bool(self.channels))

    def first(self) -> Start | None:
        """The point of `start` and the dual of its rows in the layout; None without one."""
        solution, geometry = self.start, self.geometry
        if solution is None or isinstance(solution, Start):
            return solution
        value, dual = np.asarray(solution.value), solution.dual
        if held := geometry.holds(dual):
            rows = tuple(jax.eval_shape(self.ground.operator.mv, self.arrays[0]).shape)
        else:
            rows = (sum(geometry.count(k + 1) for k in self.terms), *self.channels)
            # Fits known without an iteration and the fits of a path have no dual.
            dual = np.zeros(rows, self.dtype) if dual is None else np.asarray(dual)
        require_start(value, dual, self.values.size, rows)
        if not held:
            dual = geometry.put(self._each(dual, geometry.count, geometry.rows), self.order + 1)
        return start_at(dataclasses.replace(solution, value=self.on_nodes(value), dual=dual))

    def list_rows(self, found: Any) -> Any:
        """A fit with its rows in the order of `graph.matrix(order + 1)`; the dual of several penalties by orders.

        Over several devices the dual stays as it is, on them.
        """
        geometry, dual = self.geometry, found.dual

        def shape(order: int) -> tuple[int, ...]:
            return geometry.difference(order, self.dtype).out_shape

        def listed(part: np.ndarray, order: int) -> np.ndarray:
            return geometry.list_rows(part.reshape(*shape(order), *self.channels), order)

        if dual is not None and not geometry.several_devices:
            dual = geometry.put(self._each(np.asarray(dual), lambda order: math.prod(shape(order)), listed))
        return dataclasses.replace(
            found, nonzero=geometry.list_rows(np.asarray(found.nonzero), self.order + 1), dual=dual
        )

    def _each(self, dual: np.ndarray, size: Callable[[int], int], change: Callable[[Any, int], Any]) -> np.ndarray:
        """The dual with every penalty's `size(order)` rows changed; the dual of several penalties is flat."""
        if not self.several:
            return change(dual, self.order + 1)
        orders = [k + 1 for k in self.terms]
        parts = np.split(dual, np.cumsum([size(order) for order in orders])[:-1])
        return np.concatenate(
            [change(part, order).reshape(-1, *self.channels) for part, order in zip(parts, orders, strict=True)]
        )


def signal_on(graph: Any, order: Any, y: Any, node_weights: Any, missing: str, dtype: Any, copies: int) -> Fit:
    """A checked signal, of which no fit is asked yet; `copies` as in `check_signal`."""
    geometry, order = geometry_at(graph, order)
    return Fit(geometry, {order: None}, **check_signal(y, geometry, order, node_weights, missing, dtype, copies))


def start_at(fit: Any) -> Start:
    """The start at a fit in the layout."""
    return Start(fit.value, fit.dual, getattr(fit.state, "rho", None), sigma=getattr(fit.state, "sigma", None))


def require_start(value: Any, dual: Any, size: int, rows: tuple[int, ...]) -> None:
    """Raise a ValueError unless a start has this many values, and a dual of this shape."""
    if np.size(value) != size or np.shape(dual) != rows:
        raise ValueError(
            f"start needs a solution of the same graph and order, with {size} values and whose dual has the shape "
            f"{rows}, given {np.size(value)} and {np.shape(dual)}"
        )
