"""Reports: rows with their spread, the figures of papers and ours, the same in every format and at every width."""

import csv
import dataclasses
import io
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from sparseopt.experiments.config import expand
from sparseopt.experiments.report import Row, Section, find_runs, flat_rows, gather, write_report
from sparseopt.experiments.runs import plan, run_all
from sparseopt.shell.show_experiments import fitting_tables
from sparseopt.system.report import markdown
from tests.experiments.inputs import TOY, quiet
from tests.system.pages import whole_page

PAPER = {
    "source": "Toys, 2020, table 1",
    "figures": [{"match": {"scale": 2.0}, "values": {"value": 7.5}}],
    "differs": ["Size: ours is smaller."],
}
TABLE = [["scale", "value", "value (paper)"], ["1", "1.5 ± 1.1", ""], ["2", "3 ± 2.2", "7.5"]]


def made(output, **values):
    """Two toys, of which only the scale differs."""
    values |= {"name": "toy", "task": TOY, "sweep": {"grid": {"scale": [1.0, 2.0]}}}
    run_all(plan(expand(values, allow_code=True), output), output, lambda p: quiet)
    return output


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return made(tmp_path_factory.mktemp("runs"), title="Toys | compared", paper=PAPER)


@pytest.fixture(scope="module")
def section(runs):
    (section,) = gather([runs], ["tests"])
    return section


def test_rows_hold_settings_means_spreads_and_the_papers_figures(section):
    assert section.name == "toy"
    one, two = section.rows
    assert (one.labels, one.repeats) == ({"scale": 1.0}, 4)
    assert one.figures["value"] == (1.5, pytest.approx(1.25**0.5))
    assert (one.paper, two.paper) == ({}, {"value": 7.5})
    table = section.table()
    assert [table.headings, *table.rows] == TABLE
    assert table.labels == 1


def test_a_figure_with_the_name_of_a_setting_stands_beside_it(section):
    rows = [dataclasses.replace(row, labels={"value": 10.0 * i}) for i, row in enumerate(section.rows)]
    section = dataclasses.replace(section, rows=rows)
    table = section.table()
    assert table.headings == ["value", "value (measured)", "value (paper)"]
    assert [line[0] for line in table.rows] == ["0", "10"]
    assert [(line["value"], line["value_measured"]) for line in flat_rows([section])] == [(0.0, 1.5), (10.0, 3.0)]


def test_figures_have_four_digits_and_a_spread_that_shows():
    values = [(1.5, 1e-5), (1.5, 2e-4), (123456.0, 0.0), (1e-5, 0.0), 0.0123456, 7, "text", True, None]
    rows = [Row({"n": n}, {"figure": value}, {}, 1, Path("x")) for n, value in enumerate(values)]
    shown = [row[1] for row in Section("x", "X", ("figure",), rows, [], []).table().rows]
    assert shown == ["1.5", "1.5 ± 0.0002", "123456", "1e-05", "0.01235", "7", "text", "True", ""]


def test_runs_of_one_name_are_told_apart_by_what_differs(runs, tmp_path):
    (section,) = gather([runs, made(tmp_path, count=2)], ["tests"])
    labels = [tuple(row.labels.items()) for row in section.rows]
    assert labels == [(("count", n), ("scale", scale)) for n in (4, 2) for scale in (1.0, 2.0)]


def test_every_format_tells_the_same(section, tmp_path):
    files = {file.name: file for file in write_report([section], tmp_path / "report")}
    assert set(files) >= {"report.csv", "report.parquet", "report.md", "report.html"}
    with files["report.csv"].open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["value"]) for row in rows] == [1.5, 3.0]
    table = pq.read_table(files["report.parquet"]).to_pylist()
    assert table[1]["value_paper"] == 7.5
    assert table == flat_rows([section])
    text = files["report.md"].read_text()
    assert "| 2 | 3 ± 2.2 | 7.5 |" in text
    assert "* differs: Size: ours is smaller." in text
    assert "* repeats: mean and standard deviation of 4" in text
    page = whole_page(files["report.html"])
    assert page.tables == [TABLE]
    assert "original: Toys, 2020, table 1" in page.words


def test_without_pyarrow_a_report_is_whole_but_for_parquet(section, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    written = {file.name for file in write_report([section], tmp_path / "report")}
    assert {"report.csv", "report.md", "report.html"} <= written
    assert "report.parquet" not in written


def test_a_report_never_overwrites_and_says_what_is_missing(section, tmp_path):
    runs = made(tmp_path / "runs")
    # Without a paper a section is its title and a table alone.
    (one,) = gather([runs / "toy" / "scale=1"], ["tests"])
    assert markdown(one.report()).startswith("## toy\n\n| scale | value |")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="full is not empty"):
        write_report([section], tmp_path / "full")
    with pytest.raises(ValueError, match=r"no folder .*none"):
        gather([tmp_path / "none"])
    (runs / "toy" / "scale=1" / "summary.json").unlink()
    assert len(find_runs([runs])) == 1
    with pytest.raises(ValueError, match="scale=1 holds no finished run; 1 unfinished"):
        find_runs([runs / "toy" / "scale=1"])


FIGURES = {
    "perplexity": 49.8, "mean_relative_error": 0.0095, "mean_heldout_error": 0.0155, "solver_seconds": 94.2,
    "peak_memory_GiB": 1.1, **dict.fromkeys(("figure_a", "figure_b"), (1.2345e-05, 4.3e-07)),
}  # fmt: skip
BROKEN = {"error": "model: RuntimeError: model.layers.0.self_attn.q_proj became non-finite"}


@pytest.mark.parametrize("error", [[], [BROKEN]])
@pytest.mark.parametrize("width", [30, 37, 59, 60, 83, 110, 200])
def test_tables_are_whole_at_every_width_in_parts_and_no_figure_is_cut(width, error):
    every = [*[FIGURES] * 4, *error]
    labels = [{"method": f"maiht:{n}", "pattern": "unstructured", "sparsity": 0.5} for n in range(len(every))]
    rows = [Row(label, figures, {}, 1, Path("x")) for label, figures in zip(labels, every, strict=True)]
    section = Section("compared", "Compared", (*FIGURES, "error"), rows, [], [])
    tables, text = fitting_tables(section.table(), width), io.StringIO()
    for table in tables:
        Console(file=text, width=width).print(table)
    shown = text.getvalue()
    ends = {"┏": "┓", "┃": "┃", "┡": "┩", "│": "│", "└": "┘"}
    lines = [line for line in shown.splitlines() if line[0] in ends]
    assert len(lines) > len(rows)
    assert all(line[-1] == ends[line[0]] for line in lines), shown
    assert max(map(len, lines)) <= width
    assert "…" not in shown
    # Labels and the widest single figure fit: no word of a heading and no figure is broken.
    if width >= 60:
        assert all(f" {word} " in shown for name in FIGURES for word in name.split("_")), shown
        assert shown.count("1.234e-05 ± 4.3e-07") == 8
        assert shown.count("maiht:0") == len(tables)
