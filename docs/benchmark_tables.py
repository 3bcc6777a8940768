"""MyST tables from the committed benchmark records, `docs/benchmarks/*.jsonl`, one JSON object a line.

    trend.jsonl            output of `make bench-trend`
    trend_peers.jsonl      output of `make bench-trend-peers`
    trend_selection.jsonl  output of `make bench-trend-selection`
    prune.jsonl            output of `make bench-prune`
    quality.jsonl          output of `make bench-quality`

A table whose records are absent becomes one sentence that names the command.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Column = tuple[str, Callable[[Record], Any]]


def read(file: Path) -> list[Record]:
    """The records of one file, none if there is no such file."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def table(records: Iterable[Record], columns: list[Column]) -> str:
    """A MyST pipe table; text columns to the left, figures to the right."""
    rows = [[_shown(value(record)) for _, value in columns] for record in records]
    align = ["---" if index == 0 else "---:" for index in range(len(columns))]
    lines = [[heading for heading, _ in columns], align, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _number(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _number(value: float) -> str:
    if value != value:
        return "–"
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        mantissa, exponent = f"{value:.1e}".split("e")
        power = f"10{_superscript(int(exponent))}"
        return power if mantissa == "1.0" else f"{mantissa}·{power}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def field(name: str) -> Callable[[Record], Any]:
    """The value of a field, None where it is absent."""
    return lambda record: record.get(name)


def named(records: list[Record], figure: str) -> list[Record]:
    """The records of one figure."""
    return [record for record in records if record["figure"] == figure]


def missing(command: str) -> str:
    """What stands in the place of a table without records."""
    return f"No records are committed for this table; `{command}` makes them.\n"


def machine(record: Record) -> str:
    """One line on where the figures come from."""
    versions = record.get("versions") or {
        key: record[key] for key in ("python", "sparseopt", "jax", "numpy") if key in record
    }
    host = record.get("machine", "")
    if isinstance(host, dict):
        place = f"{host['system']}, {host['cores']} cores, {', '.join(host['devices'])}"
    else:
        place = ", ".join(filter(None, [host, record.get("device", "")]))
    if record.get("note"):
        place += f"; {record['note']}"
    return f"Measured with {', '.join(f'{name} {number}' for name, number in versions.items())} on {place}.\n"


TREND = "make bench-trend TRUTH=folder"
PRUNE = "make bench-prune DATA=folder"
QUALITY = "make bench-quality DATA=folder"
SELECTION = "make bench-trend-selection"
PEERS = "make bench-trend-peers TRUTH=folder REFERENCES=folder"
SETTINGS = {"0.5": "50 %", "0.6": "60 %", "0.7": "70 %", "2:4": "2:4"}


def trend_machine(records: list[Record]) -> str:
    """Versions and machine of the trend-filter records."""
    found = named(records, "environment")
    return machine(found[0]) if found else missing(TREND)


def trend_steps(records: list[Record]) -> str:
    """Steps and seconds to a certified gap on a noisy picture."""
    found = named(records, "steps and seconds")
    columns: list[Column] = [
        ("grid", lambda r: f"{r['side']} x {r['side']}"),
        ("order", field("order")),
        ("tolerance", field("tol")),
        ("method", field("method")),
        ("steps", field("steps")),
        ("seconds", field("seconds")),
        ("gap reached", field("gap")),
    ]
    return table(found, columns) if found else missing(TREND)


def trend_scaling(records: list[Record]) -> str:
    """Time and memory a node."""
    found = named(records, "scaling")
    columns: list[Column] = [
        ("grid", lambda r: f"{r['side']:,} x {r['side']:,}"),
        ("order", field("order")),
        ("seconds a step", field("step_seconds")),
        ("nanoseconds a node and step", field("nanoseconds_per_node")),
        # Between small sizes the growth disappears in what the process holds anyway.
        ("bytes a node", lambda r: r["bytes_per_node"] if r["side"] >= 1024 else None),
    ]
    return table(found, columns) if found else missing(TREND)


def trend_truth(records: list[Record]) -> str:
    """Reported gap against the true suboptimality, orders 0 and 1."""
    found = named(records, "truth at tol 1e-5")
    columns: list[Column] = [
        ("problem", lambda r: r["problem"].partition("_k")[0]),
        ("nodes", field("nodes")),
        ("order", field("order")),
        ("method", field("method")),
        ("steps", field("steps")),
        ("seconds", field("seconds")),
        ("gap reported", field("gap")),
        ("true suboptimality", field("true_suboptimality")),
    ]
    return table(found, columns) if found else missing(TREND)


def trend_reach(records: list[Record]) -> str:
    """What each method reaches at order 2 in a given time."""
    found = named(records, "reach in time")
    columns: list[Column] = [
        ("problem", lambda r: r["problem"].partition("_k")[0]),
        ("method", lambda r: r["method"] if r["B"] is None else f"{r['method']}, B = {r['B']}"),
        ("seconds", field("seconds")),
        ("steps", field("steps")),
        ("gap reported", field("gap")),
        ("true suboptimality", field("true_suboptimality")),
    ]
    if not found:
        return missing(TREND)
    return f"Every method was given about {found[0]['seconds_allowed']:g} seconds.\n\n{table(found, columns)}"


def peers_machine(records: list[Record]) -> str:
    """Versions, machine and cores of the comparison with public solvers; which of them were not there."""
    found = named(records, "environment")
    if not found:
        return missing(PEERS)
    peers = {record["solver"]: record["version"] for record in named(records, "time to target")}
    listed = [f"{name} {number}" for name, number in peers.items() if not name.startswith("sparseopt")]
    absent = {record["solver"]: record["reason"] for record in named(records, "SKIPPED") if record["solver"]}
    lines = [f"Each solver had {found[0]['cores']} core. Peers: {', '.join(listed) or 'none'}."]
    lines += [f"Not measured: {name} ({reason})." for name, reason in absent.items() if name not in peers]
    return f"{machine(found[0])}\n{' '.join(lines)}\n"


def peers_times(records: list[Record]) -> str:
    """Seconds to a true suboptimality: method auto, the fastest of ours, the fastest peer."""
    found = [record for record in named(records, "ours against the fastest peer") if record["target"] < 1e-3]

    def best(who: str) -> Callable[[Record], Any]:
        def show(record: Record) -> Any:
            seconds = record[f"{who}_seconds"]
            return seconds and f"{_number(seconds)} {record[who].removeprefix('sparseopt ')}"

        return show

    columns: list[Column] = [
        ("problem", field("problem")),
        ("weight", field("weight")),
        ("target", field("target")),
        ("auto", field("auto_seconds")),
        ("fastest of ours", best("ours")),
        ("fastest peer", lambda r: best("peer")(r) or r["note"]),
        ("auto ahead", field("met")),
    ]
    return table(found, columns) if found else missing(PEERS)


def selection_machine(records: list[Record]) -> str:
    """Versions and machine of the study of rules for the weight."""
    return machine(records[0]) if records else missing(SELECTION)


def selection_errors(records: list[Record]) -> str:
    """The mean error at each rule's weight over that at the best weight."""
    records = named(records, "choice of the weight")
    rules = list(dict.fromkeys(rule for record in records for rule in record["ratios"]))

    def ratio(rule: str) -> Callable[[Record], Any]:
        return lambda record: f"{record['ratios'][rule]:.2f}" if rule in record["ratios"] else None

    columns: list[Column] = [
        ("graph", field("graph")),
        ("signal", field("signal")),
        ("order", field("order")),
        ("error of the oracle", lambda r: f"{r['oracle_error']:.4f}"),
        ("noise, estimated", lambda r: f"{r['noise_estimate']:.3f}"),
        *((rule, ratio(rule)) for rule in rules),
    ]
    return table(records, columns) if records else missing(SELECTION)


def selection_concave(records: list[Record]) -> str:
    """L1 and concave penalties at their best weights."""
    found = [
        {"record": record, "penalty": penalty}
        for record in named(records, "concave penalty")
        for penalty in record["errors"]
    ]

    def of(key: str, digits: int) -> Callable[[Record], str]:
        return lambda row: f"{row['record'][key][row['penalty']]:.{digits}f}"

    columns: list[Column] = [
        ("graph", lambda row: row["record"]["graph"]),
        ("penalty", field("penalty")),
        ("error", of("errors", 4)),
        ("slope", of("slopes", 3)),
    ]
    return table(found, columns) if found else missing(SELECTION)


def prune_machine(records: list[Record]) -> str:
    """Versions and machine of the pruning records."""
    return machine(records[0]) if records else missing(PRUNE)


def prune_models(records: list[Record]) -> str:
    """Whole models: one row a run."""
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


def prune_layers(records: list[Record]) -> str:
    """Single layers on the dense model's Grams."""
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


def _quality(records: list[Record], start: str) -> dict[tuple[str, str], Record]:
    """The records whose figure is "START, RUN at SETTING", by run and setting; those of a row that failed left out."""
    found = {}
    for record in records:
        figure, _, setting = record["figure"].rpartition(" at ")
        if figure.startswith(f"{start}, ") and record["value"] is not None:
            found[figure.removeprefix(f"{start}, "), setting.partition(",")[0]] = record
    return found


def _runs(found: Iterable[tuple[str, str]]) -> list[Record]:
    """A row for each run, in the order of the records."""
    return [{"run": run} for run in dict.fromkeys(run for run, _ in found)]


def _at(found: dict[tuple[str, str], Record], setting: str, show: Callable[[Record], Any]) -> Callable[[Record], Any]:
    """The column of one setting."""
    return lambda row: show(found[row["run"], setting]) if (row["run"], setting) in found else None


def quality_layers(records: list[Record]) -> str:
    """Geometric means over the layers: on calibration and on held-out tokens, and seconds."""
    found = _quality(records, "layer error, geometric mean")
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
    """The layers one by one where they have targets of their own: ALPS at 70 %, the rivals at 2:4."""
    by_layer: dict[str, dict[tuple[str, str], Record]] = {}
    for (run, setting), record in _quality(records, "layer error").items():
        method, _, layer = run.partition(", ")
        if method != "geometric mean":
            by_layer.setdefault(layer, {})[method, setting] = record

    def error(method: str, setting: str) -> Callable[[Record], Any]:
        def show(row: Record) -> Any:
            record = by_layer[row["layer"]].get((method, setting))
            return record and f"{record['value']:.5f}"

        return show

    def published(row: Record) -> Any:
        record = by_layer[row["layer"]].get(("best", "0.7"))
        aim, _, value = record["target"].rpartition(", ") if record else ("", "", "")
        return value if aim.endswith("ALPS") else None

    columns: list[Column] = [
        ("layer", field("layer")),
        ("best, 70 %", error("best", "0.7")),
        ("ALPS, 70 %", published),
        *((f"{method}, 2:4", error(method, "2:4")) for method in ("best", "admm", "sparsegpt")),
    ]
    return table([{"layer": layer} for layer in by_layer], columns) if by_layer else missing(QUALITY)


def quality_models(records: list[Record]) -> str:
    """Perplexity of the whole model by method, published codes below; solver seconds at 50 %."""
    found, seconds = _quality(records, "perplexity, models"), _quality(records, "solver time, models")
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
    """Changes to the recipe of `best`: perplexity, and the seconds that each costs beyond it."""
    found = _quality(records, "perplexity, ablation")
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
                ("seconds more", _at(found, setting, more)),
            ]
    return table(_runs(found), columns)


# The first word of a table's name is that of its file, but for these.
STEMS = {"selection": "trend_selection", "peers": "trend_peers"}


def _stem(name: str) -> str:
    word = name.partition("_")[0]
    return STEMS.get(word, word)


TABLES: dict[str, tuple[str, Callable[[list[Record]], str]]] = {
    function.__name__.replace("_", "-"): (_stem(function.__name__), function)
    for function in (
        trend_machine,
        trend_steps,
        trend_scaling,
        trend_truth,
        trend_reach,
        peers_machine,
        peers_times,
        selection_machine,
        selection_errors,
        selection_concave,
        prune_machine,
        prune_models,
        prune_layers,
        quality_machine,
        quality_layers,
        quality_each_layer,
        quality_models,
        quality_ablation,
    )
}


def write_all(source: Path, target: Path) -> None:
    """Write every table to `target/NAME.md`."""
    for name, (stem, make) in TABLES.items():
        (target / f"{name}.md").write_text(make(read(source / f"{stem}.jsonl")), encoding="utf-8")


if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    for table_name, (stem, make) in TABLES.items():
        sys.stdout.write(f"## {table_name}\n\n{make(read(folder / 'benchmarks' / f'{stem}.jsonl'))}\n")
