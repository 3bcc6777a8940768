"""Floor 6: one pruned model in the making, a block at a time.

    Grams in front of the block --[propagate]--> targets --method--> pruned linears --[reconstruct]--> shard
    activations --pruned block--> activations in front of the next block

`Shared` holds what several of them have in common at one block, so that it is computed once.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sparseopt.core.dense import HIGHEST
from sparseopt.core.mesh import over, put, whole
from sparseopt.core.problem import Status
from sparseopt.models import OUTER_TAG, Block, PrunableBlock, PrunableModel, ShardedWriter, TorchModel, block_tag
from sparseopt.models.safetensors_file import UnreadTensor
from sparseopt.pruning.activations import Batches, on_one_device
from sparseopt.pruning.blocked import Solved
from sparseopt.pruning.calibration import BlockGrams, BlockRunner, Grams, Weighting
from sparseopt.pruning.devices import Line, agreed
from sparseopt.pruning.evaluation import audit_stored
from sparseopt.pruning.layer import LayerJob, LayerMethod, check_answer
from sparseopt.pruning.nonfinite import nonfinite_windows
from sparseopt.pruning.patterns import Pattern
from sparseopt.pruning.propagation import PROPAGATION_RIDGE, propagated_target
from sparseopt.pruning.recipe import Recipe
from sparseopt.pruning.reconstruction import Reconstruction, reconstruct_block
from sparseopt.pruning.reports import BlockRecord, Event, Footprint, LayerRecord, PruneReport, Replay, RunLog
from sparseopt.pruning.run_folder import Progress
from sparseopt.pruning.side_by_side import Linear, solve_block
from sparseopt.system import processes
from sparseopt.system.machine import peak_memory_bytes


class PruningError(RuntimeError):
    """A run that had to stop; the message names the layer and what to do."""


class Stopped(PruningError):
    """A run that was asked to stop and did, behind a finished block; the same call goes on from there."""


@dataclass(frozen=True)
class Stream:
    """Activations in front of one block, in batches `[windows, T, D]`.

    Attributes:
        calibration: of the calibration windows.
        heldout: of the held-out windows, empty without any.
    """

    calibration: Batches
    heldout: Batches

    def through(self, block: PrunableBlock, runner: BlockRunner) -> "Stream":
        """The stream behind a block."""
        return Stream(runner.forward(block, self.calibration), runner.forward(block, self.heldout))


class Shared:
    """The dense block and what is computed with it, once for all branches that ask.

    Attributes:
        block: the dense block; branches prune copies of it.
        index: its number.
        dense: the dense model's own stream in front of it, or None where no branch needs it.
    """

    def __init__(self, block: PrunableBlock, index: int, dense: Stream | None, runner: BlockRunner) -> None:
        self.block, self.index, self.dense = block, index, dense
        self._runner = runner
        self._outputs: Stream | None = None
        # Streams are kept beside their Grams: an id is unique only while its object lives.
        self._grams: dict[tuple[int, Weighting, bool], tuple[Stream, BlockGrams, BlockGrams]] = {}

    def grams(self, stream: Stream, weighting: Weighting, *, drift: bool) -> tuple[BlockGrams, BlockGrams]:
        """Grams by tap, of the calibration tokens and of the held-out ones, empty without any.

        Raises:
            PruningError: naming the tap, if activations are not finite.
        """
        key = (id(stream), weighting, drift)
        if key not in self._grams:
            # Only in front of the first block do branches share a stream; Grams of others are never asked for again.
            self._grams = {known: kept for known, kept in self._grams.items() if kept[0] is stream}
            dense = self.dense if drift else None
            found = self._runner.grams(self.block, stream.calibration, weighting, dense.calibration if dense else None)
            tests = self._runner.grams(self.block, stream.heldout, weighting) if stream.heldout else BlockGrams({})
            self._check(found, "calibration", stream.calibration)
            self._check(tests, "held-out", stream.heldout)
            self._grams[key] = (stream, found, tests)
        return self._grams[key][1:]

    @property
    def dense_outputs(self) -> Stream:
        """The dense model's own stream behind the block."""
        if self._outputs is None:
            if self.dense is None:
                raise RuntimeError("no branch asked for the dense stream")
            self._outputs = self.dense.through(self.block, self._runner)
        return self._outputs

    def _check(self, grams: BlockGrams, tokens: str, batches: Batches) -> None:
        for name, found in grams.stacked.items():
            if not all(bool(jnp.isfinite(part).all()) for part in found if part is not None):
                batches = on_one_device(batches)
                windows = nonfinite_windows(self.block, batches, name) if isinstance(self.block, Block) else []
                shown = ", ".join(map(str, windows[:8]))
                where = f", in windows {shown} of {sum(map(len, batches))}" if windows else ""
                raise PruningError(
                    f"non-finite activations in block {self.index}, {name}, on the {tokens} tokens{where}: the model's "
                    "weights overflow there or the tokens are out of its range; check the source with `sparseopt eval`"
                )


