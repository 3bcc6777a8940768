"""The pass, a plain loop over the blocks of a model.

    source -[embedding]-> activations
    for each block:   read it, prune its layers, store the shard, run it     (see `block`)
    index, config, tokenizer; audit

Memory holds one block and the activations, never the model. Every block receives the activations of the pruned blocks
before it, so later blocks correct errors of earlier ones. What further recipes for the same model and tokens measure
alike is measured once in a process, see `measured`.

The calibration windows (`activations`) and the layers of a block (`side_by_side`) are spread over several devices. Each
of several processes runs this same loop on its own devices; only the first process writes.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from sparseopt.core.base.dense import activations_in
from sparseopt.core.base.mesh import Devices, device_line
from sparseopt.core.base.types import Observer
from sparseopt.layers.compiled import Stopwatch
from sparseopt.layers.patterns import check_cut
from sparseopt.layers.split import is_out_of_memory
from sparseopt.models import LoadedModel, ModelSource, StreamedModel, block_tag, check_output, open_any, unread
from sparseopt.pruning.base.activations import Stream, embed_windows
from sparseopt.pruning.base.records import Footprint, Passed
from sparseopt.pruning.base.reports import PruneReport
from sparseopt.pruning.loaded_pass import loaded_footprint, plan_for, prune_loaded
from sparseopt.pruning.measure.mixing import choose_shape
from sparseopt.pruning.measure.survey import survey
from sparseopt.pruning.measure.vocabulary import TokenChoice
from sparseopt.pruning.memory import choose_footprint
from sparseopt.pruning.recipe.pass_recipe import PassRecipe
from sparseopt.pruning.recipe.prune_recipe import Recipe
from sparseopt.pruning.recipe.shrink_recipe import TEXT, ShrinkRecipe, wanted_tokens
from sparseopt.pruning.run.block import DenseBlock, PruningError, Stopped
from sparseopt.pruning.run.calibration import CalibrationWindows, choose_tokens
from sparseopt.pruning.run.drawn import drawn_windows, keep_drawn
from sparseopt.pruning.run.folder_pass import Pass
from sparseopt.pruning.run.output_form import ENDING
from sparseopt.pruning.run.plan import Plan
from sparseopt.pruning.run.resumption import (
    Identity,
    Progress,
    claimed,
    progress_in,
    read_report,
    recipe_identity,
    state_in,
)
from sparseopt.system import processes
from sparseopt.system.machine import freed_memory_kept, parse_bytes, peak_from_now, return_freed_memory
from sparseopt.system.run_folder import KEPT_TOKENS, State


@freed_memory_kept()
def prune_model(
    source: ModelSource,
    output: str | Path,
    recipe: PassRecipe | None = None,
    *,
    observer: Observer | None = None,
    stop: Callable[[], bool] | None = None,
    memory: int | str | None = None,
    devices: Devices = None,
) -> PruneReport:
    """Prune all linear layers of a causal language model and write a folder that transformers loads, or a GGUF file.

    Args:
        source: a Hugging Face model folder (safetensors), a GGUF file, or a name on the Hugging Face hub, `OWNER/NAME`
            or `OWNER/NAME@REVISION`; or the result of `open_source`. Or a model in memory, which stays unchanged: a
            transformers model in torch, or a `Decoder` from `load_decoder`, also after training. Its tokenizer and
            other files come from the folder that it was loaded from; without such a folder, calibration must be token
            ids.
        output: a new or empty folder, or a new file whose name ends in ".gguf"; records of the run are then in a folder
            beside it whose name ends in ".gguf.run". If the same run was interrupted there, it resumes after the last
            finished block, and the result is identical to an uninterrupted run's. If the same run is finished
            there, nothing is done and its report is returned.
        recipe: what to do; default: remove half of the weights, with effort good, calibrated on text that the model
            draws. With a `ShrinkRecipe` the call is that of `shrink_model`.
        observer: called with an `Event`, the number of layers done and their total. If the event is a text, which names
            what is being measured or trained, or the record of a removed block, the numbers count steps.
        stop: called after every block; True ends the run there, and the same call resumes it.
        memory: memory that the run may use, device and host together, in bytes or as in "8GiB". If the estimate
            requires it, activations between blocks are kept on the output folder's disk; the result is identical. None:
            the machine's available memory decides where they are kept, and a run that does not fit in the memory that a
            GPU or TPU reports raises an error.
        devices: number of devices to use, or "all", see `core.mesh`. None uses one, or all of them if there are several
            processes. Results agree up to rounding for any number, and a run may be resumed on another. All processes
            make the same call, see the output folder and the source under the same names, and return together.

    Returns:
        A `PruneReport`, with `kept` set if the run was finished before. The same figures are in `output/records.jsonl`
        and `output/summary.json`.

    Raises:
        ValueError: before any work, if the recipe, the model, the text or the folder cannot be used; if the folder
            holds another run, with what differs; if the run does not fit the memory budget, with what needs the memory,
            or the disk; if devices do not exist or the run cannot use them.
        Stopped: if `stop` asked for it.
        PruningError: if activations or a solve become non-finite or memory runs out (finished shards stay), or if the
            stored weights, read back, violate the pattern.
    """
    start, peak = time.perf_counter(), peak_from_now()
    recipe = recipe or Recipe()
    with open_pass(source, output, recipe, observer or (lambda *_: None), memory, devices) as work:
        if isinstance(work, PruneReport):
            return work
        with activations_in(recipe.precision), _memory_errors():
            watch = Stopwatch()
            if recipe.get("only_vocabulary"):
                _copy_blocks(work, stop)
                return work.finish(start, 0.0, peak())
            work.tell(work.calibration)
            work.tell(work.footprint)
            if recipe.draws:
                keep_drawn(work.plan, work.windows)
            (prune_loaded if isinstance(work.model, LoadedModel) else _run_blocks)(work, stop)
            return work.finish(start, watch.read()[1], peak())


def shrink_model(source: ModelSource, output: str | Path, recipe: ShrinkRecipe, **options: Any) -> PruneReport:
    """Make a smaller dense model of a causal language model: fewer MLP channels, key-value groups, blocks or experts.

        minimise over V and S    1/2 ||X Vᵀ - Y||²    subject to V vanishing outside the kept groups of inputs S

    for the inputs of `down_proj` (channels; the rows of gate and up follow) and of `o_proj` (key-value groups; the rows
    of q, k and v follow), with Y the dense layer's outputs. All blocks keep the same numbers, so the result is a plain
    Hugging Face model of the same family, which every runtime accepts. The recipe gives the fractions to keep, or a
    number of parameters, for which losses measured on the dense model choose the fractions (see `mixing`).

    Arguments, resuming and errors are as for `prune_model`.

    Raises:
        ModelError: before any work, if the model or its family cannot have these fractions, or so few parameters.
    """
    return prune_model(source, output, recipe, **options)


def checked(
    source: ModelSource, output: str | Path, recipe: PassRecipe, memory: int | str | None, devices: Devices
) -> tuple[Any, Plan, int | None, Mesh | None, TokenChoice | None]:
    """The opened model, the plan of the recipe, the budget in bytes, the devices and, if tokens go, their choice.

    The model has fewer tokens then, chosen by the text alone. Errors are as of `prune_model`.
    """
    budget, output = None if memory is None else parse_bytes(memory), Path(output).expanduser().resolve()
    mesh = device_line("all" if devices is None and processes.count() > 1 else devices)
    if mesh is not None and budget is not None:
        raise ValueError(
            f"a budget of memory is for one device, given {memory} and {mesh.size} devices: leave one of the two out"
        )
    # For a model that is loaded whole, plan and pass ask for names and shapes alone.
    model: Any = open_any(source)
    check_output(model.source, output)
    if output.suffix.lower() in (".safetensors", ".bin") or output.name.lower() == ENDING:
        raise ValueError(f"{output} would be a folder: give the name of a folder, or of a GGUF file, NAME{ENDING}")
    if mesh is not None and isinstance(model, LoadedModel):
        raise ValueError(
            f"a {model.config.model_type} model, whose family is not known here, is loaded whole on one device; given "
            f"{mesh.size}: leave devices out"
        )
    tokens, known = None, None
    if isinstance(recipe, ShrinkRecipe) and recipe.vocabulary is not None and isinstance(model, StreamedModel):
        wanted, named = wanted_tokens(recipe.vocabulary), recipe.vocabulary.removeprefix(TEXT)
        if wanted is None:
            tokens = TokenChoice(model, None, named, other=recipe.score)
        else:
            reading = {"split": recipe.split, "column": recipe.column}
            tokens = TokenChoice(model, wanted, recipe.calibration, other=recipe.score, **reading)
        model, known = tokens.made(tokens.counted)
    plan = replace(plan_for(model, recipe, output), vocabulary=known)
    for key, pattern in plan.patterns.items():
        check_cut(pattern, model.weight_shape(key), mesh)
    return model, plan, budget, mesh, tokens


def footprint_of(
    model: Any, plan: Plan, windows: CalibrationWindows, budget: int | None, mesh: Mesh | None
) -> Footprint:
    """The memory and disk that a run needs; a BudgetError if it is too much."""
    if isinstance(model, LoadedModel):
        return loaded_footprint(model, plan, windows.calibration, budget)
    return choose_footprint(model, plan, *windows[:2], budget, spread=mesh is not None)


@contextlib.contextmanager
def open_pass(
    source: ModelSource,
    output: str | Path,
    recipe: PassRecipe,
    observer: Observer,
    memory: int | str | None,
    devices: Devices,
) -> Iterator[Pass | PruneReport]:
    """Check and decide everything before work, and lock the folder; arguments and errors are as for `prune_model`.

    Yields:
        The pass; the report of a run that is finished.
    """
    model, plan, budget, mesh, tokens = checked(source, output, recipe, memory, devices)
    first = processes.is_first()
    # One process locks the folder for all.
    with claimed(plan.folder) if first else contextlib.nullcontext():
        drawing = 0.0
        asks = tokens if tokens is not None and tokens.is_open and recipe.get("effort") != "fast" else None
        if asks is not None:
            model, known = asks.predicted(plan.folder / KEPT_TOKENS, observer)
            plan = replace(plan_for(model, recipe, plan.output), vocabulary=known)
        identity = Identity(model)

        def draw(plan: Plan) -> CalibrationWindows:
            nonlocal drawing
            began = time.perf_counter()
            windows = drawn_windows(model, plan, identity, budget, observer)
            drawing = time.perf_counter() - began
            return windows

        plan, windows, calibration, samples = choose_tokens(model, plan, draw)
        identity.tokens = calibration.digest
        processes.agree(
            {
                "recipe": recipe_identity(plan.recipe),
                "calibration tokens": identity.tokens,
                "model": [model.source.name, model.source.config],
                "output": str(plan.output),
            }
        )
        if processes.told(state_in(identity, plan) is State.FINISHED if first else None):
            yield read_report(identity, plan)
            return
        footprint = footprint_of(model, plan, windows, budget, mesh)
        if isinstance(model, LoadedModel):
            _ = model.module  # an error, if it cannot be loaded, before anything is written
        progress = Progress.from_dict(processes.told(progress_in(identity, plan).as_dict() if first else None))
        identity.weights = processes.told(identity.weights if first else None)
        if asks is not None and first:
            asks.keep(plan.folder / KEPT_TOKENS)
        yield Pass(model, plan, identity, windows, calibration, samples, footprint, progress, observer, mesh, drawing)


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Say what to do if memory runs out, except in the solve of a layer, which says so itself."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # JAX and torch raise their own kinds of RuntimeError
        if isinstance(error, PruningError) or not is_out_of_memory(error):
            raise
        said = str(error).partition("\n")[0] or "no more is known"
        raise PruningError(
            f"memory ran out ({said}); finished blocks are stored: start the same command again with more memory free, "
            "or with a smaller budget (memory) than this run took, which keeps activations on disk. A run with a "
            "shorter seqlen or with train_epochs=0 takes less"
        ) from error


def _begin(work: Pass) -> Stream:
    """Measure what the run needs and start its folder; return the dense model's stream before the first block."""
    return_freed_memory()
    stream, watch = Stream(*embed_windows(work.model, work.batches, *work.windows[:2])), Stopwatch()
    work.plan = survey(work, stream)
    work.plan = choose_shape(work, stream)
    if work.progress.shape is not None:
        work.tell(work.progress.shape)
    work.survey_seconds += watch.read()[0]
    work.begin(stream)
    return stream


