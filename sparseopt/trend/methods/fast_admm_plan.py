"""The ADMM of Ramdas and Tibshirani on chains: the last difference stays in the penalty, whose prox is exact.

At order 0 that prox is the fit; at higher orders it saves steps where smoothing is strong. With free ends and any times
the other factor of `D^(k+1)`, `diag(k / (t_(i+k) - t_i)) D^(k)`, makes the x-step a banded system.
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
from sparseopt.core.operators.maps import Identity
from sparseopt.core.operators.normal_solves import Diagonal, banded_solve
from sparseopt.core.penalties.entries import L1
from sparseopt.core.solvers.admm import Start, standard_split
from sparseopt.core.solvers.fused_lasso import ChainTotalVariation
from sparseopt.trend.base.ground import Data
from sparseopt.trend.base.job import Job, Method, Settings
from sparseopt.trend.methods.admm_plan import CADENCE, in_unit, node_solve
from sparseopt.trend.methods.plan import Plan


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
            split = in_unit(standard_split(inner, Identity(inner.out_shape), kind), job)
            exact = order == 0 and not job.weighted and not graph.free
            return on_device(ChainPlan(job.ground, split, solve, 1 if exact else CADENCE, exact))

        return job.layout.cache(key, build)


def _refuses(penalty: Any) -> str | None:
    if penalty is not None and not isinstance(penalty, L1):
        return f'method="fast_admm" solves the L1 penalty, given {penalty}; use "doge" or "admm"'
    if penalty is not None and np.ndim(penalty.weight) != 0:
        return 'method="fast_admm" takes one weight for all differences; use "doge" or "admm"'
    return None
