"""Whole models, pruned and made smaller, and single layers: `make bench-quality DATA=folder`, and the same with prune,
shrink or precision in place of quality, with the WikiText-2 parquet files. JSON lines.

    python benchmarks/bench_models.py --data FOLDER --only layers,draws [--settings 0.5,2:4] [key=value ...]

    prune      whole models at 50 % by a few methods: perplexity, seconds, memory
    layers     every method on twelve layers, Gram matrices of the dense model: error in float64, seconds
    grids      layers on grids of few bits, beside the same layers in floats and by plain rounding
    models     every method on the whole model: perplexity, layer errors, seconds; also published figures
    ablation   changes to the recipe of method best: perplexity and additional seconds
    complete   method best with all that lowers its perplexity, one-shot and trained
    patterns   layers with n:m along the inputs, beside as many zeros anywhere
    blind      what reads no text: the dense model, also by transformers, and magnitude
    draws      every method on the whole model, calibrated on random windows of three texts, scored on two
    tokens     perplexity and held-out error against the number of calibration tokens, at 50 %
    precision  what products of fewer bits cost, emulated: perplexity, errors, other weights kept
    sizes, methods, windows    smaller dense models, as configs/benchmarks/shrink-*.yaml say

All but the layers are sweeps of `sparseopt run`: configs/benchmarks/ has their recipes, and the folder of --folder
their finished runs, which are not run again. `key=value` changes all of them, for a trial. With `--record FILE` lines
are also appended to a file. A failed run becomes a line with its error, and the exit status is 1.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from common import Recorder, say, selection
from pruned import CONFIGS, KEPT, ROOT, SETTINGS, about, judged, model_and_text, text_options

from sparseopt.experiments.config import Run, load_config
from sparseopt.models import open_model
from sparseopt.pruning import prune_layer
from sparseopt.pruning.base.activations import make_batches
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.text.windows import begin_windows, text_windows

Settings = dict[str, dict[str, Any]]
AT_HALF: Settings = {"whole": {}}
# Zeros go where they cost least: to the linears by curves, in n:m groups by the order of the channels.
PLACED: Settings = {
    name: setting | ({"permute": True} if name == "2:4" else {"allocation": "curves"})
    for name, setting in SETTINGS.items()
}
ROUNDED: Settings = {
    "maiht": {"method": "maiht"},
    "best one shot": {"method": "best", "train_epochs": 0},
}
# What random windows are drawn from.
TEXTS: Settings = {
    "wikitext2": {},
    "pydoc": {"calibration": "pydoc"},
    "self": {"calibration": "self", "window_choice": None},
}
DRAWS = {"0": 0, "1": 1, "2": 2}
# A preset follows the name. The most thorough method is last, since its target depends on the others.
THOROUGH = "admm_splice"
METHODS = ("magnitude", "wanda", "sparsegpt", "splice", "admm", "maiht paper", "maiht tuned", "best", THOROUGH)
LAYER_SETTINGS = ("0.5", "0.7", "2:4")
BLOCKS = (0, 9, 20)
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
LAYER_WINDOWS, SEQLEN = 24, 512
MEAN_TARGET = 0.00265
# Of ALPS (Meng et al., 2024), on the same layers and tokens.
ALPS_ERRORS = {
    "0.mlp.down_proj": 0.00900, "0.mlp.gate_proj": 0.03733, "0.self_attn.o_proj": 0.00012,
    "0.self_attn.q_proj": 0.00052, "20.mlp.down_proj": 0.04313, "20.mlp.gate_proj": 0.01982,
    "20.self_attn.o_proj": 0.01831, "20.self_attn.q_proj": 0.01076, "9.mlp.down_proj": 0.03385,
}  # fmt: skip
# Relative errors of mAIHT's published procedure at 50 % on these layers, and how much of them each preset may have.
PAPER_ERRORS = {"0.mlp.gate_proj": 0.01733, "9.self_attn.o_proj": 0.02159, "20.mlp.down_proj": 0.01828}
PAPER_TARGETS = {"paper": 1.02, "tuned": 0.80}
# Of layers put on a grid: method, setting and bits, and the most that the error may be of that without the grid; of
# dense layers, of that of plain rounding.
ON_GRIDS = {
    ("admm_splice", "0.5", "q4_0"): 1.33, ("best", "0.5", "q4_0"): 1.33, ("best", "2:4", "q4_0"): 1.33,
    ("admm_splice", "0.5", "q8_0"): 1.004, ("best", "0.5", "q8_0"): 1.004, ("best", "0.5", "q5_0"): None,
    ("best", "0.5", "int8"): None, ("best", "0.5", "int4:64"): None, ("wanda", "0", "q4_0"): 0.33,
}  # fmt: skip
# Patterns along the inputs, with their share of zeros.
ALONG = {"6:8": 0.25, "2:4": 0.5, "4:8": 0.5, "8:16": 0.5, "1:4": 0.75}


class Sweep(NamedTuple):
    """A config, what its runs vary besides, by a name, and whether they vary the text and the draw too."""

    config: str
    settings: Settings = AT_HALF
    drawn: bool = False


SWEEPS = {
    "prune": [Sweep("prune")],
    "models": [Sweep("quality-models", SETTINGS)],
    "ablation": [Sweep("quality-ablation", {name: SETTINGS[name] for name in ("0.5", "0.7")})],
    "complete": [Sweep("quality-complete", PLACED)],
    "blind": [Sweep("quality-dense"), Sweep("quality-blind", SETTINGS)],
    "draws": [Sweep("quality-draws", SETTINGS, drawn=True)],
    "tokens": [Sweep("quality-tokens", {"0.5": SETTINGS["0.5"]})],
    "precision": [Sweep("precision", ROUNDED), Sweep("precision-activations", {"best": {"method": "best"}})],
    "sizes": [Sweep("shrink-sizes")],
    "methods": [Sweep("shrink-methods")],
    "windows": [Sweep("shrink-windows"), Sweep("prune-windows")],
}
# What lines say of calibration text and draw, where it is not the sweep's.
UNNAMED: Settings = {"precision": {}, "blind": {"calibrated": None, "draw": None}}


class Finished(NamedTuple):
    """A run with its record, or the reason why it failed."""

    run: Run
    record: dict[str, Any] | None
    error: str
    machine: dict[str, Any]


def finished(sweep: Sweep, overrides: dict[str, Any], folder: Path) -> Iterator[Finished]:
    """Run each of a sweep by the command, so that one that is killed takes no other with it, and read its folder."""
    config = CONFIGS / f"{sweep.config}.yaml"
    changes = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    runs = load_config(config, changes, allow_code=True)
    command = [sys.executable, "-m", "sparseopt", "run", str(config), *changes, "--allow-code", "--output", str(folder)]
    for index, run in enumerate(runs, 1):
        done = subprocess.run([*command, "--shard", f"{index}/{len(runs)}"], stdout=sys.stderr, check=False)
        place, error = folder / run.subfolder, "the command refused it" if done.returncode else ""
        records = place / "records.jsonl"
        lines = records.read_text().splitlines() if records.is_file() else []
        if (place / "error.txt").is_file():
            error = (place / "error.txt").read_text().strip()
        elif not lines:
            error = error or "its process ended without a record"
        if error:
            yield Finished(run, None, error, {})
            continue
        begun = json.loads((place / "run.json").read_text())
        machine = {name: begun[name] for name in ("versions", "machine")}
        yield Finished(run, json.loads(lines[-1]), "", machine)


def shown(record: dict[str, Any], task: Any) -> dict[str, Any]:
    """The fields of the line of a perplexity."""
    fields = {name: record[name] for name in KEPT if name in record}
    fields |= {name: record[name] for name in record if name.startswith(("transformers_", "perplexity_"))}
    if "removed" in record:
        whole = record["blocks"] + len(record["removed"])
        kept = [block for block in range(whole) if block not in record["removed"]]
        sizes = {name: record[name] for name in ("parameters", "channels", "kv_heads", "experts")}
        fields["shape"] = sizes | {"blocks": kept}
    settings = task.model_dump(mode="json", exclude={"name", "title", "task", "source", "paper", "calibration"})
    return fields | {"recipe": settings, "elsewhere": task.elsewhere}


def run_sweep(recorder: Recorder, part: str, sweep: Sweep, base: dict[str, Any], given: Any) -> int:
    """Emit the lines of a sweep at all its settings; returns how many runs failed."""
    source, failures = Path(base["source"]), 0
    drawn = [(text, DRAWS[draw]) for draw in given.draws for text in given.texts]
    texts = {(text, draw): TEXTS[text] | {"seed": draw} for text, draw in drawn}
    # The goals are those of the bundled model.
    goals = not (given.source or given.changes)
    texts = texts if sweep.drawn else {("wikitext2", 0): {}}
    for setting, changes in sweep.settings.items():
        if setting in SETTINGS and setting not in given.settings:
            continue
        for (text, draw), windows in texts.items():
            place = given.folder / source.name / sweep.config / f"{setting} {text} {draw}".replace(":", "-")
            told = UNNAMED.get(part, {"calibrated": text, "draw": draw})
            details = about(source, bool(given.changes)) | told
            first: dict[str, Any] | None = None
            for index, (run, record, error, machine) in enumerate(finished(sweep, base | changes | windows, place)):
                task: Any = run.task
                first = first if index else record
                own = details | task.line()
                name = task.title.format(**run.settings, setting=setting)
                if record is None:
                    failures += 1
                    say(f"{part}, {name} FAILED: {error}")
                    recorder.emit(f"perplexity, {task.name}, {name}", value=None, error=error, **own, **machine)
                    continue
                lines = [*lines_of(part, name, record, task, first, goals)]
                lines += published(task, setting) if part == "models" and not index else []
                for line in lines:
                    known = recorder.found(figure=line["figure"], **own)
                    if known is None or known["value"] is None:
                        recorder.emit(**machine | line | own)
    return failures


def published(task: Any, setting: str) -> Iterator[dict[str, Any]]:
    """The lines of the published figures of a setting; names that end in "seconds" are those of a solver's time."""
    for figure in (figure for figure in task.paper.figures if figure.match == SETTINGS[setting]):
        for name, value in figure.values.items():
            what = "solver time" if name.endswith(" seconds") else "perplexity"
            run = f"models, {name.removesuffix(' seconds')} at {setting}"
            elsewhere = {"source": "published reference, measured elsewhere", "versions": None, "machine": None}
            yield {"figure": f"{what}, {run}", "value": value, **elsewhere}


