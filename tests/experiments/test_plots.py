"""Pictures: the data drawn, limits, labels and units, and the axes used."""

import subprocess
import sys

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

from sparseopt import L1, Graph, Solution, trend_filter
from sparseopt.core import Measure
from sparseopt.experiments import plots

TRIANGLE = np.array([[0, 0], [1, 0], [0, 1]])


@pytest.fixture
def axis():
    return plt.figure().add_subplot()


def solution(objective, gap=None, steps=None, max_steps=8):
    """A solve of which only the history matters: NaN beyond its steps."""
    steps = len(objective) if steps is None else steps

    def padded(values):
        return jnp.asarray([*values, *[np.nan] * (max_steps - len(values))])

    gap = objective if gap is None else gap
    history = Measure(padded(gap), padded(objective), padded(gap))
    return Solution(None, 0, jnp.asarray(steps), gap[-1], objective[-1], gap[-1], history, None)


def texts(items):
    return [item.get_text() for item in items]


def drawn(lines, label):
    line = next(line for line in lines if line.get_label() == label)
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def colour_bar_of(axis):
    return next(other for other in axis.figure.axes if other is not axis)


@pytest.mark.processes
def test_importing_needs_neither_matplotlib_nor_the_models():
    code = (
        "import sys; from sparseopt.experiments import plots; assert all(hasattr(plots, n) for n in plots.__all__)"
        "; found = {'matplotlib', 'flax', 'transformers'} & set(sys.modules); assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "draw",
    [
        lambda a: plots.plot_curves({"a": ([1, 2], [3, 4])}, a),
        lambda a: plots.plot_history({"a": solution([3.0, 2.0])}, "gap", a),
        lambda a: plots.plot_image(np.ones((2, 3)), a),
        lambda a: plots.plot_chain([1.0, 2.0], [1.0, 1.5], a),
        lambda a: plots.plot_graph_signal(Graph.chain(3), TRIANGLE, [1.0, 2.0, 3.0], a),
        lambda a: plots.plot_regions([TRIANGLE], [1.0], a),
        lambda a: plots.plot_lines([TRIANGLE], [1.0], a),
        lambda a: plots.plot_path([1.0, 2.0], np.ones((2, 3)), a),
        lambda a: plots.plot_perplexity({"a": ([0.5], [20.0])}, a),
    ],
)
def test_the_given_axis_comes_back_and_a_new_one_is_made_without(draw, axis):
    assert draw(axis) is axis
    assert axis.has_data()
    other = draw(None)
    assert other.figure is not axis.figure
    other.figure.canvas.draw()


def test_curves_differ_in_colour_and_dash_and_name_their_axes():
    x = np.arange(1, 5)
    axis = plots.plot_curves(
        {f"run {i}": (x, x**i) for i in range(14)}, xlabel="nodes", ylabel="time (s)", logx=True, logy=True
    )
    # get_linestyle() calls every custom dash "--"; what is drawn is the pattern.
    assert len({(line.get_color(), str(line._dash_pattern)) for line in axis.lines}) == 14
    np.testing.assert_array_equal(drawn(axis.lines, "run 2")[1], x**2)
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("nodes", "time (s)")
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert texts(axis.get_legend().get_texts()) == [f"run {i}" for i in range(14)]
    assert not axis.get_legend().get_frame_on()
    assert {line.get_marker() for line in axis.lines} == {"None"}
    marked = plots.plot_curves({"a": (x, x), "b": (x, -x)}, markers=True)
    assert len({line.get_marker() for line in marked.lines} - {"None"}) == 2


