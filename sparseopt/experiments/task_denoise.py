"""Floor 7: the task `denoise`: a picture, noise, a trend filter; how long it takes and what it recovers.

Source of the comparison: Bu, Wu, Zuo, "Doge-ADMM", section 3.1 and table 1.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from pydantic import Field

from sparseopt.core.problem import Solution, Status
from sparseopt.experiments.baselines import Method, Settings, Stop, algorithm_of, fit
from sparseopt.experiments.task import Estimate, FinishedRun, Observer, Record
from sparseopt.experiments.task_trend import METHOD_NAMES, PictureTask, by_subject, method_label
from sparseopt.system import processes
from sparseopt.trend.images import psnr

# Seconds of a fit for each value, on two cores in float64 at a gap of 1e-4.
FIT_SECONDS, NESTED_FIT_SECONDS = 2.5e-6, 8e-6
PICTURES_SHOWN = 6


class Denoise(PictureTask):
    """Add noise to a picture and fit a trend, several times with fresh noise.

    Attributes:
        method: "auto", "doge", "admm", "gtf_admm", "fast_admm" or "doge_groups"; see `baselines`.
        settings: "tuned" as `trend_filter` chooses them, or "published": rho = 1, no relaxation.
        stop: "gap" for the relative duality gap, or "change" for the relative change of the fit in one step.
        tol: what the stopping rule compares with.
        repeats: each with noise of its own, from `seed`, `seed + 1`, ...
        passes: how often the clock runs on each repeat; the quickest fit counts, for what else the machine does can
            only add to it.
        dtype: of the computation.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "seconds", "objective", "steps", "steps_per_second", "gap", "psnr_before", "psnr_after",
    )  # fmt: skip

    many_devices: ClassVar[bool] = True

    task: Literal["denoise"]
    method: Method = "auto"
    settings: Settings = "tuned"
    stop: Stop = "gap"
    tol: float = Field(default=1e-4, gt=0)
    repeats: int = Field(default=1, ge=1)
    passes: int = Field(default=1, ge=1)
    dtype: Literal["float64", "float32"] = "float64"

    @property
    def label(self) -> str:
        """For bars."""
        return method_label(self.method, self.settings)

    def units(self) -> list[str]:
        """A repeat each."""
        return [f"repeat-{index}" for index in range(self.repeats)]

    def estimate(self) -> Estimate:
        """Compiling, then fits in proportion to the size of the picture."""
        values = self.picture.load().size
        nested = algorithm_of(self.method, self.grid(), self.order) == "fast_admm"
        each = 0.005 + (NESTED_FIT_SECONDS if nested else FIT_SECONDS) * values
        return Estimate(2 + self.repeats * self.passes * each, 450 * 2**20 + 600 * values)

    def run_unit(self, key: str, folder: Path, observer: Observer) -> Record:
        """One fit to compile, with the fewest steps, and those for the clock."""
        index = self.units().index(key)
        clean, noisy = self.pair(self.seed + index)
        graph = self.grid()
        penalty = self.penalty.build()

        def run(max_steps: int) -> tuple[Solution, float, float]:
            start, busy = time.perf_counter(), time.process_time()
            found = fit(
                noisy.astype(self.dtype), graph, penalty, self.order, self.method, settings=self.settings,
                stop=self.stop, tol=self.tol, max_steps=max_steps, inner_tol=self.inner_tol, dtype=self.dtype,
                devices=self.devices,
            )  # fmt: skip
            jax.block_until_ready(found.value)
            return found, time.perf_counter() - start, time.process_time() - busy

        observer(0, 0, f"{self.label}, compiling")
        _, compile_seconds, _ = run(1)
        observer(0, 0, f"{self.label}, {noisy.size} values")
        timed = [run(self.max_steps) for _ in range(self.passes)]
        solution, seconds = timed[0][0], min(wall for _, wall, _ in timed)
        value = np.asarray(solution.value, np.float64).reshape(noisy.shape)
        if index == 0 and processes.is_first():
            np.savez_compressed(
                folder / f"picture-{key}.npz",
                clean=clean.astype(np.float32), noisy=noisy.astype(np.float32), fitted=value.astype(np.float32),
            )  # fmt: skip
        state = getattr(solution.state, "state", solution.state)
        steps = int(solution.steps)
        return {
            "label": self.label,
            "algorithm": algorithm_of(self.method, graph, self.order),
            "seed": self.seed + index,
            "values": noisy.size,
            "seconds": seconds,
            # Of the processor: what a busy machine adds to the wall time is not in it.
            "cpu_seconds": min(cpu for _, _, cpu in timed),
            "compile_seconds": compile_seconds,
            "steps": steps,
            "steps_per_second": steps / seconds,
            "inner_steps": int(getattr(state, "inner_steps", 0)),
            "objective": float(solution.objective),
            "gap": float(solution.gap),
            "status": Status(int(solution.status)).name,
            "mse_before": float(np.mean((noisy - clean) ** 2)),
            "mse_after": float(np.mean((value - clean) ** 2)),
            "psnr_before": psnr(noisy, clean),
            "psnr_after": psnr(value, clean),
        }

    @classmethod
    def draw(cls, runs: Sequence[FinishedRun]) -> dict[str, Any]:
        """Before, after and the truth for every problem; over several runs also the times of the methods."""
        pictures: dict[str, Any] = {}
        shown = [run for run in runs if run.records and isinstance(run.task, Denoise)]
        first = [shown[places[0]] for places in by_subject([r.task for r in shown], lambda t: t.subject).values()]
        if first:
            pictures["pictures"] = _draw_pictures(first[:PICTURES_SHOWN])
        if any(len(places) > 1 for places in by_subject([r.task for r in shown], _race).values()):
            pictures["seconds"] = _draw_seconds(shown)
        return pictures


