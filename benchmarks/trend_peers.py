"""Solvers of the trend-filter problem with one interface: sparseopt and public ones. To add one, see `Solver`.

Not included: cvxpy, which would call OSQP; exact maximum
flow by PyMaxflow, which is GPL (cut pursuit represents graph cuts).
"""

import ctypes
import dataclasses
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from scipy import sparse
from trend_problems import TrendProblem

# The factors of larger problems do not fit in memory.
LARGEST_FACTORED = 300_000


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer of a solver.

    Attributes:
        fit: `[n]`, or in the shape of the grid.
        lower: a lower bound of the objective, if the solver has one.
        details: numbers for the record.
    """

    fit: np.ndarray
    lower: float | None = None
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


class Solver(Protocol):
    """One solver."""

    @property
    def name(self) -> str:
        """In records."""
        ...

    @property
    def package(self) -> str:
        """Its distribution."""
        ...

    @property
    def module(self) -> str:
        """The module to import."""
        ...

    @property
    def compiles(self) -> bool:
        """Whether the first call compiles, which is timed separately."""
        ...

    @property
    def kinds(self) -> tuple[bool, ...]:
        """Which values of `problem.isotropic` it takes."""
        ...

    def can(self, problem: TrendProblem) -> bool:
        """Whether it solves this problem, if it is of one of its kinds."""
        ...

    def ladder(self, problem: TrendProblem) -> Sequence[Any]:
        """Settings from coarse to fine."""
        ...

    def solve(self, problem: TrendProblem, rung: Any) -> Callable[[], Answer]:
        """Prepare the data for the library. The returned call is timed, from a cold start."""
        ...


def powers(first: int, last: int, per_decade: int = 1) -> list[float]:
    """`10^first ... 10^last`, decreasing."""
    return [float(f"{value:.1e}") for value in np.logspace(first, last, (first - last) * per_decade + 1)]


def doubled(first: int, last: int) -> list[int]:
    """`first`, twice that, and so on up to `last`."""
    return [count for power in range(32) if (count := first << power) <= last]


@dataclasses.dataclass(frozen=True)
class Sparseopt:
    """sparseopt; the rung is the tolerance of the certified gap.

    Every timed call has a new graph, so that it includes tables and factors; `again` times a call on a graph that was
    used before.
    """

    method: str
    dtype: str | None = None
    package: str = "sparseopt"
    module: str = "sparseopt"
    compiles: bool = True
    kinds: tuple[bool, ...] = (False, True)

    @property
    def name(self) -> str:
        """The method, and the precision if it is not that of the signal."""
        return " ".join(filter(None, ["sparseopt", self.method, self.dtype]))

    def can(self, problem: TrendProblem) -> bool:
        """`fast_admm` needs chains, and the factors of "interior" must fit in memory."""
        if self.method == "interior":
            return problem.y.size <= LARGEST_FACTORED and (problem.shape is None or len(problem.shape) == 1)
        return self.method != "fast_admm" or (problem.shape is not None and len(problem.shape) == 1)

    def ladder(self, problem: TrendProblem) -> Sequence[float]:
        """Half decades; float32 stops where rounding limits the gap."""
        del problem
        return powers(-2, -7, 2) if self.dtype is None else powers(-2, -5, 2)

    def solve(self, problem: TrendProblem, rung: float) -> Callable[[], Answer]:
        """From edges and signal to the fit."""
        return lambda: self._fit(problem, self._graph(problem), rung)

    def again(self, problem: TrendProblem, rung: float) -> Callable[[], Answer]:
        """The same on one graph, which the first call prepares."""
        graph = self._graph(problem)
        return lambda: self._fit(problem, graph, rung)

    @staticmethod
    def _graph(problem: TrendProblem) -> Any:
        import sparseopt as so

        if problem.shape is not None:
            return so.Graph.grid(problem.shape)
        return so.Graph.from_edges(problem.edges, problem.y.size)

    def _fit(self, problem: TrendProblem, graph: Any, tol: float) -> Answer:
        import sparseopt as so

        penalty: Any = so.GroupL2(problem.weight, axis=0) if problem.isotropic else so.L1(problem.weight)
        steps = 500_000
        found = so.trend_filter(problem.y, graph, penalty, problem.order, self.method, tol, steps, dtype=self.dtype)
        fit, gap = np.asarray(found.value), float(found.gap)
        lower = float(found.objective) / (1 + gap) if self.dtype is None and np.isfinite(gap) else None
        return Answer(fit, lower, {"steps": int(found.steps), "gap": gap})


def _dual_answer(problem: TrendProblem, u: np.ndarray) -> Answer:
    """The fit `y - Δᵀ u` of a dual point."""
    u = np.clip(u, -problem.weight, problem.weight)
    return Answer(problem.y - problem.matrix.T @ u, problem.lower_bound(u))


@dataclasses.dataclass(frozen=True)
class Piqp:
    """Interior point, on the dual: minimise 1/2 ||r||² over r = y - Δᵀ u, |u| <= weight. The rung is its tolerance.

    Each order uses the form that was fastest on planar graphs: with r as a variable at order 0, without it at order 1,
    and at order 2 also with `q = Dᵀ u`, so that no product of differences is formed.
    """

    name: str = "PIQP"
    package: str = "piqp"
    module: str = "piqp"
    compiles: bool = False
    kinds: tuple[bool, ...] = (False,)

    def can(self, problem: TrendProblem) -> bool:
        """Whether its factors fit in memory."""
        return problem.y.size <= LARGEST_FACTORED

    def ladder(self, problem: TrendProblem) -> Sequence[float]:
        """Relative and absolute tolerance; a step gains about one digit."""
        del problem
        return powers(0, -9)

    @staticmethod
    def _program(problem: TrendProblem) -> tuple[Any, np.ndarray, Any, np.ndarray | None]:
        """Hessian, linear term, equations and their right-hand side; the first variables are u."""
        matrix, y, n = problem.matrix, problem.y, problem.y.size
        eye = sparse.eye_array(n)
        if problem.order == 1:
            return sparse.csc_matrix(matrix @ matrix.T), -(matrix @ y), None, None
        if problem.order == 2:
            incidence = problem.incidence
            equations = sparse.block_array([[incidence.T, -eye, None], [None, incidence.T @ incidence, eye]])
            right = np.r_[np.zeros(n), y]
        else:
            equations, right = sparse.hstack([matrix.T, eye]), y
        size = equations.shape[1]
        hessian = sparse.diags_array(np.r_[np.zeros(size - n), np.ones(n)])
        return sparse.csc_matrix(hessian), np.zeros(size), sparse.csc_matrix(equations), right

    def solve(self, problem: TrendProblem, rung: float) -> Callable[[], Answer]:
        """Set-up, with ordering and factorisation, is part of the call."""
        import piqp

        hessian, linear, equations, right = self._program(problem)
        rows = problem.matrix.shape[0]
        bound = np.full(linear.size, np.inf)
        bound[:rows] = problem.weight

        def call() -> Answer:
            solver = piqp.SparseSolver()
            settings = solver.settings
            settings.eps_abs = settings.eps_rel = rung
            settings.check_duality_gap = True
            settings.eps_duality_gap_abs = settings.eps_duality_gap_rel = rung
            settings.num_threads = 1
            solver.setup(hessian, linear, equations, right, x_l=-bound, x_u=bound)
            solver.solve()
            answer = _dual_answer(problem, solver.result.x[:rows])
            return dataclasses.replace(answer, details={"steps": int(solver.result.info.iter)})

        return call


@dataclasses.dataclass(frozen=True)
class Osqp:
    """Operator splitting for quadratic programs, on the same dual. The rung is its tolerance."""

    name: str = "OSQP"
    package: str = "osqp"
    module: str = "osqp"
    compiles: bool = False
    kinds: tuple[bool, ...] = (False,)

    def can(self, problem: TrendProblem) -> bool:
        """Whether its factors fit in memory."""
        return problem.y.size <= LARGEST_FACTORED

    def ladder(self, problem: TrendProblem) -> Sequence[float]:
        """Relative and absolute tolerance."""
        del problem
        return powers(-1, -7)

    def solve(self, problem: TrendProblem, rung: float) -> Callable[[], Answer]:
        """Set-up is part of the call."""
        import osqp

        rows, n = problem.matrix.shape
        hessian = sparse.csc_matrix(sparse.diags_array(np.r_[np.zeros(rows), np.ones(n)]))
        transposed, eye = problem.matrix.T, sparse.eye_array(n)
        limits = sparse.hstack([sparse.eye_array(rows), sparse.csr_array((rows, n))])
        constraints = sparse.csc_matrix(sparse.vstack([sparse.hstack([transposed, eye]), limits]))
        low = np.r_[problem.y, np.full(rows, -problem.weight)]
        high = np.r_[problem.y, np.full(rows, problem.weight)]

        def call() -> Answer:
            solver = osqp.OSQP()
            options = {"eps_abs": rung, "eps_rel": rung, "max_iter": 100_000, "verbose": False}
            solver.setup(hessian, np.zeros(rows + n), constraints, low, high, **options)
            found = solver.solve()
            return dataclasses.replace(_dual_answer(problem, found.x[:rows]), details={"steps": int(found.info.iter)})

        return call


@dataclasses.dataclass(frozen=True)
class ProxTv:
    """Order 0 on chains and pictures by one of its methods; the rung is the iteration count, if there is one."""

    method: str
    axes: int
    package: str = "prox_tv"
    module: str = "prox_tv"
    compiles: bool = False
    kinds: tuple[bool, ...] = (False,)

    @property
    def name(self) -> str:
        """With the name of the method."""
        return f"proxTV {self.method}"

    def can(self, problem: TrendProblem) -> bool:
        """Order 0 on grids of the method's dimension."""
        return problem.order == 0 and problem.shape is not None and len(problem.shape) == self.axes

    def ladder(self, problem: TrendProblem) -> Sequence[int]:
        """Direct methods have one rung."""
        del problem
        return [0] if self.axes == 1 else doubled(8, 2048)

    def solve(self, problem: TrendProblem, rung: int) -> Callable[[], Answer]:
        """One thread."""
        import prox_tv

        if self.axes == 1:
            return lambda: Answer(prox_tv.tv1_1d(problem.y, problem.weight, method=self.method))
        picture = np.asfortranarray(problem.y.reshape(problem.shape))
        options = {"n_threads": 1, "max_iters": rung, "method": self.method}
        return lambda: Answer(prox_tv.tv1_2d(picture, problem.weight, **options))


