"""The reports of a finished pruning run: of a folder, stored in its `summary.json`, and of a module."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparseopt.pruning.base.records import (
    BlockRecord,
    Calibration,
    DistillationRecord,
    Footprint,
    GridRecord,
    LayerRecord,
    RepairRecord,
    Score,
    ShapeRecord,
    VocabularyRecord,
    mean,
    mean_errors,
    own_fields,
)
from sparseopt.system.machine import environment
from sparseopt.system.report import Fact, html_facts


@dataclass(frozen=True)
class PruneReport:
    """One finished run.

    Attributes:
        output: the folder or file written.
        source: the pruned model, as it was given: a path or a name on the hub; for a model in memory, the name that it
            gives.
        revision: its commit on the hub, a sha; None for your own files.
        recipe: the recipe as plain values.
        route: what ran the model: "flax", or "torch" for the whole model of an unknown family.
        layers: one record for each pruned layer, in the model's order.
        blocks: one record for each reconstructed block.
        grids: one record for each layer that was rounded to a grid of few bits.
        in_floats: the weights of linear layers that stay in floats though bits were asked for.
        prunable_size: number of weights in all linear layers of the model's blocks, including layers that stay dense.
        bos: the token id before every window; None for none.
        solver_seconds: time of all layer solves. This and the phases below exclude compilation.
        reconstruction_seconds: time of all reconstructions.
        survey_seconds: time of the measurements on the dense model before the pass.
        compile_seconds: time of compiling the programs of the pass.
        layer_compilations: programs compiled for layer solves; at most the number of distinct shapes.
        calibration_seconds: time of all forward passes and Grams.
        seconds: time of the whole run.
        peak_memory_bytes: largest resident set of the process during the run, or since its start if not known.
        calibration: the tokens that the run used.
        footprint: the memory and disk that the run was expected to need.
        dense_bytes: dense size of the model's tensors in the dtypes written.
        stored_bytes: size of the same tensors as stored; smaller if they were rounded to grids.
        devices: number of devices, of all processes together.
        processes: number of processes; times and memory are for the first one.
        platform: platform of the devices, as JAX names it: "cpu", "gpu", "tpu".
        precision: precision of products of activations, as JAX names it; "highest" is float32 on every platform.
        resumed_blocks: blocks that an earlier run into the folder had finished; their records are that run's.
        shape: what a smaller model keeps; None if only zeros were made.
        repairs: one record for each block that was fitted across a gap.
        vocabulary: the tokens that a smaller model keeps; None for all.
        distilled: the training of the whole model at the end; None if there was none.
        scores: perplexities before and after; empty if the recipe has `score` "none".
        other_weights: number of weights in the blocks' matrices that are not linear layers, such as experts that
            transformers stacks; they are not pruned. 0 for a known family.
        draw_seconds: wall-clock time of drawing the calibration windows; 0 if they were given or stored before.
        kept: whether an earlier call had finished the run; the report is then that call's.
    """

    output: Path
    source: str
    revision: str | None
    recipe: dict[str, Any]
    route: Literal["flax", "torch"]
    layers: list[LayerRecord] = field(repr=False)
    blocks: list[BlockRecord] = field(repr=False)
    grids: list[GridRecord] = field(repr=False)
    prunable_size: int
    bos: int | None
    solver_seconds: float
    reconstruction_seconds: float
    survey_seconds: float
    compile_seconds: float
    layer_compilations: int
    calibration_seconds: float
    seconds: float
    peak_memory_bytes: int
    calibration: Calibration
    footprint: Footprint
    dense_bytes: int
    stored_bytes: int
    devices: int
    processes: int
    platform: str
    precision: str
    shape: ShapeRecord | None = None
    repairs: list[RepairRecord] = field(default_factory=list, repr=False)
    vocabulary: VocabularyRecord | None = None
    distilled: DistillationRecord | None = None
    scores: tuple[Score, ...] = ()
    other_weights: int = 0
    in_floats: tuple[str, ...] = ()
    draw_seconds: float = 0.0
    resumed_blocks: int = 0
    kept: bool = False

    @classmethod
    def from_summary(cls, summary: Mapping[str, Any], output: Path, **records: Any) -> "PruneReport":
        """The report of a finished run from its `summary.json` and its records, passed by field name.

        Raises:
            KeyError, TypeError: if a figure is missing.
        """
        own = own_fields(cls, summary) | records | {"output": output, "kept": True}
        own["scores"] = tuple(Score(**score) for score in summary.get("scores", ()))
        if own.get("vocabulary") is not None:
            own["vocabulary"] = VocabularyRecord(**own["vocabulary"])
        kinds = {"footprint": Footprint, "calibration": Calibration}
        return cls(**own | {name: kind(**summary[name]) for name, kind in kinds.items()})

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in the pruned layers; 0 for a smaller dense model."""
        if self.shape is not None or not self.layers:
            return 0.0
        return sum(r.zeros for r in self.layers) / sum(r.size for r in self.layers)

    @property
    def total_sparsity(self) -> float:
        """These zeros as a fraction of the weights of all linear layers; 0 for a smaller dense model."""
        return 0.0 if self.shape is not None else sum(r.zeros for r in self.layers) / self.prunable_size

    @property
    def errors(self) -> dict[str, float | None]:
        """The mean errors of layers, and what grids and plain rounding add to them; None if there are none."""
        error, heldout = mean_errors(self.layers)
        grid, rounded = mean(r.relative_error for r in self.grids), mean(r.rounded_error for r in self.grids)
        names = ("mean_relative_error", "mean_heldout_error", "mean_grid_error", "mean_rounded_error")
        return dict(zip(names, (error, heldout, grid, rounded), strict=True))

    @property
    def starved_experts(self) -> list[str]:
        return sorted({r.layer.rpartition(".")[0] for r in self.layers if r.starved})

    @property
    def kept_masks(self) -> list[str]:
        """The layers that already had at least the requested zeros, and so keep their mask."""
        return [r.layer for r in self.layers if r.given_zeros and r.zeros == r.given_zeros]

    @property
    def blocked_layers(self) -> dict[str, int]:
        """The layers whose solve did not fit in memory, with the number of blocks of outputs of each."""
        return {r.layer: r.output_blocks for r in self.layers if r.output_blocks > 1}

    @property
    def block_losses(self) -> tuple[float | None, float | None]:
        """The mean error of the trained blocks before and after their training."""
        return mean(b.first_loss for b in self.blocks), mean(b.last_loss for b in self.blocks)

    def _repr_html_(self) -> str:
        error, heldout = mean_errors(self.layers)
        figures = {"zeros": self.sparsity, "mean relative error": error, "on held-out tokens": heldout}
        facts = [Fact(name, f"{value:.5g}") for name, value in figures.items() if value is not None]
        scores = [Fact(f"perplexity on {s.text}", f"{s.before:.2f} before, {s.after:.2f} after") for s in self.scores]
        ends = [Fact("model", self.source), Fact("output", str(self.output))]
        return html_facts("PruneReport", [*ends, *facts, *scores, Fact("seconds", f"{self.seconds:.1f}")])

    def summary(self) -> dict[str, Any]:
        """For `summary.json`."""
        figures = {k: v for k, v in asdict(self).items() if k not in ("layers", "blocks", "grids", "repairs", "kept")}
        return {
            **figures,
            "output": str(self.output),
            "layers": len(self.layers),
            "reconstructed_blocks": len(self.blocks),
            "sparsity": self.sparsity,
            "total_sparsity": self.total_sparsity,
            **self.errors,
            "dead_inputs": sum(r.dead_inputs for r in self.layers),
            "given_zeros": sum(r.given_zeros for r in self.layers),
            "kept_masks": len(self.kept_masks),
            "starved_experts": self.starved_experts,
            "blocked_layers": self.blocked_layers,
            **environment(),
        }


