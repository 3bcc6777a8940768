"""A smaller dense model: what `shrink_model` keeps, as fractions and as whole numbers.

    --channels 0.75 --heads 0.67 --layers 0.9   ->   Sizes(channels=1152, kv_heads=2, blocks=(0, 1, 3, ...))
    --parameters 0.8                            ->   sizes that fit, chosen by measured losses, see `mixing`

Every block keeps the same numbers, so that the configuration of the smaller model is a plain one: one
`intermediate_size`, one number of heads. Which channels and heads stay is decided block by block.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from sparseopt.layers.methods import METHODS, find_method
from sparseopt.layers.problem import LayerMethod
from sparseopt.models import ModelError, Sizes, StreamedModel, possible_kv_heads, sizes_of
from sparseopt.pruning.recipe.effort import SHRINKS, Effort, effort_help, shrink_defaults
from sparseopt.pruning.recipe.options import HOW, KEEP, Plain, option, told
from sparseopt.pruning.recipe.pass_recipe import PassRecipe, Problem
from sparseopt.pruning.text.chats import is_text
from sparseopt.pruning.text.documents import SELF, check_text

# A fraction may be rounded by at most this much of the whole.
ROUNDING = 0.05
# A budget may be exceeded by this much of the whole: three digits of it are themselves rounded.
BUDGET_ROUNDING = 0.0005
# Begins the name of a text whose tokens stay.
TEXT = "text:"
SHARES = ("channels", "heads", "layers", "experts")
# SparseGPT chooses for every output by itself, so it cannot remove an input for all of them.
CHOOSING = tuple(name for name in METHODS if name != "sparsegpt")


def as_text(given: Any) -> Any:
    """A number as a text; true and false are none."""
    return str(given) if type(given) in (int, float) else given


def wanted_tokens(vocabulary: str) -> int | float | None:
    """A number of tokens or a fraction of all; None if a text is named, see `ShrinkRecipe.vocabulary`.

    Raises:
        ValueError: for anything else.
    """
    if vocabulary.startswith(TEXT):
        check_text(vocabulary.removeprefix(TEXT))
        return None
    with contextlib.suppress(ValueError):
        found = float(vocabulary)
        if vocabulary.isdecimal() and found >= 1:
            return int(vocabulary)
        if not vocabulary.isdecimal() and 0 < found <= 1:
            return found
    raise ValueError(
        f"vocabulary must be a number of tokens such as 16000, a fraction in (0, 1] such as 0.5, or {TEXT}TEXT such as "
        f"{TEXT}file:PATH, given {vocabulary!r}"
    )


class ShrinkRecipe(PassRecipe):
    """How `shrink_model` makes a smaller dense model.

    Fractions are rounded to sizes that the model can have. The method ranks whole groups of inputs: channels of the
    MLP, key-value groups of the attention. What stays is fitted again to the dense layer's outputs, unless the method
    only ranks.
    """

    effort: Effort | None = option(None, effort_help(SHRINKS), HOW)
    method: Annotated[Any, Plain(Literal[CHOOSING])] = option(
        None, "How channels and heads are chosen: {choices}. Default: best.", HOW
    )
    channels: float = option(1.0, "Fraction of the MLP's channels that stay.", KEEP, ge=0, le=1)
    heads: float = option(
        1.0, "Fraction of the key-value groups that stay, each with its query heads.", KEEP, ge=0, le=1
    )
    layers: float = option(1.0, "Fraction of the blocks that stay.", KEEP, ge=0, le=1)
    experts: float = option(1.0, "Fraction of the experts that stay, in a mixture.", KEEP, ge=0, le=1)
    vocabulary: Annotated[str, BeforeValidator(as_text)] = option(
        None,
        "Tokens that stay, the most frequent ones of the calibration text: their number, or a fraction such as 0.5; or "
        "text:TEXT for all tokens of a text, given as for calibration. Default: all tokens.",
        KEEP,
    )
    parameters: float | None = option(
        None,
        "Fraction of all parameters that stays; measured losses then choose the fractions above.",
        KEEP, ge=0, lt=1,
    )  # fmt: skip
    repair: bool = option(
        True, "Fit the block before removed ones, by least squares, to the dense model's stream behind them.", HOW
    )
    multiple: int = option(64, "Round the number of channels to a multiple of this.", KEEP, ge=1)

    @property
    def only_vocabulary(self) -> bool:
        """Whether all blocks stay as they are, so that no text runs through the model."""
        others = self.has_budget or self.bits is not None or any(getattr(self, name) != 1 for name in SHARES)
        return self.vocabulary is not None and not others

    def _defaults(self) -> Mapping[str, Any]:
        return shrink_defaults(vars(self))

    @property
    def layer_method(self) -> LayerMethod:
        # Channels are groups of one input; the method is the same for larger ones.
        return find_method(self.method, ridge=self.ridge, pattern="group:1")

    def _contradictions(self, fine: Callable[[Collection[str]], bool]) -> Iterator[Problem]:
        yield from super()._contradictions(fine)
        if self.vocabulary is not None and fine({"vocabulary", "calibration"}):
            yield from self._wrong_vocabulary()
        if not fine({*SHARES, "parameters"}):
            return
        given = {name: share for name in SHARES if (share := getattr(self, name)) != 1}
        if gone := [name for name, share in (given | {"parameters": self.parameters}).items() if share == 0]:
            yield gone[0], f"{' and '.join(gone)} 0 leave nothing: give a fraction above 0"
        elif self.has_budget and given:
            yield "parameters", f"parameters chooses what goes: leave {' and '.join(given)} out"
        elif not self.has_budget and not given and self.vocabulary is None:
            yield "channels", "nothing would go: give channels, heads, layers, experts or vocabulary, or a budget"

    def _wrong_vocabulary(self) -> Iterator[Problem]:
        """What is wrong with the tokens that stay."""
        yield from told("vocabulary", lambda: wanted_tokens(self.vocabulary))
        named, drawn = self.vocabulary.startswith(TEXT), self.draws or not is_text(self.calibration)
        if not is_text(self.calibration):
            yield "calibration", "calibration token ids are those of the whole vocabulary: give a text instead"
        elif drawn and not named:
            why = f"counts the tokens of the calibration text, and calibration {SELF!r} has none"
            yield "vocabulary", f"vocabulary {why}: give calibration, or vocabulary text:TEXT"
        elif isinstance(self.calibration, dict) and not named:
            yield "vocabulary", "vocabulary counts the tokens of one text, and calibration is a mix: give text:TEXT"
        trained = [name for name in ("train_epochs", "distil_epochs") if self.given(name)]
        if self.only_vocabulary and trained:
            yield trained[0], f"without the tokens that go, nothing changes that {trained[0]} could train: leave it out"

    @property
    def needs_dense_stream(self) -> bool:
        return super().needs_dense_stream or (self.repair and (self.has_budget or self.layers < 1))

    @property
    def has_budget(self) -> bool:
        """Whether measured losses choose the fractions."""
        return self.parameters is not None


def shrunk_sizes(model: StreamedModel, recipe: ShrinkRecipe) -> Sizes:
    """The sizes that a recipe's fractions give; with a budget, the sizes of the dense model.

    Only the number of `blocks` counts: which blocks stay is measured later.

    Raises:
        ModelError: if a fraction is far from what the model can have, with what is possible.
    """
    dense = sizes_of(model)
    if dense.experts is None and recipe.experts < 1:
        raise ModelError(
            f"experts {recipe.experts:g} is for mixtures of experts, and this model has none; leave it out"
        )
    channels = f"MLP channels, multiples of {recipe.multiple}"
    blocks = range(1, len(dense.blocks) + 1)
    return Sizes(
        channels=_nearest("channels", recipe.channels, channel_choices(model, recipe), channels),
        kv_heads=_nearest("heads", recipe.heads, possible_kv_heads(model), "key-value groups"),
        blocks=dense.blocks[: _nearest("layers", recipe.layers, blocks, "blocks")],
        experts=dense.experts and _nearest("experts", recipe.experts, range(1, dense.experts + 1), "experts"),
    )


def channel_choices(model: StreamedModel, recipe: ShrinkRecipe) -> list[int]:
    """The numbers of channels that a model may keep, ascending, the dense model's last."""
    dense = sizes_of(model).channels
    return [*range(recipe.multiple, dense, recipe.multiple), dense]


