"""Floor 5: the L1 trend filter by an interior point method, on graphs that small separators cut in two: roads, maps.

The dual problem, with q = Δ^(k+1)ᵀ u and weights c, one a row:

    minimise over u    sum_j ( q_j² / (2 w_j) - y_j q_j )    so that    |u_r| <= c_r,    q_j = 0 where w_j = 0

Each of its ten to twenty steps factorises a sparse matrix, so the conditioning of Δ, which makes first-order methods
slow at orders >= 1, costs nothing. Fill does: little on planar and other narrow graphs, ruin on dense ones. The solver
is PIQP, the extra `interior`; the forms of the problem below are the quickest for it that we found. It works on the
host, in float64; the fit is then certified like every other.

Source: Kim, Koh, Boyd, Gorinevsky, "l1 trend filtering", SIAM Review 51 (2009); Schwan, Jiang, Kuhn, Jones, "PIQP: a
proximal interior-point quadratic programming solver", CDC 2023.
"""

import importlib.util
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from sparseopt.core.grouping import difference_matrix, edge_grid, grid_edges
from sparseopt.core.penalties import L1
from sparseopt.core.solve import Problem, Solution, Status
from sparseopt.core.types import pytree
from sparseopt.trend.freedom import edge_rows
from sparseopt.trend.graph import Graph
from sparseopt.trend.inputs import Signal
from sparseopt.trend.preparation import SetUp, finished

# A graph is narrow if no layer of a breadth-first search has more than this multiple of sqrt(nodes). Planar graphs
# have layers of one or two, random graphs of sqrt(nodes) / 3.
WIDEST_LAYER = 8.0
# The solver's own tolerance for a gap of tol; where that does not do, it is cut by this factor, so many times.
OWN_TOLERANCE = 1.0
CUT, ATTEMPTS = 0.03, 3


@pytree
class InteriorState:
    """What a solve ends with: the dual in the layout of the rows, as a start for other methods."""

    candidate: Any
    rho: Any = None


def is_available() -> bool:
    """Whether PIQP is installed."""
    return importlib.util.find_spec("piqp") is not None


def is_narrow(graph: Graph) -> bool:
    """Whether factors on the graph stay sparse, told from the layers of a breadth-first search."""

    def build() -> bool:
        ones = np.ones(graph.num_edges, np.int8)
        adjacency = sparse.csr_array((ones, graph.edges.T), shape=(graph.num_nodes,) * 2)
        # The largest component, searched from an end of it.
        inside = np.flatnonzero(graph.components == np.argmax(np.bincount(graph.components)))
        start = inside[0]
        for _ in range(2):
            distance = csgraph.dijkstra(adjacency, directed=False, indices=start, unweighted=True)[inside]
            start = inside[np.argmax(distance)]
        widest = np.bincount(distance.astype(np.int64)).max()
        return bool(widest <= WIDEST_LAYER * np.sqrt(graph.num_nodes))

    return graph.cached("narrow", build)


def fit_interior(
    signal: Signal, graph: Graph, penalty: Any, order: int, base: SetUp, tol: float, max_steps: int
) -> Solution:
    """The fit of a checked signal; call it where the signal's precision is enabled.

    Args:
        signal: checked.
        graph: with an edge.
        penalty: `L1`, its row weights in the layout of the rows.
        order: k.
        base: of the signal.
        tol: the relative duality gap.
        max_steps: of the interior point method, for each channel.

    Raises:
        ImportError: without PIQP.
        ValueError: for another penalty.
    """
    if not isinstance(penalty, L1):
        raise ValueError(f'method="interior" solves the L1 penalty, given {penalty}; use "doge" or "admm"')
    if not is_available():
        raise ImportError('method="interior" needs PIQP: pip install "sparseopt[interior]"')
    kind = signal.values.dtype
    program = _Program(graph, order, signal.weights, _row_weights(penalty, graph, order))
    columns = signal.values.reshape(graph.num_nodes, -1).astype(np.float64)
    share, level = OWN_TOLERANCE, jnp.asarray(tol, kind)
    problem = Problem(base.loss, penalty, base.full.split)
    for attempt in range(ATTEMPTS):
        answers = [program.solve(column - column.mean(), share * tol, max_steps) for column in columns.T]
        fit, dual = (np.stack([answer[i] for answer in answers], axis=1) for i in (0, 1))
        steps, ended = sum(answer[2] for answer in answers), all(answer[3] for answer in answers)
        centred = base.laid_out(fit + columns.mean(axis=0) - base.shift)
        found = _found(centred, _laid_out(dual, graph, order, signal.values.shape[1:], kind), steps, ended)
        shift, means = jnp.asarray(base.shift, kind), base.laid_out(base.means)
        done = finished(problem, found, shift, means, level)
        if float(done.gap) <= tol or attempt + 1 == ATTEMPTS or not ended:
            break
        share *= CUT
    return Solution(
        **done._replace(value=done.value.reshape(signal.shape))._asdict(),
        steps=found.steps,
        history=None,
        state=found.state,
    )


def _found(value: Any, dual: Any, steps: int, ended: bool) -> Solution:
    status = jnp.asarray(Status.CONVERGED if ended else Status.MAX_STEPS, jnp.int32)
    unknown = jnp.full((), jnp.nan, value.dtype)
    return Solution(value, status, jnp.asarray(steps, jnp.int32), unknown, unknown, unknown, None, InteriorState(dual))


