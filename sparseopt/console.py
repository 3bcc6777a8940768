"""Floor 8: what a person sees in the shell whatever runs: lines, a clock, bars, plain tables."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """One line, never broken by the width of what is not a terminal."""
    console.print(text, soft_wrap=True, markup=False)


@dataclass
class Clock:
    """Seconds since it was made; still once `waiting` ends."""

    start: float
    seconds: float = 0.0


@contextmanager
def waiting(title: str) -> Iterator[Clock]:
    """Show that one long call is running: a moving sign and the time on a terminal, one line elsewhere."""
    clock = Clock(time.perf_counter())
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True,
        disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        bar.add_task(title, total=None)
        if not console.is_terminal:
            say(title)
        yield clock
    clock.seconds = time.perf_counter() - clock.start


def packed_line(dense_bytes: int, stored_bytes: int) -> str:
    """What packing made of a model's tensors."""
    ratio = stored_bytes / dense_bytes
    return f"tensors: {dense_bytes:,} bytes dense, {stored_bytes:,} bytes packed, ratio {ratio:.4f}"


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def counting_bar(place: Console) -> Progress:
    """Bars with what is done of all and the time; nothing where the place is no terminal."""
    return Progress(
        TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        console=place, disable=not place.is_terminal,
    )  # fmt: skip


@contextmanager
def block_progress(title: str) -> Iterator:
    """Observer of `perplexity`: blocks done of all."""
    with counting_bar(console) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def comparison_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A plain table: the first column names, the others figures."""
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table
