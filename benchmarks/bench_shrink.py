"""Quality of smaller dense models as JSON lines: `make bench-shrink DATA=folder` with the WikiText-2 parquet files.

    sizes       what goes: channels, blocks, key-value groups, and a mix under a budget of parameters; each without
                training, with trained blocks, and trained on the dense model's logits after that
    methods     75 % and 50 % of the channels, chosen and fitted by each method, without training
    windows     calibration windows from the start of the text and spread over it, to shrink and to prune

`--only sizes,windows` selects, and `--sizes` and `--without-logits` the rows of
the first part. All rows calibrate on 16 x 512 validation tokens, with four held-out windows, and are
scored on the first 8 x 1024 test tokens, by this package and by transformers from the folder written. A failed row
becomes a line with its error, the other rows continue, and the exit status is 1.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common import Bench, judged, model_and_text, names_of, run_pass, say, text_parser

from sparseopt.models import bundled_model, open_model
from sparseopt.pruning import Recipe, ShrinkRecipe, perplexity
from sparseopt.pruning.recipe.pass_recipe import PassRecipe
from sparseopt.pruning.text.windows import text_windows

KEPT = (
    "shape", "distilled", "transformers_perplexity", "mean_relative_error", "mean_heldout_error", "survey_seconds",
    "solver_seconds", "reconstruction_seconds", "compile_seconds", "stored_bytes",
)  # fmt: skip
# What stays, by name, and the perplexity to reach with SmolLM2-135M-Instruct.
SIZES: dict[str, tuple[dict[str, float], float]] = {
    "1280 channels": ({"channels": 0.8333}, 39.0),
    "channels 0.75": ({"channels": 0.75}, 45.0),
    "channels 0.5": ({"channels": 0.5}, 68.0),
    "28 blocks": ({"layers": 0.9333}, 37.0),
    "layers 0.8": ({"layers": 0.8}, 57.0),
    "2 of 3 key-value groups": ({"heads": 0.6667}, 38.0),
    "parameters 0.852": ({"parameters": 0.852}, 43.0),
}
TRAININGS: dict[str, dict[str, Any]] = {
    "one shot": {"train_epochs": 0},
    "trained blocks": {},
    "trained blocks, then logits": {"distil_epochs": 4},
}
METHODS = ("best", "splice", "admm", "maiht", "wanda", "flap", "magnitude")
TOKENS: dict[str, Any] = {"windows": 16, "heldout_windows": 4, "seqlen": 512, "window_choice": "first"}
TEST = (8, 1024)


def recipe(bench: Bench, **changes: Any) -> ShrinkRecipe:
    """A recipe with the calibration of all rows."""
    return ShrinkRecipe(calibration=bench.data, **(TOKENS | changes))


def run_rows(bench: Bench, part: str, recipes: Mapping[str, PassRecipe], goals: Mapping[str, float]) -> None:
    """One line a recipe; all share a pass, whose seconds and memory each line has."""
    for name, row in run_pass(bench.source, recipes, bench.data, TEST, part):
        figure = f"perplexity, {part}, {name}"
        if isinstance(row, Exception):
            bench.fail(figure, row)
            continue
        bench.emit(
            figure, row["perplexity"], "perplexity", judged(row["perplexity"], goals.get(name)),
            **{key: row.get(key) for key in KEPT}, pass_seconds=row["seconds"], pass_plans=row["plans"],
            pass_peak_memory_bytes=row["peak_memory_bytes"], recipe=row["recipe"] | {"calibration": "wikitext2"},
            evaluation=f"first {TEST[0]} x {TEST[1]} test tokens",
        )  # fmt: skip


def bench_sizes(bench: Bench, sizes: Sequence[str], trainings: Sequence[str]) -> None:
    """Sizes with trainings; a goal is for the last training, of the bundled model."""
    model = open_model(bench.source)
    ids, bos = text_windows(model.source, bench.data, "evaluation", *TEST)
    bench.emit("perplexity, sizes, dense", perplexity(model, ids, bos=bos), "perplexity", ("none", None))
    has_goals, last = bench.source == bundled_model(), list(TRAININGS)[-1]
    for size in sizes:
        shares, goal = SIZES[size]
        rows = {f"{size}, {name}": recipe(bench, **shares, **TRAININGS[name]) for name in trainings}
        run_rows(bench, "sizes", rows, {f"{size}, {last}": goal} if has_goals else {})


def bench_methods(bench: Bench) -> None:
    """How channels are chosen and fitted."""
    rows = {
        f"{method}, {share:g} of the channels": recipe(bench, channels=share, method=method, train_epochs=0)
        for share in (0.75, 0.5)
        for method in METHODS
    }
    run_rows(bench, "methods", rows, {})


def bench_windows(bench: Bench) -> None:
    """The choice of the calibration windows: shrinking without training, and pruning."""
    for choice in ("first", "spread"):
        small = recipe(bench, channels=0.75, train_epochs=0, window_choice=choice)
        rows: dict[str, PassRecipe] = {f"channels 0.75, {choice}": small}
        for method in ("wanda", "sparsegpt", "maiht"):
            pruned = Recipe(method=method, sparsity=0.5, calibration=bench.data, **(TOKENS | {"window_choice": choice}))
            rows[f"{method} at 0.5, {choice}"] = pruned
        run_rows(bench, "windows", rows, {})


PARTS: dict[str, Callable[..., None]] = {"sizes": bench_sizes, "methods": bench_methods, "windows": bench_windows}


def main() -> None:
    """Run the selected parts."""
    parser = text_parser(__doc__)
    parser.add_argument("--only", type=names_of(PARTS), default=list(PARTS), help=f"comma-separated: {','.join(PARTS)}")
    parser.add_argument(
        "--sizes", type=names_of(SIZES), default=list(SIZES), help=f"comma-separated: {','.join(SIZES)}"
    )
    parser.add_argument("--without-logits", action="store_true", help="leave out the last training, the longest")
    arguments = parser.parse_args()
    source, data = model_and_text(arguments, "bench_shrink")
    bench = Bench(source, data, layers=None, windows=None, reduced=False)
    trainings = list(TRAININGS)[:-1] if arguments.without_logits else list(TRAININGS)
    for name in arguments.only:
        PARTS[name](bench, **({"sizes": arguments.sizes, "trainings": trainings} if name == "sizes" else {}))
    say(f"done, {bench.failures} failed rows")
    sys.exit(1 if bench.failures else 0)


if __name__ == "__main__":
    main()
