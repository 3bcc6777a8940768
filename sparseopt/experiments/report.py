"""Floor 7: finished runs gathered into tables (terminal, Markdown, CSV, Parquet) and one page of plots (HTML).

folders -> finished runs -> rows (settings, figures with their spread, the paper's figures) -> tables and pictures
"""

import base64
import csv
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseopt.experiments.config import get_by_path
from sparseopt.experiments.names import AllowCode
from sparseopt.experiments.runs import HEADER, SUMMARY, load_run, summarise
from sparseopt.experiments.task import FinishedRun, Paper


@dataclass(frozen=True)
class Row:
    """One line of a table: the repeats of one setting.

    Attributes:
        labels: what tells it from the other rows of its experiment.
        figures: mean and standard deviation by column; text where the column is no number.
        paper: published figures by column.
        repeats: how many records it is the mean of.
        folder: of the run.
    """

    labels: dict[str, Any]
    figures: dict[str, Any]
    paper: dict[str, float]
    repeats: int
    folder: Path


@dataclass(frozen=True)
class Section:
    """One experiment of a report.

    Attributes:
        name: the experiment's.
        title: one line for people.
        columns: the figures' names, in order.
        rows: its rows.
        paper: the original, if it is a reproduction.
        runs: the finished runs, for the pictures.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[Row]
    paper: Paper | None
    runs: list[FinishedRun]

    def labels(self) -> list[str]:
        """The settings that tell the rows apart."""
        return list(dict.fromkeys(key for row in self.rows for key in row.labels))

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and cells as people read them; columns where no row has a figure are left out."""
        labels = self.labels()
        figures = [name for name in self.columns if any(row.figures.get(name) is not None for row in self.rows)]
        published = {name for row in self.rows for name in row.paper}
        headings = [*labels]
        for name in figures:
            headings += [_words(name), f"{_words(name)} (paper)"] if name in published else [_words(name)]
        cells = []
        for row in self.rows:
            line = [_cell(row.labels.get(key)) for key in labels]
            for name in figures:
                line.append(_cell(row.figures.get(name)))
                if name in published:
                    line.append(_cell(row.paper.get(name)))
            cells.append(line)
        return headings, cells


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Folders of finished runs, at or below the ones given.

    Raises:
        ValueError: if a folder does not exist or holds none.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
        headers = {header.parent for header in folder.rglob(HEADER)}
        # A model that a run keeps has a header of its own, below the run's.
        runs = [run for run in headers if headers.isdisjoint(run.parents)]
        inside = sorted(run for run in runs if (run / SUMMARY).is_file())
        if not inside:
            unfinished = len(runs)
            hint = f"; {unfinished} unfinished, start the same command again" if unfinished else ""
            raise ValueError(f"{folder} holds no finished run{hint}")
        found |= dict.fromkeys(run.resolve() for run in inside)
    return list(found)


def gather(folders: Iterable[Path], allow_code: AllowCode = False) -> list[Section]:
    """One section for each experiment found in the folders, in the order of first sight.

    Args:
        folders: with finished runs at or below them.
        allow_code: whether to import tasks and classes that the runs' configs name by a path outside this package.

    Raises:
        ValueError: as `find_runs` does, and for a run whose files are not those that a run writes.
    """
    runs: dict[str, list[tuple[FinishedRun, dict[str, Any]]]] = {}
    for folder in find_runs(folders):
        finished, summary = load_run(folder, allow_code)
        runs.setdefault(finished.task.name, []).append((finished, summary))
    sections = []
    for name, members in runs.items():
        first = members[0][0].task
        rows = [row for finished, summary in members for row in _rows(finished, summary)]
        kinds = dict.fromkeys(type(finished.task) for finished, _ in members)
        columns = tuple(dict.fromkeys(column for kind in kinds for column in kind.columns))
        sections.append(Section(name, first.title or name, columns, rows, first.paper, [m for m, _ in members]))
    return sections


def _rows(finished: FinishedRun, summary: dict[str, Any]) -> list[Row]:
    task = finished.task
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in finished.records:
        groups.setdefault(tuple(record.get(key) for key in task.row_by), []).append(record)
    settings = task.model_dump(mode="json")
    rows = []
    for key, records in groups.items():
        own = dict(zip(task.row_by, key, strict=True))
        labels = {name: _label(value) for name, value in summary["settings"].items()} | own
        paper: dict[str, float] = {}
        for figure in task.paper.figures if task.paper else ():
            known = {name: own.get(name, get_by_path(settings, name)) for name in figure.match}
            if known == figure.match:
                paper |= figure.values
        rows.append(Row(labels, _figures(summarise(records)), paper, len(records), finished.folder))
    return rows


def _figures(summary: dict[str, Any]) -> dict[str, Any]:
    return {
        name: (value["mean"], value["std"]) if isinstance(value, dict) and set(value) == {"mean", "std"} else value
        for name, value in summary.items()
    }


