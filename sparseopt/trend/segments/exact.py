"""The global minimum of the trend filter with `L0` at order 0 on chains, channel by channel, since `L0` counts entries.

For the square and Poisson losses, and up to 20,000 nodes for absolute and quantile ones.
"""

import jax.numpy as jnp
import numpy as np

from sparseopt.core.losses.residuals import has_two_slopes
from sparseopt.core.losses.scalar import Poisson
from sparseopt.core.penalties.entries import L0
from sparseopt.core.problem.problem import Status
from sparseopt.trend.base.fit import Fit
from sparseopt.trend.base.penalties import vanishes
from sparseopt.trend.base.pieces import TrendSolution
from sparseopt.trend.methods.losses import best_constants, node_deviances
from sparseopt.trend.segments.functional import lowest_rate, optimal_jumps
from sparseopt.trend.segments.slopes import MOST_NODES, two_slope_jumps


def is_exact(asked: Fit) -> bool:
    """Whether a request that names no method has its optimum here."""
    plain = asked.method is None and not (asked.several or asked.history) and asked.order == 0
    short = has_two_slopes(asked.loss) and asked.geometry.num_nodes <= MOST_NODES
    known = asked.square or isinstance(asked.loss, Poisson) or short
    chain = asked.geometry.line and asked.geometry.num_edges > 0 and not asked.geometry.several_devices
    return plain and known and chain and isinstance(asked.penalty, L0) and not vanishes(asked.penalty)


def exact_fit(asked: Fit) -> TrendSolution:
    """The optimum, whose gap is 0 up to rounding."""
    columns, mass, weight, loss = asked.columns, asked.mass, float(asked.penalty.weight), asked.loss
    value, jumps, floor = np.empty(columns.shape), 0, -np.inf
    if not asked.square:
        best_constants(asked)  # what has no finite constant is an error
    for channel, y in enumerate(np.ascontiguousarray(columns.T)):
        if has_two_slopes(loss):
            below, above = loss.scale * -float(loss.level), loss.scale * (1 - float(loss.level))
            places = two_slope_jumps(y, weight, (below, above), mass)
        else:
            counts = not asked.square
            places = optimal_jumps(y, weight if counts else 2 * weight, mass, counts)
            floor = np.log(lowest_rate(y, mass)) if counts else floor
        piece = np.searchsorted(places, np.arange(len(y)), side="right")
        value[:, channel] = np.maximum(loss.location(y, mass, piece), floor)[piece]
        jumps += len(places)
    objective = np.sum(mass[:, None] * node_deviances(loss, value, columns)) / 2 + weight * jumps
    fit, zero = asked.on_nodes(value), jnp.zeros((), asked.dtype)
    nonzero = asked.geometry.difference(1, asked.dtype).mv(fit) != 0
    status, none = jnp.asarray(Status.CONVERGED, jnp.int32), jnp.zeros((), jnp.int32)
    return TrendSolution(fit, status, none, zero, jnp.asarray(objective, asked.dtype), zero, nonzero=nonzero)
