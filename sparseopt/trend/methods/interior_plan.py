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
from scipy import sparse

from sparseopt.core.base.compile import Jitted
from sparseopt.core.operators.divided_differences import divided_difference
from sparseopt.core.operators.row_tables import difference_matrix, edge_rows
from sparseopt.core.penalties.entries import L1
from sparseopt.core.problem.problem import Solution, Status
from sparseopt.core.solvers.interior import MOST_STEPS, DualProgram, is_available
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.ground import Data, Ground, on_rows, prepare
from sparseopt.trend.base.job import Job
from sparseopt.trend.base.method import Method
from sparseopt.trend.base.pieces import TrendSolution
from sparseopt.trend.methods.plan import finish

# Up to this many edges per node the Hessian is D Dᵀ at order 0.
EDGES_A_NODE = 2
# If the certified gap is still too large, the tolerance is cut by this factor and the solve repeated, this many times.
CUT, ATTEMPTS = 0.03, 3
# A graph is narrow if no layer of a breadth-first search has more than this multiple of sqrt(nodes). Planar graphs
# have layers of one or two, random graphs of sqrt(nodes) / 3.
WIDEST_LAYER = 8.0


class InteriorPlan:
    """The interior point method on one job with a signal and the penalty `L1`; the job's dtype must be enabled.

    Later fits, as on a path, reuse the ordering of the factors. Needs PIQP, else an ImportError.
    """

    def __init__(self, job: Job) -> None:
        if not is_available():
            raise ImportError('method="interior" needs PIQP: pip install "sparseopt[interior]"')
        self.job = job
        self.columns = job.signal.columns
        # The program is scaled for times of step 1.
        self.unit = job.graph.unit(job.order + 1)
        self.program = DualProgram(_factors(job.graph, job.order), job.signal.weights, self._row_weights(job.penalty))

    @functools.cached_property
    def data(self) -> Data:
        return prepare(self.job.ground, *self.job.arrays)

    @functools.cached_property
    def means(self) -> np.ndarray:
        """The component means, or with free ends the polynomial: what no row sees."""
        return np.asarray(self.data.means, np.float64).reshape(self.columns.shape)

    def null_fit(self, penalty: L1, dual: Any) -> TrendSolution:
        """The component means, certified by a dual point on the rows."""
        return self._certify(penalty, self.means, jnp.asarray(dual, self.job.dtype), 0, True)

    def fit_job(self, job: Job) -> TrendSolution:
        return self.fit(job.penalty)

    def fit(self, penalty: L1) -> TrendSolution:
        """The fit for the job's penalty or a multiple, to the job's gap, in the layout of the nodes."""
        weights, tol, max_steps = self._row_weights(penalty), self.job.tol, self.job.max_steps
        weight = float(weights[weights > 0].mean())
        centred = (self.columns - self.means).T
        scales = [self.program.lower_bound(column, weight) for column in centred]
        for attempt in range(ATTEMPTS):
            pairs, wanted = zip(centred, scales, strict=True), CUT**attempt * tol
            answers = [self.program.solve(column, weight, wanted, scale, max_steps) for column, scale in pairs]
            fit, dual = (np.stack([answer[i] for answer in answers], axis=1) for i in (0, 1))
            steps, ended = sum(answer[2] for answer in answers), all(answer[3] for answer in answers)
            rows = dual.reshape(-1, *self.job.channels) / self.unit
            rows = self.job.layout.grid_rows(rows, self.job.order + 1)
            found = self._certify(penalty, fit + self.means, jnp.asarray(rows, self.job.dtype), steps, ended)
            if not ended or float(found.gap) <= tol:
                break
        if not ended and max_steps > MOST_STEPS and not float(found.gap) <= tol:
            found = dataclasses.replace(found, status=jnp.asarray(Status.PRECISION, jnp.int32))
        return found

    def _row_weights(self, penalty: L1) -> np.ndarray:
        """The weights `[rows]` in the program's unit, in the order of `graph.row_edges` or of the nodes."""
        job, weight = self.job, self.unit * np.asarray(penalty.weight, np.float64)
        if weight.ndim == 0:
            return np.full(job.layout.count(job.order + 1), weight)
        rows = job.layout.rows(weight, job.order + 1)
        shape = None if job.graph.free or job.order % 2 else job.graph.shape
        return rows.reshape(-1) if shape is None else edge_rows(rows, shape)

    def _certify(self, penalty: L1, fit: np.ndarray, dual: Any, steps: int, ended: bool) -> TrendSolution:
        job = self.job
        terms = on_rows({job.order: penalty}, job.layout, job.dtype, bool(job.channels))
        value = job.layout.put(job.layout.rows(fit.reshape(-1, *job.channels), 0))
        status = Status.CONVERGED if ended else Status.MAX_STEPS
        end = jnp.asarray(status, jnp.int32), jnp.asarray(steps, jnp.int32)
        return _judge(job.ground, self.data, terms, value, dual, end, job.tol)


