"""Floor 6: what the runs of one pass do and which tokens they see, checked against the model before any work."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparseopt.models import ModelError, PrunableModel, Sizes, TorchModel, check_window, sizes_of, smaller_model
from sparseopt.pruning.layer import LayerMethod, check_method, reads_variances
from sparseopt.pruning.patterns import GroupTopK, Pattern, parse_pattern
from sparseopt.pruning.recipe import PassRecipe, Recipe
from sparseopt.pruning.shrinking import BUDGET_ROUNDING, ShrinkRecipe, parameters_of, shrunk_sizes, smallest_sizes
from sparseopt.pruning.texts import TextError, begin_windows, check_vocabulary, text_windows

# The linears that have fewer inputs in a smaller model: key-value groups, and channels.
GROUPED = HEADS, CHANNELS = "o_proj", "down_proj"
# Recipes that share a pass must agree in these.
CALIBRATION_FIELDS = ("samples", "seqlen", "heldout_samples", "windows", "seed", "bos", "calibration")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one run does: a checked recipe and its method, into an output folder.

    Attributes:
        target: the model that is written: the model itself, or the outline of a smaller one.
        patterns: which weights may survive, by the key of the weight of every linear that is pruned.
        output_weights: of the squared errors at a linear's outputs, `[out]`, by the same keys; empty for equal ones.
        sizes: of a smaller model; None where only zeros are made.
    """

    recipe: PassRecipe
    method: LayerMethod
    folder: Path
    target: PrunableModel
    patterns: Mapping[str, Pattern]
    output_weights: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    sizes: Sizes | None = None

    def place(self, index: int) -> int | None:
        """The index in the target of a block of the model; None for a block that goes."""
        if self.sizes is None:
            return index
        return self.sizes.blocks.index(index) if index in self.sizes.blocks else None

    def layers(self, model: PrunableModel, index: int) -> list[str]:
        """The names of the linears of a block that are pruned, as in their records."""
        keys = [model.weight_key(index, name) for name in model.block_linears(index)]
        return [key.removesuffix(".weight") for key in keys if key in self.patterns]


def make_plan(model: PrunableModel, recipe: PassRecipe, folder: Path) -> Plan:
    """The plan of a recipe for a model, with the recipe's sparsity in every linear, or its shares of groups.

    Raises:
        ValueError: naming what the recipe asks for and the model cannot do, or the layer where the pattern is
            impossible.
    """
    if isinstance(recipe, ShrinkRecipe):
        method = recipe.check()
        plan = shrink_plan(model, Plan(recipe, method, folder, model, {}), shrunk_sizes(model, recipe))
        if recipe.has_budget:
            _check_budget(model, plan, recipe)
        return plan
    assert isinstance(recipe, Recipe)
    recipe = fitting_recipe(model, recipe)
    method = recipe.check()
    return Plan(recipe, method, folder, model, layer_patterns(model, recipe, method))


def shrink_plan(model: PrunableModel, plan: Plan, sizes: Sizes) -> Plan:
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
            elif name.endswith(CHANNELS) and sizes.channels < dense.channels == shape[1]:
                patterns[key] = GroupTopK(sizes.channels)
    for shape, pattern in {model.weight_shape(key): pattern for key, pattern in patterns.items()}.items():
        check_method(plan.method, pattern, shape, reads_variances(plan.method))
    return dataclasses.replace(plan, target=small, patterns=patterns, sizes=sizes)


def _check_budget(model: PrunableModel, plan: Plan, recipe: ShrinkRecipe) -> None:
    """Raise a `ModelError` for a budget that no smaller model can meet, as far as that shows without measuring."""
    if recipe.latency is not None and sizes_of(model).experts is not None:
        raise ModelError(
            "latency is not for mixtures of experts, where the time of a token depends on its experts: give parameters"
        )
    # Also shows whether the method takes the patterns.
    smallest = shrink_plan(model, plan, smallest_sizes(model, recipe)).target
    least = parameters_of(smallest) / parameters_of(model)
    if recipe.parameters is not None and recipe.parameters + BUDGET_ROUNDING < least:
        raise ModelError(
            f"parameters {recipe.parameters:g} is too little: what lies outside the blocks stays, and with one block "
            f"of the least width the model has {least:.3g} of its parameters; give more than that"
        )


