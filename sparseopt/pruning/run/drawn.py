"""Calibration by the model itself: windows of text that the dense model draws.

They need no data, and are in every language that the model writes. What a model draws depends on the machine, so the
tokens are stored in the run's folder, from which it resumes, and in the user's cache for further runs.

Source: Williams, Chrysostomou, Aletras, "Self-calibration for language model quantization and pruning", 2025.
"""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.core.base.types import Observer
from sparseopt.models import LoadedModel, ModelError, PrunableModel, check_window, load_tokenizer, start_token
from sparseopt.models.decoder.cached_decoding import COOLING, HOTTEST, draw_texts, kept_bytes
from sparseopt.pruning.recipe.pass_recipe import PassRecipe
from sparseopt.pruning.run.calibration import CalibrationWindows
from sparseopt.pruning.run.plan import Plan
from sparseopt.pruning.run.resumption import Identity, state_in
from sparseopt.pruning.text.windows import begin_windows, scored_windows
from sparseopt.system import processes
from sparseopt.system.files import write_whole
from sparseopt.system.machine import format_bytes, working_memory_bytes
from sparseopt.system.programs import cache_folder, trim
from sparseopt.system.run_folder import DRAWN, State

# A window is made of texts of about this many tokens: more texts differ more, and short ones need less time. SmolLM2 at
# 50 %, effort good, 16 windows of 512 tokens, on WikiText-2: 53.6 with whole windows, 50.8 with two texts in each.
TEXT = 256
# Texts that are drawn at a time: with fewer the products are slow, with more the keys and values need memory.
BATCH = 64
SIZE_LIMIT = 2**26  # bytes of all draws in the cache


def drawn_windows(
    model: PrunableModel, plan: Plan, identity: Identity, budget: int | None, observer: Observer
) -> CalibrationWindows:
    """The windows of a run with calibration "self": stored in its folder or in the user's cache, or newly drawn.

    Args:
        model: the dense model.
        plan: the plan, with a claimed folder and a recipe that gives the number of windows.
        identity: identity of the model.
        budget: bytes of memory that the run may use; None for the machine's available memory.
        observer: called with ("drawing text, token", tokens of each text drawn, tokens of each text).

    Raises:
        ModelError: before any work, if the model has no decoder here or does not fit in memory.
        FolderError: if the folder holds another run.
    """
    recipe = plan.recipe
    check_window(recipe.seqlen, model.config.max_positions)
    bos = start_token(model.source, load_tokenizer(model.source), recipe.bos)
    ids = None
    if processes.is_first():
        if state_in(identity, plan) is not State.NEW:
            ids = _read(plan.folder / DRAWN, _shape(recipe))
        if ids is None:
            ids = _cached(model, recipe, bos, identity, budget, observer)
    told = processes.told(None if ids is None else ids.tolist())
    ends = np.cumsum([recipe.window_count, recipe.heldout_windows])
    calibration, heldout, scored = np.split(np.asarray(told, np.int32), ends)
    return CalibrationWindows(calibration, heldout, scored, bos)


def keep_drawn(plan: Plan, windows: CalibrationWindows) -> None:
    """Write the windows into the folder of a run that has begun, unless they are there."""
    file = plan.folder / DRAWN
    if processes.is_first() and not file.is_file():
        _write(file, np.concatenate(windows[:3]))


def _cached(
    model: Any,
    recipe: PassRecipe,
    bos: int | None,
    identity: Identity,
    budget: int | None,
    observer: Observer,
) -> np.ndarray:
    """The windows from the user's cache, drawn if they are not there yet."""
    start, cache, shape = _first_token(model, bos), cache_folder() / "drawn", _shape(recipe)
    count, length = _texts(recipe)
    draw = [recipe.seed or 0, *shape, length, start, bos, HOTTEST, COOLING]
    decided = {**identity.of(recipe), "recipe": None, "draw": draw}
    file = cache / f"{hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:32]}.json"
    if (ids := _read(file, shape)) is not None:
        return ids
    check_memory(model, recipe, budget)
    drawn = list[np.ndarray]()
    draws: Any = model.draw if isinstance(model, LoadedModel) else partial(draw_texts, model.decoder())
    batches = np.array_split(np.arange(count), -(-count // BATCH))

    def told(stage: str, done: int, total: int) -> None:
        observer("drawing text, token", len(drawn) * total + done, len(batches) * total)

    for number, batch in enumerate(batches):
        seed = (recipe.seed or 0) * 1_000_003 + number
        drawn.append(draws(len(batch), length, start, seed=seed, observer=told))
    # Stored as the model reads them, so that stored windows never begin with BOS twice.
    ids = begin_windows(np.concatenate(drawn).reshape(shape[0], -1)[:, : shape[1]], bos)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _write(file, ids)
        trim(cache, SIZE_LIMIT)
    except OSError:
        # The folder of the run has them too.
        pass
    return ids


def drawing_bytes(model: Any, recipe: PassRecipe) -> dict[str, int]:
    """Bytes needed while the windows of a recipe are drawn, by content."""
    if isinstance(model, LoadedModel):
        return {"model": model.nbytes}
    count, length = _texts(recipe)
    return {"model": model.decoder_bytes(), "keys and values": kept_bytes(model.config, min(count, BATCH), length)}


def _shape(recipe: PassRecipe) -> tuple[int, int]:
    """The shape of all windows together: for calibration, held out, and to score."""
    return recipe.window_count + recipe.heldout_windows + scored_windows(recipe.window_count), recipe.seqlen


def _texts(recipe: PassRecipe) -> tuple[int, int]:
    """How many texts make the windows of a recipe, and how long each is."""
    windows, length = _shape(recipe)
    parts = max(1, round(length / TEXT))
    return windows * parts, -(-length // parts)


def _first_token(model: PrunableModel, bos: int | None) -> int:
    """The token before the first one: BOS, used or not, else the end token."""
    config = model.source.config
    ends = config.get("eos_token_id")
    candidates = (bos, config.get("bos_token_id"), *(ends if isinstance(ends, list) else [ends]))
    start = next((token for token in candidates if token is not None), None)
    if start is None:
        raise ModelError(
            f"{model.source.name} has neither a BOS nor an end token, after which it could begin a text: give a text "
            "to calibrate on, as in calibration='file:PATH'"
        )
    return int(start)


def check_memory(model: PrunableModel, recipe: PassRecipe, budget: int | None) -> None:
    """Raise an error if the model to draw with does not fit in memory."""
    other = "give a text to calibrate on, as in calibration='file:PATH' or 'hf:OWNER/NAME' ('pydoc' is always at hand)"
    needed = sum(drawing_bytes(model, recipe).values())
    limit = working_memory_bytes() if budget is None else budget
    if needed > limit:
        raise ModelError(
            f"calibration 'self' is text that the model draws, which needs all of it in memory, {format_bytes(needed)}"
            f", and there are {format_bytes(limit)}: {other}, or more memory"
        )


def _write(file: Path, ids: np.ndarray) -> None:
    write_whole(file, json.dumps(ids.tolist()) + "\n")


def _read(file: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The windows in a file; None if it has none of this shape."""
    try:
        ids = np.asarray(json.loads(file.read_text()), np.int32)
    except (OSError, ValueError, TypeError, OverflowError, RecursionError):
        return None
    return ids if ids.shape == shape else None
