"""Doge-ADMM, the split ADMM whose penalty step is closed form row by row, in parallel.

    minimise over x    1/2 sum_j w_j (x_j - y_j)²  +  penalty(Ψ Δ x)

The rows of Ψ are put into groups that share no column (`row_tables.py`), so every row is a separate problem. Group i
gets a copy `alpha_i` of the columns and a scaled dual `theta_i`. With z = Δ x, C the number of groups, relaxation r:

    alpha_i <- argmin 1/2 ||alpha_i - (z - theta_i)||² + penalty(Ψ_i alpha_i) / rho        # lift(penalty, groups)
    x       <- (W + rho C ΔᵀΔ)^-1 ( W y + rho Δᵀ sum_i (theta_i + r alpha_i + (1 - r) z) )
    theta_i <- theta_i + r alpha_i + (1 - r) z - Δ x

`DogeGroups` is this iteration, as published. `Admm` on a `doge_split` with the number of groups makes the same iterates
with a fraction of the memory and the time: the first line moves alpha_i along the rows of Ψ_i alone, by -1 / rho times
the new dual of each row, so `theta_i` is `d - Ψ_iᵀ g_i / rho` with one array d for all groups and one number for each
row, hubs included.

By default row r copies only the columns that it touches, and its copy of column j carries the weight `|Ψ_rj|`. The row
step stays closed form with `S_r = sum_j |Ψ_rj|` for the squared norm and `C_j = sum_r |Ψ_rj|`. For k >= 1 this takes
0.4 to 0.9 times the iterations of unweighted copies, where `S_r = sum_j Ψ_rj²` and C is the number of groups.

Source: Bu, Wu, Zuo, "Doge-ADMM: A Highly Scalable Parallel Algorithm for Trend Filtering on Graphs"; the weights from
Pock and Chambolle, "Diagonal preconditioning for first order primal-dual algorithms", 2011, lemma 2; the relaxation
from Boyd, Parikh, Chu, Peleato, Eckstein, 2011, section 3.4.3.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy import sparse

from sparseopt.core.base.types import pytree
from sparseopt.core.operators.differences import Difference, GridBase
from sparseopt.core.operators.maps import Split
from sparseopt.core.operators.row_tables import RowTable, Sums, edge_places, row_table
from sparseopt.core.penalties.protocols import Norm
from sparseopt.core.penalties.sums import by_group, lift
from sparseopt.core.problem.problem import Problem
from sparseopt.core.solvers.admm import Admm, AdmmState, Block, Moving, Start


def doge_split(outer: Difference, inner: Difference, sums: Sums, dtype: Any, groups: int | None = None) -> Split:
    """The `Split` of Doge-ADMM; `groups` is None for weighted copies, or their number for the metric of the paper.

    `sums` are those of Ψ, the outer map, in the layout of its rows and columns.
    """
    rows, columns = sums.row_absolute, sums.column_absolute
    if groups is not None:
        rows, columns = sums.row_squares, np.asarray(float(groups))
    # A row without entries takes no part; any positive number will do.
    rows = np.where(rows > 0, rows, 1)
    return Split(outer, inner, rows.astype(dtype), np.asarray(columns).astype(dtype))


class Copies(NamedTuple):
    """What the groups keep, each `[groups, *columns]` or `[groups, *columns, channels]`."""

    alpha: Any
    theta: Any  # scaled: rho theta_i is a dual


def doge_groups_table(outer: Difference, matrix: sparse.csr_array, labels: np.ndarray, dtype: Any) -> RowTable:
    """The `table` of `DogeGroups`, for the group labels of the rows of Ψ.

    `outer` gives the layout; its base holds nodes and edges of one device. On a `GridBase` the edges of `matrix` are in
    the order of `grid_edges`.
    """

    def layout(shape: tuple[int, ...]) -> tuple[np.ndarray, int] | None:
        if isinstance(outer.base, GridBase) and shape == outer.base.edge_shape:
            return edge_places(outer.base.shape), math.prod(shape)
        return None

    return row_table(matrix, labels, dtype, rows=layout(outer.out_shape), columns=layout(outer.in_shape))


@pytree
class DogeGroups(Admm):
    """Doge-ADMM with its copies, as a solver for `solve`; `problem.operator` is a `doge_split` with the groups' number.

    All iterates, checks and changes of rho are those of `Admm` on the same problem, up to rounding; there is no
    acceleration. `table` has the rows of Ψ by groups. A start with a dual g has `theta_i = -Ψ_iᵀ g_i / rho`.

    Example:
        >>> from sparseopt.core.operators.differences import Difference, GridBase
        >>> from sparseopt.core.solvers.admm import Start
        >>> from sparseopt.core.solvers.doge import DogeGroups, doge_groups_table, doge_split
        >>> from sparseopt.core.operators.normal_solves import Diagonal
        >>> chain, base = so.Graph.chain(4), GridBase((4,))
        >>> split = doge_split(Difference(base, 1), Difference(base, 0), chain.sums(1), np.float32, groups=2)
        >>> table = doge_groups_table(split.outer, chain.matrix(1), chain.groups(1), np.float32)
        >>> y = jnp.array([0.0, 0.2, 3.0, 3.1])
        >>> problem = so.Problem(so.LeastSquares(None, y), so.L1(0.5), jax.tree.map(jnp.asarray, split))
        >>> start = Start(y, jnp.zeros((1, 4)))  # a dual for every edge, and an empty place at the end
        >>> so.solve(problem, DogeGroups(Diagonal(), 1.0, table=table), start).check().value.round(2)
        Array([0.35, 0.35, 2.8 , 2.8 ], dtype=float32)
    """

    table: Any = dataclasses.field(kw_only=True)

    def _accelerates(self, problem: Problem) -> bool:
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

    def init(self, problem: Problem, start: Start | AdmmState) -> AdmmState:
        state = super().init(problem, start)
        if isinstance(start, AdmmState):
            return state
        now, rows = state.now, state.rows
        z = now.inner(rows)
        split, table = problem.operator, self.table
        channels = z.shape[len(split.outer.in_shape) :]
        of_rows = table.gathered(rows.dual.reshape(-1, *channels))
        pulled = jax.vmap(lambda group, e: group.rmv(e))(table, of_rows)
        theta = -pulled.reshape(-1, *z.shape) / rows.rho
        rows = rows._replace(memory=Copies(jnp.broadcast_to(z, theta.shape), theta))
        return dataclasses.replace(state, now=Moving(now.x, (rows,)))

    def _advanced(self, problem: Problem, now: Moving) -> Moving:
        split, penalty, table, (rows,) = problem.operator, problem.penalty, self.table, now.blocks
        keep = 1 - jnp.asarray(self.relaxation, now.x.dtype)
        z, theta, rho = now.inner(rows), rows.memory.theta, rows.rho
        channels = z.shape[len(split.outer.in_shape) :]
        points = (z - theta).reshape(-1, table.num_columns, *channels)
        of_groups = by_group(penalty, table, split.outer.out_shape, len(channels))

        def moved(penalty: Any, group: Any, point: Array) -> Any:
            return lift(penalty, group).moved(point, 1 / rho)

        alpha, found, move = jax.vmap(moved)(of_groups, table, points)
        alpha = alpha.reshape(theta.shape)
        # The dual and Ψ z row by row, for the checks; the iteration does not read them.
        candidate = -rho * table.scattered(move).reshape(rows.dual.shape)
        prox = rows.prox
        if isinstance(penalty, Norm):
            candidate = penalty.project_dual(candidate)
        else:
            prox = table.scattered(found).reshape(rows.dual.shape)
        dual = keep * rows.dual + (1 - keep) * candidate

        relaxed = theta + (1 - keep) * alpha + keep * z
        pulled = rho * jnp.sum(relaxed, axis=0)
        x = self._x_step(problem, now, split.inner.rmv(pulled))
        inner = None if rows.inner is None else split.inner.mv(x)
        theta = relaxed - (x if inner is None else inner)
        return Moving(x, (Block(inner, Copies(alpha, theta), dual, candidate, prox, rho),))

    def _checked(self, problem: Problem, state: AdmmState, before: Moving) -> AdmmState:
        """As `Admm`, with theta scaled for a new rho, so that `rho theta` stays."""
        after = super()._checked(problem, state, before)
        theta = after.rows.memory.theta * (state.rho / after.rho)
        rows = after.rows._replace(memory=after.rows.memory._replace(theta=theta))
        return dataclasses.replace(after, now=after.now._replace(blocks=(rows,)))
