"""Tables of the pruner's records; each function takes the records of its file."""

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from records import Column, Record, field, machine, missing, named, table

PRUNE = "make bench-prune DATA=folder"
QUALITY = "make bench-quality DATA=folder"
MEMORY = "make bench-memory"
SETTINGS = {"0.5": "50 %", "0.6": "60 %", "0.7": "70 %", "2:4": "2:4"}
# Texts by their name in the records of draws, and the fields with the perplexity on each, also by transformers.
TEXTS = {
    "wikitext2": ("WikiText-2", "value", "transformers_perplexity"),
    "pydoc": ("Python's documentation", "perplexity_elsewhere", "transformers_perplexity_elsewhere"),
}
# A number of tokens is enough for a method if the perplexity is at most this much above that of its best number.
ENOUGH = 1.02


def prune_machine(records: list[Record]) -> str:
    """Versions and machine of the pruning records."""
    return machine(records[0]) if records else missing(PRUNE)


def prune_models(records: list[Record]) -> str:
    """Whole models: one row per run."""
    runs: dict[str, Record] = {}
    for record in records:
        figure, _, run = record["figure"].partition(", ")
        if run.endswith("whole model at 50 %"):
            method, _, preset = run.partition(",")[0].partition(" ")
            # Only mAIHT has presets.
            label = f"mAIHT {preset}" if method == "maiht" else method
            runs.setdefault(run, {"run": label})[figure] = record
    dense = named(records, "dense perplexity")
    if not runs:
        return missing(PRUNE)
    rows = [{"run": "dense", "perplexity": dense[0]}] if dense else []
    columns: list[Column] = [
        ("run", field("run")),
        ("perplexity", lambda r: f"{r['perplexity']['value']:.2f}"),
        ("mean layer error", lambda r: _detail(r, "mean_relative_error")),
        ("held-out error", lambda r: _detail(r, "mean_heldout_error")),
        ("solver seconds", lambda r: r["solver time"]["value"] if "solver time" in r else None),
        ("peak memory, GB", lambda r: r["peak memory"]["value"] if "peak memory" in r else None),
    ]
    return table([*rows, *runs.values()], columns)


def _detail(record: Record, name: str) -> Any:
    value = record["perplexity"].get(name)
    return None if value is None else f"{value:.4f}"


def memory_machine(records: list[Record]) -> str:
    """Versions and machine of the memory records."""
    return machine(records[0]) if records else missing(MEMORY)


def memory_blocks(records: list[Record]) -> str:
    """Peak memory against the number of blocks: one row per run."""
    if not records:
        return missing(MEMORY)
    columns: list[Column] = [
        ("mAIHT preset", field("preset")),
        ("blocks", field("blocks")),
        ("width", field("width")),
        ("model, MB", lambda r: r["model_bytes"] / 1e6),
        ("peak memory, MB", lambda r: r["peak_memory_bytes"] / 1e6),
        ("seconds", field("seconds")),
    ]
    return table(records, columns)


def prune_layers(records: list[Record]) -> str:
    """Single layers, with the Gram matrices of the dense model."""
    found = [record for record in records if record["figure"].startswith("layer error")]
    columns: list[Column] = [
        ("layer", lambda r: r["figure"].rsplit(", ", 1)[-1]),
        ("preset", lambda r: r["figure"].split(", ")[1]),
        ("relative error", lambda r: f"{r['value']:.5f}"),
        ("published procedure", lambda r: f"{r['value'] / r['ratio']:.5f}"),
        ("held-out error", lambda r: f"{r['heldout_error']:.5f}"),
        ("steps", field("steps")),
        ("seconds", field("seconds")),
    ]
    return table(found, columns) if found else missing(PRUNE)


def quality_machine(records: list[Record]) -> str:
    """Versions and machine of the quality records."""
    own = [record for record in records if "source" not in record]
    return machine(own[0]) if own else missing(QUALITY)


def by_run(records: list[Record], start: str) -> dict[tuple[str, str], Record]:
    """The records whose figure is "START, RUN at SETTING", by run and setting, without failed rows."""
    found = {}
    for record in records:
        figure, _, setting = record["figure"].rpartition(" at ")
        if figure.startswith(f"{start}, ") and record["value"] is not None:
            found[figure.removeprefix(f"{start}, "), setting.partition(",")[0]] = record
    return found


def _layers(records: list[Record], start: str) -> dict[tuple[str, str], Record]:
    """As `by_run`, for single layers; the first records call "admm_splice" "best"."""
    found = by_run(records, start)
    if any("admm_splice" in run for run, _ in found):
        return found
    return {(re.sub(r"^best\b", "admm_splice", run), at): record for (run, at), record in found.items()}