@dataclasses.dataclass(frozen=True)
class FastProx:
    """Order 0; the rung is the tolerance of its gap, relative to the energy of the signal."""

    name: str = "fastprox"
    package: str = "fastprox"
    module: str = "fastprox"
    compiles: bool = False
    kinds: tuple[bool, ...] = (False, True)

    def can(self, problem: TrendProblem) -> bool:
        """Order 0 on any graph."""
        return problem.order == 0

    def ladder(self, problem: TrendProblem) -> Sequence[float | None]:
        """Chains are solved directly."""
        return [None] if problem.shape is not None and len(problem.shape) == 1 else powers(-4, -9, 2)

    def solve(self, problem: TrendProblem, rung: float | None) -> Callable[[], Answer]:
        """One thread."""
        import fastprox

        if problem.shape is not None and len(problem.shape) == 1:
            return lambda: Answer(fastprox.tv1d(problem.y, problem.weight, threads=1))
        options = {"tol": rung, "threads": 1, "warn": False}
        if problem.shape is not None:
            field = problem.y.reshape(problem.shape)
            axes = len(problem.shape)
            variation = fastprox.tv_iso if problem.isotropic else fastprox.tv_aniso
            return lambda: Answer(variation(field, problem.weight, ndim=axes, max_iter=100_000, **options)[0])
        return lambda: Answer(fastprox.graph_tv(problem.y, problem.edges, problem.weight, **options)[0])