@pytest.mark.parametrize(
    ("curves", "options", "message"),
    [
        ({}, {}, "expected at least one curve, given none"),
        ({"a": ([1, 2], [1])}, {}, "'a' needs as many x as y, at least one, given 2 and 1"),
        ({"a": ([1, 2],)}, {}, "a pair"),
        ({"a": ([[1]], [1])}, {}, r"\[n\], given \[1, 1\]"),
        ({"a": ([1, 2], ["x", "y"])}, {}, "an array of numbers"),
        (
            {"a": ([1, 2], [3, -1])},
            {"logy": True},
            "y of curve 'a' must be positive for a log axis, given -1 at place 1",
        ),
        ({"a": ([0, 2], [3, -1])}, {"logx": True}, "x of curve 'a' must be positive for a log axis, given 0"),
    ],
)
def test_curves_refuse_what_they_cannot_draw(curves, options, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_curves(curves, **options)
    assert not plt.get_fignums()


def test_a_curve_of_one_point_is_a_marker():
    axis = plots.plot_curves({"exact": ([1.0], [1e-15]), "others": ([1.0, 2.0], [1.0, 0.5])}, logy=True)
    assert [line.get_marker() for line in axis.lines] == ["o", "None"]


@pytest.mark.parametrize("count", [1, 40])
def test_a_legend_below_panels_is_not_wider_than_their_figure(count):
    axes = plots.style.axes_or_new(None, 1, 1, (8, 4.7))
    plots.plot_curves({f"{i}{'x' * count}": ([1.0, 2.0], [i, i + 1.0]) for i in range(7)}, axes[0])
    plots.style.legend_below(axes)
    (legend,) = axes[0].figure.legends
    axes[0].figure.draw_without_rendering()
    assert legend.get_window_extent().width <= axes[0].figure.bbox.width
    assert len(legend.get_texts()) == 7
    assert legend._ncols == (3 if count == 1 else 2)


def test_history_draws_the_objective_up_to_the_last_step():
    axis = plots.plot_history({"a": solution([5.0, 4.0, 3.5]), "b": solution([5.0, -1.0])})
    x, y = drawn(axis.lines, "a")
    np.testing.assert_array_equal(x, [1, 2, 3])
    np.testing.assert_array_equal(y, [5, 4, 3.5])
    np.testing.assert_array_equal(drawn(axis.lines, "b")[1], [5, -1])
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_yscale()) == ("step", "objective", "linear")


def test_history_of_the_trend_filter_has_the_gaps_that_were_measured(rng):
    y = rng.normal(size=30).astype(np.float32)
    found = trend_filter(
        y, Graph.chain(30), L1(1.0), 1, {"name": "doge", "cadence": 5}, tol=1e-3, max_steps=100, history=True
    )
    steps, gaps = int(found.steps), np.asarray(found.history.gap)
    kept = np.flatnonzero(np.isfinite(gaps[:steps]) & (gaps[:steps] > 0))
    axis = plots.plot_history({"doge": found}, "gap")
    x, drawn_gaps = drawn(axis.lines, "doge")
    np.testing.assert_array_equal(x, kept + 1)
    np.testing.assert_array_equal(drawn_gaps, gaps[kept].astype(float))
    assert (x % 5 == 0).all()
    assert (axis.get_ylabel(), axis.get_yscale()) == ("relative duality gap", "log")
    objective = drawn(plots.plot_history({"doge": found}).lines, "doge")[1]
    measured = np.asarray(found.history.objective, float)[:steps]
    np.testing.assert_array_equal(objective, measured[np.isfinite(measured)])


