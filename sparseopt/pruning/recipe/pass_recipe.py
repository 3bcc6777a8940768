"""What all recipes share: the method, the tokens, and what is trained.

`prune_recipe` has the recipe of `prune_model`, `shrink_recipe` the recipe of `shrink_model`.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, cast

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from sparseopt.core.base.dense import Precision
from sparseopt.layers.bits import BITS, parse_bits
from sparseopt.layers.methods import METHODS
from sparseopt.layers.problem import LayerMethod
from sparseopt.models import Bos
from sparseopt.pruning.base.grams import ExpertTokens, Weighting
from sparseopt.pruning.recipe.effort import BEST, MOST_FACTOR, MOST_TRAINED, PRUNES, Effort, effort_help
from sparseopt.pruning.recipe.options import (
    CALIBRATION,
    HOW,
    OUTPUT,
    Plain,
    RecipeError,
    describe,
    mistakes_in,
    option,
    told,
)
from sparseopt.pruning.text.chats import is_text
from sparseopt.pruning.text.documents import SELF, TEXTS, check_text
from sparseopt.pruning.text.mix import mixed_windows, read_mix, sources_of
from sparseopt.pruning.text.windows import LEAST_WINDOWS, DocumentChoice, WindowChoice, count_help
from sparseopt.pruning.train.distillation import Distillation
from sparseopt.pruning.train.reconstruction import Reconstruction
from sparseopt.pruning.train.training import Training
from sparseopt.system.yaml_file import ConfigError, Location, read_yaml, refused

OutputWeighting = Literal["uniform", "gradient"]
HeadBits = Literal["q8_0", "q5_0", "q4_0"]

T = TypeVar("T", bound=Training)
# A field and what is wrong with it.
Problem = tuple[str, str]


def read_word(given: Any) -> Any:
    """YAML reads unquoted yes and no as truth values."""
    return ("yes" if given else "no") if isinstance(given, bool) else given


BosChoice = Annotated[Bos, BeforeValidator(read_word)]
Epochs = Annotated[int, Field(ge=0)]


class PassRecipe(BaseModel, ABC):
    """What all recipes share: the method, and the tokens that one pass over the blocks uses.

    In Python, `method` may also be a `LayerMethod` of your own, `train_epochs` a whole `Reconstruction`, and
    `calibration` a mix `{name: windows}`, a list of texts or of chats (lists of messages with `role` and `content`), a
    `datasets.Dataset` with a column of either, or token ids `[windows, seqlen]` of NumPy, JAX or torch, which are used
    unchanged: the last `heldout_windows` windows are held out.

    With few tokens a larger `ridge` overfits less: 0.1 has the smallest held-out error for 8,192 tokens of SmolLM2. The
    relative errors in a report weight tokens as the Gram matrices do, and outputs equally; with `propagate` they are
    relative to the corrected target. An expert that receives no token is always pruned by magnitude.

    A recipe is checked as a whole when it is created and cannot be changed afterwards: what its effort decides is
    filled in. `model_copy(update=...)` makes another one, for which this is decided again.

    Raises:
        RecipeError: listing everything that is wrong, one line each.
    """

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True
    )
    _open: frozenset[str] = PrivateAttr()

    method: Annotated[Any, Plain(Literal[tuple(METHODS)])] = option(
        None, "Pruning method: {choices}. Default: the effort's.", HOW
    )
    effort: Effort | None = option(None, effort_help(PRUNES), HOW)
    ridge: float | None = option(
        None, "Added to the unit diagonal of every scaled Gram matrix. Default: the method's.", HOW, ge=0
    )
    weighting: Weighting = option(
        "uniform", "How tokens are weighted in the Gram matrices: {choices} (by the residual stream's size).", HOW
    )
    output_weights: OutputWeighting = option(
        None,
        "How output errors are weighted: {choices}. Default: gradient with effort good or most or method best, else "
        "uniform.",
        HOW,
    )
    propagate: float = option(
        None,
        f"Fraction of the upstream error that each layer corrects. Default: {BEST['propagate']} with effort good or "
        "most or method best, else 0.",
        HOW, ge=0, le=1,
    )  # fmt: skip
    train_epochs: Annotated[int | Reconstruction, Plain(Epochs)] = option(
        None,
        f"Epochs of training for each pruned block, 0 for none. Default: {BEST['train_epochs']} with method best; with "
        f"effort most as many as read {MOST_TRAINED} windows, from 1 to {BEST['train_epochs']}; else 0.",
        HOW,
    )
    distil_epochs: Annotated[int | Distillation, Plain(Epochs)] = option(
        None,
        "Epochs of training all kept weights at the end, on the dense model's logits, 0 for none. Default: "
        "as many with effort most, else 0.",
        HOW,
    )
    precision: Precision = option(
        "highest",
        "Precision of products of activations (forward passes, Gram matrices, training): {choices}. bfloat16 rounds "
        "both operands and sums in float32; high and default are for a GPU or TPU, and float32 on a CPU. Layer solves "
        "are in float32 on every device.",
        HOW,
    )
    calibration: Annotated[Any, Plain(str), BeforeValidator(read_mix)] = option(
        SELF,
        f"Calibration text: {SELF}, which the model draws, or {TEXTS}. The first half of a file is used, or every "
        "other row. NAME:WINDOWS,NAME:WINDOWS is a mix of texts, each with its number of windows.",
        CALIBRATION,
    )
    score: str | None = option(
        None,
        "Text for the perplexity before and after, given as for calibration, or none. Default: the rest of the "
        f"calibration text; with calibration {SELF}, further windows that the model draws, and pydoc.",
        OUTPUT,
    )
    split: str | None = option(
        None, "Split of a hub data set. Default: validation to calibrate, test to evaluate.", CALIBRATION
    )
    column: str | None = option(
        None,
        "Column that holds the texts, or chats as lists of messages for the model's chat template. "
        "Default: text, else messages, else conversations.",
        CALIBRATION,
    )
    documents: DocumentChoice = option(
        "packed", "How documents become windows: {choices}; joined and cut, or one document per window.", CALIBRATION
    )
    bos: BosChoice = option(
        "auto",
        "Begin every window with the BOS token: {choices}; auto follows the model's tokenizer.",
        CALIBRATION,
    )
    windows: int | None = option(
        None,
        f"Number of calibration windows. Default: {count_help('input')}; {MOST_FACTOR} times as many to "
        "prune with effort most.",
        CALIBRATION, ge=1,
    )  # fmt: skip
    seqlen: int = option(512, "Tokens per calibration window.", CALIBRATION, ge=2)
    heldout_windows: int = option(4, "Number of further windows for the held-out error; 0 for none.", CALIBRATION, ge=0)
    window_choice: WindowChoice | None = option(
        None, "Which windows of the text are used: {choices}. Default: spread, evenly over all of it.", CALIBRATION
    )
    seed: int | None = option(
        None, f"Seed for window-choice random and calibration {SELF}. Default: 0.", CALIBRATION, ge=0
    )
    expert_tokens: ExpertTokens = option(
        "routed",
        "Which calibration tokens are used to prune an expert: {choices}. Forward passes always route tokens.",
        CALIBRATION,
    )
    min_expert_tokens: int = option(
        64, "An expert that receives fewer calibration tokens than this is pruned by magnitude.", CALIBRATION, ge=0
    )
    bits: str | None = option(
        None,
        f"Quantise the kept weights to a grid of few bits: {', '.join(BITS)}, or int4:group. The first three are for "
        "GGUF files, an output that ends in .gguf, with one scale for every 32 inputs; int8 has one for each output "
        "of a layer, and int4 one for every 128 inputs. A layer whose inputs no group tiles is left unchanged. "
        "Default: none; from a quantised GGUF file to another, the grid without an offset of the same width.",
        OUTPUT,
    )
    head_bits: HeadBits | None = option(
        None,
        "Grid of embedding and head in a GGUF file: {choices}. Default: q8_0 with bits; as in the source if that is "
        "quantised.",
        OUTPUT,
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = option(
        None, "Data type to store: {choices}. Default: the source's; for quantised weights, bfloat16.", OUTPUT
    )

    def __init__(self, **given: Any) -> None:
        given = {name: _plain(value) for name, value in given.items()}
        wrong = self._fill(given)
        problems = [(str(place[0]), text) for place, text in wrong.items()]
        fields = {name for name, _ in problems}
        if problems:
            # The other fields still show what does not go together.
            self._fill({name: value for name, value in given.items() if name not in fields})
        problems += self._contradictions(fields.isdisjoint)
        if problems:
            raise RecipeError(problems)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        describe(cls)

    def _fill(self, given: Mapping[str, Any]) -> dict[Location, str]:
        """Set the fields; return what is wrong with values that cannot be used by themselves, by location."""
        may_be_open = {name for name, field in type(self).model_fields.items() if field.default is None}
        try:
            super().__init__(**{n: value for n, value in given.items() if value is not None or n not in may_be_open})
        except ValidationError as error:
            return mistakes_in(error, type(self))
        self._open = frozenset(name for name in may_be_open if getattr(self, name) is None)
        if self.windows is None:
            vars(self)["windows"] = mixed_windows(self.calibration)
        vars(self).update({name: value for name, value in self._defaults().items() if name in self._open})
        return {}

    @abstractmethod
    def _defaults(self) -> Mapping[str, Any]:
        """The effort's values of fields that are left open, by name."""

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a recipe from a YAML file of its fields.

        Raises:
            ConfigError: listing the values that cannot be used by themselves, with their lines.
            RecipeError: if values do not go together.
            OSError: if the file cannot be read.
        """
        return cls(**cls.fields_in(Path(path)))

    @classmethod
    def fields_in(cls, path: Path, without: Collection[str] = ()) -> dict[str, Any]:
        """The fields that a YAML file gives, each checked by itself; it must not give the fields in `without`.

        Raises:
            ConfigError: as `from_yaml` does.
        """
        if not path.is_file():
            raise ConfigError(f"there is no file {path}")
        values, lines = read_yaml(path)
        wrong = cls.__new__(cls)._fill(values)
        wrong |= {(name,): f"{name} is not for this command: leave it out" for name in without if name in values}
        if wrong:
            raise refused(list(wrong.items()), lines, str(path))
        return values

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other fields, checked as a whole, which pydantic's own copy is not."""
        given = {name: value for name, value in vars(super().model_copy(deep=deep)).items() if name not in self._open}
        return type(self)(**(given | dict(update or {})))

    def get(self, name: str) -> Any:
        """The value of a field; None if this kind of recipe has no such field."""
        return getattr(self, name, None)

    def given(self, name: str) -> Any:
        """The given value of a field; None if it was left open."""
        return None if name in self._open else getattr(self, name)

    @property
    @abstractmethod
    def layer_method(self) -> LayerMethod:
        """The method with its settings; a ValueError if it does not exist or does not accept them."""

    @property
    def draws(self) -> bool:
        """Whether the model draws its calibration windows."""
        return is_text(self.calibration) and self.calibration == SELF

    @property
    def chooses_linears(self) -> bool:
        """Whether the run itself decides which layers are pruned."""
        return False

    def _contradictions(self, fine: Callable[[Collection[str]], bool]) -> Iterator[Problem]:
        """What is wrong with combinations of fields; `fine` says whether fields are right by themselves."""
        if fine({"method", "effort", "preset", "ridge", "pattern"}):
            yield from told("method", lambda: self.layer_method)
        if self.bits is not None and fine({"bits"}):
            yield from told("bits", lambda: parse_bits(str(self.bits)))
        for name, training in (("train_epochs", self.reconstruction), ("distil_epochs", self.distillation)):
            if training is not None and fine({name, "windows"}):
                yield from told(name, training.check)
        if fine({"calibration"}) and is_text(self.calibration) and not self.draws:
            for text, _ in sources_of(self.calibration):
                yield from told("calibration", partial(check_text, text, self.split, self.column))
            if (mixed := mixed_windows(self.calibration)) not in (None, self.windows) and fine({"windows"}):
                why = f"the texts of calibration have {mixed} in all"
                yield "windows", f"windows is {self.windows}, and {why}: leave windows out, or make the two agree"
        if fine({"score"}) and self.score not in (None, "none"):
            yield from told("score", lambda: check_text(self.score))
        seeded = self.draws or self.window_choice == "random"
        if self.seed is not None and not seeded and fine({"seed", "window_choice", "calibration"}):
            choice = self.chosen_window_choice
            yield "seed", f"seed is for window_choice 'random', and it is {choice!r}; leave the seed out"
        if fine({"calibration", "heldout_windows"}):
            yield from self._without_text()

    def _without_text(self) -> Iterator[Problem]:
        """Fields that say how to read a text, if there is none."""
        named = [name for name in ("window_choice", "split", "column") if getattr(self, name) is not None]
        named += ["documents"] * (self.documents == "separate")
        if self.draws:
            why = f"is for a text, and calibration {SELF!r} has none"
            yield from ((name, f"{name} {why}: leave {name} out, or give a text") for name in named)
        elif not is_text(self.calibration):
            ids = "is for text; calibration token ids are taken as they are"
            if self.bos == "yes":
                yield "bos", f"bos {ids}: put BOS in front of them"
            yield from ((name, f"{name} {ids}: leave {name} out") for name in named)
            found = len(self.calibration) - self.heldout_windows
            if self.windows not in (None, found):
                why = f"there are {found} besides the held-out ones, given {self.windows}"
                yield "windows", f"windows {ids}: {why}"

    @property
    def chosen_window_choice(self) -> WindowChoice:
        return self.window_choice or "spread"

    @property
    def window_count(self) -> int:
        """The number of calibration windows; the smallest default if it depends on the model."""
        return self.windows or LEAST_WINDOWS * self.window_factor

    @property
    def window_factor(self) -> int:
        """The default number of windows relative to the usual one."""
        return 1

    @property
    def reconstruction(self) -> Reconstruction | None:
        return self._training(Reconstruction, self.train_epochs)

    @property
    def distillation(self) -> Distillation | None:
        return self._training(Distillation, self.distil_epochs)

    def _training(self, kind: type[T], given: T | int) -> T | None:
        """The given settings, or this kind for so many epochs; None for 0."""
        # The kinds have defaults for all other settings; `Training` itself has not.
        return given if isinstance(given, kind) else cast(Any, kind)(epochs=given) if given else None

    @property
    def needs_sensitivities(self) -> bool:
        """Whether the gradient of the dense model's loss is needed."""
        return self.output_weights == "gradient" or self.get("allocation") == "curves"

    @property
    def needs_dense_stream(self) -> bool:
        """Whether the dense model's own activations are carried through all blocks."""
        return bool(self.propagate or self.train_epochs or self.distil_epochs)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON record: arrays of tokens appear as their shape, methods as their name."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        values |= {name: asdict(value) for name, value in values.items() if isinstance(value, Training)}
        named = [name for name in ("method", "penalty") if not isinstance(values.get(name), str | None)]
        values |= {name: described(values[name]) for name in named}
        if is_text(self.calibration):
            text = self.calibration
            values["calibration"] = text if isinstance(text, str | dict) else f"{len(text)} documents"
        else:
            values["calibration"] = f"token ids of shape {list(np.shape(self.calibration))}"
        return values


def _plain(value: Any) -> Any:
    """Convert NumPy's numbers to Python's, and paths to text, for a record."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return tuple(map(_plain, value)) if type(value) is tuple else value


def described(value: Any) -> str:
    """An object as text, without memory addresses, so that it is the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
