"""What a run would make and need, read from the plan that it would execute. Nothing is written, and no text is drawn.

Only headers are read, and the calibration text, unless the time is measured.
"""

import copy
import math
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.core.base.mesh import Devices
from sparseopt.layers.patterns import pattern_count
from sparseopt.models import ModelError, ModelSource, StreamedModel, sizes_of, smaller_model
from sparseopt.pruning.base.records import Calibration, Footprint, VocabularyRecord
from sparseopt.pruning.pipeline import checked, footprint_of, prune_model
from sparseopt.pruning.recipe.pass_recipe import PassRecipe
from sparseopt.pruning.recipe.prune_recipe import Recipe
from sparseopt.pruning.recipe.shrink_recipe import parameters_of
from sparseopt.pruning.recipe.targets import Targets, shares_in
from sparseopt.pruning.run.calibration import CalibrationWindows, choose_tokens
from sparseopt.pruning.run.drawn import check_memory
from sparseopt.pruning.run.measured import forget
from sparseopt.pruning.run.output_form import output_of
from sparseopt.pruning.run.plan import Plan, layer_shares

# The number of a block and the name inside it, in the key of a layer's weight; and the number of an expert.
_IN_BLOCK, _EXPERT = re.compile(r"(?:.*?\.)?(\d+)\.(.+)\.weight"), re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class LayerKind:
    """Linear layers that are alike.

    Attributes:
        name: name inside the block, as in the checkpoint; `*` stands for the number of an expert.
        shape: `(out, in)` in the model.
        becomes: `(out, in)` in the output.
        zeros: fraction of zeros that pruning makes; None if the layer is not pruned.
        bits: the grid that it is rounded to; None for floats.
        blocks: the blocks that hold such layers, counted from 0.
        count: number of such layers.
    """

    name: str
    shape: tuple[int, int]
    becomes: tuple[int, int]
    zeros: float | None
    bits: str | None
    blocks: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class DryRun:
    """What a run would make and need.

    Attributes:
        source: the model as it was given: a path or a name on the hub.
        revision: the commit on the hub, a sha; None for your own files.
        output: the folder or file that the run would write.
        recipe: the recipe as plain values, with what its effort and the model decide.
        layers: the linear layers of the blocks that stay, in the order of the first block.
        weights: number of weights in all linear layers of the model's blocks.
        zeros: zeros that pruning makes, not counting further ones of the model or of `masks`.
        parameters: number in the model; a tied head counts once.
        kept_parameters: number in the output; None if measured losses choose it.
        calibration: the tokens that the run would use; without a digest if the model draws them.
        footprint: the memory and disk that the run is expected to need.
        vocabulary: the tokens that the output keeps; None for all.
        seconds: time of the run, see `measured_seconds`; None if not measured.
    """

    source: str
    revision: str | None
    output: str
    recipe: dict[str, Any]
    layers: tuple[LayerKind, ...]
    weights: int
    zeros: int
    parameters: int
    kept_parameters: int | None
    calibration: Calibration
    footprint: Footprint
    vocabulary: VocabularyRecord | None = None
    seconds: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def dry_run(
    source: ModelSource,
    output: str | Path,
    recipe: PassRecipe | None = None,
    *,
    memory: int | str | None = None,
    devices: Devices = None,
    measure: bool = False,
) -> DryRun:
    """Plan a run of `prune_model` or `shrink_model` with these arguments, and report what it would make and need.

    The arguments are as for these functions. With `measure`, the time of a run that prunes is measured too, by pruning
    two blocks of the model, see `measured_seconds`.

    Raises:
        ValueError: as the run does before any work; with `measure`, also if its time cannot be measured.
    """
    recipe = recipe or Recipe()
    model, plan, budget, mesh, _ = checked(source, output, recipe, memory, devices)

    def draw(plan: Plan) -> CalibrationWindows:
        """As many tokens as the run would draw."""
        check_memory(model, plan.recipe, budget)
        count = plan.recipe.window_count
        ids = np.zeros((count + recipe.heldout_windows, recipe.seqlen), np.int32)
        return CalibrationWindows(ids[:count], ids[count:], ids[:0], None)

    plan, windows, calibration, _ = choose_tokens(model, plan, draw)
    if recipe.draws:
        calibration = replace(calibration, digest="")
    kept = _kept(plan)
    if plan.recipe.chooses_linears:
        # As many layers have the pattern as the sparsity needs.
        zeros = round(plan.recipe.get("sparsity") * sum(size for size, _ in kept.values()))
    else:
        zeros = sum(size - stay for size, stay in kept.values())
    return DryRun(
        source=model.source.name,
        revision=model.source.revision,
        output=str(plan.output),
        recipe=plan.recipe.as_dict(),
        layers=_layers(model, plan, kept),
        weights=sum(math.prod(model.weight_shape(key)) for key in model.linear_keys()),
        zeros=zeros,
        parameters=parameters_of(getattr(model, "whole", model)),
        kept_parameters=None if plan.recipe.get("parameters") else parameters_of(plan.target),
        calibration=calibration,
        footprint=footprint_of(model, plan, windows, budget, mesh),
        vocabulary=plan.vocabulary,
        seconds=measured_seconds(model, plan.recipe) if measure else None,
    )