def _runs(found: Iterable[tuple[str, str]]) -> list[Record]:
    """One row per run, in the order of the records."""
    return [{"run": run} for run in dict.fromkeys(run for run, _ in found)]


def _at(found: dict[tuple[str, str], Record], setting: str, show: Callable[[Record], Any]) -> Callable[[Record], Any]:
    """The column of one setting."""
    return lambda row: show(found[row["run"], setting]) if (row["run"], setting) in found else None


def quality_layers(records: list[Record]) -> str:
    """Geometric means over the layers, on calibration and held-out tokens, and seconds."""
    found = _layers(records, "layer error, geometric mean")
    if not found:
        return missing(QUALITY)
    columns: list[Column] = [("method", lambda row: row["run"].partition(",")[0])]
    for setting, heading in SETTINGS.items():
        if any(at == setting for _, at in found):
            columns += [
                (heading, _at(found, setting, lambda r: f"{r['value']:.5f}")),
                ("held-out", _at(found, setting, lambda r: f"{r['heldout_error']:.5f}")),
                ("seconds", _at(found, setting, field("solver_seconds"))),
            ]
    return table(_runs(found), columns)


def quality_each_layer(records: list[Record]) -> str:
    """Single layers where they have a target: ALPS at 70 %, other methods at 2:4."""
    by_layer: dict[str, dict[tuple[str, str], Record]] = {}
    for (run, setting), record in _layers(records, "layer error").items():
        method, _, layer = run.partition(", ")
        if method != "geometric mean":
            by_layer.setdefault(layer, {})[method, setting] = record

    def error(method: str, setting: str) -> Callable[[Record], Any]:
        def show(row: Record) -> Any:
            record = by_layer[row["layer"]].get((method, setting))
            return record and f"{record['value']:.5f}"

        return show

    def published(row: Record) -> Any:
        record = by_layer[row["layer"]].get(("admm_splice", "0.7"))
        aim, _, value = record["target"].rpartition(", ") if record else ("", "", "")
        return value if aim.endswith("ALPS") else None

    columns: list[Column] = [
        ("layer", field("layer")),
        ("admm_splice, 70 %", error("admm_splice", "0.7")),
        ("ALPS, 70 %", published),
        *((f"{method}, 2:4", error(method, "2:4")) for method in ("admm_splice", "admm", "sparsegpt")),
    ]
    return table([{"layer": layer} for layer in by_layer], columns) if by_layer else missing(QUALITY)


def quality_models(records: list[Record]) -> str:
    """Perplexity of the whole model by method, published codes last; solver seconds at 50 %."""
    found, seconds = by_run(records, "perplexity, models"), by_run(records, "solver time, models")
    if not found:
        return missing(QUALITY)

    def name(row: Record) -> str:
        published = any(record.get("source") for (run, _), record in found.items() if run == row["run"])
        return f"{row['run']} †" if published else row["run"]

    columns: list[Column] = [("method", name)]
    columns += [(head, _at(found, key, lambda r: f"{r['value']:.2f}")) for key, head in SETTINGS.items()]
    columns += [("solver seconds at 50 %", _at(seconds, "0.5", field("value")))]
    rows = _runs(found)
    return table(sorted(rows, key=lambda row: name(row).endswith("†")), columns)


def quality_ablation(records: list[Record]) -> str:
    """Changes to the recipe of `best`: perplexity, and additional seconds."""
    found = by_run(records, "perplexity, ablation")
    if not found:
        return missing(QUALITY)

    def more(record: Record) -> Any:
        extra = record.get("extra")
        return f"{sum(extra.values()):+.0f}" if extra and record["difference_to_best"] else None

    columns: list[Column] = [("recipe", field("run"))]
    for setting, heading in SETTINGS.items():
        if any(at == setting for _, at in found):
            columns += [
                (heading, _at(found, setting, lambda r: f"{r['value']:.2f}")),
                ("additional seconds", _at(found, setting, more)),
            ]
    return table(_runs(found), columns)


def quality_complete(records: list[Record]) -> str:
    """Method `best` with all its options: perplexity and minutes by setting, a row for each choice of windows."""
    found, seconds = by_run(records, "perplexity, complete"), by_run(records, "time, complete")
    if not found:
        return missing(QUALITY)
    columns: list[Column] = [("recipe", field("run"))]
    columns += [(head, _at(found, key, lambda r: f"{r['value']:.2f}")) for key, head in SETTINGS.items()]
    columns += [
        (f"minutes, {head}", _at(seconds, key, lambda r: f"{r['value'] / 60:.0f}")) for key, head in SETTINGS.items()
    ]
    return table(_runs(found), columns)


