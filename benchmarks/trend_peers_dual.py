"""Peers that solve the dual, a quadratic program with bounds."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import sparse
from trend_problems import TrendProblem
from trend_solver import LARGEST_FACTORED, Answer, powers


def _dual_answer(problem: TrendProblem, u: np.ndarray) -> Answer:
    """The fit `y - Δᵀ u` of a dual point."""
    u = np.clip(u, -problem.weight, problem.weight)
    return Answer(problem.y - problem.matrix.T @ u, problem.lower_bound(u))


def _program(problem: TrendProblem) -> tuple[Any, np.ndarray, Any, np.ndarray | None]:
    """Hessian, linear term, equations and their right-hand side; the first variables are u.

    Minimise 1/2 ||r||² over r = y - Δᵀ u, |u| <= weight. Each order uses the form that was fastest on planar graphs:
    with r as a variable at order 0, without it at order 1, and at order 2 also with `q = Dᵀ u`, so that no product of
    differences is formed.
    """
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


@dataclasses.dataclass(frozen=True)
class Factoring:
    """What the solvers that factor a sparse matrix have in common."""

    compiles: bool = False
    kinds: tuple[bool, ...] = (False,)

    def can(self, problem: TrendProblem) -> bool:
        """Whether its factors fit in memory."""
        return problem.y.size <= LARGEST_FACTORED

    def ladder(self, problem: TrendProblem) -> Sequence[float]:
        """Relative and absolute tolerance; a step of an interior point method gains about one digit."""
        del problem
        return powers(0, -9)


@dataclasses.dataclass(frozen=True)
class Piqp(Factoring):
    """Interior point, on the dual. The rung is its tolerance."""

    name: str = "PIQP"
    package: str = "piqp"
    module: str = "piqp"

    def solve(self, problem: TrendProblem, rung: float) -> Callable[[], Answer]:
        """Set-up, with ordering and factorisation, is part of the call."""
        import piqp

        hessian, linear, equations, right = _program(problem)
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
class Clarabel(Factoring):
    """Interior point for conic programs, on the same dual. The rung is its tolerance."""

    name: str = "Clarabel"
    package: str = "clarabel"
    module: str = "clarabel"

    def solve(self, problem: TrendProblem, rung: float) -> Callable[[], Answer]:
        """Set-up, with ordering and factorisation, is part of the call."""
        import clarabel

        hessian, linear, equations, right = _program(problem)
        rows, upper = problem.matrix.shape[0], sparse.triu(hessian, format="csc")
        bounded = sparse.eye_array(rows, linear.size)
        blocks = [bounded, -bounded] if equations is None else [equations, bounded, -bounded]
        constraints = sparse.csc_matrix(sparse.vstack(blocks))
        limits = np.r_[() if right is None else right, np.full(2 * rows, problem.weight)]
        cones = [clarabel.ZeroConeT(limits.size - 2 * rows), clarabel.NonnegativeConeT(2 * rows)]

        def call() -> Answer:
            settings = clarabel.DefaultSettings()
            settings.verbose = False
            settings.max_threads = 1
            settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = rung
            found = clarabel.DefaultSolver(upper, linear, constraints, limits, cones, settings).solve()
            answer = _dual_answer(problem, np.asarray(found.x)[:rows])
            return dataclasses.replace(answer, details={"steps": int(found.iterations)})

        return call


@dataclasses.dataclass(frozen=True)
class Osqp(Factoring):
    """Operator splitting for quadratic programs, on the same dual. The rung is its tolerance."""

    name: str = "OSQP"
    package: str = "osqp"
    module: str = "osqp"

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