def draw_section(section: Section, folder: Path) -> list[Path]:
    """The section's pictures, comparing its runs; none without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return []
    matplotlib.use("Agg", force=False)
    from sparseopt.experiments.plots import save_figure

    pictures = []
    for kind in dict.fromkeys(type(run.task) for run in section.runs):
        members = [run for run in section.runs if type(run.task) is kind]
        for stem, axes in kind.draw(members).items():
            pictures.append(save_figure(axes, folder / f"{section.name}-{stem}.png", section.title))
    return pictures


def write_report(sections: Sequence[Section], folder: Path) -> list[Path]:
    """Write `report.csv`, `.parquet` (with pyarrow), `.md`, `.html` and the pictures into a new or empty folder.

    Raises:
        ValueError: if the folder holds files.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"the report's folder {folder} is not empty; name a new one")
    folder.mkdir(parents=True, exist_ok=True)
    flat = flat_rows(sections)
    written = [_write_csv(flat, folder / "report.csv")]
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError:
        pass
    else:
        written.append(_write_parquet(flat, folder / "report.parquet"))
    pictures = {section.name: draw_section(section, folder) for section in sections}
    text = "\n\n".join(markdown(section, pictures[section.name]) for section in sections)
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page(sections, pictures), encoding="utf-8")
    return [*written, folder / "report.md", folder / "report.html", *(p for ps in pictures.values() for p in ps)]


def flat_rows(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """Every row with all its figures as plain columns, for files that programs read."""
    flat = []
    for section in sections:
        for row in section.rows:
            line: dict[str, Any] = {"experiment": section.name, **row.labels, "repeats": row.repeats}
            for name, value in row.figures.items():
                if isinstance(value, tuple):
                    line[name], line[f"{name}_std"] = value
                elif isinstance(value, str | int | float | bool):
                    line[name] = value
            line |= {f"{name}_paper": value for name, value in row.paper.items()}
            flat.append({**line, "folder": str(row.folder)})
    names = dict.fromkeys(name for line in flat for name in line)
    return [{name: line.get(name) for name in names} for line in flat]


def markdown(section: Section, pictures: Sequence[Path] = ()) -> str:
    """A section as Markdown."""
    headings, cells = section.table()
    lines = [f"## {section.title}", "", _pipes(headings), _pipes(["---"] * len(headings)), *map(_pipes, cells)]
    lines += ["", *_remarks(section)]
    lines += [f"![{picture.stem}]({picture.name})" for picture in pictures]
    return "\n".join(lines).rstrip()


def _remarks(section: Section) -> list[str]:
    repeats = {row.repeats for row in section.rows}
    remarks = [f"Mean and standard deviation of {max(repeats)} repeats."] if repeats != {1} else []
    if section.paper:
        remarks.append(f"Original: {section.paper.source}.")
        remarks += [f"Differs: {sentence}" for sentence in section.paper.differs]
    return [f"* {remark}" for remark in remarks]


def page(sections: Sequence[Section], pictures: dict[str, list[Path]]) -> str:
    """All sections as one HTML page that holds its pictures."""
    body = []
    for section in sections:
        headings, cells = section.table()
        head = "".join(f"<th>{html.escape(h)}</th>" for h in headings)
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>" for line in cells)
        remarks = "".join(f"<li>{html.escape(r.removeprefix('* '))}</li>" for r in _remarks(section))
        body.append(f"<h2>{html.escape(section.title)}</h2><table><tr>{head}</tr>{rows}</table><ul>{remarks}</ul>")
        for picture in pictures[section.name]:
            data = base64.b64encode(picture.read_bytes()).decode()
            body.append(f'<img alt="{html.escape(picture.stem)}" src="data:image/png;base64,{data}">')
    style = (
        "body{font-family:sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
        "table{border-collapse:collapse}th,td{padding:.3em .8em;border-bottom:1px solid #ccc;text-align:right}"
        "th:first-child,td:first-child{text-align:left}img{max-width:100%;margin:1em 0}"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>sparseopt report</title>'
        f"<style>{style}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _write_csv(flat: Sequence[dict[str, Any]], file: Path) -> Path:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(flat[0]) if flat else [])
        writer.writeheader()
        writer.writerows(flat)
    return file


def _write_parquet(flat: Sequence[dict[str, Any]], file: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {}
    for name in flat[0] if flat else ():
        values = [line[name] for line in flat]
        # A column of mixed kinds (a setting that is a number here and a word there) is text in a typed file.
        kinds = {type(value) for value in values if value is not None}
        plain = len(kinds) <= 1 or kinds <= {int, float}
        columns[name] = values if plain else [None if v is None else str(v) for v in values]
    pq.write_table(pa.table(columns), file)
    return file


def _label(value: Any) -> Any:
    return value.get("name", str(value)) if isinstance(value, dict) else value


def _words(name: str) -> str:
    return name.replace("_", " ")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        mean, std = value
        # A spread below what is shown of the mean says nothing.
        return f"{_number(mean)} ± {_number(std, 2)}" if std > 1e-4 * abs(mean) else _number(mean)
    return _number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _number(value: float, digits: int = 4) -> str:
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value)}"
    return f"{value:.{digits}g}"


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
