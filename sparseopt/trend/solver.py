"""Plan once, fit many: a solver for all signals on a graph, pure under jit, vmap and grad.

All host work (tables, factors, the choice of a method) is done when the solver is made. A call is one compiled program;
its derivatives in the signal, the penalty's weights and the node weights are implicit: no iteration is unrolled. For L1
the Jacobian in y is the projection onto the signals with the same zero differences: at order 0 the mean of each piece.
"""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.arguments import renames, whole_number
from sparseopt.core.base.types import is_traced, precision, pytree, static, wide_types
from sparseopt.core.penalties.entries import L1
from sparseopt.core.problem.problem import Solution, Start
from sparseopt.trend.base.fit import Fit, require_start
from sparseopt.trend.base.geometry import Geometry
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.penalties import bears, check_weight, on_rows, require_penalty
from sparseopt.trend.base.pieces import TrendSolution
from sparseopt.trend.base.signal import compute_dtype, geometry_at, require_node_weights
from sparseopt.trend.methods.choice import as_method, choose
from sparseopt.trend.methods.plan import Plan, fit


@pytree(eq=False)
class TrendSolver:
    """The trend filter on one graph, for any signal, penalty and node weights; make one with `trend_solver`."""

    plans: tuple[Plan, ...]  # of the possible methods, the fastest first
    graph: Graph = static()
    order: int = static()
    channels: int | None = static()
    dtype: str = static()

    def __call__(
        self,
        y: Any,
        penalty: Any,
        node_weights: Any = None,
        tol: Any = 1e-6,
        max_steps: Any = 20_000,
        start: Solution | Start | None = None,
    ) -> TrendSolution:
        """Fit a signal.

        Args:
            y: as in `trend_filter`, of the solver's graph and channels; missing values have the node weight 0.
            penalty: one penalty, as in `trend_filter`, on the differences of the solver's order.
            node_weights: w >= 0, `[n]` or in the shape of a grid, or None for ones.
            tol: the relative duality gap to reach.
            max_steps: step limit.
            start: an earlier solution, or a point in the shape of y with the dual of its rows; None for no start.

        Returns:
            As `trend_filter`, in the shape of y; under vmap with one status per lane. Values are not checked: for a
            signal that is not finite, and for a negative weight under jit, the status is NONFINITE.
        """
        geometry, order = self.geometry, self.order + 1
        if start is not None:
            start = self._start_of(start, np.size(y))
        found = self.fit_laid_out(y, penalty, node_weights, tol, max_steps, start)
        nonzero, dual = geometry.list_rows(found.nonzero, order), geometry.list_rows(found.dual, order)
        return dataclasses.replace(found, nonzero=nonzero, dual=dual)

    def _start_of(self, given: Any, size: int) -> Start:
        """A start with its dual in the layout."""
        if not isinstance(given, Solution | Start):
            raise TypeError(
                f"start is a solution on this graph, or a Start of a point and a dual, given {given!r:.100}"
            )
        rows = (self.geometry.count(self.order + 1), *self.axes)
        if isinstance(given, Solution):
            # Fits known without an iteration, and the fits of a path, have neither dual nor state.
            dual = jnp.zeros(rows, self.dtype) if given.dual is None else given.dual
            given = Start(given.value, dual, getattr(given.state, "rho", None))
        require_start(given.x, given.dual, size, rows)
        return dataclasses.replace(given, dual=self.geometry.rows(jnp.asarray(given.dual), self.order + 1))

    def fit_laid_out(
        self, y: Any, penalty: Any, node_weights: Any, tol: Any, max_steps: Any, start: Start | None
    ) -> TrendSolution:
        """As a call, with the rows of start and fit in the layout of the graph's arrays."""
        geometry, kind = self.geometry, np.dtype(self.dtype)
        channels, y = self.axes, jnp.asarray(y, kind)
        if y.shape not in self.shapes:
            raise ValueError(
                f"the solver's signals have the shape {' or '.join(map(str, self.shapes))}, given {y.shape}"
            )
        require_penalty(penalty, geometry, self.order, bool(channels))
        weight = check_weight(penalty, self.geometry.count(self.order + 1))
        if not bears(geometry, [penalty]):
            raise ValueError(
                f"a solver on {geometry!r} has rows that are filled up by zeros, but {type(penalty).__name__} does not "
                "act on them: plan one on graph.as_edges(), for signals of the shape [n]"
            )
        if is_traced(weight):
            y = jnp.where(jnp.any(weight < 0), jnp.nan, y)
        if node_weights is not None:
            node_weights = jnp.asarray(node_weights, kind)
            require_node_weights(node_weights.shape, geometry)
            node_weights = node_weights.reshape(geometry.node_shape + (1,) * len(channels))
        reasons = [plan.refuses(penalty, node_weights is not None) for plan in self.plans]
        if None not in reasons:
            raise ValueError(reasons[-1])
        plan, nodes = self.plans[reasons.index(None)], y.reshape(geometry.node_shape + channels)
        if start is not None:
            start = dataclasses.replace(start, x=jnp.asarray(start.x, kind).reshape(nodes.shape))
        terms = on_rows({self.order: penalty}, geometry, kind, bool(channels))
        found = fit(plan, (nodes, node_weights), terms, (tol, max_steps), start=start)
        return dataclasses.replace(found, value=found.value.reshape(y.shape), graph=self.graph, order=self.order)

    @property
    def geometry(self) -> Geometry:
        return self.graph.geometry.at(self.order)

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of its signals besides the nodes: () or the channels."""
        return () if self.channels is None else (self.channels,)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of its signals."""
        return [shape + self.axes for shape in self.geometry.shapes]


