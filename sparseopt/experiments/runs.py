"""The runs of an experiment. Besides the files of `system.run_folder`, the folder of each run holds

    config.yaml     the resolved config; `sparseopt run` accepts it again
    *.png           figures
    error.txt       why the last start failed, if it did

A finished unit is a record. An interrupted run keeps complete lines of its records and runs the units without one.

Several processes that work together (`system.processes`) run every unit together; the first decides what to do, tells
the others, and writes. Independent processes share the runs with `--shard i/n`.
"""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from sparseopt.core.base.types import Observer
from sparseopt.experiments.config import Run
from sparseopt.experiments.names import AllowCode, Named, file_digest
from sparseopt.experiments.plots import save_figure
from sparseopt.experiments.task import FinishedRun, Record, Task, find_task
from sparseopt.system import processes, run_folder
from sparseopt.system.files import write_whole
from sparseopt.system.machine import environment, peak_memory_bytes, versions
from sparseopt.system.report import Fact
from sparseopt.system.run_folder import PAGE, RECORDS, RUN, SUMMARY, Fingerprint, FolderError, State
from sparseopt.system.yaml_file import read_yaml, write_yaml

CONFIG, FAILURE = "config.yaml", "error.txt"
NO_FIGURES = Fact("figures", "none, since matplotlib is not installed: pip install 'sparseopt[plot]'")
# What a run writes besides its `run.json`; `model` is from `tasks.model`, and `fit.csv` from `tasks.trend`.
WRITTEN = (SUMMARY, RECORDS, CONFIG, FAILURE, PAGE, "*.png", "*.npz", "fit.csv", "model")


@dataclass(frozen=True)
class Planned:
    """A run before it starts, with what its folder holds."""

    run: Run
    folder: Path
    state: State
    why: str  # of `State.OTHER`, see `state_of`


@dataclass(frozen=True)
class Outcome:
    """What `execute` did: how many units were run, and why the run failed, if it did.

    Units with a damaged line in `records.jsonl` were run again.
    """

    folder: Path
    done: int
    error: str | None = None
    lost: tuple[int, ...] = ()


@cache
def code_version() -> str:
    """The package's version and, in a checkout, its commit, since other code may give another result."""
    root, found = Path(__file__).parents[2], f"sparseopt {versions().get('sparseopt')}"
    if (root / ".git").exists():
        with contextlib.suppress(OSError):
            head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
            found += f", commit {head.stdout.strip()[:12]}"
    return found


def fingerprint(task: Task) -> Fingerprint:
    """Everything a result depends on: settings, code, the files of classes named by path, models and texts.

    Left out are the title, the published figures, and the number of devices, which changes results only by rounding.
    The versions of other packages are left out too; `run.json` records them.
    """
    return run_folder.plain({
        "settings": task.model_dump(mode="json", exclude={"title", "paper", "name", "devices"}),
        "code": code_version(),
        "classes": [file_digest(type(task)), *sorted(filter(None, (named.code_digest() for named in _named(task))))],
        "inputs": task.inputs(),
    })  # fmt: skip


def _named(value: Any) -> Iterator[Named]:
    if isinstance(value, Named):
        yield value
    elif isinstance(value, BaseModel | list | tuple):
        for inner in dict(value).values() if isinstance(value, BaseModel) else value:
            yield from _named(inner)


def state_of(folder: Path, wanted: Fingerprint) -> tuple[State, str]:
    """What a folder holds for the run with this fingerprint; for `State.OTHER` also why the run may not use it."""
    try:
        state, different = run_folder.state_of(folder, wanted)
    except FolderError as error:
        if not _is_run(folder) and any(folder.glob(f"*/{RUN}")):
            return State.OTHER, f"{folder} holds the runs of a sweep, and this is a single run"
        return State.OTHER, str(error)
    if different:
        why = f"{folder} holds the results of other settings or another version ({'; '.join(different)})"
        return state, why
    torn = state is State.FINISHED and records_in(folder)[1]
    return (State.UNFINISHED if torn else state), ""


def _is_run(folder: Path) -> bool:
    return (folder / RUN).is_file()


def _refusal(folder: Path, why: str, again: bool) -> str | None:
    """The message for a folder of another run, and what to do; None if it may be replaced."""
    if not _is_run(folder):
        return f"{why}; give another --output, or empty it"
    return None if again else f"{why}; give another --output, or --again to replace what is there"


