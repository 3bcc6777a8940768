"""The global minimum of the trend filter with `L0` at order 0 on chains, for the square loss, channel by channel."""

import jax.numpy as jnp
import numpy as np

from sparseopt.core.penalties.entries import L0
from sparseopt.core.problem.problem import Status
from sparseopt.trend.base.fit import Fit
from sparseopt.trend.base.pieces import TrendSolution
from sparseopt.trend.segments.functional import optimal_jumps


def is_exact(asked: Fit) -> bool:
    """Whether a request that names no method has its optimum here."""
    plain = asked.method is None and asked.square and not (asked.several or asked.history) and asked.order == 0
    return plain and isinstance(asked.penalty, L0) and asked.geometry.line and not asked.geometry.several_devices


def exact_fit(asked: Fit) -> TrendSolution:
    """The optimum, whose gap is 0 up to rounding."""
    columns, mass, price = asked.columns, asked.mass, 2 * float(asked.penalty.weight)
    value, objective = np.empty(columns.shape), 0.0
    for channel, y in enumerate(columns.T):
        places = optimal_jumps(y, price, mass)
        piece = np.searchsorted(places, np.arange(len(y)), side="right")
        value[:, channel] = (np.bincount(piece, mass * y) / np.bincount(piece, mass))[piece]
        objective += (np.sum(mass * (y - value[:, channel]) ** 2) + price * len(places)) / 2
    fit, zero = asked.on_nodes(value), jnp.zeros((), asked.dtype)
    nonzero = asked.geometry.difference(1, asked.dtype).mv(fit) != 0
    status, none = jnp.asarray(Status.CONVERGED, jnp.int32), jnp.zeros((), jnp.int32)
    return TrendSolution(fit, status, none, zero, jnp.asarray(objective, asked.dtype), zero, nonzero=nonzero)