def _run_blocks(work: Pass, stop: Callable[[], bool] | None) -> None:
    """Go through the blocks of a model that is streamed."""
    model, recipe = work.model, work.plan.recipe
    stream = _begin(work)
    # A stream that only the run holds is freed when it has passed the block.
    before, dense = stream if recipe.distillation else None, stream if recipe.needs_dense_stream else None
    del stream
    # The removed blocks that the dense stream has passed together with the block before them.
    gap: list[int] = []
    for index in range(model.num_blocks):
        if index not in gap:
            return_freed_memory()
            behind = range(index + 1, model.num_blocks)
            gap = list(itertools.takewhile(lambda later: work.plan.place(later) is None, behind))
            block = DenseBlock(model, index, dense, work.runner, gap)
            work.advance(block)
            if dense is not None:
                dense = block.outputs() if before is not None or len(gap) < len(behind) else None
            # The next block is read once this one and its Grams are freed.
            del block
        work.tell(Passed(index, model.num_blocks))
        _stop_after(index, model, stop)
    work.distil(before, dense)


def _copy_blocks(work: Pass, stop: Callable[[], bool] | None) -> None:
    """Write the blocks as they are: only the vocabulary is smaller, and no text runs through the model."""
    empty = Stream(work.batches, work.batches)
    work.plan = choose_shape(work, empty)
    work.begin(empty)
    for index in range(work.finished, work.model.num_blocks):
        work.writer.write(block_tag(index), unread(work.model.source, work.model.block_keys(index).values()))
        work.tell(Passed(index, work.model.num_blocks))
        _stop_after(index, work.model, stop)


def _stop_after(index: int, model: StreamedModel, stop: Callable[[], bool] | None) -> None:
    """Stop after a block other than the last one, if `stop` asks for it."""
    if index + 1 < model.num_blocks and processes.any_of(stop is not None and stop()):
        raise Stopped(f"stopped after block {index + 1} of {model.num_blocks}; the same call resumes there")
