"""A pass over the blocks of one model with one recipe: what is decided before any work, and how far the run has come.

`pipeline` decides it and loops over the blocks.
"""

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sparseopt.core.base.types import Observer
from sparseopt.models import (
    OUTER_TAG,
    Block,
    LoadedModel,
    ShardedWriter,
    StreamedModel,
    UnreadTensor,
    block_tag,
    trained_tag,
    unread,
)
from sparseopt.pruning.base.activations import Batches, DiskBatches, SpreadBatches, Stream
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.base.records import (
    BlockRecord,
    Calibration,
    Event,
    Footprint,
    GridRecord,
    LayerRecord,
    RepairRecord,
    Replay,
    Score,
)
from sparseopt.pruning.base.reports import PruneReport
from sparseopt.pruning.evaluate.perplexity import window_losses
from sparseopt.pruning.run.block import DenseBlock, PruningError, prune_block, trained_entries
from sparseopt.pruning.run.calibration import CalibrationWindows, Sample
from sparseopt.pruning.run.card import CARD, model_card
from sparseopt.pruning.run.measured import measured_once
from sparseopt.pruning.run.plan import Plan
from sparseopt.pruning.run.resumption import Finished, Identity, Progress
from sparseopt.pruning.text.windows import token_digest
from sparseopt.pruning.train.distillation import distil
from sparseopt.system import processes
from sparseopt.system.files import write_whole
from sparseopt.system.run_folder import append_record, write_summary


