"""Tables of models in common runtimes; each function takes the records of its file."""

from collections.abc import Callable
from typing import Any

from records import Column, Record, field, machine, missing, named, table

RUNTIME = "make bench-runtime DATA=folder"


def _timed(records: list[Record]) -> list[Record]:
    return [record for record in records if record["figure"].startswith("decode, ")]


def runtime_machine(records: list[Record]) -> str:
    """Versions of the runtimes and machine."""
    found = _timed(records)
    if not found:
        return missing(RUNTIME)
    versions: dict[str, str] = {}
    for record in found:
        versions |= record["runtime_versions"]
    return machine(found[0] | {"versions": versions})


def _speedups(records: list[Record], measured: str, predicted: str) -> str:
    """One row per model: what is predicted, and what each runtime measures."""
    found = {(record["runtime"], record["model"]): record for record in _timed(records)}
    if not found:
        return missing(RUNTIME)

    def at(runtime: str) -> Callable[[Record], Any]:
        return lambda row: (record := found.get((runtime, row["model"]))) and f"{record[measured]:.2f}"

    rows = {model: record for (_, model), record in reversed(found.items()) if model != "dense"}
    columns: list[Column] = [("model", field("model")), ("predicted", lambda row: f"{row[predicted]:.2f}")]
    columns += [(runtime, at(runtime)) for runtime in dict.fromkeys(runtime for runtime, _ in found)]
    return table(reversed(rows.values()), columns)


def runtime_decode(records: list[Record]) -> str:
    """How many times as fast as the dense model a token is decoded."""
    return _speedups(records, "value", "predicted_decode_speedup")


def runtime_prefill(records: list[Record]) -> str:
    """How many times as fast as the dense model the prompt is read."""
    return _speedups(records, "prefill_speedup", "predicted_prefill_speedup")


def runtime_sizes(records: list[Record]) -> str:
    """Time, size and perplexity: one row per runtime and model."""
    columns: list[Column] = [
        ("runtime", field("runtime")),
        ("model", field("model")),
        ("perplexity", lambda r: f"{r['perplexity']:.2f}"),
        ("decode, ms a token", lambda r: 1e3 * r["decode_seconds"]),
        ("prefill, s", field("prefill_seconds")),
        ("on disk, MB", lambda r: r["disk_bytes"] / 1e6),
        ("in memory, MB", lambda r: r["memory_bytes"] / 1e6),
    ]
    found = _timed(records)
    return table(found, columns) if found else missing(RUNTIME)


def runtime_skipped(records: list[Record]) -> str:
    """Runtimes that did not run, and why."""
    if not records:
        return missing(RUNTIME)
    found = named(records, "skipped")
    columns: list[Column] = [("not measured", field("runtime")), ("reason", field("reason"))]
    return table(found, columns) if found else "Every runtime ran.\n"
