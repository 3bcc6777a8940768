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

import dataclasses
import importlib.util
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import sparse

from sparseopt.core.grouping import difference_matrix, edge_grid, grid_edges
from sparseopt.core.penalties import L1
from sparseopt.core.problem import Problem, Solution, Status
from sparseopt.core.types import pytree
from sparseopt.trend.freedom import edge_rows
from sparseopt.trend.graph import Graph
from sparseopt.trend.inputs import Signal
from sparseopt.trend.preparation import SetUp, finished

# Up to so many edges a node the Hessian is D Dᵀ at order 0.
EDGES_A_NODE = 2
# What PIQP is asked for: a share of the gap, and residuals of this multiple of what would do if all pulled one way.
GAP_SHARE, SCATTER = 0.5, 100.0
# Where the certified gap is too large even so, the tolerance is cut by this factor and the solve repeated, so often.
CUT, ATTEMPTS = 0.03, 3
# No problem was seen to take half as many steps, unless rounding forbids the tolerance: where the weight is so large
# that q is a difference of much larger numbers.
MOST_STEPS = 50


@pytree
class InteriorState:
    """What a solve ends with: the dual in the layout of the rows, as a start for other methods."""

    candidate: Any
    rho: Any = None


def is_available() -> bool:
    """Whether PIQP is installed."""
    return importlib.util.find_spec("piqp") is not None