@dataclass
class Pass:
    """A run over the blocks of a model, in order.

    Attributes:
        model: the dense model.
        plan: what to do; what is measured before the first block may change it.
        identity: fingerprints of the model and of its tokens.
        windows: the tokens of the pass.
        calibration: what the report says about them.
        samples: texts on which the finished model is scored.
        footprint: the memory that the pass is expected to need.
        progress: the records, including an earlier start's.
        observer: called with an event or a text, the amount of work done, and the total, see `prune_model`.
        mesh: the devices; None for one.
        draw_seconds: time of drawing the windows.
        runner: runs the blocks.
        done: number of finished layers.
        survey_seconds: time of the measurements before the first block.
        writer: the writer of the folder, from `begin` on.
        stream: the target's stream before the next block, from `begin` on.
    """

    model: StreamedModel
    plan: Plan
    identity: Identity
    windows: CalibrationWindows
    calibration: Calibration
    samples: list[Sample]
    footprint: Footprint
    progress: Progress
    observer: Observer
    mesh: Mesh | None
    draw_seconds: float
    runner: BlockRunner = field(default_factory=BlockRunner)
    done: int = 0
    survey_seconds: float = 0.0
    writer: ShardedWriter = field(init=False)
    stream: Stream = field(init=False)

    def __post_init__(self) -> None:
        self.finished = self.progress.blocks

    @property
    def batches(self) -> Batches:
        """Empty batches, stored where activations between blocks are to be stored."""
        if self.mesh is not None:
            return SpreadBatches(self.mesh)
        return DiskBatches(self.plan.folder) if self.footprint.activations == "disk" else Batches()

    def key(self, what: str, *ids: np.ndarray, **also: Any) -> dict[str, Any]:
        """The key in `measured` of what is measured on the dense model with these windows of token ids."""
        return {
            "what": what,
            "weights": self.identity.weights,
            "tokens": [[token_digest(part), *part.shape] for part in ids],
            "bos": self.windows.bos,
            "device": str(jax.devices()[0]),
            "devices": 1 if self.mesh is None else self.mesh.size,
            "precision": [self.plan.recipe.precision, bool(jax.config.read("jax_enable_x64"))],
            **also,
        }

    def tell(self, event: Event) -> None:
        """Call the observer with the number of finished layers and of all layers."""
        self.done += isinstance(event, LayerRecord | GridRecord)
        # The pruned layers may be known only after the choice of sizes.
        self.observer(event, self.done, self.plan.layer_count)

    def open(self) -> None:
        """Make the writer, which continues after the existing shards."""
        plan, target = self.plan, self.plan.target
        self.writer = ShardedWriter(
            plan.folder, target.source, plan.recipe.dtype, plan.form, target.exported_keys(), self.progress.tags,
            writes=processes.is_first(),
        )  # fmt: skip

    def begin(self, stream: Stream) -> None:
        """Write the tensors outside the blocks, unless they exist; `stream` is the stream before the first block."""
        self.stream = stream
        self.open()
        if OUTER_TAG not in self.progress.tags:
            self.writer.write(OUTER_TAG, unread(self.model.source, self.plan.target.outer_keys()))

    def keep(self, record: Finished) -> None:
        """Add the record of a finished piece of work to the progress and to the folder."""
        self.progress.records.append(record)
        if processes.is_first():
            append_record(self.plan.folder, record.as_dict())

    def advance(self, dense: DenseBlock) -> None:
        """Prune and store one block, or replay it if an earlier run has stored it, and run the stream through it.

        Removed blocks are skipped.

        Raises:
            PruningError: as `prune_block` does.
        """
        place = self.plan.place(dense.index)
        if place is None:
            return
        block = (self._replay if dense.index < self.finished else self._prune)(dense, place)
        if place + 1 < self.plan.target.num_blocks:
            self.stream = self.runner.through(block, self.stream)

    def _replay(self, dense: DenseBlock, place: int) -> Block:
        self.tell(Replay(len(self.plan.layers(self.model, dense.index))))
        records: list[LayerRecord | GridRecord | RepairRecord | BlockRecord] = [
            *self.progress.layers,
            *self.progress.grids,
            *self.progress.repairs,
            *self.progress.trained,
        ]
        for record in records:
            if record.block == dense.index:
                self.tell(record)
        tag = trained_tag if self.progress.distilled else block_tag
        tensors = self._stored(tag(dense.index), place)
        return self.plan.restore(dense.block.copy(), place, dense.keys, tensors)

    def _stored(self, tag: str, place: int) -> dict[str, np.ndarray]:
        """The tensors of the shard of a target's block, by path, with layers as `[out, in]`."""
        stored, target = self.writer.stored(tag), self.plan.target
        return {path: target.as_stored(key, stored[key]) for path, key in target.block_keys(place).items()}

    def _prune(self, dense: DenseBlock, place: int) -> Block:
        def kept(record: LayerRecord | GridRecord | RepairRecord | BlockRecord) -> None:
            self.keep(record)
            self.tell(record)

        block, tensors = prune_block(self.plan, dense, place, self.stream, self.writer.dtype_of, kept)
        self._write(block_tag(dense.index), tensors)
        return block

    def _write(self, tag: str, tensors: Mapping[str, np.ndarray | UnreadTensor], instead: str | None = None) -> None:
        stored = {
            key: value if isinstance(value, UnreadTensor) else self.plan.target.as_stored(key, value)
            for key, value in tensors.items()
        }
        self.writer.write(tag, stored, instead)

    def distil(self, before: Stream | None, dense_after: Stream | None) -> None:
        """Train the whole target on the dense model's logits, if the plan says so and no earlier run did.

        Args:
            before: the stream before the first block; None if the plan does not ask for this training.
            dense_after: the dense model's stream after its last block, or None likewise.
        """
        settings, stays = self.plan.recipe.distillation, self.plan.stays
        if settings is None or self.progress.distilled:
            return
        assert before is not None
        assert dense_after is not None
        target = self.plan.target
        blocks = [target.block_of(place, self._stored(block_tag(i), place)) for place, i in enumerate(stays)]
        masks = None
        if not self.plan.smaller:
            pairs = zip(stays, blocks, strict=True)
            masks = [trained_entries(self.plan, block, self.model.block_keys(i)) for i, block in pairs]
        del self.stream
        record = distil(blocks, target.head(), before, dense_after, settings, self.observer, masks)
        for place, (index, block) in enumerate(zip(stays, blocks, strict=True)):
            tensors = {key: np.asarray(block.read(path)) for path, key in target.block_keys(place).items()}
            self._write(trained_tag(index), tensors, instead=block_tag(index))
        self.keep(record)
        self.tell(record)

    def finish(self, start: float, compile_seconds: float, peak_memory_bytes: int) -> PruneReport:
        """Complete the folder, read it back, score it, and return the report; `start` is by `time.perf_counter`.

        Raises:
            PruningError: if what was stored breaks the pattern.
        """
        plan, first = self.plan, processes.is_first()
        folder, output = plan.folder, plan.output
        layers, blocks = self.progress.layers, self.progress.trained
        solves: list[LayerRecord | GridRecord] = [*layers, *self.progress.grids]
        report = PruneReport(
            output=output,
            source=self.model.source.name,
            revision=self.model.source.revision,
            recipe=plan.recipe.as_dict(),
            layers=layers,
            blocks=blocks,
            grids=self.progress.grids,
            in_floats=tuple(key for key in plan.target.linear_keys() if plan.recipe.bits and key not in plan.form.bits),
            prunable_size=sum(math.prod(self.model.weight_shape(key)) for key in self.model.linear_keys()),
            calibration=self.calibration,
            shape=self.progress.shape,
            repairs=self.progress.repairs,
            vocabulary=plan.vocabulary,
            distilled=self.progress.distilled,
            solver_seconds=sum(r.seconds for r in solves),
            reconstruction_seconds=sum(r.seconds for r in blocks),
            layer_compilations=sum(r.compile_seconds > 0 for r in solves),
            dense_bytes=self.writer.dense_bytes,
            stored_bytes=self.writer.stored_bytes,
            resumed_blocks=self.finished,
            seconds=0.0,
            compile_seconds=compile_seconds,
            peak_memory_bytes=peak_memory_bytes,
            route="torch" if isinstance(self.model, LoadedModel) else "flax",
            other_weights=getattr(self.model, "other_weights", 0),
            bos=self.windows.bos,
            draw_seconds=self.draw_seconds,
            survey_seconds=self.survey_seconds,
            calibration_seconds=self.runner.seconds,
            footprint=self.footprint,
            devices=1 if self.mesh is None else self.mesh.size,
            processes=processes.count(),
            platform=jax.devices()[0].platform,
            precision=plan.recipe.precision,
        )
        # A card that somebody has put into the folder in the meantime stays.
        card = model_card(report, self.writer.files).encode()
        self.writer.finish({CARD: card})
        if broken := processes.told(plan.broken() if first else []):
            raise PruningError(
                f"{len(broken)} layers read back from {output} break their pattern, "
                f"{broken[0]} first; was it changed while it was written?"
            )
        report = replace(report, scores=self._scores(output), seconds=time.perf_counter() - start)
        if first:
            if (folder / CARD).read_bytes() == card:
                write_whole(folder / CARD, model_card(report, self.writer.files))
            write_summary(folder, report.summary())
        processes.barrier("finished")
        return report

    def _scores(self, output: Path) -> tuple[Score, ...]:
        """The perplexities of the dense model and of the written one."""
        before, after = self.before, self._perplexities(output, "after")
        pairs = zip(self.samples, before, after, strict=True)
        return tuple(Score(each.text, len(each.ids), each.ids.shape[1], old, new) for each, old, new in pairs)

    @cached_property
    def before(self) -> list[float]:
        """The perplexities of the dense model."""
        bos = [sample.bos for sample in self.samples]
        key = self.key("perplexity", *(sample.ids for sample in self.samples), each=bos)
        return measured_once(key, lambda: self._perplexities(self.model, "before"))[0]

    def _perplexities(self, model: StreamedModel | Path, when: str) -> list[float]:
        """Windows with the same BOS share one reading of the model; one process measures for all."""

        def told(what: str, done: int, total: int) -> None:
            self.observer(f"perplexity {when}, {what}", done, total)

        losses = list[float]()
        if processes.is_first():
            for bos, group in itertools.groupby(self.samples, lambda sample: sample.bos):
                parts = [sample.ids for sample in group]
                found = window_losses(model, np.concatenate(parts), bos=bos, observer=told)
                cuts = np.cumsum([len(ids) for ids in parts])[:-1]
                losses += [float(part.mean()) for part in np.split(found, cuts)]
        return processes.told([math.exp(loss) for loss in losses])
