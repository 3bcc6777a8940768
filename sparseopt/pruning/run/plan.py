"""The plan of a run, checked against the model before any work."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from sparseopt.layers.patterns import GroupTopK, Pattern, implied_sparsity, parse_pattern
from sparseopt.layers.problem import LayerMethod, check_method, reads_variances
from sparseopt.models import (
    Block,
    Form,
    Kept,
    ModelError,
    PrunableModel,
    Sizes,
    StreamedModel,
    open_model,
    sizes_of,
    sliced_block,
    smaller_model,
)
from sparseopt.models.files.gguf.architectures import architecture_of
from sparseopt.pruning.base.records import VocabularyRecord
from sparseopt.pruning.evaluate.audit import audit_stored
from sparseopt.pruning.recipe.pass_recipe import PassRecipe
from sparseopt.pruning.recipe.prune_recipe import Recipe
from sparseopt.pruning.recipe.shrink_recipe import (
    BUDGET_ROUNDING,
    ShrinkRecipe,
    parameters_of,
    shrunk_sizes,
    smallest_sizes,
)
from sparseopt.pruning.recipe.targets import chosen_linears
from sparseopt.pruning.run.output_form import (
    chosen_form,
    is_file,
    run_folder_of,
    with_dtype,
    without_distillation,
    without_survey,
)

# The layers that have fewer inputs in a smaller model: key-value groups, and channels.
GROUPED = HEADS, CHANNELS = "o_proj", "down_proj"

# By their path in a block.
Tensors = Mapping[str, np.ndarray]
Dtypes = Mapping[str, np.dtype]
# Measures what each expert of a block contributes, `[E]`, see `BlockRunner.contributions`.
Contributions = Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run that makes zeros does: a checked recipe with its method, written into an output.

    Attributes:
        output: the folder of the new model, or its GGUF file.
        target: the model that is written: the model itself, or the outline of a smaller one.
        patterns: which weights may survive, by the key of the weight of every pruned layer.
        output_weights: of squared errors at a layer's outputs, `[out]`, by the same keys; empty for equal weights.
        masks: a model of the same shape whose zeros become zeros; None for none.
        form: how the target is stored, including the grids of its layers.
        smaller: whether whole groups of weights are removed.
        vocabulary: the tokens that stay, of which the model was made already; None for all.
    """

    smaller: ClassVar[bool] = False

    recipe: PassRecipe
    method: LayerMethod
    output: Path
    target: StreamedModel
    patterns: Mapping[str, Pattern]
    output_weights: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    masks: StreamedModel | None = None
    form: Form = dataclasses.field(default_factory=Form)
    vocabulary: VocabularyRecord | None = None

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return run_folder_of(self.output)

    def support(self, key: str, weight: np.ndarray) -> np.ndarray | None:
        """The weights of a layer that may be non-zero, `[out, in]` bool like the dense weight; None for all."""
        supports = [weight != 0] if self.recipe.get("keep_zeros") else []
        if self.masks is not None:
            supports.append(self.masks.stored(key) != 0)
        return np.logical_and.reduce(supports) if supports else None

    def place(self, index: int) -> int | None:
        """The index in the target of a block of the model; None for a removed block."""
        return self.stays.index(index) if index in self.stays else None

    @property
    def stays(self) -> Sequence[int]:
        """The blocks of the model that the target keeps."""
        return range(self.target.num_blocks)

    @property
    def layer_count(self) -> int:
        """The number of solves: pruned layers, and layers rounded to a grid."""
        rounded = {*self.form.bits}
        if self.recipe.bits is None and not (self.smaller or self.recipe.get("permute")):
            rounded &= self.patterns.keys()
        return len(self.patterns) + len(rounded)

    def layers(self, model: StreamedModel, index: int) -> list[str]:
        """The names of a block's pruned layers, as in their records."""
        keys = [model.weight_key(index, name) for name in model.block_linears(index)]
        return [key.removesuffix(".weight") for key in keys if key in self.patterns]

    def finish(
        self, block: Block, place: int, tensors: Tensors, pruned: Tensors, dtypes: Dtypes, contributions: Contributions
    ) -> tuple[Block, dict[str, np.ndarray]]:
        """A block of the target and all its tensors, by path.

        Args:
            block: a copy of the dense block.
            place: its index in the target.
            tensors: all tensors of the block, including pruned ones.
            pruned: tensors of the pruned layers.
            dtypes: stored dtypes of the target's tensors.
            contributions: measures what each expert contributes.
        """
        del place, contributions
        moved = self.recipe.get("permute")
        found = {path: tensors[path].astype(dtype) for path, dtype in dtypes.items()} if moved else dict(tensors)
        block.write(found if moved else pruned)
        return block, found

    def restore(self, block: Block, place: int, keys: Mapping[str, str], tensors: Tensors) -> Block:
        """A block of the target that an earlier run stored, from a copy of the dense one, whose `keys` are by path."""
        del place
        # As in `finish`, what was not pruned, moved or trained runs as in the source, not as stored.
        changed_keys = {*self.patterns, *self.form.bits}
        pruned = {path: value for path, value in tensors.items() if keys[path] in changed_keys}
        changed = self.recipe.get("permute") or (pruned and self.recipe.reconstruction is not None)
        block.write(tensors if changed else pruned)
        return block

    def broken(self) -> list[str]:
        """The layers in the finished model that break their pattern."""
        return [audit.layer for audit in audit_stored(self.output, self.patterns) if not audit.fits]


