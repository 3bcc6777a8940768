"""Floor 7: all runs of an experiment, one after the other; plain processes share them by `--shard i/n`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparseopt.core.types import Observer
from sparseopt.experiments.config import Run
from sparseopt.experiments.runs import ADVICE, Outcome, State, execute, fingerprint, state_of
from sparseopt.experiments.task import Estimate
from sparseopt.system import processes
from sparseopt.system.run_folder import FolderError


@dataclass(frozen=True)
class Planned:
    """A run before it starts, with what its folder holds and what it needs."""

    run: Run
    folder: Path
    state: State
    why: str  # of `State.OTHER`, see `state_of`
    estimate: Estimate


def parse_shard(text: str) -> tuple[int, int]:
    """`"2/4"` as `(2, 4)`: the second of four; ValueError for anything else."""
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise ValueError(f"--shard must be i/n with 1 <= i <= n, as in 2/4, given {text!r}")
    return int(first), int(second)


def take_shard(runs: Sequence[Run], shard: tuple[int, int]) -> list[Run]:
    """Every n-th run, from the i-th: the shards are disjoint, complete, and similar in size and kind."""
    index, count = shard
    return list(runs[index - 1 :: count])


def over_devices(runs: Sequence[Run], devices: int | str) -> list[Run]:
    """The same runs on a number of devices, or "all"."""
    return [replace(run, task=run.task.model_copy(update={"devices": devices})) for run in runs]


def plan(runs: Sequence[Run], output: Path) -> list[Planned]:
    """What would happen, without any work; several processes all take what the first finds in the folders."""
    wanted = [fingerprint(run.task) for run in runs]
    processes.agree({"settings": wanted, "output folder": str(output.absolute())})
    folders = [output / run.subfolder for run in runs]
    found = [(state.value, why) for state, why in map(state_of, folders, wanted)]
    return [
        Planned(run, folder, State(state), why, run.task.estimate())
        for run, folder, (state, why) in zip(runs, folders, processes.told(found), strict=True)
    ]


def check_all(planned: Sequence[Planned], *, again: bool) -> None:
    """Find what would stop a run in the middle of a sweep.

    Raises:
        ValueError: listing every folder that holds something else, and everything that a task lacks.
    """
    mistakes = dict.fromkeys(f"{p.why}; {ADVICE}" for p in planned if p.state is State.OTHER and not again)
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


def run_all(
    planned: Sequence[Planned],
    output: Path,
    observer: Callable[[Planned], Observer],
    *,
    again: bool = False,
    ended: Callable[[Planned, Outcome], None] = lambda planned, outcome: None,
) -> list[Outcome]:
    """Execute the planned runs in order; after one that fails, the next one starts.

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
