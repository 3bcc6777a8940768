"""The methods of the trend filter, one per file, and the choice among them.

A method is an object with its settings, a `name`, `refuses(job)` and `plan(job)`. "auto" takes the method that is
expected to be the fastest: the numbers below are measured.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sparseopt.core.base.arguments import unknown
from sparseopt.core.penalties.protocols import Norm
from sparseopt.core.solvers.dual_program import is_available
from sparseopt.trend.graph import Graph
from sparseopt.trend.job import Job, vanishes
from sparseopt.trend.methods.admm import Admm
from sparseopt.trend.methods.doge import Doge
from sparseopt.trend.methods.doge_groups import DogeGroups
from sparseopt.trend.methods.fast_admm import FastAdmm
from sparseopt.trend.methods.interior import Interior, is_narrow

AUTO = "auto"
# Above these ratios of weight to noise the interior point method beats Doge-ADMM on narrow graphs: at order 0; and at
# order 1, divided by the square of the requested digits, since the steps of Doge-ADMM grow with both.
VERY_STRONG, STRONG_PER_DIGIT = 20.0, 40.0
# Factors of larger graphs are slow and large.
MOST_NODES = 1_000_000
# On a grid the factors fill up more: at order 1 this many nodes take a minute.
MOST_GRID_NODES = 100_000
# Doge-ADMM is bound by memory traffic, and float32 has half of it: from this many nodes on, for tolerances down to that
# of the order, a signal in float64 is first solved in float32, and certified in float64. Above order 1 float32 may end
# before such tolerances, above order 0 on other graphs than grids too.
SHORT_FROM, SHORT_TOLS = 10_000, {0: 1e-6, 1: 1e-5}
# From so many nodes on it pays for every tolerance, and for the standard ADMM too.
ALWAYS_SHORT = 500_000


@runtime_checkable
class Method(Protocol):
    """A method with its settings."""

    name: str  # for callers
    one_metric: bool  # whether its x-step may need one metric for all nodes
    balances_rho: bool  # whether it computes rho again at every level of a path, from the start
    over_devices: bool  # whether it works over several devices
    keeps_rho_from: int  # from this order on it keeps the rho of the previous level of a path, for a norm

    def refuses(self, job: Job) -> str | None:
        """Why it cannot do a job, and what to do; None if it can. It does not look at the values of the signal."""

    def plan(self, job: Job) -> Any:
        """The host work for a job: a pytree, cached for similar jobs; a plain object for a method on the host."""


# In the order of preference; the last one can do every job.
CHOICE: tuple[Method, ...] = (Interior(), FastAdmm(), Admm(), Doge())
# Those whose fits are pure JAX.
PURE = CHOICE[1:]
METHODS: dict[str, Any] = {method.name: method for method in (Doge(), Admm(), FastAdmm(), Interior(), DogeGroups())}


def strong_from(graph: Graph, order: int) -> float:
    """The ratio of weight to noise above which an exact x-step saves so many steps that it is faster."""
    shape, chain = graph.node_shape, graph.is_chain
    if order == 0:
        return np.inf
    if graph.free and not chain:
        return {1: 1.0, 2: 0.3}.get(order, 0.0)
    if order == 1:
        return 2.0 if chain else 10.0
    if order == 2 and chain:
        # With free ends Doge-ADMM may need 100 times as many steps.
        return 0.0 if graph.free else 1.0
    # On small pictures an exact x-step is cheap; on grids of three axes Doge needs many steps.
    return 0.5 if order == 2 and len(shape) == 2 and min(shape) >= 128 else 0.0


def is_strong(job: Job) -> bool:
    """Whether the weight is above that ratio; the noise is computed only if it can be."""
    limit = strong_from(job.graph, job.order)
    return limit < np.inf and job.strength * job.graph.unit(job.order + 1) > limit


def has_exact_step(job: Job) -> bool:
    """Whether the x-step over the whole graph has an exact solve, or a nearly exact one: on a grid with free ends."""
    return job.graph.free or (job.graph.shape is not None and not job.weighted)


def fast_admm_pays(job: Job) -> bool:
    """On chains at order 0, and where smoothing is strong. In float32 it loses its accuracy over long chains."""
    if not (job.graph.is_chain and has_exact_step(job)) or job.several or job.dtype != np.float64:
        return False
    return job.order == 0 or is_strong(job)


def admm_pays(job: Job) -> bool:
    """Where the x-step is exact and smoothing is strong; for other losses on all grids and with free ends."""
    if not job.square:
        return job.graph.shape is not None or job.graph.free
    return has_exact_step(job) and (job.order >= 1 if job.several else is_strong(job))


def interior_pays(job: Job) -> bool:
    """On chains from order 1 where smoothing is strong; on narrow graphs where Doge-ADMM needs many steps; and on grids
    with free ends with node weights.
    """
    graph, order = job.graph, job.order
    if graph.free and not graph.is_chain:
        # At missing nodes the certificates of the other methods get better slowly.
        return job.weighted and graph.num_nodes <= MOST_GRID_NODES and is_available()
    if graph.is_chain or graph.shape is not None:
        return graph.is_chain and order >= 1 and (fast_admm_pays(job) or admm_pays(job)) and is_available()
    limits = (VERY_STRONG, STRONG_PER_DIGIT / np.log10(min(job.tol, 0.1)) ** 2, 0.0)
    few = graph.num_nodes <= MOST_NODES and graph.num_edges <= 3 * graph.num_nodes  # as a planar graph has
    return few and is_available() and job.strength > limits[min(order, 2)] and is_narrow(graph)


PAYS: dict[str, Callable[[Job], bool]] = {
    Interior.name: interior_pays,
    FastAdmm.name: fast_admm_pays,
    Admm.name: admm_pays,
    Doge.name: lambda job: True,
}


def checked_method(given: Any) -> Method | None:
    """A method, by itself, by the name of its defaults, or by name and settings as in `{"name": "doge", "B": 2}`.

    None for "auto", and a ValueError for anything else.
    """
    if isinstance(given, Mapping):
        settings = {key: value for key, value in given.items() if key != "name"}
        if not settings:
            return checked_method(given.get("name"))
        named: Any = METHODS.get(str(given.get("name")))
        known = [] if named is None else [field.name for field in dataclasses.fields(named)]
        if not known:
            raise ValueError(
                f"{given.get('name')!r} takes no settings, given {settings}: name one of "
                f"{', '.join(name for name in METHODS if dataclasses.fields(METHODS[name]))}"
            )
        for key in settings.keys() - set(known):
            raise ValueError(unknown(f"setting of {given['name']}", key, known))
        return dataclasses.replace(named, **settings)
    if isinstance(given, Method) and not isinstance(given, type):
        return given
    if isinstance(given, type) and given in map(type, METHODS.values()):
        raise ValueError(f"a method is a name or an object, given the class {given.__name__}: write {given.__name__}()")
    if not (isinstance(given, str) and given in (AUTO, *METHODS)):
        raise ValueError(unknown("method", given, (AUTO, *METHODS)))
    return None if given == AUTO else METHODS[given]


def chosen(job: Job, among: tuple[Method, ...] = CHOICE) -> Method:
    """The method of a job (a ValueError if it cannot do it); without one the first that can do it and pays."""
    if job.method is None:
        for method in among:
            if PAYS[method.name](job) and method.refuses(job) is None:
                return method
    named: Method = among[-1] if job.method is None else job.method
    if reason := named.refuses(job):
        raise ValueError(reason)
    return named


def is_short(job: Job, method: Method | None = None) -> bool:
    """Whether a job in float64 is solved in float32 first, by its method if none is given."""
    signal, graph, nodes = job.signal, job.graph, job.graph.num_nodes
    assert signal is not None
    plain = job.square and not (job.several or job.history or job.layout.several_devices)
    carries = job.tol >= SHORT_TOLS.get(job.order, np.inf)
    always = nodes >= ALWAYS_SHORT
    large = always or (nodes >= SHORT_FROM and carries and (job.order == 0 or graph.shape is not None))
    known = isinstance(job.penalty, Norm) and graph.num_edges > 0 and not (graph.free and job.order)
    # At missing nodes rounding of the dual costs as much as the whole gap.
    seen = signal.weights is None or bool(signal.weights.all())
    if not (plain and large and known and seen and job.dtype == np.float64) or vanishes(job.penalty):
        return False
    return isinstance(method or chosen(job), Doge | Admm if always else Doge)


def chosen_for_path(job: Job) -> Method:
    """The method for the levels of a path, as `chosen`.

    Most steps of a path are spent where smoothing is strong, so conditioning decides.
    """
    if job.method is not None or not isinstance(job.penalty, Norm):
        return chosen(job)
    method = chosen(dataclasses.replace(job, assumed=math.inf))
    return Admm() if isinstance(method, Doge) and job.order else method
