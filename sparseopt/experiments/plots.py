"""Floor 7: pictures (extra `[plot]`). Functions draw on matplotlib axes that they are given or make."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.pruning.reports import LayerRecord

# Distinguishable with any colour vision and in grey print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def plot_layer_errors(runs: Mapping[str, Sequence[LayerRecord]], axes: Any = None) -> Any:
    """Bars of the relative layer error, geometric means, by block (left) and by kind of linear (right).

    Args:
        runs: records by the run's label.
        axes: two axes to draw on, or None for a new figure.

    Returns:
        The two axes.
    """
    import matplotlib.pyplot as plt

    if axes is None:
        _, axes = plt.subplots(1, 2, figsize=(12, 4.5), width_ratios=(2.2, 1), sharey=True, layout="constrained")
    _grouped_bars(axes[0], runs, lambda r: r.block)
    _grouped_bars(axes[1], runs, lambda r: r.layer.rsplit(".", 1)[-1].removesuffix("_proj"))
    axes[0].set(xlabel="block", ylabel="relative output error", title="by block")
    axes[1].set(xlabel="linear", title="by kind of linear")
    axes[0].legend(frameon=False)
    return axes


def _grouped_bars(axis: Any, runs: Mapping[str, Sequence[LayerRecord]], group: Any) -> None:
    width = 0.8 / len(runs)
    for index, (label, records) in enumerate(runs.items()):
        names = list(dict.fromkeys(group(r) for r in records))
        # Errors span decades, so the mean is the geometric one; a layer without error has no bar.
        errors = [[r.relative_error for r in records if group(r) == n and r.relative_error > 0] for n in names]
        heights = [float(np.exp(np.mean(np.log(e)))) if e else np.nan for e in errors]
        places = np.arange(len(names)) + (index - (len(runs) - 1) / 2) * width
        axis.bar(places, heights, width, label=label, color=COLOURS[index % len(COLOURS)])
    ticks = range(0, len(names), max(1, len(names) // 10)) if len(names) > 12 else range(len(names))
    axis.set_xticks(list(ticks), [str(names[i]) for i in ticks])
    axis.set_yscale("log")
    axis.grid(axis="y", which="both", alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def save_figure(axes: Any, path: Path, title: str) -> Path:
    """Give the axes' figure a title, write it, close it."""
    import matplotlib.pyplot as plt

    figure = np.ravel(axes)[0].figure
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
