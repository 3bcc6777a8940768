"""What `prune_module` reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sparseopt.pruning.base.records import BlockRecord, GridRecord, LayerRecord, mean
from sparseopt.system.report import Fact, html_facts


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