def test_history_against_time_and_a_reference():
    axis = plots.plot_history({"a": solution([6.0, 4.0, 3.0, 2.0])}, seconds={"a": 2.0}, reference=2.0)
    x, y = drawn(axis.lines, "a")
    np.testing.assert_allclose(x, [0.5, 1, 1.5])  # the last step reached the reference
    np.testing.assert_allclose(y, [2, 1, 0.5])
    assert (axis.get_xlabel(), axis.get_yscale()) == ("time (s)", "log")
    assert "reference" in axis.get_ylabel()
    below = plots.plot_history({"a": solution([-1.0, -2.0])}, reference=-4.0)
    np.testing.assert_allclose(drawn(below.lines, "a")[1], [0.75, 0.5])


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({}, {}, "at least one solution"),
        ({"a": Solution(None, 0, 3, 0, 0, 0, None, None)}, {}, "'a' has no history: solve it with history=True"),
        ({"a": solution([1.0])}, {"quantity": "speed"}, "unknown quantity 'speed'; known are objective, gap, residual"),
        ({"a": solution([1.0], [np.nan])}, {"quantity": "gap"}, "'a' has no positive finite gap in 1 steps"),
        ({"a": solution([1.0], steps=0)}, {}, "took no steps"),
        ({"a": solution([1.0], steps=[1, 1])}, {}, "a batch of 2 solves"),
        ({"a": solution([1.0])}, {"seconds": {"b": 1.0}}, "the positive time of 'a'"),
        ({"a": solution([1.0])}, {"reference": 2.0}, "falls below the reference 2 by 0.5"),
        ({"a": solution([1.0])}, {"reference": 0.0}, "other than 0"),
        ({"a": solution([1.0])}, {"quantity": "gap", "reference": 1.0}, "for 'gap'"),
    ],
)
def test_history_refuses_what_it_cannot_draw(given, options, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_history(given, **options)


def test_path_draws_every_coefficient_in_the_order_of_the_weights(rng):
    values = rng.normal(size=(3, 4))
    axis = plots.plot_path([1.0, 100.0, 10.0], values, ylabel="effect (mm)")
    for index in range(4):
        x, y = drawn(axis.lines, str(index))
        np.testing.assert_array_equal(x, [1, 10, 100])
        np.testing.assert_array_equal(y, values[[0, 2, 1], index])
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_xscale()) == ("penalty weight", "effect (mm)", "log")
    with pytest.raises(ValueError, match=r"values has the shape \[2, n\], given \[3, 4\]"):
        plots.plot_path([1.0, 2.0], values)
    with pytest.raises(ValueError, match="weights must be positive for a log axis, given 0 at place 1"):
        plots.plot_path([1.0, 0.0, 2.0], values)


@pytest.mark.parametrize(
    ("image", "limits", "expected"),
    [
        (np.full((2, 3), 7, np.uint8), None, (0, 255)),
        (np.full((2, 3), 7, np.uint16), None, (0, 65535)),
        (np.array([[0.2, 0.4]]), None, (0, 1)),
        (np.array([[True, False]]), None, (0, 1)),
        (np.array([[-3.0, 9.0, np.nan]]), None, (-3, 9)),
        (np.array([[5.0, 5.0]]), None, (4.5, 5.5)),
        (np.array([[-3.0, 9.0]]), (0, 2), (0, 2)),
    ],
)
def test_grey_images_keep_their_values_and_limits(image, limits, expected):
    axis = plots.plot_image(image, title="a title", limits=limits)
    assert axis.images[0].get_clim() == expected
    np.testing.assert_array_equal(np.ma.filled(axis.images[0].get_array(), np.nan), image.astype(float))
    assert axis.get_title() == "a title"
    assert len(axis.get_xticks()) == len(axis.get_yticks()) == 0


def test_colour_images_are_scaled_and_keep_their_alpha():
    rgba = np.array([[[0, 255, 51, 102]]], np.uint8)
    np.testing.assert_allclose(plots.plot_image(rgba).images[0].get_array(), [[[0, 1, 0.2, 0.4]]])
    grown = plots.plot_image(rgba[..., :3] * 2.0, limits=(0, 510)).images[0].get_array()
    np.testing.assert_allclose(grown, [[[0, 1, 0.2]]])
    for wrong in (np.zeros((2, 2, 2)), np.zeros(4), np.zeros((0, 3)), np.array([["a"]])):
        with pytest.raises(ValueError, match=r"has the shape \[height, width\]"):
            plots.plot_image(wrong)
    with pytest.raises(ValueError, match="low < high, given \\(1, 1\\)"):
        plots.plot_image(rgba, limits=(1, 1))
    with pytest.raises(ValueError, match="finite numbers"):
        plots.plot_image(np.full((1, 1, 3), np.nan))
    with pytest.raises(ValueError, match="no finite value among 1"):
        plots.plot_image(np.array([[np.nan]]))


