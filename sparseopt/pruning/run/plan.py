"""What the runs of one pass do and which tokens they see, checked against the model before any work."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from sparseopt.layers.patterns import GroupTopK, Pattern, implied_sparsity, parse_pattern
from sparseopt.layers.problem import LayerMethod, check_method, reads_variances
from sparseopt.models import (
    ModelError,
    PrunableModel,
    Sizes,
    Source,
    StreamedModel,
    TorchModel,
    check_window,
    open_model,
    sizes_of,
    smaller_model,
)
from sparseopt.models.files.gguf.source import GGUFSource
from sparseopt.pruning.base.reports import Calibration
from sparseopt.pruning.recipe.pass_recipe import LEAST_WINDOWS, MOST_WINDOWS, TOKENS_AN_INPUT, PassRecipe
from sparseopt.pruning.recipe.prune_recipe import Recipe
from sparseopt.pruning.recipe.shrink_recipe import (
    BUDGET_ROUNDING,
    ShrinkRecipe,
    parameters_of,
    shrunk_sizes,
    smallest_sizes,
)
from sparseopt.pruning.recipe.targets import chosen_linears
from sparseopt.pruning.text.documents import TextError, is_text
from sparseopt.pruning.text.windows import begin_windows, check_vocabulary, text_windows, token_array, token_digest

# The linears that have fewer inputs in a smaller model: key-value groups, and channels.
GROUPED = HEADS, CHANNELS = "o_proj", "down_proj"
# Recipes that share a pass must agree in these.
PASS_FIELDS = (
    "windows", "seqlen", "heldout_windows", "window_choice", "seed", "bos", "calibration", "split", "column",
    "documents", "precision", "score",
)  # fmt: skip

T = TypeVar("T", bound=PassRecipe)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one run does: a checked recipe and its method, into an output folder.

    Attributes:
        target: the model that is written: the model itself, or the outline of a smaller one.
        patterns: which weights may survive, by the key of the weight of every linear that is pruned.
        output_weights: of the squared errors at a linear's outputs, `[out]`, by the same keys; empty for equal ones.
        sizes: of a smaller model; None where only zeros are made.
        masks: a model of the same shape whose zeros become zeros; None for none.
    """

    recipe: PassRecipe
    method: LayerMethod
    folder: Path
    target: PrunableModel
    patterns: Mapping[str, Pattern]
    output_weights: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    sizes: Sizes | None = None
    masks: PrunableModel | None = None

    def support(self, key: str, weight: np.ndarray) -> np.ndarray | None:
        """The weights of a linear that may be non-zero, `[out, in]` bool as the dense weight; None for all."""
        supports = [weight != 0] if self.recipe.get("keep_zeros") else []
        if self.masks is not None:
            supports.append(self.masks.stored(key) != 0)
        return np.logical_and.reduce(supports) if supports else None

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
    """The plan of a recipe for a model, with the recipe's sparsity in every linear it targets, or its shares of groups.

    Raises:
        ValueError: naming what the recipe asks for and the model cannot do, names of linears that it does not have, or
            the layer where the pattern is impossible.
    """
    check_expert_tokens(model, recipe)
    recipe = with_dtype(model.source, recipe)
    if isinstance(recipe, ShrinkRecipe):
        method = recipe.layer_method
        plan = shrink_plan(model, Plan(recipe, method, folder, model, {}), shrunk_sizes(model, recipe))
        if recipe.has_budget:
            _check_budget(model, plan, recipe)
        return plan
    assert isinstance(recipe, Recipe)
    recipe = fitting_recipe(model, recipe)
    method = recipe.layer_method
    patterns = layer_patterns(model, recipe, method, layer_shares(model, recipe))
    return Plan(recipe, method, folder, model, patterns, masks=_model_of_masks(model, recipe, patterns))


def _model_of_masks(model: PrunableModel, recipe: Recipe, keys: Collection[str]) -> PrunableModel | None:
    """The opened model that `recipe.masks` names, None without; also checks that there are zeros to keep.

    Raises:
        ModelError: for weights that it lacks or that have another shape, and for a model without any zero.
    """
    masks = None if recipe.masks is None else open_model(recipe.masks)
    if masks is not None:
        found = {key: masks.weight_shape(key) for key in keys if key in masks.source.tensors}
        shapes = {key: model.weight_shape(key) for key in keys}
        if wrong := [key for key in keys if found.get(key) != shapes[key]]:
            other = f"is {list(found[wrong[0]])} there" if wrong[0] in found else "is not there"
            raise ModelError(
                f"the masks in {recipe.masks} are not those of this model: {len(wrong)} of {len(shapes)} linears "
                f"differ; {wrong[0]} {other}, expected {list(shapes[wrong[0]])}; give the same model, pruned"
            )
    for option, given in (("keep_zeros", model if recipe.keep_zeros else None), ("masks", masks)):
        # Of a pruned model this reads one linear.
        if given is not None and all(np.all(given.stored(key) != 0) for key in keys):
            raise ModelError(f"{given.source.name} has no zero in any linear: leave {option} out, or prune it first")
    return masks


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
            # In a mixture the channels are those of the experts; blocks without any keep theirs.
            elif (
                name.endswith(CHANNELS)
                and sizes.channels < dense.channels
                and (dense.experts is None or ".experts." in name)
            ):
                patterns[key] = GroupTopK(sizes.channels)
    for shape, pattern in {model.weight_shape(key): pattern for key, pattern in patterns.items()}.items():
        check_method(plan.method, pattern, shape, reads_variances(plan.method))
    return dataclasses.replace(plan, target=small, patterns=patterns, sizes=sizes)


