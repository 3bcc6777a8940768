"""Output in the shell: lines, a clock, progress bars, plain tables.

Output failures never end a run: a closed pager, a full disk for `> FILE`, a lost terminal, or one without the
letters.
"""

import contextlib
import io
import os
import shlex
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from glob import escape as exactly
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from sparseopt.system.early_stop import NOTHING
from sparseopt.system.files import write_whole
from sparseopt.system.run_folder import LOCK


class _Lossy(io.FileIO):
    """A file descriptor for output: after a failure, all further output goes to the null device."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            _open_nowhere(self.fileno())
            return len(data)


def hold_streams() -> None:
    """Have stdout and stderr lose what cannot be written, and write letters that they do not know as question marks.

    Streams that the process was started without, as by `>&-`, are opened on the null device. Otherwise the first opened
    file gets the number of stdout or stderr, and what a library prints lands in it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            _open_nowhere(number)
        stream = getattr(sys, name)
        if number and stream is getattr(sys, f"__{name}__"):
            encoding = stream.encoding if stream else "utf-8"
            raw = io.BufferedWriter(_Lossy(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, encoding, errors="replace", line_buffering=True))


def _open_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


hold_streams()
console, errors = Console(highlight=False, emoji=False), Console(stderr=True, highlight=False, emoji=False)


def say(text: str, place: Console = console) -> None:
    """Print lines, on a terminal broken between words only, so that paths stay whole, and elsewhere not at all."""
    if place.is_terminal:
        # Each line keeps its indentation; rich would break long words or none.
        fill = partial(textwrap.fill, width=place.width, break_long_words=False, break_on_hyphens=False)
        text = "\n".join(fill(line, subsequent_indent=line[: -len(line.lstrip()) or None]) for line in text.split("\n"))
    place.print(text, soft_wrap=True, markup=False)


class Stop:
    """What Ctrl-C leaves behind, in the words of the command that runs. They are said once."""

    def __init__(self) -> None:
        self.asked, self._lock = False, threading.Lock()
        self.begin(lambda: NOTHING)

    def begin(self, words: Callable[[], str]) -> None:
        """A command begins, which would say these words; it may change them."""
        self.words, self._said = words, False

    def say(self) -> None:
        """Say the words, below the bars of a terminal, whose cursor is shown again."""
        with self._lock:
            if not self._said:
                self._said = True
                # Not through a console that shows bars: it would draw them again below the words.
                place = Console(stderr=True, highlight=False, emoji=False)
                place.show_cursor()
                say("\n" * place.is_terminal + self.words(), place)


stop = Stop()


def left_in(output: Path | None, since: float) -> str:
    """What a command has written since that time, in seconds, into its output folder or file, or beside the file."""

    def is_new(file: Path) -> bool:
        # A file may go meanwhile.
        with contextlib.suppress(OSError):
            return file.is_file() and file.stat().st_mtime >= since and not file.name.startswith((".", LOCK))
        return False

    if output is None:
        return NOTHING
    near = output.rglob("*") if output.is_dir() else output.parent.glob(f"{exactly(output.stem)}*")
    found = [str(file) for file in sorted(near) if is_new(file)]
    shown = ", ".join(found) if len(found) < 5 else f"{len(found)} files in {output}"
    return f"stopped; what was written stays: {shown}" if found else NOTHING


def command_line() -> str:
    """What was typed."""
    return shlex.join(["sparseopt", *sys.argv[1:]])


def write_page(file: Path, page: Callable[[str], str]) -> None:
    """Write the page that `page` makes of the command. The run is finished, so what goes wrong is only a warning."""
    try:
        write_whole(file, page(command_line()).encode(errors="replace"))
    except Exception as error:
        say(f"warning: no report: {error}", errors)
    else:
        say(f"report: {file}")


class Elapsed(ProgressColumn):
    """The time since the start, written as the time left is."""

    def render(self, task: Task) -> Text:
        return Text(duration(task.finished_time or task.elapsed or 0))


@contextmanager
def waiting(title: str) -> Iterator[Callable[[Any, int, int], None]]:
    """Show that a long call is running: a spinner and the time on a terminal, one line elsewhere; for an observer."""
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}", markup=False), Elapsed(), console=console,
        transient=True, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task(title, total=None)
        if not console.is_terminal:
            say(title)
        yield lambda what, done, total: bar.update(task, description=f"{title}: {what} {done + 1} of {total}")


def duration(seconds: float) -> str:
    """A time as text, with a suitable unit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def counting_bar(place: Console, *more: ProgressColumn) -> Progress:
    """Progress bars with counts, the time and further columns; nothing if the place is not a terminal."""
    return Progress(
        TextColumn("{task.description}", "bold", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
        Elapsed(), *more, console=place, disable=not place.is_terminal,
    )  # fmt: skip


@contextmanager
def block_progress(title: str) -> Iterator:
    """An observer for `perplexity`."""
    with counting_bar(errors) as bar:
        task = bar.add_task(title, total=None)
        yield lambda _, done, total: bar.update(task, completed=done, total=total)


def comparison_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A plain table: names in the first column, numbers in the others."""
    table = Table(title=escape(title), title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(escape(heading), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
