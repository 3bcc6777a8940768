"""Floor 6: the pass, a plain loop over the blocks of a model.

    source -[embedding]-> activations
    for each block:   read it; for each plan: prune its linears, store the shard, run it   (see `Branch`, `block`)
    index, config, tokenizer; audit

Memory holds one block and the activations, never the model. Every block sees the activations of the pruned blocks
before it, so later blocks correct errors of earlier ones. Several plans share one pass: each block is read once, and
the Grams before the first block, the dense model's own activations and the survey for an allocation are computed once.

Over several devices the calibration windows are spread (`activations`), and so are the linears of a block
(`side_by_side`). With several processes each runs this same loop on its own devices; the first process alone writes.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sparseopt.core.dense import HIGHEST
from sparseopt.core.mesh import Devices, device_line
from sparseopt.core.types import Observer
from sparseopt.models import (
    OUTER_TAG,
    PrunableBlock,
    PrunableModel,
    ShardedWriter,
    Source,
    TorchModel,
    block_tag,
    open_model,
    unread,
)
from sparseopt.pruning.activations import Batches, DiskBatches, SpreadBatches, Stream
from sparseopt.pruning.block import DenseBlock, PruningError, prune_block
from sparseopt.pruning.calibration import runner_of
from sparseopt.pruning.cost import choose_footprint
from sparseopt.pruning.evaluation import audit_stored
from sparseopt.pruning.patterns import check_cut
from sparseopt.pruning.plan import CalibrationWindows, Plan, calibration_windows, check_same_calibration, make_plan
from sparseopt.pruning.recipe import Recipe
from sparseopt.pruning.reports import BlockRecord, Event, Footprint, LayerRecord, PruneReport, Replay
from sparseopt.pruning.run_folder import (
    Identity,
    Progress,
    claimed,
    is_finished,
    progress_in,
    read_report,
    recipe_identity,
)
from sparseopt.pruning.survey import survey
from sparseopt.system import processes
from sparseopt.system.machine import parse_bytes, peak_memory_bytes, return_freed_memory
from sparseopt.system.run_folder import append_record, write_summary


class Stopped(PruningError):
    """A run that stopped after a finished block because it was asked to; the same call resumes it."""


def prune_model(
    source: str | Path | Source,
    output: str | Path,
    recipe: Recipe | None = None,
    *,
    observer: Observer | None = None,
    stop: Callable[[], bool] | None = None,
    memory: int | str | None = None,
    devices: Devices = None,
) -> PruneReport:
    """Prune all linears of a causal language model and write a folder that transformers loads.

    Args:
        source: a Hugging Face model folder (safetensors), a GGUF file, or a name on the Hugging Face hub, `OWNER/NAME`
            or `OWNER/NAME@REVISION`; or what `open_source` made of one.
        output: a folder that does not exist yet or is empty. If the same run was interrupted there, it resumes after
            the last finished block, and the result is identical to that of an uninterrupted run. If the same run is
            finished there, nothing is done and its report is returned.
        recipe: what to do; default: mAIHT, 50 %.
        observer: called with every `Event`, a layer's record above all, the number of layers done, and that of all; for
            a text, which names what is being measured, with its steps.
        stop: asked after every block; True ends the run there, and the same call resumes it.
        memory: what the run may take, device and host together, in bytes or as in "8GiB". Activations between blocks
            are kept on the output folder's disk where the estimate asks for it; the result is identical. None: the
            memory that the machine has available decides where they are kept, and nothing is refused.
        devices: to work on, a number or "all", see `core.mesh`; None for one, and in several processes for all of
            them. Results agree to rounding whatever the number, and a run may be resumed on another. Several processes
            make the same call, see the output folder and the source under the same names, and return together.

    Returns:
        A `PruneReport`, `kept` where the run was finished before. The same figures are in `output/records.jsonl` and
        `output/summary.json`.

    Raises:
        ValueError: before any work, for a recipe, a model, a text or a folder that cannot be used; a folder with
            another run in it, with what differs; a memory budget that the run does not fit in, with what takes the
            memory; a disk with too little room; devices that do not exist, or that the run cannot use.
        Stopped: if `stop` asked for it.
        PruningError: if activations or a solve become non-finite (finished shards stay), or if what was stored, read
            back, breaks the pattern.
    """
    return prune_models(
        source, [(recipe or Recipe(), output)], observer=observer, stop=stop, memory=memory, devices=devices
    )[0]


def prune_models(
    source: str | Path | Source,
    recipes: Sequence[tuple[Recipe, str | Path]],
    *,
    observer: Observer | None = None,
    stop: Callable[[], bool] | None = None,
    memory: int | str | None = None,
    devices: Devices = None,
) -> list[PruneReport]:
    """Prune one model by several recipes in one pass over its blocks, each into its own folder.

    The recipes must agree in all that concerns the calibration tokens. Other arguments and errors are those of
    `prune_model`, for the whole pass: the observer's number of layers is that of all recipes, and one recipe's failure
    ends them all.

    Returns:
        A report for each recipe, in their order; times of forward passes are those of the whole pass. Recipes that are
        finished in their folders take no part in it.
    """
    start = time.perf_counter()
    budget = None if memory is None else parse_bytes(memory)
    if not recipes:
        raise ValueError("nothing to do: give at least one recipe and its output folder")
    for recipe, _ in recipes:
        recipe.check()
    check_same_calibration([recipe for recipe, _ in recipes])
    folders = [Path(output).expanduser().resolve() for _, output in recipes]
    if len(set(folders)) < len(folders):
        raise ValueError(f"every recipe needs its own output folder, given {', '.join(map(str, folders))}")
    mesh = device_line("all" if devices is None and processes.count() > 1 else devices)
    if mesh is not None and budget is not None:
        raise ValueError(
            f"a budget of memory is for one device, given {memory} and {mesh.size} devices: leave one of the two out"
        )
    model = open_model(source)
    if mesh is not None and isinstance(model, TorchModel):
        raise ValueError(
            f"the blocks of a {model.config.model_type} model, whose family is not known here, run in torch, which is "
            f"for one device; given {mesh.size}: leave devices out"
        )
    plans = [make_plan(model, recipe, folder) for (recipe, _), folder in zip(recipes, folders, strict=True)]
    for plan in plans:
        for key, pattern in plan.patterns.items():
            check_cut(pattern, model.weight_shape(key), mesh)
    windows = calibration_windows(model, plans[0].recipe)
    processes.agree(
        {
            "recipes": [recipe_identity(plan.recipe) for plan in plans],
            "calibration tokens": [windows.calibration.tolist(), windows.heldout.tolist()],
            "model": [model.source.name, model.source.config],
            "output folders": [str(folder) for folder in folders],
        }
    )
    identity, first = Identity(model, windows.calibration, windows.heldout), processes.is_first()
    # One process holds the folders for all.
    with claimed(folders) if first else contextlib.nullcontext():
        found = [is_finished(plan.folder, identity, plan.recipe) for plan in plans] if first else []
        finished = processes.told(found)
        rest = [plan for plan, done in zip(plans, finished, strict=True) if not done]
        made: list[PruneReport] = []
        if rest:
            footprint = choose_footprint(model, rest, *windows[:2], budget, spread=mesh is not None)
            return_freed_memory()
            made = _run(model, rest, windows, identity, footprint, mesh, observer or (lambda *_: None), stop, start)
        reports = iter(made)
        return [
            read_report(plan.folder, identity, plan.recipe) if done else next(reports)
            for plan, done in zip(plans, finished, strict=True)
        ]


def _run(
    model: PrunableModel,
    plans: Sequence[Plan],
    windows: CalibrationWindows,
    identity: Identity,
    footprint: Footprint,
    mesh: Mesh | None,
    observer: Observer,
    stop: Callable[[], bool] | None,
    start: float,
) -> list[PruneReport]:
    """One pass for plans whose folders are claimed; `start` is when the run began."""
    done, total, runner = 0, len(plans) * sum(map(len, identity.linears)), runner_of(model)

    def told(event: Event) -> None:
        nonlocal done
        done += isinstance(event, LayerRecord)
        observer(event, done, total)

    told(footprint)
    progress, writers = _begin(model, plans, identity)
    on_disk = footprint.activations == "disk"
    kind = SpreadBatches(mesh) if mesh is not None else DiskBatches(plans[0].folder) if on_disk else Batches()
    stream, before = _embed(model, windows, kind), runner.seconds
    plans = survey(model, plans, stream, windows, runner, observer)
    survey_seconds = runner.seconds - before
    branches = [Branch(model, *own, stream) for own in zip(plans, progress, writers, strict=True)]
    dense = stream if any(plan.recipe.needs_dense_stream for plan in plans) else None
    # The branches hold the only references: a stream goes when all of them have passed the block.
    del stream
    for index in range(model.num_blocks):
        block, last = DenseBlock(model.block(index), index, dense, runner), index + 1 == model.num_blocks
        for branch in branches:
            branch.advance(block, told)
        dense = block.outputs if dense and not last else None
        # The next block is read when this one and its Grams are gone.
        del block
        if not last and processes.any_of(stop is not None and stop()):
            raise Stopped(f"stopped after block {index + 1} of {model.num_blocks}; the same call resumes there")
    figures = {
        "route": "torch" if isinstance(model, TorchModel) else "flax",
        "plans": len(plans),
        "bos": windows.bos,
        "survey_seconds": survey_seconds,
        "calibration_seconds": runner.seconds,
        "calibration_gflops": runner.flops / max(runner.seconds, 1e-9) / 1e9,
        "footprint": footprint,
        "devices": 1 if mesh is None else mesh.size,
        "processes": processes.count(),
        "platform": jax.devices()[0].platform,
        "precision": HIGHEST.name.lower(),
        "seconds": time.perf_counter() - start,
    }
    return [branch.finish(runner.compile_seconds, **figures) for branch in branches]


@dataclass
class Branch:
    """One plan's model on its way through the blocks, into its own folder, which has the tensors outside the blocks."""

    model: PrunableModel
    plan: Plan
    progress: Progress
    writer: ShardedWriter
    stream: Stream

    def __post_init__(self) -> None:
        self.finished = self.progress.blocks

    def advance(self, dense: DenseBlock, observer: Callable[[Event], None]) -> None:
        """Prune and store one block, or replay it where an earlier run has stored it, and run the stream through it.

        Raises:
            PruningError: as `prune_block` does.
        """
        step = self._replay if dense.index < self.finished else self._prune
        block = step(dense, observer)
        if dense.index + 1 < self.model.num_blocks:
            self.stream = dense.runner.through(block, self.stream)

    def _replay(self, dense: DenseBlock, observer: Callable[[Event], None]) -> PrunableBlock:
        block, keys = dense.block.copy(), self.model.block_keys(dense.index)
        stored = self.writer.stored(block_tag(dense.index))
        # As in `prune_block`, what was not pruned or trained runs as the source has it, not as it was stored.
        trained = self.plan.recipe.reconstruction is not None
        changed = keys if trained else [f"{name}.weight" for name in block.linears]
        block.write({path: self.model.as_stored(keys[path], stored[keys[path]]) for path in changed})
        events: list[Event] = [Replay(len(block.linears)), *self.progress.of_block(dense.index)]
        for event in events:
            observer(event)
        return block

    def _prune(self, dense: DenseBlock, observer: Callable[[Event], None]) -> PrunableBlock:
        def told(record: LayerRecord | BlockRecord) -> None:
            self.progress.add(record)
            if processes.is_first():
                append_record(self.plan.folder, record.as_dict())
            observer(record)

        dtypes = {key: self.writer.dtype_of(key) for key in self.model.block_keys(dense.index).values()}
        block, tensors = prune_block(self.model, self.plan, dense, self.stream, dtypes, told)
        stored = {key: self.model.as_stored(key, value) for key, value in tensors.items()}
        self.writer.write(block_tag(dense.index), stored)
        return block

    def finish(self, compile_seconds: float, **figures: Any) -> PruneReport:
        """Complete the folder, read it back, report; `figures` of the whole pass are fields of the report.

        Raises:
            PruningError: if what was stored breaks the pattern.
        """
        self.writer.finish()
        folder, first = self.plan.folder, processes.is_first()
        broken = [a.layer for a in audit_stored(folder, self.plan.patterns) if not a.fits] if first else []
        if broken := processes.told(broken):
            raise PruningError(
                f"{len(broken)} linears read back from {folder} break the pattern {self.plan.recipe.pattern!r}, "
                f"{broken[0]} first; was the folder changed while it was written?"
            )
        layers, blocks = self.progress.layers, self.progress.trained
        report = PruneReport(
            output=folder,
            source=self.model.source.name,
            revision=self.model.source.revision,
            recipe=self.plan.recipe.as_dict(),
            layers=layers,
            blocks=blocks,
            solver_seconds=sum(r.seconds for r in layers),
            reconstruction_seconds=sum(r.seconds for r in blocks),
            compile_seconds=compile_seconds + sum(r.compile_seconds for r in self.progress.records),
            layer_compilations=sum(r.compile_seconds > 0 for r in layers),
            dense_bytes=self.writer.dense_bytes,
            stored_bytes=self.writer.stored_bytes,
            peak_memory_bytes=peak_memory_bytes(),
            resumed_blocks=self.finished,
            **figures,
        )
        if first:
            write_summary(folder, report.summary())
        processes.barrier("finished")
        return report


