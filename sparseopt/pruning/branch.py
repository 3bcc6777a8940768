"""Floor 6: the pruned model of one plan on its way through the blocks: its stream, its folder, its records."""

from collections.abc import Callable
from typing import Any

from sparseopt.models import PrunableBlock, PrunableModel, ShardedWriter, block_tag
from sparseopt.pruning.activations import Stream
from sparseopt.pruning.block import DenseBlock, PruningError, prune_block
from sparseopt.pruning.evaluation import audit_stored
from sparseopt.pruning.plan import Plan
from sparseopt.pruning.reports import BlockRecord, Event, LayerRecord, PruneReport, Replay
from sparseopt.pruning.run_folder import Progress
from sparseopt.system import processes
from sparseopt.system.machine import peak_memory_bytes
from sparseopt.system.run_folder import append_record, write_summary


class Branch:
    """One plan's model, a block at a time, into its own folder, in which the tensors outside the blocks are written.

    Every process of a run has the same branches and takes the same steps; only the first process writes.
    """

    def __init__(
        self, model: PrunableModel, plan: Plan, progress: Progress, writer: ShardedWriter, stream: Stream
    ) -> None:
        self._model, self._plan, self._writer = model, plan, writer
        self._stream = stream
        self._layers, self._blocks = list(progress.layers), list(progress.trained)
        self._finished = progress.blocks

    def advance(self, dense: DenseBlock, observer: Callable[[Event], None]) -> None:
        """Prune and store one block, or replay it where an earlier run has stored it, and run the stream through it.

        Raises:
            PruningError: as `prune_block` does.
        """
        step = self._replay if dense.index < self._finished else self._prune
        block = step(dense, observer)
        if dense.index + 1 < self._model.num_blocks:
            self._stream = dense.runner.through(block, self._stream)

    def _replay(self, dense: DenseBlock, observer: Callable[[Event], None]) -> PrunableBlock:
        index = dense.index
        block, keys = dense.block.copy(), self._model.block_keys(index)
        stored = self._writer.stored(block_tag(index))
        # As in `prune_block`, what was not pruned or trained runs as the source has it, not as it was stored.
        trained = self._plan.recipe.reconstruction is not None
        changed = keys if trained else [f"{name}.weight" for name in block.linears]
        block.write({path: self._model.as_stored(keys[path], stored[keys[path]]) for path in changed})
        layers = [record for record in self._layers if record.block == index]
        events: list[Event] = [Replay(len(layers)), *layers, *(r for r in self._blocks if r.block == index)]
        for event in events:
            observer(event)
        return block

    def _prune(self, dense: DenseBlock, observer: Callable[[Event], None]) -> PrunableBlock:
        def told(record: LayerRecord | BlockRecord) -> None:
            if isinstance(record, LayerRecord):
                self._layers.append(record)
            else:
                self._blocks.append(record)
            if processes.is_first():
                append_record(self._plan.folder, record.as_dict())
            observer(record)

        dtypes = {key: self._writer.dtype_of(key) for key in self._model.block_keys(dense.index).values()}
        block, tensors = prune_block(self._model, self._plan, dense, self._stream, dtypes, told)
        stored = {key: self._model.as_stored(key, value) for key, value in tensors.items()}
        self._writer.write(block_tag(dense.index), stored)
        return block

    def finish(self, compile_seconds: float, **figures: Any) -> PruneReport:
        """Complete the folder, read it back, report; `figures` of the whole pass are fields of the report.

        Raises:
            PruningError: if what was stored breaks the pattern.
        """
        self._writer.finish()
        folder, first = self._plan.folder, processes.is_first()
        broken = [a.layer for a in audit_stored(folder, self._plan.patterns) if not a.fits] if first else []
        if broken := processes.told(broken):
            raise PruningError(
                f"{len(broken)} linears read back from {folder} break the pattern {self._plan.recipe.pattern!r}, "
                f"{broken[0]} first; was the folder changed while it was written?"
            )
        records: list[LayerRecord | BlockRecord] = [*self._layers, *self._blocks]
        report = PruneReport(
            output=folder,
            source=self._model.source.name,
            revision=self._model.source.revision,
            recipe=self._plan.recipe.as_dict(),
            layers=self._layers,
            blocks=self._blocks,
            solver_seconds=sum(r.seconds for r in self._layers),
            reconstruction_seconds=sum(r.seconds for r in self._blocks),
            compile_seconds=compile_seconds + sum(r.compile_seconds for r in records),
            layer_compilations=sum(r.compile_seconds > 0 for r in self._layers),
            dense_bytes=self._writer.dense_bytes,
            stored_bytes=self._writer.stored_bytes,
            peak_memory_bytes=peak_memory_bytes(),
            resumed_blocks=self._finished,
            **figures,
        )
        if first:
            write_summary(folder, report.summary())
        processes.barrier("finished")
        return report
