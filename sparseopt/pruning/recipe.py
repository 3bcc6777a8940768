"""Floor 6: what to do to a model: one frozen recipe, checked as a whole before any work."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, Literal, TypeVar, cast

import numpy as np

from sparseopt.core.penalties import Penalty
from sparseopt.core.penalty_names import BY_WEIGHT, penalty_of_weight
from sparseopt.models import Bos
from sparseopt.pruning.allocation import Allocation, check_allocation
from sparseopt.pruning.calibration import ExpertTokens, Weighting
from sparseopt.pruning.distillation import Distillation
from sparseopt.pruning.documents import TEXTS, check_text, is_text
from sparseopt.pruning.layer import LayerMethod
from sparseopt.pruning.methods import METHODS, find_method
from sparseopt.pruning.options import CALIBRATION, HOW, OUTPUT, WHAT, attributes, mistakes_of, option, options_of
from sparseopt.pruning.patterns import KNOWN, check_pattern, implied_sparsity
from sparseopt.pruning.reconstruction import Reconstruction
from sparseopt.pruning.targets import Patterns, Sparsities, check_choice, read_patterns, read_sparsities
from sparseopt.pruning.texts import DocumentChoice, WindowChoice
from sparseopt.pruning.training import Training

OutputWeighting = Literal["uniform", "gradient"]
# What method "best" does unasked: epochs of reconstruction, the fraction of upstream error that is corrected, and
# variants of the calibration windows.
BEST_EPOCHS = 4
BEST_PROPAGATE = 0.25
BEST_VARIANTS = 3
# Calibration windows, where their number is not given: as many as give the widest linear so many tokens an input. With
# the variants that are not asked for there are not more of them either.
TOKENS_AN_INPUT, LEAST_WINDOWS, MOST_WINDOWS = 4, 16, 128


def read_bounds(given: Any) -> Any:
    """Two numbers of a text with a comma between; what is no text is left unchanged."""
    if not isinstance(given, str):
        return given
    try:
        return tuple(float(part) for part in given.split(","))
    except ValueError:
        raise ValueError(f"bounds must be two numbers with a comma between, as in 0.3,0.8, given {given!r}") from None


def read_pattern(given: Any) -> Any:
    """The text of a pattern. YAML 1.1 reads an unquoted 2:4 as a number of base 60, and no pattern is a number."""
    return f"{given // 60}:{given % 60}" if isinstance(given, int) and given >= 60 else given


PRESETS = tuple(dict.fromkeys(preset for method in METHODS.values() for preset in method.presets))

T = TypeVar("T", bound=Training)
# A check that raises a ValueError, and the options that must be fine for it.
Check = tuple[tuple[str, ...], Callable[[], Any]]


@dataclass(frozen=True)
class PassRecipe(ABC):
    """What all recipes say: the method, and the tokens that one pass over the blocks sees.

    In Python, `method` may also be a `LayerMethod` of your own, `reconstruct` a whole `Reconstruction`, and
    `calibration` a list of texts or of chats (lists of messages with `role` and `content`), or token ids
    `[samples, seqlen]`, which are taken as they are: their last `heldout_samples` windows are held out.

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
        "pydoc",
        f"Calibration text: {TEXTS}. Of a file the first half is read, of rows every other one.",
        CALIBRATION, type=str,
    )  # fmt: skip
    split: str | None = option(
        None, "Split of a hub data set. Default: validation to calibrate, test to evaluate.", CALIBRATION
    )
    column: str | None = option(
        None,
        "Column of the rows that has the texts, or chats as lists of messages, for which the model has a template. "
        "Default: text, else messages, else conversations.",
        CALIBRATION,
    )
    documents: DocumentChoice = option(
        "packed", "How documents become windows: {choices}; joined and cut, or one document a window.", CALIBRATION
    )
    bos: Bos = option(
        "auto",
        "Begin every window with the BOS token: {choices}; auto does as the model's tokenizer.",
        CALIBRATION,
    )
    samples: int | None = option(
        None,
        f"Calibration windows. Default: {TOKENS_AN_INPUT} tokens for each input of the widest linear, in "
        f"{LEAST_WINDOWS} to {MOST_WINDOWS} windows.",
        CALIBRATION, least=1,
    )  # fmt: skip
    seqlen: int = option(512, "Tokens in a calibration window.", CALIBRATION, least=2)
    heldout_samples: int = option(4, "Further windows, for the held-out error; 0 for none.", CALIBRATION, least=0)
    windows: WindowChoice | None = option(
        None, "Which windows of the text are taken: {choices}. Default: spread, evenly from all of it.", CALIBRATION
    )
    variants: int | None = option(
        None,
        "Variants of each calibration window in which the dense model has drawn some tokens again; an epoch of "
        f"training sees one of them. Default: {BEST_VARIANTS} when pruning by method best, fewer where there would be "
        f"more than {MOST_WINDOWS} windows in all, else 0.",
        CALIBRATION, least=0,
    )  # fmt: skip
    seed: int | None = option(None, "Seed for windows random. Default: 0.", CALIBRATION, least=0)
    expert_tokens: ExpertTokens = option(
        "routed",
        "Which calibration tokens an expert is pruned by: {choices}. The stream stays the routed one.",
        CALIBRATION,
    )
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
    def keep_zeros(self) -> bool:
        return False

    @property
    def masks(self) -> str | None:
        return None

    @property
    def pack(self) -> bool:
        return False

    @property
    def permute(self) -> bool:
        return False

    @property
    def distillation(self) -> Distillation | None:
        return self._training(Distillation, self.distil)

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
        if is_text(self.calibration):
            problems += mistakes_of([lambda: check_text(self.calibration, self.split, self.column)])
        else:
            ids = "is for text; calibration token ids are taken as they are"
            if self.bos == "yes":
                problems.append(f"bos {ids}: put BOS in front of them")
            given = {"windows": self.windows, "split": self.split, "column": self.column}
            given |= {"documents": self.documents if self.documents == "separate" else None}
            problems += [f"{name} {ids}: leave {name} out" for name, value in given.items() if value is not None]
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

    @property
    def window_count(self) -> int:
        """Calibration windows; the least where a model is still to decide on the default."""
        return self.samples or LEAST_WINDOWS

    @property
    def variant_count(self) -> int:
        if self.variants is None:
            # With many windows of text they gain less and cost more.
            room = MOST_WINDOWS // self.window_count - 1
            return max(0, min(BEST_VARIANTS, room)) if self.method == "best" else 0
        return self.variants

    @property
    def all_windows(self) -> int:
        """Calibration windows with their variants."""
        return self.window_count * (1 + self.variant_count)

    def output_weighting(self) -> OutputWeighting:
        return self.output_weights or ("gradient" if self.method == "best" else "uniform")

    @property
    def propagated_share(self) -> float:
        if self.propagate is None:
            return BEST_PROPAGATE if self.method == "best" else 0.0
        return self.propagate

    @property
    def reconstruction(self) -> Reconstruction | None:
        default = BEST_EPOCHS if self.method == "best" else 0
        return self._training(Reconstruction, default if self.reconstruct is None else self.reconstruct)

    def _training(self, kind: type[T], given: T | int) -> T | None:
        """What is given, or this kind for so many epochs, which take as long as without variants; None for 0."""
        if not given:
            return None
        # The kinds have defaults of all settings but this one, and `Training` has not.
        found: T = given if isinstance(given, kind) else cast(Any, kind)(epochs=given)
        alone = not self.variant_count or found.epoch_windows is not None
        return found if alone else replace(found, epoch_windows=self.window_count)

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
            values["calibration"] = (
                f"{len(self.calibration)} documents"
                if is_text(self.calibration)
                else f"token ids of shape {list(np.shape(self.calibration))}"
            )
        return values


