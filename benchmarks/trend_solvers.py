"""Solvers of the trend-filter problem with one interface: sparseopt and public ones. To add one, see `Solver`.

Not included: cvxpy, which would call OSQP; exact maximum flow by PyMaxflow, which is GPL (cut pursuit represents graph
cuts); other methods of proxTV than the two that were the fastest on some problem.
"""

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from trend_problems import TrendProblem

# The factors of larger problems do not fit in memory.
LARGEST_FACTORED = 300_000
COUNT, REAL = ctypes.c_int, ctypes.c_double


class Answer(NamedTuple):
    """The answer of a solver: a fit, `[n]` or in the shape of the grid, and a lower bound of the objective if known."""

    fit: np.ndarray
    lower: float | None = None


Call = Callable[[], Answer]


class Solver(NamedTuple):
    """One solver.

    `solve` prepares the data for the library, for a problem and a rung. The call that it returns is timed, from a cold
    start, on one thread. Rungs are settings from coarse to fine.
    """

    name: str
    package: str
    module: str
    solve: Callable[[TrendProblem, Any], Call]
    rungs: Callable[[TrendProblem], Sequence[Any]]
    takes: Callable[[TrendProblem], bool]
    # Whether the first call compiles, which is timed separately.
    compiles: bool = False


def powers(first: int, last: int, per_decade: int = 1) -> list[float]:
    """`10^first ... 10^last`, decreasing."""
    return [float(f"{value:.1e}") for value in np.logspace(first, last, (first - last) * per_decade + 1)]


def doubled(first: int, last: int) -> list[int]:
    """`first`, twice that, and so on up to `last`."""
    return [count for power in range(32) if (count := first << power) <= last]


def fused(problem: TrendProblem) -> bool:
    """Order 0 on any graph."""
    return problem.order == 0 and not problem.isotropic


def factored(problem: TrendProblem) -> bool:
    """Any order, if the factors of a sparse matrix fit in memory."""
    return problem.y.size <= LARGEST_FACTORED and not problem.isotropic


def graph_of(problem: TrendProblem) -> Any:
    """A new graph of sparseopt, without tables and factors."""
    import sparseopt as so

    if problem.shape is None:
        return so.Graph.from_edges(problem.edges, problem.y.size)
    return so.Graph.grid(problem.shape)


def sparseopt(method: str, dtype: str | None = None) -> Solver:
    """sparseopt; the rung is the tolerance of the certified gap.

    Every timed call has a new graph, so that it includes tables and factors.
    """

    def solve(problem: TrendProblem, tol: float) -> Call:
        import sparseopt as so

        def call() -> Answer:
            penalty: Any = so.GroupL2(problem.weight, axis=0) if problem.isotropic else so.L1(problem.weight)
            options: dict[str, Any] = {"tol": tol, "max_steps": 500_000, "dtype": dtype}
            found = so.trend_filter(problem.y, graph_of(problem), penalty, problem.order, method, **options)
            gap = float(found.gap)
            lower = float(found.objective) / (1 + gap) if dtype is None and np.isfinite(gap) else None
            return Answer(np.asarray(found.value), lower)

        return call

    def takes(problem: TrendProblem) -> bool:
        if method == "interior":
            return problem.y.size <= LARGEST_FACTORED and problem.axes < 2
        return method != "fused_lasso" or (problem.axes == 1 and problem.order == 0)

    # float32 stops where rounding limits the gap.
    ladder = powers(-2, -7 if dtype is None else -5, 2)
    name = " ".join(filter(None, ["sparseopt", method, dtype]))
    return Solver(name, "sparseopt", "sparseopt", solve, lambda _: ladder, takes, compiles=True)