def _row_weights(penalty: L1, graph: Graph, order: int) -> np.ndarray:
    """The weights `[rows]`, as `_edges` numbers them."""
    weight = np.asarray(penalty.weight, np.float64)
    rows = graph.num_nodes if order % 2 else graph.num_edges
    if weight.ndim == 0:
        return np.full(rows, weight)
    if graph.shape is not None and order % 2 == 0:
        weight = edge_rows(weight, graph.shape)
    return weight.reshape(rows)


def _laid_out(dual: np.ndarray, graph: Graph, order: int, channels: tuple[int, ...], kind: np.dtype) -> Any:
    """The dual `[rows, channels]` in the layout of the rows."""
    if graph.shape is not None:
        parts = [
            edge_grid(column, graph.shape, 0.0) if order % 2 == 0 else column.reshape(graph.shape) for column in dual.T
        ]
        dual = np.stack(parts, axis=-1)
    return jnp.asarray(dual if channels else dual[..., 0], kind)


def _edges(graph: Graph) -> np.ndarray:
    """The edges as the rows of `graph.base` follow them."""
    return graph.edges if graph.shape is None else grid_edges(graph.shape)


class _Program:
    """The dual as a quadratic program in u / level and, from order 2, the partial products p on the way to q.

    With Δ^(k+1)ᵀ = Bᵀ F_sᵀ ... F_1ᵀ and p_i = F_iᵀ p_(i-1), p_0 = u, the Hessian is `B W^-1 Bᵀ` on the last p. No
    product wider than L² is formed, which keeps the factors sparse.
    """

    def __init__(self, graph: Graph, order: int, node_weights: np.ndarray | None, row_weights: np.ndarray) -> None:
        def difference(factors: int) -> sparse.csr_array:
            return difference_matrix(_edges(graph), graph.num_nodes, graph.weights, factors)

        self.kept = row_weights > 0
        self.level = float(row_weights[self.kept].mean())
        self.box = row_weights[self.kept] / self.level
        weights = np.ones(graph.num_nodes) if node_weights is None else node_weights.astype(np.float64)
        self.seen = weights > 0
        self.weights = np.where(self.seen, weights, 1)
        last = difference(1 if order == 0 else 2)
        factors = [difference(1)] if order >= 2 and order % 2 == 0 else []
        factors += [last] * ((order + 1) // 2 - 1)
        if factors:
            factors[0] = factors[0][self.kept]
        else:
            last = last[self.kept]
        self.last, self.factors = last, factors
        sizes = [factor.shape[0] for factor in factors] + [last.shape[0]]
        self.before = sum(sizes[:-1])  # variables before the last block
        curved = last @ sparse.diags_array(np.where(self.seen, 1 / self.weights, 0)) @ last.T
        self.hessian = sparse.csc_matrix(sparse.block_diag([sparse.csc_array((self.before,) * 2), curved]))
        self.equations = self._equations(sizes)

    def _equations(self, sizes: list[int]) -> Any:
        """The definitions of p, and q = 0 at missing nodes; None where there are none."""
        blocks: list[list[Any]] = []
        for index, factor in enumerate(self.factors):
            row: list[Any] = [sparse.csr_array((factor.shape[1], size)) for size in sizes]
            row[index], row[index + 1] = factor.T, -sparse.eye_array(factor.shape[1])
            blocks.append(row)
        if not self.seen.all():
            missing = self.last[:, ~self.seen].T
            blocks.append([*(sparse.csr_array((missing.shape[0], size)) for size in sizes[:-1]), missing])
        return sparse.csc_matrix(sparse.block_array(blocks)) if blocks else None

    def solve(self, y: np.ndarray, tol: float, max_steps: int) -> tuple[np.ndarray, np.ndarray, int, bool]:
        """Fit `[n]`, dual `[rows]`, steps, and whether the method came to its end.

        Args:
            y: the signal, 0 at missing nodes or not.
            tol: relative, of residuals and gap.
            max_steps: limit.
        """
        import piqp

        u = np.zeros(self.kept.size)
        pull = self.last @ np.where(self.seen, y, 0) / self.level
        if not pull.any():
            return y, u, 0, True
        bound = np.full(self.hessian.shape[0], np.inf)
        bound[: self.box.size] = self.box
        solver = piqp.SparseSolver()
        settings = solver.settings
        settings.eps_rel = settings.eps_duality_gap_rel = tol
        settings.eps_abs = settings.eps_duality_gap_abs = tol * float(np.abs(pull).mean())
        settings.preconditioner_iter = 0  # the problem is scaled; equilibration takes longer and gains nothing
        settings.max_iter = max_steps
        right = None if self.equations is None else np.zeros(self.equations.shape[0])
        linear = np.r_[np.zeros(self.before), -pull]
        solver.setup(self.hessian, linear, self.equations, right, x_l=-bound, x_u=bound)
        ended = solver.solve() == piqp.PIQP_SOLVED
        result = solver.result
        u[self.kept] = self.level * np.clip(result.x[: self.box.size], -self.box, self.box)
        q = u[self.kept]
        for factor in (*self.factors, self.last):
            q = factor.T @ q
        fit = y - q / self.weights
        if not self.seen.all():
            fit[~self.seen] = -self.level * result.y[-np.count_nonzero(~self.seen) :]
        return fit, u, int(result.info.iter), ended
