"""Tasks of lm-eval on dense, pruned, smaller and quantised models: `make bench-tasks DATA=folder FILES=folder`.

    python benchmarks/bench_tasks.py --data FOLDER --files FOLDER [--source MODEL] [--only NAME,...] [--items TIMES]

FILES has `arc_easy.json` and `piqa.json`, the test sets of AGI-Edgerunners/LLM-Adapters, and a folder `blimp` with the
files of alexwarstadt/blimp. DATA has the WikiText-2 parquet files. One JSON line for each model and task: its value is
the accuracy on the first `items`, `error` the standard error, `normalised` and `normalised_error` those of answers
compared by length, and `seconds` include reading the files. A line for each model has its perplexity on the first
8 x 1024 test tokens. Models that are in the folder of --folder are not made again; --items multiplies the items.
"""

from functools import partial
from pathlib import Path
from typing import Any

from common import emit, environment, say, selection, timed
from pruned import about, model_and_text, text_options

from sparseopt.models import open_model
from sparseopt.pruning import Recipe, ShrinkRecipe, perplexity, prune_model
from sparseopt.pruning.text.windows import text_windows

CALIBRATION: dict[str, Any] = {"window_choice": "first", "windows": 32, "score": "none"}
DENSE = "dense"
MODELS: dict[str, Any] = {
    "half zeros, wanda": Recipe(method="wanda"),
    "half zeros, good": Recipe(),
    "2:4, wanda": Recipe(method="wanda", pattern="2:4"),
    "2:4, fast": Recipe(effort="fast", pattern="2:4"),
    "0.75 of the channels, fast": ShrinkRecipe(effort="fast", channels=0.75),
    "q4_0, fast": Recipe(effort="fast", sparsity=0.0, bits="q4_0"),
}
# Of each task, or of each of BLiMP's 67.
ITEMS = {"arc_easy": 120, "piqa": 120, "blimp": 15}
BLIMP = 67


def made(source: Path, data: str, place: Path, name: str) -> Path:
    """The model of a name, made unless it is there."""
    if name == DENSE:
        return source
    recipe = MODELS[name].model_copy(update=CALIBRATION | {"calibration": data})
    output = place / name.replace(" ", "-").replace(",", "").replace(":", "-")
    return prune_model(source, output / "model.gguf" if recipe.bits else output, recipe).output


def main() -> None:
    parser = text_options(__doc__)
    parser.add_argument("--files", type=Path, required=True, help="folder of task files")
    parser.add_argument("--folder", type=Path, default=Path("build/tasks"), help="folder of the models")
    parser.add_argument("--items", type=float, default=1, help="multiplies the number of items")
    selection(parser, "--only", [DENSE, *MODELS])
    given = parser.parse_args()
    source, data = model_and_text(given, "bench_tasks")
    from sparseopt.pruning.evaluate.zero_shot import load_tasks, zero_shot

    tasks = {name: f"{name}={given.files / name}{'' if name == 'blimp' else '.json'}" for name in ITEMS}
    limits = {name: max(1, round(given.items * count)) for name, count in ITEMS.items()}
    for name, task in tasks.items():
        load_tasks([task], limits[name])
    for name in given.only:
        say(name)
        model = open_model(made(source, data, given.folder / source.name, name))
        ids, bos = text_windows(model.source, data, "evaluation", 8, 1024)
        told = {"of": name, **about(source, given.items != 1), **environment()}
        emit(f"perplexity, {name}", value=perplexity(model, ids, bos=bos), unit="perplexity", **told)
        for task, limit in limits.items():
            run = timed(partial(zero_shot, model, [tasks[task]], limit=limit))
            found = run.result["tasks"][task]["metrics"]
            normal = {"normalised": found.get("acc_norm"), "normalised_error": found.get("acc_norm_stderr")}
            emit(
                f"accuracy, {task}, {name}", value=found["acc"], error=found["acc_stderr"], **normal, unit="accuracy",
                items=limit * (BLIMP if task == "blimp" else 1), seconds=run.seconds, cpu_seconds=run.cpu_seconds,
                lm_eval=run.result["lm_eval"], **told,
            )  # fmt: skip


if __name__ == "__main__":
    main()
