"""Floor 7: what an experiment is. A task is a typed config that knows its units of work, their records and pictures.

A run executes the units of one resolved config, one record each; a unit whose record is on disk is not repeated.
A report groups finished runs by task and lets the task's `draw` compare them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Record = dict[str, Any]
Observer = Callable[[int, int, str], None]  # parts done, parts in all, what is being done


class Strict(BaseModel):
    """A config block: unknown keys are errors, values are checked as they are set, nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class PaperFigure(Strict):
    """A published figure, shown beside ours in the row of each run whose settings match.

    Attributes:
        match: settings by dotted path, as in `{method: doge, order: 1}`; every one must equal the run's.
        values: the paper's figures by the name of our record's field.
    """

    match: dict[str, Any] = {}
    values: dict[str, float]


class Paper(Strict):
    """Where the original experiment is published, and what differs from it here.

    Attributes:
        source: authors, year, table or figure.
        figures: the published numbers.
        differs: a sentence for every setting that is not the paper's.
    """

    source: str
    figures: list[PaperFigure] = []
    differs: list[str] = []


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to need; None where nothing is known.

    Attributes:
        seconds: wall time on two CPU cores.
        memory_bytes: peak resident memory.
    """

    seconds: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class FinishedRun:
    """A run as a report and `Task.draw` see it.

    Attributes:
        folder: where it is.
        task: its resolved config.
        records: one a unit, in the order of the units.
    """

    folder: Path
    task: "Task"
    records: Sequence[Record]


class Task(Strict, ABC):
    """One experiment, resolved. Subclasses add their settings as fields and are listed in `tasks.TASKS`.

    Attributes:
        name: short name; the folder of its runs.
        title: one line for people.
        task: the kind of task.
        seed: of everything random.
        paper: the original experiment, for a reproduction.
        devices: how many to work on, or "all"; None for one. The result is the same up to rounding, so it is no part
            of what tells one run from another.
        columns: record fields worth a column in a report's table, in order (class attribute).
        row_by: record fields that tell rows of one run apart; records that agree in them are repeats, and a
            report gives their mean and spread (class attribute).
        many_devices: whether `run_unit` can work on more than one device, and in several processes, all of which
            call it (class attribute).
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
        """Keys of the independent parts, each a short unique name fit for a file name."""

    @abstractmethod
    def run_unit(self, key: str, folder: Path, observer: Observer) -> Record:
        """Do one part. Files go into `folder`, named after the key; the answer is a flat JSON-ready record.

        Of several processes, which all call this, only the first writes: ask `processes.is_first()`.

        Raises:
            ValueError: for input that cannot be used.
            RuntimeError: if the work failed.
        """

    def check(self) -> None:
        """Look at what a run will need (files, packages, names) before any work.

        Raises:
            ValueError: listing all that is missing.
        """

    def inputs(self) -> dict[str, str]:
        """Digests of what the units read and the settings only name, without fetching anything; part of a fingerprint.

        What cannot be read is left out: `check` says so.
        """
        return {}

    def estimate(self) -> Estimate:
        """What the run will need, as far as that is known."""
        return Estimate()

    @classmethod
    def draw(cls, runs: Sequence[FinishedRun]) -> dict[str, Any]:
        """Pictures of one run or of many compared: matplotlib axes (or arrays of them) by a file stem."""
        return {}
