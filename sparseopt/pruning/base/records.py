"""What a pruning run tells while it works: the records of what it did, each a JSON line, and its other events."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

from sparseopt.models import Sizes


class _Record:
    """A dataclass that is a JSON line."""

    kind: ClassVar[str]

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The record of a line, without entries that are no fields; a TypeError if one is missing."""
        return cls(**own_fields(cls, values))


def own_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass among JSON values."""

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
class GridRecord(_Record):
    """One linear that was put on a grid of few bits.

    Attributes:
        block: index of its block.
        layer: its name in the dense model, without `.weight`.
        bits: the grid.
        size: number of weights.
        zeros: zero weights as stored.
        relative_error: `||X (V - W)ᵀ||² / ||X Wᵀ||²` on the calibration tokens, W before it was put on the grid.
        rounded_error: the same of the nearest points of the grid.
        seconds: device time of the solve.
        compile_seconds: time compiling for it, 0 when the program was available.
    """

    kind = "grid"

    block: int
    layer: str
    bits: str
    size: int
    zeros: int
    relative_error: float
    rounded_error: float
    seconds: float
    compile_seconds: float


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

    def followed_by(self, other: "BlockRecord") -> "BlockRecord":
        """The record of this training and another one after it."""
        names = ("epochs", "seconds", "compile_seconds", "steps")
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        best = self.epochs + other.best_epoch if other.best_epoch else self.best_epoch
        return replace(other, first_loss=self.first_loss, heldout_first=self.heldout_first, best_epoch=best, **sums)


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
        memory_bytes: estimated peak, device and host together; None for several devices.
        memory_parts: bytes by what takes them, in the phase of the peak.
        phase: the phase of the peak.
        budget_bytes: the budget given; None for what the machine has available.
        output_bytes: of all folders, dense.
        scratch_bytes: largest size of activations on disk, gone when the run ends.
    """

    activations: Literal["memory", "disk"]
    memory_bytes: int | None
    memory_parts: Mapping[str, int]
    phase: str
    budget_bytes: int | None
    output_bytes: int
    scratch_bytes: int


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
    | GridRecord
    | BlockRecord
    | DistillationRecord
    | str
)


def mean(values: Any) -> float | None:
    """The arithmetic mean; None of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None


class MeanErrors(NamedTuple):
    """The mean relative errors of layers on the calibration tokens and on held-out ones; None without any."""

    mean_relative_error: float | None
    mean_heldout_error: float | None


class GridErrors(NamedTuple):
    """The mean relative errors of what grids add to layers, and of plain rounding; None without any."""

    mean_grid_error: float | None
    mean_rounded_error: float | None


def mean_grid_errors(grids: Sequence[GridRecord]) -> GridErrors:
    """Those of the records of some layers."""
    return GridErrors(mean(r.relative_error for r in grids), mean(r.rounded_error for r in grids))


def mean_errors(layers: Sequence[LayerRecord]) -> MeanErrors:
    """Those of the records of some layers."""
    heldout = mean(r.heldout_error for r in layers if r.heldout_error is not None)
    return MeanErrors(mean(r.relative_error for r in layers), heldout)
