"""Tables of the core's records, `core.jsonl`: sparse regressions, total variation, derivatives."""

from typing import Any

from records import Column, Record, field, machine, missing, named, number, table

CORE = "make bench-core"
SECONDS = {"seconds to the gap", "seconds to the objective"}


def core_machine(records: list[Record]) -> str:
    """Versions, machine and peers."""
    found = named(records, "environment")
    if not found:
        return missing(CORE)
    peers = {
        f"{record['solver'].split()[0].rstrip(',')} {record['version']}": None
        for record in records
        if record["figure"] in SECONDS and not _ours(record)
    }
    absent = {record["solver"]: record["reason"] for record in named(records, "SKIPPED") if record["solver"]}
    lines = [f"Each solver had {found[0]['cores']} core. Peers: {', '.join(peers) or 'none'}."]
    lines += [f"Not measured: {name} ({reason})." for name, reason in absent.items()]
    return f"{machine(found[0])}\n{' '.join(lines)}\n"


def _ours(record: Record) -> bool:
    return bool(record["solver"].startswith("sparseopt"))


def _shown(record: Record) -> str:
    name = record["solver"].removeprefix("sparseopt, ").removeprefix("pyproximal ")
    return f"{name} {number(record['seconds'])}" if record["seconds"] else f"{name} –"


def core_regressions(records: list[Record]) -> str:
    """Seconds to the gap, for sparseopt and every peer, the fastest first."""
    solved = named(records, "seconds to the gap")
    found = named(records, "ours against the fastest peer")

    def rows(record: Record, ours: bool) -> list[Record]:
        same = [r for r in solved if (r["part"], r["problem"]) == (record["part"], record["problem"])]
        return sorted((r for r in same if _ours(r) == ours), key=lambda r: r["seconds"] or float("inf"))

    def ours(record: Record) -> Any:
        mine = rows(record, True)
        return mine[0]["seconds"] if len(mine) == 1 else ", ".join(map(_shown, mine))

    columns: list[Column] = [
        ("problem", lambda r: f"{r['part']}: {r['problem']}"),
        ("sparseopt", ours),
        ("steps", lambda r: ", ".join(f"{s['steps']:,}" for s in rows(r, True) if "steps" in s)),
        ("peers", lambda r: ", ".join(map(_shown, rows(r, False)))),
        ("sparseopt over the fastest peer", field("ratio")),
    ]
    parts = {record["part"] for record in solved}
    return table([r for r in found if r["part"] in parts], columns) if solved else missing(CORE)


def core_pictures(records: list[Record]) -> str:
    """Seconds and iterations until the objective is close to the best one."""
    found = named(records, "seconds to the objective")
    columns: list[Column] = [
        ("problem", lambda r: f"{r['part']}: {r['problem']}"),
        ("target", field("target")),
        ("solver", field("solver")),
        ("seconds", field("seconds")),
        ("iterations", field("iterations")),
        ("seconds to a certified gap", field("certified_seconds")),
        ("closest, if not reached", lambda r: r["suboptimality"] if r["seconds"] is None else None),
    ]
    return table(sorted(found, key=lambda r: (r["part"], -r["target"])), columns) if found else missing(CORE)


def core_derivatives(records: list[Record]) -> str:
    """Seconds and errors of gradients of a validation loss."""
    found = named(records, "derivative")
    columns: list[Column] = [
        ("problem", field("problem")),
        ("method", field("way")),
        ("steps", field("steps")),
        ("seconds", field("seconds")),
        ("error, weight", field("error_in_weight")),
        ("error, target", field("error_in_target")),
    ]
    return table(found, columns) if found else missing(CORE)