@dataclasses.dataclass(frozen=True)
class CutPursuit:
    """Order 0 on any graph; the rung is the relative change at which it stops.

    The wheels 0.1.0 to 0.1.4 need NumPy 1 and fail on a signal with one channel, so this needs a custom build.
    """

    name: str = "cut pursuit"
    package: str = "pycut-pursuit"
    module: str = "pycut_pursuit"
    compiles: bool = False
    kinds: tuple[bool, ...] = (False,)

    def can(self, problem: TrendProblem) -> bool:
        """Order 0."""
        return problem.order == 0

    def ladder(self, problem: TrendProblem) -> Sequence[float]:
        """Of the outer loop; the default of the inner one is a hundredth of it."""
        del problem
        return powers(-1, -6)

    def solve(self, problem: TrendProblem, rung: float) -> Callable[[], Answer]:
        """Edges sorted by their first node, one thread."""
        from pycut_pursuit.cp_prox_tv import cp_prox_tv

        ends = np.sort(problem.edges, axis=1)
        ends = ends[np.argsort(ends[:, 0], kind="stable")]
        first = np.searchsorted(ends[:, 0], np.arange(problem.y.size + 1)).astype(np.uint32)
        second = np.ascontiguousarray(ends[:, 1], np.uint32)
        signal = np.asfortranarray(problem.y.reshape(1, -1))
        options = {"cp_dif_tol": rung, "cp_it_max": 100, "verbose": 0, "max_num_threads": 1}

        def call() -> Answer:
            parts, values = cp_prox_tv(signal, first, second, edge_weights=problem.weight, **options)
            return Answer(values.reshape(-1)[parts])

        return call


