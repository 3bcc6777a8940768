"""The commands `denoise` and `trend`: what they read, print and write."""

import itertools
import json
import re
import sys

import numpy as np
import pytest
from scipy.optimize import isotonic_regression

import sparseopt as so
from sparseopt.experiments.config import expand
from sparseopt.experiments.plots.signals import observed_and_fit
from sparseopt.experiments.read.images import read_image, write_image
from tests.system.pages import whole_page

TIMES = np.cumsum(np.random.default_rng(0).uniform(0.2, 2, 30))
LINE = 3 + 2 * TIMES
STEPS = np.repeat([1.0, 5.0, 2.0], 10) + 0.3 * np.random.default_rng(1).standard_normal(30)


@pytest.fixture
def fit(tmp_path, command):
    """`sparseopt trend` of a signal: what it said, the lines of `fit.csv`, and its summary."""

    def run(*options, signal=None, heading="", weight=5.0):
        if signal is not None:
            np.savetxt(tmp_path / "y.csv", signal, delimiter=",", header=heading, comments="")
        output, level = tmp_path / "fit.csv", () if weight is None else ("--weight", weight)
        call = ("trend", "--signal", tmp_path / "y.csv", *level, "--output", output, "--force", *options)
        status, *said = command(*call)
        assert status == 0, said
        return "".join(said), output.read_text().splitlines(), json.loads((tmp_path / "fit-summary.json").read_text())

    return run


def numbers(lines):
    return np.array([line.split(",") for line in lines[1:]], float).T


def test_denoise_writes_image_picture_and_summary(tmp_path, done, command):
    clean = np.where(np.arange(32) < 16, 60, 190) * np.ones((24, 1))
    noisy = np.clip(clean + np.random.default_rng(0).normal(0, 15, clean.shape), 0, 255).astype(np.uint8)
    write_image(tmp_path / "noisy.png", noisy)
    calm = tmp_path / "calm.png"
    call = ["denoise", tmp_path / "noisy.png", "--weight", 20, "--output", calm]
    out = done(*call)
    assert "CONVERGED: relative duality gap" in out
    assert re.search(r"done in \d+ s \(noise about 1\d(\.\d)?, weight 20\)", out)
    assert np.abs(read_image(calm) - clean).mean() < 4 < np.abs(noisy - clean).mean()
    assert (tmp_path / "calm-before-after.png").is_file()
    summary = json.loads((tmp_path / "calm-summary.json").read_text())
    assert (summary["status"], summary["weight_rule"], summary["ends"]) == ("CONVERGED", "given", "graph")
    assert summary["relative_duality_gap"] <= 1e-4
    assert abs(summary["noise"] - 15) < 3
    page = whole_page(tmp_path / "calm-report.html")
    rows = dict(page.tables[0][1:])
    assert (rows["shape"], rows["status"], rows["steps"]) == ("24x32", "CONVERGED", str(summary["steps"]))
    assert float(rows["relative duality gap"]) == pytest.approx(summary["relative_duality_gap"], rel=1e-4)
    assert (page.command, len(page.loaded)) == (f"sparseopt {' '.join(map(str, call))}", 1)
    assert "--weight 40 --force" in page.words
    # Any of the four outputs that exists is an error.
    for name in ("calm.png", "calm-before-after.png", "calm-summary.json"):
        (tmp_path / name).unlink()
    status, _, err = command(*call)
    assert (status, "calm-report.html exists already" in err) == (2, True)


def test_trend_fits_a_signal_on_the_graph_of_a_file(tmp_path, fit):
    edges = np.stack([np.arange(29), np.arange(1, 30)], axis=1)
    np.savetxt(tmp_path / "edges.csv", edges, fmt="%d", delimiter=",", header="from,to", comments="")
    out, lines, summary = fit("--graph", tmp_path / "edges.csv", signal=STEPS, weight=1.0)
    assert "30 nodes and 29 edges" in out
    assert lines[0] == "node,value,piece"
    nodes, values, pieces = numbers(lines)
    np.testing.assert_array_equal(nodes, np.arange(30))
    expected = so.trend_filter(STEPS, so.Graph.from_edges(edges, 30), so.L1(1.0), tol=1e-8).value
    np.testing.assert_allclose(values, expected, atol=0.02)
    np.testing.assert_array_equal(pieces, np.cumsum(np.diff(values, prepend=values[0]) != 0))
    assert (summary["pieces"], summary["ends"]) == (pieces[-1] + 1, "graph")
    assert "no certificate" in fit("--graph", tmp_path / "edges.csv", "--penalty", "mcp", weight=1.0)[0]


