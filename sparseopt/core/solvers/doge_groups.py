"""Floor 4: Doge-ADMM as published: every group of rows stores its own copy and scaled dual.

    minimise over x    1/2 sum_j w_j (x_j - y_j)²  +  penalty(Ψ Δ x)

With z = Δ x, the groups Ψ_i of rows that share no column, and relaxation r, one iteration is

    alpha_i <- argmin 1/2 ||alpha_i - (z - theta_i)||² + penalty(Ψ_i alpha_i) / rho        # all rows at once
    x       <- (W + rho C ΔᵀΔ)^-1 ( W y + rho Δᵀ sum_i (theta_i + r alpha_i + (1 - r) z) )
    theta_i <- theta_i + r alpha_i + (1 - r) z - Δ x

C is the number of groups. `Admm` on a `doge_split` with this number makes the same iterates from one number for each
row and column: by induction `theta_i = d - Ψ_iᵀ g_i / rho` with one array d for all groups, since the first line moves
alpha_i along the rows of Ψ_i alone, by -1 / rho times the new dual of each row. Prefer `Admm`, which needs a fraction
of the memory and the time.

Source: Bu, Wu, Zuo, "Doge-ADMM: A Highly Scalable Parallel Algorithm for Trend Filtering on Graphs"; the relaxation is
that of Boyd, Parikh, Chu, Peleato, Eckstein, 2011, section 3.4.3.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy import sparse

from sparseopt.core.combined_penalties import by_group, lift
from sparseopt.core.grouping import RowTable, edge_places, row_table
from sparseopt.core.operators import Difference, GridBase
from sparseopt.core.penalties import Norm
from sparseopt.core.problem import Problem
from sparseopt.core.solvers.admm import Admm, AdmmState, Moving, Start
from sparseopt.core.types import pytree


class Copies(NamedTuple):
    """What the groups keep, each `[groups, *columns]` or `[groups, *columns, channels]`."""

    alpha: Any
    theta: Any  # scaled: rho theta_i is a dual


def doge_groups_table(outer: Difference, matrix: sparse.csr_array, labels: np.ndarray, dtype: Any) -> RowTable:
    """The `table` of `DogeGroups`.

    Args:
        outer: Ψ, for the layout of its rows and columns; its base holds nodes and edges of one device.
        matrix: Ψ; on a `GridBase` the edges are in the order of `grid_edges`.
        labels: the group of every row.
        dtype: of the coefficients.
    """

    def layout(shape: tuple[int, ...]) -> tuple[np.ndarray, int] | None:
        if isinstance(outer.base, GridBase) and shape == outer.base.edge_shape:
            return edge_places(outer.base.shape), math.prod(shape)
        return None

    return row_table(matrix, labels, dtype, rows=layout(outer.out_shape), columns=layout(outer.in_shape))


@pytree
class DogeGroups(Admm):
    """Doge-ADMM with its copies, as a solver for `solve`; `problem.operator` is a `doge_split` with the groups' number.

    Checks, residual, changes of rho and status are those of `Admm`, and so are all iterates on the same problem, up to
    rounding. There is no acceleration. A start with a dual g has `theta_i = -Ψ_iᵀ g_i / rho`.

    Attributes:
        table: the rows of Ψ by groups, from `doge_groups_table`.

    Example:
        >>> from sparseopt.core.fidelity import NodeSquares
        >>> from sparseopt.core.operators import Difference, GridBase
        >>> from sparseopt.core.solvers.admm import Start
        >>> from sparseopt.core.solvers.doge import doge_split
        >>> from sparseopt.core.solvers.doge_groups import DogeGroups, doge_groups_table
        >>> from sparseopt.core.solvers.node_solve import Diagonal
        >>> chain, base = so.Graph.chain(4), GridBase((4,))
        >>> split = doge_split(Difference(base, 1), Difference(base, 0), chain.sums(1), np.float32, groups=2)
        >>> table = doge_groups_table(split.outer, chain.matrix(1), chain.groups(1), np.float32)
        >>> y = jnp.array([0.0, 0.2, 3.0, 3.1])
        >>> problem = so.Problem(NodeSquares(y), so.L1(0.5), jax.tree.map(jnp.asarray, split))
        >>> start = Start(y, jnp.zeros((1, 4)))  # a dual for every edge, and an empty place at the end
        >>> so.solve(problem, DogeGroups(Diagonal(), 1.0, table=table), start).check().value.round(2)
        Array([0.35, 0.35, 2.8 , 2.8 ], dtype=float32)
    """

    table: Any = dataclasses.field(kw_only=True)

    def _accelerates(self, problem: Problem) -> bool:
        del problem
        return False

    def refuses(self, problem: Problem) -> str | None:
        if reason := super().refuses(problem):
            return reason
        split, table = problem.operator, self.table
        wanted = tuple(math.prod(shape) for shape in (split.outer.out_shape, split.outer.in_shape))
        if (table.num_rows, table.num_columns) != wanted:
            return (
                f"DogeGroups needs the table of the operator's outer map, of {wanted[0]} rows and {wanted[1]} columns, "
                f"given one of {table.num_rows} and {table.num_columns}; doge_groups_table makes it"
            )
        if jnp.ndim(split.column_scale) != 0:
            return (
                "DogeGroups needs a doge_split made with the number of groups, whose column_scale is one number, given "
                f"a column_scale of shape {jnp.shape(split.column_scale)}"
            )
        return None

    def init(self, problem: Problem, x0: Start | AdmmState) -> AdmmState:
        state = super().init(problem, x0)
        if isinstance(x0, AdmmState):
            return state
        z = state.x if state.inner is None else state.inner
        split, table = problem.operator, self.table
        channels = z.shape[len(split.outer.in_shape) :]
        of_rows = table.gathered(state.dual.reshape(-1, *channels))
        pulled = jax.vmap(lambda group, e: group.rmv(e))(table, of_rows)
        theta = -pulled.reshape(-1, *z.shape) / state.rho
        return dataclasses.replace(state, memory=Copies(jnp.broadcast_to(z, theta.shape), theta))

    def _advanced(self, problem: Problem, rho: Array, now: Moving) -> Moving:
        split, loss, penalty, table = problem.operator, problem.loss, problem.penalty, self.table
        keep = 1 - jnp.asarray(self.relaxation, now.x.dtype)
        z, theta = (now.x if now.inner is None else now.inner), now.memory.theta
        channels = z.shape[len(split.outer.in_shape) :]
        points = (z - theta).reshape(-1, table.num_columns, *channels)
        of_groups = by_group(penalty, table, split.outer.out_shape, len(channels))

        def moved(penalty: Any, group: Any, point: Array) -> Any:
            return lift(penalty, group).moved(point, 1 / rho)

        alpha, found, move = jax.vmap(moved)(of_groups, table, points)
        alpha = alpha.reshape(theta.shape)
        # The dual and Ψ z row by row, for the checks; the iteration does not read them.
        candidate = -rho * table.scattered(move).reshape(now.dual.shape)
        prox = now.prox
        if isinstance(penalty, Norm):
            candidate = penalty.project_dual(candidate)
        else:
            prox = table.scattered(found).reshape(now.dual.shape)
        dual = keep * now.dual + (1 - keep) * candidate

        relaxed = theta + (1 - keep) * alpha + keep * z
        pulled = rho * jnp.sum(relaxed, axis=0)
        x = self.node_solve.solve(loss, split, loss.weigh(loss.center) + split.inner.rmv(pulled), rho, now.x)
        inner = None if now.inner is None else split.inner.mv(x)
        theta = relaxed - (x if inner is None else inner)
        return Moving(x, inner, Copies(alpha, theta), dual, candidate, prox)

    def _checked(self, problem: Problem, state: AdmmState, before: Moving) -> AdmmState:
        """As `Admm`, with theta scaled for a new rho, so that `rho theta` stays."""
        after = super()._checked(problem, state, before)
        theta = after.memory.theta * (state.rho / after.rho)
        return dataclasses.replace(after, memory=after.memory._replace(theta=theta))