def _kept(plan: Plan) -> dict[str, tuple[int, int]]:
    """Of each layer that gets zeros, the number of weights and how many may stay."""
    shapes = {key: plan.target.weight_shape(key) for key in plan.patterns if not plan.smaller}
    return {key: (math.prod(shape), pattern_count(plan.patterns[key], shape)) for key, shape in shapes.items()}


def _layers(model: Any, plan: Plan, kept: Mapping[str, tuple[int, int]]) -> tuple[LayerKind, ...]:
    blocks = dict[Any, list[int]]()
    for key in plan.target.linear_keys():
        found = _IN_BLOCK.fullmatch(key)
        assert found is not None
        zeros = 1 - kept[key][1] / kept[key][0] if key in kept else None
        bits = plan.form.bits[key].name if key in plan.form.bits else None
        shapes = model.weight_shape(key), plan.target.weight_shape(key)
        blocks.setdefault((_EXPERT.sub("*", found[2]), *shapes, zeros, bits), []).append(int(found[1]))
    return tuple(
        LayerKind(name, shape, becomes, zeros, bits, tuple(dict.fromkeys(each)), len(each))
        for (name, shape, becomes, zeros, bits), each in blocks.items()
    )


def measured_seconds(model: Any, recipe: PassRecipe) -> float:
    """Estimate the seconds of a run on this machine from runs on the first two blocks and on the first block.

        two blocks, with all compilation  +  (blocks - 2) (two blocks again - one block again)

    The runs are complete, with survey, training and scores, and write into a temporary folder. Random tokens replace
    text that the model would draw; the time of drawing, once for a model, is not counted. A recipe for some of the
    blocks is measured as if every block had such layers.

    Raises:
        ValueError, RuntimeError: as `prune_model` does, or for a model or a recipe that cannot be measured.
    """
    if not (isinstance(model, StreamedModel) and isinstance(recipe, Recipe)):
        raise ModelError("the time is measured for `prune`, of families that run in JAX: leave measure out")
    names = {name for index in range(model.num_blocks) for name in model.block_linears(index)}
    shares = layer_shares(model, recipe)
    by_name = {name: share for key, share in shares.items() for name in names if key.endswith(f".{name}.weight")}
    # A table leaves the others unchanged.
    table = shares_in(recipe.targets) is not None
    changed: dict[str, Any] = {"masks": None}  # they cover all blocks
    if len(shares) < len(model.linear_keys()) or table:
        named: Targets = (*by_name.items(), ("re:.*", 0.0)) if table else tuple(by_name)
        changed |= {"targets": named, "ignore": None}
    if recipe.draws:
        shape = recipe.window_count + recipe.heldout_windows, recipe.seqlen
        ids = np.random.default_rng(recipe.seed or 0).integers(0, model.config.vocab_size, shape)
        changed |= {"calibration": ids, "bos": "auto", "seed": None, "score": recipe.score or "pydoc"}
    # What the effort decided for the whole model is given.
    changed |= {"allocation": recipe.allocation, "permute": recipe.permute}
    recipe, seconds = recipe.model_copy(update=changed), []
    # Programs know the number of blocks, so each number compiles its own.
    for count in (2, 1, 2, 1):
        blocks = tuple(range(min(count, model.num_blocks)))
        few = smaller_model(model, replace(sizes_of(model), blocks=blocks)).source
        # Tensors, their names and the tokenizer are the same as in the whole model.
        source = copy.copy(model.source)
        vars(source).update(config=few.config, tensors={key: model.source.tensors[key] for key in few.tensors})
        with tempfile.TemporaryDirectory() as folder:
            forget()
            start = time.perf_counter()
            prune_model(source, output_of(recipe, Path(folder), "few"), recipe)
            seconds.append(time.perf_counter() - start)
    first, _, two, one = seconds
    return first + max(0, model.num_blocks - 2) * max(0.0, two - one)
