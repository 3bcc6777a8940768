"""What a person sees of experiments: the plan, the progress of a sweep, and the tables of its results."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from sparseopt.core.base.types import Observer
from sparseopt.experiments.runs import Outcome, Planned
from sparseopt.shell.console import comparison_table, console, counting_bar, say
from sparseopt.system import report
from sparseopt.system.run_folder import RECORDS, State


class SweepProgress:
    """On a terminal a bar of the runs and one of the units of the current run; elsewhere only a line for each run."""

    def __init__(self, runs: int) -> None:
        self._bar = counting_bar(console)
        self._runs = self._bar.add_task("runs", total=runs)
        self._units = self._bar.add_task("", total=None, visible=False)

    def __enter__(self) -> "SweepProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def observer(self, planned: Planned) -> Observer:
        self._bar.reset(self._units, description=name_of(planned), visible=True)

        def observe(text: Any, done: int, total: int) -> None:
            self._bar.update(self._units, completed=done, total=total, description=f"{name_of(planned)}: {text}")

        return observe

    def ended(self, planned: Planned, outcome: Outcome) -> None:
        self._bar.advance(self._runs)
        for line in outcome.lost:
            file = outcome.folder / RECORDS
            say(f"torn   {name_of(planned)}: line {line} of {file} held no record; its unit was run again")
        if outcome.error:
            say(f"FAILED {name_of(planned)}: {outcome.error}")
        elif outcome.done:
            say(f"done   {name_of(planned)}: {outcome.folder}")
        else:
            say(f"kept   {name_of(planned)}: finished before, in {outcome.folder}")


def name_of(planned: Planned) -> str:
    """The run's settings, or the experiment's name without a sweep."""
    return planned.run.id or planned.run.task.name


def plan_table(planned: Sequence[Planned]) -> Table:
    """What would run."""
    rows = [(name_of(p), p.state.value) for p in planned]
    table = comparison_table("what would run", ("run", "state"), rows)
    table.columns[0].overflow = "fold"
    return table


def plan_line(planned: Sequence[Planned], again: bool = False) -> str:
    """The plan in one line; `again` repeats finished runs."""
    left = [p for p in planned if again or p.state is not State.FINISHED]
    count = f"{len(planned)} run{'s' if len(planned) != 1 else ''}"
    if not left:
        return f"{count}, finished before" if planned else "no runs"
    where = {p.folder.parent if p.run.id else p.folder for p in planned}
    place = f", in {where.pop()}" if len(where) == 1 else ""
    return f"{count}{place}, {len(planned) - len(left)} finished"


def show_section(section: report.Report) -> None:
    """Print the facts and the table of a report."""
    for fact in section.facts:
        say(str(fact))
    for table in fitting_tables(section.table, console.width):
        console.print(table)


def fitting_tables(wide: report.Table, width: int) -> list[Table]:
    """A table as tables that fit a terminal; each part repeats the names of the rows."""
    headings, cells, labels = wide.headings, wide.rows, wide.labels
    # Figures are never broken, headings only between words; a column adds two blanks and a line.
    widths = [
        3 + max(len(word) for word in (*heading.split(), *(line[index] for line in cells)))
        for index, heading in enumerate(headings)
    ]
    parts: list[list[int]] = [[]]
    room = width - 1 - sum(widths[:labels])
    for index in range(labels, len(headings)):
        if parts[-1] and sum(widths[i] for i in parts[-1]) + widths[index] > room:
            parts.append([])
        parts[-1].append(index)
    tables = []
    for number, part in enumerate(parts):
        shown = [*range(labels), *part]
        title = wide.title if number == 0 else f"{wide.title}, continued"
        rows = [[line[i] for i in shown] for line in cells]
        table = comparison_table(title, [headings[i] for i in shown], rows)
        spare = width - 1 - sum(widths[index] for index in shown)
        for column, index in zip(table.columns, shown, strict=True):
            column.overflow = "fold"
            if spare >= 0:
                # Fixed, because rich would break words to make room for headings elsewhere.
                more = max(0, min(spare, 3 + len(headings[index]) - widths[index]))
                column.width = widths[index] - 3 + more
                spare -= more
        tables.append(table)
    return tables
