"""Finished runs as tables and facts, written as CSV, Parquet, Markdown and one HTML page with figures.

folders -> finished runs -> rows (settings, values with their spread, the paper's values) -> reports and figures
"""

import shlex
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.experiments.config import get_by_path
from sparseopt.experiments.names import AllowCode
from sparseopt.experiments.runs import CONFIG, NO_FIGURES, can_draw, draw, load_run, summarise
from sparseopt.experiments.task import FinishedRun, Paper
from sparseopt.system.machine import environment
from sparseopt.system.report import Fact, Figure, Report, Table, html_page, markdown
from sparseopt.system.run_folder import RUN, SUMMARY, flat

# Of the name of a figure's standard error, after the name of the figure.
ERROR = "_stderr"


@dataclass(frozen=True)
class Row:
    """One line of a table: the repeats of one setting."""

    labels: dict[str, Any]  # what distinguishes it from the other rows
    figures: dict[str, Any]  # (mean, standard deviation) or text by column
    paper: dict[str, float]  # published figures by column
    repeats: int
    folder: Path


@dataclass(frozen=True)
class Section:
    """One experiment of a report."""

    name: str
    title: str
    columns: tuple[str, ...]  # names of the figures, in order
    rows: list[Row]
    facts: list[Fact]
    runs: list[FinishedRun]

    def labels(self) -> list[str]:
        """The settings that distinguish the rows."""
        return list(dict.fromkeys(key for row in self.rows for key in row.labels))

    def table(self) -> Table:
        """Its rows as text; columns without any figure are left out."""
        labels = self.labels()
        columns = {key: [row.labels.get(key) for row in self.rows] for key in labels}
        for name in self.columns:
            words = name.replace("_", " ")
            for heading, values in (
                (f"{words} (measured)" if words in labels else words, [_whole(row, name) for row in self.rows]),
                (f"{words} (paper)", [row.paper.get(name) for row in self.rows]),
            ):
                if any(value is not None for value in values):
                    columns[heading] = values
        cells = [[_cell(value) for value in line] for line in zip(*columns.values(), strict=True)]
        return Table(self.title, list(columns), cells, len(labels))

    def report(self, figures: Sequence[Figure] = ()) -> Report:
        """The section as shown in Markdown and HTML."""
        return Report(self.table(), self.facts, figures)


def with_errors(figures: Mapping[str, Any]) -> list[str]:
    """The names of the figures that have a standard error."""
    return [name.removesuffix(ERROR) for name in figures if name.endswith(ERROR)]


def _whole(row: Row, name: str) -> Any:
    found: list[Any] = [row.figures.get(name), row.figures.get(f"{name}{ERROR}")]
    # Both may be pairs already, with a spread over repeats.
    return found[0] if None in found else tuple(float(np.ravel(value)[0]) for value in found)


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Folders of finished runs, at or below the given ones.

    Raises:
        ValueError: if a folder does not exist or holds no finished run.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
        # The folder of a model has a `run.json` too.
        runs = sorted(file.parent for file in folder.rglob(RUN) if (file.parent / CONFIG).is_file())
        finished = [run.resolve() for run in runs if (run / SUMMARY).is_file()]
        if not finished:
            hint = f"; {len(runs)} unfinished, start the same command again" if runs else ""
            raise ValueError(f"{folder} holds no finished run{hint}")
        found |= dict.fromkeys(finished)
    return list(found)


def gather(folders: Iterable[Path], allow_code: AllowCode = False) -> list[Section]:
    """One section for each experiment with finished runs at or below the folders; `allow_code` as in `load_config`.

    Raises:
        ValueError: as for `find_runs` and `load_run`.
    """
    runs: dict[str, list[FinishedRun]] = {}
    for folder in find_runs(folders):
        run = load_run(folder, allow_code)
        runs.setdefault(run.task.name, []).append(run)
    sections = []
    for name, members in runs.items():
        first = members[0].task
        rows = _told_apart(members, [_rows(run) for run in members])
        named = ((*run.task.columns, *with_errors(run.records[0])) for run in members)
        columns = tuple(dict.fromkeys(column for names in named for column in names))
        sections.append(Section(name, first.title or name, columns, rows, _facts(rows, first.paper), members))
    return sections


def _facts(rows: Sequence[Row], paper: Paper | None) -> list[Fact]:
    most = max((row.repeats for row in rows), default=1)
    facts = [Fact("repeats", f"mean and standard deviation of {most}")] if most > 1 else []
    if paper:
        facts += [Fact("original", paper.source), *(Fact("differs", sentence) for sentence in paper.differs)]
    return facts


