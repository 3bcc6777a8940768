"""Pictures of pruning: the errors and perplexities drawn, and their axes."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from sparseopt.experiments import plots
from sparseopt.pruning import LayerRecord
from tests.experiments.test_plots import drawn, texts


def records(level):
    return [
        LayerRecord(
            b, f"model.layers.{b}.mlp.{k}_proj", (4, 4), 16, 8, level * 2.0**b, None, 1, "CONVERGED", 0, 0, 0, 9
        )
        for b in range(3)
        for k in ("up", "down")
    ]


def test_figures_distinguish_runs_and_name_their_axes():
    axes = plots.plot_layer_errors({"a": records(1.0), "b": records(3.0)})
    heights = np.array([bar.get_height() for bar in axes[0].patches]).reshape(2, 3)
    np.testing.assert_allclose(heights, [[1, 2, 4], [3, 6, 12]])
    assert axes[0].get_xlabel() == "block"
    assert axes[0].get_ylabel() == "relative output error"
    assert texts(axes[1].get_xticklabels()) == ["up", "down"]
    assert texts(axes[0].get_legend().get_texts()) == ["a", "b"]


def test_runs_with_other_blocks_stand_at_their_own_blocks():
    axes = plots.plot_layer_errors({"all": records(1.0), "last": records(1.0)[4:]}, plt.subplots(1, 2)[1])
    assert texts(axes[0].get_xticklabels()) == ["0", "1", "2"]
    heights = np.array([bar.get_height() for bar in axes[0].patches]).reshape(2, 3)
    np.testing.assert_allclose(heights, [[1, 2, 4], [np.nan, np.nan, 4]])
    with pytest.raises(ValueError, match="at least one run"):
        plots.plot_layer_errors({})
    with pytest.raises(ValueError, match="at least one layer record in the run 'a'"):
        plots.plot_layer_errors({"a": []})
    with pytest.raises(ValueError, match="2 panels and needs as many axes, given 1"):
        plots.plot_layer_errors({"a": records(1.0)}, plt.gca())


@pytest.mark.parametrize(("top", "plain"), [(18.0, "14"), (9_000.0, "2,000"), (3e6, "1,000,000")])
def test_perplexity_is_labelled_in_plain_numbers_and_per_cent(top, plain):
    axis = plots.plot_perplexity({"maiht": ([0.5, 0.6, 0.7], [12.5, 14.0, top])}, dense=12.0)
    x, y = drawn(axis.lines, "maiht")
    np.testing.assert_allclose(x, [50, 60, 70])
    np.testing.assert_array_equal(y, [12.5, 14, top])
    np.testing.assert_array_equal(drawn(axis.lines, "dense")[1], [12, 12])
    assert drawn(axis.lines, "dense")[0].tolist() == [0, 1]  # all of the width
    axis.figure.canvas.draw()
    low, high = axis.get_ylim()
    labels = [t.get_text() for t in axis.get_yticklabels() if low <= t.get_position()[1] <= high]
    assert plain in labels
    assert 3 <= len(labels) <= 12
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_yscale()) == ("sparsity (%)", "perplexity", "log")
    assert texts(axis.get_legend().get_texts()) == ["dense", "maiht"]


def test_perplexity_refuses_per_cent_and_what_has_no_logarithm():
    with pytest.raises(ValueError, match="a share of zeros from 0 to 1, given 50 in the curve 'a'"):
        plots.plot_perplexity({"a": ([50], [12.0])})
    with pytest.raises(ValueError, match="must be positive for a log axis, given 0"):
        plots.plot_perplexity({"a": ([0.5], [0.0])})
    with pytest.raises(ValueError, match="the dense perplexity must be positive"):
        plots.plot_perplexity({"a": ([0.5], [9.0])}, dense=-1.0)