def program(problem: TrendProblem) -> tuple[Any, np.ndarray, Any, np.ndarray | None]:
    """The dual: Hessian, linear term, equations and their right-hand side; the first variables are u.

    Minimise 1/2 ||r||² over r = y - Δᵀ u, |u| <= weight. Each order uses the form that was fastest on planar graphs:
    with r as a variable at order 0, without it at order 1, and at order 2 also with `q = Dᵀ u`, so that no product of
    differences is formed.
    """
    matrix, y, n = problem.matrix, problem.y, problem.y.size
    if problem.order == 1:
        return sparse.csc_matrix(matrix @ matrix.T), -(matrix @ y), None, None
    eye = sparse.eye_array(n)
    if problem.order == 2:
        incidence = problem.incidence
        equations = sparse.block_array([[incidence.T, -eye, None], [None, incidence.T @ incidence, eye]])
        right = np.r_[np.zeros(n), y]
    else:
        equations, right = sparse.hstack([matrix.T, eye]), y
    size = equations.shape[1]
    hessian = sparse.diags_array(np.r_[np.zeros(size - n), np.ones(n)])
    return sparse.csc_matrix(hessian), np.zeros(size), sparse.csc_matrix(equations), right


def dual(prepare: Callable[[TrendProblem, float], Callable[[], Any]]) -> Callable[[TrendProblem, float], Any]:
    """A solver from one of the dual: the fit is `y - Δᵀ u`. Its set-up, with a factorisation, is part of the call."""

    def solve(problem: TrendProblem, tol: float) -> Call:
        find = prepare(problem, tol)

        def call() -> Answer:
            u = np.clip(np.asarray(find())[: problem.matrix.shape[0]], -problem.weight, problem.weight)
            return Answer(problem.y - problem.matrix.T @ u, problem.lower_bound(u))

        return call

    return solve


@dual
def piqp(problem: TrendProblem, tol: float) -> Callable[[], Any]:
    """Interior point."""
    import piqp

    hessian, linear, equations, right = program(problem)
    bound = np.full(linear.size, np.inf)
    bound[: problem.matrix.shape[0]] = problem.weight

    def call() -> Any:
        solver = piqp.SparseSolver()
        settings = solver.settings
        settings.eps_abs = settings.eps_rel = tol
        settings.check_duality_gap = True
        settings.eps_duality_gap_abs = settings.eps_duality_gap_rel = tol
        settings.num_threads = 1
        solver.setup(hessian, linear, equations, right, x_l=-bound, x_u=bound)
        solver.solve()
        return solver.result.x

    return call


@dual
def clarabel(problem: TrendProblem, tol: float) -> Callable[[], Any]:
    import clarabel

    hessian, linear, equations, right = program(problem)
    rows, upper = problem.matrix.shape[0], sparse.triu(hessian, format="csc")
    bounded = sparse.eye_array(rows, linear.size)
    blocks = [bounded, -bounded] if equations is None else [equations, bounded, -bounded]
    constraints = sparse.csc_matrix(sparse.vstack(blocks))
    limits = np.r_[() if right is None else right, np.full(2 * rows, problem.weight)]
    cones = [clarabel.ZeroConeT(limits.size - 2 * rows), clarabel.NonnegativeConeT(2 * rows)]

    def call() -> Any:
        settings = clarabel.DefaultSettings()
        settings.verbose = False
        settings.max_threads = 1
        settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = tol
        return clarabel.DefaultSolver(upper, linear, constraints, limits, cones, settings).solve().x

    return call


@dual
def osqp(problem: TrendProblem, tol: float) -> Callable[[], Any]:
    """Operator splitting for quadratic programs."""
    import osqp

    rows, n = problem.matrix.shape
    hessian = sparse.csc_matrix(sparse.diags_array(np.r_[np.zeros(rows), np.ones(n)]))
    limits = sparse.hstack([sparse.eye_array(rows), sparse.csr_array((rows, n))])
    equations = sparse.hstack([problem.matrix.T, sparse.eye_array(n)])
    constraints = sparse.csc_matrix(sparse.vstack([equations, limits]))
    low, high = (np.r_[problem.y, np.full(rows, bound)] for bound in (-problem.weight, problem.weight))

    def call() -> Any:
        solver = osqp.OSQP()
        options = {"eps_abs": tol, "eps_rel": tol, "max_iter": 100_000, "verbose": False}
        solver.setup(hessian, np.zeros(rows + n), constraints, low, high, **options)
        return solver.solve().x

    return call


