"""The task of table 1: the time that the methods of the Doge-ADMM paper take on one picture.

Source of the comparison: Bu, Wu, Zuo, "Doge-ADMM", section 3.1.
"""

import time
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from pydantic import Field

import sparseopt as so
from doge_baselines import METHOD_NAMES, Method, Settings, Stop, algorithm_of, fit, method_label
from sparseopt.core.base.types import Observer
from sparseopt.experiments import plots
from sparseopt.experiments.task import FinishedRun, Record, grouped
from sparseopt.experiments.tasks.denoise import NoisyPicture
from sparseopt.trend.methods.doge_plan import CADENCES


class Race(NoisyPicture):
    """Add noise to a picture and fit a trend by a method of the paper, several times with fresh noise.

    Attributes:
        method: "doge", "admm", "gtf_admm", "fast_admm" or "doge_groups"; see `doge_baselines`.
        settings: "tuned" as `trend_filter` chooses them, or "published": rho = 1, no relaxation.
        stop: "gap" for the relative duality gap, or "change" for the relative change of the fit in one step.
        passes: how often each repeat is timed; the fastest fit counts.
        inner_tol: relative duality gap of the optimisation inside each step of `fast_admm`; None for a tenth of
            `tol`, about the loosest with which every setting reaches it.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "seconds", "objective", "steps", "steps_per_second", "gap", "psnr_before", "psnr_after",
    )  # fmt: skip

    task: Literal["doge_race.Race"]
    method: Method = "doge"
    settings: Settings = "tuned"
    stop: Stop = "gap"
    passes: int = Field(default=1, ge=1)
    inner_tol: float | None = Field(default=None, gt=0)

    @property
    def label(self) -> str:
        return method_label(self.method, self.settings)

    @property
    def subject_and_rule(self) -> str:
        """What runs must share for their times to be compared."""
        rule = "relative duality gap" if self.stop == "gap" else "relative change in a step"
        return f"{self.subject}\n{rule} {self.tol:.0e}".replace("e-0", "e-")

    def fit(self, y: np.ndarray, graph: so.Graph, max_steps: int) -> so.Solution:
        return fit(
            y, graph, self.penalty.build(), self.order, self.method, settings=self.settings, stop=self.stop,
            tol=self.tol, max_steps=max_steps, inner_tol=self.inner_tol,
        )  # fmt: skip

    def timed(self, y: np.ndarray, graph: so.Graph, observer: Observer) -> tuple[so.Solution, Record]:
        observer(f"{self.label}, {y.size} values", 0, 0)

        def run(limit: int) -> tuple[so.Solution, float, float]:
            start, busy = time.perf_counter(), time.process_time()
            found = jax.block_until_ready(self.fit(y, graph, limit))
            return found, time.perf_counter() - start, time.process_time() - busy

        # To compile: with fewer steps than Doge-ADMM, and so any method, does between two checks, it would be another
        # program.
        _, compile_seconds, _ = run(min(self.max_steps, CADENCES[-1]))
        runs = [run(self.max_steps) for _ in range(self.passes)]
        found, seconds = runs[0][0], min(wall for _, wall, _ in runs)
        state = getattr(found.state, "state", found.state)
        inner_steps = int(getattr(state.rows.memory, "steps", 0))
        # Processor time excludes what a busy machine adds to wall time.
        return found, {
            "seconds": seconds, "cpu_seconds": min(cpu for _, _, cpu in runs), "compile_seconds": compile_seconds,
            "steps_per_second": int(found.steps) / seconds, "algorithm": algorithm_of(self.method, self.order),
            "inner_steps": inner_steps,
        }  # fmt: skip

    @classmethod
    def draw(cls, runs: Sequence[FinishedRun]) -> dict[str, Any]:
        """The pictures of `denoise`, and over several runs the times of the methods."""
        panels = grouped(sorted(runs, key=_place), lambda task: task.subject_and_rule)
        several = any(len(same) > 1 for same in panels.values())
        return super().draw(runs) | ({"seconds": _draw_seconds(panels)} if several else {})


def _place(run: FinishedRun) -> tuple[str, bool, int]:
    """The order of lines: by problem, our settings before the published ones, the methods as they are listed."""
    task = run.task
    return task.subject_and_rule, task.settings == "published", list(METHOD_NAMES).index(task.method)


def _draw_seconds(panels: dict[str, list[FinishedRun]]) -> Any:
    """The mean time of every method with the spread over repeats, open where settings are the published ones."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    size = (3.2 + 4.4 * len(panels), 1.3 + 0.42 * max(len(runs) for runs in panels.values()))
    axes = plots.style.axes_or_new(None, len(panels), len(panels), size, sharex=True)
    for axis, (title, runs) in zip(axes, panels.items(), strict=True):
        labels = []
        for height, run in enumerate(runs):
            seconds = np.array([record["seconds"] for record in run.records])
            failed = sum(record["status"] not in ("CONVERGED", "STATIONARY") for record in run.records)
            labels.append(run.task.label + (f" ({failed} not converged)" if failed else ""))
            colour = plots.COLOURS[list(METHOD_NAMES).index(run.task.method) % len(plots.COLOURS)]
            # From the fastest to the slowest, as a deviation could reach below 0 on a log axis.
            axis.errorbar(
                seconds.mean(), height, xerr=[[seconds.mean() - seconds.min()], [seconds.max() - seconds.mean()]],
                fmt="o", markersize=9, markeredgewidth=2, color=colour,
                markerfacecolor=colour if run.task.settings == "tuned" else "white",
            )  # fmt: skip
            place = {"va": "center", "textcoords": "offset points", "xytext": (9, 0)}
            axis.annotate(f"{seconds.mean():.3g} s", (seconds.max(), height), **place)
        axis.set_yticks(range(len(labels)), labels)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.set_xscale("log")
        axis.margins(x=0.4)
        # Labels of powers alone are too few over less than a decade, and those of all ticks overlap.
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("time to the stopping rule (s)")
        axis.set_title(title, fontsize=10)
        plots.style.tidy(axis)
    return axes