def _begin(
    model: PrunableModel, plans: Sequence[Plan], identity: Identity
) -> tuple[list[Progress], list[ShardedWriter]]:
    # Folders begin with the tensors outside the blocks, unless an earlier run has written them.
    first, known = processes.is_first(), []
    if first:
        known = [progress_in(plan.folder, identity, plan.recipe).as_dict() for plan in plans]
    progress = [Progress.from_dict(each) for each in processes.told(known)]
    begun = all(OUTER_TAG in found.tags for found in progress)
    outer = {} if begun else unread(model.source, model.outer_keys())
    writers = []
    for plan, found in zip(plans, progress, strict=True):
        recipe, keys = plan.recipe, model.exported_keys()
        writer = ShardedWriter(plan.folder, model.source, recipe.dtype, recipe.pack, keys, found.tags, writes=first)
        if OUTER_TAG not in found.tags:
            writer.write(OUTER_TAG, outer)
        writers.append(writer)
    return progress, writers


def _embed(model: PrunableModel, windows: CalibrationWindows, kind: Batches) -> Stream:
    """The stream before the first block, stored as `kind` is; only these tokens' rows of the embedding are read."""
    calibration, heldout, _ = windows
    rows, ids = np.unique(np.concatenate([calibration.ravel(), heldout.ravel()]), return_inverse=True)
    embedding, ids = model.embedding(rows), ids.astype(np.int32)
    parts = ids[: calibration.size].reshape(calibration.shape), ids[calibration.size :].reshape(heldout.shape)
    return Stream(*(kind.embed(embedding, part) for part in parts))