def take_shard(runs: Sequence[Run], shard: str) -> list[Run]:
    """The shard `"i/n"`: every n-th run from the i-th on. Shards are disjoint, complete, and of similar size."""
    first, slash, count = shard.partition("/")
    if not (slash and first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise ValueError(f"--shard must be i/n with 1 <= i <= n, as in 2/4, given {shard!r}")
    return list(runs[int(first) - 1 :: int(count)])


def plan(runs: Sequence[Run], output: Path) -> list[Planned]:
    """Plan the runs without any work; several processes all use what the first finds in the folders."""
    wanted = [fingerprint(run.task) for run in runs]
    processes.agree({"settings": wanted, "output folder": str(output.absolute())})
    folders = [output / run.subfolder for run in runs]
    found = processes.told([(state.value, why) for state, why in map(state_of, folders, wanted)])
    return [
        Planned(run, folder, State(state), why) for run, folder, (state, why) in zip(runs, folders, found, strict=True)
    ]


def check_all(planned: Sequence[Planned], *, again: bool) -> None:
    """Check for everything that would stop a run in the middle of a sweep.

    Raises:
        ValueError: listing every folder that holds something else, and everything that a task lacks.
    """
    refusals = (_refusal(p.folder, p.why, again) for p in planned if p.state is State.OTHER)
    mistakes = dict.fromkeys(text for text in refusals if text)
    for p in planned:
        if p.state is State.FINISHED and not again:
            continue
        task = p.run.task
        try:
            if task.devices not in (None, 1) and not task.many_devices:
                raise ValueError(
                    f"the task {task.task!r} works on one device, given devices={task.devices!r}: share its runs with "
                    "--shard i/n"
                )
            task.check()
        except (ValueError, ModuleNotFoundError) as error:
            mistakes |= dict.fromkeys(str(error).split("\n  "))  # a mistake that several runs share is listed once
    if mistakes:
        raise ValueError("\n  ".join(("nothing was run:", *mistakes)))


def execute(run: Run, output: Path, observer: Observer, *, again: bool = False) -> Outcome:
    """Finish one run: the whole run, the missing part, or nothing if it is finished.

    It works in `output / run.subfolder` and calls the observer with the number of finished units, their total, and the
    current work. With `again`, earlier results in the folder are removed first.

    Raises:
        FolderError: if another process works in the folder, it has links, or it holds something else and `again` is
            not set.
    """
    folder = output / run.subfolder
    if not processes.is_first():
        missing = processes.told(None)
        for key in missing:
            run.task.run_unit(key, folder, lambda *_: None)
        return Outcome(folder, len(missing))
    with run_folder.claimed(folder):
        if not _begin(run, folder, again):
            processes.told([])
            return Outcome(folder, 0)
        return _run_units(run, folder, observer)


def _begin(run: Run, folder: Path, again: bool) -> bool:
    """Begin or continue a run in its claimed folder; False if it is finished."""
    wanted = fingerprint(run.task)
    state, why = state_of(folder, wanted)
    if state is State.OTHER and (refusal := _refusal(folder, why, again)):
        raise FolderError(refusal)
    if state is State.FINISHED and not again:
        return False
    if again or state is State.NEW:
        _clear(folder)
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        devices = 1 if run.task.devices is None else run.task.devices
        run_folder.write_start(
            folder, wanted, id=run.id, settings=run.settings, seed=run.task.seed, started=started,
            devices=devices, processes=processes.count(), **environment(),
        )  # fmt: skip
    if not (folder / CONFIG).is_file():
        write_whole(folder / CONFIG, write_yaml(run.task.model_dump(mode="json", exclude_none=True)))
    return True


def _missing(task: Task, records: Container[str]) -> list[str]:
    return [key for key in task.units() if key not in records]


def _inside(observer: Observer, done: int, total: int) -> Observer:
    """An observer for the parts of one piece of work, after `done` pieces."""

    def observe(text: Any, part: int, parts: int) -> None:
        observer(f"{text} {part}/{parts}" if parts else text, done, total)

    return observe


def _run_units(run: Run, folder: Path, observer: Observer) -> Outcome:
    task, start = run.task, time.perf_counter()
    (folder / FAILURE).unlink(missing_ok=True)
    records, torn = records_in(folder)
    run_folder.write_records(folder, records.values())
    keys, missing = task.units(), processes.told(_missing(task, records))
    for key in missing:
        done = len(records)
        observer(key, done, len(keys))
        began = time.perf_counter()
        try:
            record = task.run_unit(key, folder, _inside(observer, done, len(keys)))
        except Exception as error:
            return _failed(key, error, folder, done, torn)
        records[key] = run_folder.plain({"unit": key, **record, "unit_seconds": time.perf_counter() - began})
        run_folder.append_record(folder, records[key])
        observer(key, len(records), len(keys))
    finished = FinishedRun(folder, task, [records[key] for key in keys])
    try:
        draw(type(task), [finished], folder, task.title or task.name)
    except Exception as error:
        return _failed("drawing", error, folder, len(missing), torn)
    spreads, words = summarise(finished.records)
    summary = {
        "name": task.name,
        "id": run.id,
        "settings": run.settings,
        "units": len(keys),
        "figures": {name: {"mean": mean, "std": std} for name, (mean, std) in spreads.items()} | words,
        "seconds_this_start": time.perf_counter() - start,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    run_folder.write_summary(folder, summary)
    return Outcome(folder, len(missing), lost=tuple(torn))


def _failed(what: str, error: Exception, folder: Path, done: int, torn: Sequence[int]) -> Outcome:
    """The outcome of a run whose unit or drawing failed; with several processes, all end with the error."""
    if processes.count() > 1:
        raise error  # the others may be waiting inside the unit, or one of them was lost
    text = f"{what}: {type(error).__name__}: {error}"
    write_whole(folder / FAILURE, text + "\n")
    return Outcome(folder, done, text, tuple(torn))


def run_all(
    planned: Sequence[Planned],
    output: Path,
    observer: Callable[[Planned], Observer],
    *,
    again: bool = False,
    ended: Callable[[Planned, Outcome], None] = lambda planned, outcome: None,
) -> list[Outcome]:
    """Execute the planned runs in order; if one fails, the next one starts.

    If several processes work together, a failure in one ends them all. `observer` makes the observer of a run, `ended`
    is called after it, and `again` repeats finished runs too.
    """
    outcomes = []
    for p in planned:
        try:
            outcome = execute(p.run, output, observer(p), again=again)
        except (FolderError, OSError) as error:
            if processes.count() > 1:
                raise  # the others would start this run
            outcome = Outcome(p.folder, 0, str(error))
        ended(p, outcome)
        outcomes.append(outcome)
    return outcomes


def draw(kind: type[Task], runs: Sequence[FinishedRun], folder: Path, title: str, prefix: str = "") -> list[Path]:
    """Save the figures that a task draws for its runs; none without matplotlib."""
    pictures = kind.draw(runs) if can_draw() else {}
    return [save_figure(axes, folder / f"{prefix}{stem}.png", title) for stem, axes in pictures.items()]


def can_draw() -> bool:
    """Whether matplotlib (an extra) is installed; it is then set to draw into files."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg", force=False)
    return True


def load_run(folder: Path, allow_code: AllowCode = False) -> FinishedRun:
    """A finished run; `allow_code` as in `load_config`.

    Raises:
        ValueError: if the folder holds no finished run, or files that no run of this version writes, or its config
            names code that is not allowed.
    """
    if not (folder / SUMMARY).is_file():
        raise ValueError(f"{folder} holds no finished run: it has no {SUMMARY}")
    try:
        settings = run_folder.read_start(folder).get("settings")
        if not isinstance(settings, dict):
            raise ValueError(f"{RUN} has no settings")
        values, _ = read_yaml(folder / CONFIG)
        kind = find_task(str(values.get("task")), allow_code)
        task = kind.model_validate(values, context={"allow_code": allow_code})
        records, torn = records_in(folder)
        if torn:
            raise ValueError(
                f"line {torn[0]} of {RECORDS} holds no record; `sparseopt run` with the same settings runs its unit "
                "again"
            )
    except (ValueError, OSError) as error:
        raise ValueError(f"the run in {folder} cannot be read: {error}") from error
    return FinishedRun(folder, task, list(records.values()), settings)


def records_in(folder: Path) -> tuple[dict[str, Record], list[int]]:
    """The records in a folder by unit, the first of each, and the numbers of the lines without a record."""
    found, torn = run_folder.read_records(folder, _record_of)
    records: dict[str, Record] = {}
    for record in found:
        records.setdefault(record["unit"], record)
    return records, torn


def _record_of(values: Any) -> Record:
    if not isinstance(values["unit"], str):
        raise TypeError("a unit is a name")
    return values


def summarise(records: Sequence[Record]) -> tuple[dict[str, tuple[float, float]], dict[str, Any]]:
    """Mean and standard deviation over the units for every numeric field, and other fields if they all agree."""
    spreads, words = dict[str, tuple[float, float]](), dict[str, Any]()
    for name in dict.fromkeys(key for record in records for key in record if key not in ("unit", "unit_seconds")):
        values = [record.get(name) for record in records]
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) == len(values):
            spreads[name] = float(np.mean(numbers)), float(np.std(numbers))
        elif all(value == values[0] for value in values):
            words[name] = values[0]
    return spreads, words


def _clear(folder: Path) -> None:
    """Remove what a run wrote; the summary goes first, because a folder that has one counts as finished."""
    for entry in [entry for pattern in WRITTEN for entry in folder.glob(pattern)]:
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
