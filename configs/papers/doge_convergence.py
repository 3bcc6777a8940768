"""The task of figures 5 and 6: how far above the optimum each method is, after steps and after seconds.

    loss of a step = (P(b_t) - P*) / P*,    P* from a solve with a relative duality gap of 1e-9 in float64

Steps and seconds come from two passes over the same iterates. The first looks at the objective after every step. The
second only runs, with a check at every fifth step as in use, and the clock is read when the device has finished.
Source of the comparison: Bu, Wu, Zuo, "Doge-ADMM".
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

import sparseopt as so
from doge_baselines import CADENCE, DOUBLE, Method, NestedAdmm, Settings, assemble, method_label
from sparseopt.core.base.types import Observer, precision
from sparseopt.core.penalties.protocols import Norm
from sparseopt.experiments import plots
from sparseopt.experiments.task import FinishedRun, Record, Strict, grouped
from sparseopt.experiments.tasks.denoise import PictureTask

OPTIMUM_GAP = 1e-9
LEVELS = ("1e-2", "1e-3", "1e-4", "1e-6")
# The clock is read after 5, 10, 15, ... steps, then at steps this factor apart: a look costs a call from the host.
LOOK_FACTOR = 1.1


class Contender(Strict):
    """A method that takes part; see `doge_baselines`."""

    method: Method = "doge"
    settings: Settings = "tuned"

    @property
    def label(self) -> str:
        return method_label(self.method, self.settings)


class Convergence(PictureTask):
    """Run methods on one noisy picture and record the loss after every step, and the seconds.

    Attributes:
        contenders: the methods.
        tol: relative duality gap at which a method is done.
        inner_tol: as in `Race`.
        passes: how often the clock runs; between two looks the fastest pass counts.
        against: what the pictures show the loss against.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "steps_to_1e-4", "seconds_to_1e-4", "steps_to_1e-6", "seconds_to_1e-6", "seconds_per_step", "loss",
    )  # fmt: skip
    row_by: ClassVar[tuple[str, ...]] = ("method", "settings")

    task: Literal["doge_convergence.Convergence"]
    contenders: list[Contender] = Field(default=[Contender(), Contender(method="admm")], min_length=1)
    tol: float = Field(default=1e-7, gt=0)
    inner_tol: float | None = Field(default=None, gt=0)
    passes: int = Field(default=3, ge=1)
    against: list[Literal["seconds", "steps"]] = Field(default=["seconds", "steps"], min_length=1)

    def units(self) -> list[str]:
        return [f"{c.method}-{c.settings}" for c in self.contenders]

    def check(self) -> None:
        super().check()
        if len(set(self.units())) < len(self.contenders):
            raise ValueError(f"contenders must differ, given {', '.join(self.units())}")
        if not isinstance(self.penalty.build(), Norm):
            raise ValueError(f"the loss needs a certified optimum, which {self.penalty.label} does not have; use l1")

    def run_unit(self, key: str, folder: Path, observer: Observer) -> Record:
        contender = self.contenders[self.units().index(key)]
        _, noisy = self.pair(self.seed)
        graph, penalty = self.grid(), self.penalty.build()
        inner_tol = self.tol / 10 if self.inner_tol is None else self.inner_tol
        observer("the optimum", 0, 0)
        best = so.trend_filter(noisy, graph, penalty, self.order, tol=OPTIMUM_GAP, max_steps=100_000).check()
        optimum = float(best.objective)

        def parts(cadence: int) -> Any:
            return assemble(noisy, graph, penalty, self.order, contender.method, contender.settings, cadence, inner_tol)

        with precision(DOUBLE):
            observer(f"{contender.label}, step by step", 0, 0)
            made = parts(1)
            first = float(made.solver.measure(made.problem, _start(made.problem, made.solver, made.start)).objective)
            found = so.solve(
                made.problem, made.solver, made.start, tol=jnp.asarray(self.tol), max_steps=self.max_steps, history=True
            )
            steps = int(found.steps)
            objective = np.concatenate([[first], np.asarray(found.history.objective)[:steps]])
            gap = np.concatenate([[np.nan], np.asarray(found.history.gap)[:steps]])
            observer(f"{contender.label}, {steps} steps against the clock", 0, 0)
            # A step that holds an optimisation is long enough for a look after each.
            apart = 1 if isinstance(made.solver, NestedAdmm) else CADENCE
            looks = look_steps(steps, apart)
            intervals = np.min([_clocked(parts(apart), looks) for _ in range(self.passes)], axis=0)
            seconds = np.concatenate([[0.0], np.cumsum(intervals)])
        loss = (objective - optimum) / optimum
        np.savez_compressed(
            folder / f"history-{key}.npz",
            loss=loss, objective=objective, gap=gap, optimum=optimum, look_steps=looks, look_seconds=seconds,
        )  # fmt: skip
        record: Record = {
            "method": contender.method, "settings": contender.settings, "label": contender.label,
            "algorithm": made.algorithm, "optimum": optimum, "steps": steps, "seconds": float(seconds[-1]),
            "seconds_per_step": float(seconds[-1] / looks[-1]), "loss": float(loss[-1]), "gap": float(gap[-1]),
        }  # fmt: skip
        for level in LEVELS:
            reached = np.flatnonzero(loss <= float(level))
            looked = np.flatnonzero(loss[looks] <= float(level))
            record[f"steps_to_{level}"] = int(reached[0]) if reached.size else None
            record[f"seconds_to_{level}"] = float(seconds[looked[0]]) if looked.size else None
        return record

    @classmethod
    def draw(cls, runs: Sequence[FinishedRun]) -> dict[str, Any]:
        """Loss against seconds and against steps; runs on the same problem share a panel."""
        problems = grouped(runs, lambda task: task.subject)
        return {"convergence": _draw(problems)} if problems else {}