def _draw_pictures(runs: Sequence[FinishedRun]) -> Any:
    """A row a problem: the picture, with noise, fitted."""
    import matplotlib.pyplot as plt

    from sparseopt.experiments import plots

    stored = []
    for run in runs:
        with np.load(run.folder / f"picture-{run.records[0]['unit']}.npz") as arrays:
            stored.append({name: arrays[name] for name in ("clean", "noisy", "fitted")})
    tall = [images["clean"].shape[0] / images["clean"].shape[1] for images in stored]
    _, axes = plt.subplots(
        len(runs), 3, figsize=(10.5, sum(3.42 * ratio + 0.38 for ratio in tall) + 0.35), height_ratios=tall,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for row, run, images in zip(axes, runs, stored, strict=True):
        task, record = run.task, run.records[0]
        assert isinstance(task, Denoise)
        titles = {
            "clean": task.picture.name.replace("_", " "),
            "noisy": f"noise {task.noise:g}: {record['psnr_before']:.1f} dB",
            "fitted": f"order {task.order}, {task.penalty.label}: {record['psnr_after']:.1f} dB",
        }
        for axis, (name, title) in zip(row, titles.items(), strict=True):
            plots.plot_image(images[name], axis, title=title, limits=(0, 255))
    return axes


def _draw_seconds(runs: Sequence[FinishedRun]) -> Any:
    """The mean time of every method with the spread over repeats, open where settings are the published ones."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    from sparseopt.experiments import plots

    runs = sorted(runs, key=_place)
    panels = by_subject([run.task for run in runs], _race)
    tallest = max(len(places) for places in panels.values())
    _, axes = plt.subplots(
        1, len(panels), figsize=(3.2 + 4.4 * len(panels), 1.3 + 0.42 * tallest), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (title, places) in zip(axes[0], panels.items(), strict=True):
        labels = []
        for height, place in enumerate(places):
            run = runs[place]
            assert isinstance(run.task, Denoise)
            seconds = np.array([record["seconds"] for record in run.records])
            failed = sum(record["status"] not in ("CONVERGED", "STATIONARY") for record in run.records)
            labels.append(run.task.label + (f" ({failed} not converged)" if failed else ""))
            colour = plots.COLOURS[list(METHOD_NAMES).index(run.task.method) % len(plots.COLOURS)]
            # From the quickest to the slowest: a deviation could reach below 0 on a log axis. Dots, for a bar would
            # start at a place that means nothing.
            axis.plot([seconds.min(), seconds.max()], [height, height], color=colour, linewidth=2, zorder=2)
            axis.plot(
                seconds.mean(), height, "o", markersize=9, markeredgewidth=2, zorder=3, color=colour,
                markerfacecolor=colour if run.task.settings == "tuned" else "white",
            )  # fmt: skip
            axis.annotate(
                f"{seconds.mean():.3g} s", (seconds.max(), height), va="center", textcoords="offset points",
                xytext=(9, 0),
            )  # fmt: skip
        axis.set_yticks(range(len(labels)), labels)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.set_xscale("log")
        axis.margins(x=0.4)
        # Labels of powers alone are too few over less than a decade, and those of all ticks overlap.
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set(xlabel="time to the stopping rule (s)", title=title)
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return axes


def _place(run: FinishedRun) -> tuple[str, bool, int]:
    """The order of lines: the race, our settings before the published ones, the methods as they are listed."""
    task = run.task
    assert isinstance(task, Denoise)
    return _race(task), task.settings == "published", list(METHOD_NAMES).index(task.method)


def _race(task: Any) -> str:
    """What runs must share for their times to be compared."""
    rule = "relative duality gap" if task.stop == "gap" else "relative change in a step"
    return f"{task.subject}\n{rule} {task.tol:.0e}".replace("e-0", "e-")
