"""Tables of the trend filter's records; each function takes the records of its file."""

from collections.abc import Callable
from typing import Any

from records import Column, Record, field, machine, missing, named, number, table

TREND = "make bench-trend TRUTH=folder"
SIZES = "make bench-trend-sizes"
SELECTION = "make bench-trend-selection"
PEERS = "make bench-trend-peers TRUTH=folder REFERENCES=folder"
EACH = ("fastprox", "PIQP", "Clarabel", "OSQP", "proxTV", "cut pursuit", "pygfl", "scikit-image", "pyunlocbox")
BATCH = "make bench-trend-batch"


def _machine(records: list[Record], command: str) -> str:
    found = named(records, "environment")
    return machine(found[0]) if found else missing(command)


def trend_machine(records: list[Record]) -> str:
    """Versions and machine of the trend-filter records."""
    return _machine(records, TREND)


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
    """Time and memory per node."""
    found = named(records, "scaling")
    columns: list[Column] = [
        ("grid", lambda r: f"{r['side']:,} x {r['side']:,}"),
        ("order", field("order")),
        ("seconds per step", field("step_seconds")),
        ("nanoseconds per node and step", field("nanoseconds_per_node")),
        # At small sizes the growth is hidden by the memory of the process itself.
        ("bytes per node", lambda r: r["bytes_per_node"] if r["side"] >= 1024 else None),
    ]
    return table(found, columns) if found else missing(TREND)


def trend_paths(records: list[Record]) -> str:
    """A path of fifty levels against one solve of its middle level."""
    found = named(records, "path of 50 levels, order 0, tol 1e-4")
    columns: list[Column] = [
        ("graph", lambda r: " x ".join(f"{n:,}" for n in r["shape"])),
        ("seconds", field("seconds")),
        ("seconds of the middle level", field("middle_seconds")),
        ("solves of it", field("middle_solves")),
        ("steps over its steps", lambda r: r["steps"] / r["middle_steps"] if len(r["shape"]) > 1 else None),
        ("largest gap", field("gap")),
    ]
    return table(found, columns) if found else missing(TREND)


def trend_truth(records: list[Record]) -> str:
    """Reported gap and true suboptimality, orders 0 and 1."""
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
    """The gap that each method reaches at order 2 in a fixed time."""
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
    return f"Every method had about {found[0]['seconds_allowed']:g} seconds.\n\n{table(found, columns)}"


def sizes_machine(records: list[Record]) -> str:
    """Versions and machine of the size records."""
    return _machine(records, SIZES)


def sizes_growth(records: list[Record]) -> str:
    """Seconds and memory from small to large."""
    columns: list[Column] = [
        ("graph", field("problem")),
        ("nodes", field("nodes")),
        ("edges", field("edges")),
        ("order", field("order")),
        ("steps", field("steps")),
        ("seconds", field("seconds")),
        ("first call", field("first_call_seconds")),
        ("time per node, relative to the smallest", field("growth_per_node")),
        ("peak memory, GB", lambda r: r["peak_bytes"] / 1e9),
    ]
    found = named(records, "size")
    return table(found, columns) if found else missing(SIZES)


def peers_machine(records: list[Record]) -> str:
    """Versions, machine and cores of the comparison with public solvers; which of them are missing."""
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
    """Seconds to a true suboptimality: method auto, the fastest of our methods, the fastest peer."""
    found = [record for record in named(records, "ours against the fastest peer") if record["target"] < 1e-3]

    def best(who: str) -> Callable[[Record], Any]:
        def show(record: Record) -> Any:
            seconds = record[f"{who}_seconds"]
            return seconds and f"{number(seconds)} {record[who].removeprefix('sparseopt ')}"

        return show

    columns: list[Column] = [
        ("problem", field("problem")),
        ("weight", field("weight")),
        ("target", field("target")),
        ("auto", field("auto_seconds")),
        ("fastest of ours", best("ours")),
        ("fastest peer", lambda r: best("peer")(r) or r["note"]),
        ("auto is faster", field("met")),
    ]
    return table(found, columns) if found else missing(PEERS)


