"""What to do to a model: one frozen recipe, checked as a whole before any work."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, SkipValidation

from sparseopt.core.penalties.names import BY_WEIGHT, penalty_of_weight
from sparseopt.core.penalties.protocols import Penalty
from sparseopt.layers.methods import METHODS, find_method
from sparseopt.layers.patterns import KNOWN, check_pattern, implied_sparsity
from sparseopt.layers.problem import LayerMethod
from sparseopt.pruning.recipe.allocation import Allocation, check_allocation
from sparseopt.pruning.recipe.effort import MOST_FACTOR, prune_defaults
from sparseopt.pruning.recipe.options import HOW, WHAT, Plain, option, told
from sparseopt.pruning.recipe.pass_recipe import PassRecipe, Problem, described
from sparseopt.pruning.recipe.targets import Patterns, Targets, check_shares, read_patterns, read_targets

PRESETS = tuple(dict.fromkeys(preset for method in METHODS.values() for preset in method.presets))


def penalty_named(name: str) -> Penalty:
    """The penalty with this name; the sparsity sets its level."""
    return penalty_of_weight(name, 1.0)


PenaltyName: Any = Annotated[Literal[tuple(BY_WEIGHT)], AfterValidator(penalty_named)]


def read_bounds(given: Any) -> tuple[float, float]:
    """Two fractions of zeros, also from a text with a comma between them."""
    try:
        low, high = map(float, given.split(",") if isinstance(given, str) else given)
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 <= low <= high < 1:
        raise ValueError(f"bounds must be two fractions of zeros, 0 <= low <= high < 1, as in 0.3,0.8, given {given!r}")
    return low, high


class Recipe(PassRecipe):
    """How `prune_model` prunes.

    In Python, `penalty` may also be an object as in `prune_layer`. Without `bounds` a layer's sparsity lies in
    `default_bounds`; the total of an `allocation`, over all pruned layers, is exact. `targets` describes the names of
    layers; embeddings and heads are never pruned.

    With `keep_zeros` or `masks`, kept weights are chosen and fitted among the other weights only. A layer that already
    has the requested zeros, or more, keeps its mask.
    """

    sparsity: float = option(
        None,
        "Fraction of zeros in every layer. Default: 0.5, or as the n:m pattern implies; with keep-zeros or masks no "
        "further zeros.",
        WHAT, ge=0, lt=1,
    )  # fmt: skip
    pattern: str = option("unstructured", f"Which weights may stay: {KNOWN}.", WHAT)
    keep_zeros: bool = option(False, "Weights that are zero in the model stay zero.", WHAT)
    masks: str | None = option(
        None,
        "A pruned model of the same shape (folder, GGUF file or hub name): weights that are zero in it become zero.",
        WHAT,
    )
    targets: Annotated[Targets | None, SkipValidation, BeforeValidator(read_targets)] = option(
        None,
        "Which layers, by name (model.layers.0.mlp.down_proj), end of name (down_proj) or regular expression "
        "(re:.*mlp), separated by commas; or other sparsities for some, as in down_proj=0.6,re:.*self_attn=0, where 0 "
        "leaves a layer unchanged. Names take precedence over expressions, longer names over shorter ones, earlier "
        "expressions over later ones. Default: all in the blocks.",
        WHAT,
    )
    ignore: Annotated[Patterns | None, SkipValidation, BeforeValidator(read_patterns)] = option(
        None, "Layers to leave out, named as in targets; ignore takes precedence over targets.", WHAT
    )
    allocation: Allocation = option(
        None,
        "How the sparsity is distributed over the layers: {choices}. With an n:m pattern and a sparsity below its own, "
        "curves chooses the layers that stay dense. Default: curves with effort most and no n:m pattern, else "
        "uniform.",
        WHAT,
    )
    bounds: Annotated[tuple[float, float] | None, BeforeValidator(read_bounds)] = option(
        None, "Smallest and largest sparsity of a layer, as in 0.3,0.8, for curves.", WHAT
    )
    preset: Annotated[str | None, Plain(Literal[PRESETS] | None)] = option(
        None, "Settings of method maiht: {choices}. Default: tuned.", HOW
    )
    penalty: Annotated[Penalty | None, Plain(PenaltyName | None)] = option(
        None,
        "Penalty that chooses the weights to keep, instead of l0: {choices}. The sparsity sets its level. For method "
        "maiht and pattern unstructured.",
        HOW,
    )
    permute: bool = option(
        None,
        "Reorder channels so that an n:m pattern keeps more; the order does not change the dense model's outputs. "
        "Default: with effort most and an n:m pattern.",
        WHAT,
    )

    def _defaults(self) -> Mapping[str, Any]:
        return prune_defaults(vars(self), self.window_count)

    @property
    def window_factor(self) -> int:
        return MOST_FACTOR if self.effort == "most" else 1

    def as_dict(self) -> dict[str, Any]:
        names = {described(penalty_named(name)): name for name in BY_WEIGHT}
        values = super().as_dict()
        return values | {"penalty": names.get(values["penalty"], values["penalty"])}

    @property
    def layer_method(self) -> LayerMethod:
        return find_method(self.method, self.preset, self.penalty, self.ridge, self.pattern)

    @property
    def has_support(self) -> bool:
        """Whether some weights are known to be zero before a layer is solved."""
        return self.keep_zeros or self.masks is not None

    @property
    def chooses_linears(self) -> bool:
        """Whether curves choose the layers that get the n:m pattern; the others stay dense."""
        return self.allocation == "curves" and implied_sparsity(self.pattern) is not None

    def _contradictions(self, fine: Callable[[Collection[str]], bool]) -> Iterator[Problem]:
        yield from super()._contradictions(fine)
        if self.permute and fine({"permute", "pattern"}):
            others = [name for name in ("keep_zeros", "masks", "targets", "ignore") if getattr(self, name)]
            if not implied_sparsity(self.pattern):
                why = f"the order of the inputs counts, and the pattern is {self.pattern!r}; leave it out"
                yield "permute", f"permute is for n:m patterns with zeros, where {why}"
            elif others:
                yield "permute", f"permute moves channels of all layers, which contradicts {others[0]}: leave one out"
        if self.masks is not None and self.chooses_linears and fine({"masks", "pattern"}):
            why = f"with pattern {self.pattern!r} allocation 'curves' leaves some dense: leave one of the two out"
            yield "masks", f"masks has zeros for every layer, and {why}"
        if fine({"pattern", "sparsity"}):
            share = None if self.chooses_linears else self.sparsity
            yield from told("pattern", lambda: check_pattern(self.pattern, share))
        if fine({"targets", "ignore", "pattern", "allocation"}):
            fits = partial(check_pattern, self.pattern)
            yield from told("targets", lambda: check_shares(self.targets, fits, self.allocation))
        if fine({"allocation", "bounds", "pattern", "sparsity"}):
            given = (self.allocation, self.pattern, self.sparsity, self.bounds)
            yield from told("allocation", lambda: check_allocation(*given))
        if self.penalty is not None and self.pattern != "unstructured" and fine({"penalty", "pattern"}):
            yield "penalty", f"a penalty chooses weights anywhere, which contradicts the pattern {self.pattern!r}"
