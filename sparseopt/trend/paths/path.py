"""The regularisation path of the trend filter, from the component means down to nearly the signal.

    minimise over b    sum_j w_j f(b_j; y_j)  +  penalty_weight(Δ^(k+1) b)        for weight_1 > weight_2 > ...

with f = 1/2 (y_j - b_j)² or another loss. Every level has its certificate, its degrees of freedom and its deviance;
`selection.py` chooses among the levels.

Source: Tibshirani and Taylor, "The solution path of the generalized lasso", Annals of Statistics 39 (2011).
"""

import dataclasses
import math
from functools import cached_property
from typing import Any

import numpy as np

from sparseopt.core import path as core_path
from sparseopt.core.base.arguments import class_or_function, is_positive, real_array, require_memory, whole_number
from sparseopt.core.base.types import Observer, precision
from sparseopt.core.losses.scalar import ScalarLoss, check_scalar_loss
from sparseopt.core.path import Levels
from sparseopt.core.penalties.entries import L1, MCP, SCAD
from sparseopt.core.penalties.groups import GroupL2
from sparseopt.trend.base.fit import Fit
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.noise import noise_of
from sparseopt.trend.base.penalties import require_representable
from sparseopt.trend.base.pieces import TrendSolution, freedom_of_levels
from sparseopt.trend.filter import check_fit
from sparseopt.trend.methods.choice import as_method
from sparseopt.trend.methods.losses import node_deviances
from sparseopt.trend.paths.largest_weight import NullFit, null_fit
from sparseopt.trend.paths.warm_starts import descend

# The relative accuracy of the first weight of a path: enough there, and ten times cheaper than the default.
FIRST_WEIGHT_TOL = 1e-2
# The accuracy of the levels, and on chains from order 1 on, where a step of the interior point method gives two digits,
# and a coarse fit misses bends, so that the criteria choose too small a weight (`benchmarks/bench_criteria.py`).
TOL, TOL_OF_LINES = 1e-4, 1e-8
# The divergence of a fit is found by moving every value by this fraction of the noise, up or down at random; on graphs
# of fewer nodes than LARGE several times, at most MOST_MOVES.
MOVE, LARGE, MOST_MOVES = 0.1, 2000, 16


