"""Two parts of `make bench-quality`, for any model: how far a figure depends on the calibration text and its windows.

    draws    every method at every setting, calibrated on random windows of WikiText-2, of another text, and of text
             that the model draws, in several draws, and scored on both texts; the dense model, also by transformers
    tokens   the same text and draw with 8 to 256 windows, each set part of the next, and the same held-out windows

The other text is Python's documentation, of which CPython holds a part. A pass prunes by one method, at all settings.
Passes are ordered so that an interrupted run has whole tables: every method on both texts for the first draw, then for
the next.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import (
    SEQLEN,
    SETTINGS,
    WINDOWS,
    Bench,
    calibration_windows,
    run_pass,
    say,
    transformers_perplexity,
    write_dense,
)

from sparseopt.models import open_model, open_source
from sparseopt.pruning import Recipe, perplexity
from sparseopt.pruning.text.windows import begin_windows, text_windows

TEXTS = ("wikitext2", "pydoc", "self")
ELSEWHERE = TEXTS[1]
DRAWS = (0, 1, 2)
METHODS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in ("magnitude", "wanda", "sparsegpt", "maiht", "admm", "admm_splice")},
    "admm ridge 0.1": {"method": "admm", "ridge": 0.1},
    "best one shot": {"method": "best", "train_epochs": 0},
    **{f"effort {name}": {"effort": name} for name in ("fast", "good", "most")},
    # Last, since its target depends on the others.
    "best": {"method": "best"},
}
# Reads no text, so one run stands for all texts and draws.
BLIND = "magnitude"
RIVALS = ("sparsegpt", "admm", "maiht")
DENSE_TOLERANCE = 1e-3

TOKEN_METHODS = ("wanda", "sparsegpt", "maiht", "admm", "best one shot", "best")
TOKEN_WINDOWS = (8, 16, 32, 64, 128, 256)
TOKEN_HELDOUT = 16


class Row(NamedTuple):
    """A recipe, the figure of its perplexity, and what distinguishes it from other rows of that figure."""

    figure: str
    recipe: Recipe
    details: dict[str, Any]


# The rows of each pass, by what is printed of it.
Passes = Mapping[str, Sequence[Row]]


def read_draws(given: str) -> tuple[int, ...]:
    """Seeds with commas between."""
    seeds = tuple(dict.fromkeys(int(part) for part in given.split(",") if part.strip().isdecimal()))
    if len(seeds) != len(given.split(",")):
        raise argparse.ArgumentTypeError(f"draws must be different whole numbers, such as 0,1,2, given {given!r}")
    return seeds


def bench_draws(bench: Bench, settings: list[str], texts: Sequence[str], draws: Sequence[int]) -> None:
    """All draws of the texts by all methods."""
    specifications = {"wikitext2": bench.data, ELSEWHERE: ELSEWHERE}
    own: dict[str, Any] = {"window_choice": None, "calibration": "self"}
    tokens = calibration_windows(min(WINDOWS, bench.windows or WINDOWS))
    passes: dict[str, list[Row]] = defaultdict(list)
    for draw in draws:
        for text in texts:
            for name, changes in METHODS.items():
                details: dict[str, Any] = {"calibrated": text, "draw": draw}
                if name == BLIND:
                    details = dict.fromkeys(details)
                    if (draw, text) != (draws[0], texts[0]):
                        continue
                named = {"window_choice": "random", "calibration": specifications.get(text)}
                drawn: dict[str, Any] = {"seed": draw, **(own if text == "self" else named)}
                for setting in settings:
                    figure = f"perplexity, draws, {name} at {setting}"
                    if bench.wants(name) and not bench.found(figure, **details):
                        recipe = Recipe(**SETTINGS[setting], **changes, **tokens, **drawn)
                        passes[f"draws, {text}, draw {draw}, {name}"].append(Row(figure, recipe, details))
    bench_dense(bench, specifications)
    run_passes(bench, passes)


def bench_dense(bench: Bench, texts: Mapping[str, str]) -> None:
    """The dense model on both texts, by this package and, from a folder that it wrote, by transformers."""
    figure = "perplexity, draws, dense"
    if bench.found(figure):
        return
    model = open_model(bench.source)
    scores: list[float] = []
    peers: list[float | None] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "dense"
        write_dense(bench.source, folder)
        for specification in texts.values():
            ids, bos = text_windows(model.source, specification, "evaluation", *bench.scoring)
            scores.append(perplexity(model, ids, bos=bos))
            peers.append(transformers_perplexity(folder, ids, bos))
    off = [abs(score / peer - 1) for score, peer in zip(scores, peers, strict=True) if peer is not None]
    met = all(each <= DENSE_TOLERANCE for each in off) if off else None
    bench.emit(
        figure, scores[0], "perplexity", (f"within {DENSE_TOLERANCE:.1%} of transformers", met), bos=bos,
        transformers_perplexity=peers[0], elsewhere=ELSEWHERE, perplexity_elsewhere=scores[1],
        transformers_perplexity_elsewhere=peers[1],
    )  # fmt: skip


def bench_tokens(bench: Bench, settings: list[str], draws: Sequence[int]) -> None:
    """Growing sets of windows of the first draw."""
    draw, most = draws[0], bench.windows or TOKEN_WINDOWS[-1]
    counts = sorted({min(count, most) for count in TOKEN_WINDOWS})
    held = min(TOKEN_HELDOUT, most)
    found = text_windows(
        open_source(bench.source), bench.data, "calibration", held + counts[-1], SEQLEN, choice="random", seed=draw
    )
    heldout, windows = np.split(begin_windows(*found), [held])
    passes: dict[str, list[Row]] = defaultdict(list)
    for count in counts:
        ids = np.concatenate([windows[:count], heldout])
        details = {"calibrated": "wikitext2", "draw": draw, "calibration_tokens": count * SEQLEN}
        for name in filter(bench.wants, TOKEN_METHODS):
            for setting in settings:
                figure = f"perplexity, tokens, {name} at {setting}"
                if not bench.found(figure, **details):
                    recipe = Recipe(
                        **SETTINGS[setting], **METHODS[name],
                        windows=count, heldout_windows=held, seqlen=SEQLEN, calibration=ids,
                    )  # fmt: skip
                    passes[f"tokens, {count * SEQLEN:,}, {name}"].append(Row(figure, recipe, details))
    run_passes(bench, passes)


def run_passes(bench: Bench, passes: Passes) -> None:
    """Say which passes there are, then run them in turn."""
    for label, rows in passes.items():
        say(f"{label} at {', '.join(row.figure.rpartition(' at ')[2] for row in rows)}")
    say(f"{len(passes)} passes" if passes else "nothing to run")
    for label, rows in passes.items():
        by_setting = {row.figure.rpartition(" at ")[2]: row for row in rows}
        recipes = {setting: row.recipe for setting, row in by_setting.items()}
        for setting, result in run_pass(bench.source, recipes, bench.data, bench.scoring, label, ELSEWHERE):
            figure, _, details = by_setting[setting]
            if isinstance(result, Exception):
                bench.fail(figure, result, **details)
                continue
            bench.emit_run(
                figure, result, target_of(bench, figure, result, details), details["calibrated"] or "wikitext2",
                elsewhere=ELSEWHERE, perplexity_elsewhere=result["perplexity_elsewhere"], **details,
            )  # fmt: skip


def target_of(
    bench: Bench, figure: str, result: Mapping[str, Any], details: Mapping[str, Any]
) -> tuple[str, bool | None]:
    """The target of method best in the part draws, and whether it was met; none without the rivals' rows."""
    start, _, setting = figure.rpartition(" at ")
    found = [bench.found(f"perplexity, draws, {rival} at {setting}", **details) for rival in RIVALS]
    rivals = [line for line in found if line is not None]
    if start != "perplexity, draws, best" or len(rivals) < len(RIVALS):
        return "none", None
    own = (result["perplexity"], result["perplexity_elsewhere"])
    met = all(own[0] < line["value"] and own[1] < line["perplexity_elsewhere"] for line in rivals)
    return f"below {', '.join(RIVALS)} on both texts", met
