"""A report as data: facts, tables and the names of pictures. Nothing here draws; pictures are files of the caller."""

import html
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

STYLE = (
    "body{font-family:sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}th,td{padding:.3em .8em;border-bottom:1px solid #ccc;text-align:right}"
    "th:first-child,td:first-child{text-align:left}img{max-width:100%;margin:1em 0}"
)


class Fact(NamedTuple):
    """A sentence or figures under a name; as text `name: text`."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first columns, so many as `labels`, say what a row is."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1


@dataclass(frozen=True)
class Report:
    """What is known of one experiment or comparison, with the pictures that were drawn of it."""

    table: Table
    facts: Sequence[Fact] = ()
    pictures: Sequence[Path] = ()


def bullets(facts: Iterable[Fact], mark: str) -> str:
    """Facts as a Markdown list."""
    return "\n".join(f"{mark} {fact}" for fact in facts)


def markdown(report: Report) -> str:
    """A section of a Markdown page in the folder of the pictures."""
    table = report.table
    lines = [_pipes(table.headings), _pipes(["---"] * len(table.headings)), *map(_pipes, table.rows)]
    pictures = "\n".join(f"![{picture.stem}]({picture.name})" for picture in report.pictures)
    parts = [f"## {table.title}", "\n".join(lines), bullets(report.facts, "*"), pictures]
    return "\n\n".join(filter(None, parts))


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def html_page(title: str, reports: Iterable[Report]) -> str:
    """One page with the pictures inside."""
    body = "".join(map(_section, reports))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def _section(report: Report) -> str:
    table = report.table
    rows = [_row("th", table.headings), *(_row("td", row) for row in table.rows)]
    facts = "".join(f"<li>{html.escape(str(fact))}</li>" for fact in report.facts)
    pictures = "".join(map(_picture, report.pictures))
    return f"<h2>{html.escape(table.title)}</h2><table>{''.join(rows)}</table><ul>{facts}</ul>{pictures}"


def _picture(file: Path) -> str:
    data = b64encode(file.read_bytes()).decode()
    return f'<img alt="{html.escape(file.stem)}" src="data:image/png;base64,{data}">'


def _row(kind: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{kind}>{html.escape(cell)}</{kind}>' for cell in cells)}</tr>"