def _told_apart(members: Sequence[FinishedRun], rows: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of several runs; if labels coincide, with all settings in which the runs differ."""
    found = [row for own in rows for row in own]
    if len({repr(row.labels) for row in found}) == len(found):
        return found
    left_out = {"title", "paper", "name", "task"}
    settings = [dict(flat(run.task.model_dump(mode="json", exclude=left_out))) for run in members]
    names = dict.fromkeys(name for each in settings for name in each)
    differing = [name for name in names if len({repr(each.get(name)) for each in settings}) > 1]
    return [
        replace(row, labels={name: each.get(name) for name in differing} | row.labels)
        for each, own in zip(settings, rows, strict=True)
        for row in own
    ]


def _rows(finished: FinishedRun) -> list[Row]:
    task = finished.task
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in finished.records:
        groups.setdefault(tuple(record.get(key) for key in task.row_by), []).append(record)
    settings = task.model_dump(mode="json")
    rows = []
    for key, records in groups.items():
        own = dict(zip(task.row_by, key, strict=True))
        labels = {
            name: value.get("name", str(value)) if isinstance(value, dict) else value
            for name, value in finished.settings.items()
        } | own
        paper: dict[str, float] = {}
        for figure in task.paper.figures if task.paper else ():
            known = {name: own.get(name, get_by_path(settings, name)) for name in figure.match}
            if known == figure.match:
                paper |= figure.values
        spreads, words = summarise(records)
        rows.append(Row(labels, {**spreads, **words}, paper, len(records), finished.folder))
    return rows


def _draw_section(section: Section, folder: Path) -> list[Figure]:
    pictures = []
    for kind in dict.fromkeys(type(run.task) for run in section.runs):
        members = [run for run in section.runs if type(run.task) is kind]
        pictures += draw(kind, members, folder, section.title, f"{section.name}-")
    captions = (file.stem.removeprefix(f"{section.name}-").replace("-", " ") for file in pictures)
    return [Figure(file, caption) for file, caption in zip(pictures, captions, strict=True)]


def page_of(title: str, reports: Sequence[Report], command: str, steps: Sequence[Fact] = ()) -> str:
    """The text of report.html, which says why there are no figures if they cannot be drawn."""
    note = [] if can_draw() else [NO_FIGURES]
    noted = [replace(report, facts=[*report.facts, *note]) for report in reports]
    return html_page(title, noted, command, environment(), steps)


def run_page(sections: Sequence[Section], folder: Path, command: str) -> str:
    """The page of finished runs in a folder, with the figures that compare them."""
    with tempfile.TemporaryDirectory() as drawn:
        reports = [section.report(_draw_section(section, Path(drawn))) for section in sections]
        again = f"sparseopt report {shlex.quote(str(folder))} --output FOLDER"
        steps = [Fact(again, "writes this as CSV and Markdown, with its figures as files")]
        return page_of(sections[0].title, reports, command, steps)


def write_report(sections: Sequence[Section], folder: Path, command: str = "sparseopt report") -> list[Path]:
    """Write `report.csv`, `.parquet` (with pyarrow), `.md`, `.html` and the figures into a new or empty folder.

    Raises:
        ValueError: if the folder holds files.
    """
    from pandas import DataFrame
    from pandas.api.types import infer_dtype

    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"the report's folder {folder} is not empty; name a new one")
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"report.{ending}" for ending in ("csv", "md", "html", "parquet")]
    frame = DataFrame(flat_rows(sections), dtype=object)
    frame.to_csv(files[0], index=False)
    reports = [section.report(_draw_section(section, folder)) for section in sections]
    files[1].write_text("\n\n".join(map(markdown, reports)) + "\n", encoding="utf-8")
    files[2].write_text(page_of("sparseopt report", reports, command), encoding="utf-8")
    # A column of Parquet has one type: a setting that is a number or a word becomes text.
    mixed = frame.apply(infer_dtype).isin(["mixed", "mixed-integer"])
    frame.loc[:, mixed] = frame.loc[:, mixed].map(str, na_action="ignore")
    try:
        frame.to_parquet(files[3], index=False)
    except ImportError:  # without pyarrow
        files.pop()
    return [*files, *(Path(figure.picture) for report in reports for figure in report.figures)]


def flat_rows(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """Every row with all its figures as plain columns, for CSV and Parquet."""
    flat = []
    for section in sections:
        for row in section.rows:
            line: dict[str, Any] = {"experiment": section.name, **row.labels, "repeats": row.repeats}
            for name, value in row.figures.items():
                column = f"{name}_measured" if name in row.labels else name
                if isinstance(value, tuple):
                    line[column], line[f"{column}_std"] = value
                elif isinstance(value, str | int | float | bool):
                    line[column] = value
            line |= {f"{name}_paper": value for name, value in row.paper.items()}
            flat.append({**line, "folder": str(row.folder)})
    names = dict.fromkeys(name for line in flat for name in line)
    return [{name: line.get(name) for name in names} for line in flat]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        mean, std = value
        # A spread below the shown digits of the mean is left out.
        return f"{_number(mean)} ± {_number(std, 2)}" if std > 1e-4 * abs(mean) else _number(mean)
    return _number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _number(value: float, digits: int = 4) -> str:
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value)}"
    return f"{value:.{digits}g}"
