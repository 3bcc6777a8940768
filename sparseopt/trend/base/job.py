"""The `Job`: the caller's arguments of the trend filter, checked on the host before any work."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.arguments import (
    Limited,
    own_refusal,
    positive_number,
    real_array,
    require_memory,
    whole_number,
)
from sparseopt.core.base.types import is_traced
from sparseopt.core.losses.residuals import Squared, has_two_slopes
from sparseopt.core.losses.scalar import ScalarLoss
from sparseopt.core.penalties.entries import L1
from sparseopt.core.penalties.protocols import Composite
from sparseopt.core.problem.problem import Solution, Start
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.ground import Ground, Terms, couples_axes, ground_of, on_rows, strength
from sparseopt.trend.base.layout import Layout
from sparseopt.trend.base.method import DEFAULTS, MOST_STEPS, Settings
from sparseopt.trend.base.signal import MOST_ORDER, UNKNOWN

# A number whose square is finite in float32, and large compared with what a constraint or a ridge allows.
FAR = 1e18
# Residual, objective, gap and rho per step of a history.
STEP_BYTES = 4 * 8


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
    coupled: bool = dataclasses.field(init=False)  # whether a penalty couples all rows, which then need one metric
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
        fill("coupled", any(map(couples_rows, self.terms.values())))
        fill("is_l1", isinstance(self.penalty, L1))
        fill("square", getattr(self.loss, "is_square", False))
        fill("settings", self.method if isinstance(self.method, Settings) else DEFAULTS)
        if self.several and not self.square:
            raise ValueError(f"several penalties need the square loss, given loss={self.loss}")
        smooth = getattr(self.loss, "smooth", False)
        if self.graph.free and not (smooth or (self.graph.is_chain and has_two_slopes(self.loss))):
            raise ValueError(
                f"free ends at order {self.order} need smooth losses, or on a chain Absolute or Quantile, "
                f'given {type(self.loss).__name__}: use Huber, or ends="graph"'
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
        """The signal and its weights, whose last axis is 1 long if there are channels, or None."""
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
            # Fits known without an iteration and the fits of a path have no dual.
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
        """The dual with every penalty's `size(order)` rows changed; the dual of several penalties is flat."""
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
    """Raise a ValueError unless a start has this many values, and a dual of this shape."""
    if np.size(value) != size or np.shape(dual) != rows:
        raise ValueError(
            f"start needs a solution of the same graph and order, with {size} values and whose dual has the shape "
            f"{rows}, given {np.size(value)} and {np.shape(dual)}"
        )


def couples_rows(penalty: Any) -> bool:
    """Whether it couples all rows, as the nuclear norm does."""
    return getattr(penalty, "couples_rows", False)


def graph_for(graph: Graph, *penalties: Any) -> Graph:
    """The graph for penalties, as edges if the rows of a grid would not do.

    A grid that was found in edges has its rows in the order and direction of a grid, padded with zeros. A penalty that
    is not even needs the given directions, and one with a cost at 0 cannot bear the padding. Singular values are of a
    matrix `[rows, channels]`.
    """
    if graph.shape is None or graph.free:
        return graph
    turned = graph.turned and not all(getattr(penalty, "even", False) for penalty in penalties)
    listed = any(couples_rows(penalty) or _excludes_zero(penalty) for penalty in penalties)
    return graph.as_edges() if turned or listed else graph


def terms_of(penalty: Any, order: int) -> Terms:
    """One penalty, or several by their orders, which may be floats or integers of NumPy, ascending."""
    if not isinstance(penalty, Mapping):
        return {order: penalty}
    what = "the order of each of several penalties"
    terms = {whole_number(what, key, -1, MOST_ORDER, "-1: b itself"): term for key, term in penalty.items()}
    if any(map(couples_axes, terms.values())):
        raise ValueError(
            "isotropic total variation, a penalty with axis 0, must be the only penalty here, given several by orders"
        )
    if not terms:
        raise ValueError("several penalties are keyed by their orders, as in {-1: L1(0.5), 0: L1(2.0)}; given none")
    if order:
        raise ValueError(f"if penalties are keyed by their orders {list(terms)}, leave order out; given order={order}")
    return dict(sorted(terms.items()))


def check_terms(terms: Terms, layout: Layout, channels: tuple[int, ...], kind: np.dtype) -> Terms:
    """Checked penalties by order, without those that cost nothing unless all do."""
    for k, term in terms.items():
        require_penalty(term, layout.graph, k, bool(channels))
        check_parameters(term, kind, layout.count(k + 1) if np.ndim(getattr(term, "weight", 0)) else None)
        if layout.graph.shape is None or layout.graph.free:
            continue  # whose rows are a list
        for name in getattr(term, "number_names", ()):
            shape = np.shape(getattr(term, name))
            if name != "weight" and shape not in ((), channels):
                raise ValueError(
                    f"the {name} of {type(term).__name__} is one number on a grid, given the shape {shape}; L1 in "
                    "`trend_filter` accepts a weight for every difference"
                )
    # Without edges there are no differences.
    edges = layout.graph.num_edges
    strong = {k: term for k, term in terms.items() if (edges or k == -1) and not vanishes(term)}
    return strong or {max(0, *terms): next(iter(terms.values()))}


def _cost(penalty: Any, x: Any) -> float | None:
    """What x costs; None for a penalty that is traced, or of arrays of another shape."""
    if is_traced(penalty):
        return None
    with jax.ensure_compile_time_eval(), contextlib.suppress(AttributeError, TypeError, ValueError):
        return float(penalty.value(jnp.asarray(x, jnp.float32)))
    return None


