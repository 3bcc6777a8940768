"""The page of a report: whole, offline, with nothing of a user's text in its code; a page that fails is a warning."""

import errno
import math
import re
import sys

import pytest

from sparseopt.shell import console
from sparseopt.system import files
from sparseopt.system.report import Fact, Figure, Report, Table, bars, cell, html_facts, html_page, markdown, spread
from tests.system.pages import whole_page

MACHINE = {"system": "Linux x86_64", "cores": 2, "devices": ["cpu:0"]}
ENVIRONMENT = {"versions": {"jax": "1.2", "numpy": "3.4"}, "machine": MACHINE}
EVIL = "<script>alert('x')</script>&\"`<b>"


def test_a_page_holds_everything_and_text_stays_text(tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG")
    table = Table(EVIL, (EVIL, "error"), [(EVIL, "1.5 ± 0.1"), ("a|b", "2")], totals=1)
    report = Report(table, [Fact(EVIL, f"`{EVIL}`")], [Figure(picture, EVIL), Figure(bars({EVIL: 0.5}), "bars")])
    steps = [Fact(f"sparseopt eval {EVIL}", EVIL)]
    (tmp_path / "page.html").write_text(html_page(EVIL, [report], f"sparseopt {EVIL}", ENVIRONMENT, steps))
    page = whole_page(tmp_path / "page.html")
    assert page.tables == [[[EVIL, "error"], [EVIL, "1.5 ± 0.1"], ["a|b", "2"]]]
    assert (page.command, page.captions) == (f"sparseopt {EVIL}", [EVIL, "bars"])
    assert page.loaded == ["data:image/png;base64,iVBORw=="]
    for words in ("jax 1.2, numpy 3.4", "Linux x86_64, 2 cores, cpu:0", "What to do next"):
        assert words in page.words
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d", page.words)
    assert (page.tags.count("button"), page.tags.count("tfoot"), page.tags.count("b")) == (2, 1, 1)
    # Markdown shows files alone.
    text = markdown(report)
    assert "| a\\|b | 2 |" in text
    assert text.count("![") == 1
    assert "<td>&lt;b&gt;</td>" in html_facts("title", [Fact("name", "<b>")])


def test_bars_have_the_widths_of_their_values():
    drawn = bars({"one": 0.02, "two": 0.01, "none": 0.0, "lost": math.nan})
    assert re.findall(r'width="([\d.]+)%"', drawn) == ["65.00", "32.50", "0.00", "0.00"]
    assert re.findall(r">([^<>]+)</text>", drawn) == ["one", "0.02", "two", "0.01", "none", "0", "lost", "nan"]
    assert re.findall(r'width="([\d.]+)%"', bars({"nothing": 0.0})) == ["0.00"]


def test_values_as_text():
    assert [cell(value) for value in ((2, 3), 0.123456, None, "x", 7)] == ["2x3", "0.12346", "-", "x", "7"]
    assert [spread(values) for values in (3, [1.0, 2.5], [math.nan, 1.0])] == ["3", "1 to 2.5", "nan"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ZeroDivisionError("no figure")])
def test_what_fails_is_a_warning_and_leaves_the_page_of_before(tmp_path, monkeypatch, capsys, error):
    def broken(*_):
        raise error

    monkeypatch.setattr(sys, "argv", ["sparseopt", "prune", "my model"])
    console.write_page(tmp_path / "report.html", lambda command: command)
    assert "report: " in capsys.readouterr().out
    if isinstance(error, OSError):
        monkeypatch.setattr(files.os, "fsync", broken)
    console.write_page(tmp_path / "report.html", str if isinstance(error, OSError) else broken)
    shown = capsys.readouterr()
    assert (shown.out, shown.err.startswith("warning: no report: ")) == ("", True)
    assert str(error.args[-1]) in shown.err
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "sparseopt prune 'my model'"
