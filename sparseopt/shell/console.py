"""Floor 8: what a person sees in the shell whatever runs: lines, a clock, bars, plain tables.

Nothing that becomes of the place where it is shown ends a run: a pager that was closed, a full disk behind `> FILE`, a
terminal that is gone, or one without the letters.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


class Outlet:
    """stdout or stderr as they are at the moment, as far as somebody takes what is written; the rest is lost.

    Attributes:
        name: "stdout" or "stderr".
    """

    def __init__(self, name: Literal["stdout", "stderr"]) -> None:
        self.name = name

    @property
    def stream(self) -> TextIO | None:
        """Where it goes; None where the process was started without."""
        stream = getattr(sys, self.name)
        # While bars are shown, rich puts itself in front, and would hand everything back to us.
        return getattr(stream, "rich_proxied_file", stream)

    @property
    def encoding(self) -> str:
        """How letters become bytes there."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether a person sees it at once."""
        try:
            return self.stream is not None and self.stream.isatty()
        except ValueError:
            return False

    def write(self, text: str) -> int:
        """Write; letters that are not known there become question marks."""
        stream = self.stream
        if stream is not None:
            known = text.encode(self.encoding, "replace").decode(self.encoding)
            with self._lost():
                stream.write(known)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        stream = self.stream
        if stream is not None:
            with self._lost():
                stream.flush()

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        """When nobody takes it any more, it goes to nowhere from then on, also what Python flushes at its end."""
        try:
            yield
        except (OSError, ValueError):
            # A stream that is closed or has no file has nothing to flush either.
            with contextlib.suppress(OSError, ValueError):
                _open_nowhere(cast(TextIO, self.stream).fileno())


def hold_streams() -> None:
    """Open what the process was started without, as by `>&-`, to nowhere.

    Else the first file that is opened takes the number of stdout or stderr, and what a library prints lands in it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            _open_nowhere(number)


def _open_nowhere(number: int) -> None:
    """Have a file number mean the system's nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


hold_streams()
console = Console(file=cast(Any, Outlet("stdout")), highlight=False)
errors = Console(file=cast(Any, Outlet("stderr")), highlight=False)


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