class Interior:
    """The interior point method on one signal; call it where the signal's precision is enabled.

    Fits after the first one, as on a path, reuse the ordering of the factors.

    Args:
        signal: checked.
        graph: with an edge.
        order: k.
        base: of the signal.
        penalty: `L1`, its row weights, if it has them, in the layout of the rows. Fits may scale it.

    Raises:
        ImportError: without PIQP.
        ValueError: for another penalty.
    """

    def __init__(self, signal: Signal, graph: Graph, order: int, base: SetUp, penalty: Any) -> None:
        if not isinstance(penalty, L1):
            raise ValueError(f'method="interior" solves the L1 penalty, given {penalty}; use "doge" or "admm"')
        if not is_available():
            raise ImportError('method="interior" needs PIQP: pip install "sparseopt[interior]"')
        self.signal, self.graph, self.order, self.base = signal, graph, order, base
        self.columns = signal.values.reshape(graph.num_nodes, -1).astype(np.float64)
        self.program = _Program(graph, order, signal.weights, _row_weights(penalty, graph, order))

    def null_fit(self, penalty: L1, dual: np.ndarray, tol: float) -> Solution:
        """The component means, certified by a dual point."""
        base = self.base
        rows = jnp.asarray(dual.reshape(base.full.split.row_shape(base.centred.center)), self.signal.values.dtype)
        return self._certified(penalty, base.means, rows, 0, True, tol)

    def fit(self, penalty: L1, tol: float, max_steps: int) -> Solution:
        """The fit to a relative duality gap of tol, its value in the layout of the nodes.

        Args:
            penalty: that of the start, or a multiple.
            tol: of the gap.
            max_steps: for each channel.
        """
        weights = _row_weights(penalty, self.graph, self.order)
        weight = float(weights[weights > 0].mean())
        means = self.columns.mean(axis=0)
        centred = (self.columns - means).T
        scales = [self.program.lower_bound(column, weight) for column in centred]
        attempt, share, going = 0, 1.0, True
        while going:
            pairs = zip(centred, scales, strict=True)
            answers = [self.program.solve(column, weight, share * tol, scale, max_steps) for column, scale in pairs]
            fit, dual = (np.stack([answer[i] for answer in answers], axis=1) for i in (0, 1))
            steps, ended = sum(answer[2] for answer in answers), all(answer[3] for answer in answers)
            rows = _laid_out(dual, self.graph, self.order, self.signal.values.shape[1:], self.signal.values.dtype)
            found = self._certified(penalty, fit + means, rows, steps, ended, tol)
            attempt, share = attempt + 1, share * CUT
            going = ended and attempt < ATTEMPTS and not float(found.gap) <= tol
        if not ended and max_steps > MOST_STEPS and not float(found.gap) <= tol:
            found = dataclasses.replace(found, status=jnp.asarray(Status.PRECISION, jnp.int32))
        return found

    def _certified(self, penalty: L1, fit: np.ndarray, dual: Any, steps: int, ended: bool, tol: float) -> Solution:
        """The solution that a fit on the host and a dual in the layout of the rows make, judged like every other."""
        base, kind = self.base, self.signal.values.dtype
        unknown = jnp.full((), jnp.nan, kind)
        found = Solution(
            value=base.laid_out(fit - base.shift),
            status=jnp.asarray(Status.CONVERGED if ended else Status.MAX_STEPS, jnp.int32),
            steps=jnp.asarray(steps, jnp.int32),
            residual=unknown,
            objective=unknown,
            gap=unknown,
            history=None,
            state=InteriorState(dual),
        )
        problem = Problem(base.loss, penalty, base.full.split)
        shift, level = jnp.asarray(base.shift, kind), jnp.asarray(tol, kind)
        done = finished(problem, found, shift, base.laid_out(base.means), level)
        return dataclasses.replace(found, **done._asdict())


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
    """The dual as a quadratic program in u / weight and, from order 2, the partial products p on the way to q.

    With Δ^(k+1)ᵀ = Bᵀ F_sᵀ ... F_1ᵀ and p_i = F_iᵀ p_(i-1), p_0 = u, the Hessian is `B W^-1 Bᵀ` on the last p. No
    product wider than L² is formed, which keeps the factors sparse.
    """

    def __init__(self, graph: Graph, order: int, node_weights: np.ndarray | None, row_weights: np.ndarray) -> None:
        def difference(factors: int) -> sparse.csr_array:
            return difference_matrix(_edges(graph), graph.num_nodes, graph.weights, factors)

        self.kept = row_weights > 0
        self.box = row_weights[self.kept] / row_weights[self.kept].mean()
        weights = np.ones(graph.num_nodes) if node_weights is None else node_weights.astype(np.float64)
        self.seen = weights > 0
        self.weights = np.where(self.seen, weights, 1)
        if order == 0:
            # D Dᵀ joins all edges of a node: dear where there are many.
            apart = graph.num_edges > EDGES_A_NODE * graph.num_nodes
            factors, last = [difference(1)] * apart, difference(0 if apart else 1)
        else:
            last = difference(2)
            factors = [difference(1)] * (order % 2 == 0) + [last] * ((order + 1) // 2 - 1)
        if factors:
            factors[0] = factors[0][self.kept]
        else:
            last = last[self.kept]
        self.last, self.factors = last, factors
        sizes = [factor.shape[0] for factor in factors] + [last.shape[0]]
        self.before = sum(sizes[:-1])  # variables before the last block
        curved = last @ sparse.diags_array(np.where(self.seen, 1 / self.weights, 0)) @ last.T
        if self.before:
            curved = sparse.block_diag([sparse.csc_array((self.before,) * 2), curved])
        self.hessian = sparse.csc_matrix(curved)
        self.equations = self._equations(sizes)
        self.solver: Any = None

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

    def solve(
        self, y: np.ndarray, weight: float, tol: float, scale: float, max_steps: int
    ) -> tuple[np.ndarray, np.ndarray, int, bool]:
        """Fit `[n]`, dual `[rows]`, steps, and whether the method came to its end.

        Args:
            y: the signal; what it holds at missing nodes does not matter.
            weight: the mean of the positive row weights.
            tol: the relative gap.
            scale: a guess of the objective.
            max_steps: limit.
        """
        u = np.zeros(self.kept.size)
        pull = self.last @ np.where(self.seen, y, 0) / weight
        if not pull.any():
            return y, u, 0, True
        solver = self._set_up(np.r_[np.zeros(self.before), -pull])
        settings = solver.settings
        # Its objective is minus the dual one over weight², so its gap is ours but for the residuals, which count less
        # the more they scatter. Its own relative measures compare with other sizes.
        settings.eps_rel = settings.eps_duality_gap_rel = np.finfo(float).tiny
        settings.eps_duality_gap_abs = GAP_SHARE * tol * scale / weight**2
        settings.eps_abs = SCATTER * tol * scale / (weight**2 * u.size)
        settings.max_iter = min(max_steps, MOST_STEPS)
        solver.solve()
        result = solver.result
        u[self.kept] = weight * np.clip(result.x[: self.box.size], -self.box, self.box)
        fit = y - self._pulled(u[self.kept]) / self.weights
        if not self.seen.all():
            fit[~self.seen] = -weight * result.y[-np.count_nonzero(~self.seen) :]
        return fit, u, int(result.info.iter), result.info.status.name == "PIQP_SOLVED"

    def lower_bound(self, y: np.ndarray, weight: float) -> float:
        """The dual objective on the line through the differences of y, which tells the size of the objective."""
        rows = self._differences(np.where(self.seen, y, 0))
        pull = self._pulled(rows)
        along, curve = float(rows @ rows), float(np.sum(np.where(self.seen, pull**2 / self.weights, 0)))
        largest = np.abs(rows / self.box).max(initial=0)
        if not (self.seen.all() and along > 0):
            return float(np.sum(self.weights * np.where(self.seen, y, 0) ** 2)) / 2
        step = min(along / curve, weight / largest)
        return step * along - step**2 * curve / 2

    def _differences(self, x: np.ndarray) -> np.ndarray:
        """The kept rows of `Δ^(k+1) x`."""
        for factor in (self.last, *reversed(self.factors)):
            x = factor @ x
        return x

    def _pulled(self, u: np.ndarray) -> np.ndarray:
        """Their transpose."""
        for factor in (*self.factors, self.last):
            u = factor.T @ u
        return u

    def _set_up(self, linear: np.ndarray) -> Any:
        """The solver with this linear term."""
        if self.solver is not None:
            self.solver.update(c=linear)
            return self.solver
        import piqp

        bound = np.full(linear.size, np.inf)
        bound[: self.box.size] = self.box
        right = None if self.equations is None else np.zeros(self.equations.shape[0])
        self.solver = piqp.SparseSolver()
        self.solver.settings.preconditioner_iter = 0  # the problem is scaled; equilibration takes time and gains none
        self.solver.setup(self.hessian, linear, self.equations, right, x_l=-bound, x_u=bound)
        return self.solver
