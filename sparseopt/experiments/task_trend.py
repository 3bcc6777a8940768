"""Floor 7: what the tasks that fit a trend share: the picture with its noise, the fit against the clock."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from pydantic import Field

from sparseopt.core.problem import Solution, Status
from sparseopt.core.types import Observer
from sparseopt.experiments.datasets import Picture
from sparseopt.experiments.names import PenaltyConfig
from sparseopt.experiments.task import FinishedRun, Record, Task
from sparseopt.trend.graph import Graph


class PictureTask(Task):
    """A trend filter on the pixel grid of a picture with noise.

    Attributes:
        picture: which, and what of it.
        noise: standard deviation of the white noise, in grey levels; values beyond 0..255 stay.
        penalty: by name or path.
        order: k; 0 fits piecewise constant pictures, 1 piecewise linear ones.
        max_steps: step limit.
    """

    picture: Picture = Picture()
    noise: float = Field(default=20.0, ge=0)
    penalty: PenaltyConfig = PenaltyConfig.model_validate({"name": "l1", "weight": 10.0})
    order: int = Field(default=0, ge=0, le=4)
    max_steps: int = Field(default=5000, ge=1)

    def check(self) -> None:
        self.picture.load()

    def pair(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The picture, and the picture with noise."""
        clean = self.picture.load()
        return clean, clean + self.noise * np.random.default_rng(seed).standard_normal(clean.shape)

    def grid(self) -> Graph:
        """The pixel grid; the tables of a fit are built once for each such object."""
        return Graph.grid(self.picture.load().shape[:2])

    @property
    def subject(self) -> str:
        """The problem: runs with the same subject have the same answer."""
        return f"{self.picture.name}, noise {self.noise:g}, {self.penalty.label}, order {self.order}"


def grouped(runs: Iterable[FinishedRun], key: Callable[[Any], str]) -> dict[str, list[FinishedRun]]:
    """The runs by a key of their tasks, in the order in which keys first appear; runs without records are left out."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        if run.records:
            groups.setdefault(key(run.task), []).append(run)
    return groups


def timed_fit(
    fit: Callable[[int], Solution], max_steps: int, observer: Observer, what: str, passes: int = 1
) -> tuple[Solution, Record]:
    """A fit, and a record of how it ended and how long it took.

    Args:
        fit: the fit with at most so many steps; one with a single step compiles.
        max_steps: step limit.
        observer: is told what is being done.
        what: the fit, in a few words.
        passes: how often the clock runs; the fastest pass counts.
    """

    def run(limit: int) -> tuple[Solution, float, float]:
        start, busy = time.perf_counter(), time.process_time()
        found = jax.block_until_ready(fit(limit))
        return found, time.perf_counter() - start, time.process_time() - busy

    observer("compiling", 0, 0)
    _, compile_seconds, _ = run(1)
    observer(what, 0, 0)
    runs = [run(max_steps) for _ in range(passes)]
    found = runs[0][0]
    return found, {
        "seconds": min(wall for _, wall, _ in runs),
        # Of the processor: what a busy machine adds to the wall time is not in it.
        "cpu_seconds": min(cpu for _, _, cpu in runs),
        "compile_seconds": compile_seconds,
        "steps": int(found.steps),
        "objective": float(found.objective),
        "gap": float(found.gap),
        "status": Status(int(found.status)).name,
    }
