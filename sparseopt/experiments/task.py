"""The definition of an experiment. A task is a typed config that knows its units of work, their records and figures.

A run executes the units of one resolved config and writes a record for each; a unit with a record is not repeated.
A report groups finished runs by task, and the task's `draw` compares them.
"""

import difflib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from sparseopt.core.base.arguments import suggest
from sparseopt.core.base.types import Observer
from sparseopt.experiments.names import AllowCode, find_class, shortened

# The tasks that a config can name. Each is imported on use, because it may need the packages of an extra.
TASKS = {
    "denoise": "tasks.denoise.Denoise",
    "prune": "tasks.prune.Prune",
    "shrink": "tasks.shrink.Shrink",
    "trend": "tasks.trend.Trend",
}
# Tasks that a config names no longer, and what to use instead. Those of the papers are files beside their configs.
_ENDED = {"graph_signal": "has ended: `trend` smooths a signal on a graph in your own files"} | {
    old: f"has left the package: it is {new}, in configs/papers/{new.partition('.')[0]}.py of the repository, and "
    "needs --allow-code"
    for old, new in {
        "race": "doge_race.Race",
        "convergence": "doge_convergence.Convergence",
        "groups": "doge_groups.Groups",
        "descent": "maiht_descent.Descent",
    }.items()
}

Record = dict[str, Any]


class Strict(BaseModel):
    """A config block: unknown keys are errors, all values are checked, and it is immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class PaperFigure(Strict):
    """Published figures, shown next to ours in the row of each run whose settings match.

    Attributes:
        match: settings by dotted path, as in `{method: doge, order: 1}`; all must equal the run's settings.
        values: the published figures, by the name of the field in our record.
    """

    match: dict[str, Any] = {}
    values: dict[str, float]


class Paper(Strict):
    """Where the original experiment is published, and what is different here.

    Attributes:
        source: authors, year, table or figure.
        figures: the published figures.
        differs: a sentence for every setting that differs from the paper.
    """

    source: str
    figures: list[PaperFigure] = []
    differs: list[str] = []


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, for a report and `Task.draw`: a record for each unit, and the settings that its sweep varies."""

    folder: Path
    task: Any  # a `Task`, of the kind whose `draw` takes this
    records: Sequence[Record]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def arrays(self, kind: str, record: Record) -> dict[str, np.ndarray]:
        """The arrays that the unit of a record stored as `KIND-UNIT.npz`."""
        with np.load(self.folder / f"{kind}-{record['unit']}.npz") as stored:
            return dict(stored)


class Task(Strict, ABC):
    """One experiment, resolved. Subclasses add their settings as fields; a config names one in `TASKS`, or by path.

    Attributes:
        name: short name, and the name of the folder of its runs.
        title: one line for readers.
        task: the kind of task.
        seed: seed for everything random.
        paper: the original experiment, for a reproduction.
        devices: number of devices, or "all"; None for one. Results agree up to rounding, so this does not make a
            different run.
        columns: record fields that are columns of a report's table, in order (class attribute).
        row_by: record fields that distinguish the rows of one run; records that agree in them are repeats, for which a
            report gives mean and spread (class attribute).
        many_devices: whether `run_unit` supports several devices, and several processes that all call it (class
            attribute).
    """

    columns: ClassVar[tuple[str, ...]] = ()
    row_by: ClassVar[tuple[str, ...]] = ()
    many_devices: ClassVar[bool] = False

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    title: str = ""
    task: str
    seed: int = Field(default=0, ge=0)
    paper: Paper | None = None
    devices: Annotated[int, Field(ge=1)] | Literal["all"] | None = None

    @abstractmethod
    def units(self) -> list[str]:
        """Keys of the independent parts: short unique names that can be part of a file name."""

    @abstractmethod
    def run_unit(self, key: str, folder: Path, observer: Observer) -> Record:
        """Do one part and return a flat record of JSON values. Files go into `folder`, named after the key.

        If several processes call this, only the first may write: ask `processes.is_first()`.

        Raises:
            ValueError: for input that cannot be used.
            RuntimeError: if the work failed.
        """

    def check(self) -> None:
        """Check what a run needs (files, packages, names) before any work.

        Raises:
            ValueError: listing everything that is missing.
        """

    def inputs(self) -> dict[str, str]:
        """Digests of files that the settings name, for the fingerprint. Nothing is downloaded.

        What cannot be read is left out; `check` reports it.
        """
        return {}

    @classmethod
    def draw(cls, runs: Sequence[FinishedRun]) -> dict[str, Any]:
        """Figures of one run, or comparing several: matplotlib axes (or arrays of them) by the stem of the file."""
        return {}


def grouped(runs: Iterable[FinishedRun], key: Callable[[Any], str]) -> dict[str, list[FinishedRun]]:
    """The runs by a key of their tasks, in the order in which keys first appear; runs without records are left out."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        if run.records:
            groups.setdefault(key(run.task), []).append(run)
    return groups


def find_task(kind: str, allow_code: AllowCode = False) -> type[Task]:
    """The task class with a name in `TASKS`, or at a dotted path.

    Raises:
        ValueError: if the path does not lead to a task, or is not allowed.
        ModuleNotFoundError: if a package of its extra is missing.
    """
    if kind in _ENDED:
        raise ValueError(f"the task {kind!r} {_ENDED[kind]}")
    if kind not in TASKS:
        found = find_class(kind, {}, "task", allow_code)
        if not (isinstance(found, type) and issubclass(found, Task)):
            raise ValueError(f"{kind} is no subclass of sparseopt.experiments.task.Task")
        return found
    module, _, name = TASKS[kind].rpartition(".")
    return getattr(importlib.import_module(f"sparseopt.experiments.{module}"), name)


def nearest_task(kind: Any, allow_code: AllowCode = False) -> tuple[str | None, str | None]:
    """The known task nearest to a config's `task`, if any, and what is wrong with the name, if anything."""
    if kind is None:
        return None, f"this key is missing; known tasks are {', '.join(TASKS)}"
    if not isinstance(kind, str):
        return None, f"must be the name of a task, given {shortened(kind)}; {suggest('', TASKS)}"
    if "." in kind or kind in (*_ENDED, *TASKS):
        try:
            find_task(kind, allow_code)
        except ValueError as error:
            return None, str(error)
        return kind, None
    near = difflib.get_close_matches(kind, TASKS, n=1)
    return (near[0] if near else None), f"there is no task {shortened(kind)}; {suggest(kind, TASKS)}"