def quality_draws(records: list[Record]) -> str:
    """For each model and text that it was calibrated on, scored on both texts: the median over the draws, and range."""
    models: dict[str, dict[tuple[str, str], list[Record]]] = {}
    dense = {record["model"]: record for record in named(records, "perplexity, draws, dense")}
    for record in _own(records, "draws"):
        run, _, setting = record["figure"].removeprefix("perplexity, draws, ").rpartition(" at ")
        models.setdefault(record["model"], {}).setdefault((run, setting), []).append(record)
    parts = []
    for model, found in models.items():
        parts.append(f"**{model}**{_dense(dense.get(model))}\n")
        for calibrated, (text, *_) in (TEXTS | {"self": ("text that the model draws",)}).items():
            for scored, score, _ in TEXTS.values():
                # A method that reads no text has one row for all.
                shown = {
                    key: values
                    for key, rows in found.items()
                    if (values := [row[score] for row in rows if row["calibrated"] in (calibrated, None)])
                }
                columns: list[Column] = [("method", field("run"))]
                columns += [
                    (heading, lambda row, at=setting, of=shown: _median(of.get((row["run"], at))))
                    for setting, heading in SETTINGS.items()
                ]
                if any(row["calibrated"] == calibrated for rows in found.values() for row in rows):
                    parts.append(f"Calibrated on {text}, scored on {scored}:\n\n{table(_runs(shown), columns)}")
    return "\n".join(parts) or missing(QUALITY)


def _own(records: list[Record], part: str) -> list[Record]:
    """The rows of a part with draws, without failed ones and the dense model."""
    start = f"perplexity, {part}, "
    return [record for record in records if record["figure"].startswith(start) and "calibrated" in record
            and record["value"] is not None]  # fmt: skip


def _median(values: list[float] | None) -> str | None:
    if not values:
        return None
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.2f}{spread}"


def _dense(record: Record | None) -> str:
    """The dense model's perplexities, those by transformers in parentheses."""
    if record is None:
        return ""
    shown = []
    for text, score, peer in TEXTS.values():
        theirs = f" (transformers: {record[peer]:.3f})" if record[peer] else ""
        shown.append(f"{record[score]:.3f} on {text}{theirs}")
    return f", dense {', '.join(shown)}"


def by_tokens(records: list[Record]) -> dict[str, dict[str, dict[int, tuple[float, float]]]]:
    """Perplexity and held-out error, medians over the draws, by model, method, and number of calibration tokens."""
    rows: dict[tuple[str, str, int], list[Record]] = defaultdict(list)
    for record in _own(records, "tokens"):
        run = record["figure"].removeprefix("perplexity, tokens, ").rpartition(" at ")[0]
        rows[record["model"], run, record["calibration_tokens"]].append(record)
    found: dict[str, dict[str, dict[int, tuple[float, float]]]] = {}
    for (model, run, tokens), same in sorted(rows.items(), key=lambda item: item[0][2]):
        pair = tuple(statistics.median(row[name] for row in same) for name in ("value", "mean_heldout_error"))
        found.setdefault(model, {}).setdefault(run, {})[tokens] = pair
    return found


def quality_tokens(records: list[Record]) -> str:
    """For each model the perplexity at each number of calibration tokens, and the number that is enough."""
    parts = []
    for model, runs in by_tokens(records).items():
        counts = sorted({tokens for found in runs.values() for tokens in found})

        def at(tokens: int, digits: int, which: int, of: Any = runs) -> Callable[[Record], Any]:
            return lambda row: f"{of[row['run']][tokens][which]:.{digits}f}" if tokens in of[row["run"]] else None

        def enough(row: Record, of: Any = runs) -> int:
            scores = {tokens: pair[0] for tokens, pair in of[row["run"]].items()}
            return min(tokens for tokens, score in scores.items() if score <= ENOUGH * min(scores.values()))

        rows = [{"run": run} for run in runs]
        method: Column = ("method", field("run"))
        scored = [method, *((f"{tokens:,}", at(tokens, 2, 0)) for tokens in counts), ("within 2 % from", enough)]
        errors = [method, *((f"{tokens:,}", at(tokens, 4, 1)) for tokens in counts)]
        parts.append(f"**{model}**, perplexity:\n\n{table(rows, scored)}\nError of the layers on held-out tokens:\n")
        parts.append(table(rows, errors))
    return "\n".join(parts) or missing(QUALITY)