def lines_of(
    part: str, name: str, record: dict[str, Any], task: Any, first: dict[str, Any] | None, goals: bool
) -> Iterator[dict[str, Any]]:
    """The lines of a run: its perplexity, and what else the part measures."""
    value = record["perplexity"]
    goal = judged(value, task.goal if goals else None)
    line = {"value": value, "unit": "perplexity", **goal, **shown(record, task)}
    if part == "prune":
        if name == "dense":
            yield {"figure": "dense perplexity", **line}
            return
        whole = f"{name}, whole model at 50 %"
        yield {"figure": f"perplexity, {whole}", **line}
        yield {"figure": f"solver time, {whole}", "value": record["solver_seconds"], "unit": "s"}
        yield {"figure": f"peak memory, {whole}", "value": record["peak_memory_bytes"] / 1e9, "unit": "GB"}
        return
    if part == "ablation":
        timed = ("survey_seconds", "solver_seconds", "reconstruction_seconds")
        line["difference_to_best"] = value - first["perplexity"] if value and first else None
        line["extra"] = {key: record[key] - first[key] for key in timed} if first else None
    yield {"figure": f"perplexity, {task.name}, {name}", **line}
    if part == "models":
        yield {"figure": f"solver time, models, {name}", "value": record["solver_seconds"], "unit": "s"}
    if part == "complete":
        yield {"figure": f"time, complete, {name}", "value": record["seconds"], "unit": "s"}


