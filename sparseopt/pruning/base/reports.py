"""What a pruning run tells: records of what it did, as JSON lines, and one report, as a summary."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

from sparseopt.models import Sizes
from sparseopt.system.machine import environment


class _Record:
    """A dataclass that is a JSON line."""

    kind: ClassVar[str]

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The record of a line, without entries that are no fields; a TypeError if one is missing."""
        return cls(**_own_fields(cls, values))


def _own_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    def read(value: Any, expected: Any) -> Any:
        # JSON has neither tuples nor NaN.
        if value is None and expected is float:
            return math.nan
        return tuple(value) if isinstance(value, list) else value

    return {own.name: read(values[own.name], own.type) for own in fields(kind) if own.name in values}


@dataclass(frozen=True)
class LayerRecord(_Record):
    """One pruned linear.

    Attributes:
        block: index of its block.
        layer: its name in the checkpoint, without `.weight`.
        shape: `(out, in)`.
        size: number of weights.
        zeros: zero weights as stored.
        relative_error: `||X (V - W)ᵀ||² / ||X Wᵀ||²` on the calibration tokens.
        heldout_error: the same on held-out tokens; None without any, and if the dense outputs are zero on all of them.
        steps: iterations of the method.
        status: how the solve ended, a `Status` name.
        seconds: device time of the solve.
        compile_seconds: time compiling for it, 0 when the program was available.
        dead_inputs: inputs that were zero on every calibration token.
        tokens: calibration tokens that it was pruned by; of experts usually those routed to it.
        starved: an expert with too few of them, pruned by magnitude; its errors are those of the weights then.
        output_blocks: into how many blocks of outputs the solve was split to fit in memory; 1 when it fitted whole.
        given_zeros: weights that had to be zero: those of the source with `keep_zeros`, and those of `masks`.
    """

    kind = "layer"

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
    given_zeros: int = 0

    @property
    def sparsity(self) -> float:
        return self.zeros / self.size

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "sparsity": self.sparsity}


@dataclass(frozen=True)
class TrainingRecord(_Record):
    """How something was trained after pruning, see `Trainer`.

    Attributes:
        first_loss: on the calibration tokens, before training.
        last_loss: on the calibration tokens, after.
        heldout_first: on the held-out tokens, before training; None without any.
        heldout_best: on the held-out tokens, after.
        epochs: whole passes over the calibration tokens.
        status: how the training ended, a `TrainingStatus` name.
        seconds: device time.
        compile_seconds: time compiling, 0 when the programs were available.
        best_epoch: the epoch whose end was kept, counted from 1; 0 for the start.
        steps: updates made.
    """

    first_loss: float
    last_loss: float
    heldout_first: float | None
    heldout_best: float | None
    epochs: int
    status: str
    seconds: float
    compile_seconds: float
    best_epoch: int
    steps: int


@dataclass(frozen=True)
class BlockRecord(TrainingRecord):
    """One block whose kept weights were trained, see `reconstruct_block`.

    Losses are relative squared errors of the block's output.

    Attributes:
        block: its index.
    """

    kind = "block"

    block: int


@dataclass(frozen=True)
class DistillationRecord(TrainingRecord):
    """A whole model that was trained, see `distil`. Losses are divergences from the dense model, in nats a token."""

    kind = "distillation"


@dataclass(frozen=True)
class RemovalRecord(_Record):
    """One block that was removed, see `block_removal`; losses on the tokens that blocks were scored on.

    Attributes:
        block: its index in the dense model.
        loss: mean negative log-likelihood of a token after its removal, in nats.
        rise: by how much that is above the dense model's loss.
        seconds: wall-clock time of choosing it; with the cosine score an even share, since all are chosen at once.
    """

    kind = "removal"

    block: int
    loss: float
    rise: float
    seconds: float


@dataclass(frozen=True)
class AllocationRecord(_Record):
    """How a sparsity was distributed, known before the first block is pruned.

    Attributes:
        shares: the fraction of zeros of each linear that is pruned, by the name of its weight in the checkpoint.
    """

    kind = "allocation"

    shares: dict[str, float]


