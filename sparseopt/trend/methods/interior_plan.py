"""The L1 trend filter with an interior point method, for graphs with small separators, such as roads and maps.

Each of its ten to twenty steps factorises a sparse matrix, so it does not suffer from the conditioning of Δ, which
makes first-order methods slow at orders >= 1. The fill is small on planar and other narrow graphs but huge on dense
ones. It works on the host in float64; the fit is then certified like every other. See `core/solvers/interior.py`.

Source: Kim, Koh, Boyd, Gorinevsky, "l1 trend filtering", SIAM Review 51 (2009).
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.compile import Jitted
from sparseopt.core.penalties.entries import L1
from sparseopt.core.problem.problem import Solution, Status
from sparseopt.core.solvers.interior import MOST_STEPS, DualProgram, is_available
from sparseopt.trend.base.fit import Fit
from sparseopt.trend.base.geometry import Geometry
from sparseopt.trend.base.ground import Data, Ground
from sparseopt.trend.base.method import Method
from sparseopt.trend.base.penalties import on_rows
from sparseopt.trend.base.pieces import TrendSolution
from sparseopt.trend.methods.chain_plans import BandedPlan, banded_plan
from sparseopt.trend.methods.plan import finish

# If the certified gap is still too large, the tolerance is cut by this factor and the solve repeated, this many times.
CUT, ATTEMPTS = 0.03, 3
# A graph is narrow if no layer of a breadth-first search has more than this multiple of sqrt(nodes). Planar graphs
# have layers of one or two, random graphs of sqrt(nodes) / 3.
WIDEST_LAYER = 8.0


class InteriorPlan:
    """The interior point method on one request with a signal and the penalty `L1`; the request's dtype must be enabled.

    Later fits, as on a path, reuse the ordering of the factors. Needs PIQP, else an ImportError.
    """

    def __init__(self, asked: Fit) -> None:
        if not is_available():
            raise ImportError('method="interior" needs PIQP: pip install "sparseopt[interior]"')
        self.asked = asked
        self.columns = asked.columns
        # The program is scaled for times of step 1.
        self.unit = asked.geometry.unit(asked.order + 1)
        self.program = DualProgram(asked.geometry.factors(asked.order), asked.weights, self._row_weights(asked.penalty))

    @functools.cached_property
    def means(self) -> np.ndarray:
        """The component means, or with free ends the polynomial: what no row sees."""
        return np.asarray(self.asked.data.means, np.float64).reshape(self.columns.shape)

    def fit_asked(self, asked: Fit) -> TrendSolution:
        """The fit for the plan's own request, or one that differs in the weight; in the layout of the nodes."""
        penalty, tol, max_steps = asked.penalty, self.asked.tol, self.asked.max_steps
        weights = self._row_weights(penalty)
        weight = float(weights[weights > 0].mean())
        centred = (self.columns - self.means).T
        scales = [self.program.lower_bound(column, weight) for column in centred]
        for attempt in range(ATTEMPTS):
            pairs, wanted = zip(centred, scales, strict=True), CUT**attempt * tol
            answers = [self.program.solve(column, weight, wanted, scale, max_steps) for column, scale in pairs]
            fit, dual = (np.stack([answer[i] for answer in answers], axis=1) for i in (0, 1))
            steps, ended = sum(answer[2] for answer in answers), all(answer[3] for answer in answers)
            rows = dual.reshape(-1, *self.asked.channels) / self.unit
            rows = self.asked.geometry.rows(rows, self.asked.order + 1)
            found = self._certify(penalty, fit + self.means, jnp.asarray(rows, self.asked.dtype), steps, ended)
            if not ended or float(found.gap) <= tol:
                break
        if not ended and max_steps > MOST_STEPS and not float(found.gap) <= tol:
            found = dataclasses.replace(found, status=jnp.asarray(Status.PRECISION, jnp.int32))
        return found

    def _row_weights(self, penalty: L1) -> np.ndarray:
        """The weights `[rows]` in the program's unit, in the order of `graph.matrix(order + 1)`."""
        asked, weight = self.asked, self.unit * np.asarray(penalty.weight, np.float64)
        if weight.ndim == 0:
            return np.full(asked.geometry.count(asked.order + 1), weight)
        return weight

    def _certify(self, penalty: L1, fit: np.ndarray, dual: Any, steps: int, ended: bool) -> TrendSolution:
        asked = self.asked
        terms = on_rows({asked.order: penalty}, asked.geometry, asked.dtype, bool(asked.channels))
        value = asked.geometry.put(asked.geometry.rows(fit.reshape(-1, *asked.channels), 0))
        status = Status.CONVERGED if ended else Status.MAX_STEPS
        end = jnp.asarray(status, jnp.int32), jnp.asarray(steps, jnp.int32)
        return _judge(asked.ground, asked.data, terms, value, dual, end, asked.tol)


@Jitted
def _judge(
    ground: Ground, data: Data, penalty: Any, fit: Any, dual: Any, end: tuple[Any, Any], tol: Any
) -> TrendSolution:
    kind = data.shift.dtype
    unknown = jnp.full((), jnp.nan, kind)
    value = (fit - data.shift).astype(kind)
    found = Solution(value, *end, unknown, unknown, unknown, dual=dual)
    return finish(ground, data, penalty, found, dual, jnp.asarray(tol, kind))


@dataclasses.dataclass(frozen=True)
class Interior(Method):
    """The interior point method for L1: on chains with banded factors, else on the host with the extra `interior`."""

    name = "interior"
    single = cold = True

    def refuses(self, asked: Fit) -> str | None:
        if reason := super().refuses(asked):
            return reason
        if asked.history or (asked.start is not None and not asked.geometry.line):
            return f'method="{self.name}" accepts no start and keeps no history; use "doge" or "admm"'
        if asked.pure and not asked.geometry.line:
            return (
                f'method="{self.name}" works on the host, where nothing is traced, on graphs other than chains: use '
                "another for a solver that runs under jit, vmap and grad, or sparseopt.trend_filter"
            )
        if not asked.is_l1:
            return f'method="{self.name}" solves the L1 penalty, given {asked.penalty}; use "doge" or "admm"'
        return None

    def plan(self, asked: Fit) -> InteriorPlan | BandedPlan:
        return banded_plan(asked) if asked.geometry.line else InteriorPlan(asked)


def is_narrow(geometry: Geometry) -> bool:
    """Whether factors on the graph stay sparse, judged by the layers of a breadth-first search."""

    def build() -> bool:
        from scipy.sparse import csgraph

        # The largest component, searched from an end of it.
        inside = np.flatnonzero(geometry.components == np.argmax(np.bincount(geometry.components)))
        start = inside[0]
        for _ in range(2):
            distance = csgraph.dijkstra(geometry.adjacency, directed=False, indices=start, unweighted=True)[inside]
            start = inside[np.argmax(distance)]
        widest = np.max(np.bincount(distance.astype(np.int64)))
        return bool(widest <= WIDEST_LAYER * np.sqrt(geometry.num_nodes))

    return geometry.cache("narrow", build)
