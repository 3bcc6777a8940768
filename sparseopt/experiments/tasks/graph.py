"""The task `graph_signal`: a trend filter on a map of measured rates or counts, or of a truth with noise."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from scipy import sparse
from scipy.sparse import csgraph

from sparseopt.core.base.types import Observer
from sparseopt.core.losses.scalar import Squared, check_scalar_loss
from sparseopt.core.problem.problem import Solution
from sparseopt.experiments import plots
from sparseopt.experiments.datasets import GraphData, GraphSource
from sparseopt.experiments.names import PenaltyConfig, TrendMethod
from sparseopt.experiments.task import FinishedRun, Record, Task, grouped
from sparseopt.experiments.tasks.denoise import check_penalty, timed_fit
from sparseopt.system import processes
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.filter import trend_filter
from sparseopt.trend.paths.path import trend_path
from sparseopt.trend.paths.selection import cross_validate, select

# Neighbours belong to one level if they differ by less than this fraction of the fit's range.
LEVEL_SHARE = 1e-4
FOLDS = 5


class GraphSignal(Task):
    """Fit a trend to a signal on a graph.

    Attributes:
        graph: which graph.
        signal: "measured" if the graph has one; "plateaus" (three levels) or "waves" make a truth from the
            positions, and noise is added to it.
        noise: standard deviation of this noise; the truth runs from -1 to 1.
        hidden: fraction of the nodes whose values are hidden from the fit and compared with it afterwards.
        penalty: by name or path.
        choose: how its weight is chosen from a path of `levels`: with a criterion of `select` or by cross-validation;
            null keeps the weight.
        levels: number of levels of this path, from the weight of a constant fit down to a hundredth of it.
        loss: loss by name, as in `trend_filter`; the recorded and drawn fit is then the mean, such as the rate.
        order: k.
        method: method of `trend_filter`, by name or as in `{name: doge, B: 2}`.
        tol: relative duality gap.
        max_steps: step limit.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "weight", "levels", "rmse_before", "rmse_after", "rmse_hidden", "rmse_hidden_mean", "steps", "seconds", "gap",
    )  # fmt: skip

    many_devices: ClassVar[bool] = True

    task: Literal["graph_signal"]
    graph: GraphSource = GraphSource()
    signal: Literal["measured", "plateaus", "waves"] = "measured"
    noise: float = Field(default=0.3, ge=0)
    hidden: float = Field(default=0.0, ge=0, lt=1)
    penalty: PenaltyConfig = PenaltyConfig.model_validate({"name": "l1", "weight": 1.0})
    choose: Literal["gcv", "aic", "bic", "cross_validation"] | None = None
    levels: int = Field(default=20, ge=2)
    loss: str = "square"
    order: int = Field(default=0, ge=0, le=3)
    method: TrendMethod = TrendMethod(name="auto")
    tol: float = Field(default=1e-6, gt=0)
    max_steps: int = Field(default=50_000, ge=1)

    def units(self) -> list[str]:
        return ["fit"]

    def check(self) -> None:
        self.graph.check()
        check_penalty(self.penalty)
        if self.signal == "measured" and self.graph.name == "minnesota":
            raise ValueError("the roads of Minnesota carry no measured signal: take signal=plateaus or signal=waves")
        if not isinstance(check_scalar_loss(self.loss), Squared) and self.signal != "measured":
            raise ValueError(f"{self.signal} have noise of the normal distribution: take loss=square, not {self.loss}")

    def run_unit(self, key: str, folder: Path, observer: Observer) -> Record:
        observer(f"reading {self.graph.name}", 0, 0)
        data = self.graph.load()
        rng = np.random.default_rng(self.seed)
        truth = None if self.signal == "measured" else _truth(data.positions, self.signal)
        if truth is None:
            assert data.signal is not None
            observed = data.signal
        else:
            observed = truth + self.noise * rng.standard_normal(truth.shape)
        # An isolated node has no neighbour from which it could be filled in.
        may_hide = np.isfinite(observed) & (data.graph.degrees > 0)
        hidden = may_hide & (rng.random(observed.size) < self.hidden)
        seen = np.where(hidden, np.nan, observed)
        penalty, loss, method = self.penalty.build(), check_scalar_loss(self.loss), self.method.build()
        if self.choose is not None:
            observer(f"choosing a weight from {self.levels}", 0, 0)
            penalty = dataclasses.replace(penalty, weight=self._chosen_weight(seen, data.graph, penalty))

        def fit(max_steps: int) -> Solution:
            return trend_filter(
                seen, data.graph, penalty, self.order, method, tol=self.tol, max_steps=max_steps, missing="nan",
                loss=loss, devices=self.devices,
            )  # fmt: skip

        solution, measured = timed_fit(fit, self.max_steps, observer, f"fitting {data.graph.num_nodes} nodes")
        value = np.asarray(loss.mean(solution.value))
        extra: dict[str, Any] = {} if truth is None else {"truth": truth}
        if processes.is_first():
            np.savez_compressed(folder / f"signal-{key}.npz", observed=seen, fitted=value, **extra)
        record: Record = {
            "nodes": data.graph.num_nodes,
            "edges": data.graph.num_edges,
            "missing": int(np.isnan(observed).sum()),
            # Fits of other orders bend everywhere and have no levels.
            "levels": count_levels(data.graph, value) if self.order == 0 else None,
            "weight": None if self.choose is None else penalty.weight,
            **measured,
            "apart": _rmse(value, observed),
        }
        if truth is not None:
            record |= {"rmse_before": _rmse(observed, truth), "rmse_after": _rmse(value, truth)}
        if hidden.any():
            wanted = (observed if truth is None else truth)[hidden]
            # The mean of the observed values is the prediction without a graph.
            record["rmse_hidden"] = _rmse(value[hidden], wanted)
            record["rmse_hidden_mean"] = _rmse(np.nanmean(seen), wanted)
        return record

    def _chosen_weight(self, y: np.ndarray, graph: Graph, penalty: Any) -> float:
        options: dict[str, Any] = {"num": self.levels, "ratio": 1e-2, "missing": "nan", "loss": self.loss}
        if self.choose == "cross_validation":
            return cross_validate(y, graph, penalty, self.order, folds=FOLDS, seed=self.seed, **options).weight
        assert self.choose is not None
        return select(trend_path(y, graph, penalty, self.order, **options), self.choose).weight

    @property
    def subject(self) -> str:
        """The problem: runs with the same subject have the same signal."""
        places = "".join(f"-{state.lower()}" for state in self.graph.states)
        noise = f"-noise-{self.noise:g}" if self.signal != "measured" else ""
        hidden = f"-hidden-{self.hidden:g}" if self.hidden else ""
        return f"{self.graph.name}{places}-{self.signal}{noise}{hidden}"

    @classmethod
    def draw(cls, runs: Sequence[FinishedRun]) -> dict[str, Any]:
        """For each signal the truth if there is one, the observed values, and every run's fit, in the same colours."""
        several = len({run.task.seed for run in runs if run.records}) > 1
        groups = grouped(runs, lambda task: task.subject + (f"-seed-{task.seed}" if several else ""))
        return {name: _draw(same) for name, same in groups.items()}