def test_trend_chooses_a_weight_draws_the_fit_and_writes_a_page(tmp_path, fit):
    out, lines, summary = fit(signal=STEPS, weight="gcv")
    path = so.trend.trend_path(STEPS, so.Graph.chain(30))
    assert (summary["weight"], summary["weight_rule"]) == (pytest.approx(so.select(path).weight), "gcv")
    assert f"noise about {path.noise:.3g}, weight {summary['weight']:.3g} chosen by GCV)" in out
    assert "solved directly" in out
    np.testing.assert_allclose(numbers(lines)[1], so.select(path).value, atol=1e-6)
    by_bic = so.select(path, "bic", path.noise).weight
    assert fit(weight="bic")[2]["weight"] == pytest.approx(by_bic)
    page = whole_page(tmp_path / "fit-report.html")
    assert (dict(page.tables[0][1:])["weight rule"], len(page.loaded)) == ("bic", 1)
    assert (tmp_path / "fit.png").is_file()


def test_a_series_alone_has_its_jumps_found(tmp_path, fit):
    dates = np.datetime_as_string(np.datetime64("2020-01-01") + np.arange(30))
    rows = [f"{date},{value}" for date, value in zip(dates, STEPS, strict=True)]
    (tmp_path / "y.csv").write_text("\n".join(["date,level", *rows, ""]))
    out, lines, summary = fit(weight=None)
    found = so.trend.jumps(STEPS)
    assert found.places.tolist() == [10, 20]
    assert f"3 constants jump at 2020-01-11: {found.sizes[0]:+.4g} ({found.low[0]:.3g} to {found.high[0]:.3g}), " in out
    head, first, second = (tmp_path / "fit-jumps.csv").read_text().splitlines()
    assert head == "place,kind,size,low,high,first,last,p"
    assert (first.split(",")[0], second.split(",")[0], second.split(",")[-1]) == ("2020-01-11", "2020-01-21", "nan")
    assert float(second.split(",")[3]) == pytest.approx(found.low[1])
    assert [line.rpartition(",")[2] for line in lines[1:]] == [str(piece) for piece in np.repeat([0, 1, 2], 10)]
    np.testing.assert_allclose([float(line.split(",")[2]) for line in lines[1:]], found.fit, rtol=1e-9)
    assert (len(summary["jumps"]), summary["pieces"], "weight" in summary) == (2, 3, False)
    assert "--weight gcv --force" in whole_page(tmp_path / "fit-report.html").words
    assert fit("--jumps", weight=None)[1] == lines
    assert (summary["basis"], summary["basis"] in out) == ("approximate intervals of 95 %", True)
    assert "by gaussian thinning, share 0.5" in fit("--thin", "gaussian:0.3", weight=None)[0]
    assert float((tmp_path / "fit-jumps.csv").read_text().splitlines()[1].split(",")[-1]) < 1e-6


def test_a_picture_and_a_graph_have_their_regions_found(tmp_path, fit, done, rng):
    clean = np.full((20, 24), 60)
    clean[4:12, 5:15], clean[:, 20:] = 120, 200
    steps = np.clip(clean + rng.normal(0, 8, clean.shape), 0, 255).astype(np.uint8)
    write_image(tmp_path / "y.png", steps)
    out = done("trend", "--signal", tmp_path / "y.png", "--output", tmp_path / "picture.csv")
    graph = so.Graph.grid(steps.shape)
    found = so.trend.regions(steps, graph)
    summary = json.loads((tmp_path / "picture-summary.json").read_text())
    assert summary["regions"] == list(map(str, found.facts()))
    assert (len(found.levels), summary["pieces"], summary["smooth"]) == (3, 3, False)
    assert ": 3 parts" in out
    assert all(line in out for line in summary["regions"])
    lines = (tmp_path / "picture.csv").read_text().splitlines()
    np.testing.assert_array_equal(numbers(lines)[2].reshape(steps.shape), found.pieces)
    np.testing.assert_allclose(numbers(lines)[1].reshape(steps.shape), found.fit, rtol=1e-9)
    head, *rows = (tmp_path / "picture-regions.csv").read_text().splitlines()
    assert head == "first,second,edges,step"
    assert [list(map(float, row.split(","))) for row in rows] == [list(row.values()) for row in found.table()]
    page = whole_page(tmp_path / "picture-report.html")
    assert (len(page.loaded), "sparseopt denoise" in page.words) == (1, True)
    # The same on the graph of a file, which has a trend filter's fit without --jumps.
    edges = tmp_path / "edges.csv"
    np.savetxt(edges, graph.edges, fmt="%d", delimiter=",")
    said, graph_lines, summary = fit("--graph", edges, "--jumps", signal=steps.reshape(-1), weight=None)
    assert (": 3 parts" in said, summary["ends"], len(graph_lines)) == (True, "graph", len(lines))
    np.testing.assert_array_equal(numbers(graph_lines)[2], found.pieces.reshape(-1))
    assert "regions" not in fit("--graph", edges, weight=5.0)[2]


