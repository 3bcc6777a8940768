"""Floor 7: paths of solutions over the penalty weight, and how a level was chosen from one."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sparseopt.experiments.plots.style import (
    COLOURS,
    INK,
    as_numbers,
    axis_or_new,
    check_any,
    check_positive,
    line_style,
    tidy,
)
from sparseopt.trend.path import TrendPath
from sparseopt.trend.selection import CrossValidation, Selection

MOST_LINES = 12
NAMES = {"gcv": "GCV", "sure": "SURE, estimated mean squared error", "aic": "AIC", "bic": "BIC"}


def plot_path(
    weights: Any, values: Any, axis: Any = None, *, xlabel: str = "penalty weight", ylabel: str = "coefficient"
) -> Any:
    """A regularisation path: how each of n values moves with the penalty weight, on a log axis.

    Args:
        weights: positive `[num_weights]`, in any order.
        values: `[num_weights, n]`; their lines are labelled 0..n-1, without a legend.
        axis: to draw on.
        xlabel: what the weights are.
        ylabel: what the values are, with their unit.
    """
    level = as_numbers(weights, "weights", ("num_weights",))
    table = as_numbers(values, "values", (level.size, "n"))
    check_any(table.ravel(), "value")
    check_positive(level, "weights")
    axis = _log_axis(axis)
    axis.axhline(0, color=INK, linewidth=0.8, label="_zero")
    order = np.argsort(level, kind="stable")
    _draw_lines(axis, level[order], table[order], range(table.shape[1]))
    axis.set(xlabel=xlabel, ylabel=ylabel)
    return axis


def plot_fits(path: TrendPath, nodes: Sequence[int] | None = None, axis: Any = None) -> Any:
    """How the fit at some nodes moves with the weight.

    Args:
        path: of `trend_path`; of several channels the first is drawn.
        nodes: numbers in row-major order, or None for 12 spread evenly; lines are labelled by them.
        axis: to draw on.
    """
    table = path.values.reshape(len(path), path.values[0].size // path.channels, path.channels)[..., 0]
    count = table.shape[1]
    chosen = np.unique(np.linspace(0, count - 1, min(count, MOST_LINES)).astype(int)) if nodes is None else nodes
    wrong = [node for node in chosen if not 0 <= node < count]
    if wrong:
        raise ValueError(f"the signal has the nodes 0..{count - 1}, given {wrong[0]}")
    axis = _log_axis(axis)
    _draw_lines(axis, path.weights, table, chosen)
    axis.set(ylabel="fit at single nodes")
    return axis


def plot_degrees_of_freedom(path: TrendPath, axis: Any = None) -> Any:
    """The degrees of freedom at every level, on two log axes."""
    axis = _log_axis(axis)
    axis.plot(path.weights, path.degrees_of_freedom, color=COLOURS[0], linewidth=1.8, drawstyle="steps-mid")
    axis.set(ylabel="degrees of freedom", yscale="log")
    return axis


def plot_selection(selection: Selection, axis: Any = None) -> Any:
    """A criterion over the weights, its minimum marked; levels where it is not defined leave a gap."""
    axis = _log_axis(axis)
    axis.plot(selection.path.weights, selection.curve, color=COLOURS[0], linewidth=1.8, label="_curve")
    _mark(axis, selection.path, selection.index, "least")
    axis.set(ylabel=NAMES[selection.criterion])
    axis.legend(frameon=False)
    return axis


def plot_cross_validation(validation: CrossValidation, axis: Any = None) -> Any:
    """The error of the held-out nodes over the weights, with bars of one standard error, and both rules' levels."""
    axis = _log_axis(axis)
    bars = {"color": COLOURS[0], "linewidth": 1.8, "elinewidth": 0.9, "capsize": 2, "label": "_errors"}
    axis.errorbar(validation.path.weights, validation.errors, validation.standard_errors, **bars)
    _mark(axis, validation.path, validation.index_min, "least error")
    _mark(axis, validation.path, validation.index_one_se, "within one standard error", COLOURS[2], ":")
    axis.set(ylabel="mean squared error, held-out nodes")
    axis.legend(frameon=False)
    return axis


def _log_axis(axis: Any) -> Any:
    axis = axis_or_new(axis)
    axis.set(xlabel="penalty weight", xscale="log")
    tidy(axis)
    return axis


def _draw_lines(axis: Any, weights: np.ndarray, table: np.ndarray, columns: Iterable[int]) -> None:
    """The columns of a table `[num_weights, n]`, each labelled by its number."""
    for index, column in enumerate(columns):
        style = {**line_style(index), "linewidth": 1.2}
        axis.plot(weights, table[:, column], label=str(int(column)), **style)


def _mark(axis: Any, path: TrendPath, index: int, label: str, colour: str = COLOURS[5], dash: str = "--") -> None:
    text = f"{label}: {path.weights[index]:.3g}, df {path.degrees_of_freedom[index]}"
    axis.axvline(path.weights[index], color=colour, linestyle=dash, linewidth=1.4, label=text)