@renames(B="method=sparseopt.trend.Doge(B=...)")
def trend_solver(
    graph: Any,
    order: int = 0,
    method: Any = "auto",
    dtype: Any = None,
    channels: int | None = None,
) -> TrendSolver:
    """Make a solver for signals on a graph, with all host work done: call it under `jit`, `vmap` and `grad`.

        solver(y, penalty).value = argmin over b    1/2 sum_j w_j (y_j - b_j)²  +  penalty(Δ^(order+1) b)

    Args:
        graph: the graph of the signals, with at least one edge.
        order: k >= 0, as in `trend_filter`.
        method: as in `trend_filter`, except "interior" on graphs other than chains, where it works on the host; "auto"
            chooses the method that is expected to be the fastest for a weight about the size of the noise.
        dtype: float32 or float64; None for JAX's default. float64 needs 64-bit types to be enabled.
        channels: the length of the signals' last axis; None for signals without channels.

    Example:
        >>> y = jnp.array([0.1, -0.1, 0.0, 5.1, 4.9, 5.0])
        >>> solver = so.trend_solver(so.Graph.chain(6))
        >>> solver(y, so.L1(0.3)).value.round(3)
        Array([0.1, 0.1, 0.1, 4.9, 4.9, 4.9], dtype=float32)
        >>> jax.grad(lambda weight: solver(y, so.L1(weight)).value[0])(0.3).round(3)  # a third of the step's pull
        Array(0.333, dtype=float32, weak_type=True)
    """
    (geometry, order), given = geometry_at(graph, order), as_method(method)
    kind = np.dtype(jnp.result_type(float)) if dtype is None else compute_dtype(np.zeros(1), dtype, geometry)
    if kind == np.float64 and not wide_types():
        raise ValueError(
            'a solver in float64 needs 64-bit types: jax.config.update("jax_enable_x64", True) at the start of the '
            "program, or use dtype=jnp.float32"
        )
    if channels is not None:
        channels = whole_number("channels", channels, 1)
    if geometry.num_edges == 0:
        raise ValueError("the graph has no edges, so no difference is penalised: every fit is the signal itself")
    values = np.broadcast_to(kind.type(0), (geometry.num_nodes, *(() if channels is None else (channels,))))
    with precision(kind):
        plans: list[Plan] = []
        for penalty, weighted in itertools.product((L1(1.0), None), (False, True)):
            weights = np.broadcast_to(kind.type(1), geometry.num_nodes) if weighted else None
            asked = Fit(geometry, {order: penalty}, values, weights, pure=True, method=given, assumed=1.0)
            if plans and given is not None and given.refuses(asked):
                continue  # a method for L1 alone
            plan = choose(asked).plan(asked)
            if all(plan is not other for other in plans):
                plans.append(plan)
    return TrendSolver(tuple(plans), graph, order, channels, kind.name)
