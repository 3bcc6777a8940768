"""Quality figures as JSON lines: `make bench-quality DATA=folder` with the WikiText-2 parquet files.

    layers      every method on twelve layers, Gram matrices of the dense model: error in float64, seconds
    models      every method on the whole model: perplexity, layer errors, seconds, memory; also published figures
    ablation    changes to the recipe of method best: perplexity and additional seconds
    complete    method best with all that lowers its perplexity, one-shot and trained, on the first windows and on
                spread ones
    draws       every method on the whole model, calibrated on random windows of two texts, scored on both
    tokens      perplexity and held-out error against the number of calibration tokens, at 50 %

The first four are about SmolLM2; with `--model gemma3-270m` or `--source` only the other two run by default. `--only
layers,ablation`, `--settings 0.5,2:4`, `--methods best,admm`, `--texts pydoc` and `--draws 0,1` select. With
`--record FILE` lines are also appended to a file, and rows that it has are not run again. Every line gives the run,
machine, versions, target, and whether the target was met. A failed row becomes a line with its error, the other rows
continue, and the exit status is 1. The recipes of a pass run in a separate process, whose peak memory is reported.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from common import (
    SEQLEN,
    SETTINGS,
    WINDOWS,
    Bench,
    calibration_windows,
    judged,
    model_and_text,
    names_of,
    preset_of,
    run_pass,
    say,
    text_parser,
)
from quality_draws import DRAWS, METHODS, TEXTS, bench_draws, bench_tokens, read_draws

from sparseopt.models import open_model
from sparseopt.pruning import Recipe, prune_layer
from sparseopt.pruning.base.activations import make_batches
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.text.windows import WindowChoice, begin_windows, text_windows

BASE = "best"
# The smallest error of a layer; the first records call it "best".
THOROUGH = "admm_splice"
# One-shot and uniform, whatever the defaults of a method; rows override this.
PLAIN: dict[str, Any] = {"allocation": "uniform", "train_epochs": 0, "variants": 0}
# Changes to a plain recipe of method best; those in one row apply together.
ABLATION: dict[str, dict[str, Any]] = {
    BASE: {},
    "output weights uniform": {"output_weights": "uniform"},
    "weighting residual": {"weighting": "residual"},
    "ridge 0.01": {"ridge": 0.01},
    "propagate 0": {"propagate": 0},
    "+ allocation owl": {"allocation": "owl"},
    "+ allocation curves": {"allocation": "curves"},
    "+ variants 3": {"variants": 3},
    "+ reconstruct 4": {"train_epochs": 4},
    "+ allocation curves + reconstruct 4": {"allocation": "curves", "train_epochs": 4},
}
ABLATION_SETTINGS = ("0.5", "0.7")
ABLATION_TARGETS = {"+ allocation curves + reconstruct 4": {"0.5": 46.0, "0.7": 105.0}}

# Zeros go where they cost least: to the linears by curves, in n:m groups by the order of the channels.
PLACED: dict[str, dict[str, Any]] = {
    "2:4": {"permute": True},
    **{setting: {"allocation": "curves"} for setting in ("0.5", "0.6", "0.7")},
}
COMPLETE: dict[str, dict[str, Any]] = {"trained": {"distil_epochs": 4}, "one shot": {"train_epochs": 0}}
COMPLETE_TARGETS = {
    "one shot": {"0.7": 95.0, "2:4": 72.0},
    "trained": {"0.5": 38.5, "0.6": 50.0, "0.7": 68.0, "2:4": 58.0},
}
COMPLETE_SECONDS = 20 * 60

# A preset follows the name. The most thorough method is last, since its target depends on the others.
LAYER_METHODS = ("magnitude", "wanda", "sparsegpt", "splice", "admm", "maiht paper", "maiht tuned", BASE, THOROUGH)
LAYER_SETTINGS = ("0.5", "0.7", "2:4")
BLOCKS = (0, 9, 20)
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
LAYER_WINDOWS = 24
MEAN_TARGET = 0.00265
# Of ALPS (Meng et al., 2024), on the same layers and tokens.
ALPS_SECONDS = 145.0
ALPS_ERRORS = {
    "0.mlp.down_proj": 0.00900, "0.mlp.gate_proj": 0.03733, "0.self_attn.o_proj": 0.00012,
    "0.self_attn.q_proj": 0.00052, "20.mlp.down_proj": 0.04313, "20.mlp.gate_proj": 0.01982,
    "20.self_attn.o_proj": 0.01831, "20.self_attn.q_proj": 0.01076, "9.mlp.down_proj": 0.03385,
}  # fmt: skip

MODEL_METHODS = (BASE, "admm", "maiht tuned", "maiht paper", "sparsegpt", "wanda", "magnitude")
MODEL_TARGETS = {"0.5": 51.0, "0.6": 87.0, "0.7": 160.0, "2:4": 90.0}
SOLVER_SECONDS_TARGET = 60.0
# Public reference codes in the protocol of the models part; the seconds are of their solvers at 0.5 on one core.
PUBLISHED = {
    "0.5": {"Wanda": 65.9, "SparseGPT": 59.6, "mAIHT reference": 55.5, "ADMM (Boza)": 51.9, "ALPS": 52.3},
    "0.6": {"SparseGPT": 126.5, "ADMM (Boza)": 89.6},
    "0.7": {"Wanda": 1505.0, "SparseGPT": 320.0, "mAIHT reference": 353.0, "ADMM (Boza)": 196.5, "ALPS": 165.0},
    "2:4": {"Wanda": 214.0, "SparseGPT": 112.8, "ADMM (Boza)": 92.9},
}
PUBLISHED_SECONDS = {"Wanda": 5.0, "SparseGPT": 50.0, "mAIHT reference": 301.0, "ADMM (Boza)": 282.0, "ALPS": 878.0}


class Layer(NamedTuple):
    """A linear of the dense model, `[out, in]`, and the Gram matrices of its inputs, `[in, in]`, all float32."""

    name: str
    weight: np.ndarray
    gram: np.ndarray
    heldout: np.ndarray


def dense_layers(bench: Bench) -> list[Layer]:
    """The layers, with Gram matrices of the first calibration windows and, held out, of as many further windows."""
    model, count = open_model(bench.source), bench.windows or LAYER_WINDOWS
    layers: list[Layer] = []
    ids = begin_windows(*text_windows(model.source, bench.data, "calibration", 2 * count, SEQLEN))
    parts = [make_batches(model.embedding()(jnp.asarray(part))) for part in (ids[:count], ids[count:])]
    runner = BlockRunner()
    for index in range(min(BLOCKS[-1] + 1, model.num_blocks)):
        block = model.block(index)
        if index in BLOCKS:
            grams, tests = (runner.grams(block, part) for part in parts)
            for name in LINEARS:
                pair = (np.asarray(found[block.linears[name]].gram) for found in (grams, tests))
                layers.append(Layer(f"{index}.{name}", np.asarray(block.read(f"{name}.weight")), *pair))
        if bench.layers is not None and len(layers) >= bench.layers:
            break
        parts = [runner.forward(block, part) for part in parts]
    say(f"layers: Gram matrices of {len(layers)} layers are ready")
    return layers[: bench.layers]


def relative_error(pruned: np.ndarray, weight: np.ndarray, gram: np.ndarray) -> float:
    """`||X (V - W)ᵀ||² / ||X Wᵀ||²` in float64, without ridge."""
    dense, gram = weight.astype(np.float64), gram.astype(np.float64)
    lost, present = (float(np.sum((v @ gram) * v)) for v in (pruned.astype(np.float64) - dense, dense))
    return lost / present


def layer_target(
    setting: str, method: str, layer: str, errors: Mapping[str, Mapping[str, float]]
) -> tuple[str, bool | None]:
    """The target of the most thorough method in a layer, and whether it was met; `errors` by method and layer."""
    if method == THOROUGH and setting == "2:4":
        # A failed method has NaN, which no error is below.
        rivals = {rival: errors.get(rival, {}).get(layer, np.nan) for rival in ("sparsegpt", "admm")}
        shown = " and ".join(f"{rival}, {error:.3g}" for rival, error in rivals.items())
        return f"below {shown}", all(errors[method][layer] < error for error in rivals.values())
    if method == THOROUGH and setting == "0.7" and layer in ALPS_ERRORS:
        return f"at most ALPS, {ALPS_ERRORS[layer]:.5f}", errors[method][layer] <= ALPS_ERRORS[layer]
    return "none", None


def bench_layers(bench: Bench, settings: list[str]) -> None:
    """Every method on every layer; seconds exclude compilation."""
    layers, count = dense_layers(bench), bench.windows or LAYER_WINDOWS
    protocol = f"Gram matrices of the dense model on {count} x {SEQLEN} tokens, held out: the next {count} windows"
    for setting in settings:
        errors: dict[str, dict[str, float]] = {}
        for method in filter(bench.wants, LAYER_METHODS):
            say(f"layers: {method} at {setting}")
            found, seconds = errors.setdefault(method, {}), 0.0
            heldout: list[float] = []
            for name, weight, gram, test_gram in layers:
                figure = f"layer error, {method}, {name} at {setting}"
                if recorded := bench.found(figure, protocol=protocol):
                    found[name] = recorded["value"]
                    heldout.append(recorded["heldout_error"])
                    seconds += recorded["seconds"]
                    continue
                try:
                    result = prune_layer(weight, gram, **SETTINGS[setting], **preset_of(method))
                except Exception as error:
                    bench.fail(figure, error)
                    continue
                value = found[name] = relative_error(result.weight, weight, gram)
                heldout.append(relative_error(result.weight, weight, test_gram))
                seconds += result.seconds
                bench.emit(
                    figure, value, "relative error", layer_target(setting, method, name, errors),
                    heldout_error=heldout[-1], seconds=result.seconds, steps=result.steps, status=result.status.name,
                    sparsity=result.sparsity, shape=weight.shape, protocol=protocol,
                )  # fmt: skip
            if len(found) == len(layers) and not bench.found(mean_figure(method, setting, len(layers))):
                summarise_layers(bench, method, setting, list(found.values()), heldout, seconds)


def mean_figure(method: str, setting: str, layers: int) -> str:
    """The name of the geometric mean of a method."""
    return f"layer error, geometric mean, {method}, {layers} layers at {setting}"


def summarise_layers(
    bench: Bench, method: str, setting: str, errors: list[float], heldout: list[float], seconds: float
) -> None:
    """The geometric means of a method, and its time if there is a target."""
    mean, heldout_mean = (float(np.exp(np.mean(np.log(values)))) for values in (errors, heldout))
    aimed, run = method == THOROUGH and setting == "0.5", f"{method}, {len(errors)} layers at {setting}"
    bench.emit(
        mean_figure(method, setting, len(errors)), mean, "relative error",
        judged(mean, MEAN_TARGET if aimed else None), heldout_error=heldout_mean, solver_seconds=seconds,
    )  # fmt: skip
    if aimed:
        target = f"at most an eighth of ALPS's {ALPS_SECONDS:g} s, measured on another machine with as many cores"
        bench.emit(
            f"solver time, {run}", seconds, "s", (target, seconds <= ALPS_SECONDS / 8),
            note="for information: times of two machines",
        )  # fmt: skip


def pruned_rows(
    bench: Bench, setting: str, table: Mapping[str, Mapping[str, Any]], part: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The summary and perplexity of each row of a table of recipe changes, unless it is in the record.

    Failed rows are emitted here. Rows share a pass if they need the same survey of the dense model, so that survey
    seconds can be attributed to them.
    """
    passes: dict[Any, dict[str, Recipe]] = {}
    tokens = calibration_windows(bench.windows or WINDOWS) | {"window_choice": "first"}
    base = SETTINGS[setting] | PLAIN | tokens | {"calibration": bench.data}
    for name, changes in table.items():
        if bench.found(f"perplexity, {part}, {name} at {setting}"):
            continue
        try:
            recipe = Recipe(**(base | dict(changes)))
        except Exception as error:
            bench.fail(f"perplexity, {part}, {name} at {setting}", error)
            continue
        passes.setdefault((recipe.output_weights, recipe.allocation), {})[name] = recipe
    for rows in passes.values():
        for name, row in run_pass(bench.source, rows, bench.data, bench.scoring, f"{part} at {setting}"):
            if isinstance(row, Exception):
                bench.fail(f"perplexity, {part}, {name} at {setting}", row)
            else:
                yield name, row


