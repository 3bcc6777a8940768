"""Figures: what a person sees of each kind (data, limits, labels, units, legend), and the axes used."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

import sparseopt as so
from doge_groups import plot_groups
from sparseopt import Graph
from sparseopt.experiments import plots
from sparseopt.experiments.plots.signals import before_and_after
from sparseopt.pruning import LayerRecord

X, YEARS = np.arange(1, 5), np.arange(6) * 2 + 1950
VALUES = np.random.default_rng(0).normal(size=(3, 6))
GRID, PLACES = Graph.grid((2, 3)), np.random.default_rng(1).random((6, 2))
RGBA = np.array([[[0, 255, 51, 102]]], np.uint8)
RUNS = {f"run {i}": (X, X**i) for i in range(14)}
SHARES = {"maiht": ([0.5, 0.6, 0.7], [12.5, 14.0, 18.0])}
SIGNAL = {"observed": (YEARS, VALUES[0]), "fit": (YEARS, VALUES[1]), "truth": (YEARS, VALUES[2])}


def texts(items):
    return [item.get_text() for item in items]


def seen(axis):
    """What a person sees on an axis."""
    bars = [other.get_ylabel() for other in axis.figure.axes if other is not axis]
    found = {
        "labels": (axis.get_xlabel(), axis.get_ylabel()),
        "scales": (axis.get_xscale(), axis.get_yscale()),
        "lines": {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines},
        "legend": texts(axis.get_legend().get_texts()) if axis.get_legend() else [],
        "bar": bars[-1] if bars else None,
    }
    for shown in (*axis.images, *axis.collections):  # the last of them has colours
        found |= {"colours": np.ma.filled(shown.get_array(), np.nan), "limits": shown.get_clim()}
    return found


def drawn(function, *arguments, **options):
    return lambda axis=None: function(*arguments, axis=axis, **options)


# A figure, and what is seen.
KINDS = {
    "curves": (
        drawn(plots.plot_curves, RUNS, xlabel="nodes", ylabel="time (s)", logx=True, logy=True),
        {"labels": ("nodes", "time (s)"), "scales": ("log", "log"), "lines": RUNS, "legend": list(RUNS)},
    ),
    "chain": (
        drawn(plots.plot_chain, VALUES[0], VALUES[1], truth=VALUES[2], positions=YEARS),
        {"labels": ("position", "signal"), "scales": ("linear", "linear"), "lines": SIGNAL},
    ),
    "chain with marks": (
        drawn(plots.plot_chain, VALUES[0], VALUES[1], truth=VALUES[2], positions=YEARS, marks=[1]),
        {"lines": SIGNAL | {"jump or bend": ([YEARS[1]] * 2, [0, 1])}},
    ),
    "chain of nodes": (drawn(plots.plot_chain, VALUES[0], VALUES[1]), {"labels": ("node", "signal")}),
    "graph": (
        drawn(plots.plot_graph_signal, GRID, PLACES, VALUES[0], limits=(-1, 1), label="height (m)"),
        {"colours": VALUES[0], "limits": (-1, 1), "bar": "height (m)"},
    ),
    "graph without edges": (
        drawn(plots.plot_graph_signal, GRID, PLACES, VALUES[0], edges=False),
        {"colours": VALUES[0], "limits": (VALUES[0].min(), VALUES[0].max())},
    ),
    "perplexity by size": (
        drawn(plots.plot_perplexity, {"best": ([9e7, 1e8], [20.0, 15.0])}, of="parameters"),
        {"labels": ("parameters (millions)", "perplexity"), "lines": {"best": ([90, 100], [20, 15])}},
    ),
    "perplexity": (
        drawn(plots.plot_perplexity, SHARES, dense=12.0),
        {
            "labels": ("sparsity (%)", "perplexity"), "scales": ("linear", "log"), "legend": ["dense", "maiht"],
            "lines": {"maiht": ([50, 60, 70], [12.5, 14, 18]), "dense": ([0, 1], [12, 12])},
        },
    ),
    # Colours keep their alpha. Grey values stay; the limits are those of the type, of fractions, or of the values.
    "RGBA": (drawn(plots.plot_image, RGBA), {"colours": [[[0, 1, 0.2, 0.4]]], "labels": ("", "")}),
    "RGB": (drawn(plots.plot_image, RGBA[..., :3] * 2.0, limits=(0, 510)), {"colours": [[[0, 1, 0.2]]]}),
}  # fmt: skip
for image, limits, asked in (
    (np.full((2, 3), 7, np.uint8), (0, 255), None),
    (np.full((2, 3), 7, np.uint16), (0, 65535), None),
    (np.array([[0.2, 0.4]]), (0, 1), None),
    (np.array([[True, False]]), (0, 1), None),
    (np.array([[-3.0, 9.0, np.nan]]), (-3, 9), None),
    (np.array([[5.0, 5.0]]), (4.5, 5.5), None),
    (np.array([[-3.0, 9.0]]), (0, 2), (0, 2)),
):
    name, expected = f"{image.dtype} image to {limits[1]}", {"colours": image.astype(float), "limits": limits}
    KINDS[name] = drawn(plots.plot_image, image, limits=asked), expected


@pytest.mark.parametrize(("draw", "expected"), KINDS.values(), ids=KINDS)
def test_a_person_sees_the_data_with_labels_and_limits_on_the_axis_given_or_a_new_one(draw, expected):
    own, made = plt.figure().add_subplot(), draw()
    assert draw(own) is own
    assert made.figure is not own.figure
    for axis in (own, made):
        found = seen(axis)
        for name, value in expected.items():
            if name == "colours":
                np.testing.assert_allclose(found[name], value, rtol=1e-15)
            elif name == "lines":
                assert found[name].keys() == value.keys()
                for label, (x, y) in value.items():
                    np.testing.assert_allclose(found[name][label], [x, y], rtol=1e-15, err_msg=label)
            else:
                assert found[name] == value
        assert not axis.images or len(axis.get_xticks()) == len(axis.get_yticks()) == 0


def test_curves_differ_in_colour_and_dash_or_in_markers_and_one_point_is_a_marker():
    axis = KINDS["curves"][0]()
    # get_linestyle() calls every custom dash "--"; what is drawn is the pattern.
    assert len({(line.get_color(), str(line._dash_pattern)) for line in axis.lines}) == 14
    assert {line.get_marker() for line in axis.lines} == {"None"}
    marked = plots.plot_curves({"a": (X, X), "b": (X, -X)}, markers=True)
    assert len({line.get_marker() for line in marked.lines} - {"None"}) == 2
    single = plots.plot_curves({"exact": ([1.0], [1e-15]), "others": ([1.0, 2.0], [1.0, 0.5])}, logy=True)
    assert [line.get_marker() for line in single.lines] == ["o", "None"]
    assert [line.get_linestyle() for line in KINDS["chain"][0]().lines] == ["None", "--", "-"]


def test_graphs_show_edges_where_they_are_and_every_dot_whole():
    lines, dots = KINDS["graph"][0]().collections
    np.testing.assert_array_equal(np.array(lines.get_segments()), PLACES[GRID.edges])
    np.testing.assert_array_equal(dots.get_offsets(), PLACES)
    assert len(KINDS["graph without edges"][0]().collections) == 1
    # On a flat graph.
    places = np.stack([np.arange(20.0), np.zeros(20)], axis=1)
    axis = plots.plot_graph_signal(Graph.chain(20), places, np.arange(20.0))
    axis.figure.canvas.draw()
    radius = axis.figure.dpi / 72 * np.sqrt(axis.collections[-1].get_sizes()[0]) / 2
    spots, frame = axis.transData.transform(places), axis.get_window_extent()
    assert (spots - radius >= frame.min).all()
    assert (spots + radius <= frame.max).all()


def test_groups_show_every_row_once_in_patches_that_do_not_meet_and_are_saved_with_a_title(tmp_path):
    axes, nodes = plot_groups((4, 5), 2), np.stack(np.divmod(np.arange(20), 5)[::-1], axis=1)
    counts = np.bincount(Graph.grid((4, 5)).groups(2))
    titles = [f"group {i}: {n} row{'s' if n != 1 else ''}" for i, n in enumerate(counts, start=1)]
    assert [panel.get_title() for panel in axes] == titles
    for panel, count in zip(axes, counts, strict=True):
        patches = panel.collections[1].get_paths()
        assert len(patches) == count
        # Each node lies in one patch at most.
        assert sum(patch.contains_points(nodes).astype(int) for patch in patches).max() == 1
    path = plots.save_figure(axes, tmp_path / "groups.png", "Groups")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert axes[0].figure.get_suptitle() == "Groups"
    assert not plt.get_fignums()


def layers(level):
    figures = [(f"model.layers.{b}.mlp.{kind}_proj", level * 2.0**b, b) for b in range(3) for kind in ("up", "down")]
    return [LayerRecord(b, name, (4, 4), 16, 8, error, None, 1, "CONVERGED", 0, 0, 0, 9) for name, error, b in figures]


def test_layer_errors_distinguish_runs_and_name_their_axes():
    # A run with other blocks stands at its own.
    runs, heights = {"a": layers(1.0), "b": layers(3.0)[4:]}, [[1, 2, 4], [np.nan, np.nan, 12]]
    given = plt.subplots(1, 2)[1]
    for axes in (plots.plot_layer_errors(runs), plots.plot_layer_errors(runs, given)):
        bars = np.array([bar.get_height() for bar in axes[0].patches]).reshape(2, 3)
        np.testing.assert_allclose(bars, heights)
        np.testing.assert_allclose([bar.get_height() for bar in axes[1].patches], [2, 2, 12, 12])
        assert seen(axes[0])["labels"] == ("block", "relative output error")
        assert texts(axes[0].get_xticklabels()) == ["0", "1", "2"]
        assert texts(axes[1].get_xticklabels()) == ["up", "down"]
        assert seen(axes[0])["legend"] == ["a", "b"]
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
    compared = {"best": ([0.5, 0.6], [30.0, 40.0], [9.0, 8.0]), "wanda": ([0.5, 0.6], [50.0, np.nan], [0.2, 0.1])}
    left, right = plots.plot_comparison(compared, dense=20.0)
    for label, (_, score, seconds) in compared.items():
        np.testing.assert_allclose(seen(left)["lines"][label], [[50, 60], score])
        np.testing.assert_allclose(seen(right)["lines"][label], [[50, 60], seconds])
        one, other = (next(line for line in axis.lines if line.get_label() == label) for axis in (left, right))
        assert (one.get_color(), one.get_marker()) == (other.get_color(), other.get_marker())
    assert (left.get_ylabel(), right.get_ylabel()) == ("perplexity", "time of the method (s)")
    assert seen(left)["scales"] == seen(right)["scales"] == ("linear", "log")
    assert seen(right)["legend"] == ["dense", "best", "wanda"]


def test_pictures_show_the_chosen_levels():
    y, chain = np.repeat([0.0, 4.0, 1.0], 20) + np.random.default_rng(5).standard_normal(60), so.Graph.chain(60)
    path = so.trend.trend_path(y, chain, num=15, tol=1e-6)
    validated, best = so.cross_validate(path), so.select(path, "bic", 1.0)
    axis = plots.plot_selection(best)
    (curve,) = [line for line in axis.lines if line.get_label() == "_curve"]
    np.testing.assert_array_equal(curve.get_ydata(), best.curve)
    assert [line.get_xdata()[0] for line in axis.lines if "least" in line.get_label()] == [best.weight]
    axis = plots.plot_cross_validation(validated)
    marks = {line.get_xdata()[0] for line in axis.lines if "df" in str(line.get_label())}
    assert marks == {path.weights[validated.index_by(rule)] for rule in ("min", "one_se")}
    np.testing.assert_array_equal(plots.plot_degrees_of_freedom(path).lines[0].get_ydata(), path.degrees_of_freedom)
    axis = plots.plot_fits(path, [3, 50])
    np.testing.assert_array_equal(axis.lines[1].get_ydata(), path.values[:, 50])
    assert plots.plot_fits(path, axis=axis) is axis
    with pytest.raises(ValueError, match=r"nodes 0..59, given 60"):
        plots.plot_fits(path, [60])


def shown(folder, image, *names):
    """The pixels of a figure that has an image twice."""
    before_and_after(image, image, folder / "shown.png", *names)
    return plt.imread(folder / "shown.png")[..., :3]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_the_figure_is_drawn_for_any_number_of_channels(tmp_path, rng, channels):
    assert np.ptp(shown(tmp_path, rng.integers(0, 255, (8, 8, channels), dtype=np.uint8))) == 1


def test_a_pixel_that_is_not_known_leaves_the_others_on_the_picture(tmp_path, rng):
    image = rng.uniform(0, 255, (8, 8))
    image[0, 0] = np.nan
    assert np.mean(shown(tmp_path, image).min(axis=2) < 0.99) > 0.5


@pytest.mark.parametrize(("kind", "low", "high"), [(np.int16, -1000, 1500), (np.uint16, 0, 4095), (float, -3.0, -1.0)])
def test_a_scan_fills_the_greys_of_its_figure(tmp_path, kind, low, high):
    image = np.full((8, 8), low, kind)
    image[:, 4:] = high
    grey = shown(tmp_path, image, ("$\\frac$", "after"))[..., 0]
    # The middles of the four halves, in the lower part of the figure.
    row = grey[len(grey) // 2]
    np.testing.assert_allclose(row[np.array([1, 3, 5, 7]) * len(row) // 8], [0, 1, 0, 1], atol=0.01)
