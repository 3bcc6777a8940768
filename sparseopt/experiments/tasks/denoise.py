"""The task `denoise`: an image or a volume, noise, and a trend filter; how long it takes and what it recovers."""

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from pydantic import Field

from sparseopt.core.base.types import Observer
from sparseopt.core.problem.problem import Solution, Status
from sparseopt.experiments import plots
from sparseopt.experiments.datasets import Picture
from sparseopt.experiments.names import PenaltyConfig, TrendMethod
from sparseopt.experiments.task import FinishedRun, Record, Task, grouped
from sparseopt.system import processes
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.job import check_parameters
from sparseopt.trend.filter import trend_filter
from sparseopt.trend.images import psnr
from sparseopt.trend.methods.doge_plan import CADENCE

PICTURES_SHOWN = 6


class PictureTask(Task):
    """A trend filter on the grid of an image or a volume with noise.

    Attributes:
        picture: which image, and which part of it.
        noise: standard deviation of the white noise, in grey levels; values beyond 0..255 stay.
        penalty: by name or path.
        order: k; 0 fits piecewise constant images, 1 piecewise linear ones.
        max_steps: step limit.
    """

    picture: Picture = Picture()
    noise: float = Field(default=20.0, ge=0)
    penalty: PenaltyConfig = PenaltyConfig.model_validate({"name": "l1", "weight": 10.0})
    order: int = Field(default=0, ge=0, le=4)
    max_steps: int = Field(default=5000, ge=1)

    def check(self) -> None:
        self.picture.load()
        check_penalty(self.penalty)

    def pair(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The image, and the image with noise."""
        clean = self.picture.load()
        return clean, clean + self.noise * np.random.default_rng(seed).standard_normal(clean.shape)

    def grid(self) -> Graph:
        """The grid; the tables of a fit are built once for each such object."""
        return Graph.grid(self.picture.load().shape[: self.picture.axes])

    @property
    def subject(self) -> str:
        """The problem: runs with the same subject have the same answer."""
        return f"{self.picture.name}, noise {self.noise:g}, {self.penalty.label}, order {self.order}"


def check_penalty(config: PenaltyConfig) -> None:
    """Raise a ValueError if a penalty cannot have these numbers."""
    penalty = config.build()
    if np.ndim(getattr(penalty, "weight", 0.0)) == 0:  # a weight per difference is known only to the graph
        check_parameters(penalty, np.dtype(float))


def timed_fit(
    fit: Callable[[int], Solution], max_steps: int, observer: Observer, what: str, passes: int = 1
) -> tuple[Solution, Record]:
    """A fit, and a record of how it ended and how long it took.

    `fit` accepts a step limit. It is called once with few steps, to compile, then `passes` times; the fastest counts.
    """

    def run(limit: int) -> tuple[Solution, float, float]:
        start, busy = time.perf_counter(), time.process_time()
        found = jax.block_until_ready(fit(limit))
        return found, time.perf_counter() - start, time.process_time() - busy

    observer("compiling", 0, 0)
    # With fewer steps than Doge-ADMM, and so any method, does between two checks, it would be another program.
    _, compile_seconds, _ = run(min(max_steps, CADENCE))
    observer(what, 0, 0)
    runs = [run(max_steps) for _ in range(passes)]
    found = runs[0][0]
    return found, {
        "seconds": min(wall for _, wall, _ in runs),
        # Processor time, which excludes what a busy machine adds to wall time.
        "cpu_seconds": min(cpu for _, _, cpu in runs),
        "compile_seconds": compile_seconds,
        "steps": int(found.steps),
        "objective": float(found.objective),
        "gap": float(found.gap),
        "status": Status(int(found.status)).name,
    }


class NoisyPicture(PictureTask):
    """Fits of a noisy image, several times with fresh noise, with a `fit` that subclasses add.

    Attributes:
        tol: tolerance of the stopping rule.
        repeats: number of repeats, each with its own noise, from `seed`, `seed + 1`, ...
        passes: how often each repeat is timed; the fastest fit counts.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "seconds", "objective", "steps", "steps_per_second", "gap", "psnr_before", "psnr_after",
    )  # fmt: skip

    tol: float = Field(default=1e-4, gt=0)
    repeats: int = Field(default=1, ge=1)
    passes: int = Field(default=1, ge=1)

    @property
    @abstractmethod
    def label(self) -> str:
        """The method, for legends."""

    @abstractmethod
    def fit(self, y: np.ndarray, graph: Graph, max_steps: int) -> Solution:
        """The fit of a noisy image."""

    def details(self, solution: Solution) -> Record:
        """What a record says about a fit besides the common figures."""
        del solution
        return {}

    def units(self) -> list[str]:
        return [f"repeat-{index}" for index in range(self.repeats)]

    def run_unit(self, key: str, folder: Path, observer: Observer) -> Record:
        index = self.units().index(key)
        clean, noisy = self.pair(self.seed + index)
        graph, what = self.grid(), f"{self.label}, {noisy.size} values"
        solution, record = timed_fit(
            lambda most: self.fit(noisy, graph, most), self.max_steps, observer, what, self.passes
        )
        value = np.asarray(solution.value, np.float64).reshape(noisy.shape)
        if index == 0 and processes.is_first():
            arrays: Any = {"clean": clean, "noisy": noisy, "fitted": value}
            arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
            np.savez_compressed(folder / f"picture-{key}.npz", **arrays)
        return {
            **record,
            **self.details(solution),
            "label": self.label,
            "seed": self.seed + index,
            "values": noisy.size,
            "steps_per_second": record["steps"] / record["seconds"],
            "mse_before": float(np.mean((noisy - clean) ** 2)),
            "mse_after": float(np.mean((value - clean) ** 2)),
            "psnr_before": psnr(noisy, clean),
            "psnr_after": psnr(value, clean),
        }

    @classmethod
    def draw(cls, runs: Sequence[FinishedRun]) -> dict[str, Any]:
        """Truth, noise and fit for the first run on every problem."""
        first = [same[0] for same in grouped(runs, lambda task: task.subject).values()]
        return {"pictures": _draw_pictures(first[:PICTURES_SHOWN])} if first else {}