def bench_models(bench: Bench, settings: list[str]) -> None:
    """The whole model by every method."""
    for setting in settings:
        note = {"source": "published reference, measured elsewhere", "target": "none", "met": None} | bench.about
        for name, value in PUBLISHED[setting].items():
            if bench.found(figure := f"perplexity, models, {name} at {setting}"):
                continue
            bench.put(figure, value=value, unit="perplexity", **note)
            if setting == "0.5":
                seconds = PUBLISHED_SECONDS[name]
                bench.put(f"solver time, models, {name} at {setting}, one core", value=seconds, unit="s", **note)
        table = {name: preset_of(name) for name in filter(bench.wants, MODEL_METHODS)}
        for name, row in pruned_rows(bench, setting, table, "models"):
            bounds = (MODEL_TARGETS[setting], SOLVER_SECONDS_TARGET) if name == BASE else (None, None)
            run, seconds = f"models, {name} at {setting}", row["solver_seconds"]
            bench.emit_run(f"perplexity, {run}", row, judged(row["perplexity"], bounds[0]))
            bench.emit(f"solver time, {run}", seconds, "s", judged(seconds, bounds[1]))


def bench_ablation(bench: Bench, settings: list[str]) -> None:
    """The whole model by the recipes of the table, compared with the first."""
    timed = ("survey_seconds", "solver_seconds", "reconstruction_seconds")
    for setting in settings:
        table = {name: {"method": BASE, **changes} for name, changes in ABLATION.items()}
        base = bench.found(f"perplexity, ablation, {BASE} at {setting}")
        base = base and base | {"perplexity": base["value"]}
        for name, row in pruned_rows(bench, setting, table, "ablation"):
            base = row if name == BASE else base
            bound = ABLATION_TARGETS.get(name, {}).get(setting)
            bench.emit_run(
                f"perplexity, ablation, {name} at {setting}", row, judged(row["perplexity"], bound),
                difference_to_best=row["perplexity"] - base["perplexity"] if base else None,
                extra={key: row[key] - base[key] for key in timed} if base else None,
            )  # fmt: skip


