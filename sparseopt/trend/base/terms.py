"""The penalties of a fit by their orders, checked on the host before any work."""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.arguments import fits, own_refusal, real_array, whole_number
from sparseopt.core.base.types import is_traced
from sparseopt.core.penalties.entries import L1
from sparseopt.core.penalties.protocols import Penalty, is_composite
from sparseopt.core.penalties.sets import Box
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.ground import Terms, couples_axes
from sparseopt.trend.base.layout import Layout
from sparseopt.trend.base.signal import MOST_ORDER, UNKNOWN

# A number whose square is finite in float32, and large beside what a constraint or a ridge can bear.
FAR = 1e18


def graph_for(graph: Graph, *penalties: Any) -> Graph:
    """The graph for penalties, by its edges where the rows of a grid would not do.

    A grid that was found in edges has its rows in the order and direction of a grid, padded with zeros. A penalty that
    is not even needs the directions given, and one that zeros cost something cannot take the padding.
    """
    if graph.shape is None or graph.free:
        return graph
    turned = graph.turned and not all(getattr(penalty, "even", False) for penalty in penalties)
    return graph.as_edges() if turned or any(map(_excludes_zero, penalties)) else graph


def terms_of(penalty: Any, order: int) -> Terms:
    """One penalty, or several by their orders, which may be floats or integers of NumPy, ascending."""
    if not isinstance(penalty, Mapping):
        return {order: penalty}
    what = "the order of each of several penalties"
    terms = {whole_number(what, key, -1, MOST_ORDER, "-1: b itself"): term for key, term in penalty.items()}
    if any(map(couples_axes, terms.values())):
        raise ValueError(
            "isotropic total variation, a penalty with axis 0, is taken alone here, given several penalties by orders"
        )
    if not terms:
        raise ValueError("several penalties are keyed by their orders, as in {-1: L1(0.5), 0: L1(2.0)}; given none")
    if order:
        raise ValueError(
            f"where penalties are keyed by their orders {list(terms)}, leave order out; given order={order}"
        )
    return dict(sorted(terms.items()))


def check_terms(terms: Terms, layout: Layout, channels: tuple[int, ...], kind: np.dtype) -> Terms:
    """Checked penalties by order, without those that cost nothing unless all do."""
    for k, term in terms.items():
        rows = layout.count(k + 1) if np.ndim(getattr(term, "weight", 0)) else None
        check_penalty(term, layout.graph, k, channels, kind, rows)
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
    if said is not None:
        return bool(said() if callable(said) else said)
    return _cost(penalty, np.zeros((3, 1))) not in (0, None)


def check_penalty(
    penalty: Any, graph: Graph, order: int, channels: tuple[int, ...], kind: np.dtype, rows: int | None = None
) -> Any:
    """The penalty, after `require_penalty` and `check_parameters`."""
    require_penalty(penalty, graph, order, bool(channels))
    check_parameters(penalty, kind, rows)
    if graph.shape is not None and not graph.free:  # whose rows are no list
        for name in getattr(penalty, "number_names", ()):
            shape = np.shape(getattr(penalty, name))
            if name != "weight" and shape not in ((), channels):
                raise ValueError(
                    f"the {name} of {type(penalty).__name__} is one number on a grid, given the shape {shape}; L1 in "
                    "`trend_filter` takes a weight for every difference"
                )
    return penalty


def require_penalty(penalty: Any, graph: Graph, order: int, channels: bool) -> None:
    """Raise a TypeError or ValueError unless this is a penalty on the differences of an order."""
    if not fits(penalty, Penalty):
        raise TypeError(f"a penalty has `value` and `prox`, such as sparseopt.L1(10.0); given {penalty!r}")
    if any(leaf is penalty for leaf in jax.tree.leaves(penalty)):
        # No program can be compiled for it.
        raise TypeError(f"a penalty is a pytree, made so by the decorator sparseopt.pytree; given {penalty!r}")
    name = type(penalty).__name__
    if is_composite(penalty):
        raise TypeError(
            f"{name} has differences of its own, and the penalty here acts on those of the graph, as L1(0.5) does; "
            f"for {name} itself call its prox, or `sparseopt.solve`"
        )
    if axes := getattr(penalty, "group_axes", ()):
        if penalty.groups is not None:
            raise ValueError(f"{name} couples channels here; labelled groups of differences are not supported")
        if axes not in ((-1,), (0,), (0, -1)):
            raise ValueError(
                f"{name} couples the channels by axis -1, the differences of a node along the axes of a grid by axis "
                f"0, and both by axis (0, -1), given {penalty.axis!r}"
            )
        if -1 in axes and not channels:
            raise ValueError(
                f"{name} with axis {penalty.axis!r} couples the channels of a signal [n, channels]; this one has none: "
                "use L1, or on a grid axis 0 for isotropic total variation"
            )
        if couples_axes(penalty) and (order != 0 or graph.shape is None or len(graph.shape) < 2):
            raise ValueError(
                f"{name} with axis {penalty.axis!r}, isotropic total variation, takes order 0 and a grid of 2 or 3 "
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
        # The bounds of a box may be infinite.
        if np.any(np.isnan(value) if isinstance(penalty, Box) else ~np.isfinite(value)):
            raise ValueError(f"the penalty's parameters must be finite, given {penalty}")
    require_representable(np.asarray(weight, np.float64), kind)


def check_weight(penalty: Any, rows: int | None = None) -> Any:
    """The weight of a penalty, 0 without one, that of L1 one number or one for each of `rows` rows; else a ValueError.

    No number of the penalty may be one that `refuses` rejects. Those that are traced are not checked.
    """
    weight: Any = getattr(penalty, "weight", 0.0)
    known = not is_traced(weight)
    weight = real_array("the penalty's weight", weight) if known else weight
    if reason := own_refusal(penalty):
        raise ValueError(reason)
    if weight.ndim and not (rows is not None and isinstance(penalty, L1)):
        raise ValueError(
            f"the penalty's weight is one number here, given the shape {weight.shape}; L1 in `trend_filter` takes a "
            "weight for every difference, and a graph takes weights of edges"
        )
    if weight.shape not in ((), (rows,)):
        raise ValueError(
            f"the weight of L1 is one number, or one for each of the {rows} rows of graph.matrix(order + 1), "
            f"given the shape {weight.shape}"
        )
    if known and weight.min(initial=0) < 0:  # of a penalty of the user's
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
