"""What a pruning run reports while it works: records of what it did, each a JSON line, and other events."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

from sparseopt.models import Sizes


class _Record:
    """A dataclass that is a JSON line."""

    kind: ClassVar[str]

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The record of a line; other entries are ignored, and a missing field raises a TypeError."""
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
    """One pruned linear layer.

    Attributes:
        block: index of its block.
        layer: its name in the checkpoint, without `.weight`.
        shape: `(out, in)`.
        size: number of weights.
        zeros: zero weights as stored.
        relative_error: `||X (V - W)ᵀ||² / ||X Wᵀ||²` on the calibration tokens.
        heldout_error: the same on held-out tokens; None without any, or if the dense outputs are zero on all of them.
        steps: iterations of the method.
        status: how the solve ended, a `Status` name.
        seconds: device time of the solve.
        compile_seconds: time compiling for it, 0 when the program was available.
        dead_inputs: inputs that were zero on every calibration token.
        tokens: calibration tokens used to prune it; for an expert usually the tokens routed to it.
        starved: an expert with too few tokens, pruned by magnitude; its errors are then errors of the weights.
        output_blocks: number of blocks of outputs into which the solve was split to fit in memory; 1 if not split.
        given_zeros: weights that had to be zero: zeros of the source with `keep_zeros`, and zeros of `masks`.
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
    """One linear layer that was rounded to a grid of few bits.

    Attributes:
        block: index of its block.
        layer: its name in the dense model, without `.weight`.
        bits: the grid.
        size: number of weights.
        zeros: zero weights as stored.
        relative_error: `||X (V - W)ᵀ||² / ||X Wᵀ||²` on the calibration tokens, with W before rounding to the grid.
        rounded_error: the same for the nearest points of the grid.
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
        first_loss: loss on the calibration tokens, before training.
        last_loss: loss on the calibration tokens, after training.
        heldout_first: loss on the held-out tokens, before training; None if there are none.
        heldout_best: loss on the held-out tokens, after training.
        epochs: whole passes over the calibration tokens.
        status: how the training ended, a `TrainingStatus` name.
        seconds: device time.
        compile_seconds: time compiling, 0 when the programs were available.
        best_epoch: the epoch whose final weights were kept, counted from 1; 0 for the untrained weights.
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
    """A whole model that was trained, see `distil`. Losses are divergences from the dense model, in nats per token."""

    kind = "distillation"


@dataclass(frozen=True)
class RepairRecord(_Record):
    """One block that was fitted to the stream behind the removed blocks that follow it, see `repair_block`.

    Errors are mean relative squared errors of the stream, compared with the dense model's behind those blocks.

    Attributes:
        block: its index.
        removed: indices of the removed blocks behind it.
        first_error: error on the calibration tokens, before.
        last_error: error on the calibration tokens, after.
        heldout_first: error on the held-out tokens, before; None if there are none.
        heldout_last: error on the held-out tokens, after.
    """

    kind = "repair"

    block: int
    removed: tuple[int, ...]
    first_error: float
    last_error: float
    heldout_first: float | None
    heldout_last: float | None


@dataclass(frozen=True)
class RemovalRecord(_Record):
    """One block that was removed, see `block_removal`; losses on the tokens that blocks were scored on.

    Attributes:
        block: its index in the dense model.
        loss: mean negative log-likelihood of a token after its removal, in nats.
        rise: increase over the dense model's loss.
        seconds: wall-clock time of choosing it.
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
        shares: the fraction of zeros in each pruned layer, by the name of its weight in the checkpoint.
    """

    kind = "allocation"

    shares: dict[str, float]


