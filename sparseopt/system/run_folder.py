"""The folder of a run, for pruning and experiments alike; it is consistent at every moment.

    run.lock        held by the process that writes; the system releases it when that process ends, however it ends
    run.json        the format, the fingerprint (all that decides the result) and facts about the start; written first
    records.jsonl   one JSON line for each finished piece of work; NaN and infinities, which JSON lacks, are null
    summary.json    written last: a folder that has one holds a finished run
    report.html     all of it for people, written by the commands after the run; nothing reads it

A run with the same fingerprint resumes; another fingerprint raises an error that says what differs. A failed write
raises `DiskError` and leaves what was there.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic_core import to_json

from sparseopt.system.files import append_line, temporary_of, write_whole

LOCK, RUN, RECORDS, SUMMARY = "run.lock", "run.json", "records.jsonl", "summary.json"
# Choices that another machine might make differently: drawn text, and tokens that stay.
DRAWN, KEPT_TOKENS = "drawn.json", "kept_tokens.json"
PAGE = "report.html"
RUN_FILES = LOCK, RUN, DRAWN, KEPT_TOKENS, RECORDS, SUMMARY, PAGE
# Version of the layout above. sparseopt 0.1.0 wrote no number.
FORMAT = 3

Fingerprint = dict[str, Any]
T = TypeVar("T")


class FolderError(ValueError):
    """Raised if a run may not use a folder; the message says why and what to do."""


class FolderInUse(FolderError):
    """Raised if another process writes to a folder."""


class State(Enum):
    """What a folder holds for a run."""

    NEW = "new"
    UNFINISHED = "unfinished"  # same fingerprint, and something is missing: resumed
    FINISHED = "finished"  # same fingerprint: not repeated
    OTHER = "another run"  # another fingerprint or no run: an error


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock a folder for this process. It is created if needed, and removed again if nothing was written into it.

    Raises:
        FolderInUse: if another process holds it.
        FolderError: if it cannot be created or locked, or holds links, through which any file could be overwritten.
    """
    with contextlib.ExitStack() as held:
        try:
            held.callback(_remove_empty, [place for place in (folder, *folder.parents) if not place.exists()])
            folder.mkdir(parents=True, exist_ok=True)
            links = sorted(entry.name for entry in folder.iterdir() if entry.is_symlink())
            if links:
                shown = ", ".join(links[:8])
                raise FolderError(f"{folder} has links to other places ({shown}), which no run creates; remove them")
            held.enter_context(locked(folder / LOCK))
        except OSError as error:
            raise _unusable(folder, error) from error
        held.callback((folder / LOCK).unlink, missing_ok=True)
        yield


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _unusable(folder: Path, error: OSError) -> FolderError:
    return FolderError(f"cannot use {folder} as output folder: {error.strerror}; choose another")


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock file, which names its owner; the system releases it when the process ends, however it ends.

    Raises:
        FolderInUse: if another process holds it.
        OSError: if it cannot be opened or locked, is a link, or has a second name; the target of a link is unchanged.
    """
    with open(
        file, "a+", encoding="utf-8", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o666)
    ) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise OSError(error.errno, f"{file.name} cannot be locked ({error.strerror})", str(file)) from error
            lock.seek(0)
            raise _in_use(file, lock.read().strip() or "another process") from None
        if os.fstat(lock.fileno()).st_nlink > 1:
            raise OSError(errno.EMLINK, f"{file.name} has a second name in the file system", str(file))
        # The last owner may have removed the file between opening and locking.
        if not (file.exists() and os.path.samestat(file.stat(), os.fstat(lock.fileno()))):
            raise _in_use(file, "a process that has just ended")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}\n")
        lock.flush()
        yield
        lock.truncate(0)


def _in_use(lock: Path, owner: str) -> FolderInUse:
    return FolderInUse(f"{lock.parent} is in use by {owner}; wait for it, or choose another folder")


def contents(folder: Path) -> set[str]:
    """Names in a folder, without files of a start that was killed before it had written anything."""
    try:
        names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    except OSError as error:
        raise _unusable(folder, error) from error
    return names - {LOCK, temporary_of(folder / RUN).name}


def state_of(folder: Path, wanted: Fingerprint) -> tuple[State, list[str]]:
    """What a folder holds for the run with this fingerprint and, for another run, the `differences`.

    Raises:
        FolderError: if the folder holds something other than a run, or a run of another format.
    """
    if not contents(folder):
        return State.NEW, []
    if different := differences(read_start(folder)["fingerprint"], wanted):
        return State.OTHER, different
    return (State.FINISHED if (folder / SUMMARY).is_file() else State.UNFINISHED), []


def write_start(folder: Path, fingerprint: Fingerprint, **facts: Any) -> None:
    """Write `run.json`."""
    _write_json(folder / RUN, {"format": FORMAT, "fingerprint": fingerprint, **facts})


def read_start(folder: Path) -> dict[str, Any]:
    """The content of `run.json`; a `FolderError` if it is missing, damaged, or of another format."""
    start = read_json(folder / RUN)
    if start.get("format") != FORMAT or not isinstance(start.get("fingerprint"), dict):
        written = f"format {start['format']!r}" if "format" in start else "the format of sparseopt 0.1.0"
        raise FolderError(
            f"the run in {folder} has {written}, and this version reads only format {FORMAT}: finish or read it with "
            "the version that wrote it, or choose another folder"
        )
    return start


def differences(found: Fingerprint, wanted: Fingerprint) -> list[str]:
    """The differences between the fingerprint in a folder and a run's, one line for each dotted name."""
    old, new = ({name: repr(value) for name, value in flat(each)} for each in (found, wanted))
    return [
        f"{name}: {old.get(name)} there, {new.get(name)} here"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested mappings by their dotted name."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from flat(inner, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, value


def append_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Add a line to `records.jsonl` and force it to the disk."""
    append_line(folder / RECORDS, _text(record))


def read_records(folder: Path, parse: Callable[[Any], T]) -> tuple[list[T], list[int]]:
    """The records of a run, and the numbers of the lines without one.

    A kill may truncate the last line, a failing disk any line. `parse` turns a line's JSON value into a record, and
    raises ValueError, KeyError or TypeError if it is none.
    """
    file = folder / RECORDS
    *lines, rest = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else [""]
    records: list[T] = []
    torn = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(parse(json.loads(line)))
        except (ValueError, KeyError, TypeError, RecursionError):
            torn.append(number)
    return records, [*torn, len(lines) + 1] if rest else torn


def write_records(folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace `records.jsonl`; a crash leaves the old records or these."""
    write_whole(folder / RECORDS, "".join(f"{_text(record)}\n" for record in records))


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`, which marks the run as finished."""
    _write_json(folder / SUMMARY, summary)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    write_whole(file, f"{_text(value, indent=2)}\n")


def plain(value: Any) -> Any:
    """A value as JSON in the files of a run: null for NaN and infinities, text for other objects."""
    return json.loads(_text(value))


def _text(value: Any, indent: int | None = None) -> str:
    def other(inner: Any) -> Any:
        return inner.item() if isinstance(inner, np.generic) else str(inner)

    return to_json(value, indent=indent, inf_nan_mode="null", fallback=other).decode()


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a run; a `FolderError` if there is none."""
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise FolderError(f"{file.parent} holds no run: it has no {file.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{file} is not valid JSON ({error}); empty the folder and start again") from error
    if not isinstance(found, dict):
        raise FolderError(f"{file} holds no JSON object; empty the folder and start again")
    return found
