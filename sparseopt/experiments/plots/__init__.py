"""Figures (extra `[plot]`).

Every function draws on the given matplotlib axes, or on the axes of a new figure, and returns them. matplotlib is
imported when something is drawn, and nothing here needs the models.
"""

from sparseopt.experiments.plots.curves import (
    plot_cross_validation,
    plot_curves,
    plot_degrees_of_freedom,
    plot_fits,
    plot_selection,
)
from sparseopt.experiments.plots.pruning import plot_comparison, plot_layer_errors, plot_perplexity
from sparseopt.experiments.plots.signals import (
    plot_chain,
    plot_graph_signal,
    plot_image,
)
from sparseopt.experiments.plots.style import COLOURS, save_figure

__all__ = [
    "COLOURS",
    "plot_chain",
    "plot_comparison",
    "plot_cross_validation",
    "plot_curves",
    "plot_degrees_of_freedom",
    "plot_fits",
    "plot_graph_signal",
    "plot_image",
    "plot_layer_errors",
    "plot_perplexity",
    "plot_selection",
    "save_figure",
]