class Layer(NamedTuple):
    """A linear of the dense model, `[out, in]`, and the Gram matrices of its inputs, `[in, in]`, all float32."""

    name: str
    weight: np.ndarray
    gram: np.ndarray
    heldout: np.ndarray


def dense_layers(source: Path, data: str, windows: int | None) -> Iterator[Layer]:
    """The layers, with Gram matrices of the first calibration windows and, held out, of as many further windows."""
    model, count = open_model(source), windows or LAYER_WINDOWS
    ids = begin_windows(*text_windows(model.source, data, "calibration", 2 * count, SEQLEN))
    parts = [make_batches(model.embedding()(jnp.asarray(part))) for part in (ids[:count], ids[count:])]
    runner = BlockRunner()
    for index in range(min(BLOCKS[-1] + 1, model.num_blocks)):
        block = model.block(index)
        if index in BLOCKS:
            grams, tests = (runner.grams(block, part) for part in parts)
            for name in LINEARS:
                pair = (np.asarray(found[block.linears[name]].gram) for found in (grams, tests))
                yield Layer(f"{index}.{name}", np.asarray(block.read(f"{name}.weight")), *pair)
        parts = [runner.forward(block, part) for part in parts]


def relative_error(pruned: np.ndarray, weight: np.ndarray, gram: np.ndarray) -> float:
    """`||X (V - W)ᵀ||² / ||X Wᵀ||²` in float64, without ridge."""
    dense, gram = weight.astype(np.float64), gram.astype(np.float64)
    lost, present = (float(np.sum((v @ gram) * v)) for v in (pruned.astype(np.float64) - dense, dense))
    return lost / present