@dataclass(frozen=True)
class ModuleReport:
    """The report of `prune_module`.

    Attributes:
        layers: one record for each pruned weight, in the order of execution; `block` is the index of its part.
        parts: the names of the parts, in the order of the solves: blocks, or linear layers if there are no blocks.
        left_out: the layers and weights that were not pruned, or not rounded to the grid, and why.
        not_done: what the named effort or method does, but not here: fields of the recipe, and what they are for.
        grids: one record for each layer that was rounded to a grid of few bits.
        blocks: one record for each trained part; the last one is for the whole module.
        seconds: wall-clock time in all.
        solver_seconds: time of the solves, without compiling.
    """

    layers: list[LayerRecord]
    parts: list[str]
    left_out: Mapping[str, str]
    not_done: Mapping[str, str] = field(default_factory=dict)
    grids: list[GridRecord] = field(default_factory=list)
    blocks: list[BlockRecord] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in the pruned weights."""
        return sum(r.zeros for r in self.layers) / sum(r.size for r in self.layers)

    @property
    def mean_relative_error(self) -> float:
        return mean(r.relative_error for r in self.layers) or 0.0

    @property
    def solver_seconds(self) -> float:
        return sum(r.seconds for r in self.layers) + sum(r.seconds for r in self.grids)

    def _repr_html_(self) -> str:
        zeros, size = sum(r.zeros for r in self.layers), sum(r.size for r in self.layers)
        figures = {"mean relative error": self.mean_relative_error, "seconds": self.seconds}
        facts = [Fact(name, f"{value:.5g}") for name, value in figures.items()]
        pruned = f"{len(self.layers)} pruned, {zeros:,} of {size:,} weights are zero; {len(self.grids)} in few bits"
        return html_facts("ModuleReport", [Fact("layers", pruned), *facts])

    def __str__(self) -> str:
        width = max(len(r.layer) for r in self.layers)
        lines = [f"{'linear':{width}}  {'out x in':>13}  {'zeros':>7}  {'error':>9}"]
        for r in self.layers:
            shape = f"{r.shape[0]} x {r.shape[1]}"
            lines.append(f"{r.layer:{width}}  {shape:>13}  {100 * r.sparsity:5.1f} %  {r.relative_error:9.2e}")
        lines += [f"left out: {name} ({why})" for name, why in self.left_out.items()]
        lines += [f"not done: {name} ({why})" for name, why in self.not_done.items()]
        return "\n".join(lines)