@dataclass(frozen=True)
class ShapeRecord(_Record):
    """What a smaller model keeps, known before its first block is made.

    Attributes:
        channels: of every MLP, or of every expert.
        kv_heads: key-value groups of every block.
        experts: of every mixture; None without any.
        blocks: indices in the dense model of those that stay.
        removed: the others, in the order in which they were removed.
        rises: of the loss a token, in nats, after each removal, on the tokens that blocks were scored on.
        dense: `(channels, kv_heads, blocks, experts)` of the dense model.
        parameters: of the smaller model.
        dense_parameters: of the dense one.
        dense_bytes: of the dense one's tensors, in the source's dtypes.
        seconds: wall-clock time of choosing the sizes of all models of the pass.
        curves: where a budget chose the sizes, the measured rises of the loss a token: "channels", "heads" and "blocks"
            with pairs (what stays, rise); None otherwise.
    """

    kind = "shape"

    channels: int
    kv_heads: int
    experts: int | None
    blocks: tuple[int, ...]
    removed: tuple[int, ...]
    rises: tuple[float, ...]
    dense: tuple[int, int, int, int | None]
    parameters: int
    dense_parameters: int
    dense_bytes: int
    seconds: float
    curves: Mapping[str, list[list[float]]] | None = None

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.channels, self.kv_heads, self.blocks, self.experts)

    def kept(self) -> str:
        """How many of each part stay, where they are fewer."""
        kept = [
            f"{new:,} of {old:,} {name}"
            for new, old, name in zip(
                (self.channels, self.kv_heads, len(self.blocks), self.experts),
                self.dense,
                ("channels", "key-value groups", "blocks", "experts"),
                strict=True,
            )
            if new is not None and old is not None and new < old
        ]
        without = f", without blocks {', '.join(map(str, self.removed))}" if self.removed else ""
        return f"{', '.join(kept)}{without}"


@dataclass(frozen=True)
class Footprint:
    """The memory and disk that a run is expected to take, known before it starts.

    Attributes:
        activations: where those between blocks are kept, "memory" or "disk".
        memory_bytes: estimated peak, device and host together; None for blocks that run in torch and for several
            devices.
        memory_parts: bytes by what takes them, in the phase of the peak.
        phase: the phase of the peak.
        budget_bytes: the budget given; None for what the machine has available.
        output_bytes: of all folders, dense.
        scratch_bytes: largest size of activations on disk, gone when the run ends.
        stacked_weights: of experts that transformers stacks and that therefore stay as they are; 0 outside torch.
    """

    activations: Literal["memory", "disk"]
    memory_bytes: int | None
    memory_parts: Mapping[str, int]
    phase: str
    budget_bytes: int | None
    output_bytes: int
    scratch_bytes: int
    stacked_weights: int = 0


@dataclass(frozen=True)
class Calibration:
    """The tokens that a run sees, known before it starts.

    Attributes:
        windows: calibration windows of the text.
        variants: of each of them, see `variants`.
        heldout_windows: held-out windows.
        seqlen: tokens in a window.
        digest: of all windows of the text, calibration before held out, as the model reads them, see
            `windows.token_digest`.
        inputs: of the widest linear that is pruned.
        why: what decided the number of windows; None where it was given.
        warning: that there are fewer tokens than inputs, and how many windows would do; None where there are not.
    """

    windows: int
    variants: int
    heldout_windows: int
    seqlen: int
    digest: str
    inputs: int
    why: str | None
    warning: str | None


@dataclass(frozen=True)
class Score:
    """A perplexity before and after.

    Attributes:
        text: what was scored.
        windows: of it.
        seqlen: tokens in a window.
        before: of the dense model.
        after: of the model as stored.
    """

    text: str
    windows: int
    seqlen: int
    before: float
    after: float

    @property
    def line(self) -> str:
        """For tables and cards."""
        change = 100 * (self.after / self.before - 1) if self.before else math.nan
        tokens = f"{self.windows} windows of {self.seqlen} tokens"
        return (
            f"perplexity on {self.text}: {self.before:.2f} before, {self.after:.2f} after ({change:+.1f} %); {tokens}"
        )


@dataclass(frozen=True)
class Replay:
    """The records that follow are those of a block, of so many linears, that an earlier run finished."""

    layers: int


@dataclass(frozen=True)
class Passed:
    """A block that all runs of the pass have finished: what is stored of it is on disk.

    Attributes:
        block: its index in the dense model.
        blocks: of that model.
    """

    block: int
    blocks: int


# A text names what is being measured or trained, a step at a time.
Event = (
    Calibration
    | Footprint
    | Replay
    | Passed
    | RemovalRecord
    | ShapeRecord
    | LayerRecord
    | BlockRecord
    | DistillationRecord
    | str
)


