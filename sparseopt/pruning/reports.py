"""Floor 6: what a pruning run tells: one record a layer, one report a run, as JSON lines and a summary."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from sparseopt.system import processes
from sparseopt.system.machine import environment
from sparseopt.system.run_folder import append_record, write_summary


@dataclass(frozen=True)
class LayerRecord:
    """One pruned linear.

    Attributes:
        block: index of its block.
        layer: its name in the checkpoint, without `.weight`.
        shape: `(out, in)`.
        size: number of weights.
        zeros: zero weights as stored.
        relative_error: `||X (V - W)ᵀ||² / ||X Wᵀ||²` on the calibration tokens.
        heldout_error: the same on held-out tokens; None without any.
        steps: iterations of the method.
        status: how the solve ended, a `Status` name.
        seconds: device time of the solve.
        compile_seconds: time compiling for it, 0 when the program was at hand.
        dead_inputs: inputs that were zero on every calibration token.
        tokens: calibration tokens that reached it; of experts, those routed to it.
        starved: an expert with too few of them, pruned by magnitude; its errors are those of the weights then.
        output_blocks: into how many blocks of outputs the solve was split to fit in memory; 1 when it fitted whole.
    """

    block: int
    layer: str
    shape: tuple[int, int]
    size: int
    zeros: int
    relative_error: float
    heldout_error: float | None
    steps: int
    status: str
    seconds: float
    compile_seconds: float
    dead_inputs: int
    tokens: int
    starved: bool = False
    output_blocks: int = 1

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.size

    def as_dict(self) -> dict[str, Any]:
        """For a JSON line."""
        return {"kind": "layer", **asdict(self), "sparsity": self.sparsity}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LayerRecord":
        """The record of a line; entries that are no fields are left out.

        Raises:
            KeyError, TypeError: if a field is missing.
        """
        return cls(**{**_own_fields(cls, values), "shape": tuple(values["shape"])})


@dataclass(frozen=True)
class BlockRecord:
    """One block whose kept weights were trained after its linears had been pruned; see `reconstruction`.

    Attributes:
        block: its index.
        first_loss: relative error of the block's output on the calibration tokens, before.
        last_loss: the same, after.
        heldout_first: on the held-out tokens, before; None without any.
        heldout_best: the same, after.
        epochs: passes over the calibration tokens.
        status: how the training ended, a `TrainingStatus` name.
        seconds: device time.
        compile_seconds: time compiling, 0 when the programs were at hand.
    """

    block: int
    first_loss: float
    last_loss: float
    heldout_first: float | None
    heldout_best: float | None
    epochs: int
    status: str
    seconds: float
    compile_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For a JSON line."""
        return {"kind": "block", **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BlockRecord":
        """The record of a line; entries that are no fields are left out.

        Raises:
            TypeError: if a field is missing.
        """
        return cls(**_own_fields(cls, values))


def _own_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {own.name: values[own.name] for own in fields(kind) if own.name in values}


@dataclass(frozen=True)
class SurveyStep:
    """Progress of what is measured on the dense model before the pass.

    Attributes:
        stage: what is measured.
        done: steps of it done.
        total: steps of it in all.
    """

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Footprint:
    """What a run is to take of memory and disk, said before it starts.

    Attributes:
        activations: where those between blocks lie, "memory" or "disk".
        memory_bytes: estimated peak, device and host together; None for blocks that run in torch and for several
            devices.
        memory_parts: what it is made of, in the phase of the peak, bytes by name.
        phase: the phase of the peak.
        budget_bytes: what was asked for; None for what the machine has available.
        output_bytes: of all folders, dense.
        scratch_bytes: of activations on disk at most, gone when the run ends.
    """

    activations: Literal["memory", "disk"]
    memory_bytes: int | None
    memory_parts: Mapping[str, int]
    phase: str
    budget_bytes: int | None
    output_bytes: int
    scratch_bytes: int


# What an observer of a run is told, in the order of events.
@dataclass(frozen=True)
class Replay:
    """The records that follow are an earlier run's, of a block that it finished: they are no work of this one.

    Attributes:
        layers: how many linears they are of.
    """

    layers: int


Event = Footprint | SurveyStep | Replay | LayerRecord | BlockRecord


@dataclass(frozen=True)
class PruneReport:
    """One finished run.

    Attributes:
        output: the folder written.
        source: the model pruned, as it was asked for: a path or a name on the hub.
        revision: the commit on the hub that it is of, a sha; None for files of your own.
        recipe: the recipe as plain values; through torch its open fields are filled in.
        route: what ran the blocks: "flax", or "torch" for a family that is not known here.
        layers: a record each, in the model's order.
        blocks: a record of each block that was reconstructed.
        plans: how many recipes shared the pass over the blocks.
        bos: the id of the token that was put in front of every window; None for none.
        solver_seconds: device time of all layer solves, compilation apart.
        compile_seconds: time compiling all programs, the layer solves' and the forward passes'.
        layer_compilations: programs compiled for layer solves; at most the number of distinct shapes.
        reconstruction_seconds: device time of all reconstructions.
        survey_seconds: device time of what was measured on the dense model before the pass.
        calibration_seconds: device time of all forward passes, those of the other recipes of the pass too.
        calibration_gflops: their rate, 10⁹ floating-point operations a second.
        seconds: the whole run.
        peak_memory_bytes: largest resident set of the process so far.
        footprint: what the run was to take, as it was said before it started.
        dense_bytes: of the model's tensors in the dtypes written, dense.
        stored_bytes: of the same tensors as they lie in the folder; fewer only where they were packed.
        devices: on how many it ran, of all processes together.
        processes: how many worked together; times and memory are those of the first.
        platform: of the devices, as JAX names it: "cpu", "gpu", "tpu".
        precision: of all products, as JAX names it: "highest" is float32 throughout, on whatever platform.
        resumed_blocks: blocks that an earlier run into the folder had finished; their records are that run's.
        kept: whether an earlier call had finished the run, and all of this is its report.
    """

    output: Path
    source: str
    revision: str | None
    recipe: dict[str, Any]
    route: Literal["flax", "torch"]
    layers: list[LayerRecord] = field(repr=False)
    blocks: list[BlockRecord] = field(repr=False)
    plans: int
    bos: int | None
    solver_seconds: float
    reconstruction_seconds: float
    survey_seconds: float
    compile_seconds: float
    layer_compilations: int
    calibration_seconds: float
    calibration_gflops: float
    seconds: float
    peak_memory_bytes: int
    footprint: Footprint
    dense_bytes: int
    stored_bytes: int
    devices: int
    processes: int
    platform: str
    precision: str
    resumed_blocks: int = 0
    kept: bool = False

    @classmethod
    def from_summary(
        cls, summary: Mapping[str, Any], output: Path, layers: list[LayerRecord], blocks: list[BlockRecord]
    ) -> "PruneReport":
        """The report of a run that is finished in a folder, from its `summary.json` and its records.

        Raises:
            KeyError, TypeError: if a figure is missing.
        """
        own = _own_fields(cls, summary) | {"output": output, "layers": layers, "blocks": blocks, "kept": True}
        return cls(**own | {"footprint": Footprint(**summary["footprint"])})

    @property
    def sparsity(self) -> float:
        """Share of zeros over all pruned linears."""
        return sum(r.zeros for r in self.layers) / sum(r.size for r in self.layers)

    @property
    def starved_experts(self) -> list[str]:
        """Names of the experts that too few tokens were routed to."""
        return sorted({r.layer.rpartition(".")[0] for r in self.layers if r.starved})

    @property
    def blocked_layers(self) -> dict[str, int]:
        """Layers whose solve did not fit in memory whole, and by how many blocks of outputs each was solved."""
        return {r.layer: r.output_blocks for r in self.layers if r.output_blocks > 1}

    def summary(self) -> dict[str, Any]:
        """For `summary.json`."""
        figures = {k: v for k, v in asdict(self).items() if k not in ("layers", "blocks", "kept")}
        return {
            **figures,
            "output": str(self.output),
            "layers": len(self.layers),
            "reconstructed_blocks": len(self.blocks),
            "sparsity": self.sparsity,
            "mean_relative_error": mean(r.relative_error for r in self.layers),
            "mean_heldout_error": mean(r.heldout_error for r in self.layers if r.heldout_error is not None),
            "dead_inputs": sum(r.dead_inputs for r in self.layers),
            "starved_experts": self.starved_experts,
            "blocked_layers": self.blocked_layers,
            **environment(),
        }


def mean(values: Any) -> float | None:
    """The arithmetic mean, None of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None


class RunLog:
    """`records.jsonl`, a line at a time so that a broken run keeps what it knew, and `summary.json` at the end.

    Lines of finished blocks that are there already stay. Of several processes only the first writes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writes = processes.is_first()

    def record(self, fields: dict[str, Any]) -> None:
        """Append one line.

        Raises:
            DiskError: if the disk does not take it.
        """
        if self._writes:
            append_record(self._folder, fields)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary.

        Raises:
            DiskError: if the disk does not take it.
        """
        if self._writes:
            write_summary(self._folder, summary)