# The heading of a table of times, a rising and a falling line, which of its columns, and what is said of the channels.
@pytest.mark.parametrize(
    ("heading", "columns", "said"), [("Time,up,down", 3, "2 channels: up, down"), ("time,up", 2, "1 channel: up")]
)
def test_a_column_of_times_is_no_channel(tmp_path, fit, heading, columns, said):
    table = np.stack([TIMES, LINE, -TIMES], axis=1)[:, :columns]
    out, lines, summary = fit("--order", 1, signal=table, heading=heading)
    assert lines[0] == f"node,{heading}"
    np.testing.assert_allclose(numbers(lines)[1:].T, table, rtol=1e-9)
    assert said in out
    assert (summary["channels"], summary["ends"]) == (heading.split(",")[1:], "free")
    # What does not increase is a channel; it is named.
    np.savetxt(tmp_path / "y.csv", table[::-1], delimiter=",", header=heading, comments="")
    (run,) = expand({"name": "x", "task": "trend", "signal": str(tmp_path / "y.csv")})
    assert run.task.read().notes[:2] == (
        f"{columns} channels: {heading.replace(',', ', ')}",
        f"the column {heading.split(',')[0]} is taken as a channel: times must increase",
    )


def test_times_may_have_a_file_of_their_own(tmp_path, fit):
    np.savetxt(tmp_path / "t.csv", TIMES)
    lines = fit("--order", 1, "--times", tmp_path / "t.csv", signal=LINE)[1]
    np.testing.assert_allclose(numbers(lines), [np.arange(30), LINE], rtol=1e-9)


def test_dates_are_days_and_stay_in_the_output(tmp_path, fit):
    days = np.cumsum(np.random.default_rng(0).integers(1, 9, 30))
    dates = np.datetime_as_string(np.datetime64("2020-01-01") + days)
    rows = [f"{date},{3 + 2 * day}" for date, day in zip(dates, days, strict=True)]
    (tmp_path / "y.csv").write_text("\n".join(["date,level", *rows, ""]))
    _, lines, summary = fit("--order", 1)
    assert lines[0] == "node,date,level"
    assert [line.split(",")[1] for line in lines[1:]] == list(dates)
    np.testing.assert_allclose([float(line.split(",")[2]) for line in lines[1:]], 3 + 2 * days, rtol=1e-9)
    assert summary["channels"] == ["level"]
    (tmp_path / "fit.csv").replace(tmp_path / "y.csv")
    assert fit("--order", 1)[1] == lines


def test_a_fit_has_the_ids_and_the_heading_of_its_signal_and_is_a_signal_again(tmp_path, fit):
    (tmp_path / "roads.csv").write_text("from,to\nChur,Bern\nBern,Genf\nGenf,Lugano\n")
    (tmp_path / "y.csv").write_text("id,rain\nLugano,9\nBern,1.1\nChur,0.9\nGenf,9.2\n")
    lines = fit("--graph", tmp_path / "roads.csv", weight=0.5)[1]
    rows = [line.split(",") for line in lines]
    assert rows[0] == ["id", "rain", "piece"]
    assert [(row[0], row[2]) for row in rows[1:]] == [("Lugano", "0"), ("Bern", "1"), ("Chur", "1"), ("Genf", "0")]
    np.testing.assert_allclose([float(row[1]) for row in rows[1:]], [8.85, 1.25, 1.25, 8.85], atol=1e-3)
    (tmp_path / "fit.csv").replace(tmp_path / "y.csv")
    again = fit("--graph", tmp_path / "roads.csv", weight=0.5)[1]
    assert [line.split(",")[::2] for line in again] == [line.split(",")[::2] for line in lines]