def bench_complete(bench: Bench, settings: list[str]) -> None:
    """The whole model by method best with all its options; each row is a pass of its own, whose seconds count."""
    tokens = calibration_windows(bench.windows or WINDOWS)
    choices: tuple[WindowChoice, ...] = ("spread", "first")
    for (name, changes), windows, setting in itertools.product(COMPLETE.items(), choices, settings):
        run = f"complete, {name}, {windows} windows at {setting}"
        if bench.found(f"perplexity, {run}"):
            continue
        options = SETTINGS[setting] | PLACED[setting] | changes | tokens
        recipe = Recipe(method=BASE, calibration=bench.data, window_choice=windows, **options)
        for _, row in run_pass(bench.source, {name: recipe}, bench.data, bench.scoring, run):
            if isinstance(row, Exception):
                bench.fail(f"perplexity, {run}", row)
                continue
            bound = COMPLETE_TARGETS[name].get(setting)
            bench.emit_run(f"perplexity, {run}", row, judged(row["perplexity"], bound))
            bench.emit(f"time, {run}", row["seconds"], "s", judged(row["seconds"], COMPLETE_SECONDS))


Part = Callable[..., None]
PARTS: dict[str, tuple[Part, tuple[str, ...]]] = {
    "layers": (bench_layers, LAYER_SETTINGS),
    "models": (bench_models, tuple(SETTINGS)),
    "ablation": (bench_ablation, ABLATION_SETTINGS),
    "complete": (bench_complete, tuple(SETTINGS)),
    "draws": (bench_draws, tuple(SETTINGS)),
    "tokens": (bench_tokens, ("0.5",)),
}
# The parts for any model. The others have layers and targets of SmolLM2.
GENERAL = ("draws", "tokens")