def fastprox(problem: TrendProblem, tol: float | None) -> Call:
    """The tolerance is that of its gap, relative to the energy of the signal; chains are solved directly."""
    import fastprox

    if problem.axes == 1:
        return lambda: Answer(fastprox.tv1d(problem.y, problem.weight, threads=1))
    options = {"tol": tol, "threads": 1, "warn": False}
    if problem.shape is None:
        return lambda: Answer(fastprox.graph_tv(problem.y, problem.edges, problem.weight, **options)[0])
    field = problem.y.reshape(problem.shape)
    variation = fastprox.tv_iso if problem.isotropic else fastprox.tv_aniso
    options |= {"ndim": problem.axes, "max_iter": 100_000}
    return lambda: Answer(variation(field, problem.weight, **options)[0])


def prox_tv(problem: TrendProblem, count: int) -> Call:
    """The taut string on chains, Kolmogorov's splitting on pictures; the rung is its number of iterations."""
    import prox_tv

    if problem.axes == 1:
        return lambda: Answer(prox_tv.tv1_1d(problem.y, problem.weight, method="hybridtautstring"))
    picture, options = np.asfortranarray(problem.y.reshape(problem.shape)), {"n_threads": 1, "method": "kolmogorov"}
    return lambda: Answer(prox_tv.tv1_2d(picture, problem.weight, max_iters=count, **options))


def cut_pursuit(problem: TrendProblem, change: float) -> Call:
    """The rung is the relative change at which its outer loop stops; the default of the inner one is a hundredth of it.

    Its wheels free memory twice on a signal with one channel: see `build_peers.sh`.
    """
    from pycut_pursuit.cp_prox_tv import cp_prox_tv

    # Edges are sorted by their first node.
    ends = np.sort(problem.edges, axis=1)
    ends = ends[np.argsort(ends[:, 0], kind="stable")]
    first = np.searchsorted(ends[:, 0], np.arange(problem.y.size + 1)).astype(np.uint32)
    second = np.ascontiguousarray(ends[:, 1], np.uint32)
    signal = np.asfortranarray(problem.y.reshape(1, -1))
    options = {"cp_dif_tol": change, "cp_it_max": 100, "verbose": 0, "max_num_threads": 1}
    # The only values that it takes for one channel.
    options |= {"split_values_init_num": 1, "split_values_iter_num": 1}

    def call() -> Answer:
        parts, values = cp_prox_tv(signal, first, second, edge_weights=problem.weight, **options)
        return Answer(values.reshape(-1)[parts])

    return call


def trails_of(problem: TrendProblem) -> list[Any]:
    """Walks that use every edge once: the lines of a grid; otherwise each goes on while it can."""
    if problem.shape is not None:
        nodes = np.arange(problem.y.size).reshape(problem.shape)
        return [line for axis, n in enumerate(problem.shape) for line in np.moveaxis(nodes, axis, -1).reshape(-1, n)]
    free: list[set[int]] = [set() for _ in problem.y]
    for one, other in problem.edges.tolist():
        free[one].add(other)
        free[other].add(one)
    trails = []
    for start in range(problem.y.size):
        while free[start]:
            trail = [start]
            while free[trail[-1]]:
                reached = free[trail[-1]].pop()
                free[reached].discard(trail[-1])
                trail.append(reached)
            trails.append(trail)
    return trails


def pointer(array: np.ndarray) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(REAL if array.dtype == np.float64 else COUNT))


