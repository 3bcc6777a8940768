"""L1 of a product of sparse matrices, with an interior point method on the dual, on the host.

    minimise over x    1/2 sum_j w_j (x_j - y_j)²  +  sum_r c_r |(Δ x)_r|,        Δ = F_1 ... F_m

Its dual, with q = Δᵀ u:

    minimise over u    sum_j ( q_j² / (2 w_j) - y_j q_j )    subject to    |u_r| <= c_r,    q_j = 0 where w_j = 0

The solver is PIQP, the extra `interior`; this form of the problem was the fastest for it.

Source: Schwan, Jiang, Kuhn, Jones, "PIQP: a proximal interior-point quadratic programming solver", CDC 2023.
"""

import importlib.util
from typing import Any

import numpy as np
from scipy import sparse

# The tolerances of PIQP: a fraction of the gap, and for the residuals this multiple of the worst case, in which all of
# them add up.
GAP_SHARE, SCATTER = 0.5, 100.0
# No problem took half as many steps, except when rounding forbids the tolerance: for a weight so large that q is a
# difference of much larger numbers.
MOST_STEPS = 50


def is_available() -> bool:
    """Whether PIQP is installed."""
    return importlib.util.find_spec("piqp") is not None


class DualProgram:
    """The dual as a quadratic program in u / weight and, for several factors, the partial products p on the way to q.

    With Δᵀ = F_mᵀ ... F_1ᵀ and p_i = F_iᵀ p_(i-1), p_0 = u, the Hessian is `F_m W^-1 F_mᵀ` on the last p. Without
    products of factors the matrices stay sparse. The node weights w are 0 where missing; some row weight c is not 0.
    """

    def __init__(
        self, factors: list[sparse.csr_array], node_weights: np.ndarray | None, row_weights: np.ndarray
    ) -> None:
        *factors, last = factors
        self.kept = row_weights > 0
        self.box = row_weights[self.kept] / row_weights[self.kept].mean()
        weights = np.ones(last.shape[1]) if node_weights is None else node_weights.astype(np.float64)
        self.seen = weights > 0
        self.weights = np.where(self.seen, weights, 1)
        if factors:
            factors = [factors[0][self.kept], *factors[1:]]
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
        """The definitions of p, and q = 0 at missing nodes; None if there are none."""
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
        """Fit `[n]`, dual `[rows]`, steps, and whether the method converged to the relative gap `tol`.

        `weight` is the mean of the positive row weights, `scale` an estimate of the objective.
        """
        u = np.zeros(self.kept.size)
        pull = self.last @ np.where(self.seen, y, 0) / weight
        if not pull.any():
            return y, u, 0, True
        solver = self._set_up(np.r_[np.zeros(self.before), -pull])
        settings = solver.settings
        # Its objective is minus ours over weight², so its gap is ours up to the residuals, which partly cancel. Its own
        # relative measures compare with other sizes.
        settings.eps_rel = settings.eps_duality_gap_rel = np.finfo(float).tiny
        settings.eps_duality_gap_abs = GAP_SHARE * tol * scale / weight**2
        settings.eps_abs = SCATTER * tol * scale / (weight**2 * u.size)
        settings.max_iter = min(max_steps, MOST_STEPS)
        solver.solve()
        result = solver.result
        u[self.kept] = weight * np.clip(result.x[: self.box.size], -self.box, self.box)
        fit = y - self._pull(u[self.kept]) / self.weights
        if not self.seen.all():
            fit[~self.seen] = -weight * result.y[-np.count_nonzero(~self.seen) :]
        return fit, u, int(result.info.iter), result.info.status.name == "PIQP_SOLVED"

    def lower_bound(self, y: np.ndarray, weight: float) -> float:
        """The best dual objective along the differences of y, an estimate of the objective."""
        rows = self._differences(np.where(self.seen, y, 0))
        pull = self._pull(rows)
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

    def _pull(self, u: np.ndarray) -> np.ndarray:
        for factor in (*self.factors, self.last):
            u = factor.T @ u
        return u

    def _set_up(self, linear: np.ndarray) -> Any:
        if self.solver is not None:
            self.solver.update(c=linear)
            return self.solver
        import piqp

        bound = np.full(linear.size, np.inf)
        bound[: self.box.size] = self.box
        right = None if self.equations is None else np.zeros(self.equations.shape[0])
        self.solver = piqp.SparseSolver()
        self.solver.settings.preconditioner_iter = 0  # the problem is scaled; equilibration costs time and saves none
        self.solver.setup(self.hessian, linear, self.equations, right, x_l=-bound, x_u=bound)
        return self.solver
