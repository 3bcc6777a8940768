"""Solvers of the trend-filter problem with one interface: sparseopt and public ones.

Not included: cvxpy, which would call OSQP; exact maximum flow by PyMaxflow, which is GPL (cut pursuit represents graph
cuts).
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from trend_peers_dual import Clarabel, Osqp, Piqp
from trend_peers_fused import CutPursuit, FastProx, ProxTv, Pygfl
from trend_peers_isotropic import Pyunlocbox, ScikitImage
from trend_problems import TrendProblem
from trend_solver import LARGEST_FACTORED, Answer, Solver, powers


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
        found = so.trend_filter(
            problem.y, graph, penalty, problem.order, self.method, tol=tol, max_steps=steps, dtype=self.dtype
        )
        fit, gap = np.asarray(found.value), float(found.gap)
        lower = float(found.objective) / (1 + gap) if self.dtype is None and np.isfinite(gap) else None
        return Answer(fit, lower, {"steps": int(found.steps), "gap": gap})


OURS: tuple[Solver, ...] = (
    *(Sparseopt(method) for method in ("auto", "doge", "admm", "fast_admm", "interior")),
    Sparseopt("auto", "float32"),
)
PEERS: tuple[Solver, ...] = (
    FastProx(),
    *(ProxTv(method, 2) for method in ("dr", "pd", "yang", "kolmogorov", "condat")),
    *(ProxTv(method, 1) for method in ("hybridtautstring", "dp")),
    *(ScikitImage(method) for method in ("Chambolle", "split Bregman")),
    Pyunlocbox(),
    CutPursuit(),
    Pygfl(),
    Piqp(),
    Clarabel(),
    Osqp(),
)
SOLVERS: dict[str, Solver] = {solver.name: solver for solver in itertools.chain(OURS, PEERS)}


def able(solver: Solver, problem: TrendProblem) -> bool:
    """Whether a solver takes a problem."""
    return problem.isotropic in solver.kinds and solver.can(problem)
