"""The noise level of a signal, from its differences."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.compile import Jitted
from sparseopt.core.base.types import precision
from sparseopt.trend.base.fit import Fit, signal_on
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.signal import PLAIN_COPIES

# The median of |x| for a standard normal x.
NORMAL_MEDIAN = 0.6744897501960817
# One weight does not suit channels if the noise of one is more than this many times that of another.
UNLIKE = 5


def noise_level(y: Any, graph: Graph, order: int = 0, node_weights: Any = None, *, missing: str = "error") -> float:
    """The standard deviation of the noise in a signal whose trend has few or small differences.

    `median_r |(Δ^(order+1) y)_r| / (||Δ_r|| 0.6745)`: a difference of white noise of deviation sigma has standard
    deviation `sigma ||Δ_r||`, and a few jumps of the trend do not move the median.

    The arguments are as in `trend_filter`; all channels count as one sample. The noise at node j is assumed to have
    the variance `sigma² / w_j`, and rows that touch a node of weight 0 are left out. The result is NaN if no row is
    left.

    Source: Donoho and Johnstone, "Ideal spatial adaptation by wavelet shrinkage", Biometrika 81 (1994), with
    differences instead of the finest wavelets.

    Example:
        >>> y = np.repeat([0.0, 50.0], 500) + 2.0 * np.random.default_rng(0).standard_normal(1000)
        >>> bool(abs(so.trend.noise_level(y, so.Graph.chain(1000)) - 2.0) < 0.2)
        True
    """
    return noise_of(signal_on(graph, order, y, node_weights, missing, np.float64, PLAIN_COPIES))


def unlike_channels(
    y: Any, graph: Graph, order: int = 0, node_weights: Any = None, *, missing: str = "error"
) -> str | None:
    """A sentence if one weight does not suit all channels of a signal, else None.

    It compares the `noise_level` of the channels: one weight smooths all of them, and the right weight is about
    proportional to the noise. The arguments are as in `noise_level`. Channels without noise are not compared.

    Example:
        >>> y = np.random.default_rng(0).standard_normal((90, 2)) * [1, 100]
        >>> "to one unit" in so.trend.unlike_channels(y, so.Graph.chain(90))
        True
    """
    asked = signal_on(graph, order, y, node_weights, missing, np.float64, PLAIN_COPIES)
    found = [noise_of(dataclasses.replace(asked, values=column)) for column in asked.columns.T]
    if not 0 < UNLIKE * min(found) < max(found):
        return None
    return (
        f"the noise of the channels is {min(found):.3g} to {max(found):.3g}, and one weight smooths them all: bring "
        "them to one unit, or smooth them one by one"
    )


# As one program: operation by operation it would be twenty.
_rows = Jitted(lambda difference, x: difference.mv(x))


def noise_of(asked: Fit) -> float:
    """`noise_level` of a checked signal."""
    values, weights, geometry, order = asked.columns, asked.mass, asked.geometry, asked.order
    if asked.weights is None:
        with precision(np.dtype(np.float64)):
            on_nodes = jnp.asarray(geometry.rows(values, 0))
            rows = np.asarray(_rows(geometry.difference(order + 1, np.float64), on_nodes))
        rows, squares = (geometry.list_rows(part, order + 1) for part in (rows, geometry.sums(order + 1).row_squares))
    else:
        matrix = geometry.matrix(order + 1)
        squares = matrix.multiply(matrix) @ (1 / np.where(weights > 0, weights, 1))
        squares = np.where(abs(matrix) @ (weights == 0) > 0, 0, squares)
        rows = matrix @ values
    judged = squares > 0  # an isolated node has a row without entries
    if not judged.any():
        return float("nan")
    sizes = np.abs(rows[judged]) / np.sqrt(squares[judged])[:, None]
    return float(np.median(sizes) / NORMAL_MEDIAN)