class Branch:
    """One recipe's model, pruned block by block into its own folder.

    Attributes:
        recipe: what to do.
        method: the recipe's.
        finished: blocks that an earlier run into the folder has finished.

    Every process of a run has the same branch and goes through the same steps; only the first of them writes.
    """

    def __init__(
        self,
        model: PrunableModel,
        recipe: Recipe,
        method: LayerMethod,
        output: Path,
        outer: Mapping[str, np.ndarray | UnreadTensor],
        progress: Progress,
        mesh: Mesh | None = None,
    ) -> None:
        """Begin the output folder with what lies outside the blocks, or go on where an earlier run was broken off.

        Raises:
            ModelError: if the folder cannot be used.
        """
        self.recipe, self.method, self._mesh = recipe, method, mesh
        self._model = model
        self._output = output
        self._writer = ShardedWriter(
            output,
            model.source,
            recipe.dtype,
            recipe.pack,
            model.exported_keys(),
            progress.tags,
            writes=processes.is_first(),
        )
        self._log = RunLog(self._output)
        if OUTER_TAG not in progress.tags:
            self._writer.write(OUTER_TAG, outer)
        self._layers, self._blocks = list(progress.layers), list(progress.trained)
        self.finished = progress.blocks
        self._compile_seconds = 0.0

    def start(self, embedded: Stream, patterns: dict[str, Pattern], weights: dict[str, np.ndarray] | None) -> None:
        """Set the stream in front of the first block, and by the key of every linear its pattern and output weights."""
        self._stream, self._patterns, self._weights = embedded, patterns, weights or {}

    def skip_block(self, shared: Shared, runner: BlockRunner, observer: Callable[[Event], None]) -> None:
        """Carry the stream through a block that an earlier run has finished, as it was stored."""
        index = shared.index
        block, keys = shared.block.copy(), self._model.block_keys(index)
        stored = self._writer.stored(block_tag(index))
        # As in `prune_block`, what was not pruned or trained runs as the source has it, not as it was stored.
        changed = keys if self.recipe.reconstruction is not None else [f"{name}.weight" for name in block.linears]
        block.write({path: self._model.as_stored(keys[path], stored[keys[path]]) for path in changed})
        layers = [record for record in self._layers if record.block == index]
        told: list[Event] = [Replay(len(layers)), *layers, *(r for r in self._blocks if r.block == index)]
        for event in told:
            observer(event)
        if index + 1 < self._model.num_blocks:
            self._stream = self._stream.through(block, runner)

    def prune_block(self, shared: Shared, runner: BlockRunner, observer: Callable[[Event], None]) -> None:
        """Prune, reconstruct and store one block, and carry the stream through it.

        Raises:
            PruningError: naming the layer, if activations or a solve become non-finite.
        """
        index, recipe = shared.index, self.recipe
        keys = self._model.block_keys(index)
        block = shared.block.copy()
        grams, tests = shared.grams(self._stream, recipe.weighting, drift=recipe.propagated_share > 0)
        tensors = {key: self._model.stored(key) for key in keys.values()}
        linears = [
            self._linear(keys[f"{name}.weight"], ".experts." in name, tensors, tap, grams, tests)
            for name, tap in block.linears.items()
        ]
        try:
            for linear, solved in solve_block(linears, self.method, self._mesh):
                record = self._recorded(linear, solved, index)
                tensors[linear.key] = np.asarray(solved.report.weight)
                self._layers.append(record)
                self._log.record(record.as_dict())
                observer(record)
        except MemoryError as error:
            raise PruningError(f"{error}; then start the same command again") from error
        block.write({f"{name}.weight": tensors[keys[f"{name}.weight"]] for name in block.linears})
        if recipe.reconstruction is not None:
            trained = self._reconstruct(block, shared, recipe.reconstruction)
            tensors |= self._stored(block, keys)
            self._blocks.append(trained)
            self._log.record(trained.as_dict())
            observer(trained)
        self._writer.write(block_tag(index), {key: self._model.as_stored(key, value) for key, value in tensors.items()})
        if index + 1 < self._model.num_blocks:
            self._stream = self._stream.through(block, runner)

    def finish(
        self,
        runner: BlockRunner,
        footprint: Footprint,
        plans: int,
        survey_seconds: float,
        seconds: float,
        bos: int | None,
    ) -> PruneReport:
        """Complete the folder, read it back, report.

        Raises:
            PruningError: if what was stored breaks the pattern.
        """
        self._writer.finish()
        recipe = self.recipe
        first = processes.is_first()
        broken = [a.layer for a in audit_stored(self._output, self._patterns) if not a.fits] if first else []
        if broken := processes.told(broken):
            raise PruningError(
                f"{len(broken)} linears read back from {self._output} break the pattern {recipe.pattern!r}, "
                f"{broken[0]} first; was the folder changed while it was written?"
            )
        compile_seconds = runner.compile_seconds + self._compile_seconds
        compile_seconds += sum(r.compile_seconds for r in self._layers) + sum(r.compile_seconds for r in self._blocks)
        report = PruneReport(
            output=self._output,
            source=self._model.source.name,
            revision=self._model.source.revision,
            recipe=recipe.as_dict(),
            route="torch" if isinstance(self._model, TorchModel) else "flax",
            layers=self._layers,
            blocks=self._blocks,
            plans=plans,
            bos=bos,
            solver_seconds=sum(r.seconds for r in self._layers),
            reconstruction_seconds=sum(r.seconds for r in self._blocks),
            survey_seconds=survey_seconds,
            compile_seconds=compile_seconds,
            layer_compilations=sum(r.compile_seconds > 0 for r in self._layers),
            calibration_seconds=runner.seconds,
            calibration_gflops=runner.flops / max(runner.seconds, 1e-9) / 1e9,
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes(),
            footprint=footprint,
            dense_bytes=self._writer.dense_bytes,
            stored_bytes=self._writer.stored_bytes,
            devices=1 if self._mesh is None else self._mesh.size,
            processes=processes.count(),
            platform=jax.devices()[0].platform,
            precision=HIGHEST.name.lower(),
            resumed_blocks=self.finished,
        )
        self._log.finish(report.summary())
        processes.barrier("finished")
        return report

    def _propagated(self, weight: np.ndarray, grams: Grams) -> tuple[np.ndarray, float]:
        """The weight that makes up for what was lost before this block, in the weight's dtype; and its seconds."""
        dense: Any = weight
        if self._mesh is not None:
            # Each output has a target of its own: rows of zeros behind them change none.
            dense = put(Line(self._mesh, len(weight)).padded(weight), over(self._mesh))
        found = propagated_target(
            dense, grams.gram, grams.drift, np.float32(self.recipe.propagated_share), np.float32(PROPAGATION_RIDGE)
        )
        self._compile_seconds += found.compile_seconds
        return whole(found.value)[: len(weight)].astype(weight.dtype), found.seconds

    def _reconstruct(self, block: PrunableBlock, shared: Shared, settings: Reconstruction) -> BlockRecord:
        targets = shared.dense_outputs
        # Zeros rest, also where the pattern would have allowed a weight that was itself zero.
        masks = {name: block.read(f"{name}.weight") != 0 for name in block.linears}
        stream = self._stream
        flax = cast(Block, block)  # others were refused with the recipe
        # A step sees a window or a few, one after the other: devices have nothing to share, one trains in each process.
        report = reconstruct_block(
            flax,
            masks,
            on_one_device(stream.calibration),
            on_one_device(targets.calibration),
            on_one_device(stream.heldout),
            on_one_device(targets.heldout),
            settings,
        )
        if processes.count() > 1:
            # What processes go on with, and report, is the first one's.
            paths = list(self._model.block_keys(shared.index))
            block.write(agreed({path: np.asarray(block.read(path)) for path in paths}))
        return BlockRecord(
            block=shared.index,
            first_loss=report.first_loss,
            last_loss=report.last_loss,
            heldout_first=report.heldout_first,
            heldout_best=report.heldout_best,
            epochs=report.epochs_run,
            status=report.status.name,
            seconds=report.seconds,
            compile_seconds=report.compile_seconds,
        )

    def _stored(self, block: PrunableBlock, keys: dict[str, str]) -> dict[str, np.ndarray]:
        """The block's tensors as they are stored; the block takes over their rounding."""
        tensors = {path: np.asarray(block.read(path)).astype(self._writer.dtype_of(key)) for path, key in keys.items()}
        block.write(tensors)
        return {keys[path]: value for path, value in tensors.items()}

    def _linear(
        self, key: str, expert: bool, tensors: Mapping[str, np.ndarray], tap: str, grams: BlockGrams, tests: BlockGrams
    ) -> Linear:
        """A linear as it is to be pruned; its target is found when its turn comes."""
        recipe, tokens = self.recipe, grams.tokens(tap)
        starved = expert and tokens < max(1, recipe.min_expert_tokens)
        tested = not starved and bool(tests) and tests.tokens(tap) > 0
        dtype = self._writer.dtype_of(key)
        outputs = None if starved else self._weights.get(key)

        def job() -> tuple[LayerJob, float]:
            weight, found, moving = tensors[key].astype(dtype, copy=False), grams[tap], 0.0
            gram = found.gram
            if starved:
                # So few tokens say nothing of most weights: all inputs count the same.
                gram = jnp.eye(len(gram))
            elif recipe.propagated_share and found.drift is not None:
                weight, moving = self._propagated(weight, found)
            return LayerJob(weight, gram, tests[tap].gram if tested else None, self._patterns[key], outputs), moving

        shape, pattern = tensors[key].shape, self._patterns[key]
        return Linear(
            key=key,
            shape=(shape[0], shape[1]),
            pattern=pattern,
            tokens=tokens,
            starved=starved,
            tested=tested,
            kind=(shape, dtype, tested, outputs is None, jax.tree.structure(pattern)),
            job=job,
        )

    def _recorded(self, linear: Linear, solved: Solved, block: int) -> LayerRecord:
        """What is reported of a solved linear.

        Raises:
            PruningError: naming it, if its answer is not what it has to be.
        """
        report: Any = solved.report
        status = Status(int(report.status))
        if status is Status.NONFINITE:
            raise PruningError(
                f"the solve of {linear.key} became non-finite; shards of earlier blocks are whole. "
                "Check its weights and Gram for huge values, or try another method"
            )
        try:
            check_answer(report, self.method, linear.pattern)
        except RuntimeError as error:
            raise PruningError(f"{linear.name}: {error}") from error
        return LayerRecord(
            block=block,
            layer=linear.name,
            shape=linear.shape,
            size=math.prod(linear.shape),
            zeros=int(report.zeros),
            relative_error=float(report.relative_error),
            heldout_error=float(report.test_error) if linear.tested else None,
            steps=int(report.steps),
            status=status.name,
            seconds=solved.seconds,
            compile_seconds=solved.compile_seconds,
            dead_inputs=int(report.dead_inputs),
            tokens=linear.tokens,
            starved=linear.starved,
            output_blocks=solved.output_blocks,
        )
