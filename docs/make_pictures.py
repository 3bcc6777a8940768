"""Pictures for the pages: `python docs/make_pictures.py [readme] [trend]` fills docs/pictures.

`readme` needs the counties (`pip install --no-deps bokeh-sampledata`) and shows the records of `make bench-quality`.
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from benchmark_pictures import draw_quality
from matplotlib.tri import Triangulation
from PIL import Image
from records import read, select
from scipy.sparse import csr_array
from scipy.spatial import Delaunay

import sparseopt as so
from sparseopt.experiments.datasets import load_counties
from sparseopt.experiments.plots.signals import plot_regions

FOLDER = Path(__file__).resolve().parent / "pictures"


def readme_picture() -> None:
    """A map before and after smoothing, and the perplexity of pruned models."""
    counties = load_counties()
    y: Any = counties.signal
    fit = so.trend_filter(y, counties.graph, so.L1(2.0), order=0).check()
    figure, axes = plt.subplot_mosaic(
        [["measured", "perplexity"], ["smoothed", "perplexity"]], figsize=(11, 5.6), layout="constrained"
    )
    unit = counties.unit.replace(" in", ",")
    for title, values in (("measured", y), ("smoothed", fit.value)):
        plot_regions(counties.polygons, values, axes[title], limits=(3.0, 15.0), label=unit)
        axes[title].set_title(f"unemployment in 2009, {title}")
    axis = axes["perplexity"]
    draw_quality(axis, read("quality"), select(read("prune"), "dense perplexity")[0]["value"])
    axis.set_title("SmolLM2-135M, pruned")
    axis.set_ylabel("perplexity on WikiText-2")
    save(figure, "readme.png")


def trend_picture() -> None:
    """The graph of the landing page: truth, noisy signal, fit."""
    rng = np.random.default_rng(0)
    places = rng.random((2000, 2))
    truth = 3.0 * (np.hypot(*(places - 0.5).T) < 0.3) + 1.5 * (places[:, 0] > 0.7)
    y = truth + rng.standard_normal(2000)
    delaunay = Delaunay(places)
    starts, neighbours = delaunay.vertex_neighbor_vertices
    graph = so.Graph.from_scipy(csr_array((np.ones(neighbours.size), neighbours, starts)))
    fit = so.trend_filter(y, graph, so.L1(0.9), order=0, tol=1e-5).check()
    mesh = Triangulation(*places.T, delaunay.simplices)
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
    panels = (("truth", truth), ("observed, noise 1", y), ("fit, order 0, weight 0.9", fit.value))
    drawn: Any = None
    for axis, (title, values) in zip(axes, panels, strict=True):
        axis.triplot(mesh, color="0.85", linewidth=0.5, zorder=0)
        drawn = axis.scatter(*places.T, c=values, s=12, linewidths=0, cmap="viridis", vmin=-1, vmax=5)
        axis.set(title=title, aspect="equal", xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.85, extend="both", ticks=range(-1, 6))
    bar.set_label("signal on the nodes")
    save(figure, "trend.png")


def save(figure: Any, name: str) -> None:
    """Write a figure with 256 colours, a quarter of the size."""
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / name, dpi=110)
    plt.close(figure)
    with Image.open(FOLDER / name) as image:
        small = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small.save(FOLDER / name, optimize=True)


if __name__ == "__main__":
    plt.switch_backend("Agg")
    plt.rcParams["font.size"] = 13  # readable when a narrow page shows the picture at half its size
    makers = {"readme": readme_picture, "trend": trend_picture}
    for name in sys.argv[1:] or makers:
        makers[name]()