@dataclass(frozen=True)
class ShapeRecord(_Record):
    """What a smaller model keeps, known before its first block is made.

    Attributes:
        channels: number in every MLP, or in every expert.
        kv_heads: key-value groups in every block.
        experts: number in every mixture; None if there are none.
        blocks: indices, in the dense model, of the blocks that stay.
        removed: indices of the other blocks, in order of removal.
        rises: increase of the loss per token, in nats, after each removal, on the tokens used for scoring blocks.
        dense: `(channels, kv_heads, blocks, experts)` of the dense model.
        parameters: number in the smaller model.
        dense_parameters: number in the dense model.
        dense_bytes: size of the dense model's tensors, in the source's dtypes.
        seconds: wall-clock time of choosing the sizes.
        curves: if a budget chose the sizes, the measured increases of the loss per token: "channels", "heads" and
            "blocks" with pairs (what stays, rise); None otherwise.
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
        """How many of each part stay, for the parts that were reduced."""
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
    """The memory and disk that a run is expected to need, known before it starts.

    Attributes:
        activations: where activations between blocks are kept, "memory" or "disk".
        memory_bytes: estimated peak, device and host together; None for several devices.
        memory_parts: bytes by content, in the phase of the peak.
        phase: the phase of the peak.
        budget_bytes: the given budget; None for the machine's available memory.
        output_bytes: dense size of the output.
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
        heldout_windows: held-out windows.
        seqlen: tokens in a window.
        digest: of all windows of the text, calibration before held-out, as the model reads them, see
            `windows.token_digest`.
        inputs: number of inputs of the widest pruned layer.
        why: what decided the number of windows; None if it was given.
        warning: says if there are fewer tokens than inputs, and how many windows would be enough; else None.
    """

    windows: int
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
        windows: number of windows scored.
        seqlen: tokens in a window.
        before: perplexity of the dense model.
        after: perplexity of the stored model.
    """

    text: str
    windows: int
    seqlen: int
    before: float
    after: float


@dataclass(frozen=True)
class VocabularyRecord:
    """The tokens that a smaller model keeps, and what that costs on other text, known before its first block is made.

    Attributes:
        tokens: number of tokens that stay.
        dense_tokens: number of the dense model's tokens.
        text: the text whose tokens were counted.
        text_tokens: number of its tokens.
        predicted_tokens: number of its tokens before which the model was asked what it expects; 0 if only counted.
        split: fraction of these that are split into several, since their token is gone.
        other_text: a text that was not counted; None without one.
        other_bytes: size of its part that was measured, in UTF-8.
        before: tokens for each byte of the other text, with the dense model's tokenizer.
        after: the same with the smaller tokenizer.
    """

    tokens: int
    dense_tokens: int
    text: str
    text_tokens: int
    predicted_tokens: int
    split: float
    other_text: str | None
    other_bytes: int
    before: float | None
    after: float | None

    def __str__(self) -> str:
        said = f"{self.tokens:,} of {self.dense_tokens:,} tokens stay; {self.split:.2%} of the {self.text_tokens:,} "
        said += f"tokens of {self.text} are split into several"
        if self.before is None or self.after is None:
            return said
        more = f"{self.after:.4f} tokens a byte, {self.before:.4f} before ({self.after / self.before - 1:+.1%})"
        return f"{said}; {self.other_text}: {more}"


@dataclass(frozen=True)
class Replay:
    """The records that follow belong to a block, with this many layers, that an earlier run finished."""

    layers: int


@dataclass(frozen=True)
class Passed:
    """A block that the run has finished; its stored weights are on disk.

    Attributes:
        block: its index in the dense model.
        blocks: number of blocks of the dense model.
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
    | RepairRecord
    | BlockRecord
    | DistillationRecord
    | str
)


def mean(values: Any) -> float | None:
    """The arithmetic mean; None if there are no values."""
    values = list(values)
    return sum(values) / len(values) if values else None


def mean_errors(layers: Sequence[LayerRecord]) -> tuple[float | None, float | None]:
    """The mean relative errors of layers on the calibration and on the held-out tokens; None if there are none."""
    heldout = mean(r.heldout_error for r in layers if r.heldout_error is not None)
    return mean(r.relative_error for r in layers), heldout
