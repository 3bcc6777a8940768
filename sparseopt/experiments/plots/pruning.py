"""Figures of pruning: errors by layer, perplexity and time by sparsity, perplexity by size."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseopt.experiments.plots import style
from sparseopt.experiments.plots.curves import plot_curves

if TYPE_CHECKING:  # its package loads the models, which need flax
    from sparseopt.pruning.base.records import LayerRecord

# By which a quantity is multiplied for its axis, and the label there.
SCALES = {"sparsity": (100, "sparsity (%)"), "parameters": (1e-6, "parameters (millions)")}


def plot_layer_errors(runs: "Mapping[str, Sequence[LayerRecord]]", axes: Any = None) -> Any:
    """Bars of the relative layer error, geometric means, by block (left) and by kind of layer (right).

    Args:
        runs: layer records by run label.
        axes: two axes to draw on.
    """
    axes = style.axes_or_new(axes, 2, 2, (12, 4.5), width_ratios=(2.2, 1), sharey=True)
    _grouped_bars(axes[0], runs, lambda r: r.block)
    _grouped_bars(axes[1], runs, lambda r: r.layer.rsplit(".", 1)[-1].removesuffix("_proj"))
    axes[0].set(xlabel="block", ylabel="relative output error", title="by block")
    axes[1].set(xlabel="linear", title="by kind of linear")
    axes[0].legend(frameon=False)
    return axes


def _grouped_bars(axis: Any, runs: "Mapping[str, Sequence[LayerRecord]]", group: Callable[[Any], Any]) -> None:
    width = 0.8 / len(runs)
    names = list(dict.fromkeys(group(r) for records in runs.values() for r in records))
    for index, (label, records) in enumerate(runs.items()):
        # Errors span decades, so the mean is the geometric one; a layer without error has no bar.
        errors = [[r.relative_error for r in records if group(r) == n and r.relative_error > 0] for n in names]
        heights = [float(np.exp(np.mean(np.log(e)))) if e else np.nan for e in errors]
        places = np.arange(len(names)) + (index - (len(runs) - 1) / 2) * width
        colour, hatch = style.COLOURS[index % len(style.COLOURS)], style.HATCHES[index % len(style.HATCHES)]
        axis.bar(places, heights, width, label=label, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
    ticks = range(0, len(names), max(1, len(names) // 10)) if len(names) > 12 else range(len(names))
    axis.set_xticks(list(ticks), [str(names[i]) for i in ticks])
    axis.set_yscale("log")
    axis.margins(x=0.02)
    style.tidy(axis, "y")


def plot_perplexity(
    curves: Mapping[str, tuple[Any, Any]], axis: Any = None, *, dense: float | None = None, of: str = "sparsity"
) -> Any:
    """Perplexity, on a log axis, by sparsity in per cent or by the number of parameters in millions.

    Args:
        curves: sparsity (fraction of zeros, 0 to 1) or parameters, and perplexity, both `[n]`, by label.
        axis: to draw on.
        dense: the perplexity of the model before pruning, drawn as a dashed line.
        of: "sparsity" or "parameters".
    """
    scale, xlabel = SCALES[of]
    axis = style.axis_or_new(axis)
    if dense is not None:
        axis.axhline(dense, color=style.INK, linestyle=(0, (4, 3)), linewidth=1.2, label="dense")
    lines = {label: (scale * np.asarray(x, float), y) for label, (x, y) in curves.items()}
    plot_curves(lines, axis, xlabel=xlabel, ylabel="perplexity", logy=True, markers=True)
    _plain_ticks(axis)
    return axis


def plot_comparison(
    curves: Mapping[str, tuple[Any, Any, Any]], axes: Any = None, *, dense: float | None = None
) -> np.ndarray:
    """Pruning methods side by side: perplexity (left) and time (right), both on log axes, by sparsity.

    A label has one colour, dash and marker in both panels, and one legend on the right.

    Args:
        curves: sparsity (fraction of zeros, 0 to 1), perplexity and seconds, all `[n]`, by label. A non-finite
            perplexity leaves a gap in its line.
        axes: two axes to draw on.
        dense: the perplexity of the model before pruning, drawn as a dashed line on the left.
    """
    axes = style.axes_or_new(axes, 2, 2, (12, 4.5))
    plot_perplexity({label: (x, y) for label, (x, y, _) in curves.items()}, axes[0], dense=dense)
    times = {label: (100 * np.asarray(x, float), seconds) for label, (x, _, seconds) in curves.items()}
    plot_curves(times, axes[1], xlabel="sparsity (%)", ylabel="time of the method (s)", logy=True, markers=True)
    _plain_ticks(axes[1])
    # Many lines leave no room in the panels.
    axes[0].get_legend().remove()
    lines = axes[0].get_legend_handles_labels()
    axes[1].legend(*lines, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, handlelength=2.8)
    return axes


def _plain_ticks(axis: Any) -> None:
    """A handful of ticks in plain numbers, for a log axis over per cent or millions."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_ylim()
    # Within one decade 1, 2, 5 would leave two ticks or fewer; over many decades, too many.
    decades = LogLocator(subs=(1, 2, 5) if high < 3000 * low else (1,))
    axis.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)) if high < 12 * low else decades)
    axis.xaxis.set_major_locator(MaxNLocator(8, steps=(1, 2, 5, 10), integer=True))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1000 else f"{v:g}"))
