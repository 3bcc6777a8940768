"""Total variation between bounds: the fit without them, clipped, with a certificate of its own.

    minimise over b    loss(b) + sum over edges of w_e |b_i - b_j|    with low <= b <= high

The level sets {b > t} of an optimum each solve a cut of their own. Bounds change none of those between them, and the
others are all nodes or none, so clipping is exact; also where b may only rise or fall.

Source: Hochbaum, "An efficient algorithm for image segmentation, Markov random fields and related problems", Journal of
the ACM 48 (2001), for the cuts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from sparseopt.core.base.compile import Jitted
from sparseopt.core.losses.data import DataLoss
from sparseopt.core.problem.certify import Anchor, judge, promote
from sparseopt.core.problem.problem import Problem
from sparseopt.trend.base.fit import Fit
from sparseopt.trend.base.ground import Ground
from sparseopt.trend.base.penalties import Terms, leaves_as
from sparseopt.trend.base.pieces import TrendSolution


def clipped_fit(asked: Fit, free: Terms, solve: Callable[[Fit], TrendSolution]) -> TrendSolution:
    """The fit of a request whose terms without the bounds are `free`, which `solve` fits."""
    asked.first()  # a start that does not suit is an error, even if it has no use
    found = solve(dataclasses.replace(asked, terms=free, start=None))
    loss = leaves_as(asked.loss, asked.dtype)
    value, dual, objective, gap, nonzero = _clip(
        asked.ground, DataLoss(loss, None, *asked.arrays), asked.rows, found.value, found.dual
    )
    status = promote(found.status, gap, objective, asked.tol)
    return dataclasses.replace(
        found,
        value=value,
        dual=dual,
        objective=objective,
        gap=gap,
        residual=gap,
        status=status,
        nonzero=found.nonzero & nonzero.reshape(found.nonzero.shape),
        state=None,
    )


@Jitted
def _clip(ground: Ground, loss: DataLoss, penalty: Any, free: Any, dual: Any) -> tuple[Any, ...]:
    """The clipped fit, its dual, objective and gap, and which of its differences are not 0."""
    x, stacked = ground.within(penalty, free), ground.operator
    nodes = stacked.maps[-1]
    rows = nodes.mv(x)
    u = jnp.zeros_like(rows) if dual is None else dual
    pulled, gradient = nodes.rmv(u), loss.gradient(x)

    def joined(of_bounds: Any) -> Any:
        return jnp.concatenate([part.reshape(-1, *x.shape[len(nodes.in_shape) :]) for part in (of_bounds, u)])

    # Where the bounds act they hold what pulls; elsewhere the dual of the free fit bounds the loss best.
    held = jnp.where(x == free, 0, -(gradient + pulled))
    anchor: Anchor | None = Anchor(joined(-(gradient + pulled)), -gradient)
    if loss.scalar.span_holds_fit and not loss.is_square:
        # Gradients are at the ends of the conjugate's domain, too close for an anchor: the bounds hold what is beyond.
        inside = -loss.rows.weigh(jnp.clip(loss.rows.slope(pulled), *loss.scalar.dual_range(loss.target)))
        shrunk = (1 - 4 * jnp.finfo(x.dtype).eps) * inside
        held, anchor, penalty = jnp.where(x == free, shrunk - pulled, held), None, _with_ends(penalty, loss, x)
    objective, gap = judge(Problem(loss, penalty, stacked), x, joined(held), anchor)
    return x, joined(held), objective, gap, rows != 0


def _with_ends(penalty: Any, loss: DataLoss, x: Any) -> Any:
    """The penalty with the range of the data, which holds every optimum, for ends that are infinite."""
    rows, box = loss.rows, penalty.penalties[0]
    seen = True if rows.weights is None else rows.weights > 0
    least = jnp.minimum(jnp.min(jnp.where(seen, rows.target, jnp.inf)), jnp.min(x))
    most = jnp.maximum(jnp.max(jnp.where(seen, rows.target, -jnp.inf)), jnp.max(x))
    low, high = jnp.where(jnp.isinf(box.low), least, box.low), jnp.where(jnp.isinf(box.high), most, box.high)
    box = dataclasses.replace(box, low=low.astype(x.dtype), high=high.astype(x.dtype))
    return dataclasses.replace(penalty, penalties=(box, *penalty.penalties[1:]))
