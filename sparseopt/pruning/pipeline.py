"""The pass, a plain loop over the blocks of a model.

    source -[embedding]-> activations
    for each block:   read it; for each plan: prune its layers, store the shard, run it     (see `block`)
    index, config, tokenizer; audit

Memory holds one block and the activations, never the model. Every block receives the activations of the pruned blocks
before it, so later blocks correct errors of earlier ones. Several plans share one pass: each block is read once, and
the Grams before the first block, the dense model's own activations and the survey for an allocation are computed once.

The calibration windows (`activations`) and the layers of a block (`side_by_side`) are spread over several devices. Each
of several processes runs this same loop on its own devices; only the first process writes.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sparseopt.core.base.dense import activations_in
from sparseopt.core.base.mesh import Devices, device_line
from sparseopt.core.base.types import Observer
from sparseopt.layers.compiled import Stopwatch
from sparseopt.layers.patterns import check_cut
from sparseopt.layers.split import is_out_of_memory
from sparseopt.models import LoadedModel, ModelSource, check_output, open_any
from sparseopt.pruning.base.activations import Stream, embed_windows
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.base.records import Footprint, Passed
from sparseopt.pruning.base.reports import PruneReport
from sparseopt.pruning.loaded_pass import loaded_footprint, plan_for, prune_loaded
from sparseopt.pruning.measure.mixing import choose_shapes
from sparseopt.pruning.measure.survey import survey
from sparseopt.pruning.memory import choose_footprint
from sparseopt.pruning.recipe.pass_recipe import PassRecipe
from sparseopt.pruning.recipe.prune_recipe import Recipe
from sparseopt.pruning.recipe.shrink_recipe import ShrinkRecipe
from sparseopt.pruning.run.block import DenseBlock, PruningError, Stopped
from sparseopt.pruning.run.calibration import (
    CalibrationWindows,
    calibration_windows,
    check_same_calibration,
    default_windows,
    describe_calibration,
    drawn_sample,
    samples_to_score,
    with_windows,
)
from sparseopt.pruning.run.drawn import drawn_windows, keep_drawn
from sparseopt.pruning.run.output_form import ENDING, run_folder_of
from sparseopt.pruning.run.plan import Plan
from sparseopt.pruning.run.resumption import (
    Identity,
    Progress,
    claimed,
    is_finished,
    progress_in,
    read_report,
    recipe_identity,
)
from sparseopt.pruning.run.shared_pass import Branch, Pass
from sparseopt.pruning.run.variants import with_variants
from sparseopt.system import processes
from sparseopt.system.machine import freed_memory_kept, parse_bytes, peak_from_now, return_freed_memory


def prune_model(
    source: ModelSource,
    output: str | Path,
    recipe: Recipe | None = None,
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
            draws.
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
    return prune_models(
        source, [(recipe or Recipe(), output)], observer=observer, stop=stop, memory=memory, devices=devices
    )[0]


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
    return prune_models(source, [(recipe, output)], **options)[0]


@freed_memory_kept()
def prune_models(
    source: ModelSource,
    recipes: Sequence[tuple[PassRecipe, str | Path]],
    *,
    observer: Observer | None = None,
    stop: Callable[[], bool] | None = None,
    memory: int | str | None = None,
    devices: Devices = None,
) -> list[PruneReport]:
    """Prune one model with several recipes in one pass over its blocks, each into its own folder.

    The recipes must agree on everything that decides the calibration tokens, but may use different variants of them.
    Other arguments and errors are as for `prune_model`, for the whole pass: the observer counts the layers of all
    recipes, and the failure of one recipe ends them all.

    Returns:
        A report for each recipe, in their order; times of forward passes are for the whole pass. Recipes that are
        already finished in their folders take no part in it.
    """
    start, peak = time.perf_counter(), peak_from_now()
    with open_pass(source, recipes, observer or (lambda *_: None), memory, devices) as (plans, identity, work):
        made: dict[Path, PruneReport] = {}
        if work is not None:
            precision = work.branches[0].plan.recipe.precision
            with activations_in(precision), _memory_errors():
                figures = _run(work, stop) | {"start": start, "precision": precision, "peak_memory_bytes": peak()}
                made = {branch.plan.output: branch.finish(work.scores, **figures) for branch in work.branches}
        return [made.get(plan.output) or read_report(identity, plan) for plan in plans]


def checked(
    source: ModelSource,
    recipes: Sequence[tuple[PassRecipe, str | Path]],
    memory: int | str | None,
    devices: Devices,
) -> tuple[Any, list[Plan], int | None, Mesh | None]:
    """The opened model, the plans of the recipes, the budget in bytes and the devices; errors as of `prune_models`."""
    budget = None if memory is None else parse_bytes(memory)
    if not recipes:
        raise ValueError("nothing to do: give at least one recipe and its output folder")
    check_same_calibration([recipe for recipe, _ in recipes])
    outputs = [Path(output).expanduser().resolve() for _, output in recipes]
    if len({run_folder_of(output) for output in outputs}) < len(outputs):
        raise ValueError(f"every recipe needs its own output folder, given {', '.join(map(str, outputs))}")
    mesh = device_line("all" if devices is None and processes.count() > 1 else devices)
    if mesh is not None and budget is not None:
        raise ValueError(
            f"a budget of memory is for one device, given {memory} and {mesh.size} devices: leave one of the two out"
        )
    # For a model that is loaded whole, plan and pass ask for names and shapes alone.
    model: Any = open_any(source)
    for output in outputs:
        check_output(model.source, output)
        if output.suffix.lower() in (".safetensors", ".bin") or output.name.lower() == ENDING:
            raise ValueError(f"{output} would be a folder: give the name of a folder, or of a GGUF file, NAME{ENDING}")
    if mesh is not None and isinstance(model, LoadedModel):
        raise ValueError(
            f"a {model.config.model_type} model, whose family is not known here, is loaded whole on one device; given "
            f"{mesh.size}: leave devices out"
        )
    plans = [plan_for(model, recipe, output) for (recipe, _), output in zip(recipes, outputs, strict=True)]
    for plan in plans:
        for key, pattern in plan.patterns.items():
            check_cut(pattern, model.weight_shape(key), mesh)
    return model, plans, budget, mesh


def footprint_of(
    model: Any, plans: list[Plan], windows: CalibrationWindows, budget: int | None, mesh: Mesh | None
) -> Footprint:
    """The memory and disk that a pass needs; a BudgetError if it is too much."""
    if isinstance(model, LoadedModel):
        return loaded_footprint(model, plans, windows.calibration, budget)
    return choose_footprint(model, plans, *windows[:2], budget, spread=mesh is not None)


@contextlib.contextmanager
def open_pass(
    source: ModelSource,
    recipes: Sequence[tuple[PassRecipe, str | Path]],
    observer: Observer,
    memory: int | str | None,
    devices: Devices,
) -> Iterator[tuple[list[Plan], Identity, Pass | None]]:
    """Check and decide everything before work, and lock the folders; arguments and errors are as for `prune_models`.

    Yields:
        The plans of all recipes, the identity of their runs, and the pass of the unfinished ones; None if all are
        finished.
    """
    model, plans, budget, mesh = checked(source, recipes, memory, devices)
    identity, first = Identity(model), processes.is_first()
    # One process locks the folders for all.
    with claimed([plan.folder for plan in plans]) if first else contextlib.nullcontext():
        recipe, drawing = plans[0].recipe, 0.0
        if recipe.draws:
            sized = with_windows(plans, recipe.windows or default_windows(model, recipe.seqlen))
            # What cannot be scored ends the run before minutes of drawing.
            samples, began = samples_to_score(model, sized[0].recipe, recipe.seqlen), time.perf_counter()
            windows = drawn_windows(model, sized, identity, budget, observer)
            drawing = time.perf_counter() - began
            samples = [drawn_sample(windows), *samples] if recipe.score is None else samples
        else:
            windows = calibration_windows(model, recipe)
            sized, length = with_windows(plans, len(windows.calibration)), windows.calibration.shape[1]
            samples = samples_to_score(model, sized[0].recipe, length)
        calibrations = describe_calibration(model, plans, windows)
        plans, identity.tokens = sized, calibrations[0].digest
        processes.agree(
            {
                "recipes": [recipe_identity(plan.recipe) for plan in plans],
                "calibration tokens": identity.tokens,
                "model": [model.source.name, model.source.config],
                "outputs": [str(plan.output) for plan in plans],
            }
        )
        finished = processes.told([is_finished(identity, plan) for plan in plans] if first else [])
        rest = [(plan, own) for plan, own, done in zip(plans, calibrations, finished, strict=True) if not done]
        if not rest:
            yield plans, identity, None
            return
        unfinished = [plan for plan, _ in rest]
        footprint = footprint_of(model, unfinished, windows, budget, mesh)
        if isinstance(model, LoadedModel):
            _ = model.module  # an error, if it cannot be loaded, before anything is written
        read = processes.told([progress_in(identity, plan).as_dict() for plan in unfinished] if first else [])
        branches = [Branch(model, *own, Progress.from_dict(each)) for own, each in zip(rest, read, strict=True)]
        work = Pass(model, branches, windows, footprint, samples, observer, mesh, drawing, BlockRunner())
        yield plans, identity, work


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


def _begin(work: Pass) -> tuple[dict[int, Stream], dict[int, Stream]]:
    """Measure what the runs need and start their folders.

    Returns:
        The dense model's streams before the first block, by number of variants: first the streams needed after the last
        block, then the streams needed in every block. The branches hold their own.
    """
    again, dense = dict[int, Stream](), dict[int, Stream]()
    for variants, group in work.groups.items():
        seen = with_variants(work.model, work.windows, variants, work.batches, work.runner, work.observer)
        return_freed_memory()
        stream, watch = Stream(*embed_windows(work.model, work.batches, *seen[:2])), Stopwatch()
        alike, recipes = replace(work, branches=group), [branch.plan.recipe for branch in group]
        survey(alike, stream)
        if any(branch.plan.smaller for branch in group):
            choose_shapes(alike, stream)
        work.survey_seconds += watch.read()[0]
        for branch in group:
            branch.begin(stream)
        if any(recipe.distillation for recipe in recipes):
            again[variants] = stream
        if any(recipe.needs_dense_stream for recipe in recipes):
            dense[variants] = stream
    return again, dense


def _run(work: Pass, stop: Callable[[], bool] | None) -> dict[str, Any]:
    """Go through the model; return figures of the whole pass, which are fields of its reports."""
    branches, whole, loaded = work.branches, Stopwatch(), isinstance(work.model, LoadedModel)
    for calibration in dict.fromkeys(branch.calibration for branch in branches):
        work.tell(calibration)
    work.tell(work.footprint)
    if branches[0].plan.recipe.draws:
        for branch in branches:
            keep_drawn(branch.plan, work.windows)
    (prune_loaded if loaded else _run_blocks)(work, stop)
    return {
        "compile_seconds": whole.read()[1],
        "route": "torch" if loaded else "flax",
        "other_weights": getattr(work.model, "other_weights", 0),
        "plans": len(branches),
        "bos": work.windows.bos,
        "draw_seconds": work.draw_seconds,
        "survey_seconds": work.survey_seconds,
        "calibration_seconds": work.runner.seconds,
        "footprint": work.footprint,
        "devices": 1 if work.mesh is None else work.mesh.size,
        "processes": processes.count(),
        "platform": jax.devices()[0].platform,
    }


def _run_blocks(work: Pass, stop: Callable[[], bool] | None) -> None:
    """Go through the blocks of a model that is streamed."""
    model, branches, runner = work.model, work.branches, work.runner
    # A stream that only branches hold is freed when all of them have passed the block.
    embedded, dense = _begin(work)
    for index in range(model.num_blocks):
        return_freed_memory()
        block, last = DenseBlock(model, index, dense, runner), index + 1 == model.num_blocks
        # Branches that share their Grams before the first block take turns.
        for branch in itertools.chain(*work.groups.values()):
            branch.advance(block, work.tell)
        work.tell(Passed(index, model.num_blocks))
        dense = {variants: block.outputs(variants) for variants in (embedded if last else dense)}
        # The next block is read once this one and its Grams are freed.
        del block
        if not last and processes.any_of(stop is not None and stop()):
            raise Stopped(f"stopped after block {index + 1} of {model.num_blocks}; the same call resumes there")
    for branch in branches:
        branch.distil(embedded.get(branch.variants), dense.get(branch.variants), work.tell, work.observer)
