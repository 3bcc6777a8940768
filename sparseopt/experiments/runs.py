"""Floor 7: the run folder. Everything about a run lies in it, whole at every moment:

    run.json        fingerprint, settings, seed, versions, machine; written first
    config.yaml     the resolved config; `sparseopt run` takes it again
    records.jsonl   one line a finished unit, flushed to the disk before the next unit starts
    *.png           pictures
    summary.json    figures over all records; written last: a folder with it is finished

A killed run leaves whole lines and perhaps the start of one. The next start drops that start and any other line that is
torn, keeps the others, and does the units that have none. A lock that ends with its process keeps two processes out of
one folder.

Several processes that work together (`system.processes`) do every unit together; the first finds out what is to be
done, tells the others, and writes.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sparseopt.experiments.config import Run
from sparseopt.experiments.names import AllowCode, Named, code_context, file_digest
from sparseopt.experiments.task import FinishedRun, Observer, Record, Task
from sparseopt.experiments.tasks import find_task
from sparseopt.experiments.yaml_file import read_yaml
from sparseopt.system import processes
from sparseopt.system.files import InUse, locked, refuse_links, temporary_of, write_whole
from sparseopt.system.machine import environment, peak_memory_bytes

LOCK, HEADER, CONFIG, RECORDS, SUMMARY, FAILURE = (
    ".lock", "run.json", "config.yaml", "records.jsonl", "summary.json", "error.txt",
)  # fmt: skip


class State(Enum):
    """What lies in a run's folder."""

    NEW = "new"
    BROKEN = "unfinished"  # same fingerprint, no summary or a torn record: goes on
    FINISHED = "finished"  # same fingerprint: not repeated
    OTHER = "another run"  # another fingerprint: never touched unasked


class FolderInUse(RuntimeError):
    """Another process works in the run's folder."""


@dataclass(frozen=True)
class Outcome:
    """What `execute` did.

    Attributes:
        folder: of the run.
        done: how many units were run.
        error: the failure's text if it failed.
        lost: lines of an earlier start's `records.jsonl` that held no record; their units were run again.
    """

    folder: Path
    done: int
    error: str | None = None
    lost: tuple[int, ...] = ()


@cache
def code_digest() -> str:
    """A hash of the package's own source files: another code may give another result."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def fingerprint(task: Task) -> str:
    """A hash of what a result depends on: the settings, the code, the files of classes named by path, and texts.

    The title and the published figures say nothing about the result and stay out, and so does the number of devices,
    on which it hangs up to rounding. So do the versions of other packages, which `run.json` records, and the contents
    of models and signals that are named by a path.
    """
    settings = task.model_dump(mode="json", exclude={"title", "paper", "name", "devices"})
    own = [file_digest(type(task)), *sorted(digest for named in _named(task) if (digest := named.code_digest()))]
    text = json.dumps([settings, code_digest(), own, task.inputs()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _named(value: Any) -> Iterator[Named]:
    if isinstance(value, Named):
        yield value
    elif isinstance(value, Task) or hasattr(value, "model_fields_set"):
        for name in type(value).model_fields:
            yield from _named(getattr(value, name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _named(item)


def state_of(folder: Path, mark: str) -> State:
    """What lies in a folder, for the run with this fingerprint."""
    # A start that was killed before its header was whole has done nothing yet.
    if not folder.exists() or {f.name for f in folder.iterdir()} <= {LOCK, temporary_of(folder / HEADER).name}:
        return State.NEW
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return State.OTHER
    if header.get("fingerprint") != mark:
        return State.OTHER
    whole = (folder / SUMMARY).is_file() and not recover_records(folder, mend=False)[1]
    return State.FINISHED if whole else State.BROKEN


def execute(run: Run, output: Path, observer: Observer, *, again: bool = False) -> Outcome:
    """Bring one run to its end: all of it, what is missing of it, or nothing if it is finished.

    Args:
        run: what to do.
        output: the folder of all runs; this one works in `output / run.subfolder`.
        observer: called with units done, units in all, and what is being done.
        again: remove what an earlier run left in the folder and start anew.

    Raises:
        FolderInUse: if another process works there.
        ValueError: if the folder holds something else, and `again` is not set, or links.
    """
    folder = output / run.subfolder
    if not processes.is_first():
        return _follow(run, folder)
    mark = fingerprint(run.task)
    with _locked(folder):
        state = state_of(folder, mark)
        if state is State.OTHER and not again:
            raise ValueError(
                f"{folder} holds the results of other settings or another version; "
                "give another --output, or --again to replace them"
            )
        if state is State.FINISHED and not again:
            processes.told([])
            return Outcome(folder, 0)
        if again or state is State.NEW:
            _clear(folder)
            _write_header(folder, run, mark)
        if not (folder / CONFIG).is_file():
            _write_config(folder, run)
        return _run_units(run, folder, observer)


def _follow(run: Run, folder: Path) -> Outcome:
    """Do what the first process does, without a word."""
    missing = processes.told(None)
    for key in missing:
        run.task.run_unit(key, folder, lambda done, total, text: None)
    return Outcome(folder, len(missing))


def _run_units(run: Run, folder: Path, observer: Observer) -> Outcome:
    task, start = run.task, time.perf_counter()
    (folder / FAILURE).unlink(missing_ok=True)
    records, torn = recover_records(folder)
    lost = tuple(torn)
    keys = task.units()
    known = {record["unit"] for record in records}
    missing = processes.told([key for key in keys if key not in known])
    with (folder / RECORDS).open("a", encoding="utf-8") as lines:
        for key in missing:
            observer(len(known), len(keys), key)
            began = time.perf_counter()
            try:
                record = task.run_unit(key, folder, _inside(observer, len(known), len(keys)))
            except Exception as error:
                if processes.count() > 1:
                    raise  # the others may wait in the middle of the unit; or this is what the end of one looks like
                text = f"{key}: {type(error).__name__}: {error}"
                write_whole(folder / FAILURE, text + "\n")
                return Outcome(folder, len(known), text, lost)
            record = {"unit": key, **record, "unit_seconds": time.perf_counter() - began}
            lines.write(json.dumps(_plain(record), allow_nan=False) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
            known.add(key)
            observer(len(known), len(keys), key)
    done = [record for record in recover_records(folder)[0] if record["unit"] in set(keys)]
    done.sort(key=lambda record: keys.index(record["unit"]))
    draw_run(FinishedRun(folder, task, done), folder)
    summary = {
        "name": task.name,
        "id": run.id,
        "settings": dict(run.settings),
        "units": len(done),
        "figures": summarise(done),
        "seconds_this_start": time.perf_counter() - start,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    write_whole(folder / SUMMARY, json.dumps(_plain(summary), indent=2) + "\n")
    return Outcome(folder, len(missing), lost=lost)


def _inside(observer: Observer, done: int, total: int) -> Observer:
    """What a unit sees: its own parts, shown as text beside the units' count."""
    return lambda part, parts, text: observer(done, total, f"{text} {part}/{parts}" if parts else text)


