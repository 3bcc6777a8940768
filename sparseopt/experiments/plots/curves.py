"""Line plots: any curves, and paths over the penalty weight with the chosen level."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparseopt.core.losses.scalar import Squared
from sparseopt.core.path import Levels
from sparseopt.core.select import CrossValidation, Selection
from sparseopt.experiments.plots import style
from sparseopt.trend.paths.path import TrendPath

MOST_LINES = 12
CRITERIA = {"gcv": "GCV", "sure": "SURE, estimated mean squared error", "aic": "AIC", "bic": "BIC"}


def plot_curves(
    curves: Mapping[str, tuple[Any, Any]],
    axis: Any = None,
    *,
    xlabel: str = "",
    ylabel: str = "",
    logx: bool = False,
    logy: bool = False,
    markers: bool = False,
) -> Any:
    """Labelled lines that differ in colour and dash.

    Args:
        curves: x and y, both `[n]`, by label. A non-finite value leaves a gap in its line.
        axis: to draw on.
        xlabel: what x is, with its unit.
        ylabel: what y is, with its unit.
        logx: logarithmic x.
        logy: logarithmic y.
        markers: a marker at every point; a curve of one point always has one.
    """
    axis = style.axis_or_new(axis)
    for index, (label, (x, y)) in enumerate(curves.items()):
        # A line through one point is invisible.
        axis.plot(x, y, label=label, **style.line_style(index, markers or len(x) == 1))
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if logx:
        axis.set_xscale("log")
    if logy:
        axis.set_yscale("log")
    style.tidy(axis)
    style.legend(axis)
    return axis


def plot_fits(path: TrendPath, nodes: Sequence[int] | None = None, axis: Any = None) -> Any:
    """How the fit at some nodes moves with the weight.

    Args:
        path: result of `trend_path`; the first of several channels is drawn.
        nodes: numbers in row-major order, or None for 12 spread evenly; lines are labelled by them.
        axis: to draw on.
    """
    table = path.values.reshape(len(path), path.values[0].size // path.channels, path.channels)[..., 0]
    count = table.shape[1]
    chosen = np.unique(np.linspace(0, count - 1, min(count, MOST_LINES)).astype(int)) if nodes is None else nodes
    if wrong := [node for node in chosen if not 0 <= node < count]:
        raise ValueError(f"the signal has the nodes 0..{count - 1}, given {wrong[0]}")
    axis = _log_axis(axis)
    for index, node in enumerate(chosen):
        axis.plot(path.weights, table[:, node], label=str(int(node)), **{**style.line_style(index), "linewidth": 1.2})
    axis.set(ylabel="fit at single nodes")
    return axis


def plot_degrees_of_freedom(path: Levels, axis: Any = None) -> Any:
    """The degrees of freedom at every level, on two log axes."""
    axis = _log_axis(axis)
    axis.plot(path.levels, path.degrees_of_freedom, color=style.COLOURS[0], linewidth=1.8, drawstyle="steps-mid")
    axis.set(ylabel="degrees of freedom", yscale="log")
    return axis


def plot_selection(selection: Selection[Any], axis: Any = None) -> Any:
    """A criterion over the levels, with its minimum marked; levels at which it is undefined leave a gap."""
    axis = _log_axis(axis)
    axis.plot(selection.path.levels, selection.curve, color=style.COLOURS[0], linewidth=1.8, label="_curve")
    _mark(axis, selection.path, selection.index, "least")
    axis.set(ylabel=CRITERIA[selection.criterion])
    axis.legend(frameon=False)
    return axis


def plot_cross_validation(validation: CrossValidation[Any], axis: Any = None) -> Any:
    """The error of what was held out over the levels, with bars of one standard error, and two rules' levels."""
    axis = _log_axis(axis)
    bars = {"color": style.COLOURS[0], "linewidth": 1.8, "elinewidth": 0.9, "capsize": 2, "label": "_errors"}
    axis.errorbar(validation.path.levels, validation.errors, validation.standard_errors, **bars)
    _mark(axis, validation.path, validation.index_by("min"), "least error")
    _mark(axis, validation.path, validation.index_by("one_se"), "within one standard error", style.COLOURS[2], ":")
    error = "mean squared error" if isinstance(validation.path.loss, Squared) else "mean deviance"
    axis.set(ylabel=f"{error}, held out")
    axis.legend(frameon=False)
    return axis


def _log_axis(axis: Any) -> Any:
    axis = style.axis_or_new(axis)
    axis.set(xlabel="penalty weight", xscale="log")
    style.tidy(axis)
    return axis


def _mark(axis: Any, path: Levels, index: int, label: str, colour: str = style.COLOURS[5], dash: str = "--") -> None:
    text = f"{label}: {path.levels[index]:.3g}"
    with contextlib.suppress(ValueError):  # of penalties whose degrees of freedom are not known
        text += f", df {path.degrees_of_freedom[index]:.0f}"
    axis.axvline(path.levels[index], color=colour, linestyle=dash, linewidth=1.4, label=text)
