"""Pictures: what a person sees of each kind (data, limits, labels, units, legend), and the axes used."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from doge_convergence import legend_below
from doge_groups import plot_groups
from sparseopt import Graph
from sparseopt.experiments import plots
from sparseopt.pruning import LayerRecord

TRIANGLE = np.array([[0, 0], [1, 0], [0, 1]])
X, YEARS = np.arange(1, 5), np.arange(6) * 2 + 1950
VALUES = np.random.default_rng(0).normal(size=(3, 6))
GRID, PLACES = Graph.grid((2, 3)), np.random.default_rng(1).random((6, 2))
RGBA = np.array([[[0, 255, 51, 102]]], np.uint8)
COMPARED = {"best": ([0.5, 0.6], [30.0, 40.0], [9.0, 8.0]), "wanda": ([0.5, 0.6], [50.0, np.nan], [0.2, 0.1])}


def layers(level):
    figures = [(f"model.layers.{b}.mlp.{kind}_proj", level * 2.0**b, b) for b in range(3) for kind in ("up", "down")]
    return [LayerRecord(b, name, (4, 4), 16, 8, error, None, 1, "CONVERGED", 0, 0, 0, 9) for name, error, b in figures]


def texts(items):
    return [item.get_text() for item in items]


def drawn(axis, label):
    line = next(line for line in axis.lines if line.get_label() == label)
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def given(*arguments, **options):
    return arguments, options


@dataclass(frozen=True)
class Kind:
    """A picture: the function and what it is given, and what a person sees."""

    plot: Callable[..., Any]
    given: tuple[tuple[Any, ...], dict[str, Any]]
    labels: tuple[str, str] = ("", "")
    scales: tuple[str, str] = ("linear", "linear")
    lines: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    legend: list[str] | None = None
    # Of an image or a map.
    colours: Any = None
    limits: tuple[float, float] | None = None
    bar: str | None = None

    def draw(self, axis=None):
        arguments, options = self.given
        return self.plot(*arguments, axis=axis, **options)


RUNS = {f"run {i}": (X, X**i) for i in range(14)}
SHARES = {"maiht": ([0.5, 0.6, 0.7], [12.5, 14.0, 18.0])}
KINDS = {
    "curves": Kind(
        plots.plot_curves, given(RUNS, xlabel="nodes", ylabel="time (s)", logx=True, logy=True),
        ("nodes", "time (s)"), ("log", "log"), {"run 2": (X, X**2)}, list(RUNS),
    ),
    "chain": Kind(
        plots.plot_chain, given(VALUES[0], VALUES[1], truth=VALUES[2], positions=YEARS), ("position", "signal"),
        lines={label: (YEARS, values) for label, values in zip(("observed", "fit", "truth"), VALUES, strict=True)},
    ),
    "chain of nodes": Kind(plots.plot_chain, given(VALUES[0], VALUES[1]), ("node", "signal")),
    "graph": Kind(
        plots.plot_graph_signal, given(GRID, PLACES, VALUES[0], limits=(-1, 1), label="height (m)"),
        colours=VALUES[0], limits=(-1, 1), bar="height (m)",
    ),
    "graph without edges": Kind(
        plots.plot_graph_signal, given(GRID, PLACES, VALUES[0], edges=False),
        colours=VALUES[0], limits=(VALUES[0].min(), VALUES[0].max()),
    ),
    "colour image with its alpha": Kind(plots.plot_image, given(RGBA), colours=[[[0, 1, 0.2, 0.4]]]),
    "colour image between limits": Kind(
        plots.plot_image, given(RGBA[..., :3] * 2.0, limits=(0, 510)), colours=[[[0, 1, 0.2]]]
    ),
    "perplexity by size": Kind(
        plots.plot_perplexity, given({"best": ([9e7, 1e8], [20.0, 15.0])}, of="parameters"),
        ("parameters (millions)", "perplexity"), ("linear", "log"), {"best": ([90, 100], [20, 15])},
    ),
    "perplexity": Kind(
        plots.plot_perplexity, given(SHARES, dense=12.0), ("sparsity (%)", "perplexity"), ("linear", "log"),
        {"maiht": ([50, 60, 70], [12.5, 14, 18]), "dense": ([0, 1], [12, 12])}, ["dense", "maiht"],
    ),
}  # fmt: skip
# Grey images keep their values; the limits are those of the type, or of the values.
for image, limits in (
    (np.full((2, 3), 7, np.uint8), (0, 255)),
    (np.full((2, 3), 7, np.uint16), (0, 65535)),
    (np.array([[0.2, 0.4]]), (0, 1)),
    (np.array([[True, False]]), (0, 1)),
    (np.array([[-3.0, 9.0, np.nan]]), (-3, 9)),
    (np.array([[5.0, 5.0]]), (4.5, 5.5)),
):
    KINDS[f"image from {limits[0]} to {limits[1]} in {image.dtype}"] = Kind(
        plots.plot_image, given(image), colours=image.astype(float), limits=limits
    )
KINDS["image between limits"] = Kind(
    plots.plot_image, given([[-3.0, 9.0]], limits=(0, 2)), colours=[[-3, 9]], limits=(0, 2)
)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_person_sees_the_data_with_labels_and_limits_on_the_axis_given_or_a_new_one(kind):
    own = plt.figure().add_subplot()
    assert kind.draw(own) is own
    made = kind.draw()
    assert made.figure is not own.figure
    for axis in (own, made):
        assert axis.has_data()
        assert (axis.get_xlabel(), axis.get_ylabel()) == kind.labels
        assert (axis.get_xscale(), axis.get_yscale()) == kind.scales
        for label, (x, y) in kind.lines.items():
            np.testing.assert_allclose(drawn(axis, label), [x, y], rtol=1e-15, err_msg=label)
        if kind.legend:
            assert texts(axis.get_legend().get_texts()) == kind.legend
            assert not axis.get_legend().get_frame_on()
        if kind.colours is not None:
            shown = [*axis.images, *axis.collections][-1]
            np.testing.assert_allclose(np.ma.filled(shown.get_array(), np.nan), kind.colours, rtol=1e-15)
            assert kind.limits is None or shown.get_clim() == kind.limits
        assert not axis.images or len(axis.get_xticks()) == len(axis.get_yticks()) == 0
        bars = [other.get_ylabel() for other in axis.figure.axes if other is not axis]
        assert not kind.bar or bars == [kind.bar]
    made.figure.draw_without_rendering()


@pytest.mark.processes
def test_importing_needs_neither_matplotlib_nor_the_models():
    code = (
        "import sys; from sparseopt.experiments import plots; assert all(hasattr(plots, n) for n in plots.__all__)"
        "; found = {'matplotlib', 'flax', 'transformers'} & set(sys.modules); assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_curves_differ_in_colour_and_dash_or_in_markers_and_one_point_is_a_marker():
    axis = KINDS["curves"].draw()
    # get_linestyle() calls every custom dash "--"; what is drawn is the pattern.
    assert len({(line.get_color(), str(line._dash_pattern)) for line in axis.lines}) == 14
    assert {line.get_marker() for line in axis.lines} == {"None"}
    marked = plots.plot_curves({"a": (X, X), "b": (X, -X)}, markers=True)
    assert len({line.get_marker() for line in marked.lines} - {"None"}) == 2
    single = plots.plot_curves({"exact": ([1.0], [1e-15]), "others": ([1.0, 2.0], [1.0, 0.5])}, logy=True)
    assert [line.get_marker() for line in single.lines] == ["o", "None"]
    assert [line.get_linestyle() for line in KINDS["chain"].draw().lines] == ["None", "--", "-"]


@pytest.mark.parametrize("count", [1, 40])
def test_a_legend_below_panels_is_not_wider_than_their_figure(count):
    axes = plots.style.axes_or_new(None, 1, 1, (8, 4.7))
    plots.plot_curves({f"{i}{'x' * count}": ([1.0, 2.0], [i, i + 1.0]) for i in range(7)}, axes[0])
    legend_below(axes)
    (legend,) = axes[0].figure.legends
    axes[0].figure.draw_without_rendering()
    assert legend.get_window_extent().width <= axes[0].figure.bbox.width
    assert len(legend.get_texts()) == 7
    assert legend._ncols == (3 if count == 1 else 2)


def test_graphs_show_edges_and_titles_where_they_are_and_every_dot_whole():
    lines, dots = KINDS["graph"].draw().collections
    np.testing.assert_array_equal(np.array(lines.get_segments()), PLACES[GRID.edges])
    np.testing.assert_array_equal(dots.get_offsets(), PLACES)
    assert len(KINDS["graph without edges"].draw().collections) == 1
    assert plots.plot_image([[0.2, 0.4]], title="a title").get_title() == "a title"
    # On a flat graph.
    places = np.stack([np.arange(20.0), np.zeros(20)], axis=1)
    axis = plots.plot_graph_signal(Graph.chain(20), places, np.arange(20.0))
    axis.figure.canvas.draw()
    radius = axis.figure.dpi / 72 * np.sqrt(axis.collections[-1].get_sizes()[0]) / 2
    spots, frame = axis.transData.transform(places), axis.get_window_extent()
    assert (spots - radius >= frame.min).all()
    assert (spots + radius <= frame.max).all()


@pytest.mark.parametrize(("block", "panels"), [(1, 4), (2, 5), (3, 16)])
def test_groups_show_every_row_once_in_patches_that_do_not_meet(block, panels):
    axes = plot_groups((5, 6), block)
    assert axes.shape == (panels,)
    assert len({id(panel.figure) for panel in axes}) == 1
    counts = np.bincount(Graph.grid((5, 6)).groups(block))
    wanted = [f"group {i}: {n} row{'s' if n != 1 else ''}" for i, n in enumerate(counts, start=1)]
    assert [panel.get_title() for panel in axes] == wanted
    nodes = np.stack(np.divmod(np.arange(30), 6)[::-1], axis=1)
    for panel, count in zip(axes, counts, strict=True):
        patches = panel.collections[1].get_paths()
        assert len(patches) == count
        if block > 1:  # each node lies in one patch at most
            assert sum(patch.contains_points(nodes).astype(int) for patch in patches).max() == 1


def test_groups_of_a_chain_are_saved_with_a_title_and_closed(tmp_path):
    axes = plot_groups((6,), 1)
    np.testing.assert_array_equal(axes[1].collections[1].get_segments(), [[[1, 0], [2, 0]], [[3, 0], [4, 0]]])
    plt.close("all")
    axes = plot_groups((3, 3), 1)
    path = plots.save_figure(axes, tmp_path / "groups.png", "Groups")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert axes[0].figure.get_suptitle() == "Groups"
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("runs", "heights"),
    [
        ({"a": layers(1.0), "b": layers(3.0)}, [[1, 2, 4], [3, 6, 12]]),
        # A run with other blocks stands at its own.
        ({"a": layers(1.0), "b": layers(1.0)[4:]}, [[1, 2, 4], [np.nan, np.nan, 4]]),
    ],
)
def test_layer_errors_distinguish_runs_and_name_their_axes(runs, heights):
    given = plt.subplots(1, 2)[1]
    for axes in (plots.plot_layer_errors(runs), plots.plot_layer_errors(runs, given)):
        bars = np.array([bar.get_height() for bar in axes[0].patches]).reshape(2, 3)
        np.testing.assert_allclose(bars, heights)
        assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("block", "relative output error")
        assert texts(axes[0].get_xticklabels()) == ["0", "1", "2"]
        assert texts(axes[1].get_xticklabels()) == ["up", "down"]
        assert texts(axes[0].get_legend().get_texts()) == ["a", "b"]
    assert list(axes) == list(given)


@pytest.mark.parametrize(("top", "plain"), [(18.0, "14"), (9_000.0, "2,000"), (3e6, "1,000,000")])
def test_perplexity_is_labelled_in_plain_numbers(top, plain):
    axis = plots.plot_perplexity({"maiht": ([0.5, 0.6, 0.7], [12.5, 14.0, top])}, dense=12.0)
    axis.figure.canvas.draw()
    low, high = axis.get_ylim()
    labels = [t.get_text() for t in axis.get_yticklabels() if low <= t.get_position()[1] <= high]
    assert plain in labels
    assert 3 <= len(labels) <= 12


def test_a_comparison_shows_perplexity_and_time_in_one_style():
    left, right = plots.plot_comparison(COMPARED, dense=20.0)
    for label, (sparsity, score, seconds) in COMPARED.items():
        np.testing.assert_allclose(drawn(left, label), [np.multiply(sparsity, 100), score])
        np.testing.assert_allclose(drawn(right, label), [np.multiply(sparsity, 100), seconds])
        one, other = (next(line for line in axis.lines if line.get_label() == label) for axis in (left, right))
        assert (one.get_color(), one.get_marker()) == (other.get_color(), other.get_marker())
    assert (left.get_ylabel(), right.get_ylabel()) == ("perplexity", "time of the method (s)")
    assert left.get_yscale() == right.get_yscale() == "log"
    assert texts(right.get_legend().get_texts()) == ["dense", "best", "wanda"]