def pruned_layer(layer: Layer, method: str, setting: str) -> dict[str, Any]:
    """The errors, steps and seconds of a method, without compilation; a preset follows its name."""
    name, _, preset = method.partition(" ")
    found = prune_layer(layer.weight, layer.gram, **SETTINGS[setting], method=name, preset=preset or None)
    return {
        "value": relative_error(found.weight, layer.weight, layer.gram), "unit": "relative error",
        "heldout_error": relative_error(found.weight, layer.weight, layer.heldout),
        "seconds": found.seconds, "steps": found.steps, "status": found.status.name, "sparsity": found.sparsity,
    }  # fmt: skip


def target_of(method: str, setting: str, layer: str, errors: Mapping[str, float]) -> dict[str, Any]:
    """The target of a method in a layer, and whether it was met; `errors` by method."""
    error, preset = errors[method], method.removeprefix("maiht ")
    if setting == "0.5" and preset in PAPER_TARGETS and layer in PAPER_ERRORS:
        factor, known = PAPER_TARGETS[preset], PAPER_ERRORS[layer]
        return {"ratio": error / known, "target": f"at most {factor} x {known}", "met": error <= factor * known}
    if method == THOROUGH and setting == "2:4" and errors.keys() >= {"sparsegpt", "admm"}:
        rivals = {rival: errors[rival] for rival in ("sparsegpt", "admm")}
        shown = " and ".join(f"{rival}, {error:.3g}" for rival, error in rivals.items())
        return {"target": f"below {shown}", "met": error < min(rivals.values())}
    if method == THOROUGH and setting == "0.7" and layer in ALPS_ERRORS:
        return {"target": f"at most ALPS, {ALPS_ERRORS[layer]:.5f}", "met": error <= ALPS_ERRORS[layer]}
    return judged(error, None)


def layers(recorder: Recorder, source: Path, data: str, windows: int | None) -> None:
    shared = about(source, windows is not None)
    found = list(dense_layers(source, data, windows))
    for setting in LAYER_SETTINGS:
        errors: dict[str, dict[str, float]] = {layer.name: {} for layer in found}
        for method in METHODS:
            say(f"layers: {method} at {setting}")
            rows = []
            for layer in found:
                figure = f"layer error, {method}, {layer.name} at {setting}"
                known = recorder.found(figure=figure, **shared)
                row = known or pruned_layer(layer, method, setting)
                errors[layer.name][method] = row["value"]
                if known is None:
                    goal = target_of(method, setting, layer.name, errors[layer.name])
                    recorder.emit(figure, **row, **goal, **shared)
                rows.append(row)
            mean, heldout = (geometric_mean([row[key] for row in rows]) for key in ("value", "heldout_error"))
            bound = MEAN_TARGET if method == THOROUGH and setting == "0.5" else None
            figure = f"layer error, geometric mean, {method}, {len(rows)} layers at {setting}"
            if recorder.found(figure=figure, **shared) is None:
                recorder.emit(
                    figure, value=mean, unit="relative error", heldout_error=heldout,
                    solver_seconds=sum(row["seconds"] for row in rows), **judged(mean, bound), **shared,
                )  # fmt: skip


