"""The tokens that the runs of one pass use: windows for calibration, held-out windows, and windows to score."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from sparseopt.models import PrunableModel, check_window
from sparseopt.pruning.base.records import Calibration
from sparseopt.pruning.recipe.pass_recipe import (
    LEAST_WINDOWS,
    MOST_WINDOWS,
    TOKENS_AN_INPUT,
    PassRecipe,
    scored_windows,
)
from sparseopt.pruning.run.plan import Plan
from sparseopt.pruning.text.chats import TextError, is_text
from sparseopt.pruning.text.documents import part_of_text
from sparseopt.pruning.text.windows import begin_windows, check_vocabulary, text_windows, token_array, token_digest

OWN = "text of its own"

# Recipes that share a pass must agree on these.
PASS_FIELDS = (
    "windows", "seqlen", "heldout_windows", "window_choice", "seed", "bos", "calibration", "split", "column",
    "documents", "precision", "score",
)  # fmt: skip


def check_same_calibration(recipes: Sequence[PassRecipe]) -> None:
    """Raise a `ValueError` that names the differences if recipes of one pass would not use the same stream."""
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
    """The plans of a pass with the number of windows filled in, which recipes may leave open."""
    return [dataclasses.replace(plan, recipe=plan.recipe.model_copy(update={"windows": samples})) for plan in plans]


class CalibrationWindows(NamedTuple):
    """The token ids that a pass reads, `[windows, seqlen]` int32.

    Attributes:
        calibration: windows to prune with.
        heldout: windows for the held-out error, and to decide when training ends.
        scored: further windows that the model drew, for its perplexity; none for a text.
        bos: begins each window; None for none.
    """

    calibration: np.ndarray
    heldout: np.ndarray
    scored: np.ndarray
    bos: int | None


def default_windows(model: PrunableModel, seqlen: int) -> int:
    """The default number of calibration windows of `seqlen` tokens for a model.

    The number depends on the model alone, so that a run resumes with the same one on any machine; activations that do
    not fit in memory go to disk.
    """
    return min(MOST_WINDOWS, max(LEAST_WINDOWS, -(-TOKENS_AN_INPUT * _widest(model) // seqlen)))


def _widest(model: PrunableModel, keys: Collection[str] = ()) -> int:
    """The largest number of inputs of a layer in the model's blocks, or among the given keys, if any."""
    return max(model.weight_shape(key)[1] for key in keys or model.linear_keys())


def calibration_windows(model: PrunableModel, recipe: PassRecipe) -> CalibrationWindows:
    """Calibration and held-out windows of a text or of token ids; held-out text follows the calibration text.

    Without a number in the recipe there are `default_windows`, or fewer if the text is too short, but at least 16.

    Raises:
        TextError: if the text is too short, or token ids do not fit.
        ModelError: if windows are longer than the model supports, or the tokenizer has no BOS that is asked for.
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


def describe_calibration(model: PrunableModel, plans: Sequence[Plan], windows: CalibrationWindows) -> list[Calibration]:
    """What the report of each plan of a pass says about its tokens."""
    (samples, seqlen), recipe, found = windows.calibration.shape, plans[0].recipe, []
    why = None
    if recipe.windows is None and is_text(recipe.calibration):
        why = (
            f"{TOKENS_AN_INPUT} tokens for each of the {_widest(model):,} inputs of the widest layer, in "
            f"{LEAST_WINDOWS} to {MOST_WINDOWS} windows"
        )
        if samples < default_windows(model, seqlen):
            why += "; the text has no more"
    digest, heldout = token_digest(*windows[:2]), len(windows.heldout)
    for plan in with_windows(plans, samples):
        variants, warning = plan.recipe.variants, None
        inputs = _widest(model, plan.patterns)
        if (tokens := samples * (1 + variants) * seqlen) < inputs and plan.patterns:
            warning = (
                f"calibration has {tokens:,} tokens and the widest layer {inputs:,} inputs: its Gram matrix is "
                f"singular; {-(-inputs // seqlen)} windows of {seqlen} or more would be enough"
            )
        found.append(Calibration(samples, variants, heldout, seqlen, digest, inputs, why, warning))
    return found


class Sample(NamedTuple):
    """Windows to score, without BOS, and the BOS that each should begin with; None for none."""

    text: str
    ids: np.ndarray
    bos: int | None


def drawn_sample(windows: CalibrationWindows) -> Sample:
    """The windows that the model drew to be scored. They begin with BOS, and `perplexity` puts it there."""
    ids = windows.scored if windows.bos is None else np.roll(windows.scored, -1, axis=1)
    return Sample(OWN, ids, windows.bos)


def samples_to_score(model: PrunableModel, recipe: PassRecipe, length: int) -> list[Sample]:
    """The texts on which the perplexity before and after is measured: the recipe's `score`, or its default.

    A default text that is too short is left out, and token ids leave no text.

    Raises:
        TextError: if `score` cannot be read or is too short for a window of this length.
        ModelError: if the model has fewer positions.
    """
    check_window(length, model.config.max_positions)

    def read(text: str, **reading: str | None) -> Sample:
        found = text_windows(
            model.source, text, "evaluation", scored_windows(recipe), length,
            bos=recipe.bos, documents=recipe.documents, least=1, **reading,  # type: ignore[arg-type]
        )  # fmt: skip
        return Sample(part_of_text(text, "evaluation", reading.get("split")), *found)

    if recipe.score is not None:
        return [] if recipe.score == "none" else [read(recipe.score)]
    try:
        if recipe.draws:
            return [read("pydoc")]
        own = isinstance(recipe.calibration, str)
        return [read(recipe.calibration, split=recipe.split, column=recipe.column)] if own else []
    except TextError:
        return []
