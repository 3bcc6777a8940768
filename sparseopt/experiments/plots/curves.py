"""Floor 7: curves, and histories of solves."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from sparseopt.core.problem import Solution
from sparseopt.experiments.plots.style import (
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
        axis: to draw on.
        xlabel: what x is, with its unit.
        ylabel: what y is, with its unit.
        logx: logarithmic x.
        logy: logarithmic y.
        markers: a marker at every point.
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
    """The curves as float arrays of one length each, positive on log axes."""
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
    """Solves step by step, from `solve(..., history=True)`.

    Gap and residual are on a log axis; so is the objective with a reference, drawn as
    `(objective - reference) / |reference|`. Between two checks of a solver (the trend filter checks every `cadence`
    steps) the objective is the last one found, and gap and residual are not finite; such steps are skipped. So are
    values of 0 or below on a log axis, where a solve has converged to rounding.

    Args:
        solutions: by label, each of one solve.
        quantity: "objective", "gap" or "residual".
        axis: to draw on.
        seconds: of each whole solve by label; x is then time, with the steps spread evenly over it.
        reference: the lowest objective known, not 0.
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
        x = np.arange(1.0, values.size + 1)
        if seconds is not None:
            if label not in seconds or not seconds[label] > 0:
                raise ValueError(f"seconds needs the positive time of {label!r}, given {dict(seconds)}")
            x = x * (seconds[label] / values.size)
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
        raise ValueError(f"{label!r} is a batch of {np.size(solution.steps)} solves: give each its own label")
    steps = int(solution.steps)
    if steps == 0:
        raise ValueError(f"the solution {label!r} took no steps: there is no history to draw")
    return np.asarray(getattr(solution.history, quantity), float)[:steps]