def kv_head_choices(model: StreamedModel) -> list[int]:
    """The numbers of key-value groups that a budget chooses among: at least half of them."""
    return [number for number in possible_kv_heads(model) if 2 * number >= sizes_of(model).kv_heads]


def smallest_sizes(model: StreamedModel, recipe: ShrinkRecipe) -> Sizes:
    """The smallest sizes that a budget can choose."""
    dense = sizes_of(model)
    return Sizes(channel_choices(model, recipe)[0], kv_head_choices(model)[0], dense.blocks[:1], dense.experts)


def parameters_of(model: StreamedModel) -> int:
    """The number of parameters of an export; a tied head counts once."""
    return sum(math.prod(model.source.tensors[key].shape) for key in model.exported_keys())


def _nearest(name: str, share: float, possible: Sequence[int], what: str) -> int:
    """The possible number nearest to a fraction of the last one; a `ModelError` if none is near."""
    whole = possible[-1]
    number = min(possible, key=lambda n: abs(n - share * whole))
    if abs(number / whole - share) <= ROUNDING:
        return number
    below, above = (n for n in possible if n < share * whole), (n for n in possible if n > share * whole)
    near = [*list(below)[-1:], *list(above)[:1]]
    raise ModelError(
        f"{name} {share:g} would keep {share * whole:.4g} of {whole} {what}; give "
        + " or ".join(f"{n / whole:.4g} for {n}" for n in near)
    )
