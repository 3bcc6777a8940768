"""Floor 7: pictures (extra `[plot]`). Functions draw on matplotlib axes, given or new, and return them.

matplotlib is imported when something is drawn, and nothing here needs the models.
"""

from sparseopt.experiments.plots.curves import plot_curves, plot_history, plot_path
from sparseopt.experiments.plots.pruning import (
    plot_comparison,
    plot_layer_errors,
    plot_perplexity,
    plot_weight_sparsity,
)
from sparseopt.experiments.plots.signals import (
    plot_chain,
    plot_graph_signal,
    plot_groups,
    plot_image,
    plot_regions,
)
from sparseopt.experiments.plots.style import COLOURS, save_figure

__all__ = [
    "COLOURS",
    "plot_chain",
    "plot_comparison",
    "plot_curves",
    "plot_graph_signal",
    "plot_groups",
    "plot_history",
    "plot_image",
    "plot_layer_errors",
    "plot_path",
    "plot_perplexity",
    "plot_regions",
    "plot_weight_sparsity",
    "save_figure",
]