def _check_budget(model: PrunableModel, plan: Plan, recipe: ShrinkRecipe) -> None:
    """Raise a `ModelError` for a budget that no smaller model can meet, before measuring."""
    # Also shows whether the method takes the patterns.
    smallest = shrink_plan(model, plan, smallest_sizes(model, recipe)).target
    least = parameters_of(smallest) / parameters_of(model)
    if recipe.parameters is not None and recipe.parameters + BUDGET_ROUNDING < least:
        raise ModelError(
            f"parameters {recipe.parameters:g} is too little: what lies outside the blocks stays, and with one block "
            f"of the least width the model has {least:.3g} of its parameters; give more than that"
        )


def check_expert_tokens(model: PrunableModel, recipe: PassRecipe) -> None:
    """Raise a `ModelError` where experts are to see all tokens and there are none, or none that run in JAX."""
    if recipe.expert_tokens == "all" and not (isinstance(model, StreamedModel) and model.config.experts):
        raise ModelError(
            "expert_tokens 'all' is for mixtures of experts of the families that run in JAX, and this "
            f"{model.source.config.get('model_type')} model is none; leave it out"
        )


def with_dtype(source: Source, recipe: T) -> T:
    """The recipe with a dtype for a source that is stored quantised, which float32 would make far larger."""
    quantised = isinstance(source, GGUFSource) and any(tensor.quantised for tensor in source.tensors.values())
    return recipe.model_copy(update={"dtype": "bfloat16"}) if quantised and recipe.dtype is None else recipe


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
    if recipe.train_epochs:
        problems.append("train_epochs trains the blocks by their gradients; leave it open or say 0")
    if recipe.distil_epochs:
        problems.append("distil_epochs trains the model by its gradients; leave it out or say 0")
    if recipe.permute:
        problems.append("permute moves channels of linears that are known to follow each other; leave it out")
    if recipe.precision != "highest":
        problems.append(f"precision={recipe.precision!r} is for JAX, and torch multiplies in float32; leave it out")
    if recipe.weighting == "residual":
        problems.append("weighting='residual' takes linears that are known to write into the stream; say 'uniform'")
    if problems:
        raise ValueError(
            f"the recipe cannot be used on a {model.config.model_type} model, whose family is not known here and whose "
            "blocks run in torch:\n  " + "\n  ".join(problems)
        )
    left: dict[str, Any] = {"output_weights": "uniform", "train_epochs": 0, "distil_epochs": 0, "permute": False}
    return recipe.model_copy(update={"allocation": recipe.allocation or "uniform", **left})


def layer_shares(model: PrunableModel, recipe: Recipe) -> dict[str, float]:
    """The share of zeros of every linear that is pruned, in the model's order, by the key of its weight.

    Raises:
        ValueError: for names and expressions in the recipe that match no linear, or leave none.
    """
    keys = model.linear_keys()
    owners = {key.rpartition(".")[0] for key in model.exported_keys()}
    names = [key.removesuffix(".weight") for key in keys]
    chosen = chosen_linears(names, sorted(owners.difference(names)), recipe.targets, recipe.ignore)
    implied = implied_sparsity(recipe.pattern)
    share = recipe.asked_sparsity if implied is None else implied
    return {f"{name}.weight": share if own is None else own for name, own in chosen.items()}


