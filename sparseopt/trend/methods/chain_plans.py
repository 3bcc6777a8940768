"""Two plans for chains: the exact fused lasso of order 0, and an interior point method for L1 of every order.

Both are pure and take node weights, missing values, channels and a weight for each row; neither needs a start.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparseopt.core.base.mesh import on_device
from sparseopt.core.base.types import pytree, static
from sparseopt.core.penalties.entries import L1
from sparseopt.core.penalties.sets import Nonnegative, Nonpositive
from sparseopt.core.problem.problem import Solution, Start, Status
from sparseopt.core.solvers.banded_interior import BandedMatrix, banded_interior
from sparseopt.core.solvers.fused_lasso import fused_dual, fused_lasso
from sparseopt.trend.base.fit import Fit
from sparseopt.trend.base.ground import Data
from sparseopt.trend.base.method import Method
from sparseopt.trend.methods.plan import Plan

FUSED = (L1, Nonnegative, Nonpositive)


@pytree
class ChainPlan(Plan):
    """What the two have in common."""

    # Whether arrays on the rows are those on the edges of a grid of one axis, `[1, n]`, of which the last is empty.
    on_edges: bool = static(default=False)
    takes_start = False
    penalties: ClassVar[tuple[type, ...]] = (L1,)

    def refuses(self, penalty: Any, weighted: bool) -> str | None:
        known = isinstance(penalty, self.penalties)
        return None if known else f"the methods of chains solve the L1 penalty, given {penalty}"

    def weights(self, data: Data) -> Array | None:
        """Of the nodes, `[n]`."""
        weights = data.loss.weights
        return None if weights is None else weights.reshape(-1)

    def caps(self, penalty: Any, like: Array) -> Array:
        """The penalty's weight for each row, `[rows]`; `like` is an array on the rows."""
        weight, rows = jnp.asarray(penalty.weight, like.dtype), self.listed(like).shape[0]
        return jnp.broadcast_to(weight, rows) if weight.ndim == 0 else self.listed(weight).reshape(-1)

    def listed(self, rows: Array) -> Array:
        """An array on the rows, without the empty place."""
        return rows[0, :-1] if self.on_edges else rows

    def laid_out(self, rows: Array) -> Array:
        """The inverse of `listed`."""
        return jnp.pad(rows, [(0, 1)] + [(0, 0)] * (rows.ndim - 1))[None] if self.on_edges else rows


def _solution(x: Array, dual: Array, ended: Any, steps: Any) -> Solution:
    """A point whose objective and gap are computed later."""
    sane = jnp.all(jnp.isfinite(x))
    status = jnp.where(sane, jnp.where(ended, Status.CONVERGED, Status.MAX_STEPS), Status.NONFINITE)
    unknown = jnp.full((), jnp.nan, x.dtype)
    return Solution(x, status.astype(jnp.int32), steps, unknown, unknown, unknown, dual=dual)


@pytree
class FusedPlan(ChainPlan):
    """The exact fused lasso, without a step; for signals that only rise or fall, isotonic regression."""

    penalties: ClassVar[tuple[type, ...]] = FUSED

    def solve(
        self, data: Data, penalty: Any, limits: tuple[Any, Any], start: Start, rates: tuple[Any, Any, Any], history: int
    ) -> tuple[Solution, Array, Any]:
        y, masses = data.centred.target, self.weights(data)
        caps = self.caps(penalty, start.dual)
        # No pull of the signal is as long as this, which stands for an infinite weight.
        spread = jnp.max(y) - jnp.min(y)
        far = 2 * spread * (y.size if masses is None else jnp.sum(masses)) + jnp.finfo(y.dtype).tiny
        levels = _levels(penalty, caps, far)
        x = jax.vmap(fused_lasso, (1, None, None), 1)(y.reshape(y.shape[0], -1), levels, masses).reshape(y.shape)
        # Rounding may leave a fall where none is allowed.
        x = self.ground.within(penalty, x)
        rows = self.listed(self.ground.operator.mv(x))
        u = self.laid_out(fused_dual(-data.centred.gradient(x), rows, _levels(penalty, caps, jnp.inf)))
        return _solution(x, u, True, jnp.zeros((), jnp.int32)), u, None


def _levels(penalty: Any, caps: Array, forbidden: Any) -> tuple[Array, Array]:
    """The weights of falls and of rises, of which one may be forbidden."""
    return (
        jnp.where(isinstance(penalty, Nonpositive), forbidden, caps),
        jnp.where(isinstance(penalty, Nonnegative), forbidden, caps),
    )


@pytree
class BandedPlan(ChainPlan):
    """The interior point method on banded matrices; see `core/solvers/banded_interior.py`."""

    matrix: Any = None  # a `BandedMatrix`

    def solve(
        self, data: Data, penalty: Any, limits: tuple[Any, Any], start: Start, rates: tuple[Any, Any, Any], history: int
    ) -> tuple[Solution, Array, Any]:
        y, masses, (tol, limit) = data.centred.target, self.weights(data), limits
        masses = jnp.ones(y.shape[0], y.dtype) if masses is None else masses
        found = banded_interior(self.matrix, y, masses, self.caps(penalty, start.dual), tol, limit)
        x, u = jnp.where(limit == 0, start.x, found.x), jnp.where(limit == 0, start.dual, self.laid_out(found.u))
        return _solution(x, u, found.ended > 0, found.steps), u, None


@dataclasses.dataclass(frozen=True)
class FusedLasso(Method):
    """The exact fused lasso at order 0 on chains, by dynamic programming; a fit counts no steps.

    For L1, and for signals that only rise or fall.

    Source: Johnson, "A dynamic programming algorithm for the fused lasso and L0-segmentation", Journal of
    Computational and Graphical Statistics 22 (2013).
    """

    name = "fused_lasso"
    single = merges = True

    def refuses(self, asked: Fit) -> str | None:
        if reason := super().refuses(asked):
            return reason
        if not (asked.geometry.line and asked.order == 0):
            return f'method="{self.name}" solves order 0 on chains; use "doge", "admm" or "interior"'
        if not isinstance(asked.penalty, FUSED):
            return f'method="{self.name}" solves the L1 penalty, given {asked.penalty}; use "doge" or "admm"'
        return f'method="{self.name}" takes no step: leave out the history' if asked.history else None

    def plan(self, asked: Fit) -> FusedPlan:
        geometry = asked.geometry
        key = (self.name, asked.dtype.name, bool(asked.channels))
        return geometry.cache(key, lambda: on_device(FusedPlan(asked.ground, geometry.fills_rows)))


def banded_plan(asked: Fit) -> BandedPlan:
    """The plan of the interior point method for a request on a chain."""
    geometry, order = asked.geometry, asked.order + 1

    def build() -> BandedPlan:
        matrix = BandedMatrix.of(geometry.matrix(order).astype(np.float64))
        return on_device(BandedPlan(asked.ground, geometry.fills_rows and order % 2 == 1, matrix))

    return geometry.cache(("banded", order, asked.dtype.name, bool(asked.channels)), build)