@dataclasses.dataclass(frozen=True)
class SmallerPlan(Plan):
    """What a run that makes a smaller dense model does.

    Attributes:
        sizes: sizes of the smaller model.
    """

    smaller: ClassVar[bool] = True

    recipe: ShrinkRecipe
    sizes: Sizes = dataclasses.field(kw_only=True)

    @property
    def stays(self) -> Sequence[int]:
        return self.sizes.blocks

    def finish(
        self, block: Block, place: int, tensors: Tensors, pruned: Tensors, dtypes: Dtypes, contributions: Contributions
    ) -> tuple[Block, dict[str, np.ndarray]]:
        """The block and its tensors with the kept groups, and with the experts that contribute most."""
        target, sizes = self.target, self.sizes

        def width(name: str) -> int:
            return target.weight_shape(target.weight_key(place, name))[1]

        experts = None
        if block.num_experts:
            count, experts = sizes.experts or block.num_experts, np.arange(block.num_experts)
            if count < len(experts):
                experts = _largest(contributions(), count)
            kept = width("mlp.experts.0.down_proj")
            channels = np.stack([_kept(tensors[f"mlp.experts.{e}.down_proj.weight"], kept) for e in experts])
        else:
            channels = _kept(tensors["mlp.down_proj.weight"], width("mlp.down_proj"))
        size = width("self_attn.o_proj") // sizes.kv_heads
        groups = _kept(tensors["self_attn.o_proj.weight"], sizes.kv_heads, size)
        sliced = sliced_block(block.config, block.self_attn.kind, tensors, Kept(channels, groups, experts))
        # The block runs with the rounding of what is stored.
        sliced = {path: value.astype(dtypes[path], copy=False) for path, value in sliced.items()}
        return target.block_of(place, sliced), sliced

    def restore(self, block: Block, place: int, keys: Mapping[str, str], tensors: Tensors) -> Block:
        return self.target.block_of(place, tensors)

    def broken(self) -> list[str]:
        # It has no pattern; opening it checks its tensors against its configuration.
        open_model(self.output)
        return []


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """The positions of the `count` largest values, ascending; the first among equal ones."""
    return np.sort(np.argsort(-values, kind="stable")[:count])


def _kept(weight: np.ndarray, count: int, size: int = 1) -> np.ndarray:
    """The `count` groups of `size` inputs that a pruned weight `[out, in]` has kept."""
    energy = np.sum(weight.astype(np.float64) ** 2, axis=0)
    return _largest(energy.reshape(-1, size).sum(axis=1), count)