@dataclasses.dataclass(frozen=True)
class TrendPath(Levels):
    """Fits for several weights, the largest first. All arrays are NumPy arrays.

    Attributes:
        weights: `[levels]`, descending.
        values: the fits, `[levels, *shape of y]`.
        objectives: `[levels]`.
        gaps: relative duality gaps `[levels]`, upper bounds on the relative suboptimality; NaN if the penalty has no
            dual.
        residuals: of the stopping rule, `[levels]`: the gap, or the stationarity residual.
        steps: `[levels]`.
        statuses: the `Status` of each level, `[levels]`.
        deviances: `sum_j w_j 2 f(fit_j; y_j)` over observed nodes and channels, `[levels]`; for the square the weighted
            sum of squares.
        noise: the signal's `noise_level`; NaN for a loss, or if no difference is left to estimate it.
        largest_weight: the smallest weight known to give the component means; None if the weights were given.
        graph: the graph of the fits.
    """

    weights: np.ndarray
    values: np.ndarray
    objectives: np.ndarray
    gaps: np.ndarray
    residuals: np.ndarray
    steps: np.ndarray
    statuses: np.ndarray
    deviances: np.ndarray
    noise: float
    largest_weight: float | None
    graph: Graph
    _nonzero: np.ndarray = dataclasses.field(repr=False)  # in the layout of rows
    _asked: Fit = dataclasses.field(repr=False)  # the signal, and what is asked at weight 1
    usual_criterion = "gcv"

    @property
    def levels(self) -> np.ndarray:
        """The weights."""
        return self.weights

    @property
    def penalty(self) -> Any:
        """The penalty at weight 1."""
        return self._asked.penalty

    @property
    def loss(self) -> ScalarLoss:
        """The loss of the fits."""
        return self._asked.loss

    @property
    def order(self) -> int:
        """K."""
        return self._asked.order

    @property
    def channels(self) -> int:
        """The number of channels of y, 1 without a channel axis."""
        return math.prod(self._asked.channels)

    @property
    def observations(self) -> int:
        """The number of observed values."""
        return self.channels * int(np.count_nonzero(self._asked.mass))

    @property
    def usual_rule(self) -> str:
        return "half_se" if fits_odds(self.loss) else "min"

    def refuses(self, criterion: str) -> str | None:
        return refuses_criterion(criterion, self.loss)

    def observed(self) -> tuple[np.ndarray, np.ndarray]:
        geometry, seen = self._asked.geometry, self._asked.mass > 0
        counts = np.bincount(geometry.components, seen, geometry.num_components)
        if (counts == 1).any() and seen.sum() > 1:
            alone = np.flatnonzero(seen & (counts == 1)[geometry.components])
            raise ValueError(
                f"{alone.size} components have one observed node only (one of them is node {alone[0]}); held out, it "
                "could not be predicted: leave such components out"
            )
        return seen, geometry.components

    def held_out(self, out: np.ndarray, observer: Observer | None) -> tuple[np.ndarray, np.ndarray]:
        asked, columns, mass = self._asked.without(out), self._asked.columns, self._asked.mass
        with precision(asked.dtype):
            fits = descend(asked.at(self.weights[0]), self.weights, None, observer)
        found = node_deviances(self.loss, fits.value.reshape(len(self), *columns.shape)[:, out], columns[out])
        return np.average(found.mean(axis=-1), axis=1, weights=mass[out]), fits.status

    def named(self, index: int) -> str:
        return f"level {index} (weight {self.weights[index]:.4g})"

    @cached_property
    def degrees_of_freedom(self) -> np.ndarray:
        """The degrees of freedom of every fit, `[levels]`, computed on first use.

        They are computed by `so.trend.degrees_of_freedom`. For GroupL2 and the square, whose zeros do not determine
        them, they are `sum_j d fit_j / d y_j` along random directions, from up to 16 more paths.
        """
        asked, geometry = self._asked, self._asked.geometry
        if asked.square and (isinstance(self.penalty, GroupL2) or geometry.refuses_count()):
            return self._divergences()
        seen = None if asked.weights is None else asked.weights > 0
        return freedom_of_levels(self._nonzero, geometry, self.order, seen, self.channels)

    def _divergences(self) -> np.ndarray:
        """`sum_j d fit_j / d y_j` of every fit, from fits of a signal that is moved along random signs.

        The standard deviation is about that of a mean of n such numbers. Source: Ramani, Blu and Unser, "Monte-Carlo
        SURE: a black-box optimization of regularization parameters for general denoising algorithms", IEEE Transactions
        on Image Processing 17 (2008), equation 16.
        """
        asked, rng, found = self._asked.at(self.weights[0]), np.random.default_rng(0), []
        given, flat = asked.values, (len(self), *asked.values.shape)
        step = MOVE * next((size for size in (self.noise, float(np.std(given))) if size > 0), 1.0)
        seen = 1 if asked.weights is None else asked.mass.reshape(-1, *(1 for _ in asked.channels)) > 0
        for _ in range(min(MOST_MOVES, -(-LARGE // len(given)))):
            signs = rng.choice([-1.0, 1.0], given.shape)
            moved = dataclasses.replace(asked, values=(given + step * signs).astype(given.dtype))
            with precision(asked.dtype):
                fits = descend(moved, self.weights, None)
            apart = fits.value.reshape(flat) - self.values.reshape(flat)
            found.append(np.sum((seen * signs * apart).reshape(len(self), -1), axis=1) / step)
        return np.maximum(np.mean(found, axis=0), 0)

    def _repr_html_(self) -> str:
        return self._html({"weights": self.weights, "relative duality gaps": self.gaps, "steps": self.steps})

    def at(self, index: int) -> TrendSolution:
        """One level as a `TrendSolution` without a state and a dual."""
        index = self.place(index)
        fields: Any = (self.values, self.statuses, self.steps, self.residuals, self.objectives, self.gaps)
        value, status, steps, residual, objective, gap = (field[index] for field in fields)
        nonzero = self._asked.geometry.list_rows(self._nonzero[index], self.order + 1)
        rest: Any = {"nonzero": nonzero, "graph": self.graph, "order": self.order}
        return TrendSolution(value, status, steps, residual, objective, gap, **rest)


def trend_path(
    y: Any,
    graph: Graph,
    penalty: Any = L1,
    order: int = 0,
    *,
    weights: Any = None,
    num: int = 50,
    ratio: float = 1e-3,
    tol: float | None = None,
    method: Any = "auto",
    max_steps: int = 20_000,
    node_weights: Any = None,
    missing: str = "error",
    dtype: Any = None,
    loss: Any = "square",
    observer: Observer | None = None,
) -> TrendPath:
    """Trend-filter fits along falling weights, from the one that leaves only the component means to nearly the signal.

    Args:
        y: as in `trend_filter`.
        graph: as in `trend_filter`.
        penalty: a penalty class such as `L1`, or a penalty whose `weight` is replaced at every level.
        order: k.
        weights: positive, in any order; None uses `num` weights, evenly spaced in the logarithm, from `largest_weight`
            to `ratio` times that. This works for L1, MCP and SCAD, whose means become stationary at the same weight,
            and for GroupL2, whose first weight is large enough but not the smallest; others need given weights.
        num: the number of weights.
        ratio: the last weight over the first.
        tol: of each level, as in `trend_filter`. None for 1e-4, and for 1e-8 on chains from order 1 on with `L1` and
            the square loss: there digits are cheap, and criteria count bends, which a coarse fit misses.
        method: as in `trend_filter`, for all levels; from order 1 on "auto" prefers an exact x-step, since most steps
            are spent while smoothing is strong.
        max_steps: step limit of each level.
        node_weights: as in `trend_filter`.
        missing: as in `trend_filter`.
        dtype: as in `trend_filter`.
        loss: as in `trend_filter`; the first fit is then the best constant of every component.
        observer: called with "weight", the number of finished levels and the number of levels, before each level.

    Returns:
        A `TrendPath`; it holds every fit, so it needs the memory of `num` signals.

    Example:
        >>> y = np.array([0.1, -0.1, 0.0, 5.1, 4.9, 5.0])
        >>> path = so.trend.trend_path(y, so.Graph.chain(6), num=4, ratio=2e-2).check()
        >>> path.weights.round(3).tolist()
        [7.5, 2.036, 0.553, 0.15]
        >>> path.degrees_of_freedom.tolist()
        [1, 2, 2, 2]
        >>> path.at(2).value.round(2).tolist()
        [0.18, 0.18, 0.18, 4.82, 4.82, 4.82]
    """
    template = template_of(penalty)
    options: Any = {"loss": check_scalar_loss(loss), "method": as_method(method), "tol": TOL if tol is None else tol}
    options["max_steps"] = max_steps
    asked = check_fit(y, graph, template, order, node_weights, missing, dtype, **options)
    geometry, square = asked.geometry, asked.square
    digits = asked.method is None and asked.is_l1 and square and asked.dtype == np.float64
    if tol is None and geometry.line and asked.order and digits:
        asked = dataclasses.replace(asked, tol=TOL_OF_LINES)
    if not (is_positive(ratio) and ratio < 1):
        raise ValueError(f"ratio, the last weight over the first, lies in (0, 1), given {ratio!r}")
    given = None if weights is None else _check_levels(weights, asked.dtype)
    num = whole_number("num", num, 1) if given is None else len(given)
    # The fits from the device, and as one array.
    needed, what = 2 * num * asked.values.nbytes, f"a path of {num:,} fits of {asked.values.size:,} values"
    require_memory(needed, what, "take fewer weights, or single fits")
    uncounted = geometry.refuses_count()
    if uncounted and not square:
        raise ValueError(f'{uncounted}, as a path with a loss needs them: take ends="graph", or single fits')
    if geometry.num_edges == 0:
        raise ValueError("the graph has no edges, so every weight gives the same fit, the signal itself")
    first = None
    if given is None:
        first = _first_fit(asked)
        given = float(first.weight.max()) * np.geomspace(1, ratio, num)
    noise = noise_of(asked) if square else math.nan
    with precision(asked.dtype):
        fits = descend(asked.at(given[0]), given, first, observer)
    columns, mass = asked.columns, asked.mass[:, None]
    flat = fits.value.reshape(num, *columns.shape)
    return TrendPath(
        *(given, fits.value.reshape(num, *asked.shape)),
        *(fits.objective, fits.gap, fits.residual, fits.steps, fits.status),
        deviances=np.array([np.sum(mass * node_deviances(asked.loss, x, columns)) for x in flat]),
        noise=noise,
        largest_weight=None if first is None else float(given[0]),
        graph=graph,
        _nonzero=fits.nonzero,
        _asked=asked,
    )


def refuses_criterion(criterion: str, loss: ScalarLoss) -> str | None:
    """Why a criterion does not choose among fits with this loss, or None."""
    if fits_odds(loss) and criterion in ("gcv", "aic"):
        return (
            f"{criterion} does not choose among fits of labels, whose deviance is 0 on every piece of one label: take "
            "cross-validation (cross_validate), or bic"
        )
    return core_path.refuses_criterion(criterion, loss)


def fits_odds(loss: Any) -> bool:
    """Whether it is the loss of labels by their probabilities."""
    return getattr(loss, "labels", False) and getattr(loss, "known_variance", False)


def template_of(penalty: Any) -> Any:
    """The penalty with the weight 1; a TypeError or ValueError if no path replaces its weight."""
    fields: Any = dataclasses.fields(penalty) if dataclasses.is_dataclass(penalty) else ()
    if "weight" not in [field.name for field in fields]:
        raise TypeError(
            f"a path replaces the penalty's `weight`, a field of a dataclass as in sparseopt.L1(1.0); given {penalty!r}"
        )
    if np.ndim(getattr(penalty, "weight", 0.0)):
        raise ValueError(
            f"a path replaces the penalty's weight by one number for all rows, given one of shape "
            f"{np.shape(penalty.weight)}; fit with weights of rows by `trend_filter`, or give them as weights of edges"
        )
    return penalty(1.0) if class_or_function(penalty) else dataclasses.replace(penalty, weight=1.0)


def _check_levels(weights: Any, kind: np.dtype) -> np.ndarray:
    levels = real_array("weights", weights).astype(np.float64)
    if levels.ndim != 1 or levels.size == 0:
        raise ValueError(f"weights are an array of at least one number, given the shape {levels.shape}")
    wrong = ~(np.isfinite(levels) & (levels > 0))
    if wrong.any():
        raise ValueError(f"weights are positive and finite, given {levels[wrong][0]} ({int(wrong.sum())} such)")
    require_representable(levels, kind)
    return np.sort(levels)[::-1]


def _first_fit(asked: Fit) -> NullFit:
    template = asked.penalty
    if not isinstance(template, (L1, MCP, SCAD, GroupL2)):
        raise ValueError(f"where a path of {template} begins is not known: give its weights")
    first = null_fit(asked, FIRST_WEIGHT_TOL)
    weight = float(first.weight.max())
    if isinstance(template, GroupL2):
        weight = float(np.sqrt(np.sum(first.dual**2, axis=template.axis)).max())
    if weight == 0:
        null = asked.geometry.null_name
        raise ValueError(f"the signal is {null}, so every weight gives the same fit, the signal itself")
    return first._replace(weight=np.array(weight))
