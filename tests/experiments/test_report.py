"""Reports: rows with their spread, the paper's figures and ours, the same numbers in every format."""

import csv
import dataclasses
import sys

import pyarrow.parquet as pq
import pytest

from sparseopt.experiments.config import expand
from sparseopt.experiments.report import find_runs, flat_rows, gather, write_report
from sparseopt.experiments.runs import plan, run_all
from sparseopt.system.report import markdown

TOY = "tests.experiments.toy.Toy"
PAPER = {
    "source": "Toys, 2020, table 1",
    "figures": [{"match": {"scale": 2.0}, "values": {"value": 7.5}}],
    "differs": ["Size: ours is smaller."],
}


@pytest.fixture
def runs(tmp_path):
    output = tmp_path / "runs"
    values = {"name": "toy", "title": "Toys | compared", "task": TOY, "paper": PAPER}
    planned = plan(expand({**values, "sweep": {"grid": {"scale": [1.0, 2.0]}}}, allow_code=True), output)
    run_all(planned, output, lambda p: lambda *_: None)
    return output


def test_rows_hold_settings_means_spreads_and_the_papers_figures(runs):
    (section,) = gather([runs], ["tests"])
    assert section.name == "toy"
    one, two = section.rows
    assert one.labels == {"scale": 1.0}
    assert one.figures["value"] == (1.5, pytest.approx(1.25**0.5))
    assert one.repeats == 4
    assert one.paper == {}
    assert two.paper == {"value": 7.5}
    table = section.table()
    assert (table.headings, table.labels) == (["scale", "value", "value (paper)"], 1)
    assert table.rows == [["1", "1.5 ± 1.1", ""], ["2", "3 ± 2.2", "7.5"]]


def test_a_figure_with_the_name_of_a_setting_stands_beside_it(runs):
    (section,) = gather([runs], ["tests"])
    rows = [dataclasses.replace(row, labels={"value": 10.0 * i}) for i, row in enumerate(section.rows)]
    section = dataclasses.replace(section, rows=rows)
    table = section.table()
    assert table.headings == ["value", "value (measured)", "value (paper)"]
    assert [line[0] for line in table.rows] == ["0", "10"]
    assert [(line["value"], line["value_measured"]) for line in flat_rows([section])] == [(0.0, 1.5), (10.0, 3.0)]


def test_runs_of_one_name_are_told_apart_by_what_differs(runs, tmp_path):
    values = {"name": "toy", "task": TOY, "count": 2, "sweep": {"grid": {"scale": [1.0, 2.0]}}}
    planned = plan(expand(values, allow_code=True), tmp_path / "more")
    run_all(planned, tmp_path / "more", lambda p: lambda *_: None)
    (section,) = gather([runs, tmp_path / "more"], ["tests"])
    labels = [tuple(row.labels.items()) for row in section.rows]
    assert labels == [(("count", n), ("scale", scale)) for n in (4, 2) for scale in (1.0, 2.0)]


def test_every_format_tells_the_same(runs, tmp_path):
    sections = gather([runs], ["tests"])
    files = {file.name: file for file in write_report(sections, tmp_path / "report")}
    assert set(files) >= {"report.csv", "report.parquet", "report.md", "report.html"}
    with files["report.csv"].open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["value"]) for row in rows] == [1.5, 3.0]
    table = pq.read_table(files["report.parquet"]).to_pylist()
    assert [row["value"] for row in table] == [1.5, 3.0]
    assert table[1]["value_paper"] == 7.5
    assert table == flat_rows(sections)
    text = files["report.md"].read_text()
    assert "| 2 | 3 ± 2.2 | 7.5 |" in text
    assert "* differs: Size: ours is smaller." in text
    assert "* repeats: mean and standard deviation of 4" in text
    page = files["report.html"].read_text()
    assert "<td>3 ± 2.2</td><td>7.5</td>" in page
    assert "<li>original: Toys, 2020, table 1</li>" in page


def test_without_pyarrow_a_report_is_whole_but_for_parquet(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    written = {file.name for file in write_report(gather([runs], ["tests"]), tmp_path / "report")}
    assert {"report.csv", "report.md", "report.html"} <= written
    assert "report.parquet" not in written


def test_a_report_never_overwrites_and_says_what_is_missing(runs, tmp_path):
    sections = gather([runs], ["tests"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty; name a new one"):
        write_report(sections, tmp_path / "full")
    with pytest.raises(ValueError, match="there is no folder"):
        gather([tmp_path / "none"])
    (runs / "toy" / "scale=1" / "summary.json").unlink()
    assert len(find_runs([runs])) == 1
    with pytest.raises(ValueError, match="1 unfinished, start the same command again"):
        find_runs([runs / "toy" / "scale=1"])


def test_markdown_of_a_section_without_paper_has_a_table_alone(runs):
    (section,) = gather([runs / "toy" / "scale=1"], ["tests"])
    assert markdown(section.report()).startswith("## Toys | compared\n\n| scale | value |")
