"""Floor 6: what to do to a model: one frozen recipe, checked as a whole before any work."""

import re
import textwrap
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np

from sparseopt.core.arguments import unknown
from sparseopt.core.penalties import Penalty
from sparseopt.core.penalty_names import BY_WEIGHT, penalty_of_weight
from sparseopt.models import Bos
from sparseopt.pruning.allocation import Allocation, check_allocation
from sparseopt.pruning.calibration import Weighting
from sparseopt.pruning.distillation import Distillation
from sparseopt.pruning.layer import LayerMethod
from sparseopt.pruning.methods import METHODS, find_method
from sparseopt.pruning.patterns import KNOWN, check_pattern, implied_sparsity
from sparseopt.pruning.reconstruction import Reconstruction
from sparseopt.pruning.texts import TEXTS, WindowChoice
from sparseopt.pruning.training import Training

OutputWeighting = Literal["uniform", "gradient"]
# The headings that options are shown under.
WHAT, HOW, CALIBRATION, OUTPUT = "What to prune", "How to prune", "Calibration", "Output"
# What method "best" does unasked: epochs of reconstruction, and the fraction of upstream error that is corrected.
BEST_EPOCHS = 4
BEST_PROPAGATE = 0.25


@dataclass(frozen=True)
class Option:
    """One option; `options_of` fills in its name, its default, and what follows from the type of its field.

    The shell's options, the settings of the experiment tasks, the checks and the reference are made from the options
    of the recipes, so a new option is one new field.
    """

    help: str  # in a sentence or two; `{choices}` stands for its choices
    panel: str  # the heading that it is shown under
    type: Any = None  # of the values that a config can hold; given where Python code may give an object instead
    choices: Collection[str] = ()  # the words that it may be; by default those of a `Literal`
    read: Callable[[Any], Any] | None = None  # makes the value of a text, where the type does not say how
    least: float | None = None
    most: float | None = None
    below: float | None = None
    name: str = ""
    default: Any = None
    objects: bool = False  # whether Python code may give an object instead

    @property
    def allows_none(self) -> bool:
        return type(None) in typing.get_args(self.type)

    def mistake(self, value: Any) -> str | None:
        """Why a value cannot be used, as far as that shows without the other options; None where it can."""
        if (value is None and self.allows_none) or (self.objects and not isinstance(value, str | int)):
            return None
        if self.choices:
            return None if value in self.choices else unknown(self.name, value, self.choices)
        if self.most is not None or self.below is not None:
            top, end = (self.most, "]") if self.below is None else (self.below, ")")
            if not (self.least <= value <= top and value != self.below):
                return f"{self.name} must lie in [{self.least:g}, {top:g}{end}, given {value}"
        elif self.least is not None and not value >= self.least:
            return f"{self.name} must be at least {self.least:g}, given {value}"
        return None


def option(default: Any, help: str, panel: str, **details: Any) -> Any:
    """A field of a dataclass that is an option; `details` are further attributes of `Option`."""
    return field(default=default, metadata={"option": Option(help, panel, **details)})


def options_of(kind: type) -> dict[str, Option]:
    """The options of a dataclass, by name."""
    hints, found = typing.get_type_hints(kind), {}
    for each in fields(kind):
        given: Option = each.metadata["option"]
        hint = given.type or hints[each.name]
        literals = [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is typing.Literal]
        choices = tuple(given.choices or (word for part in literals for word in typing.get_args(part)))
        text = given.help.format(choices=" or ".join(", ".join(choices).rsplit(", ", 1)))
        found[each.name] = replace(
            given, help=text, type=hint, choices=choices, name=each.name, default=each.default, objects=bool(given.type)
        )
    return found


def attributes(options: Iterable[Option]) -> str:
    """The "Attributes:" section of a class's docstring."""
    section = "    Attributes:\n"
    for each in options:
        default = "" if each.default is None else f" Default: {each.default}."
        line = f"{each.name}: {each.help}{default}"
        section += textwrap.fill(line, 110, initial_indent=" " * 8, subsequent_indent=" " * 12) + "\n"
    return section


def mistakes_of(checks: Iterable[Callable[[], Any]]) -> list[str]:
    """The texts of the ValueErrors that these checks raise."""
    found = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            found.append(str(error))
    return found


def read_bounds(given: Any) -> Any:
    """Two numbers of a text with a comma between; what is no text is left unchanged."""
    if not isinstance(given, str):
        return given
    try:
        return tuple(float(part) for part in given.split(","))
    except ValueError:
        raise ValueError(f"bounds must be two numbers with a comma between, as in 0.3,0.8, given {given!r}") from None