@Jitted
def _judge(
    ground: Ground, data: Data, penalty: Any, fit: Any, dual: Any, end: tuple[Any, Any], tol: Any
) -> TrendSolution:
    kind = data.shift.dtype
    unknown = jnp.full((), jnp.nan, kind)
    value = (fit - data.shift).astype(kind)
    found = Solution(value, *end, unknown, unknown, unknown, dual=dual)
    return finish(ground, data, penalty, found, dual, jnp.asarray(tol, kind))


def _factors(graph: Graph, order: int) -> list[sparse.csr_array]:
    """Sparse matrices whose product, the last factor applied first, is Δ^(k+1), with rows as in `graph.base`."""

    def difference(factors: int) -> sparse.csr_array:
        return difference_matrix(graph.row_edges, graph.num_nodes, graph.weights, factors)

    if graph.free and not graph.is_chain:
        # The rows of a node along all axes couple many rows: D Dᵀ has more fill than the last factor, the identity.
        rows = sparse.csr_array(graph.matrix(order + 1) / graph.unit(order + 1))
        return [rows, sparse.csr_array(sparse.eye_array(graph.num_nodes))]
    if graph.free:
        times = None if graph.times is None else graph.times / graph.step
        steps = divided_difference(times, graph.num_nodes, order + 1, np.float64).steps()
        pairs = [sparse.csr_array(second @ first) for first, second in zip(steps[::2], steps[1::2], strict=False)]
        return steps[2 * len(pairs) :] + pairs[::-1]
    if order == 0:
        # D Dᵀ couples all edges of a node, which is expensive if there are many: then the last factor is the identity.
        apart = graph.num_edges > EDGES_A_NODE * graph.num_nodes
        return [difference(1), difference(0)] if apart else [difference(1)]
    return [difference(1)] * (order % 2 == 0) + [difference(2)] * ((order + 1) // 2)


@dataclasses.dataclass(frozen=True)
class Interior(Method):
    """The interior point method for L1, on the host; needs the extra `interior`."""

    name = "interior"
    single = on_host = True

    def refuses(self, job: Job) -> str | None:
        if reason := super().refuses(job):
            return reason
        if job.start is not None or job.history:
            return f'method="{self.name}" accepts no start and keeps no history; use "doge" or "admm"'
        if job.signal is None:
            return (
                f'method="{self.name}" works on the host, where nothing is traced: use another for a solver that runs '
                "under jit, vmap and grad, or sparseopt.trend_filter"
            )
        if not job.is_l1:
            return f'method="{self.name}" solves the L1 penalty, given {job.penalty}; use "doge" or "admm"'
        return None

    def plan(self, job: Job) -> InteriorPlan:
        return InteriorPlan(job)


def is_narrow(graph: Graph) -> bool:
    """Whether factors on the graph stay sparse, judged by the layers of a breadth-first search."""

    def build() -> bool:
        from scipy.sparse import csgraph

        # The largest component, searched from an end of it.
        inside = np.flatnonzero(graph.components == np.argmax(np.bincount(graph.components)))
        start = inside[0]
        for _ in range(2):
            distance = csgraph.dijkstra(graph.adjacency, directed=False, indices=start, unweighted=True)[inside]
            start = inside[np.argmax(distance)]
        widest = np.max(np.bincount(distance.astype(np.int64)))
        return bool(widest <= WIDEST_LAYER * np.sqrt(graph.num_nodes))

    return graph.cache("narrow", build)