def layer_shares(model: PrunableModel, recipe: Recipe) -> dict[str, float]:
    """The fraction of zeros of every pruned layer, in the model's order, by the key of its weight.

    Raises:
        ValueError: if names or expressions in the recipe match no layer, or leave none.
    """
    keys = model.linear_keys()
    owners = {key.rpartition(".")[0] for key in model.exported_keys()}
    names = [key.removesuffix(".weight") for key in keys]
    chosen = chosen_linears(names, sorted(owners.difference(names)), recipe.targets, recipe.ignore)
    implied = implied_sparsity(recipe.pattern)
    share = recipe.sparsity if implied is None else implied
    return {f"{name}.weight": share if own is None else own for name, own in chosen.items()}


def layer_patterns(
    model: PrunableModel, recipe: Recipe, method: LayerMethod, shares: Mapping[str, float]
) -> dict[str, Pattern]:
    """The pattern of each layer that has a fraction of zeros, by the key of its weight.

    Raises:
        ValueError: naming the layer, if the pattern is impossible there or the method does not support it.
    """
    patterns: dict[str, Pattern] = {}
    checked: set[tuple[int, ...]] = set()
    for key, share in shares.items():
        shape = model.weight_shape(key)
        try:
            patterns[key] = parse_pattern(recipe.pattern, share, shape)
            if shape not in checked:
                check_method(method, patterns[key], shape, reads_variances(method), recipe.has_support)
        except ValueError as error:
            raise ValueError(f"{key.removesuffix('.weight')}: {error}") from error
        checked.add(shape)
    return patterns


def make_plan(model: StreamedModel, recipe: PassRecipe, output: Path) -> Plan:
    """Make the plan of a recipe for a model, with its sparsity in every targeted layer, or its fractions of groups.

    Raises:
        ValueError: naming what the recipe wants and the model cannot do, names of layers that it does not have, or the
            layer in which the pattern is impossible.
    """
    check_expert_tokens(model, recipe)
    if not is_file(output):
        recipe = with_dtype(model.source, recipe)
    if isinstance(recipe, ShrinkRecipe):
        plan = SmallerPlan(recipe, recipe.layer_method, output, model, {}, sizes=sizes_of(model))
        plan = shrink_plan(model, plan, shrunk_sizes(model, recipe))
        plan = dataclasses.replace(plan, recipe=without_distillation(recipe, plan.form))
        if is_file(output) and (recipe.has_budget or recipe.layers < 1):
            _check_removal(model)
        if recipe.has_budget:
            _check_budget(model, plan, recipe)
        return plan
    assert isinstance(recipe, Recipe)
    method, shares = recipe.layer_method, layer_shares(model, recipe)
    form = chosen_form(model, model, range(model.num_blocks), recipe, output, shares)
    recipe = without_distillation(recipe, form)
    if recipe.bits is not None and not recipe.has_support:
        # A layer without zeros needs no solve; it is rounded to its grid directly.
        shares = {key: share for key, share in shares.items() if share}
        recipe = recipe if shares else without_survey(recipe)
    patterns = layer_patterns(model, recipe, method, shares)
    return Plan(recipe, method, output, model, patterns, masks=_model_of_masks(model, recipe, patterns), form=form)


def _model_of_masks(model: StreamedModel, recipe: Recipe, keys: Collection[str]) -> StreamedModel | None:
    """The opened model that `recipe.masks` names, or None; also checks that there are zeros to keep.

    Raises:
        ModelError: if weights are missing or have another shape, or the model has no zeros.
    """
    masks = None if recipe.masks is None else open_model(recipe.masks)
    if masks is not None:
        found = {key: masks.weight_shape(key) for key in keys if key in masks.source.tensors}
        shapes = {key: model.weight_shape(key) for key in keys}
        if wrong := [key for key in keys if found.get(key) != shapes[key]]:
            other = f"is {list(found[wrong[0]])} there" if wrong[0] in found else "is not there"
            raise ModelError(
                f"the masks in {recipe.masks} are not those of this model: {len(wrong)} of {len(shapes)} layers "
                f"differ; {wrong[0]} {other}, expected {list(shapes[wrong[0]])}; give the same model, pruned"
            )
    for option, given in (("keep_zeros", model if recipe.keep_zeros else None), ("masks", masks)):
        # For a pruned model this reads one layer.
        if given is not None and all(np.all(given.stored(key) != 0) for key in keys):
            raise ModelError(f"{given.source.name} has no zero in any layer: leave {option} out, or prune it first")
    return masks


