"""Floor 5: what a fit needs beside penalty and method, and the way back from the solver to the caller's units."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.certify import promoted, relative_gap, stationary
from sparseopt.core.constraints import Box, Nonnegative
from sparseopt.core.fidelity import NodeSquares, total
from sparseopt.core.group_penalties import SparseGroup
from sparseopt.core.penalties import ElasticNet, Norm
from sparseopt.core.problem import Problem, Solution
from sparseopt.trend.graph import Graph
from sparseopt.trend.inputs import Signal
from sparseopt.trend.methods import Prepared, prepare

# At orders >= 1 the fit may leave the range of the data where nothing is observed. The certificate then holds
# among fits within this many ranges of it; at order 0 the range itself is a bound that loses nothing.
BOX_RANGES = 10.0
# rho starts at this multiple of the weight over the noise: the balance 3 of admm.py at duals of rms 0.8 weight.
FIRST_RHO = 2.4


@dataclasses.dataclass(frozen=True)
class SetUp:
    """What a fit needs beside penalty and method.

    Attributes:
        loss: on the nodes, `[*nodes]` or `[*nodes, channels]`.
        centred: the same with the overall mean taken from the signal.
        shift: that mean, `[channels]`.
        means: of every node's component, `[n, channels]`.
        full: the operator `Δ^(order+1)`, as Doge-ADMM takes it.
        noise: of the signal; 0 where it has no differences.
        laid_out: values `[n, channels]` on the nodes of the graph, on the device; a second argument, `[channels]` or 0,
            for padded places, where the graph has them. The signal and the means have the mean there.
    """

    loss: NodeSquares
    centred: NodeSquares
    shift: np.ndarray
    means: np.ndarray
    full: Prepared
    noise: float
    laid_out: Callable[..., jax.Array]


def set_up(signal: Signal, graph: Graph, order: int, anchored: bool = False) -> SetUp:
    """Lay out a checked signal; call it where the signal's precision is enabled.

    Args:
        signal: checked.
        graph: with an edge.
        order: k, the highest.
        anchored: whether the values themselves are penalised. Then 0 is a special value: nothing is taken from the
            signal, 0 stands for the means, and the box holds it.
    """
    kind, channels = signal.values.dtype, signal.values.shape[1:]

    def laid_out(values: np.ndarray, fill: Any = 0.0) -> jax.Array:
        values = values.reshape(graph.num_nodes, *channels)
        return graph.place(graph.row_layout(values, 0, fill).astype(kind, copy=False))

    shift, means = _means(signal, graph)
    if anchored:
        shift, means = np.zeros_like(shift), np.zeros_like(means)
    weights = None
    if signal.weights is not None:
        weights = graph.place(graph.row_layout(signal.weights.reshape(-1, *(1 for _ in channels)), 0))
    low, high = _box(signal, order, anchored)
    padding = None if graph.padding(0) == 1 else jnp.asarray(graph.padding(0), kind)

    def squares(center: jax.Array, shift: Any) -> NodeSquares:
        return NodeSquares(center, weights, jnp.asarray(low - shift, kind), jnp.asarray(high - shift, kind), padding)

    loss = squares(laid_out(signal.values, shift), 0)
    centred = squares(loss.observed(laid_out(signal.values - shift)), shift)
    full = prepare(graph, order, "doge", order + 1, weights is not None, kind, bool(channels))
    noise = float(noise_of(full, centred.center)) * graph.padding(order + 1)
    return SetUp(loss, centred, shift, means, full, noise, laid_out)


def leaves_as(tree: Any, kind: np.dtype) -> Any:
    """A penalty or a loss with its numbers in the dtype of the computation."""

    def as_kind(leaf: Any) -> jax.Array:
        real = np.ndim(leaf) == 0 or np.asarray(leaf).dtype.kind == "f"
        return jnp.asarray(leaf, kind) if real else jnp.asarray(leaf)

    return jax.tree.map(as_kind, tree)


def on_rows(penalty: Any, graph: Graph, order: int, channels: bool) -> Any:
    """The penalty with its row weights, if it has them, in the layout of the rows of Δ^(order+1)."""
    weight = getattr(penalty, "weight", None)
    if weight is None or np.ndim(weight) == 0:
        return penalty
    laid_out = graph.row_layout(np.asarray(weight, np.float64), order + 1)
    return dataclasses.replace(penalty, weight=laid_out[..., None] if channels else laid_out)


def placed(penalty: Any, graph: Graph, order: int, kind: np.dtype) -> Any:
    """What `on_rows` gives on the device, in the dtype of the computation."""
    weight = getattr(penalty, "weight", None)
    if weight is None or np.ndim(weight) == 0:
        return leaves_as(penalty, kind)
    number = leaves_as(dataclasses.replace(penalty, weight=0.0), kind)
    return dataclasses.replace(number, weight=graph.place(np.asarray(weight, kind), order + 1))


def mean_weight(penalty: Any, padding: float = 1.0) -> float:
    """The penalty's weight, the mean where there are many; 1 where there is none, it is 0, or it sets no scale.

    Args:
        penalty: whose weight is on the host.
        padding: entries of many weights over those that count; the others are 0.
    """
    if isinstance(penalty, Nonnegative | Box):
        return 1.0
    weight = getattr(penalty, "weight", 1.0)
    return float(np.mean(weight)) * (padding if np.ndim(weight) else 1.0) or 1.0


def vanishes(penalty: Any) -> bool:
    """Whether the penalty is 0 everywhere, every weight being 0."""
    more = isinstance(penalty, Nonnegative | Box | ElasticNet | SparseGroup)
    return not more and not np.any(getattr(penalty, "weight", 1.0))


def _box(signal: Signal, k: int, anchored: bool) -> tuple[np.ndarray, np.ndarray]:
    """Bounds for the fit at missing nodes, one a channel."""
    seen = signal.values if signal.weights is None else signal.values[signal.weights > 0]
    low, high = seen.min(axis=0), seen.max(axis=0)
    if anchored:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    wider = BOX_RANGES * (high - low) if k else 0
    return low - wider, high + wider


@jax.jit
def noise_of(ready: Prepared, y: jax.Array) -> jax.Array:
    """The standard deviation of white noise whose differences have the mean size of those of y."""
    return 1.2533 * jnp.mean(jnp.abs(ready.split.mv(y)) / ready.row_norms)


def _means(signal: Signal, graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """The mean over all observed nodes and the mean of every node's component, `[channels]` and `[n, channels]`."""
    kind, channels = signal.values.dtype, signal.values.shape[1:]
    columns = signal.values.reshape(graph.num_nodes, -1)
    if signal.weights is None:
        overall = columns.mean(axis=0, dtype=np.float64)
    else:
        overall = np.average(columns, axis=0, weights=signal.weights.astype(np.float64))
    if graph.num_components == 1:
        means = np.broadcast_to(overall.astype(kind), columns.shape)
    else:
        weights = np.ones(graph.num_nodes) if signal.weights is None else signal.weights.astype(np.float64)
        mass = np.bincount(graph.components, weights=weights)
        sums = [np.bincount(graph.components, weights=weights * column) for column in columns.T]
        means = (np.stack(sums, axis=1) / mass[:, None])[graph.components].astype(kind)
    return overall.astype(kind).reshape(channels), means.reshape(graph.num_nodes, *channels)


