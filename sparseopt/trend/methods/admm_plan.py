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
from sparseopt.core.base.types import pytree, static
from sparseopt.core.operators.differences import Difference, GridBase, pad
from sparseopt.core.operators.maps import standard_split
from sparseopt.core.penalties.entries import L1
from sparseopt.core.problem.problem import Start
from sparseopt.core.solvers.fused_lasso import ChainTotalVariation
from sparseopt.trend.base.fit import Fit
from sparseopt.trend.base.ground import Data
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

    def plan(self, asked: Fit) -> Plan:
        geometry, weighted = asked.geometry, asked.weighted and asked.geometry.transforms
        key = (self.name, tuple(asked.terms), weighted, asked.dtype.name, bool(asked.channels))

        def build() -> Plan:
            unit = 1.0 if asked.several else geometry.unit(asked.order + 1)
            split = standard_split(asked.ground.operator, asked.dtype, unit)
            orders, columns = tuple(k + 1 for k in asked.terms), np.asarray(split.column_scale)
            x_step = geometry.x_step(orders, columns, weighted, bool(asked.channels), asked.dtype)
            return on_device(Plan(asked.ground, split, x_step, CADENCE))

        return geometry.cache(key, build)


@pytree
class ChainPlan(Plan):
    """A plan whose penalty is `weight ||E z||_1`, E the last difference of a chain, and whose dual is `Eᵀu`."""

    fills_rows: bool = static(default=True)  # whether the rows of the chain are filled up as the rows of E are

    def refuses(self, penalty: Any, weighted: bool) -> str | None:
        return _refuses(penalty) or super().refuses(penalty, weighted)

    def solver_penalty(self, penalty: Any) -> ChainTotalVariation:
        """The penalty with the last difference inside."""
        shape = self.split.outer.shape
        return ChainTotalVariation(penalty.weight, Difference(GridBase(shape[-1:]), 1, from_edges=len(shape) > 1))

    def row_dual(self, penalty: Any, dual: Array) -> Array:
        """The u for which `Eᵀu` is the solver's dual."""
        found = penalty.potential(dual)
        return found if self.fills_rows else found[0, :-1]

    def solver_dual(self, penalty: Any, dual: Array) -> Array:
        return penalty.last.rmv(dual if self.fills_rows else pad(dual, 0, 0, 1)[None])

    def start(self, penalty: Any, data: Data, weights: Any) -> Start:
        centre, inner = data.centred.target, self.solver_penalty(penalty)
        if self.exact:
            answer = inner.prox(centre, 1.0)
            return Start(answer, centre - answer)
        if self.ground.proves_null:
            found = super().start(penalty, data, weights)
            return Start(found.x, self.solver_dual(inner, found.dual))
        return Start(centre, jnp.zeros(self.split.row_shape(centre), centre.dtype))


@dataclasses.dataclass(frozen=True)
class FastAdmm(Settings, Method):
    """ADMM with the exact fused lasso, for L1 on chains."""

    name = "fast_admm"
    single = one_metric = merges = True
    # Below this order it was faster to adapt rho at every level of a path.
    keeps_rho_from = 2

    def refuses(self, asked: Fit) -> str | None:
        if reason := super().refuses(asked):
            return reason
        if not asked.geometry.line:
            return (
                f'method="{self.name}" needs a chain, where its inner fused lasso is exact; on other graphs use "doge" '
                'or "admm"'
            )
        return _refuses(asked.penalty)

    def plan(self, asked: Fit) -> ChainPlan:
        geometry, order, kind = asked.geometry, asked.order, asked.dtype

        def build() -> ChainPlan:
            inner, x_step, fills = geometry.fused_split(order, asked.weighted, bool(asked.channels), kind)
            split, exact = standard_split(inner, kind, geometry.unit(order + 1)), order == 0 and not asked.weighted
            return on_device(ChainPlan(asked.ground, split, x_step, 1 if exact else CADENCE, exact, fills))

        return geometry.cache((self.name, order, asked.weighted, kind.name, bool(asked.channels)), build)


def _refuses(penalty: Any) -> str | None:
    if penalty is not None and not isinstance(penalty, L1):
        return f'method="fast_admm" solves the L1 penalty, given {penalty}; use "doge" or "admm"'
    if penalty is not None and np.ndim(penalty.weight) != 0:
        return 'method="fast_admm" needs one weight for all differences; use "doge" or "admm"'
    return None
