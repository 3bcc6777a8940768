"""The penalties of a fit, checked, and as they act on the rows of a geometry."""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.arguments import Limited, own_refusal, real_array, unknown, whole_number
from sparseopt.core.base.types import is_traced, namespace
from sparseopt.core.penalties.entries import L1
from sparseopt.core.penalties.protocols import Composite
from sparseopt.core.penalties.sets import Box, Nonnegative, Nonpositive
from sparseopt.core.penalties.sums import stack
from sparseopt.trend.base.geometry import Geometry
from sparseopt.trend.base.ground import couples_axes
from sparseopt.trend.base.signal import MOST_ORDER, UNKNOWN

# A number whose square is finite in float32, and large compared with what a constraint or a ridge allows.
FAR = 1e18
Terms = dict[int, Any]


def leaves_as(tree: Any, kind: Any) -> Any:
    """A penalty or a loss with its numbers in the dtype `kind`."""

    def as_kind(leaf: Any) -> Any:
        real = np.ndim(leaf) == 0 or np.asarray(leaf).dtype.kind == "f"
        return namespace(leaf).asarray(leaf, kind if real else None)

    return jax.tree.map(as_kind, tree)


def on_rows(terms: Terms, geometry: Geometry, kind: Any, channels: bool) -> Any:
    """The penalties, whose weights may be one per row, as one penalty on the rows of `Ground.operator`."""
    several = len(terms) > 1 or -1 in terms
    parts, sizes = [], []
    for k, term in terms.items():
        weight = getattr(term, "weight", 0.0)
        if np.ndim(weight):
            rows = geometry.rows(namespace(weight).asarray(weight, kind), k + 1)
            rows = (rows.reshape(-1) if several else rows).astype(kind)
            term = leaves_as(dataclasses.replace(term, weight=0.0), kind)
            rows = rows[..., None] if channels else rows
            term = dataclasses.replace(term, weight=rows if isinstance(rows, jax.Array) else geometry.put(rows, k + 1))
        else:
            term = leaves_as(term, kind)
        parts.append(term)
        sizes.append(int(np.prod(geometry.difference(k + 1, kind).out_shape)) if several else 0)
    return stack(parts, sizes) if several else parts[0]


def couples_rows(penalty: Any) -> bool:
    """Whether it couples all rows, as the nuclear norm does."""
    return getattr(penalty, "couples_rows", False)


def bears(geometry: Geometry, penalties: Iterable[Any]) -> bool:
    """Whether penalties can act on the rows of a geometry.

    Rows filled up by zeros cannot bear a penalty with a cost at 0, or one of the singular values of `[rows, channels]`.
    """
    return not geometry.fills_rows or not any(couples_rows(term) or _excludes_zero(term) for term in penalties)


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


def constrained(terms: Terms, bounds: Any, monotone: Any) -> Terms:
    """The penalties with `low <= b <= high`, and with a signal that only rises or falls along the edges.

    A constraint joins L1 at its order: the sum of both is one penalty with a simple prox.
    """
    added: dict[int, Any] = {}
    if bounds is not None:
        low, high = _ends(bounds)
        added[-1] = lambda weight: Box(low, high, weight)
    if monotone is not None:
        if monotone not in ("up", "down"):
            raise ValueError(unknown("monotone", monotone, ("up", "down")))
        # A difference is that of an edge's tail less its head.
        added[0] = Nonpositive if monotone == "up" else Nonnegative
    for k in added.keys() & terms.keys():
        if not isinstance(terms[k], L1):
            what = "bounds join" if k < 0 else "monotone joins"
            raise ValueError(f"{what} L1 at order {k}, given {terms[k]}; use L1 there, or leave out the constraint")
    return dict(sorted((terms | {k: make(getattr(terms.get(k), "weight", 0.0)) for k, make in added.items()}).items()))


def without_bounds(terms: Terms) -> Terms | None:
    """The penalties without bounds of b, if a fit of them has only to be clipped; else None."""
    rest = {k: term for k, term in terms.items() if k >= 0}
    clips = isinstance(terms.get(-1), Box) and not np.any(terms[-1].weight) and list(rest) == [0]
    return rest if clips and isinstance(rest[0], L1 | Nonnegative | Nonpositive) else None


def _ends(bounds: Any) -> tuple[float, float]:
    """The ends of bounds, None for no end; a ValueError unless they are two numbers, the first no larger."""
    message = f"bounds are a pair (low, high) of numbers with low <= high, None for no bound, given {bounds!r:.100}"
    if isinstance(bounds, str) or np.ndim(bounds) != 1 or len(bounds) != 2:
        raise ValueError(message)
    ends = [end if given is None else given for given, end in zip(bounds, (-np.inf, np.inf), strict=True)]
    if any(isinstance(end, bool) or not isinstance(end, float | int | np.number) for end in ends):
        raise ValueError(message)
    low, high = map(float, ends)
    if not low <= high or low == np.inf or high == -np.inf:
        raise ValueError(message)
    return low, high


def check_terms(terms: Terms, geometry: Geometry, channels: tuple[int, ...], kind: np.dtype) -> Terms:
    """Checked penalties by order, without those that cost nothing unless all do."""
    for k, term in terms.items():
        require_penalty(term, geometry, k, bool(channels))
        check_parameters(term, kind, geometry.count(k + 1) if np.ndim(getattr(term, "weight", 0)) else None)
        for name in getattr(term, "number_names", ()) if geometry.fills_rows else ():
            shape = np.shape(getattr(term, name))
            if name != "weight" and shape not in ((), channels):
                raise ValueError(
                    f"the {name} of {type(term).__name__} is one number on a grid, given the shape {shape}; L1 in "
                    "`trend_filter` accepts a weight for every difference"
                )
    # Without edges there are no differences.
    edges = geometry.num_edges
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


def require_penalty(penalty: Any, geometry: Geometry, order: int, channels: bool) -> None:
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
        if couples_axes(penalty) and (order != 0 or len(geometry.node_shape) < 2):
            raise ValueError(
                f"{name} with axis {penalty.axis!r}, isotropic total variation, needs order 0 and a grid of 2 or 3 "
                f"axes, given order {order} on {geometry!r}"
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
    if weight.ndim and not (rows is not None and isinstance(penalty, L1 | Box | Nonnegative | Nonpositive)):
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
