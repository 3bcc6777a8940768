"""The pass over a model whose family is not known here: loaded whole by transformers, pruned by `prune_module`.

Texts, folders, records, scores and reports are as in `pipeline`. There is one shard, written when all layers are
pruned, so an interrupted run starts again from the beginning.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.layers.methods import method_cost
from sparseopt.models import WHOLE_TAG, Form, LoadedModel, ModelError, unread
from sparseopt.models.files.in_memory import as_numpy
from sparseopt.pruning.base.activations import windows_per_batch
from sparseopt.pruning.base.records import Footprint, LayerRecord, Passed
from sparseopt.pruning.memory import FLOAT32, LIBRARIES, PROGRAMS, BudgetError, check_disk, output_bytes
from sparseopt.pruning.modules.module_plan import ELSEWHERE, module_recipe
from sparseopt.pruning.prune_module import prune_module
from sparseopt.pruning.recipe.pass_recipe import PassRecipe
from sparseopt.pruning.recipe.prune_recipe import Recipe
from sparseopt.pruning.recipe.targets import shares_in
from sparseopt.pruning.run.block import Stopped
from sparseopt.pruning.run.folder_pass import Pass
from sparseopt.pruning.run.output_form import is_file
from sparseopt.pruning.run.plan import Plan, layer_patterns, layer_shares, make_plan
from sparseopt.system.machine import format_bytes, return_freed_memory, working_memory_bytes
from sparseopt.system.run_folder import DRAWN, RUN

# Resident bytes of torch and of transformers' model classes, and the memory of a block's uncounted arrays relative to
# its counted ones: measured on a CPU.
TORCH, UNCOUNTED = 350 * 2**20, 0.4
# What a recipe leaves open for a known family, and what is decided for a module.
DECIDED = ("allocation", "permute", "output_weights", "train_epochs", "distil_epochs")


def plan_for(model: Any, recipe: PassRecipe, output: Path) -> Plan:
    """`make_plan`, also for a model that is loaded whole; it raises the same errors."""
    if not isinstance(model, LoadedModel):
        return make_plan(model, recipe, output)
    kind = f"{model.source.path} holds a {model.config.model_type} model, whose family is not known here"
    if not isinstance(recipe, Recipe):
        raise ModelError(f"{kind}, and smaller models are made of known families: prune it instead")
    asked = {name: recipe.given(name) for name in ("bits", "head_bits", "masks")}
    asked["an output that ends in .gguf"] = is_file(output)
    if wrong := [name for name, value in asked.items() if value]:
        raise ValueError(f"{kind}, and {', '.join(wrong)} cannot be had of it: leave that out")
    fitted, _ = module_recipe(_of_module(recipe), trains=False, has_loss=False)
    recipe = recipe.model_copy(update={name: getattr(fitted, name) for name in DECIDED})
    patterns = layer_patterns(model, recipe, recipe.layer_method, layer_shares(model, recipe))
    target: Any = model
    return Plan(recipe, recipe.layer_method, output, target, patterns, form=Form())


def _of_module(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe without its options for texts and folders."""
    return recipe.model_copy(update={name: Recipe.model_fields[name].default for name in ELSEWHERE} | changes)


