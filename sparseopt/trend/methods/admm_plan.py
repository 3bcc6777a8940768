"""The standard ADMM of the trend filter, whose x-step solves over the whole graph, and Ramdas and Tibshirani's.

The solve is exact and cheap with transforms on grids without node weights and with bands on chains with free ends;
elsewhere it uses conjugate gradients. It pays if conditioning decides: if smoothing is strong, and from order 3 on.

`FastAdmm`, for chains, leaves the last difference in the penalty, whose prox is exact. At order 0 that prox is the fit;
at higher orders it saves steps if smoothing is strong. With free ends and any times the other factor of `D^(k+1)`,
`diag(k / (t_(i+k) - t_i)) D^(k)`, makes the x-step a banded system.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparseopt.core.base.mesh import on_device
from sparseopt.core.base.types import pytree
from sparseopt.core.operators.differences import Difference, GridBase, pad
from sparseopt.core.operators.divided_differences import divided_difference
from sparseopt.core.operators.maps import standard_split
from sparseopt.core.operators.normal_solves import ConjugateGradient, Diagonal, banded_solve, free_solve
from sparseopt.core.penalties.entries import L1
from sparseopt.core.problem.problem import Start
from sparseopt.core.solvers.fused_lasso import ChainTotalVariation
from sparseopt.trend.base.ground import Data
from sparseopt.trend.base.job import Job
from sparseopt.trend.base.method import Method, Settings
from sparseopt.trend.methods.plan import Plan

# With an exact x-step a check is cheap.
CADENCE = 5


@dataclasses.dataclass(frozen=True)
class Admm(Settings, Method):
    """The standard ADMM, with the split `z = Δ^(k+1) b`; it solves over the whole graph in every step."""

    name = "admm"
    one_metric = True
    short_from = 500_000

    def plan(self, job: Job) -> Plan:
        even = job.ground.transform is not None and not job.weighted
        key = (self.name, tuple(job.terms), even, job.dtype.name, bool(job.channels))

        def build() -> Plan:
            operator, kind = job.ground.operator, job.dtype
            split = standard_split(operator, kind, 1.0 if job.several else job.graph.unit(job.order + 1))
            columns = np.asarray(split.column_scale)
            solve = node_solve(job, tuple(k + 1 for k in job.terms), columns, even)
            plan = Plan(job.ground, split, solve, CADENCE)
            return on_device(plan)

        return job.layout.cache(key, build)


def node_solve(job: Job, orders: tuple[int, ...], columns: np.ndarray, even: bool) -> Any:
    """The x-step for inner differences of these orders, with C a number, or one per column of a single difference.

    With free ends C is a number. `even` says that the nodes have one weight, on a graph with a transform.
    """
    graph, kind = job.graph, job.dtype
    if graph.free and not graph.is_chain:
        single = orders == (job.order + 1,)
        transform = job.ground.transform if single else free_solve(graph.node_shape, orders, kind, graph.spacing)
        return transform if even else ConjugateGradient(None, jnp.asarray(1e-2, kind), transform)
    if even:
        return dataclasses.replace(job.ground.transform, powers=orders)
    if graph.free and kind == np.float64:  # in float32 rounding may leave the matrix indefinite
        matrices = [graph.matrix(order) for order in orders]
        return banded_solve(sum(matrix.T @ matrix for matrix in matrices), kind)
    shape = graph.node_shape
    if columns.ndim:
        matrix = graph.matrix(orders[0])
        diagonal = np.asarray(matrix.multiply(matrix).T @ columns).reshape(shape)
    else:
        diagonal = columns * np.sum([graph.sums(order).column_squares.reshape(shape) for order in orders], axis=0)
    diagonal = diagonal[..., None] if job.channels else diagonal
    return ConjugateGradient(diagonal.astype(kind), jnp.asarray(1e-2, kind))


@pytree
class ChainPlan(Plan):
    """A plan whose penalty is `weight ||E z||_1`, E the last difference of a chain, and whose dual is `Eᵀu`."""

    def refuses(self, penalty: Any, weighted: bool) -> str | None:
        return _refuses(penalty) or super().refuses(penalty, weighted)

    def solver_penalty(self, penalty: Any) -> ChainTotalVariation:
        """The penalty with the last difference inside."""
        shape = self.split.outer.shape
        return ChainTotalVariation(penalty.weight, Difference(GridBase(shape[-1:]), 1, from_edges=len(shape) > 1))

    def row_dual(self, penalty: Any, dual: Array) -> Array:
        """The u for which `Eᵀu` is the solver's dual."""
        found = penalty.potential(dual)
        return found if self.ground.basis is None else found[0, :-1]

    def solver_dual(self, penalty: Any, dual: Array) -> Array:
        return penalty.last.rmv(dual if self.ground.basis is None else pad(dual, 0, 0, 1)[None])

    def start(self, penalty: Any, data: Data, weights: Any) -> Start:
        centre = data.centred.target
        if self.ground.basis is not None:
            found = super().start(penalty, data, weights)
            return Start(found.x, self.solver_dual(self.solver_penalty(penalty), found.dual))
        if not self.exact:
            return Start(centre, jnp.zeros(self.split.row_shape(centre), centre.dtype))
        answer = self.solver_penalty(penalty).prox(centre, 1.0)
        return Start(answer, centre - answer)


@dataclasses.dataclass(frozen=True)
class FastAdmm(Settings, Method):
    """ADMM with the exact fused lasso, for L1 on chains."""

    name = "fast_admm"
    single = one_metric = merges = True
    # Below this order it was faster to adapt rho at every level of a path.
    keeps_rho_from = 2

    def refuses(self, job: Job) -> str | None:
        if reason := super().refuses(job):
            return reason
        if not job.graph.is_chain:
            return (
                f'method="{self.name}" needs a chain, where its inner fused lasso is exact; on other graphs use "doge" '
                'or "admm"'
            )
        return _refuses(job.penalty)

    def plan(self, job: Job) -> ChainPlan:
        kind, key = job.dtype, (self.name, job.order, job.weighted, job.dtype.name, bool(job.channels))

        def build() -> ChainPlan:
            graph, order = job.graph, job.order
            inner: Any = job.layout.difference(order, kind)
            solve: Any = Diagonal()
            if order and graph.free:
                inner = divided_difference(graph.times, graph.num_nodes, order, kind, factor=True)
                matrix = inner.matrix()
                solve = banded_solve(matrix.T @ matrix, kind)
            elif order:
                solve = node_solve(job, (order,), np.ones(()), not job.weighted)
            split = standard_split(inner, kind, graph.unit(order + 1))
            exact = order == 0 and not job.weighted and not graph.free
            return on_device(ChainPlan(job.ground, split, solve, 1 if exact else CADENCE, exact))

        return job.layout.cache(key, build)


def _refuses(penalty: Any) -> str | None:
    if penalty is not None and not isinstance(penalty, L1):
        return f'method="fast_admm" solves the L1 penalty, given {penalty}; use "doge" or "admm"'
    if penalty is not None and np.ndim(penalty.weight) != 0:
        return 'method="fast_admm" needs one weight for all differences; use "doge" or "admm"'
    return None
