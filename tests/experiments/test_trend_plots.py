"""Figures of signals, images and chosen weights show their numbers."""

import matplotlib
import matplotlib.image
import numpy as np
import pytest

import sparseopt as so
from sparseopt.experiments.plots import plot_cross_validation, plot_degrees_of_freedom, plot_fits, plot_selection
from sparseopt.experiments.plots.signals import before_and_after

matplotlib.use("agg")


def test_pictures_show_the_chosen_levels():
    y, chain = np.repeat([0.0, 4.0, 1.0], 20) + np.random.default_rng(5).standard_normal(60), so.Graph.chain(60)
    path = so.trend.trend_path(y, chain, num=15, tol=1e-6)
    validated, best = so.cross_validate(path), so.select(path, "bic", 1.0)
    axis = plot_selection(best)
    (curve,) = [line for line in axis.lines if line.get_label() == "_curve"]
    np.testing.assert_array_equal(curve.get_ydata(), best.curve)
    assert [line.get_xdata()[0] for line in axis.lines if "least" in line.get_label()] == [best.weight]
    axis = plot_cross_validation(validated)
    marks = {line.get_xdata()[0] for line in axis.lines if "df" in str(line.get_label())}
    assert marks == {path.weights[validated.index_by(rule)] for rule in ("min", "one_se")}
    np.testing.assert_array_equal(plot_degrees_of_freedom(path).lines[0].get_ydata(), path.degrees_of_freedom)
    axis = plot_fits(path, [3, 50])
    np.testing.assert_array_equal(axis.lines[1].get_ydata(), path.values[:, 50])
    assert plot_fits(path, axis=axis) is axis
    with pytest.raises(ValueError, match=r"nodes 0..59, given 60"):
        plot_fits(path, [60])


@pytest.fixture
def shown(tmp_path):
    """The pixels of a figure of two images."""

    def draw(*images_and_names):
        before_and_after(*images_and_names[:2], tmp_path / "shown.png", *images_and_names[2:])
        return matplotlib.image.imread(tmp_path / "shown.png")[..., :3]

    return draw


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_the_figure_is_drawn_for_any_number_of_channels(rng, shown, channels):
    image = rng.integers(0, 255, (8, 8, channels), dtype=np.uint8)
    assert np.ptp(shown(image, image)) == 1


def test_a_pixel_that_is_not_known_leaves_the_others_on_the_picture(rng, shown):
    image = rng.uniform(0, 255, (8, 8))
    image[0, 0] = np.nan
    assert np.mean(shown(image, image).min(axis=2) < 0.99) > 0.5


@pytest.mark.parametrize(("kind", "low", "high"), [(np.int16, -1000, 1500), (np.uint16, 0, 4095), (float, -3.0, -1.0)])
def test_a_scan_fills_the_greys_of_its_figure(shown, kind, low, high):
    image = np.full((8, 8), low, kind)
    image[:, 4:] = high
    grey = shown(image, image, ("$\\frac$", "after"))[..., 0]
    # The middles of the four halves, in the lower part of the figure.
    row = grey[len(grey) // 2]
    np.testing.assert_allclose(row[np.array([1, 3, 5, 7]) * len(row) // 8], [0, 1, 0, 1], atol=0.01)
