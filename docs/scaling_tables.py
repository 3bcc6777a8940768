"""Tables of scaling, as measured on two cores."""

from records import Column, Record, field, machine, missing, named, table

SCALING = "make bench-scaling"
BASE = "1 process, 1 thread"
LAYOUT: list[Column] = [("layout", field("layout"))]
SPEEDUP: list[Column] = [("speedup over one process on one core", field("speedup"))]


def _method(record: Record) -> str:
    """Only mAIHT has presets; older records have one for every method."""
    return f"maiht {record['preset']}" if record["method"] == "maiht" else record["method"]


def scaling_machine(records: list[Record]) -> str:
    """Versions, and the speed of a process in each layout."""
    found = named(records, "machine")
    if not found:
        return missing(SCALING)
    columns: list[Column] = [
        *LAYOUT,
        ("copies, GB/s per process", lambda r: r["bandwidth"] / 1e9),
        ("products, Gflop/s per process", lambda r: r["rate"] / 1e9),
        ("a sum of three numbers, µs", lambda r: r["sum_seconds"] * 1e6 if "sum_seconds" in r else None),
        ("a message, µs", lambda r: r["message_seconds"] * 1e6 if "message_seconds" in r else None),
    ]
    return machine(named(records, "versions")[0]) + "\n" + table(found, columns)


def scaling_grid(records: list[Record]) -> str:
    """Steps of Doge-ADMM, one row per layout."""

    def grid(record: Record) -> str:
        each = " per process" if record.get("weak") else ""
        return f"{record['side']}²{each}, k={record['order']}, {record['dtype']}"

    return _measured(records, "grid", ("grid", grid), ("ms per step", lambda r: 1e3 * r["seconds"]))


def scaling_layer(records: list[Record]) -> str:
    """Layer solves, one row per layout."""

    def layer(record: Record) -> str:
        each = " per process" if record.get("weak") else ""
        return f"{_method(record)}, {record['outputs']} x {record['inputs']}{each}"

    return _measured(records, "layer", ("layer", layer), ("seconds", field("seconds")))


def scaling_block(records: list[Record]) -> str:
    """The linears of a block, those of one shape side by side; one row per layout."""

    def block(record: Record) -> str:
        return f"{_method(record)}, width {record['width']}, keys {record['narrow']}, feed-forward {record['wide']}"

    return _measured(records, "block", ("block", block), ("seconds", field("seconds")))


def _measured(records: list[Record], figure: str, what: Column, time: Column) -> str:
    found = named(records, figure)
    base = {what[1](record): record["seconds"] for record in found if record["layout"] == BASE}
    for record in found:
        # Rows "per process" have as many times the work.
        work = int(record["layout"].split(" ")[0]) if record.get("weak") else 1
        record["speedup"] = work * base[what[1](record)] / record["seconds"]
    return table(found, [what, *LAYOUT, time, *SPEEDUP]) if found else missing(SCALING)
