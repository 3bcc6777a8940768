"""The task of the figure of descent: the objective of one layer against iterations, for solvers side by side.

The objective is `1/2 ||X (V - W)ᵀ||² + ridge + level`, with the level fixed, so that the monotone descent can be seen.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

import sparseopt as so
from sparseopt.core.base.arguments import suggest
from sparseopt.core.base.thresholds import kth_largest
from sparseopt.core.base.types import Observer
from sparseopt.core.losses.quadratic import safe_step
from sparseopt.experiments import plots
from sparseopt.experiments.names import Named, PenaltyConfig
from sparseopt.experiments.task import FinishedRun, Record, Task
from sparseopt.experiments.tasks.model import BUNDLED, model_path
from sparseopt.layers.problem import ScaledLayer, scale_layer
from sparseopt.models import Bos, StreamedModel, check_window, load_tokenizer, open_model, start_token
from sparseopt.pruning import Recipe, load_text
from sparseopt.pruning.base.activations import make_batches
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.recipe.pass_recipe import BosChoice
from sparseopt.pruning.run.calibration import calibration_windows


class SolverConfig(Named):
    """A solver for `sparseopt.solve`."""

    kind: ClassVar[str] = "solver"
    known: ClassVar[Mapping[str, Callable[..., Any]]] = {
        "maiht": so.Maiht, "proximal_gradient": so.ProximalGradient, "iht": so.ProximalGradient,
    }  # fmt: skip
    methods: ClassVar[tuple[str, ...]] = ("init", "step", "measure", "extract")


class Descent(Task):
    """Run solvers on one layer's problem at a fixed level and record the objective after every step.

    Attributes:
        source: as in the task `prune`.
        layer: name of a linear in the checkpoint, without `.weight`.
        solvers: what to compare, by name or path.
        penalty: by name or path; without a `weight` that counts, the level is chosen by `sparsity`.
        sparsity: share of the scaled dense weights below the first threshold; fixes the level.
        ridge: added to the unit diagonal of the scaled Gram.
        steps: iterations of every solver.
        calibration: text of the calibration tokens.
        bos: as in the task `prune`.
        windows: of the text.
        seqlen: tokens a window.
    """

    columns: ClassVar[tuple[str, ...]] = ("objective", "drop", "largest_rise", "seconds", "zeros")
    row_by: ClassVar[tuple[str, ...]] = ("solver",)

    task: Literal["maiht_descent.Descent"]
    source: str = BUNDLED
    layer: str = "model.layers.9.self_attn.o_proj"
    solvers: list[SolverConfig] = Field(default=[SolverConfig(name="maiht"), SolverConfig(name="iht")], min_length=1)
    penalty: PenaltyConfig = PenaltyConfig.model_validate({"name": "l0", "weight": 1.0})
    sparsity: float = Field(default=0.5, gt=0, lt=1)
    ridge: float = Field(default=0.03, ge=0)
    steps: int = Field(default=100, ge=1)
    calibration: str = "pydoc"
    bos: BosChoice = "auto"
    windows: int = Field(default=8, ge=1)
    seqlen: int = Field(default=512, ge=2)

    def units(self) -> list[str]:
        return [f"{index}-{solver.label}" for index, solver in enumerate(self.solvers)]

    def check(self) -> None:
        model = open_model(model_path(self.source))
        _block_of(model, self.layer)
        check_window(self.seqlen, model.config.max_positions)
        start_token(model.source, load_tokenizer(model.source), self.bos)
        load_text(self.calibration, "calibration")

    def run_unit(self, key: str, folder: Path, observer: Observer) -> Record:
        observer(f"Gram of {self.layer}", 0, 0)
        layer = layer_problem(self.source, self.layer, self.calibration, self.bos, self.windows, self.seqlen)
        loss = layer.ridged(self.ridge)
        step = safe_step(loss.hessian, self.seed)
        kept = round((1 - self.sparsity) * layer.center.size)
        # The level at which the first threshold, sqrt(2 step weight) for L0, keeps this many entries.
        level = kth_largest(jnp.abs(layer.center), kept) ** 2 / (2 * step)
        named = self.penalty.build()
        problem = so.Problem(loss, dataclasses.replace(named, weight=level * named.weight))
        config = self.solvers[self.units().index(key)]
        solver = dataclasses.replace(config.build(), step_size=step)
        observer(f"{config.label}, {self.steps} steps", 0, 0)

        for _ in range(2):  # once to compile
            start = time.perf_counter()
            found = so.solve(problem, solver, layer.center, tol=-1.0, max_steps=self.steps, history=True)
            jax.block_until_ready(found)
            seconds = time.perf_counter() - start
        first = float(loss.value(layer.center) + problem.penalty.value(layer.center))
        objective = np.concatenate([[first], np.asarray(found.history.objective)])
        np.savez(folder / f"history-{key}.npz", objective=objective, seconds=seconds)
        rises = np.diff(objective)
        return {
            "solver": config.label, "layer": self.layer, "objective": float(objective[-1]),
            "drop": first - float(objective[-1]), "largest_rise": float(max(rises.max(), 0.0)), "seconds": seconds,
            "zeros": float(np.mean(np.asarray(found.value) == 0)),
        }  # fmt: skip

    @classmethod
    def draw(cls, runs: Sequence[FinishedRun]) -> dict[str, Any]:
        """A picture for each layer: the objective, and its distance to the lowest value that any solver found."""
        pictures: dict[str, Any] = {}
        for run in runs:
            curves = {record["solver"]: run.arrays("history", record)["objective"] for record in run.records}
            if curves:
                pictures[f"descent-{run.task.layer}"] = _draw_descent(curves, run.task.layer)
        return pictures


def _draw_descent(curves: dict[str, np.ndarray], layer: str) -> Any:
    axes = plots.style.axes_or_new(None, 2, 2, (11, 4.2))
    lowest = min(float(values.min()) for values in curves.values())
    whole = {label: (np.arange(len(values)), values) for label, values in curves.items()}
    above = {label: (steps, np.where(y > lowest, y - lowest, np.nan)) for label, (steps, y) in whole.items()}
    plots.plot_curves(whole, axes[0], xlabel="iteration", ylabel="objective F")
    plots.plot_curves(above, axes[1], xlabel="iteration", ylabel="F - lowest F found", logy=True)
    axes[0].set_title(layer)
    axes[1].set_title("distance to the lowest")
    return axes


def _block_of(model: StreamedModel, layer: str) -> tuple[int, str]:
    """The block of a linear and its name there."""
    names = {
        key.removesuffix(".weight"): (index, path.removesuffix(".weight"))
        for index in range(model.num_blocks)
        for path, key in model.block_keys(index).items()
    }
    if layer not in names:
        raise ValueError(f"the model has no linear {layer!r}; {suggest(layer, names)}")
    return names[layer]


@lru_cache(maxsize=1)
def layer_problem(source: str, layer: str, calibration: str, bos: Bos, windows: int, seqlen: int) -> ScaledLayer:
    """One linear of the dense model with the Gram of its inputs, in scaled coordinates."""
    model = open_model(model_path(source))
    block_index, name = _block_of(model, layer)
    recipe = Recipe(calibration=calibration, bos=bos, windows=windows, seqlen=seqlen, heldout_windows=0)
    ids = calibration_windows(model, recipe).calibration
    runner = BlockRunner()
    batches = make_batches(model.embedding()(jnp.asarray(ids)))
    for index in range(block_index):
        batches = runner.forward(model.block(index), batches)
    block = model.block(block_index)
    gram = runner.grams(block, batches)[block.linears[name]].gram
    return scale_layer(jnp.asarray(model.stored(f"{layer}.weight"), jnp.float32), gram)