@dataclass(frozen=True)
class Recipe(PassRecipe):
    """How `prune_model` prunes.

    In Python, `penalty` may also be an object as in `prune_layer`. Without `bounds` a layer's sparsity lies in
    `default_bounds`; the total of an `allocation`, over the linears that are pruned, is exact. Patterns of linears: see
    `targets`; embeddings and heads are never pruned.

    With `keep_zeros` or `masks` the weights are chosen, and fitted, among the others only. A linear that has as many
    zeros as are asked for, or more, keeps its mask.
    """

    sparsity: float | None = option(
        None,
        "Fraction of zeros in every linear. Default: 0.5, that of the n:m pattern, or none beside zeros that stay.",
        WHAT,
        least=0,
        below=1,
    )
    pattern: str = option("unstructured", f"Which weights may stay: {KNOWN}.", WHAT, read=read_pattern)
    keep_zeros: bool = option(False, "Weights that are zero in the model stay zero.", WHAT)
    masks: str | None = option(
        None, "A pruned model of the same shape, given as the model is: weights that are zero in it become zero.", WHAT
    )
    targets: Patterns | None = option(
        None,
        "Which linears, by name (model.layers.0.mlp.down_proj), end of name (down_proj) or regular expression "
        "(re:.*mlp), with commas between. Default: all in the blocks.",
        WHAT,
        read=read_patterns,
    )
    ignore: Patterns | None = option(
        None, "Linears to leave out, given likewise; it wins over targets.", WHAT, read=read_patterns
    )
    sparsities: Sparsities | None = option(
        None,
        "Other sparsities by linear, as in down_proj=0.6,re:.*self_attn=0.4; 0 leaves a linear as it is. Names win "
        "over expressions, longer names over shorter ones, the first expression over the next.",
        WHAT, type=dict[str, float] | None, read=read_sparsities,
    )  # fmt: skip
    allocation: Allocation = option(
        "uniform",
        "How the sparsity is distributed over the layers: {choices}. With an n:m pattern and a sparsity below its own, "
        "curves chooses the linears that stay dense.",
        WHAT,
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
    permute: bool = option(
        False,
        "Reorder channels so that an n:m pattern keeps more; the dense model computes the same in that order.",
        WHAT,
    )
    pack: bool = option(False, "Store zeros as a bitmask; `sparseopt unpack` makes what transformers loads.", OUTPUT)

    def __post_init__(self) -> None:
        for name in ("targets", "ignore"):
            object.__setattr__(self, name, read_patterns(getattr(self, name)))
        if isinstance(self.sparsities, Mapping):
            object.__setattr__(self, "sparsities", tuple(self.sparsities.items()))
        if self.sparsity is None:
            implied = implied_sparsity(self.pattern)
            if implied is None or 0 <= implied < 1:
                default = 0.0 if self.has_support else 0.5
                object.__setattr__(self, "sparsity", default if implied is None else implied)

    @property
    def has_support(self) -> bool:
        """Whether some weights are known to be zero before a linear is solved."""
        return self.keep_zeros or self.masks is not None

    def find_method(self) -> LayerMethod:
        return find_method(self.method, self.preset, self.penalty, self.ridge, self.pattern)

    def _checks(self) -> Sequence[Check]:
        def allocated() -> None:
            check_allocation(self.allocation, self.pattern, self.sparsity, self.bounds)

        def anywhere() -> None:
            if self.penalty is not None and self.pattern != "unstructured":
                raise ValueError(f"a penalty chooses weights anywhere, which contradicts the pattern {self.pattern!r}")

        def by_linear() -> None:
            fits = partial(check_pattern, self.pattern)
            check_choice(self.targets, self.ignore, self.sparsities, fits, self.allocation)

        def permuted() -> None:
            if not self.permute:
                return
            if not implied_sparsity(self.pattern):
                raise ValueError(
                    f"permute is for n:m patterns with zeros, where the order of the inputs counts, and the pattern is "
                    f"{self.pattern!r}; leave it out"
                )
            others = {name: getattr(self, name) for name in ("keep_zeros", "masks", "targets", "ignore", "sparsities")}
            if given := [name for name, value in others.items() if value]:
                raise ValueError(f"permute moves channels of all linears, which contradicts {given[0]}: leave one out")

        # Some linears have the pattern's share and the others none.
        implied = implied_sparsity(self.pattern)
        chosen = implied is not None and self.allocation == "curves"
        return (
            ((), permuted),
            (("sparsity",), lambda: check_pattern(self.pattern, implied if chosen else self.sparsity)),
            (("allocation",), by_linear),
            (("allocation", "sparsity"), allocated),
            ((), anywhere),
        )


OPTIONS = options_of(Recipe)
Recipe.__doc__ = f"{Recipe.__doc__}\n{attributes(OPTIONS.values())}"


def described(value: Any) -> str:
    """An object as text, the same in every process: without addresses in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
