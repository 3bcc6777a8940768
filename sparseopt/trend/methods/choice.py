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
from sparseopt.trend.base.job import Job, vanishes
from sparseopt.trend.base.method import Method
from sparseopt.trend.base.pieces import TrendSolution
from sparseopt.trend.methods.admm_plan import Admm, FastAdmm
from sparseopt.trend.methods.doge_plan import Doge, DogeGroups
from sparseopt.trend.methods.interior_plan import Interior, is_narrow

AUTO = "auto"
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
# The ratios of weight to noise above which an exact x-step saves so many steps that it is faster, at orders 0, 1 and 2,
# for a chain or not and free ends or not; 0 above order 2. On chains with free ends Doge-ADMM may need 100 times as
# many steps, and on grids of three axes many. On small images an exact x-step is cheap, on large ones less so.
STRONG_FROM = {
    (True, False): (np.inf, 2.0, 1.0),
    (True, True): (np.inf, 2.0, 0.0),
    (False, True): (np.inf, 1.0, 0.3),
    (False, False): (np.inf, 10.0, 0.0),
}
LARGE_SIDE, STRONG_ON_LARGE = 128, 0.5


def is_strong(job: Job) -> bool:
    """Whether the weight is above that ratio; the noise is computed only if it can be."""
    graph, order, shape = job.graph, job.order, job.graph.node_shape
    limit = STRONG_FROM[graph.is_chain, graph.free][order] if order <= 2 else 0.0
    if order == 2 and not graph.free and len(shape) == 2 and min(shape) >= LARGE_SIDE:
        limit = STRONG_ON_LARGE
    return limit < np.inf and job.strength * graph.unit(order + 1) > limit


def has_exact_step(job: Job) -> bool:
    """Whether the x-step over the whole graph has an exact solve, or a nearly exact one: on a grid with free ends."""
    return job.graph.free or (job.graph.shape is not None and not job.weighted)


def fast_admm_pays(job: Job) -> bool:
    """On chains at order 0, and if smoothing is strong. In float32 it loses its accuracy over long chains."""
    possible = job.graph.is_chain and has_exact_step(job) and not job.several and job.dtype == np.float64
    return possible and (job.order == 0 or is_strong(job))


def admm_pays(job: Job) -> bool:
    """If the x-step is exact and smoothing is strong, or rows are coupled; for other losses on all grids and chains."""
    if not job.square or job.coupled:
        return job.coupled or job.graph.shape is not None
    return has_exact_step(job) and (job.order >= 1 if job.several else is_strong(job))


def interior_pays(job: Job) -> bool:
    """On chains from order 1 if smoothing is strong; on narrow graphs if Doge-ADMM needs many steps; and on grids with
    free ends with node weights.
    """
    graph, order, weights = job.graph, job.order, job.graph.weights
    if graph.is_chain:
        return order >= 1 and (fast_admm_pays(job) or admm_pays(job)) and is_available()
    if graph.shape is not None:
        # At missing nodes the certificates of the other methods get better slowly.
        return graph.free and job.weighted and graph.num_nodes <= MOST_GRID_NODES and is_available()
    limits = (VERY_STRONG, STRONG_PER_DIGIT / np.log10(min(job.tol, 0.1)) ** 2, 0.0)
    few = graph.num_nodes <= MOST_NODES and graph.num_edges <= 3 * graph.num_nodes  # as a planar graph has
    uneven = order > 0 and weights is not None and weights.max(initial=0) >= UNEVEN * weights.min(initial=np.inf)
    return few and is_available() and (uneven or job.strength > limits[min(order, 2)]) and is_narrow(graph)


# The methods that "auto" chooses from, in the order of preference, and when each is expected to be the fastest.
CHOICE: dict[Method, Callable[[Job], bool]] = {
    Interior(): interior_pays,
    FastAdmm(): fast_admm_pays,
    Admm(): admm_pays,
    Doge(): lambda job: True,  # it can do every job
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
    if isinstance(given, str) and given in (AUTO, *METHODS):
        return METHODS.get(given)
    if fits(given, Method):
        return given
    if isinstance(given, type) and given in map(type, METHODS.values()):
        raise ValueError(f"a method is a name or an object, given the class {given.__name__}: write {given.__name__}()")
    raise ValueError(unknown("method", given, (AUTO, *METHODS)))


def choose(job: Job, pure: bool = False) -> Method:
    """The method of a job (a ValueError if it cannot do it); without one, the first that can do it and pays.

    A `pure` one has fits that are pure JAX, unless the job names another.
    """
    if job.method is None:
        for method, pays in CHOICE.items():
            if not (pure and method.on_host) and pays(job) and method.refuses(job) is None:
                return method
    named: Method = Doge() if job.method is None else job.method
    if reason := named.refuses(job):
        raise ValueError(reason)
    return named


def is_short(job: Job, method: Method | None = None) -> bool:
    """Whether a job in float64 is solved in float32 first, by its method if none is given."""
    signal, graph, nodes = job.signal, job.graph, job.graph.num_nodes
    plain = job.square and not (job.several or job.history or job.layout.several_devices)
    carries = job.tol >= SHORT_TOLS.get(job.order, np.inf)
    soon = nodes >= Doge.short_from and carries and (job.order == 0 or graph.shape is not None)
    large = soon or nodes >= Admm.short_from
    known = graph.num_edges > 0 and not (graph.free and job.order)
    # At missing nodes rounding of the dual costs as much as the whole gap.
    suits = plain and large and known and signal.complete and job.dtype == np.float64 and is_norm(job.penalty)
    return suits and not vanishes(job.penalty) and nodes >= (method or choose(job)).short_from


def unless_rounded(job: Job, found: TrendSolution) -> TrendSolution:
    """A fit on the host, or, if rounding ended it and the method is free, the fit of one that gets closer.

    At very large weights the interior point method ends above small gaps.
    """
    if job.method is not None or int(found.status) == Status.CONVERGED:
        return found
    other = choose(job, pure=True).plan(job).fit_job(job)
    # A smaller objective decides between two gaps that are infinite.
    return min(other, found, key=lambda fit: tuple(np.nan_to_num([fit.gap, fit.objective], nan=np.inf)))


def choose_for_path(job: Job) -> Method:
    """The method for the levels of a path, as `choose`.

    Most steps of a path are spent while smoothing is strong, so conditioning decides.
    """
    if job.method is not None or not is_norm(job.penalty):
        return choose(job)
    method = choose(dataclasses.replace(job, assumed=math.inf))
    return Admm() if isinstance(method, Doge) and job.order else method