def grids(recorder: Recorder, source: Path, data: str, windows: int | None) -> None:
    shared, found = about(source, windows is not None), list(dense_layers(source, data, windows))
    for (method, setting, bits), bound in ON_GRIDS.items():
        figure = f"error on a grid, {method} at {setting}, {bits}"
        if recorder.found(figure=figure, **shared):
            continue
        say(figure)
        sizes = {"sparsity": 0.0} if setting == "0" else SETTINGS[setting]
        given = [{"weight": layer.weight, "gram": layer.gram, "method": method, **sizes} for layer in found]
        alone, rounded = ([prune_layer(**each, bits=form) for each in given] for form in (None, bits))
        before = [each.pruned_error if setting != "0" else each.rounded_error for each in rounded]
        pairs = zip(rounded, found, strict=True)
        errors = [relative_error(each.weight, layer.weight, layer.gram) for each, layer in pairs]
        ratios = [error / known for error, known in zip(errors, before, strict=True)]
        plain = [each.rounded_error / known for each, known in zip(rounded, before, strict=True)]
        seconds = [sum(each.seconds for each in some) for some in (alone, rounded)]
        value = geometric_mean(ratios)
        recorder.emit(
            figure, value=value, unit="times the error before", error=geometric_mean(errors),
            plain_rounding=geometric_mean(plain), of_sums=sum(errors) / sum(before), method_seconds=seconds[0],
            grid_seconds=seconds[1] - seconds[0], **judged(value, bound), **shared,
        )  # fmt: skip


def patterns(recorder: Recorder, source: Path, data: str, windows: int | None) -> None:
    shared, found = about(source, windows is not None), list(dense_layers(source, data, windows))
    for method in ("wanda", "maiht", "best"):
        for pattern, share in ALONG.items():
            figure = f"layer error, along the inputs, {method}, {pattern}"
            if recorder.found(figure=figure, **shared):
                continue
            say(figure)
            errors = {}
            for name in (pattern, "unstructured"):
                given = [prune_layer(each.weight, each.gram, share, name, method).weight for each in found]
                pairs = list(zip(given, found, strict=True))
                for tokens in ("gram", "heldout"):
                    each = [relative_error(v, layer.weight, getattr(layer, tokens)) for v, layer in pairs]
                    errors[name, tokens] = geometric_mean(each)
            recorder.emit(
                figure, value=errors[pattern, "gram"], unit="relative error", zeros=share,
                heldout_error=errors[pattern, "heldout"], anywhere=errors["unstructured", "gram"],
                anywhere_heldout=errors["unstructured", "heldout"], **judged(0, None), **shared,
            )  # fmt: skip


def geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


LAYERS = {"layers": layers, "grids": grids, "patterns": patterns}


def main() -> None:
    parser = text_options(__doc__)
    selection(parser, "--only", [*LAYERS, *SWEEPS])
    selection(parser, "--settings", SETTINGS)
    selection(parser, "--texts", TEXTS)
    selection(parser, "--draws", DRAWS)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "benchmarks", help="of the finished runs")
    parser.add_argument("--record", type=Path, help="file that lines are appended to")
    parser.add_argument("--windows", type=int, help="for a trial: number of windows for layers")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="for a trial: changes of all configs")
    given = parser.parse_args()
    source, data = model_and_text(given, "bench_models")
    recorder, failures = Recorder(given.record), 0
    base: dict[str, Any] = {"source": str(source), "calibration": data, "evaluation": data}
    base |= {key: json.loads(value) for key, _, value in (change.partition("=") for change in given.changes)}
    for part in given.only:
        say(part)
        if part in LAYERS:
            LAYERS[part](recorder, source, data, given.windows)
        for sweep in SWEEPS.get(part, []):
            failures += run_sweep(recorder, part, sweep, base, given)
    say(f"done, {failures} failed runs")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