@dataclass(frozen=True)
class PruneReport:
    """One finished run.

    Attributes:
        output: the folder written.
        source: the model pruned, as it was given: a path or a name on the hub.
        revision: its commit on the hub, a sha; None for your own files.
        recipe: the recipe as plain values; through torch its open fields are filled in.
        route: what ran the blocks: "flax", or "torch" for a family that is not known here.
        layers: a record each, in the model's order.
        blocks: a record of each block that was reconstructed.
        prunable_size: number of weights in all linears of the model's blocks, those that stay dense included.
        plans: number of recipes that shared the pass over the blocks.
        bos: the token id before every window; None for none.
        solver_seconds: of all layer solves. This and the phases below leave out the time of compiling.
        reconstruction_seconds: of all reconstructions.
        survey_seconds: of what was measured on the dense model before the pass.
        compile_seconds: of compiling the programs of the pass.
        layer_compilations: programs compiled for layer solves; at most the number of distinct shapes.
        calibration_seconds: of all forward passes and Grams, those of the pass's other recipes included.
        seconds: the whole run.
        peak_memory_bytes: largest resident set of the process during the run; so far, if the system cannot tell.
        calibration: the tokens that the run saw.
        footprint: what the run was expected to take.
        dense_bytes: of the model's tensors in the dtypes written, dense.
        stored_bytes: of the same tensors as stored; fewer only where they were packed.
        devices: number of devices, of all processes together.
        processes: number of processes; times and memory are those of the first.
        platform: of the devices, as JAX names it: "cpu", "gpu", "tpu".
        precision: of products of activations, as JAX names it; "highest" is float32 on every platform.
        resumed_blocks: blocks that an earlier run into the folder had finished; their records are that run's.
        shape: what a smaller model keeps; None where only zeros were made.
        distilled: the training of the whole model at the end; None without.
        scores: perplexities before and after; none of a recipe with `score` "none".
        draw_seconds: wall-clock time of drawing the calibration windows; 0 where they were given or kept.
        kept: whether an earlier call had finished the run; the report is then that call's.
    """

    output: Path
    source: str
    revision: str | None
    recipe: dict[str, Any]
    route: Literal["flax", "torch"]
    layers: list[LayerRecord] = field(repr=False)
    blocks: list[BlockRecord] = field(repr=False)
    prunable_size: int
    plans: int
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
    distilled: DistillationRecord | None = None
    scores: tuple[Score, ...] = ()
    draw_seconds: float = 0.0
    resumed_blocks: int = 0
    kept: bool = False

    @classmethod
    def from_summary(cls, summary: Mapping[str, Any], output: Path, **records: Any) -> "PruneReport":
        """The report of a finished run from its `summary.json` and its records, which are fields by their names.

        Raises:
            KeyError, TypeError: if a figure is missing.
        """
        own = _own_fields(cls, summary) | records | {"output": output, "kept": True}
        own["scores"] = tuple(Score(**score) for score in summary.get("scores", ()))
        kinds = {"footprint": Footprint, "calibration": Calibration}
        return cls(**own | {name: kind(**summary[name]) for name, kind in kinds.items()})

    @property
    def sparsity(self) -> float:
        """The share of zeros in the linears that were pruned; 0 for a smaller dense model."""
        if self.shape is not None:
            return 0.0
        return sum(r.zeros for r in self.layers) / sum(r.size for r in self.layers)

    @property
    def total_sparsity(self) -> float:
        """The share of these zeros in all linears of the blocks; 0 for a smaller dense model."""
        return 0.0 if self.shape is not None else sum(r.zeros for r in self.layers) / self.prunable_size

    @property
    def starved_experts(self) -> list[str]:
        return sorted({r.layer.rpartition(".")[0] for r in self.layers if r.starved})

    @property
    def kept_masks(self) -> list[str]:
        """The layers that had at least the zeros asked for, and so keep the mask that they had."""
        return [r.layer for r in self.layers if r.given_zeros and r.zeros == r.given_zeros]

    @property
    def blocked_layers(self) -> dict[str, int]:
        """Into how many blocks of outputs each layer was split whose solve did not fit in memory whole."""
        return {r.layer: r.output_blocks for r in self.layers if r.output_blocks > 1}

    @property
    def block_losses(self) -> tuple[float | None, float | None]:
        """The mean error of the trained blocks before and after their training."""
        return mean(b.first_loss for b in self.blocks), mean(b.last_loss for b in self.blocks)

    def summary(self) -> dict[str, Any]:
        """For `summary.json`."""
        figures = {k: v for k, v in asdict(self).items() if k not in ("layers", "blocks", "kept")}
        return {
            **figures,
            "output": str(self.output),
            "layers": len(self.layers),
            "reconstructed_blocks": len(self.blocks),
            "sparsity": self.sparsity,
            "total_sparsity": self.total_sparsity,
            **mean_errors(self.layers)._asdict(),
            "dead_inputs": sum(r.dead_inputs for r in self.layers),
            "given_zeros": sum(r.given_zeros for r in self.layers),
            "kept_masks": len(self.kept_masks),
            "starved_experts": self.starved_experts,
            "blocked_layers": self.blocked_layers,
            **environment(),
        }


def mean(values: Any) -> float | None:
    """The arithmetic mean; None of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None


class MeanErrors(NamedTuple):
    """The mean relative errors of layers on the calibration tokens and on held-out ones; None without any."""

    mean_relative_error: float | None
    mean_heldout_error: float | None


def mean_errors(layers: Sequence[LayerRecord]) -> MeanErrors:
    """Those of the records of some layers."""
    heldout = mean(r.heldout_error for r in layers if r.heldout_error is not None)
    return MeanErrors(mean(r.relative_error for r in layers), heldout)
