"""Peers that solve the fused lasso, order 0, on chains, pictures or graphs."""

import ctypes
import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from trend_problems import TrendProblem
from trend_solver import Answer, doubled, powers


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
class ProxTv:
    """Order 0 on chains and pictures by one of its methods; the rung is the iteration count, if there is one."""

    method: str
    axes: int
    package: str = "prox-tv-sdist"
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
class CutPursuit:
    """Order 0 on any graph; the rung is the relative change at which it stops.

    Its wheels free memory twice on a signal with one channel: see `build_peers.sh`.
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
        # The only values that it takes for one channel.
        options |= {"split_values_init_num": 1, "split_values_iter_num": 1}

        def call() -> Answer:
            parts, values = cp_prox_tv(signal, first, second, edge_weights=problem.weight, **options)
            return Answer(values.reshape(-1)[parts])

        return call


COUNT, REAL = ctypes.c_int, ctypes.c_double


def _pointer(array: np.ndarray, kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))


def _trails(problem: TrendProblem) -> list[Any]:
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


@dataclasses.dataclass(frozen=True)
class Pygfl:
    """ADMM on trails at order 0, projected Newton on the dual at other orders; the rung is its step limit.

    This calls the C library: decomposing a graph into trails takes its Python files minutes.
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
        """Steps of ADMM, or of Newton's method."""
        return doubled(5, 640) if problem.order else doubled(16, 8192)

    def solve(self, problem: TrendProblem, rung: int) -> Callable[[], Answer]:
        """By ctypes."""
        place = importlib.util.find_spec(self.module)
        assert place is not None
        assert place.origin is not None
        library = ctypes.CDLL(place.origin)
        return self._newton(library, problem, rung) if problem.order else self._admm(library, problem, rung)

    @staticmethod
    def _admm(library: Any, problem: TrendProblem, rung: int) -> Callable[[], Answer]:
        """Trails are prepared; parameters are the defaults of its Python files, and its own stop never acts."""
        found = _trails(problem)
        trails = np.concatenate(found).astype(np.int32)
        ends = np.cumsum([len(trail) for trail in found]).astype(np.int32)
        y, n = np.ascontiguousarray(problem.y), problem.y.size

        def call() -> Answer:
            fit, copies, scaled = np.zeros(n), np.zeros(trails.size), np.zeros(trails.size)
            library.graph_fused_lasso_warm(
                COUNT(n),
                _pointer(y, REAL),
                COUNT(ends.size),
                _pointer(trails, COUNT),
                _pointer(ends, COUNT),
                *(REAL(value) for value in (problem.weight, 0.2, 2.0)),
                COUNT(rung),
                REAL(0.0),
                *(_pointer(array, REAL) for array in (fit, copies, scaled)),
            )
            return Answer(fit)

        return call

    @staticmethod
    def _newton(library: Any, problem: TrendProblem, rung: int) -> Callable[[], Answer]:
        """On the dual."""
        matrix = problem.matrix.tocoo()
        rows, n = matrix.shape

        places = [np.ascontiguousarray(axis, np.int32) for axis in (matrix.row, matrix.col)]
        entries, y, ones = np.ascontiguousarray(matrix.data), np.ascontiguousarray(problem.y), np.ones(n)

        def call() -> Answer:
            fit, u = np.zeros(n), np.zeros(rows)
            library.graph_trend_filtering_weight_warm(
                COUNT(n),
                _pointer(y, REAL),
                _pointer(ones, REAL),
                REAL(problem.weight),
                *(COUNT(size) for size in (rows, n, entries.size)),
                *(_pointer(axis, COUNT) for axis in places),
                _pointer(entries, REAL),
                COUNT(rung),
                REAL(1e-6),
                _pointer(fit, REAL),
                _pointer(u, REAL),
            )
            return Answer(fit)

        return call
