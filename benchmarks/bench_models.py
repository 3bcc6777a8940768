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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import Recorder, say, selection
from layer_errors import grids, layers, patterns
from pruned import CONFIGS, KEPT, ROOT, SETTINGS, about, judged, model_and_text, text_options

from sparseopt.experiments.config import Run, load_config

Settings = dict[str, dict[str, Any]]
AT_HALF: Settings = {"whole": {}}
# Zeros go where they cost least: to the linears by curves, in n:m groups by the order of the channels.
PLACED: Settings = {
    name: setting | ({"permute": True} if name == "2:4" else {"allocation": "curves"})
    for name, setting in SETTINGS.items()
}
ROUNDED: Settings = {
    "maiht": {"method": "maiht"},
    "best one shot": {"method": "best", "train_epochs": 0, "variants": 0},
}
# What random windows are drawn from.
TEXTS: Settings = {
    "wikitext2": {},
    "pydoc": {"calibration": "pydoc"},
    "self": {"calibration": "self", "window_choice": None},
}
DRAWS = {"0": 0, "1": 1, "2": 2}


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
LAYERS = {"layers": layers, "grids": grids, "patterns": patterns}
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
