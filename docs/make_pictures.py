"""Pictures for the README and the landing page: `python docs/make_pictures.py` fills docs/pictures."""

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

FOLDER = Path(__file__).resolve().parent / "pictures"


def draw_graph(figure: Any, axes: list[Any], **bar: Any) -> None:
    """The graph of the landing page: truth, noisy signal, fit; the last of these if there are fewer axes."""
    rng = np.random.default_rng(0)
    places = rng.random((2000, 2))
    truth = 3.0 * (np.hypot(*(places - 0.5).T) < 0.3) + 1.5 * (places[:, 0] > 0.7)
    y = truth + rng.standard_normal(2000)
    delaunay = Delaunay(places)
    starts, neighbours = delaunay.vertex_neighbor_vertices
    graph = so.Graph.from_scipy(csr_array((np.ones(neighbours.size), neighbours, starts)))
    fit = so.trend_filter(y, graph, so.L1(0.9), order=0, tol=1e-5).check()
    mesh = Triangulation(*places.T, delaunay.simplices)
    panels = (("truth", truth), ("observed, noise 1", y), ("fit, order 0, weight 0.9", fit.value))
    drawn: Any = None
    for axis, (title, values) in zip(axes, panels[-len(axes) :], strict=True):
        axis.triplot(mesh, color="0.85", linewidth=0.5, zorder=0)
        drawn = axis.scatter(*places.T, c=values, s=12, linewidths=0, cmap="viridis", vmin=-1, vmax=5)
        axis.set(title=title, aspect="equal", xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.colorbar(drawn, ax=axes, extend="both", ticks=range(-1, 6), label="signal on the nodes", **bar)


def save(figure: Any, name: str) -> None:
    """Write a figure with 256 colours, a quarter of the size."""
    figure.savefig(FOLDER / name, dpi=110)
    with Image.open(FOLDER / name) as image:
        small = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small.save(FOLDER / name, optimize=True)


if __name__ == "__main__":
    plt.switch_backend("Agg")
    plt.rcParams["font.size"] = 13  # readable when a narrow page shows the picture at half its size
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
    draw_graph(figure, list(axes), shrink=0.85)
    save(figure, "trend.png")
    figure, by_name = plt.subplot_mosaic(
        [["observed", "perplexity"], ["fit", "perplexity"]],
        figsize=(11, 6.4),
        width_ratios=[1, 1.9],
        layout="constrained",
    )
    draw_graph(figure, [by_name["observed"], by_name["fit"]], location="left", shrink=0.7)
    draw_quality(by_name["perplexity"], read("quality"), select(read("prune"), "dense perplexity")[0]["value"])
    by_name["perplexity"].set(title="SmolLM2-135M, pruned", ylabel="perplexity on WikiText-2")
    save(figure, "readme.png")
