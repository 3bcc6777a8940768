"""Floor 5: the trend filter with several penalties, each on the differences of an order of its own.

    minimise over b    1/2 sum_j w_j (y_j - b_j)²  +  sum_k penalty_k(Δ^(k+1) b),        Δ^(0) = I

Orders -1 and 0 together are the sparse fused lasso, orders 0 and 1 fit signals with jumps and slopes. The rows of all
orders are stacked into one operator, the penalties into one penalty, so solver and certificate are those of one order.

Source: Tibshirani, Saunders, Rosset, Zhu, Knight, "Sparsity and smoothness via the fused lasso", JRSS B 67 (2005);
Tibshirani, "Adaptive piecewise polynomial estimation via trend filtering", Annals of Statistics 42 (2014), section 7.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.combined_penalties import stacked
from sparseopt.core.iterate import iterate
from sparseopt.core.operators import Difference, Identity, Split, Stack
from sparseopt.core.penalties import Norm
from sparseopt.core.problem import Problem, Solution
from sparseopt.core.solvers.admm import Admm, Start, standard_split
from sparseopt.core.solvers.node_solve import ConjugateGradient, Diagonal, cosine_solve
from sparseopt.trend.checks import whole_number
from sparseopt.trend.graph import Graph
from sparseopt.trend.inputs import MOST_ORDER, Signal, checked_penalty
from sparseopt.trend.methods import ACCELERATION, Prepared
from sparseopt.trend.options import SPLITTING_METHODS, Options
from sparseopt.trend.preparation import (
    FIRST_RHO,
    Finished,
    answered,
    finished,
    judged,
    leaves_as,
    mean_weight,
    on_rows,
    set_up,
    vanishes,
)
from sparseopt.trend.start import start_point, warm_start_of

Terms = dict[int, Any]


def checked_terms(penalty: Any, signal: Signal, graph: Graph, order: int) -> Terms:
    """Checked penalties by order, ascending, without those of weight 0 if others are left; one for no mapping.

    Raises:
        ValueError, TypeError: for an order below -1, an order beside the mapping, no penalty, or one that does not fit.
    """
    if not isinstance(penalty, Mapping):
        return {order: _checked_term(penalty, signal, graph, order)}
    if not penalty:
        raise ValueError("several penalties are keyed by their orders, as in {-1: L1(0.5), 0: L1(2.0)}; given none")
    if order:
        raise ValueError(
            f"where penalties are keyed by their orders {list(penalty)}, leave order out; given order={order}"
        )
    terms = {}
    for key, term in penalty.items():
        k = whole_number("the order of each of several penalties", key, -1, MOST_ORDER, "-1: b itself")
        terms[k] = _checked_term(term, signal, graph, k)
    terms = dict(sorted(terms.items()))
    # Without edges there are no differences.
    strong = {k: term for k, term in terms.items() if not vanishes(term) and (graph.num_edges or k == -1)}
    return strong or {max(0, *terms): next(iter(terms.values()))}


def _checked_term(penalty: Any, signal: Signal, graph: Graph, order: int) -> Any:
    channels = signal.values.shape[1] if signal.values.ndim == 2 else None
    return checked_penalty(penalty, channels, signal.values.dtype, graph.num_nodes if order % 2 else graph.num_edges)


def is_sum(terms: Terms) -> bool:
    """Whether the terms are more than one ordinary trend filter."""
    return len(terms) > 1 or -1 in terms


def sum_method(terms: Terms, graph: Graph, weighted: bool) -> str:
    """The method for "auto": from order 1 an exact x-step where it is cheap, by cosines on grids."""
    return "admm" if graph.shape is not None and not weighted and max(terms) >= 1 else "doge"


def fit_sum(signal: Signal, graph: Graph, terms: Terms, options: Options) -> Solution:
    """The fit of a checked signal; call it where the signal's precision is enabled. Arguments as in `trend_filter`.

    Where a norm penalises b itself (order -1), entries that the dual says are 0 are exactly 0 in the answer, if that
    costs nothing.

    Raises:
        ValueError: for a method of single orders, or a graph without edges.
    """
    if graph.num_edges == 0:
        raise ValueError(
            "the graph has no edges, so only a penalty on the values themselves acts: apply its prox, as in "
            "L1(0.5).prox(y, 1.0)"
        )
    method, rho, warm_start = options.method, options.rho, options.warm_start
    if method not in SPLITTING_METHODS:
        raise ValueError(
            f"method={method!r} solves single orders; with several penalties use {', '.join(SPLITTING_METHODS)}"
        )
    kind, channels = signal.values.dtype, signal.values.shape[1:]
    weighted, anchored = signal.weights is not None, -1 in terms
    base = set_up(signal, graph, max(0, *terms), anchored)
    method = sum_method(terms, graph, weighted) if method == "auto" else method
    ready = _prepare(graph, tuple(terms), method, weighted, kind, bool(channels))
    penalty = _stacked(terms, graph, ready.split, kind, bool(channels))
    noise = base.noise or float(np.std(signal.values)) or 1.0
    weight = max(mean_weight(term) for term in terms.values())
    solver = Admm(
        ready.node_solve,
        jnp.asarray(FIRST_RHO * weight / noise if rho is None else rho, kind),
        **options.solver_settings(method, kind),
        acceleration=ACCELERATION,
    )
    centre = base.centred.center
    start = Start(centre, jnp.zeros(ready.split.row_shape(centre), kind))
    if warm_start is not None:
        x = base.laid_out(start_point(warm_start, signal) - base.shift)
        start = warm_start_of(x, warm_start, ready, rho)
    problem, level = Problem(base.centred, penalty, ready.split), jnp.asarray(options.tol, kind)
    limit = options.limit(solver.cadence)
    found = iterate(problem, solver, start, tol=level, max_steps=limit, history=options.history)
    problem = Problem(base.loss, penalty, ready.split)
    fit = finished(problem, found, jnp.asarray(base.shift, kind), base.laid_out(base.means), level)
    if anchored and isinstance(penalty, Norm):
        long = jnp.asarray(noise / mean_weight(terms[-1]), kind)
        fit = _with_zeros(problem, fit, found.state.candidate, long, level)
    return answered(found, fit, graph, signal.shape)


def _stacked(terms: Terms, graph: Graph, split: Split, kind: np.dtype, channels: bool) -> Any:
    """The penalties on the stacked rows."""
    parts = []
    for k, term in terms.items():
        part = on_rows(term, graph, k, channels)
        if np.ndim(getattr(part, "weight", 0.0)):
            part = dataclasses.replace(part, weight=part.weight.reshape(-1, *(1 for _ in range(channels))))
        parts.append(leaves_as(part, kind))
    stack = split.inner if isinstance(split.inner, Stack) else split.outer
    return stacked(parts, stack.sizes)


def _prepare(
    graph: Graph, orders: tuple[int, ...], method: str, weighted: bool, dtype: Any, channels: bool
) -> Prepared:
    """Build, or take from the graph's cache, the split and the x-step."""
    cosines = graph.shape is not None and not weighted
    key = ("sum", orders, method, cosines, np.dtype(dtype).name, channels)

    def build() -> Prepared:
        base = graph.base(dtype)
        stack = Stack(tuple(Difference(base, k + 1) for k in orders))
        sums = [graph.sums(k + 1) for k in orders]
        node_solve: Any = Diagonal()
        if method == "doge":
            rows = np.concatenate([part.row_absolute.reshape(-1) for part in sums])
            columns = np.sum([part.column_absolute.reshape(base.node_shape) for part in sums], axis=0)
            rows = np.where(rows > 0, rows, 1)
            rows, columns = (rows[:, None], columns[..., None]) if channels else (rows, columns)
            split = Split(stack, Difference(base, 0), jnp.asarray(rows, dtype), jnp.asarray(columns, dtype))
        else:
            split = standard_split(stack, Identity(sum(stack.sizes)), dtype)
            if cosines:
                assert graph.shape is not None
                node_solve = cosine_solve(graph.shape, tuple(k + 1 for k in orders), dtype)
            else:
                diagonal = np.sum([part.column_squares.reshape(base.node_shape) for part in sums], axis=0)
                diagonal = diagonal[..., None] if channels else diagonal
                node_solve = ConjugateGradient(diagonal.astype(dtype), jnp.asarray(1e-2, dtype))
        return Prepared(jax.tree.map(jnp.asarray, split), jax.tree.map(jnp.asarray, node_solve), None)

    return graph.cached(key, build)


@jax.jit
def _with_zeros(problem: Problem, fit: Finished, dual: jax.Array, long: jax.Array, tol: jax.Array) -> Finished:
    """The fit with 0 where the first term's prox over a long step is 0, if its gap is no worse or within tol.

    See `nonzero_rows` in `freedom.py` for why the dual tells, and not the size of an entry.
    """
    first, x = problem.penalty.penalties[0], fit.value
    flat = x.reshape(problem.penalty.sizes[0], *dual.shape[1:])
    kept = first.prox(flat + long * dual[: flat.shape[0]], long) != 0
    value = jnp.where(kept.reshape(x.shape), x, 0)
    objective, gap = judged(problem, value, dual)
    take = gap <= jnp.maximum(fit.gap, tol)
    changed = Finished(value, fit.status, gap, objective, gap)
    return jax.tree.map(lambda new, old: jnp.where(take, new, old), changed, fit)