PRESETS = tuple(dict.fromkeys(preset for method in METHODS.values() for preset in method.presets))

# A check that raises a ValueError, and the options that must be fine for it.
Check = tuple[tuple[str, ...], Callable[[], Any]]


@dataclass(frozen=True)
class PassRecipe(ABC):
    """What all recipes say: the method, and the tokens that one pass over the blocks sees.

    In Python, `method` may also be a `LayerMethod` of your own, `reconstruct` a whole `Reconstruction`, and
    `calibration` token ids `[samples, seqlen]`, which are taken as they are: their last `heldout_samples` windows are
    held out.

    On few tokens a larger `ridge` overfits less: 0.1 is best, by held-out error, for 8,192 tokens of SmolLM2. The
    relative errors in a report weight tokens as the Gram matrices do, and outputs equally; with `propagate` they are
    relative to the corrected target. An expert that receives no token is always pruned by magnitude.
    """

    method: str | LayerMethod = option("maiht", "Pruning method: {choices}.", HOW, type=str, choices=METHODS)
    ridge: float | None = option(
        None, "Added to the unit diagonal of every scaled Gram matrix. Default: the method's.", HOW, least=0
    )
    weighting: Weighting = option(
        "uniform", "How tokens are weighted in the Gram matrices: {choices} (by the residual stream's size).", HOW
    )
    output_weights: OutputWeighting | None = option(
        None,
        "How output errors are weighted: {choices}. Default: gradient when pruning by method best, else uniform.",
        HOW,
    )
    propagate: float | None = option(
        None,
        f"Fraction of the upstream error that each layer corrects. Default: {BEST_PROPAGATE} when pruning by method "
        "best, else 0.",
        HOW, least=0, most=1,
    )  # fmt: skip
    reconstruct: int | Reconstruction | None = option(
        None,
        f"Epochs of training for each pruned block, 0 for none. Default: {BEST_EPOCHS} for method best, else 0.",
        HOW, type=int | None, least=0,
    )  # fmt: skip
    distil: int | Distillation = option(
        0,
        "Epochs of training all kept weights together on the dense model's logits at the end, 0 for none.",
        HOW, type=int, least=0,
    )  # fmt: skip
    calibration: Any = option(
        "pydoc", f"Calibration text: {TEXTS}. Of a file the first half is read.", CALIBRATION, type=str
    )
    bos: Bos = option(
        "auto",
        "Begin every window with the BOS token: {choices}; auto does as the model's tokenizer.",
        CALIBRATION,
    )
    samples: int = option(16, "Calibration windows.", CALIBRATION, least=1)
    seqlen: int = option(512, "Tokens in a calibration window.", CALIBRATION, least=2)
    heldout_samples: int = option(4, "Further windows, for the held-out error; 0 for none.", CALIBRATION, least=0)
    windows: WindowChoice | None = option(
        None, "Which windows of the text are taken: {choices}. Default: spread, evenly from all of it.", CALIBRATION
    )
    seed: int | None = option(None, "Seed for windows random. Default: 0.", CALIBRATION, least=0)
    min_expert_tokens: int = option(
        64, "An expert that receives fewer calibration tokens than this is pruned by magnitude.", CALIBRATION, least=0
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = option(
        None, "Data type to store: {choices}. Default: the source's.", OUTPUT
    )

    @property
    def allocation(self) -> Allocation:
        return "uniform"

    @property
    def penalty(self) -> Penalty | None:
        return None

    @property
    def pack(self) -> bool:
        return False

    @property
    def distillation(self) -> Distillation | None:
        if isinstance(self.distil, Distillation):
            return self.distil
        return Distillation(epochs=self.distil) if self.distil else None

    def check(self) -> LayerMethod:
        """The method asked for, after every field was checked.

        Raises:
            ValueError: listing all that is wrong, one line each.
        """
        options = options_of(type(self))
        wrong = {name: text for name, each in options.items() if (text := each.mistake(getattr(self, name)))}
        trainings = {"reconstruct": self.reconstruction, "distil": self.distillation}
        checks: list[Check] = [
            (("method", "preset", "ridge"), self.find_method),
            *(((name,), training.check) for name, training in trainings.items() if training is not None),
            *self._checks(),
        ]
        problems = [*wrong.values(), *mistakes_of(check for names, check in checks if not wrong.keys() & set(names))]
        if self.bos == "yes" and not isinstance(self.calibration, str):
            problems.append("bos is for text; calibration token ids are taken as they are: put BOS in front of them")
        if self.windows is not None and not isinstance(self.calibration, str):
            problems.append("windows is for text; calibration token ids are taken as they are: leave windows out")
        if self.seed is not None and self.windows != "random":
            problems.append(f"seed is for windows 'random', and windows is {self.window_choice!r}; leave the seed out")
        if problems:
            raise ValueError("the recipe cannot be used:\n  " + "\n  ".join(problems))
        return self.find_method()

    @abstractmethod
    def find_method(self) -> LayerMethod:
        """The method with its settings; a ValueError for one that does not exist or cannot take them."""

    @abstractmethod
    def _checks(self) -> Sequence[Check]:
        """The checks of this kind of recipe only."""

    @property
    def window_choice(self) -> WindowChoice:
        return self.windows or "spread"

    def output_weighting(self) -> OutputWeighting:
        return self.output_weights or ("gradient" if self.method == "best" else "uniform")

    @property
    def propagated_share(self) -> float:
        if self.propagate is None:
            return BEST_PROPAGATE if self.method == "best" else 0.0
        return self.propagate

    @property
    def reconstruction(self) -> Reconstruction | None:
        if isinstance(self.reconstruct, Reconstruction):
            return self.reconstruct
        default = BEST_EPOCHS if self.method == "best" else 0
        epochs = default if self.reconstruct is None else self.reconstruct
        return Reconstruction(epochs=epochs) if epochs else None

    @property
    def needs_sensitivities(self) -> bool:
        """Whether the gradient of the dense model's loss is asked for."""
        return self.output_weighting() == "gradient" or self.allocation == "curves"

    @property
    def needs_dense_stream(self) -> bool:
        """Whether the dense model's own activations are carried through all blocks."""
        return self.propagated_share > 0 or self.reconstruction is not None or self.distillation is not None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON record; arrays of tokens appear by their shape, methods by their name."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values |= {name: asdict(value) for name, value in values.items() if isinstance(value, Training)}
        if not isinstance(self.method, str):
            values["method"] = described(self.method)
        if self.penalty is not None:
            values["penalty"] = described(self.penalty)
        if not isinstance(self.calibration, str):
            values["calibration"] = f"token ids of shape {list(np.shape(self.calibration))}"
        return values


@dataclass(frozen=True)
class Recipe(PassRecipe):
    """How `prune_model` prunes.

    In Python, `penalty` may also be an object as in `prune_layer`. Without `bounds` a layer's sparsity lies in
    `default_bounds`; the total of an `allocation` is exact.
    """

    sparsity: float | None = option(
        None,
        "Fraction of zeros in every linear. Default: 0.5, or that of the n:m pattern.",
        WHAT,
        least=0,
        below=1,
    )
    pattern: str = option("unstructured", f"Which weights may stay: {KNOWN}.", WHAT)
    allocation: Allocation = option(
        "uniform", "How the sparsity is distributed over the layers: {choices}. Not for n:m patterns.", WHAT
    )
    bounds: tuple[float, float] | None = option(
        None, "Least and most sparsity of a layer, as in 0.3,0.8, for owl and curves.", WHAT, read=read_bounds
    )
    preset: str | None = option(None, "Settings of method maiht: {choices}. Default: best.", HOW, choices=PRESETS)
    penalty: Penalty | None = option(
        None,
        "Chooses the weights that stay in place of l0: {choices}. The sparsity sets its level. For method maiht and "
        "pattern unstructured.",
        HOW, type=str | None, choices=BY_WEIGHT, read=lambda name: penalty_of_weight(name, 1.0),
    )  # fmt: skip
    pack: bool = option(False, "Store zeros as a bitmask; `sparseopt unpack` makes what transformers loads.", OUTPUT)

    def __post_init__(self) -> None:
        if self.sparsity is None:
            implied = implied_sparsity(self.pattern)
            if implied is None or 0 <= implied < 1:
                object.__setattr__(self, "sparsity", 0.5 if implied is None else implied)

    def find_method(self) -> LayerMethod:
        return find_method(self.method, self.preset, self.penalty, self.ridge, self.pattern)

    def _checks(self) -> Sequence[Check]:
        def allocated() -> None:
            check_allocation(self.allocation, self.pattern, self.sparsity, self.bounds)

        def anywhere() -> None:
            if self.penalty is not None and self.pattern != "unstructured":
                raise ValueError(f"a penalty chooses weights anywhere, which contradicts the pattern {self.pattern!r}")

        return (
            (("sparsity",), lambda: check_pattern(self.pattern, self.sparsity)),
            (("allocation", "sparsity"), allocated),
            ((), anywhere),
        )


OPTIONS = options_of(Recipe)
Recipe.__doc__ = f"{Recipe.__doc__}\n{attributes(OPTIONS.values())}"


def described(value: Any) -> str:
    """An object as text, the same in every process: without addresses in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