def pygfl(problem: TrendProblem, count: int) -> Call:
    """ADMM on trails at order 0, projected Newton on the dual at other orders; the rung is its step limit.

    This calls the C library: decomposing a graph into trails takes its Python files minutes. Parameters are the
    defaults of its Python files, and its own stop of ADMM never acts.
    """
    place: Any = importlib.util.find_spec("libgraphfl")
    library = ctypes.CDLL(place.origin)
    y, n, weight = np.ascontiguousarray(problem.y), problem.y.size, REAL(problem.weight)
    if problem.order == 0:
        found = trails_of(problem)
        trails = np.concatenate(found).astype(np.int32)
        ends = np.cumsum([len(trail) for trail in found]).astype(np.int32)
        given: list[Any] = [COUNT(n), pointer(y), COUNT(ends.size), pointer(trails), pointer(ends), weight]
        given += [REAL(0.2), REAL(2.0), COUNT(count), REAL(0.0)]
        solve, sizes = library.graph_fused_lasso_warm, [n, trails.size, trails.size]
    else:
        matrix, ones = problem.matrix.tocoo(), np.ones(n)
        rows, columns = (np.ascontiguousarray(axis, np.int32) for axis in (matrix.row, matrix.col))
        entries = np.ascontiguousarray(matrix.data)
        given = [COUNT(n), pointer(y), pointer(ones), weight, *(COUNT(size) for size in (*matrix.shape, entries.size))]
        given += [*map(pointer, (rows, columns, entries)), COUNT(count), REAL(1e-6)]
        solve, sizes = library.graph_trend_filtering_weight_warm, [n, matrix.shape[0]]

    def call() -> Answer:
        arrays = [np.zeros(size) for size in sizes]
        solve(*given, *map(pointer, arrays))
        return Answer(arrays[0])

    return call


def scikit_image(problem: TrendProblem, count: int) -> Call:
    """Chambolle's method; the rung is the number of iterations, and its own stop never acts."""
    from skimage.restoration import denoise_tv_chambolle

    assert problem.shape is not None
    field = problem.y.reshape(problem.shape)
    return lambda: Answer(denoise_tv_chambolle(field, problem.weight, eps=0, max_num_iter=count))


def pyunlocbox(problem: TrendProblem, count: int) -> Call:
    """FISTA on the dual; the rung is the number of iterations, and its own stop never acts."""
    from pyunlocbox import functions

    assert problem.shape is not None
    field = problem.y.reshape(problem.shape)
    norm = functions.norm_tv(maxit=count, tol=0, dim=2, verbosity="NONE")
    return lambda: Answer(norm.prox(field.copy(), problem.weight))


# An interior point method gains about one digit with each step.
FINE = powers(0, -9)
OURS = (*map(sparseopt, ("auto", "doge", "admm", "fused_lasso", "interior")), sparseopt("auto", "float32"))
PEERS = (
    Solver(
        "fastprox", "fastprox", "fastprox", fastprox,
        lambda problem: [None] if problem.axes == 1 else powers(-4, -9, 2), lambda problem: problem.order == 0,
    ),
    Solver(
        "proxTV kolmogorov", "prox-tv-sdist", "prox_tv", prox_tv, lambda _: doubled(8, 2048),
        lambda problem: fused(problem) and problem.axes == 2,
    ),
    Solver(
        "proxTV hybridtautstring", "prox-tv-sdist", "prox_tv", prox_tv, lambda _: [0],
        lambda problem: fused(problem) and problem.axes == 1,
    ),
    Solver(
        "scikit-image Chambolle", "scikit-image", "skimage", scikit_image, lambda _: doubled(8, 16384),
        lambda problem: problem.isotropic,
    ),
    Solver(
        "pyunlocbox", "pyunlocbox", "pyunlocbox", pyunlocbox, lambda _: doubled(8, 4096),
        lambda problem: problem.isotropic and problem.axes == 2,
    ),
    Solver("cut pursuit", "pycut-pursuit", "pycut_pursuit", cut_pursuit, lambda _: powers(-1, -6), fused),
    Solver(
        "pygfl", "pygfl", "libgraphfl", pygfl, lambda problem: doubled(5, 640) if problem.order else doubled(16, 8192),
        # ΔΔᵀ must fit in memory.
        lambda problem: problem.y.size <= 2_000_000 and not problem.isotropic,
    ),
    Solver("PIQP", "piqp", "piqp", piqp, lambda _: FINE, factored),
    Solver("Clarabel", "clarabel", "clarabel", clarabel, lambda _: FINE, factored),
    Solver("OSQP", "osqp", "osqp", osqp, lambda _: powers(-1, -7), factored),
)  # fmt: skip
SOLVERS: dict[str, Solver] = {solver.name: solver for solver in (*OURS, *PEERS)}
