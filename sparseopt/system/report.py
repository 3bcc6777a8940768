"""A report as data: facts, tables and figures, shown as Markdown, as one HTML page, and in a notebook.

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

# Tables and figures wider than the page scroll; the page does not.
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:68em;margin:2em auto;padding:0 1em;color:#222;overflow-wrap:anywhere}
h1,h2{line-height:1.25}h2,footer{margin-top:2em}pre{white-space:pre-wrap;padding:.6em .8em}
pre,code{background:#f3f4f6}pre span,code span{display:inline-block}
ul{padding-left:1.2em}figure{margin:1.5em 0}figcaption,footer{color:#555;font-size:.9em}
img{max-width:100%;min-width:min(36em,150vw)}svg{width:100%;font-size:13px}rect{fill:#2a6f97}
.wide{overflow:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:.3em .7em;border-bottom:1px solid #ddd;text-align:right}th{font-weight:normal}
td{white-space:nowrap}.text{white-space:normal;min-width:20em}[scope=row],.label,.text{text-align:left}
thead th{vertical-align:bottom}tfoot *{font-weight:bold}
button{all:unset;cursor:pointer;font-weight:bold}button:focus-visible{outline:2px solid #2a6f97}
[aria-sort=ascending] button::after{content:" \\25b2"}[aria-sort=descending] button::after{content:" \\25bc"}
@media(max-width:40em){body{font-size:15px}th,td{padding:.3em .4em}}
"""
# A click on a heading sorts: numbers by value, before texts; a second click reverses the order.
SCRIPT = """
const number=row=>{const word=row[0].split(" ")[0].replace(/[,%]/g,"");return word===""?NaN:Number(word)}
document.querySelectorAll("thead button").forEach(button=>button.onclick=()=>{
const head=button.parentElement,body=head.closest("table").tBodies[0],sign=head.ariaSort==="ascending"?-1:1
const rows=[...body.rows].map(row=>[row.cells[head.cellIndex].textContent,row])
rows.sort((p,q)=>{const a=number(p),b=number(q)
return isNaN(a)&&isNaN(b)?sign*p[0].localeCompare(q[0],"en",{numeric:true}):isNaN(a)?1:isNaN(b)?-1:sign*(a-b)})
for(const other of head.parentElement.cells)other.ariaSort=null
head.ariaSort=sign>0?"ascending":"descending";body.append(...rows.map(row=>row[1]))})
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


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
    following = "".join(f"<li><code>{_words(name)}</code>: {_text(text)}</li>" for name, text in steps)
    sections = "".join(_section(report, title) for report in reports)
    made = "".join(f"<p>{escape(text)}</p>" for text in environment_texts(environment))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1><p>{time.strftime('%Y-%m-%d %H:%M %z')}</p><pre>{_words(command)}</pre>"
        f"{sections}{f'<h2>What to do next</h2><ul>{following}</ul>' if following else ''}"
        f"<footer>{made}</footer><script>{SCRIPT}</script></body></html>\n"
    )


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


def _words(command: str) -> str:
    """A command whose lines break between words, not at the hyphens of options."""
    return " ".join(f"<span>{escape(word)}</span>" for word in command.split(" "))


def _text(text: str) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _section(report: Report, title: str) -> str:
    heading = "" if report.table.title == title else f"<h2>{escape(report.table.title)}</h2>"
    facts = "".join(f"<li><b>{escape(name)}</b>: {_text(text)}</li>" for name, text in report.facts)
    figures, table = "".join(map(_figure, report.figures)), _table(report.table) if report.table.rows else ""
    return f"{heading}{f'<ul>{facts}</ul>' if facts else ''}{figures}{table}"


def _figure(figure: Figure) -> str:
    picture, caption = figure.picture, escape(figure.caption)
    if isinstance(picture, Path):
        data = b64encode(picture.read_bytes()).decode()
        picture = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f'<figure><div class="wide">{picture}</div><figcaption>{caption}</figcaption></figure>'


def _table(table: Table) -> str:
    heads = (
        f"<th{' class=label' if index < table.labels else ''}><button>{escape(heading)}</button></th>"
        for index, heading in enumerate(table.headings)
    )
    body, foot = (
        "".join(f"<tr>{''.join(_cell(cell, i < table.labels) for i, cell in enumerate(row))}</tr>" for row in rows)
        for rows in (table.rows[: len(table.rows) - table.totals], table.rows[len(table.rows) - table.totals :])
    )
    foot = f"<tfoot>{foot}</tfoot>" if foot else ""
    return f'<div class="wide"><table><thead><tr>{"".join(heads)}</tr></thead><tbody>{body}</tbody>{foot}</table></div>'


def _cell(text: str, label: bool) -> str:
    # Numbers stay on one line, even with an exponent; sentences do not.
    kind = " class=text" if len(text) > 30 else ""
    return f'<th scope="row">{escape(text)}</th>' if label else f"<td{kind}>{escape(text)}</td>"


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
