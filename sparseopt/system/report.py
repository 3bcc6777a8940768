"""A report as data: facts, tables and figures, shown as Markdown, as one HTML page (`report.html`), and in a notebook.

A page is self-contained: figures are inside it, and its policy forbids the browser to load anything.
"""

import math
import re
import time
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparseopt.system.machine import environment_texts

TEMPLATE = Path(__file__).with_name("report.html")


class Fact(NamedTuple):
    """A sentence or figures under a name; as text `name: text`."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first `labels` columns name the row; the last `totals` rows are totals."""

    title: str
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    labels: int = 1
    totals: int = 0


class Figure(NamedTuple):
    """A PNG file, or the text of an SVG, with its caption."""

    picture: Path | str
    caption: str

    def drawn(self) -> Any:
        """The picture as HTML, with the data of a file in it."""
        from markupsafe import Markup

        if isinstance(self.picture, str):
            return Markup(self.picture)
        data = b64encode(self.picture.read_bytes()).decode()
        return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(self.caption, data)


@dataclass(frozen=True)
class Report:
    """The results of one experiment or comparison, with its figures."""

    table: Table
    facts: Sequence[Fact] = ()
    figures: Sequence[Figure] = ()


def bullets(facts: Iterable[Fact], mark: str) -> str:
    """Facts as a Markdown list."""
    return "\n".join(f"{mark} {fact}" for fact in facts)


def markdown(report: Report) -> str:
    """A section of a Markdown page in the folder of the figures."""
    table = report.table
    lines = [_pipes(table.headings), _pipes(["---"] * len(table.headings)), *map(_pipes, table.rows)]
    files = ((picture, caption) for picture, caption in report.figures if isinstance(picture, Path))
    pictures = "\n".join(f"![{caption}]({picture.name})" for picture, caption in files)
    parts = [f"## {table.title}", "\n".join(lines), bullets(report.facts, "*"), pictures]
    return "\n\n".join(filter(None, parts))


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def html_page(
    title: str, reports: Iterable[Report], command: str, environment: Mapping[str, Any], steps: Iterable[Fact] = ()
) -> str:
    """One self-contained page; `environment` comes from a record, `steps` are commands and what they do."""
    from jinja2 import Environment
    from markupsafe import Markup

    engine = Environment(autoescape=True, trim_blocks=True)
    # A command's lines break between words, not at the hyphens of options.
    spanned = Markup("<span>{}</span>").format
    engine.filters["words"] = lambda text: Markup(" ").join(map(spanned, text.split(" ")))
    engine.filters["code"] = lambda text: Markup(re.sub("`([^`]+)`", r"<code>\1</code>", escape(text)))
    return engine.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title, time=time.strftime("%Y-%m-%d %H:%M %z"), command=command, reports=[*reports], steps=[*steps],
        made=environment_texts(environment),
    )  # fmt: skip


def html_facts(title: str, facts: Iterable[Fact]) -> str:
    """A small table for a notebook."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in facts)
    return f"<table><caption>{escape(title)}</caption>{rows}</table>"


def spread(values: Any) -> str:
    """A number, or the smallest and the largest of several."""
    low, high = float(np.min(values)), float(np.max(values))
    return f"{low:.5g}" if low == high or low != low else f"{low:.5g} to {high:.5g}"


def cell(value: Any) -> str:
    """A value of a record as text."""
    shape = "x".join(map(str, value)) if isinstance(value, tuple) else None
    return shape or (f"{value:.5g}" if isinstance(value, float) else "-" if value is None else str(value))


def bars(values: Mapping[str, float]) -> str:
    """Horizontal bars with their values, as SVG. Widths are relative to the page, so that letters keep their size."""
    top = max(filter(math.isfinite, values.values()), default=0.0) or 1.0
    rows = []
    for y, (name, value) in enumerate(values.items()):
        width = 65 * value / top if math.isfinite(value) else 0.0
        rows.append(
            f'<text y="{20 * y + 15}">{escape(name)}</text>'
            f'<rect x="14%" y="{20 * y + 3}" width="{width:.2f}%" height="15"/>'
            f'<text x="{15 + width:.2f}%" y="{20 * y + 15}">{value:.3g}</text>'
        )
    return f'<svg role="img" height="{20 * len(rows)}">{"".join(rows)}</svg>'