def fitting_recipe(model: PrunableModel, recipe: Recipe) -> Recipe:
    """The recipe for a model's blocks: those that run in torch are not trained, and their output errors count alike.

    Raises:
        ValueError: naming all that the recipe asks for and torch blocks cannot do.
    """
    if not isinstance(model, TorchModel):
        return recipe
    problems = []
    if recipe.output_weights == "gradient":
        problems.append("output_weights='gradient' takes the gradient of the loss; leave it open or say 'uniform'")
    if recipe.allocation == "curves":
        problems.append("allocation='curves' takes the gradient of the loss; say 'uniform' or 'owl'")
    if recipe.reconstruct:
        problems.append("reconstruct trains the blocks by their gradients; leave it open or say 0")
    if recipe.distillation is not None:
        problems.append("distil trains the model by its gradients; leave it out or say 0")
    if recipe.weighting == "residual":
        problems.append("weighting='residual' takes linears that are known to write into the stream; say 'uniform'")
    if problems:
        raise ValueError(
            f"the recipe cannot be used on a {model.config.model_type} model, whose family is not known here and whose "
            "blocks run in torch:\n  " + "\n  ".join(problems)
        )
    return dataclasses.replace(recipe, output_weights="uniform", reconstruct=0)


def layer_patterns(
    model: PrunableModel, recipe: Recipe, method: LayerMethod, shares: Mapping[str, float] | None = None
) -> dict[str, Pattern]:
    """The pattern of every linear, by the key of its weight; `shares` of zeros, by the same keys, replace the recipe's.

    Raises:
        ValueError: naming the layer, if the pattern is impossible there or the method cannot take it.
    """
    patterns: dict[str, Pattern] = {}
    checked: set[tuple[int, ...]] = set()
    for index in range(model.num_blocks):
        for name in model.block_linears(index):
            key = model.weight_key(index, name)
            shape = model.weight_shape(key)
            try:
                patterns[key] = parse_pattern(recipe.pattern, shares[key] if shares else recipe.sparsity, shape)
                if shape not in checked:
                    check_method(method, patterns[key], shape, reads_variances(method))
            except ValueError as error:
                raise ValueError(f"{key.removesuffix('.weight')}: {error}") from error
            checked.add(shape)
    return patterns


def check_same_calibration(recipes: Sequence[PassRecipe]) -> None:
    """Raise a `ValueError` that names the differences if recipes of one pass would not see the same tokens."""
    first = recipes[0]
    for recipe in recipes[1:]:
        # A calibration may be an array of token ids.
        pairs = [(name, getattr(recipe, name), getattr(first, name)) for name in CALIBRATION_FIELDS]
        if differing := [name for name, own, other in pairs if not np.array_equal(own, other)]:
            raise ValueError(
                f"recipes of one pass must share their calibration tokens; these differ in {', '.join(differing)}: "
                "prune them one by one"
            )


class CalibrationWindows(NamedTuple):
    """The token ids that a pass reads, `[windows, seqlen]` int32, and the BOS that begins each window, None without."""

    calibration: np.ndarray
    heldout: np.ndarray
    bos: int | None


def calibration_windows(model: PrunableModel, recipe: PassRecipe) -> CalibrationWindows:
    """Calibration and held-out windows; held-out ones follow the calibration's text.

    Raises:
        TextError: for a text that is too short, or token ids that do not fit.
        ModelError: for windows that are longer than the model is made for, or a BOS that the tokenizer does not have.
    """
    bos = None
    if isinstance(recipe.calibration, str):
        check_window(recipe.seqlen, model.config.max_positions)
        count = recipe.samples + recipe.heldout_samples
        found = text_windows(
            model.source, recipe.calibration, "calibration", count, recipe.seqlen,
            bos=recipe.bos, choice=recipe.window_choice, seed=recipe.seed or 0,
        )  # fmt: skip
        windows, bos = begin_windows(*found), found.bos
    else:
        windows = np.asarray(recipe.calibration)
        if windows.ndim != 2 or not np.issubdtype(windows.dtype, np.integer) or windows.shape[1] < 2:
            raise TextError(
                "calibration token ids must be integers of shape [samples, seqlen], given "
                f"{windows.dtype} of shape {list(windows.shape)}"
            )
        if len(windows) <= recipe.heldout_samples:
            raise TextError(
                f"{len(windows)} windows of token ids leave none for calibration after "
                f"{recipe.heldout_samples} held-out windows; give more or set heldout_samples=0"
            )
        check_window(windows.shape[1], model.config.max_positions)
    check_vocabulary(windows, model.config.vocab_size)
    split = len(windows) - recipe.heldout_samples
    return CalibrationWindows(windows[:split].astype(np.int32), windows[split:].astype(np.int32), bos)
