"""Floor 7: lines: curves, histories of solves, regularisation paths."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from sparseopt.core.problem import Solution
from sparseopt.experiments.plots.style import (
    INK,
    as_numbers,
    axis_or_new,
    check_any,
    check_positive,
    legend,
    line_style,
    tidy,
)

Quantity = Literal["objective", "gap", "residual"]
LABELS = {"objective": "objective", "gap": "relative duality gap", "residual": "residual"}
# How far, relative to the reference, rounding may take an objective below it.
ROUNDING = 1e-5


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
        curves: x and y, both `[n]`, by label. A value that is not finite leaves a gap in its line.
        axis: to draw on, or None for a new figure.
        xlabel: what x is, with its unit.
        ylabel: what y is, with its unit.
        logx: logarithmic x.
        logy: logarithmic y.
        markers: a marker at every point.

    Returns:
        The axis.

    Raises:
        ValueError: without curves, for x and y of different lengths, or for values <= 0 on a log axis.
    """
    lines = checked_curves(curves, logx, logy)
    axis = axis_or_new(axis)
    for index, (label, (x, y)) in enumerate(lines.items()):
        axis.plot(x, y, label=label, **line_style(index, markers))
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if logx:
        axis.set_xscale("log")
    if logy:
        axis.set_yscale("log")
    tidy(axis)
    legend(axis)
    return axis


def checked_curves(
    curves: Mapping[str, tuple[Any, Any]], logx: bool = False, logy: bool = False
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The curves as float arrays; raises what `plot_curves` does."""
    check_any(curves, "curve")
    lines = {}
    for label, pair in curves.items():
        if len(pair) != 2:
            raise ValueError(f"curve {label!r} must be a pair (x, y), given {len(pair)} parts")
        x = as_numbers(pair[0], f"x of curve {label!r}", ("n",))
        y = as_numbers(pair[1], f"y of curve {label!r}", ("n",))
        if x.size != y.size or x.size == 0:
            raise ValueError(f"curve {label!r} needs as many x as y, at least one, given {x.size} and {y.size}")
        if logx:
            check_positive(x, f"x of curve {label!r}")
        if logy:
            check_positive(y, f"y of curve {label!r}")
        lines[label] = (x, y)
    return lines


def plot_history(
    solutions: Mapping[str, Solution],
    quantity: Quantity = "objective",
    axis: Any = None,
    *,
    seconds: Mapping[str, float] | None = None,
    reference: float | None = None,
) -> Any:
    """How solves went, step by step: from `solve(..., history=True)`.

    Gap and residual are on a log axis; so is the objective with a reference, drawn as
    `(objective - reference) / |reference|`. Between two checks of a solver (the trend filter checks at every
    `cadence`-th step) the objective is the last one found; a gap or a residual is not finite there, and such
    steps are passed over. So are values of 0 or below on a log axis: the solve has arrived, to rounding.

    Args:
        solutions: by label, each of one solve.
        quantity: "objective", "gap" or "residual".
        axis: to draw on, or None for a new figure.
        seconds: of each whole solve by label; then x is time, the steps spread evenly over it.
        reference: the lowest objective known, not 0.

    Returns:
        The axis.

    Raises:
        ValueError: for a solution without history or without a finite value of the quantity, a missing label in
            `seconds`, or an objective below the reference.
    """
    if quantity not in LABELS:
        raise ValueError(f"unknown quantity {quantity!r}; known are {', '.join(LABELS)}")
    if reference is not None and (quantity != "objective" or not np.isfinite(reference) or reference == 0):
        raise ValueError(
            f"a reference is a finite objective other than 0 for the quantity 'objective', given {reference} for "
            f"{quantity!r}"
        )
    check_any(solutions, "solution")
    logy = quantity != "objective" or reference is not None
    curves = {}
    for label, solution in solutions.items():
        values = _recorded(label, solution, quantity)
        steps = np.arange(1, values.size + 1)
        if reference is not None:
            values = (values - reference) / abs(reference)
            lowest = float(np.min(values, initial=np.inf, where=np.isfinite(values)))
            if lowest < -ROUNDING:
                raise ValueError(
                    f"the objective of {label!r} falls below the reference {reference:g} by {-lowest:.2g} of it: "
                    "give the lowest objective known"
                )
        shown = np.isfinite(values) & (values > 0) if logy else np.isfinite(values)
        if not shown.any():
            raise ValueError(
                f"{label!r} has no {'positive ' if logy else ''}finite {quantity} in {values.size} steps: nothing to "
                "draw (a solver without a certificate has no gap)"
            )
        x = steps * (_seconds_of(label, seconds) / values.size) if seconds is not None else steps
        curves[label] = (x[shown], values[shown])
    return plot_curves(
        curves,
        axis,
        xlabel="step" if seconds is None else "time (s)",
        ylabel=LABELS[quantity] if reference is None else "(objective − reference) / |reference|",
        logy=logy,
    )


def _recorded(label: str, solution: Solution, quantity: str) -> np.ndarray:
    if solution.history is None:
        raise ValueError(f"the solution {label!r} has no history: solve it with history=True")
    if np.ndim(solution.steps) != 0:
        raise ValueError(f"{label!r} is a batch of {np.size(solution.steps)} solves: give each a label of its own")
    steps = int(solution.steps)
    if steps == 0:
        raise ValueError(f"the solution {label!r} took no steps: there is no history to draw")
    return np.asarray(getattr(solution.history, quantity), float)[:steps]


def _seconds_of(label: str, seconds: Mapping[str, float]) -> float:
    if label not in seconds or not seconds[label] > 0:
        raise ValueError(f"seconds needs the positive time of {label!r}, given {dict(seconds)}")
    return float(seconds[label])


def plot_path(
    weights: Any, values: Any, axis: Any = None, *, xlabel: str = "penalty weight", ylabel: str = "coefficient"
) -> Any:
    """A regularisation path: how each of n values moves with the penalty weight, on a log axis.

    Args:
        weights: positive `[num_weights]`, in any order.
        values: `[num_weights, n]`.
        axis: to draw on, or None for a new figure.
        xlabel: what the weights are.
        ylabel: what the values are, with their unit.

    Returns:
        The axis; its lines are labelled 0..n-1, without a legend.

    Raises:
        ValueError: for other shapes or weights that are not positive.
    """
    level = as_numbers(weights, "weights", ("num_weights",))
    table = as_numbers(values, "values", (level.size, "n"))
    check_any(table.ravel(), "value")
    check_positive(level, "weights")
    order = np.argsort(level, kind="stable")
    axis = axis_or_new(axis)
    axis.axhline(0, color=INK, linewidth=0.8, label="_zero")
    for index, line in enumerate(table.T):
        axis.plot(level[order], line[order], label=str(index), **{**line_style(index), "linewidth": 1.2})
    axis.set_xscale("log")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    tidy(axis)
    return axis