def look_steps(steps: int, apart: int) -> np.ndarray:
    """0, then rising multiples of `apart`, near to a constant factor from each other, then `steps`."""
    looks = [0]
    while looks[-1] + apart < steps:
        looks.append(max(looks[-1] + apart, round(looks[-1] * LOOK_FACTOR / apart) * apart))
    return np.array([*(look for look in looks if look < steps), steps])


@jax.jit
def _start(problem: so.Problem, solver: Any, start: Any) -> Any:
    return solver.init(problem, start)


@jax.jit
def _advance(problem: so.Problem, solver: Any, state: Any, count: Any) -> Any:
    """`count` iterations: as many whole steps as fit, then single ones."""
    state = jax.lax.fori_loop(0, count // solver.stride, lambda _, s: solver.step(problem, s), state)
    single = dataclasses.replace(solver, cadence=1)
    return jax.lax.fori_loop(0, count % solver.stride, lambda _, s: single.step(problem, s), state)


def _clocked(made: Any, looks: np.ndarray) -> np.ndarray:
    """Seconds from each look to the next, compilation excluded."""
    state = jax.block_until_ready(_start(made.problem, made.solver, made.start))
    jax.block_until_ready(_advance(made.problem, made.solver, state, 1))
    seconds = []
    for count in np.diff(looks):
        start = time.perf_counter()
        state = jax.block_until_ready(_advance(made.problem, made.solver, state, int(count)))
        seconds.append(time.perf_counter() - start)
    return np.array(seconds)


def _draw(problems: dict[str, list[FinishedRun]]) -> Any:
    """Problems side by side if each has one panel, else below each other."""
    tasks = [run.task for runs in problems.values() for run in runs]
    kinds = list(dict.fromkeys(kind for task in tasks for kind in task.against))
    rows, columns = (1, len(problems)) if len(kinds) == 1 else (len(problems), len(kinds))
    size = (max(5.6 * columns, 8), 4.3 * rows + 0.4)
    axes = plots.style.axes_or_new(None, rows * columns, columns, size)
    panels = [(runs, subject, kind) for subject, runs in problems.items() for kind in kinds]
    for axis, (runs, subject, kind) in zip(axes, panels, strict=True):
        _draw_losses(runs, kind, axis)
        axis.set_title(subject, fontsize=10)
    # One legend serves panels with the same lines, and covers none of them.
    labels = axes[0].get_legend_handles_labels()[1]
    if all(axis.get_legend_handles_labels()[1] == labels for axis in axes):
        for axis in axes:
            axis.get_legend().remove()
        legend_below(axes)
    return axes


def legend_below(axes: Any) -> None:
    """One legend below panels of the same lines, in as many columns, at most three, as its figure has room for."""
    figure, (handles, labels) = axes[0].figure, axes[0].get_legend_handles_labels()
    for columns in (3, 2, 1):
        legend = figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=2.8
        )
        if legend.get_window_extent(figure.canvas.get_renderer()).width <= figure.bbox.width or columns == 1:
            return
        legend.remove()


def _draw_losses(runs: Sequence[FinishedRun], kind: str, axis: Any) -> None:
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for of, record in ((run, record) for run in runs for record in run.records):
        stored = of.arrays("history", record)
        loss = stored["loss"]
        x, y = (np.arange(loss.size), loss) if kind == "steps" else (stored["look_seconds"], loss[stored["look_steps"]])
        # The start is at 0 seconds, which a log axis has no place for; a loss of 0 is the optimum.
        kept = (y > 0) & ((x > 0) | (kind == "steps"))
        label, again = record["label"], 2
        while label in curves:
            label, again = f"{record['label']} ({again})", again + 1
        if kept.any():
            curves[label] = (x[kept], y[kept])
    plots.plot_curves(
        curves, axis, xlabel="time (s)" if kind == "seconds" else "iteration",
        ylabel="(loss − optimum) / optimum", logx=kind == "seconds", logy=True,
    )  # fmt: skip
    if kind == "steps":
        axis.xaxis.get_major_locator().set_params(integer=True)
