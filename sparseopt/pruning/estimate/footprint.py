"""Where the activations of a pass are kept, so that it fits a budget of memory.

    estimate with activations in memory <= budget      they stay there
    estimate with activations on disk <= budget        one file per stream, in the first output folder's file system
    neither                                            an error that says what takes the memory

Without a budget, the memory that the machine has available decides, and nothing is refused. On an accelerator its own
memory decides, which cannot be swapped: too little is an error.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sparseopt.layers.problem import LayerMethod
from sparseopt.models import PrunableModel, StreamedModel, TorchModel
from sparseopt.pruning.base.reports import Footprint
from sparseopt.pruning.estimate.cost import FLOAT32, LIBRARIES, PLACES, Activations, Cost, output_bytes, prune_cost
from sparseopt.pruning.recipe.pass_recipe import PassRecipe
from sparseopt.pruning.run.plan import Plan
from sparseopt.system.machine import device_memory_left, format_bytes, resident_bytes, working_memory_bytes

# What reduces the memory of each phase.
ADVICE = {
    "survey": "output_weights='uniform' and an allocation without curves do without the survey",
    "training": "reconstruct=0 trains no blocks",
    "distillation": "distil=0 leaves out the training of the whole model",
    "layer solves": "method 'wanda' or 'magnitude' needs the least for a solve",
    "Grams": "heldout_samples=0 and propagate=0 gather one set of Grams only",
}


class BudgetError(ValueError):
    """A run that memory or disk cannot hold; the text says what takes the room and what would take less."""


def choose_footprint(
    model: PrunableModel,
    plans: Sequence[Plan],
    calibration: np.ndarray,
    heldout: np.ndarray,
    budget: int | None = None,
    *,
    spread: bool = False,
) -> Footprint:
    """Choose where the activations of the plans of one pass are kept.

    Args:
        model: opened.
        plans: their folders need not exist yet.
        calibration: windows of token ids, `[samples, seqlen]`.
        heldout: windows of held-out tokens, `[0, seqlen]` without any.
        budget: bytes of memory, device and host together.
        spread: whether the run uses several devices; activations then stay in their memories, and nothing is estimated.

    Raises:
        BudgetError: if the run does not fit the budget or, without one, the device; if output and activations do not
            fit on the disk.
    """
    sizes = {"samples": len(calibration), "seqlen": calibration.shape[1], "heldout_samples": len(heldout)}
    recipes = [(plan.recipe.model_copy(update=sizes), plan.method) for plan in plans]
    where: Activations = "memory"
    parts: Mapping[str, int] = {}
    memory, phase, scratch = None, "", 0
    if isinstance(model, StreamedModel) and not spread:
        where, cost = _choose(model, recipes, budget)
        phase, scratch = cost.peak_phase, cost.scratch_bytes
        parts, held = cost.phases[phase], resident_bytes() - LIBRARIES
        if budget is None and held > 0:
            # Of earlier work in this process: no part of the run, but of the peak that is measured.
            parts = {**parts, "held before the run": held}
        memory = sum(parts.values())
    elif budget and not spread:
        # What torch holds is not known; activations do not add to it.
        where = "disk"
        tokens = calibration.size * (1 + plans[0].recipe.variant_count) + heldout.size
        scratch = (len(plans) + 3) * FLOAT32 * tokens * model.config.hidden_size
    output = [sum(output_bytes(plan.target, plan.recipe).values()) for plan in plans]
    _check_disks([plan.folder for plan in plans], [_disk_bytes(plan) for plan in plans], scratch)
    stacked = model.stacked_weights if isinstance(model, TorchModel) else 0
    return Footprint(where, memory, dict(parts), phase, budget, sum(output), scratch, stacked)


def _choose(
    model: StreamedModel, recipes: Sequence[tuple[PassRecipe, LayerMethod]], budget: int | None
) -> tuple[Activations, Cost]:
    limit, left = working_memory_bytes() if budget is None else budget, device_memory_left()
    for where in PLACES:
        costs = [prune_cost(model, *recipe, activations=where, plans=len(recipes), room=left) for recipe in recipes]
        largest = max(costs, key=lambda cost: cost.peak_memory_bytes)
        if largest.peak_memory_bytes <= limit:
            return where, largest
    if budget is not None:
        raise BudgetError(_too_little(largest, f"a budget of {format_bytes(budget)}", "give at least that"))
    if left is not None and largest.peak_memory_bytes > left:
        what, instead = f"the memory left on the device, {format_bytes(left)},", "give memory=... to try nevertheless"
        raise BudgetError(_too_little(largest, what, instead))
    # The estimate may be wrong, and activations on disk are at least not swapped.
    return where, largest


def _disk_bytes(plan: Plan) -> int:
    """What the output takes at most: blocks that distillation trains lie beside those that they replace."""
    sizes = output_bytes(plan.target, plan.recipe)
    twice = () if plan.recipe.distillation is None else sizes.keys() - set(plan.target.outer_keys())
    return sum(sizes.values()) + sum(sizes[key] for key in twice)


def _too_little(cost: Cost, what: str, instead: str) -> str:
    parts = sorted(cost.phases[cost.peak_phase].items(), key=lambda part: -part[1])
    advice = ADVICE.get(cost.peak_phase)
    return (
        f"{what} is too little: with activations on disk the run is estimated to take "
        f"{format_bytes(cost.peak_memory_bytes)} in phase {cost.peak_phase} "
        f"({', '.join(f'{name} {format_bytes(nbytes)}' for name, nbytes in parts if nbytes)}); {instead}"
        + (f", or less to do: {advice}" if advice else "")
    )


def _check_disks(folders: Sequence[Path], output: Sequence[int], scratch: int) -> None:
    """Raise a BudgetError without room for what is written, less what an earlier run has written already."""
    needed: dict[int, int] = {}
    places: dict[int, Path] = {}
    for folder, nbytes in zip(folders, output, strict=True):
        place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        device = place.stat().st_dev
        written = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
        needed[device] = needed.get(device, 0) + max(0, nbytes - written)
        places.setdefault(device, place)
    first = next(iter(places))
    needed[first] += scratch
    for device, nbytes in needed.items():
        free = shutil.disk_usage(places[device]).free
        if nbytes > free:
            activations = f", {format_bytes(scratch)} of it activations" if scratch and device == first else ""
            raise BudgetError(
                f"the disk of {places[device]} has {format_bytes(free)} free, the run needs {format_bytes(nbytes)}"
                f"{activations}; make room or choose another output folder"
            )