def test_a_series_of_one_node_is_its_fit(fit):
    assert fit(signal=[3])[1] == ["node,value,piece", "0,3.0,0"]


def test_a_fit_of_counts_is_their_rate(fit):
    counts = np.random.default_rng(0).poisson(np.repeat([2.0, 9.0, 4.0], 10))
    _, lines, summary = fit("--loss", "poisson", signal=counts, weight=3.0)
    direct = so.trend_filter(counts, so.Graph.chain(30), so.L1(3.0), loss="poisson", tol=1e-5)
    np.testing.assert_allclose(numbers(lines)[1], np.exp(direct.value), rtol=1e-6)
    assert (summary["loss"], summary["noise"]) == ("poisson", None)


def test_a_trend_beside_covariates_and_a_season(fit):
    rng = np.random.default_rng(0)
    trend, warmth = np.interp(np.arange(60), [0, 30, 59], [0, 6, 0]), rng.standard_normal(60)
    season = np.tile([2.0, -1.0, 0.0, -1.0], 15)
    y = trend + season + 1.5 * warmth + 0.1 * rng.standard_normal(60)
    call, table = ["--order", 1, "--season", 4, "--covariates", "warmth"], np.column_stack([y, warmth])
    said, lines, summary = fit(*call, signal=table, heading="sales,warmth", weight=None)
    assert "chosen by GCV" in said
    assert f"coefficient of warmth: {summary['coefficients']['warmth']:.4g}" in said
    assert lines[0] == "node,sales,fitted,season"
    _, found, fitted, periodic = numbers(lines)
    np.testing.assert_allclose(fitted - found - periodic, summary["coefficients"]["warmth"] * warmth, atol=1e-7)
    assert summary["coefficients"]["warmth"] == pytest.approx(1.5, abs=0.05)
    np.testing.assert_allclose(summary["season"], periodic[:4], atol=1e-9)
    assert 0.05 < summary["noise"] < 0.2
    hours = np.column_stack([np.arange(60) + (np.arange(60) > 20), y])
    said = fit("--season", 4, signal=hours, heading="time,sales", weight=1)[0]
    assert "after row 21 the times make a step of 2 usual ones" in said
    rates = rng.poisson(np.exp(1 + season / 4))
    _, lines, _ = fit("--season", 4, "--loss", "poisson", signal=rates, heading="count", weight=50)
    _, rate, fitted, periodic, _ = numbers(lines)
    np.testing.assert_allclose(fitted, rate * np.exp(periodic), rtol=1e-6)


def test_bounds_and_a_direction_hold_exactly(fit):
    rising = np.linspace(0, 1, 30) + 0.3 * np.random.default_rng(0).standard_normal(30)
    found = numbers(fit("--bounds", "0,", "--monotone", "up", signal=rising, weight=0)[1])[1]
    np.testing.assert_allclose(found, np.maximum(isotonic_regression(rising).x, 0), atol=1e-8)
    said, lines, _ = fit("--bounds", "0.2,0.8", "--order", 1, weight=None)
    assert "chosen by GCV" in said
    assert np.max(np.abs(numbers(lines)[1] - 0.5)) <= 0.3 + 1e-12


def test_channels_of_unlike_units_are_named_and_without_matplotlib_a_fit_has_no_figure(tmp_path, fit, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    noise = np.random.default_rng(0).normal(size=(30, 2))
    for scale, unlike in ((1, False), (100, True)):
        said = fit(signal=noise * [1, scale], weight=1)[0]
        assert ("one weight smooths them all" in said, "pip install 'sparseopt[plot]'" in said) == (unlike, True)
    assert not (tmp_path / "fit.png").exists()
    assert whole_page(tmp_path / "fit-report.html").loaded == []


def test_labels_of_dates_in_a_figure_do_not_overlap():
    dates = np.datetime64("2020-01-01T00:00", "us") + np.arange(120) * np.timedelta64(1, "D")
    axes = observed_and_fit(np.zeros((120, 1)), np.zeros((120, 1)), ("y $_",), times=dates)
    axes[0].figure.canvas.draw()
    shown = [text.get_window_extent() for text in axes[0].get_xticklabels() if text.get_text()]
    assert len(shown) > 3
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(shown))