def judged(problem: Problem, x: jax.Array, dual: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The objective of a point and its relative duality gap by a dual point; the penalty is a `Norm`."""
    loss, penalty, split = problem.loss, problem.penalty, problem.operator
    rows = split.mv(x)
    objective = loss.value(x) + penalty.value(rows)
    slack = loss.slack(x, split.rmv(dual)) + total(penalty.slack(rows, dual))
    # Neither loss nor penalty is ever negative, so an objective of 0 needs no dual.
    return objective, jnp.where(objective == 0, 0, relative_gap(slack, objective))


class Finished(NamedTuple):
    """A fit in the caller's units, as `Solution` has it."""

    value: Any
    status: Any
    residual: Any
    objective: Any
    gap: Any


@jax.jit
def finished(problem: Problem, found: Solution, shift: jax.Array, means: jax.Array, tol: jax.Array) -> Finished:
    """What a solve of the centred problem found, as it stands in the caller's units after rounding.

    The component means are the limit for large weights; where they are no worse than the iterate they are the
    answer, and its differences are exactly zero.

    Args:
        problem: in the caller's units.
        found: of the centred problem.
        shift: what was taken from the signal.
        means: laid out.
        tol: of the solve.
    """
    penalty = problem.penalty
    x, status = found.value + shift, found.status
    if not isinstance(penalty, Norm):
        return Finished(x, stationary(status), found.residual, found.objective, found.gap)
    dual = found.state.candidate
    of_x, of_means = judged(problem, x, dual), judged(problem, means, dual)
    take = of_means[0] <= of_x[0]
    objective, gap = (jnp.where(take, there, here) for there, here in zip(of_means, of_x, strict=True))
    # The mean comes back in working precision; what that costs is part of the answer.
    # The shift, the means or a penalty of a user's own may overflow where the centred problem did not.
    status = promoted(status, gap, objective, tol)
    return Finished(jnp.where(take, means, x), status, gap, objective, gap)


def answered(found: Solution, fit: Finished, graph: Graph, shape: tuple[int, ...]) -> Solution:
    """The solution in the caller's units and shape.

    What the acceleration remembers is many times the signal, and no later solve can use it.
    """
    fit = fit._replace(value=graph.shaped(fit.value, shape))
    return dataclasses.replace(found, **fit._asdict(), state=dataclasses.replace(found.state, past=None))