def layer_patterns(
    model: PrunableModel, recipe: Recipe, method: LayerMethod, shares: Mapping[str, float]
) -> dict[str, Pattern]:
    """The pattern of each linear that has a share of zeros, by the key of its weight.

    Raises:
        ValueError: naming the layer, if the pattern is impossible there or the method cannot take it.
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


def check_same_calibration(recipes: Sequence[PassRecipe]) -> None:
    """Raise a `ValueError` that names the differences if recipes of one pass would not see the same stream."""
    first = recipes[0]
    for recipe in recipes[1:]:
        # A calibration may be an array of token ids.
        pairs = [(name, getattr(recipe, name), getattr(first, name)) for name in PASS_FIELDS]
        if differing := [name for name, own, other in pairs if own is not other and not np.array_equal(own, other)]:
            raise ValueError(
                "recipes of one pass must share their calibration tokens, precision and score; these differ in "
                f"{', '.join(differing)}: prune them one by one"
            )


def with_windows(plans: Sequence[Plan], samples: int) -> list[Plan]:
    """The plans of a pass with the number of windows, which their recipes may leave open.

    Raises:
        ValueError: for plans that would see other variants of them.
    """
    found = [dataclasses.replace(plan, recipe=plan.recipe.model_copy(update={"windows": samples})) for plan in plans]
    counts = [plan.recipe.variant_count for plan in found]
    if len(set(counts)) > 1:
        raise ValueError(
            "recipes of one pass must see the same variants of their windows, and by their methods these have "
            f"{', '.join(map(str, counts))}: give all the same variants, or prune one by one"
        )
    return found


class CalibrationWindows(NamedTuple):
    """The token ids that a pass reads, `[windows, seqlen]` int32.

    Attributes:
        calibration: what it prunes by.
        heldout: for the held-out error, and where a training ends.
        scored: further windows that the model drew, for its perplexity; none of a text.
        bos: begins each window; None without.
    """

    calibration: np.ndarray
    heldout: np.ndarray
    scored: np.ndarray
    bos: int | None


def default_windows(model: PrunableModel, seqlen: int) -> int:
    """How many calibration windows of `seqlen` tokens a recipe that does not say gets for a model.

    The number depends on the model alone, so that a run resumes with the same one on any machine; activations that do
    not fit in memory go to disk.
    """
    return min(MOST_WINDOWS, max(LEAST_WINDOWS, -(-TOKENS_AN_INPUT * _widest(model) // seqlen)))


def _widest(model: PrunableModel, keys: Collection[str] = ()) -> int:
    """The most inputs of a linear in the model's blocks, or of those that have the keys given, if any."""
    return max(model.weight_shape(key)[1] for key in keys or model.linear_keys())


def calibration_windows(model: PrunableModel, recipe: PassRecipe) -> CalibrationWindows:
    """Calibration and held-out windows of a text or of token ids; held-out ones follow the calibration's text.

    Of a recipe that does not say how many, there are `default_windows`, or fewer, but at least 16, where the text is
    too short for them.

    Raises:
        TextError: for a text that is too short, or token ids that do not fit.
        ModelError: for windows that are longer than the model is made for, or a BOS that the tokenizer does not have.
    """
    bos, heldout = None, recipe.heldout_windows
    if is_text(recipe.calibration):
        check_window(recipe.seqlen, model.config.max_positions)
        count = recipe.windows or default_windows(model, recipe.seqlen)
        found = text_windows(
            model.source, recipe.calibration, "calibration", count + heldout, recipe.seqlen,
            bos=recipe.bos, choice=recipe.chosen_window_choice, seed=recipe.seed or 0, split=recipe.split,
            column=recipe.column, documents=recipe.documents, least=recipe.window_count + heldout,
        )  # fmt: skip
        windows, bos = begin_windows(*found), found.bos
        if bos is not None and recipe.seqlen < 3:
            raise TextError(f"windows of {recipe.seqlen} tokens predict nothing after BOS; give a longer seqlen")
    else:
        windows = token_array(recipe.calibration)
        if windows.ndim != 2 or not np.issubdtype(windows.dtype, np.integer) or windows.shape[1] < 2:
            raise TextError(
                "calibration token ids must be integers of shape [windows, seqlen], given "
                f"{windows.dtype} of shape {list(windows.shape)}"
            )
        if len(windows) <= heldout:
            raise TextError(
                f"{len(windows)} windows of token ids leave none for calibration after "
                f"{heldout} held-out windows; give more or set heldout_windows=0"
            )
        check_window(windows.shape[1], model.config.max_positions)
    check_vocabulary(windows, model.config.vocab_size)
    split = len(windows) - heldout
    windows = windows.astype(np.int32)
    return CalibrationWindows(windows[:split], windows[split:], windows[:0], bos)


def describe_calibration(model: PrunableModel, plans: Sequence[Plan], windows: CalibrationWindows) -> Calibration:
    """What the reports of a pass say about the tokens that it sees."""
    (samples, seqlen), recipe = windows.calibration.shape, plans[0].recipe
    why = warning = None
    if recipe.windows is None and is_text(recipe.calibration):
        why = (
            f"{TOKENS_AN_INPUT} tokens for each of the {_widest(model):,} inputs of the widest linear, in "
            f"{LEAST_WINDOWS} to {MOST_WINDOWS} windows"
        )
        if samples < default_windows(model, seqlen):
            why += "; the text has no more"
    inputs = _widest(model, [key for plan in plans for key in plan.patterns])
    variants = recipe.model_copy(update={"windows": samples}).variant_count
    if (tokens := samples * (1 + variants) * seqlen) < inputs and any(plan.patterns for plan in plans):
        warning = (
            f"calibration has {tokens:,} tokens and the widest linear {inputs:,} inputs: its Gram matrix is "
            f"singular; {-(-inputs // seqlen)} windows of {seqlen} or more would do"
        )
    digest = token_digest(*windows[:2])
    return Calibration(samples, variants, len(windows.heldout), seqlen, digest, inputs, why, warning)