def _truth(positions: np.ndarray, kind: str) -> np.ndarray:
    """A signal in [-1, 1] made from places in the plane, `[n]`."""
    middle, reach = (positions.max(axis=0) + positions.min(axis=0)) / 2, np.ptp(positions, axis=0) / 2
    x, y = ((positions - middle) / reach).T
    if kind == "waves":
        return 0.5 * np.sin(2.5 * x + 0.5) + 0.5 * np.cos(3.0 * y)
    return np.select([x**2 + (y + 0.3) ** 2 < 0.2, y > 0.25], [1.0, -1.0], 0.0)


def _rmse(one: np.ndarray | np.floating, other: np.ndarray) -> float:
    return float(np.sqrt(np.nanmean((one - other) ** 2)))


def count_levels(graph: Graph, value: np.ndarray) -> int:
    """The number of connected parts on which a signal is constant, to `LEVEL_SHARE` of its range."""
    ends = value[graph.edges]
    alike = np.abs(ends[:, 0] - ends[:, 1]) <= LEVEL_SHARE * max(float(np.ptp(value)), 1e-300)
    joined = graph.edges[alike]
    adjacency = sparse.coo_array((np.ones(len(joined), bool), tuple(joined.T)), shape=(graph.num_nodes,) * 2)
    return int(csgraph.connected_components(adjacency, directed=False)[0])


def _draw(runs: Sequence[FinishedRun]) -> Any:
    """Runs on the same signal."""
    first = runs[0].task
    data = first.graph.load()
    stored = [run.arrays("signal", run.records[0]) for run in runs]
    truth, observed = stored[0].get("truth"), stored[0]["observed"]
    noise = "" if truth is None else f", noise {first.noise:g}"
    panels = [] if truth is None else [(f"truth: {first.signal}", truth)]
    panels.append((f"observed: {np.isfinite(observed).sum()} of {data.graph.num_nodes} nodes{noise}", observed))
    for run, arrays in zip(runs, stored, strict=True):
        task, record = run.task, run.records[0]
        levels = f", {record['levels']} levels" if task.order == 0 else ""
        label = task.penalty.label if task.choose is None else f"chosen weight {record['weight']:.3g}"
        panels.append((f"fit: order {task.order}, {label}{levels}", arrays["fitted"]))
    # One colour scale for all; the tails of the noise would wash the rest out.
    low, high = np.nanpercentile(observed, [1, 99]) if truth is None else (truth.min(), truth.max())
    columns, size = (2, (6.2, 3.5)) if data.polygons else (3 if len(panels) == 3 else 2, (4.8, 4.4))
    whole = (size[0] * columns, size[1] * -(-len(panels) // columns) + 0.4)
    axes = plots.style.axes_or_new(None, len(panels), columns, whole)
    for axis, (title, signal) in zip(axes, panels, strict=True):
        _draw_signal(data, signal, axis, (float(low), float(high)))
        axis.set_title(title)
    # One bar for all panels instead of one each.
    drawn = [max(axis.collections, key=lambda c: c.get_array() is not None) for axis in axes]
    for item in drawn:
        item.colorbar.remove()
    look = {"label": data.unit or "signal", "extend": "both", "shrink": 0.8, "aspect": 30}
    axes[0].figure.colorbar(drawn[-1], ax=axes[0].figure.axes, **look)
    return axes


def _draw_signal(data: GraphData, signal: np.ndarray, axis: Any, limits: tuple[float, float]) -> None:
    if data.polygons:
        plots.plot_regions(data.polygons, signal, axis, limits=limits)
    elif data.lines:
        plots.plot_lines(data.lines, signal, axis, limits=limits)
    else:
        plots.plot_graph_signal(data.graph, data.positions, signal, axis, limits=limits)
    if data.marks is not None:
        axis.plot(*data.marks.T, "^", color=plots.COLOURS[5], markersize=7, markeredgecolor="white")
    # A degree of longitude is shorter than one of latitude.
    axis.set_aspect(1 / np.cos(np.deg2rad(np.mean(data.positions[:, 1]))))