def test_a_chain_has_dots_a_fit_and_a_truth(rng):
    observed, fit, truth = rng.normal(size=(3, 6))
    axis = plots.plot_chain(observed, fit, truth=truth, positions=np.arange(6) * 2 + 1950)
    for label, values in (("observed", observed), ("fit", fit), ("truth", truth)):
        x, y = drawn(axis.lines, label)
        np.testing.assert_array_equal(y, values)
        np.testing.assert_array_equal(x, np.arange(6) * 2 + 1950)
    assert [line.get_linestyle() for line in axis.lines] == ["None", "--", "-"]
    assert axis.get_xlabel() == "position"
    assert plots.plot_chain(observed, fit).get_xlabel() == "node"
    with pytest.raises(ValueError, match=r"fit has the shape \[6\], given \[5\]"):
        plots.plot_chain(observed, fit[:5])
    with pytest.raises(ValueError, match="must ascend, given 1 and then 1 at place 1"):
        plots.plot_chain(observed, fit, positions=[0, 1, 1, 2, 3, 4])
    with pytest.raises(ValueError, match="at least one node"):
        plots.plot_chain([], [])


def test_a_graph_has_an_edge_collection_and_coloured_nodes(rng):
    graph, places, signal = Graph.grid((3, 4)), rng.random((12, 2)), rng.normal(size=12)
    axis = plots.plot_graph_signal(graph, places, signal, limits=(-1, 1), label="height (m)")
    lines, dots = axis.collections
    np.testing.assert_array_equal(np.array(lines.get_segments()), places[graph.edges])
    np.testing.assert_array_equal(dots.get_offsets(), places)
    np.testing.assert_array_equal(dots.get_array(), signal)
    assert dots.get_clim() == (-1, 1)
    assert colour_bar_of(axis).get_ylabel() == "height (m)"
    bare = plots.plot_graph_signal(graph, places, signal, edges=False)
    assert len(bare.collections) == 1
    assert bare.collections[0].get_clim() == (signal.min(), signal.max())


def test_every_dot_of_a_flat_graph_lies_inside_its_axis():
    places = np.stack([np.arange(20.0), np.zeros(20)], axis=1)
    axis = plots.plot_graph_signal(Graph.chain(20), places, np.arange(20.0))
    axis.figure.canvas.draw()
    radius = axis.figure.dpi / 72 * np.sqrt(axis.collections[-1].get_sizes()[0]) / 2
    spots, frame = axis.transData.transform(places), axis.get_window_extent()
    assert (spots - radius >= frame.min).all()
    assert (spots + radius <= frame.max).all()


def test_a_graph_refuses_what_does_not_fit_its_nodes():
    graph, places = Graph.chain(3), TRIANGLE
    with pytest.raises(ValueError, match=r"positions has the shape \[3, 2\], given \[3, 3\]"):
        plots.plot_graph_signal(graph, np.zeros((3, 3)), np.zeros(3))
    with pytest.raises(ValueError, match=r"signal has the shape \[3\], given \[4\]"):
        plots.plot_graph_signal(graph, places, np.zeros(4))
    with pytest.raises(ValueError, match="no finite value among 3"):
        plots.plot_graph_signal(graph, places, np.full(3, np.nan))
    with pytest.raises(ValueError, match=r"must be finite, given .* at place 1"):
        plots.plot_graph_signal(graph, [[0, 0], [np.inf, 0], [1, 1]], np.zeros(3))


