"""Floor 5: the noise of a signal on a graph, from the median of its differences."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from sparseopt.core.grouping import edge_rows
from sparseopt.core.operators import Difference
from sparseopt.core.types import precision
from sparseopt.trend.graph import Graph
from sparseopt.trend.signal import PLAIN_COPIES, Signal, checked_order, checked_signal

# The median of |x| for a standard normal x.
NORMAL_MEDIAN = 0.6744897501960817


def noise_level(y: Any, graph: Graph, order: int = 0, node_weights: Any = None, *, missing: str = "error") -> float:
    """The standard deviation of the noise in a signal whose trend has few or small differences.

    `median_r |(Δ^(order+1) y)_r| / (||Δ_r|| 0.6745)`: a difference of white noise of deviation sigma has the deviation
    `sigma ||Δ_r||`, and a few jumps of the trend do not move the median.

    The arguments are those of `trend_filter`; all channels count as one sample. The noise at node j is assumed to have
    the variance `sigma² / w_j`, and rows that touch a node of weight 0 are left out. The result is NaN if no row is
    left.

    Source: Donoho and Johnstone, "Ideal spatial adaptation by wavelet shrinkage", Biometrika 81 (1994), with
    differences in place of the finest wavelets.

    Example:
        >>> from sparseopt.trend.noise import noise_level
        >>> y = np.repeat([0.0, 50.0], 500) + 2.0 * np.random.default_rng(0).standard_normal(1000)
        >>> bool(abs(noise_level(y, so.Graph.chain(1000)) - 2.0) < 0.2)
        True
    """
    k = checked_order(order)
    return signal_noise(checked_signal(y, graph, node_weights, missing, np.float64, PLAIN_COPIES), graph, k)


def signal_noise(signal: Signal, graph: Graph, order: int) -> float:
    """`noise_level` of a checked signal."""
    values = signal.values.reshape(graph.num_nodes, -1).astype(np.float64)
    if signal.weights is None:
        nodes = graph.shape or (graph.num_nodes,)
        with precision(np.dtype(np.float64)):
            rows = np.asarray(Difference(graph.base(np.float64), order + 1).mv(jnp.asarray(values.reshape(*nodes, -1))))
        squares = graph.sums(order + 1).row_squares
        if graph.shape is not None and order % 2 == 0:
            rows, squares = edge_rows(rows, graph.shape), edge_rows(squares, graph.shape)
    else:
        matrix = graph.matrix(order + 1)
        weights = signal.weights.astype(np.float64)
        missing = (weights == 0).astype(np.float64)
        squares = matrix.multiply(matrix) @ (1 / np.where(weights > 0, weights, 1))
        squares = np.where(abs(matrix) @ missing > 0, 0, squares)
        rows = matrix @ values
    judged = squares > 0  # an isolated node has a row without entries
    if not judged.any():
        return float("nan")
    sizes = np.abs(rows.reshape(-1, values.shape[1])[judged.reshape(-1)]) / np.sqrt(squares[judged])[:, None]
    return float(np.median(sizes) / NORMAL_MEDIAN)
