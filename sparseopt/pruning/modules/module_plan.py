"""What `prune_module` decides before any work: the layers, their parts, and the recipe for a module."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from sparseopt.layers.bits import parse_bits
from sparseopt.layers.patterns import Pattern, implied_sparsity, parse_pattern
from sparseopt.layers.problem import LayerMethod, check_method, reads_variances
from sparseopt.models.base.errors import listed
from sparseopt.pruning.base.grams import is_expert
from sparseopt.pruning.modules.layouts import Layout
from sparseopt.pruning.modules.watched import Discovery, Watched, refuse_hidden
from sparseopt.pruning.recipe.prune_recipe import Recipe
from sparseopt.pruning.recipe.targets import chosen_linears, shares_in

# Fields that say how a text is read or how a folder is written.
ELSEWHERE = (
    "calibration", "score", "split", "column", "documents", "bos", "windows", "seqlen", "heldout_windows",
    "window_choice", "seed", "dtype", "head_bits", "masks",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModulePlan:
    """What is done to a module.

    Attributes:
        recipe: the recipe, with its open fields filled in for a module.
        method: the pruning method.
        patterns: which weights of each layer may survive, in the order of execution; layers that share a weight have
            one pattern, under the name of the first.
        readers: for each of these layers, all layers that have its weight, itself first.
        parts: the layers that are solved together, by the part that is called, in the order of execution.
        last: layers that are solved after all others, since they are called more than once.
        left_out: all other layers and weights, and layers that bits leave in floats, and why.
    """

    recipe: Recipe
    method: LayerMethod
    patterns: Mapping[str, Pattern]
    readers: Mapping[str, tuple[str, ...]]
    parts: Mapping[str, list[str]]
    last: list[str]
    left_out: Mapping[str, str]

    def layouts(self, module: Watched, names: list[str]) -> dict[str, Layout]:
        """The layouts of all layers that read with one of these weights."""
        return {each: module.linears[each].layout for name in names for each in self.readers[name]}  # type: ignore[misc]


def plan_module(module: Watched, found: Discovery, recipe: Recipe, targets: Any) -> ModulePlan:
    """Choose the layers and the parts.

    Raises:
        ValueError: if targets match nothing, a layer was not called, a weight is tied to one left out, a pattern is
            impossible in a layer, or the module has no linear layers.
    """
    if "" in module.linears:
        raise ValueError("the module itself is a linear layer: see `prune_layer`, or make it a part of a module")
    whole = {name: each for name, each in module.linears.items() if isinstance(each.layout, Layout)}
    if not whole:
        reasons = {name: each.layout for name, each in module.linears.items()}
        others = f"; {listed([f'{name}: {why}' for name, why in reasons.items()])}" if reasons else ""
        raise ValueError(f"the module has no linear layer that can be pruned{others}")
    left_out: dict[str, str] = {
        **module.left_out, **{name: str(each.layout) for name, each in module.linears.items() if name not in whole}
    }  # fmt: skip
    inside = {name for name in whole if any(name.startswith(f"{block}.") for block in module.blocks)}
    if targets is not None:
        if recipe.targets is not None:
            raise ValueError("targets are given twice, in the call and in the recipe: leave one of the two out")
        recipe = recipe.model_copy(update={"targets": targets})
    order = {name: place for place, name in enumerate(found.linears)}
    called = sorted(whole, key=lambda name: order.get(name, len(order)))
    # As in a language model: layers outside blocks are an embedding, a stem or a head.
    default = [name for name in called if name in inside] if inside and recipe.targets is None else called
    shares = chosen_linears(default, [*left_out, *(set(called) - set(default))], recipe.targets, recipe.ignore)
    if inside:
        # A table names sparsities for some layers; all others are in blocks.
        shares = {
            name: own for name, own in shares.items() if name in inside or own or shares_in(recipe.targets) is None
        }
        default = [name for name in default if name in inside or name in shares]
    left_out |= {name: "outside the blocks" for name in called if name not in default}
    left_out |= {name: "not chosen by targets and ignore" for name in default if name not in shares}
    _check_called(found, list(shares))
    for name in called:
        if (name in order or name in shares) and not np.isfinite(module.read(name)).all():
            raise ValueError(f"the weight of {name} holds NaN or infinite values: load or train the module again")
    readers = _readers(module, shares)
    parts, last = _parts(module, found, readers)
    implied = implied_sparsity(recipe.pattern)
    share = recipe.sparsity if implied is None else implied
    method, patterns = recipe.layer_method, dict[str, Pattern]()
    for name in readers:
        own = shares[name]
        try:
            shape = whole[name].shape
            patterns[name] = parse_pattern(recipe.pattern, share if own is None else own, shape)
            check_method(method, patterns[name], shape, reads_variances(method), recipe.keep_zeros)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; leave it out with ignore, or give another pattern") from error
    if recipe.bits is not None:
        bits, widths = parse_bits(recipe.bits), {name: whole[name].shape[1] for name in readers}
        floats = {name: width for name, width in widths.items() if width % (bits.group or 1)}
        if floats == widths:
            bits.check(min(widths.values()))
        why = f"pruned, in floats: {bits.name} has a scale for each {bits.group} inputs, not a divisor of"
        left_out |= {name: f"{why} {width}" for name, width in floats.items()}
    return ModulePlan(recipe, method, patterns, readers, parts, last, left_out)


def _check_called(found: Discovery, names: list[str]) -> None:
    # A mixture may send no token of the first batch to an expert.
    missed = [name for name in names if name not in found.linears and not is_expert(name)]
    if missed:
        raise ValueError(
            f"the first batch does not reach {listed(missed)}: nothing says what their inputs are. Feed the module so "
            "that it calls them (see `call`), or leave them out with the recipe's ignore. A module that uses a weight "
            "without calling its layer, or calls it in a program of its own (jit, remat), hides the input"
        )
    for name in names:
        if name in found.hidden:
            refuse_hidden(name)


def _readers(module: Watched, shares: Mapping[str, float | None]) -> dict[str, tuple[str, ...]]:
    """The layers, by the first layer that has their weight."""
    readers: dict[str, tuple[str, ...]] = {}
    known: set[str] = set()
    for name in shares:
        if name in known:
            continue
        tied = module.linears[name].tied
        outside = [each for each in tied if each not in shares]
        if outside:
            raise ValueError(
                f"{name} shares its weight with {listed(outside)}, which is left out and would be pruned with it: "
                f"leave {name} out with the recipe's ignore, or untie them"
            )
        readers[name] = (name, *tied)
        known.update(readers[name])
    return readers


def _parts(
    module: Watched, found: Discovery, readers: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, list[str]], list[str]]:
    """The weights by the part whose call reaches them, and the weights that are reached again later."""
    parts: dict[str, list[str]] = {}
    last = []
    for name, own in readers.items():
        calls = [call for each in own for call in found.linears.get(each, [])]
        blocks = {call[-1] if call else None for call in calls}
        block = next(iter(blocks)) if len(blocks) == 1 else None
        if not calls:
            # An expert that the first batch does not reach.
            block = next((each for each in module.blocks if name.startswith(f"{each}.")), None)
        # A block may call a layer that it was given and does not own.
        if block is not None and found.blocks.get(block) == 1 and all(each.startswith(f"{block}.") for each in own):
            parts.setdefault(block, []).append(name)
        elif len(calls) == 1 and not calls[0]:
            parts[name] = [name]
        else:
            last.append(name)
    return parts, last


def module_recipe(recipe: Recipe, *, trains: bool, has_loss: bool) -> tuple[Recipe, dict[str, str]]:
    """The recipe for a module without the open fields that it cannot support; these, and why, if an effort was named.

    Args:
        recipe: the recipe as given.
        trains: whether the module has gradients in JAX.
        has_loss: whether a loss was given.

    Raises:
        ValueError: listing everything in the recipe that the module does not support.
    """
    fields = type(recipe).model_fields
    given = [name for name in ELSEWHERE if _is_given(recipe, name, fields[name].default)]
    problems = [f"{name} is for models in folders: leave it out, batches are given as they are" for name in given]
    if recipe.given("output_weights") == "gradient" and not has_loss:
        problems.append("output_weights='gradient' needs the gradient of a loss: give loss=, or say 'uniform'")
    if has_loss and not trains:
        problems.append("loss is for gradients in JAX, and the module is one of torch: leave it out")
    if has_loss and trains and recipe.output_weights != "gradient":
        problems.append("loss is for output_weights='gradient', and they are uniform: leave loss out, or say so")
    if recipe.given("allocation") not in (None, "uniform"):
        problems.append(f"allocation={recipe.allocation!r} is for language models: say 'uniform', or give targets")
    if recipe.given("permute"):
        problems.append("permute moves channels of layers that are known to follow each other: leave it out")
    if recipe.weighting == "residual":
        problems.append("weighting='residual' needs layers that are known to write into the stream: say 'uniform'")
    if recipe.expert_tokens == "all":
        problems.append("expert_tokens='all' is for mixtures that are known: leave it out")
    if recipe.bits is not None and recipe.given("distil_epochs"):
        problems.append("distil_epochs trains weights off their grid of bits: leave one of the two out")
    for name in ("train_epochs", "distil_epochs"):
        if recipe.given(name) and not trains:
            problems.append(f"{name} trains by gradients in JAX, and the module is one of torch: leave it out or say 0")
    if problems:
        raise ValueError("the recipe cannot be used on a module:\n  " + "\n  ".join(problems))
    models, gradients = "for language models", "by gradients in JAX, and the module is one of torch"
    left = {"allocation": ("uniform", models), "permute": (False, models)}
    if not has_loss:
        left["output_weights"] = ("uniform", "by the gradient of a loss, and none was given" if trains else gradients)
    if recipe.bits is not None:
        left["distil_epochs"] = (0, "off the grid of bits")
    if not trains:
        left |= dict.fromkeys(("train_epochs", "distil_epochs"), (0, gradients))
    changed = {name: value for name, (value, _) in left.items() if recipe.get(name) != value}
    named = recipe.given("effort") or recipe.given("method")
    return recipe.model_copy(update=changed), {name: left[name][1] for name in changed if named}


def _is_given(recipe: Recipe, name: str, default: Any) -> bool:
    if default is None:
        return recipe.given(name) is not None
    value = recipe.get(name)
    return not isinstance(value, type(default)) or value != default