def shrink_plan(model: StreamedModel, plan: SmallerPlan, sizes: Sizes) -> SmallerPlan:
    """The plan with other sizes of the smaller model.

    Raises:
        ValueError: if the model cannot have these sizes, or the method cannot choose groups.
    """
    dense, small = sizes_of(model), smaller_model(model, sizes)
    patterns: dict[str, Pattern] = {}
    for index in sizes.blocks:
        for name in model.block_linears(index):
            key = model.weight_key(index, name)
            shape = model.weight_shape(key)
            if name.endswith(HEADS) and sizes.kv_heads < dense.kv_heads:
                patterns[key] = GroupTopK(sizes.kv_heads, shape[1] // dense.kv_heads)
            # In a mixture, channels are the experts' channels; blocks without experts keep theirs.
            elif (
                name.endswith(CHANNELS)
                and sizes.channels < dense.channels
                and (dense.experts is None or ".experts." in name)
            ):
                patterns[key] = GroupTopK(sizes.channels)
    for shape, pattern in {model.weight_shape(key): pattern for key, pattern in patterns.items()}.items():
        check_method(plan.method, pattern, shape, reads_variances(plan.method))
    form = chosen_form(model, small, sizes.blocks, plan.recipe, plan.output, None)
    return dataclasses.replace(plan, target=small, patterns=patterns, sizes=sizes, form=form)


def _check_removal(model: StreamedModel) -> None:
    """Raise a `ModelError`, before measuring, if some block cannot be removed in a GGUF file."""
    every = sizes_of(model)
    try:
        for block in every.blocks if len(every.blocks) > 1 else ():
            blocks = tuple(index for index in every.blocks if index != block)
            # Only the configuration: the plan's tokenizer was checked already.
            config = smaller_model(model, dataclasses.replace(every, blocks=blocks)).source.config
            architecture_of(config)[1].write_config(config)
    except ModelError as error:
        raise ModelError(
            f"measured losses choose the blocks that go, and a GGUF file cannot be without any of them ({error}): "
            "write a folder"
        ) from error


def _check_budget(model: StreamedModel, plan: SmallerPlan, recipe: ShrinkRecipe) -> None:
    """Raise a `ModelError` for a budget that no smaller model can meet, before measuring."""
    # Also shows whether the method supports the patterns.
    try:
        smallest = shrink_plan(model, plan, smallest_sizes(model, recipe)).target
    except ModelError as error:
        if not is_file(plan.output):
            raise
        raise ModelError(
            f"parameters may choose what a GGUF file cannot have ({error}): give channels or layers instead"
        ) from error
    least = parameters_of(smallest) / parameters_of(model.whole)
    if recipe.parameters is not None and recipe.parameters + BUDGET_ROUNDING < least:
        raise ModelError(
            f"parameters {recipe.parameters:g} is too little: what lies outside the blocks stays, and with one block "
            f"of the least width the model has {least:.3g} of its parameters; give more than that"
        )


def check_expert_tokens(model: StreamedModel, recipe: PassRecipe) -> None:
    """Raise a `ModelError` if experts should see all tokens and there are none."""
    if recipe.expert_tokens == "all" and not model.config.experts:
        raise ModelError(
            "expert_tokens 'all' is for mixtures of experts, and this "
            f"{model.source.config.get('model_type')} model is none; leave it out"
        )