def draw_run(finished: FinishedRun, folder: Path) -> list[Path]:
    """The run's pictures; none without matplotlib, which is an extra."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return []
    matplotlib.use("Agg", force=False)
    from sparseopt.experiments.plots import save_figure

    pictures = type(finished.task).draw([finished])
    return [
        save_figure(axes, folder / f"{stem}.png", finished.task.title or finished.task.name)
        for stem, axes in pictures.items()
    ]


def load_run(folder: Path, allow_code: AllowCode = False) -> tuple[FinishedRun, dict[str, Any]]:
    """A finished run and its summary.

    Args:
        folder: of the run.
        allow_code: whether to import a task and classes that its config names by a path outside this package.

    Raises:
        ValueError: if the folder holds none, or files that no run writes, or its config's code is not allowed.
    """
    if not (folder / SUMMARY).is_file():
        raise ValueError(f"{folder} holds no finished run: it has no {SUMMARY}")
    try:
        values, _ = read_yaml(folder / CONFIG)
        task = find_task(str(values.get("task")), allow_code).model_validate(values, context=code_context(allow_code))
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        records, torn = recover_records(folder, mend=False)
        if torn:
            raise ValueError(
                f"line {torn[0]} of {RECORDS} holds no record; `sparseopt run` with the same settings runs its unit "
                "again"
            )
        if not isinstance(summary, dict) or not isinstance(summary.get("settings"), dict):
            raise ValueError(f"{SUMMARY} has no settings")
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"the run in {folder} cannot be read: {error}") from error
    return FinishedRun(folder, task, records), summary


def recover_records(folder: Path, *, mend: bool = True) -> tuple[list[Record], list[int]]:
    """The records of `records.jsonl`, one a unit, and the numbers of the lines that hold none.

    A kill cuts the last line short, a failing disk any line. With `mend` the file is left with whole lines alone.
    """
    file = folder / RECORDS
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    *lines, rest = text.split("\n")
    found = [_record_of(line) for line in lines] + ([None] if rest else [])
    torn = [number for number, record in enumerate(found, 1) if record is None]
    records: dict[str, Record] = {}
    for record in filter(None, found):
        records.setdefault(record["unit"], record)
    whole = "".join(json.dumps(record) + "\n" for record in records.values())
    if mend and whole != text:
        write_whole(file, whole)
    return list(records.values()), torn


def _record_of(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("unit"), str) else None


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """Mean and standard deviation over the units of every numeric field; other fields where they all agree."""
    figures: dict[str, Any] = {}
    for name in dict.fromkeys(key for record in records for key in record if key not in ("unit", "unit_seconds")):
        values = [record.get(name) for record in records]
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) == len(values):
            figures[name] = {"mean": float(np.mean(numbers)), "std": float(np.std(numbers))}
        elif all(value == values[0] for value in values):
            figures[name] = values[0]
    return figures


def _write_header(folder: Path, run: Run, mark: str) -> None:
    header = {
        "fingerprint": mark,
        "id": run.id,
        "settings": dict(run.settings),
        "seed": run.task.seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "code": code_digest(),
        "devices": 1 if run.task.devices is None else run.task.devices,
        "processes": processes.count(),
        **environment(),
    }
    write_whole(folder / HEADER, json.dumps(_plain(header), indent=2) + "\n")


def _write_config(folder: Path, run: Run) -> None:
    values = run.task.model_dump(mode="json", exclude_none=True, exclude_defaults=False)
    write_whole(folder / CONFIG, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _clear(folder: Path) -> None:
    """Remove what an earlier start left; the lock is ours and stays.

    The summary goes first: a folder that has one counts as finished, and a kill may come between any two of these.
    """
    (folder / SUMMARY).unlink(missing_ok=True)
    for entry in folder.iterdir():
        if entry.name == LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    refuse_links(folder)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(folder / LOCK))
        except InUse as owner:
            raise FolderInUse(f"{folder} is in use by {owner}") from None
        yield


def _plain(value: Any) -> Any:
    """JSON values; NaN and infinities become null, which every reader knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
