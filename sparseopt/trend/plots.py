"""Floor 5: pictures of a path and of how a level was chosen from it; needs the `plot` extra."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparseopt.trend.path import TrendPath
from sparseopt.trend.selection import CrossValidation, Selection

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
DASHES = ("-", "--", "-.", ":")
INK = "#333333"
MOST_LINES = 12
NAMES = {"gcv": "GCV", "sure": "SURE, estimated mean squared error", "aic": "AIC", "bic": "BIC"}


def plot_fits(path: TrendPath, nodes: Sequence[int] | None = None, axis: Any = None) -> Any:
    """How the fit at some nodes moves with the weight.

    Args:
        path: of `trend_path`; of several channels the first is drawn.
        nodes: numbers in row-major order, or None for 12 spread evenly.
        axis: to draw on, or None for a new figure.

    Returns:
        The axis; its lines are labelled by node.

    Raises:
        ValueError: for a node that the signal has not.
    """
    table = path.values.reshape(len(path), path.values[0].size // path.channels, path.channels)[..., 0]
    count = table.shape[1]
    chosen = np.unique(np.linspace(0, count - 1, min(count, MOST_LINES)).astype(int)) if nodes is None else nodes
    wrong = [node for node in chosen if not 0 <= node < count]
    if wrong:
        raise ValueError(f"the signal has the nodes 0..{count - 1}, given {wrong[0]}")
    axis = _log_axis(axis)
    for index, node in enumerate(chosen):
        style = {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)], "linewidth": 1.2}
        axis.plot(path.weights, table[:, node], label=str(int(node)), **style)
    axis.set(ylabel="fit at single nodes")
    return axis


def plot_degrees_of_freedom(path: TrendPath, axis: Any = None) -> Any:
    """The degrees of freedom of every level, on two log axes.

    Args:
        path: of `trend_path`.
        axis: to draw on, or None for a new figure.

    Returns:
        The axis.
    """
    axis = _log_axis(axis)
    axis.plot(path.weights, path.degrees_of_freedom, color=COLOURS[0], linewidth=1.8, drawstyle="steps-mid")
    axis.set(ylabel="degrees of freedom", yscale="log")
    return axis


def plot_selection(selection: Selection, axis: Any = None) -> Any:
    """A criterion over the weights, its least value marked; levels where it is not defined leave a gap.

    Args:
        selection: of `select`.
        axis: to draw on, or None for a new figure.

    Returns:
        The axis.
    """
    axis = _log_axis(axis)
    axis.plot(selection.path.weights, selection.curve, color=COLOURS[0], linewidth=1.8, label="_curve")
    _mark(axis, selection.path, selection.index, "least")
    axis.set(ylabel=NAMES[selection.criterion])
    axis.legend(frameon=False)
    return axis


def plot_cross_validation(validation: CrossValidation, axis: Any = None) -> Any:
    """The error of the held-out nodes over the weights, with bars of one standard error, and both rules' levels.

    Args:
        validation: of `cross_validate`.
        axis: to draw on, or None for a new figure.

    Returns:
        The axis.
    """
    axis = _log_axis(axis)
    weights = validation.path.weights
    bars = {"color": COLOURS[0], "linewidth": 1.8, "elinewidth": 0.9, "capsize": 2, "label": "_errors"}
    axis.errorbar(weights, validation.errors, validation.standard_errors, **bars)
    _mark(axis, validation.path, validation.index_min, "least error")
    _mark(axis, validation.path, validation.index_one_se, "within one standard error", COLOURS[2], ":")
    axis.set(ylabel="mean squared error, held-out nodes")
    axis.legend(frameon=False)
    return axis


def _log_axis(axis: Any) -> Any:
    """The axis given or that of a new figure, with weights along it."""
    if axis is None:
        import matplotlib.pyplot as plt

        axis = plt.subplots(figsize=(6, 4), layout="constrained")[1]
    axis.set(xlabel="penalty weight", xscale="log")
    axis.grid(which="major", alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return axis


def _mark(axis: Any, path: TrendPath, index: int, label: str, colour: str = COLOURS[5], dash: str = "--") -> None:
    text = f"{label}: {path.weights[index]:.3g}, df {path.degrees_of_freedom[index]}"
    axis.axvline(path.weights[index], color=colour, linestyle=dash, linewidth=1.4, label=text)
