"""The tokens that a run uses: windows for calibration, held-out windows, and windows to score."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sparseopt.models import PrunableModel, check_window
from sparseopt.pruning.base.records import Calibration
from sparseopt.pruning.recipe.pass_recipe import PassRecipe
from sparseopt.pruning.run.plan import Plan
from sparseopt.pruning.text.chats import TextError, is_text
from sparseopt.pruning.text.documents import part_of_text
from sparseopt.pruning.text.mix import divided, sources_of
from sparseopt.pruning.text.windows import (
    LEAST_WINDOWS,
    begin_windows,
    check_vocabulary,
    count_help,
    default_windows,
    scored_windows,
    text_windows,
    token_array,
    token_digest,
    widest_input,
)

OWN = "text of its own"


def with_windows(plan: Plan, samples: int) -> Plan:
    """The plan with the number of windows filled in, which its recipe may leave open."""
    return dataclasses.replace(plan, recipe=plan.recipe.model_copy(update={"windows": samples}))


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


def calibration_windows(model: PrunableModel, recipe: PassRecipe) -> CalibrationWindows:
    """Calibration and held-out windows of a text or of token ids; held-out text follows the calibration text.

    In a mix each text is drawn as if it were alone, and has its share of the held-out windows.

    Without a number in the recipe there are `default_windows`, or fewer if the text is too short, but at least 16.

    Raises:
        TextError: if the text is too short, or token ids do not fit.
        ModelError: if windows are longer than the model supports, or the tokenizer has no BOS that is asked for.
    """
    bos, heldout = None, recipe.heldout_windows
    if is_text(recipe.calibration):
        check_window(recipe.seqlen, model.config.max_positions)
        pieces, sources = list[list[np.ndarray]](), sources_of(recipe.calibration)
        for (text, own), rest in zip(sources, divided(heldout, sources), strict=True):
            count = own or recipe.windows or default_windows(model, recipe.seqlen, recipe.window_factor)
            found = text_windows(
                model.source, text, "calibration", count + rest, recipe.seqlen,
                bos=recipe.bos, choice=recipe.chosen_window_choice, seed=recipe.seed or 0, split=recipe.split,
                column=recipe.column, documents=recipe.documents, least=(own or recipe.windows or LEAST_WINDOWS) + rest,
            )  # fmt: skip
            pieces.append(np.split(begin_windows(*found), [len(found.ids) - rest]))
            bos = found.bos
        windows = np.concatenate([each for part in zip(*pieces, strict=True) for each in part])
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


def describe_calibration(model: PrunableModel, plan: Plan, windows: CalibrationWindows, given: bool) -> Calibration:
    """What a report says about its tokens; `given` says whether the number of windows was given."""
    (samples, seqlen), recipe, why, warning = windows.calibration.shape, plan.recipe, None, None
    if not given and is_text(recipe.calibration):
        factor = plan.recipe.window_factor
        why = count_help(f"of the {widest_input(model):,} inputs", factor)
        if samples < default_windows(model, seqlen, factor):
            why += "; the text has no more"
    inputs = widest_input(model, plan.patterns)
    if (tokens := samples * seqlen) < inputs and plan.patterns:
        warning = (
            f"calibration has {tokens:,} tokens and the widest layer {inputs:,} inputs: its Gram matrix is "
            f"singular; {-(-inputs // seqlen)} windows of {seqlen} or more would be enough"
        )
    digest = token_digest(*windows[:2])
    return Calibration(samples, len(windows.heldout), seqlen, digest, inputs, why, warning)


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

    A default text that is too short is left out, and token ids leave no text. A mix leaves each of its texts.

    Raises:
        TextError: if `score` cannot be read or is too short for a window of this length.
        ModelError: if the model has fewer positions.
    """
    check_window(length, model.config.max_positions)

    def read(text: str, count: int = recipe.window_count, **reading: str | None) -> Sample:
        found = text_windows(
            model.source, text, "evaluation", scored_windows(count), length,
            bos=recipe.bos, documents=recipe.documents, least=1, **reading,  # type: ignore[arg-type]
        )  # fmt: skip
        return Sample(part_of_text(text, "evaluation", reading.get("split")), *found)

    if recipe.score is not None:
        return [] if recipe.score == "none" else [read(recipe.score)]
    found, reading = list[Sample](), {} if recipe.draws else {"split": recipe.split, "column": recipe.column}
    for text, count in sources_of("pydoc" if recipe.draws else recipe.calibration):
        with contextlib.suppress(TextError):
            found += [read(text, count or recipe.window_count, **reading)] if isinstance(text, str) else []
    return found


def choose_tokens(
    model: PrunableModel, plan: Plan, draw: Callable[[Plan], CalibrationWindows]
) -> tuple[Plan, CalibrationWindows, Calibration, list[Sample]]:
    """The plan with its number of windows, its windows, what a report says about them, and the texts to score.

    `draw` returns windows for a plan whose model draws its text. Errors are as in `calibration_windows` and
    `samples_to_score`.
    """
    recipe = plan.recipe
    if recipe.get("only_vocabulary"):
        none = np.zeros((0, recipe.seqlen), np.int32)
        windows = CalibrationWindows(none, none, none, None)
        return plan, windows, describe_calibration(model, plan, windows, given=True), []
    if recipe.draws:
        plan = with_windows(plan, recipe.windows or default_windows(model, recipe.seqlen, recipe.window_factor))
        # What cannot be scored ends the run before minutes of drawing.
        samples = samples_to_score(model, plan.recipe, recipe.seqlen)
        windows = draw(plan)
        samples = [drawn_sample(windows), *samples] if recipe.score is None else samples
    else:
        windows = calibration_windows(model, recipe)
        plan = with_windows(plan, len(windows.calibration))
        samples = samples_to_score(model, plan.recipe, windows.calibration.shape[1])
    return plan, windows, describe_calibration(model, plan, windows, recipe.windows is not None), samples
