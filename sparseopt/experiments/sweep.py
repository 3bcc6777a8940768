"""Floor 7: all runs of an experiment, one after the other; plain processes share them by `--shard i/n`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparseopt.experiments.config import Run
from sparseopt.experiments.runs import FolderInUse, Outcome, State, execute, fingerprint, state_of
from sparseopt.experiments.task import Estimate, Observer, Task
from sparseopt.system import processes


@dataclass(frozen=True)
class Planned:
    """A run before it starts: where it will lie, what lies there now, what it needs."""

    run: Run
    folder: Path
    state: State
    estimate: Estimate


def parse_shard(text: str) -> tuple[int, int]:
    """`"2/4"` as `(2, 4)`: the second of four.

    Raises:
        ValueError: for anything else.
    """
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise ValueError(f"--shard must be i/n with 1 <= i <= n, as in 2/4, given {text!r}")
    return int(first), int(second)


def take_shard(runs: Sequence[Run], shard: tuple[int, int]) -> list[Run]:
    """Every n-th run, from the i-th: the shards are disjoint, complete, and alike in size and kind."""
    index, count = shard
    return list(runs[index - 1 :: count])


def over_devices(runs: Sequence[Run], devices: int | str) -> list[Run]:
    """The runs on so many devices, or "all"."""
    return [replace(run, task=run.task.model_copy(update={"devices": devices})) for run in runs]


def plan(runs: Sequence[Run], output: Path) -> list[Planned]:
    """What would happen, without any work; of several processes, all take what the first finds in the folders."""
    marks = [fingerprint(run.task) for run in runs]
    processes.agree({"settings": marks, "output folder": str(output.absolute())})
    folders = [output / run.subfolder for run in runs]
    states = processes.told([state_of(folder, mark).value for folder, mark in zip(folders, marks, strict=True)])
    return [
        Planned(run, folder, State(state), run.task.estimate())
        for run, folder, state in zip(runs, folders, states, strict=True)
    ]


def check_all(planned: Sequence[Planned], *, again: bool) -> None:
    """What would stop a run in the middle of a sweep, found before the first.

    Raises:
        ValueError: listing every folder that holds something else, and everything that a task lacks.
    """
    mistakes = dict.fromkeys(
        f"{p.folder} holds the results of other settings or another version; give another --output, or --again to "
        "replace them"
        for p in planned
        if p.state is State.OTHER and not again
    )
    for p in planned:
        if p.state is State.FINISHED and not again:
            continue
        try:
            _check_devices(p.run.task)
            p.run.task.check()
        except (ValueError, ModuleNotFoundError) as error:
            mistakes |= dict.fromkeys(str(error).split("\n  "))  # runs share mistakes: each is told once
    if mistakes:
        raise ValueError("\n  ".join(("nothing was run:", *mistakes)))


def _check_devices(task: Task) -> None:
    if task.devices not in (None, 1) and not task.many_devices:
        raise ValueError(
            f"the task {task.task!r} works on one device, given devices={task.devices!r}: share its runs with "
            "--shard i/n"
        )


def run_all(
    planned: Sequence[Planned],
    output: Path,
    observer: Callable[[Planned], Observer],
    *,
    again: bool = False,
    ended: Callable[[Planned, Outcome], None] = lambda planned, outcome: None,
) -> list[Outcome]:
    """Execute the planned runs in order; one that fails is reported and the next one starts.

    Of several processes that work together, one that fails ends them all.

    Args:
        planned: from `plan`, checked by `check_all`.
        output: the folder of all runs.
        observer: makes each run's observer.
        again: repeat finished runs too.
        ended: called as each run ends.
    """
    outcomes = []
    for p in planned:
        try:
            outcome = execute(p.run, output, observer(p), again=again)
        except (FolderInUse, OSError) as error:
            if processes.count() > 1:
                raise  # the others would go on with this run
            outcome = Outcome(p.folder, 0, str(error))
        ended(p, outcome)
        outcomes.append(outcome)
    return outcomes