class Denoise(NoisyPicture):
    """Add noise to an image and fit a trend, several times with fresh noise.

    Attributes:
        method: of `trend_filter`, by name or as in `{name: doge, B: 2}`; it stops at a relative duality gap of `tol`.
        dtype: dtype of the computation.
    """

    many_devices: ClassVar[bool] = True

    task: Literal["denoise"]
    method: TrendMethod = TrendMethod(name="auto")
    dtype: Literal["float64", "float32"] = "float64"

    @property
    def label(self) -> str:
        return self.method.label

    def fit(self, y: np.ndarray, graph: Graph, max_steps: int) -> Solution:
        return trend_filter(
            y, graph, self.penalty.build(), self.order, self.method.build(), tol=self.tol, max_steps=max_steps,
            dtype=self.dtype, devices=self.devices,
        )  # fmt: skip


def _draw_pictures(runs: Sequence[FinishedRun]) -> Any:
    """A row for each problem: the image, with noise, and fitted; for a volume its middle slice."""
    arrays = [(run.task.picture, run.arrays("picture", run.records[0])) for run in runs]
    stored = [{name: picture.shown(values) for name, values in found.items()} for picture, found in arrays]
    tall = [images["clean"].shape[0] / images["clean"].shape[1] for images in stored]
    size = (10.5, sum(3.42 * ratio + 0.38 for ratio in tall) + 0.35)
    axes = plots.style.axes_or_new(None, 3 * len(runs), 3, size, height_ratios=tall).reshape(-1, 3)
    for row, run, images in zip(axes, runs, stored, strict=True):
        task, record = run.task, run.records[0]
        titles = {
            "clean": task.picture.name.replace("_", " "),
            "noisy": f"noise {task.noise:g}: {record['psnr_before']:.1f} dB",
            # No room for the name of the first argument.
            "fitted": f"order {task.order}, {task.penalty.label.replace('weight=', '')}: {record['psnr_after']:.1f} dB",
        }
        for axis, (name, title) in zip(row, titles.items(), strict=True):
            plots.plot_image(images[name], axis, title=title, limits=(0, 255))
    return axes
