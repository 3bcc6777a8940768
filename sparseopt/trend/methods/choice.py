"""The choice of a method of the trend filter: by its name, or the one that is expected to be the fastest.

The numbers below are measured.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sparseopt.core.base.arguments import fits, unknown
from sparseopt.core.penalties.protocols import is_norm
from sparseopt.core.problem.problem import Status
from sparseopt.core.solvers.interior import is_available
from sparseopt.trend.base.fit import Fit
from sparseopt.trend.base.method import Method
from sparseopt.trend.base.penalties import vanishes
from sparseopt.trend.base.pieces import TrendSolution
from sparseopt.trend.methods.admm_plan import Admm
from sparseopt.trend.methods.chain_plans import FusedLasso
from sparseopt.trend.methods.doge_plan import Doge, DogeGroups
from sparseopt.trend.methods.interior_plan import Interior, is_narrow

AUTO = "auto"
# Instead of the method that has ended.
FAST_ADMM = 'on chains use "fused_lasso" at order 0 and "interior" above, or "auto"'
# Above these ratios of weight to noise the interior point method beats Doge-ADMM on narrow graphs: at order 0; and at
# order 1, divided by the square of the requested digits, since the steps of Doge-ADMM grow with both.
VERY_STRONG, STRONG_PER_DIGIT = 20.0, 40.0
# Above order 0, from this ratio of edge weights on Doge-ADMM takes ten times the steps and more.
UNEVEN = 1e3
# Factors of larger graphs are slow and large.
MOST_NODES = 1_000_000
# On a grid the factors fill up more: at order 1 this many nodes take a minute.
MOST_GRID_NODES = 100_000
# Doge-ADMM is bound by memory traffic, and float32 has half of it: from its number of nodes on, for tolerances down to
# the order's, a signal in float64 is first solved in float32, and certified in float64. Above order 1 float32 may end
# before such tolerances, and above order 0 on graphs other than grids. From the standard ADMM's number on it pays for
# every tolerance.
SHORT_TOLS = {0: 1e-6, 1: 1e-5}
# The ratios of weight to noise above which an exact x-step saves so many steps that it is faster, at orders 0, 1 and 2;
# 0 above order 2. On chains with free ends Doge-ADMM may need 100 times as many steps, and on grids of three axes many.
# On small images an exact x-step is cheap, on large ones less so.
STRONG_FROM = {
    "chain": (np.inf, 2.0, 1.0),
    "free chain": (np.inf, 2.0, 0.0),
    "free grid": (np.inf, 1.0, 0.3),
    "grid": (np.inf, 10.0, 0.0),
    "edges": (np.inf, np.inf, np.inf),  # without an exact x-step
}
LARGE_SIDE, STRONG_ON_LARGE = 128, 0.5


def is_strong(asked: Fit) -> bool:
    """Whether the weight is above that ratio; the noise is computed only if it can be."""
    geometry, order, shape = asked.geometry, asked.order, asked.geometry.node_shape
    limit = STRONG_FROM[geometry.kind][order] if order <= 2 else 0.0
    if order == 2 and geometry.kind == "grid" and len(shape) == 2 and min(shape) >= LARGE_SIDE:
        limit = STRONG_ON_LARGE
    return limit < np.inf and asked.strength * geometry.unit(order + 1) > limit


def fused_lasso_pays(asked: Fit) -> bool:
    """In float64 where it can. In float32 it loses its accuracy over long chains."""
    return asked.geometry.line and asked.order == 0 and asked.dtype == np.float64


def admm_pays(asked: Fit) -> bool:
    """If the x-step is exact and smoothing is strong, or rows are coupled; for other losses on all grids and chains."""
    if not asked.square or asked.coupled:
        return asked.coupled or asked.geometry.exact_step(weighted=False)
    return asked.geometry.exact_step(asked.weighted) and (asked.order >= 1 if asked.several else is_strong(asked))


def interior_pays(asked: Fit) -> bool:
    """On chains from order 1 if smoothing is strong; on narrow graphs if Doge-ADMM needs many steps; and on grids with
    free ends with node weights.
    """
    geometry, order = asked.geometry, asked.order
    if geometry.line:
        return order >= 1 and is_strong(asked)
    if geometry.kind != "edges":
        # At missing nodes the certificates of the other methods get better slowly.
        return geometry.wide and asked.weighted and geometry.num_nodes <= MOST_GRID_NODES and is_available()
    limits, weights = (VERY_STRONG, STRONG_PER_DIGIT / np.log10(min(asked.tol, 0.1)) ** 2, 0.0), geometry.weights
    few = geometry.num_nodes <= MOST_NODES and geometry.num_edges <= 3 * geometry.num_nodes  # as a planar graph has
    uneven = order > 0 and weights is not None and weights.max(initial=0) >= UNEVEN * weights.min(initial=np.inf)
    return few and is_available() and (uneven or asked.strength > limits[min(order, 2)]) and is_narrow(geometry)


# The methods that "auto" chooses from, in the order of preference, and when each is expected to be the fastest.
CHOICE: dict[Method, Callable[[Fit], bool]] = {
    Interior(): interior_pays,
    FusedLasso(): fused_lasso_pays,
    Admm(): admm_pays,
    Doge(): lambda asked: True,  # it can do every request
}
METHODS: dict[str, Any] = {method.name: method for method in (*reversed(CHOICE), DogeGroups())}


def as_method(given: Any) -> Method | None:
    """A method, given as an object, by name, or by name and settings as in `{"name": "doge", "B": 2}`.

    None for "auto", and a ValueError for anything else.
    """
    settings = dict(given) if isinstance(given, Mapping) else {"name": given}
    given = settings.pop("name", None)
    if settings:
        named: Any = METHODS.get(str(given))
        known = [] if named is None else [field.name for field in dataclasses.fields(named)]
        if not known:
            raise ValueError(
                f"{given!r} has no settings, given {settings}: name one of "
                f"{', '.join(name for name in METHODS if dataclasses.fields(METHODS[name]))}"
            )
        for key in settings.keys() - set(known):
            raise ValueError(unknown(f"setting of {given}", key, known))
        return dataclasses.replace(named, **settings)
    if given == "fast_admm":
        raise ValueError(f'"fast_admm" ended in 0.4: {FAST_ADMM}')
    if isinstance(given, str) and given in (AUTO, *METHODS):
        return METHODS.get(given)
    if fits(given, Method):
        return given
    if isinstance(given, type) and given in map(type, METHODS.values()):
        raise ValueError(f"a method is a name or an object, given the class {given.__name__}: write {given.__name__}()")
    raise ValueError(unknown("method", given, (AUTO, *METHODS)))


def choose(asked: Fit) -> Method:
    """The method of a request (a ValueError if it cannot do it); without one, the first that can do it and pays.

    A `pure` one has fits that are pure JAX, unless the request names another.
    """
    if asked.method is None:
        for method, pays in CHOICE.items():
            if pays(asked) and method.refuses(asked) is None:
                return method
    named: Method = Doge() if asked.method is None else asked.method
    if reason := named.refuses(asked):
        raise ValueError(reason)
    return named


def is_short(asked: Fit, method: Method | None = None) -> bool:
    """Whether a request in float64 is solved in float32 first, by its method if none is given."""
    geometry, nodes = asked.geometry, asked.geometry.num_nodes
    plain = asked.square and not (asked.several or asked.history or asked.geometry.several_devices)
    carries = asked.tol >= SHORT_TOLS.get(asked.order, np.inf)
    soon = nodes >= Doge.short_from and carries and (asked.order == 0 or geometry.fills_rows)
    large = soon or nodes >= Admm.short_from
    known = geometry.num_edges > 0 and not geometry.wide
    # At missing nodes rounding of the dual costs as much as the whole gap.
    suits = plain and large and known and asked.complete and asked.dtype == np.float64 and is_norm(asked.penalty)
    return suits and not vanishes(asked.penalty) and nodes >= (method or choose(asked)).short_from


def unless_rounded(asked: Fit, found: TrendSolution) -> TrendSolution:
    """A fit, or, if rounding ended the one of the interior point method and the method is free, one that gets closer.

    At very large weights PIQP ends above small gaps.
    """
    if asked.method is not None or asked.geometry.line or int(found.status) == Status.CONVERGED:
        return found
    other = choose(dataclasses.replace(asked, pure=True)).plan(asked).fit_asked(asked)
    # A smaller objective decides between two gaps that are infinite.
    return min(other, found, key=lambda fit: tuple(np.nan_to_num([fit.gap, fit.objective], nan=np.inf)))


def choose_for_path(asked: Fit) -> Method:
    """The method for the levels of a path, as `choose`.

    Most steps of a path are spent while smoothing is strong, so conditioning decides.
    """
    if asked.method is not None or not is_norm(asked.penalty):
        return choose(asked)
    method = choose(dataclasses.replace(asked, assumed=math.inf))
    return Admm() if isinstance(method, Doge) and asked.order else method
