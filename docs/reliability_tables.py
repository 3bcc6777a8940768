"""Tables of the reliability records; each function takes the records of its file."""

from typing import Any

from records import Column, Record, field, machine, missing, named, table

RELIABILITY = "make bench-reliability"


def reliability_machine(records: list[Record]) -> str:
    """Versions and machine."""
    return machine(records[0]) if records else missing(RELIABILITY)


def reliability_kills(records: list[Record]) -> str:
    """Killed runs, one row per series."""
    found = named(records, "kills")
    columns: list[Column] = [
        ("kills", field("kills")),
        ("during the pass", field("within_the_pass")),
        ("finished blocks lost", field("lost_finished_blocks")),
        ("not resumable", field("refused")),
        ("identical result", field("identical")),
    ]
    return table(found, columns) if found else missing(RELIABILITY)


def reliability_budget(records: list[Record]) -> str:
    """Models larger than the budget, one row each."""
    found = named(records, "budget")
    columns: list[Column] = [
        ("budget, MiB", lambda r: r["memory_bytes"] / 2**20),
        ("model / budget", field("model_to_budget")),
        ("blocks", field("blocks")),
        ("activations", field("activations")),
        ("estimated, MiB", lambda r: r["estimated_bytes"] / 2**20),
        ("peak, MiB", lambda r: r["peak_memory_bytes"] / 2**20),
        ("peak / budget", field("peak_to_budget")),
        ("seconds", field("seconds")),
    ]
    return table(found, columns) if found else missing(RELIABILITY)


def reliability_inputs(records: list[Record]) -> str:
    """Bad inputs by kind."""
    found = named(records, "inputs")
    if not found:
        return missing(RELIABILITY)
    whole: Record = {"kind": "all"} | {name: sum(r[name] for r in found) for name in ("tried", "clear_errors")}
    columns: list[Column] = [
        ("kind", field("kind")),
        ("tried", field("tried")),
        ("clear error", field("clear_errors")),
    ]
    return table([*found, whole], columns)


def reliability_fuzz(records: list[Record]) -> str:
    """Fuzzing: one row per target."""
    found: dict[str, dict[str, Any]] = {}
    for record in named(records, "fuzz"):
        row = found.setdefault(record["target"], {"target": record["target"], "executions": 0, "seconds": 0.0})
        row["executions"] += record["executions"]
        row["seconds"] += record["seconds"]
        row["crashes"] = row.get("crashes", 0) + len(record["crashes"])
    columns: list[Column] = [
        ("target", field("target")),
        ("executions", field("executions")),
        ("seconds", field("seconds")),
        ("crashes", field("crashes")),
    ]
    return table(found.values(), columns) if found else missing(RELIABILITY)