def loaded_footprint(model: Any, plan: Plan, windows: np.ndarray, budget: int | None) -> Footprint:
    """The memory and disk that a pass over a model loaded whole needs; arguments as for `choose_footprint`.

    Raises:
        BudgetError: if it exceeds the budget or, without one, the available memory; or if the disk is too full.
    """
    shapes, batch = [model.weight_shape(key) for key in model.linear_keys()], windows_per_batch(*windows.shape)
    widths, squares = (sum(each) / model.num_blocks for each in (map(sum, shapes), (w**2 for _, w in shapes)))
    modules = 1 + plan.recipe.needs_dense_stream
    parts = {
        "model": modules * model.nbytes,
        # A window that waits before a block holds a few times its stream.
        "activations": modules * 4 * FLOAT32 * windows.size * model.config.hidden_size,
        # A batch in a block, with copies for JAX.
        "batch": int(modules * 1.5 * FLOAT32 * batch * windows.shape[1] * widths),
        # The sums of all batches so far, and of one.
        "Grams": int(modules * 2 * FLOAT32 * squares),
        "workspace": max(method_cost(plan.method).workspace.nbytes(*shape) for shape in set(shapes)),
    }
    uncounted = int(UNCOUNTED * sum(parts.values()))
    parts |= {"other arrays": uncounted, "libraries": LIBRARIES + TORCH, "compiled programs": PROGRAMS}
    model.forget()  # it may have drawn the windows
    needed, limit = sum(parts.values()), working_memory_bytes() if budget is None else budget
    if needed > limit:
        held = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in parts.items())
        raise BudgetError(
            f"a {model.config.model_type} model, whose family is not known here, is loaded whole: the run is estimated "
            f"to take {format_bytes(needed)} ({held}), and there are {format_bytes(limit)}; fewer windows, or "
            "propagate=0, which needs no second copy of the model, take less"
        )
    check_disk(plan, 0)
    output = sum(output_bytes(model, plan.recipe, plan.form).values())
    return Footprint("memory", needed, parts, "layer solves", budget, output, 0)


def prune_loaded(work: Pass, stop: Callable[[], bool] | None) -> None:
    """Prune the source's model, and write its shard.

    Raises:
        Stopped: if `stop` asked for it.
        PruningError: as `prune_module` does.
    """
    model: Any = work.model
    _ = work.before  # while the model is in memory, and dense
    pruned = {} if work.progress.tags else _pruned(work, stop)
    work.open()
    if pruned:
        rest = [key for key in work.plan.target.exported_keys() if key not in pruned]
        work.writer.write(WHOLE_TAG, {**unread(work.model.source, rest), **pruned})
    del pruned
    model.forget()


def _pruned(work: Pass, stop: Callable[[], bool] | None) -> dict[str, np.ndarray]:
    """The pruned weights, in the layout of the files."""
    model: Any = work.model
    recipe, tokens, last = work.plan.recipe, work.windows.calibration, 0
    assert isinstance(recipe, Recipe)

    def told(record: LayerRecord, *_: int) -> None:
        nonlocal last
        if record.block > last:
            work.tell(Passed(last, model.num_blocks))
            if stop is not None and stop():
                raise Stopped(f"stopped after {record.block} parts; the same call begins anew")
            last = record.block
            return_freed_memory()
        record = replace(record, layer=keys[record.layer].removesuffix(".weight"))
        work.keep(record)
        work.tell(record)

    keys = {name: key for key, name in model.linears.items()}
    shares = {model.linears[key]: share for key, share in layer_shares(model, recipe).items()}
    # A table leaves the others unchanged.
    targets = tuple(shares) if shares_in(recipe.targets) is None else (*shares.items(), ("re:.*", 0.0))
    step = windows_per_batch(*tokens.shape)
    batches = [model.ids(tokens[first : first + step]) for first in range(0, len(tokens), step)]
    module = _of_module(recipe, targets=targets, ignore=None)
    try:
        _, report = prune_module(model.module, batches, module, call=_through_blocks, inplace=True, observer=told)
    except ValueError:
        # Nothing was done: the folder is free for another recipe.
        for name in (RUN, DRAWN):
            (work.plan.folder / name).unlink(missing_ok=True)
        raise
    work.tell(Passed(last, model.num_blocks))
    work.runner.seconds += report.seconds - report.solver_seconds
    parts = dict(model.module.named_modules())
    return {key: as_numpy(parts[model.linears[key]].weight) for key in work.plan.patterns}


def _through_blocks(module: Any, ids: Any) -> Any:
    """Run without the head, whose logits would be the largest activations."""
    return module.base_model(input_ids=ids, use_cache=False)
