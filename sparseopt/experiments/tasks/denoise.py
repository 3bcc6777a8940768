"""The task `denoise`: an image or a volume, noise, and a trend filter; what it recovers."""

import time
from abc import abstractmethod
from collections.abc import Sequence
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
from sparseopt.trend.base.penalties import check_parameters
from sparseopt.trend.filter import trend_filter
from sparseopt.trend.images import psnr

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


class NoisyPicture(PictureTask):
    """Fits of a noisy image, several times with fresh noise, with a `fit` that subclasses add.

    Attributes:
        tol: tolerance of the stopping rule.
        repeats: number of repeats, each with its own noise, from `seed`, `seed + 1`, ...
    """

    columns: ClassVar[tuple[str, ...]] = ("seconds", "objective", "steps", "gap", "psnr_before", "psnr_after")

    tol: float = Field(default=1e-4, gt=0)
    repeats: int = Field(default=1, ge=1)

    @property
    @abstractmethod
    def label(self) -> str:
        """The method, for legends."""

    @abstractmethod
    def fit(self, y: np.ndarray, graph: Graph, max_steps: int) -> Solution:
        """The fit of a noisy image."""

    def timed(self, y: np.ndarray, graph: Graph, observer: Observer) -> tuple[Solution, Record]:
        """A fit, and what its record says besides the common figures: its time, here with compilation."""
        observer(f"{self.label}, {y.size} values", 0, 0)
        start = time.perf_counter()
        found = jax.block_until_ready(self.fit(y, graph, self.max_steps))
        return found, {"seconds": time.perf_counter() - start}

    def units(self) -> list[str]:
        return [f"repeat-{index}" for index in range(self.repeats)]

    def run_unit(self, key: str, folder: Path, observer: Observer) -> Record:
        index = self.units().index(key)
        clean, noisy = self.pair(self.seed + index)
        solution, record = self.timed(noisy, self.grid(), observer)
        value = np.asarray(solution.value, np.float64).reshape(noisy.shape)
        if index == 0 and processes.is_first():
            arrays: Any = {"clean": clean, "noisy": noisy, "fitted": value}
            arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
            np.savez_compressed(folder / f"picture-{key}.npz", **arrays)
        return {
            **record,
            "steps": int(solution.steps),
            "objective": float(solution.objective),
            "gap": float(solution.gap),
            "status": Status(int(solution.status)).name,
            "label": self.label,
            "seed": self.seed + index,
            "values": noisy.size,
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