@dataclasses.dataclass(frozen=True)
class Pygfl:
    """Projected Newton on the dual, any order; the rung is its step limit.

    Its source distribution does not build (a header is missing) and its Python files are Python 2, so this calls the C
    library `libgraphfl`, which must be built by hand.
    """

    name: str = "pygfl"
    package: str = "pygfl"
    module: str = "libgraphfl"
    compiles: bool = False
    kinds: tuple[bool, ...] = (False,)

    def can(self, problem: TrendProblem) -> bool:
        """Every problem for which ΔΔᵀ fits in memory."""
        return problem.y.size <= 2_000_000

    def ladder(self, problem: TrendProblem) -> Sequence[int]:
        """Newton steps."""
        del problem
        return doubled(5, 640)

    def solve(self, problem: TrendProblem, rung: int) -> Callable[[], Answer]:
        """By ctypes."""
        place = importlib.util.find_spec(self.module)
        assert place is not None
        assert place.origin is not None
        library = ctypes.CDLL(place.origin)
        matrix = problem.matrix.tocoo()
        rows, n = matrix.shape
        count, real = ctypes.c_int, ctypes.c_double

        def pointer(array: np.ndarray, kind: Any) -> Any:
            return array.ctypes.data_as(ctypes.POINTER(kind))

        places = [np.ascontiguousarray(axis, np.int32) for axis in (matrix.row, matrix.col)]
        entries, y, ones = np.ascontiguousarray(matrix.data), np.ascontiguousarray(problem.y), np.ones(n)

        def call() -> Answer:
            fit, u = np.zeros(n), np.zeros(rows)
            library.graph_trend_filtering_weight_warm(
                count(n),
                pointer(y, real),
                pointer(ones, real),
                real(problem.weight),
                *(count(size) for size in (rows, n, entries.size)),
                *(pointer(axis, count) for axis in places),
                pointer(entries, real),
                count(rung),
                real(1e-6),
                pointer(fit, real),
                pointer(u, real),
            )
            return Answer(fit)

        return call


@dataclasses.dataclass(frozen=True)
class ScikitImage:
    """Isotropic total variation of pictures and volumes; the rung is the number of iterations."""

    method: str
    package: str = "scikit-image"
    module: str = "skimage"
    compiles: bool = False
    kinds: tuple[bool, ...] = (True,)

    @property
    def name(self) -> str:
        """With the name of the method."""
        return f"scikit-image {self.method}"

    def can(self, problem: TrendProblem) -> bool:
        """Split Bregman takes pictures."""
        return problem.shape is not None and (self.method == "Chambolle" or len(problem.shape) == 2)

    def ladder(self, problem: TrendProblem) -> Sequence[int]:
        """Doubling."""
        del problem
        return doubled(8, 16384 if self.method == "Chambolle" else 512)

    def solve(self, problem: TrendProblem, rung: int) -> Callable[[], Answer]:
        """Its own stop never acts."""
        from skimage import restoration

        assert problem.shape is not None
        field, weight = problem.y.reshape(problem.shape), problem.weight
        if self.method == "Chambolle":
            options: dict[str, Any] = {"eps": 0, "max_num_iter": rung}
            return lambda: Answer(restoration.denoise_tv_chambolle(field, weight, **options))
        options = {"eps": 1e-30, "max_num_iter": rung, "isotropic": True}
        return lambda: Answer(restoration.denoise_tv_bregman(field, 1 / weight, **options))


@dataclasses.dataclass(frozen=True)
class Pyunlocbox:
    """Isotropic total variation of pictures, by FISTA on the dual; the rung is the number of iterations."""

    name: str = "pyunlocbox"
    package: str = "pyunlocbox"
    module: str = "pyunlocbox"
    compiles: bool = False
    kinds: tuple[bool, ...] = (True,)

    def can(self, problem: TrendProblem) -> bool:
        """Its norm takes two axes."""
        return problem.shape is not None and len(problem.shape) == 2

    def ladder(self, problem: TrendProblem) -> Sequence[int]:
        """Doubling."""
        del problem
        return doubled(8, 4096)

    def solve(self, problem: TrendProblem, rung: int) -> Callable[[], Answer]:
        """Its own stop never acts."""
        from pyunlocbox import functions

        assert problem.shape is not None
        field = problem.y.reshape(problem.shape)
        norm = functions.norm_tv(maxit=rung, tol=0, dim=2, verbosity="NONE")
        return lambda: Answer(norm.prox(field.copy(), problem.weight))


OURS: tuple[Solver, ...] = (
    *(Sparseopt(method) for method in ("auto", "doge", "admm", "fast_admm", "interior")),
    Sparseopt("auto", "float32"),
)
PEERS: tuple[Solver, ...] = (
    FastProx(),
    *(ProxTv(method, 2) for method in ("dr", "pd", "kolmogorov", "condat")),
    *(ProxTv(method, 1) for method in ("tautstring", "dp")),
    *(ScikitImage(method) for method in ("Chambolle", "split Bregman")),
    Pyunlocbox(),
    CutPursuit(),
    Pygfl(),
    Piqp(),
    Osqp(),
)
SOLVERS: dict[str, Solver] = {solver.name: solver for solver in itertools.chain(OURS, PEERS)}


def able(solver: Solver, problem: TrendProblem) -> bool:
    """Whether a solver takes a problem."""
    return problem.isotropic in solver.kinds and solver.can(problem)