def main() -> None:
    """Run the selected parts."""
    parser = text_parser(__doc__)
    known = dict.fromkeys((*LAYER_METHODS, *MODEL_METHODS, *METHODS))
    parser.add_argument("--only", type=names_of(PARTS), help=f"comma-separated: {','.join(PARTS)}")
    parser.add_argument(
        "--settings", type=names_of(SETTINGS), default=list(SETTINGS), help=f"comma-separated: {','.join(SETTINGS)}"
    )
    parser.add_argument("--methods", type=names_of(known), help=f"not for ablation, comma-separated: {','.join(known)}")
    parser.add_argument(
        "--texts", type=names_of(TEXTS), default=list(TEXTS), help=f"to calibrate draws on: {','.join(TEXTS)}"
    )
    parser.add_argument("--draws", type=read_draws, default=DRAWS, help="seeds of random windows, such as 0,1,2")
    parser.add_argument("--record", type=Path, help="file that lines are appended to; its rows are not run again")
    parser.add_argument("--layers", type=int, help="for a trial: number of layers")
    parser.add_argument("--windows", type=int, help="for a trial: largest number of windows")
    arguments = parser.parse_args()
    source, data = model_and_text(arguments, "bench_quality")
    trial = arguments.layers is not None or arguments.windows is not None
    bench = Bench(source, data, arguments.layers, arguments.windows, trial, arguments.methods, record=arguments.record)
    other = arguments.model != "smollm2" or arguments.source is not None
    for name in arguments.only or (GENERAL if other else PARTS):
        part, settings = PARTS[name]
        bench.reduced = trial or (other and name not in GENERAL)
        wanted = [setting for setting in settings if setting in arguments.settings]
        if wanted:
            own = {"draws": arguments.draws} if name in GENERAL else {}
            own |= {"texts": arguments.texts} if name == "draws" else {}
            part(bench, wanted, **own)
        else:
            say(f"SKIPPED {name}: it runs at {', '.join(settings)}")
    say(f"done, {bench.failures} failed rows")
    sys.exit(1 if bench.failures else 0)


if __name__ == "__main__":
    main()
