"""Concave penalties as a sequence of convex ones: large differences keep their size, and every step is certified.

    minimise over b    loss(b) + sum_r p(|(Δ^(k+1) b)_r|),        p rising and concave: MCP, SCAD, or your own

The tangent of p at the last fit lies above p, so the fit for the weights `w_r = p'(|(Δ b)_r|)` lowers the objective
until it is stationary; the first tangent, at 0, gives the L1 fit. Each round is a convex problem with a duality gap.

Source: Zou and Li, "One-step sparse estimates in nonconcave penalized likelihood models", Annals of Statistics 36
(2008); Candès, Wakin, Boyd, "Enhancing sparsity by reweighted l1 minimization", 2008; Varma, Lee, Kovačević, Chi,
"Vector-valued graph trend filtering with non-convex penalties", IEEE TSIPN 6 (2020).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.arguments import class_or_function, positive_number, real_array, whole_number
from sparseopt.core.base.types import precision
from sparseopt.core.losses.scalar import check_scalar_loss
from sparseopt.core.penalties.entries import L1
from sparseopt.core.problem.problem import Solution, Status
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.penalties import check_parameters
from sparseopt.trend.base.signal import compute_dtype, geometry_at
from sparseopt.trend.filter import trend_filter
from sparseopt.trend.methods.choice import as_method

# With a loss, the smallest weight of a row, as a fraction of its first weight.
LEAST = 1e-4


@dataclasses.dataclass(frozen=True)
class Reweighted:
    """Fits of weighted L1 penalties that approach a concave one. All arrays are NumPy arrays.

    Attributes:
        solution: of the round with the smallest objective, with the certificate of its convex problem.
        weights: of its rows, in the order of `graph.matrix(order + 1)`.
        objectives: of the concave problem after each round, the first for the L1 fit; decreasing, up to `tol`.
        settled: whether the last round changed the objective by less than `tol` times its value.
    """

    solution: Solution
    weights: np.ndarray
    objectives: np.ndarray
    settled: bool

    @property
    def status(self) -> Status:
        """STATIONARY if the rounds settled, else MAX_STEPS; the convex problem of each round converged."""
        return Status.STATIONARY if self.settled else Status.MAX_STEPS

    @property
    def value(self) -> np.ndarray:
        """The fit, in the shape of the signal."""
        return np.asarray(self.solution.value)


def reweighted(
    y: Any, graph: Graph, penalty: Any, order: int = 0, *, rounds: int = 10, tol: float = 1e-6, **options: Any
) -> Reweighted:
    """Fit a signal under a concave penalty with weighted L1 penalties, starting from the L1 fit.

    Args:
        y: `[n]`, on a grid also `[*shape]`.
        graph: the graph of the signal.
        penalty: `MCP`, `SCAD`, or any penalty with a `slope(x)`, the elementwise derivative of its value in `|x|`: not
            negative, and decreasing in `|x|`.
        order: k.
        rounds: the limit on fits, the L1 fit included; two give the one-step estimate of Zou and Li.
        tol: the relative duality gap of each fit, and the relative change of the objective that ends the rounds.
        **options: passed to `trend_filter`, such as `method`, `node_weights`, `missing`, `dtype`, `loss` or
            `max_steps`. With a loss, or if nodes are missing, rows keep a ten-thousandth of their first weight: a
            part that is cut off may have no fit.

    Raises:
        RuntimeError: if a round does not converge, see `Solution.check`.

    Example:
        >>> y = np.array([1.1, 0.9, 1.0, 5.1, 4.9, 5.0])
        >>> so.trend_filter(y, so.Graph.chain(6), so.L1(0.9)).value.round(2).tolist()  # L1 flattens the step
        [1.3, 1.3, 1.3, 4.7, 4.7, 4.7]
        >>> so.trend.reweighted(y, so.Graph.chain(6), so.MCP(0.9)).value.round(2).tolist()
        [1.0, 1.0, 1.0, 5.0, 5.0, 5.0]
    """
    (geometry, k), y = geometry_at(graph, order), real_array("a signal", y)
    if class_or_function(penalty) or not (hasattr(penalty, "slope") and hasattr(penalty, "value")):
        raise TypeError(
            f"a concave penalty has `value` and `slope`, the derivative in |x|, as sparseopt.MCP(1.0) has; given "
            f"{penalty!r}"
        )
    if y.shape not in geometry.shapes:
        raise ValueError(
            f"the rows of one signal get their own weights, so the signal has the shape [{geometry.num_nodes}]"
            f"{geometry.or_shape}; given {y.shape}: fit channels one by one"
        )
    rounds, tol = whole_number("rounds", rounds, 1), positive_number("tol", tol)
    kind = compute_dtype(y, options.get("dtype"), geometry)
    check_parameters(penalty, kind)
    matrix, objectives = geometry.matrix(k + 1), list[float]()

    def at(rows: np.ndarray) -> tuple[float, np.ndarray]:
        """The penalty of the rows of a fit, and its slopes there."""
        with precision(kind):
            given = jnp.asarray(rows, kind)
            return float(penalty.value(given)), np.asarray(penalty.slope(given), np.float64)

    weights = at(np.zeros(matrix.shape[0]))[1]
    # With a loss, or without an observation, a part that no penalty ties to the rest may have no fit.
    weighed = options.get("node_weights")
    gaps = np.isnan(y).any() or (weighed is not None and not np.all(weighed))
    square = getattr(check_scalar_loss(options.get("loss", "square")), "is_square", False)
    least = 0.0 if square and not gaps else LEAST * weights
    method = as_method(options.get("method", "auto"))
    while True:
        solution = trend_filter(y, graph, L1(weights), k, tol=tol, **options).check()
        rows = matrix @ np.asarray(solution.value, np.float64).reshape(-1)
        # Subtracting the weighted L1 penalty gives the loss, whichever it is.
        loss = float(solution.objective) - float(np.sum(weights * np.abs(rows)))
        price, slopes = at(rows)
        if not objectives or loss + price < min(objectives):
            best = solution, weights
        objectives.append(loss + price)
        settled = len(objectives) > 1 and abs(objectives[-2] - objectives[-1]) <= tol * abs(objectives[-1])
        if settled or len(objectives) == rounds:
            return Reweighted(*best, np.array(objectives), settled)
        weights = np.maximum(slopes, least)
        if method is None or not method.cold:
            # Its rho belongs to the last weights: with a loss, fits that began with it ended at the step limit.
            options["start"] = dataclasses.replace(solution, state=None)