def test_all_outlines_of_a_region_have_its_value():
    square = [(0, 0), (1, 0), (1, 1), (0, 1)]
    axis = plots.plot_regions([TRIANGLE, [TRIANGLE + 2, square], square], [3.0, 5.0, np.nan], label="cases (%)")
    drawn_map = axis.collections[0]
    np.testing.assert_array_equal(np.ma.filled(drawn_map.get_array(), np.nan), [3, 5, 5, np.nan])
    np.testing.assert_array_equal(drawn_map.get_paths()[1].vertices[:3], TRIANGLE + 2)
    assert drawn_map.get_clim() == (3, 5)
    assert colour_bar_of(axis).get_ylabel() == "cases (%)"
    assert plots.plot_regions([TRIANGLE], [3.0], limits=(0, 9)).collections[0].get_clim() == (0, 9)
    with pytest.raises(ValueError, match=r"values has the shape \[1\], given \[2\]"):
        plots.plot_regions([TRIANGLE], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"region 0 has the shape \[m, 2\], given \[3, 3\]"):
        plots.plot_regions([np.zeros((3, 3))], [1.0])
    with pytest.raises(ValueError, match="an outline of 2 points"):
        plots.plot_regions([TRIANGLE[:2]], [1.0])
    with pytest.raises(ValueError, match="at least one region"):
        plots.plot_regions([], [])
    with pytest.raises(ValueError, match="at least one outline in region 0"):
        plots.plot_regions([[]], [1.0])


def test_lines_on_a_map_show_the_high_values_above_the_others():
    axis = plots.plot_lines([TRIANGLE, TRIANGLE + 2, TRIANGLE[:2]], [5.0, np.nan, 3.0], label="cases")
    (drawn,) = axis.collections
    np.testing.assert_array_equal(np.ma.filled(drawn.get_array(), np.nan), [np.nan, 3, 5])
    np.testing.assert_array_equal(drawn.get_segments()[-1], TRIANGLE)
    assert colour_bar_of(axis).get_ylabel() == "cases"
    with pytest.raises(ValueError, match=r"values has the shape \[1\], given \[2\]"):
        plots.plot_lines([TRIANGLE], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least one line"):
        plots.plot_lines([], [])


@pytest.mark.parametrize(("block", "panels"), [(1, 4), (2, 5), (3, 16)])
def test_groups_show_every_row_once_in_patches_that_do_not_meet(block, panels):
    axes = plots.plot_groups((5, 6), block)
    assert axes.shape == (panels,)
    assert len({id(panel.figure) for panel in axes}) == 1
    graph = Graph.grid((5, 6))
    counts = np.bincount(graph.groups(block))
    wanted = [f"group {i}: {n} row{'s' if n != 1 else ''}" for i, n in enumerate(counts, start=1)]
    assert [panel.get_title() for panel in axes] == wanted
    nodes = np.stack(np.divmod(np.arange(30), 6)[::-1], axis=1)
    for panel, count in zip(axes, counts, strict=True):
        patches = panel.collections[1].get_paths()
        assert len(patches) == count
        if block > 1:  # each node lies in one patch at most
            assert sum(patch.contains_points(nodes).astype(int) for patch in patches).max() == 1


def test_groups_of_a_chain_fill_the_axes_they_are_given():
    given = plt.subplots(1, 2)[1]
    axes = plots.plot_groups((6,), 1, given)
    assert list(axes) == list(given)
    np.testing.assert_array_equal(axes[1].collections[1].get_segments(), [[[1, 0], [2, 0]], [[3, 0], [4, 0]]])
    assert plots.plot_groups((3, 3), 2, columns=2)[4].get_gridspec().ncols == 2
    for shape, block, message in [
        ((2, 2, 2), 1, "1 or 2 axes"),
        ((1,), 1, "2 to 400 nodes"),
        ((100, 100), 1, r"given the shape \(100, 100\)"),
        ((3, 3), 4, "1, 2 or 3 difference factors, given 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            plots.plot_groups(shape, block)
    with pytest.raises(ValueError, match="4 panels and needs as many axes, given 2"):
        plots.plot_groups((3, 3), 1, given)
    with pytest.raises(ValueError, match="columns must be 1 or more, given 0"):
        plots.plot_groups((3, 3), 1, columns=0)


def test_a_saved_figure_is_titled_written_and_closed(tmp_path):
    axes = plots.plot_groups((3, 3), 1)
    path = plots.save_figure(axes, tmp_path / "groups.png", "Groups")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert axes[0].figure.get_suptitle() == "Groups"
    assert not plt.get_fignums()