def peers_each(records: list[Record]) -> str:
    """Seconds of every peer, of the fastest of its methods, on the problems that it takes."""
    times: dict[tuple[str, float], dict[str, Record]] = {}
    for record in named(records, "time to target"):
        times.setdefault((record["problem"], record["target"]), {})[record["solver"]] = record

    def fastest(name: str) -> Callable[[dict[str, Record]], str]:
        def show(found: dict[str, Record]) -> str:
            tried = [record for key, record in found.items() if key.startswith(name)]
            if not tried:
                return ""
            reached = [record["seconds"] for record in tried if record["seconds"]]
            return number(min(reached)) if reached else "not reached"

        return show

    columns: list[Column] = [
        ("problem", lambda found: found["sparseopt auto"]["problem"]),
        ("target", lambda found: found["sparseopt auto"]["target"]),
        *((name, fastest(name)) for name in EACH),
    ]
    rows = [found for (_, target), found in times.items() if target < 1e-3]
    return table(rows, columns) if rows else missing(PEERS)


def batch_machine(records: list[Record]) -> str:
    """Versions, machine and cores of the planned filter's records; what was not measured."""
    found = named(records, "environment")
    if not found:
        return missing(BATCH)
    peers = {
        f"{record['solver']} {record['version']} with Python {record['python']}": None
        for record in named(records, "gradient through a plan")
        if record["solver"] == "fastprox"
    }
    absent = {record["solver"] or record["part"]: record["reason"] for record in named(records, "SKIPPED")}
    lines = [f"Each part had {found[0]['cores']} core. Peer: {', '.join(peers) or 'none'}."]
    lines += [f"Not measured: {name} ({reason})." for name, reason in absent.items()]
    return f"{machine(found[0])}\n{' '.join(lines)}\n"


def batch_gradients(records: list[Record]) -> str:
    """Seconds of a fit and of a gradient through it."""
    columns: list[Column] = [
        ("solver", field("solver")),
        ("order", field("order")),
        ("steps", field("steps")),
        ("fit, seconds", field("fit_seconds")),
        ("fit and gradient, seconds", field("gradient_seconds")),
        ("ratio", field("ratio")),
        ("error in the signal", field("error_in_signal")),
        ("error in the weights", field("error_in_weights")),
    ]
    found = sorted(named(records, "gradient through a plan"), key=lambda record: record["order"])
    return table(found, columns) if found else missing(BATCH)


def batch_pictures(records: list[Record]) -> str:
    """Seconds for many pictures, in separate calls and in one program."""
    columns: list[Column] = [
        ("variant", field("way")),
        ("order", field("order")),
        ("seconds", field("seconds")),
        ("speedup over calls of the solver", field("speedup")),
        ("steps, mean", field("steps")),
        ("steps, largest", field("most_steps")),
        ("difference from calls of the solver", field("difference")),
    ]
    found = sorted(named(records, "pictures"), key=lambda record: record["order"])
    return table(found, columns) if found else missing(BATCH)


def batch_calls(records: list[Record]) -> str:
    """Milliseconds per call, and its overhead."""

    def milliseconds(name: str) -> Callable[[Record], Any]:
        return lambda record: None if record[name] is None else 1e3 * record[name]

    columns: list[Column] = [
        ("variant", field("way")),
        ("ms per call", milliseconds("seconds_a_call")),
        ("ms of CPU time", milliseconds("cpu_seconds")),
        ("overhead, ms", milliseconds("overhead_seconds")),
    ]
    found = named(records, "calls")
    return table(found, columns) if found else missing(BATCH)


def selection_machine(records: list[Record]) -> str:
    """Versions and machine of the study of rules for the weight."""
    return machine(records[0]) if records else missing(SELECTION)


def selection_errors(records: list[Record]) -> str:
    """The mean error at each rule's weight, relative to that at the best weight."""
    records = named(records, "choice of the weight")
    rules = list(dict.fromkeys(rule for record in records for rule in record["ratios"]))

    def ratio(rule: str) -> Callable[[Record], Any]:
        return lambda record: f"{record['ratios'][rule]:.2f}" if rule in record["ratios"] else None

    columns: list[Column] = [
        ("graph", field("graph")),
        ("signal", field("signal")),
        ("loss", lambda r: r.get("loss") or "square"),
        ("order", field("order")),
        ("error of the oracle", lambda r: f"{r['oracle_error']:.4f}"),
        ("noise, estimated", lambda r: f"{r['noise_estimate']:.3f}" if r["noise_estimate"] else None),
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