def vanishes(penalty: Any) -> bool:
    """Whether the penalty is 0 everywhere: its weight is 0, and numbers of any size cost nothing."""
    if np.any(np.asarray(getattr(penalty, "weight", 1.0))):
        return False
    is_own = not dataclasses.is_dataclass(penalty)
    probe = penalty if is_own else dataclasses.replace(penalty, weight=0.0)
    return _cost(probe, [[-FAR, 1.0], [-1.0, FAR]]) == 0


def _excludes_zero(penalty: Any) -> bool:
    """Whether 0 costs something; a penalty that does not say so is asked for its value, if its numbers are known."""
    said = getattr(penalty, "excludes_zero", None)
    if said is not None or isinstance(penalty, Limited):
        return bool(said() if callable(said) else said)
    return _cost(penalty, np.zeros((3, 1))) not in (0, None)


def require_penalty(penalty: Any, graph: Graph, order: int, channels: bool) -> None:
    """Raise a TypeError or ValueError unless this is a penalty on the differences of an order."""
    if isinstance(penalty, type) or not (hasattr(penalty, "value") and hasattr(penalty, "prox")):
        raise TypeError(f"a penalty has `value` and `prox`, such as sparseopt.L1(10.0); given {penalty!r}")
    if any(leaf is penalty for leaf in jax.tree.leaves(penalty)):
        # No program can be compiled for it.
        raise TypeError(f"a penalty is a pytree, made so by the decorator sparseopt.pytree; given {penalty!r}")
    name = type(penalty).__name__
    if isinstance(penalty, Composite):
        raise TypeError(
            f"{name} has its own differences, but the penalty here acts on the graph's, as L1(0.5) does; "
            f"for {name} itself call its prox, or `sparseopt.solve`"
        )
    if couples_rows(penalty) and not channels:
        raise ValueError(f"{name} couples the channels of a signal [n, channels]; this one has none: use L1")
    if (axes := getattr(penalty, "group_axes", None)) is not None:
        if penalty.groups is not None:
            raise ValueError(f"{name} couples channels here; labelled groups of differences are not supported")
        if axes not in ((-1,), (0,), (0, -1)):
            raise ValueError(
                f"{name} couples the channels with axis -1, the differences of a node along a grid's axes with axis "
                f"0, and both with axis (0, -1), given {penalty.axis!r}"
            )
        if -1 in axes and not channels:
            raise ValueError(
                f"{name} with axis {penalty.axis!r} couples the channels of a signal [n, channels]; this one has none: "
                "use L1, or on a grid axis 0 for isotropic total variation"
            )
        if couples_axes(penalty) and (order != 0 or graph.shape is None or len(graph.shape) < 2):
            raise ValueError(
                f"{name} with axis {penalty.axis!r}, isotropic total variation, needs order 0 and a grid of 2 or 3 "
                f"axes, given order {order} on {graph!r}"
            )


def check_parameters(penalty: Any, kind: np.dtype, rows: int | None = None) -> None:
    """Raise a ValueError unless a penalty's numbers are finite and its weight is a valid one in the dtype `kind`."""
    weight = check_weight(penalty, rows)
    if is_traced(penalty):
        raise TypeError(f"trend_filter checks a penalty's numbers, {UNKNOWN}")
    for leaf in jax.tree.leaves(penalty):
        value = np.asarray(leaf)
        if value.dtype.kind not in "biuf":
            continue
        wrong = np.isnan(value) if getattr(penalty, "may_be_infinite", False) else ~np.isfinite(value)
        if wrong.any():
            raise ValueError(f"the penalty's parameters must be finite, given {penalty}")
    require_representable(np.asarray(weight, np.float64), kind)


def check_weight(penalty: Any, rows: int | None = None) -> Any:
    """The weight of a penalty, 0 without one; for L1 one number or one for each of `rows` rows; else a ValueError.

    No number of the penalty may be one that `refuses` rejects. Traced numbers are not checked.
    """
    weight: Any = getattr(penalty, "weight", 0.0)
    known = not isinstance(weight, jax.core.Tracer)
    weight = real_array("the penalty's weight", weight) if known else weight
    if reason := own_refusal(penalty):
        raise ValueError(reason)
    if weight.ndim and not (rows is not None and isinstance(penalty, L1)):
        raise ValueError(
            f"the penalty's weight is one number here, given the shape {weight.shape}; L1 in `trend_filter` accepts a "
            "weight for every difference, and a graph accepts weights of edges"
        )
    if weight.shape not in ((), (rows,)):
        raise ValueError(
            f"the weight of L1 is one number, or one for each of the {rows} rows of graph.matrix(order + 1), "
            f"given the shape {weight.shape}"
        )
    if known and weight.min(initial=0) < 0:  # for a user's own penalty
        raise ValueError(f"the penalty's weight must not be negative, given {weight.min()}")
    return weight


def require_representable(weight: np.ndarray, kind: np.dtype) -> None:
    """Raise a ValueError if a penalty's weight overflows or vanishes in the dtype `kind`."""
    limits = np.finfo(kind)
    wrong = (weight > limits.max) | ((weight > 0) & (weight < limits.tiny))
    if wrong.any():
        raise ValueError(
            f"the penalty's weight is 0 or from {limits.tiny:.3g} to {limits.max:.3g} in {kind}, given "
            f"{float(weight[wrong].flat[0]):.3g}"
        )
