"""Tables of scaling: measured and predicted times, and predictions for machines that were not available."""

from collections.abc import Callable
from typing import Any

from records import Column, Record, field, machine, missing, named, number, table
from scaling_model import Cost, Machine, block_seconds, calibration, grid_iteration, layer_iteration

SCALING = "make bench-scaling"
BASE = "1 process, 1 thread"
DEVICES = (1, 8, 64, 512, 4096)
# An accelerator of 2023: half of its bandwidth of 3.35 TB/s and of its rate of float32 products, as programs reach in
# practice; a network of 400 Gb/s per device, and 20 microseconds per message.
ACCELERATOR = Machine(1.7e12, 3.3e13, 2e-5, 4e10)
# Linears of a block by shape.
BLOCKS = {
    "the 7 linears of a 7B block": {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1},
    "the 384 of 128 experts, 768 x 2048": {(768, 2048): 256, (2048, 768): 128},
}


def _method(record: Record) -> str:
    """Only mAIHT has presets; older records have one for every method."""
    return f"maiht {record['preset']}" if record["method"] == "maiht" else record["method"]


def scaling_machine(records: list[Record]) -> str:
    """Versions, and the speed of a process in each layout."""
    found = named(records, "machine")
    if not found:
        return missing(SCALING)
    columns: list[Column] = [
        ("layout", field("layout")),
        ("copies, GB/s per process", lambda r: r["bandwidth"] / 1e9),
        ("products, Gflop/s per process", lambda r: r["rate"] / 1e9),
        ("a sum of three numbers, µs", lambda r: r["sum_seconds"] * 1e6 if "sum_seconds" in r else None),
        ("a message, µs", lambda r: r["message_seconds"] * 1e6 if "message_seconds" in r else None),
    ]
    return machine(named(records, "versions")[0]) + "\n" + table(found, columns)


def scaling_grid(records: list[Record]) -> str:
    """Steps of Doge-ADMM, one row per layout."""
    return _measured(
        records,
        "grid",
        ("grid", lambda r: f"{r['side']}²{' per process' if r.get('weak') else ''}, k={r['order']}, {r['dtype']}"),
        lambda r, grow, d: grid_iteration((r["side"] * grow, r["side"]), r["order"], d, 4 if "32" in r["dtype"] else 8),
        lambda r: 1,
        ("ms per step", lambda r: 1e3 * r["seconds"]),
    )


def scaling_layer(records: list[Record]) -> str:
    """Layer solves, one row per layout."""
    return _measured(
        records,
        "layer",
        (
            "layer",
            lambda r: f"{_method(r)}, {r['outputs']} x {r['inputs']}" + (" per process" if r.get("weak") else ""),
        ),
        lambda r, grow, d: layer_iteration(r["outputs"] * grow, r["inputs"], d),
        field("steps"),
        ("seconds", field("seconds")),
    )


def scaling_block(records: list[Record]) -> str:
    """The linears of a block, those of one shape side by side; one row per layout."""
    found = named(records, "block")
    if not found:
        return missing(SCALING)
    columns: list[Column] = [
        (
            "block",
            lambda r: f"{_method(r)}, width {r['width']}, keys {r['narrow']}, feed-forward {r['wide']}",
        ),
        ("layout", field("layout")),
        ("seconds", field("seconds")),
        ("speedup over one process on one core", field("speedup")),
    ]
    return table(found, columns)


def _measured(
    records: list[Record],
    figure: str,
    what: Column,
    cost: Callable[[Record, int, int], Cost],
    iterations: Callable[[Record], Any],
    time: Column,
) -> str:
    found, speeds = named(records, figure), {r["layout"]: r for r in named(records, "machine")}
    if not found or BASE not in speeds:
        return missing(SCALING)
    base: dict[str, float] = {}
    for record in found:
        task = what[1](record)
        if record["layout"] == BASE:
            base[task] = record["seconds"]
        devices = int(record["layout"].split(" ")[0])
        record["speedup"] = base[task] / record["seconds"] * (devices if record.get("weak") else 1)
        if devices == 1 or "without" in record["layout"]:
            continue
        # The time of one process, scaled with its work; exchanges take as long as measured between these processes.
        # While all processes work, each reaches less of the memory bandwidth.
        here, alone = speeds[record["layout"]], speeds[BASE]
        grow = devices if record.get("weak") else 1
        one, part = cost(record, 1, 1), cost(record, grow, devices)
        slower = alone["bandwidth"] / here["bandwidth"]
        network = Machine(1.0, 1.0, here["message_seconds"], here["link"])
        worked = base[task] * part.moved / one.moved * (slower if figure == "grid" else 1)
        exchanges = part.exchange_seconds(network, devices) * iterations(record)
        record["predicted"] = base[task] / (worked + exchanges) * grow
    columns: list[Column] = [
        what,
        ("layout", field("layout")),
        time,
        ("speedup over one process on one core", field("speedup")),
        ("predicted", field("predicted")),
    ]
    return table(found, columns)


def scaling_predicted(records: list[Record]) -> str:
    """Predictions for up to 4,096 accelerators; needs no records."""
    del records
    cases: list[tuple[str, Callable[[int], Cost]]] = [
        ("Doge-ADMM, 8192², k=0", lambda d: grid_iteration((8192, 8192), 0, d)),
        ("Doge-ADMM, 65536², k=0", lambda d: grid_iteration((65536, 65536), 0, d)),
        ("Doge-ADMM, 65536², k=1", lambda d: grid_iteration((65536, 65536), 1, d)),
        ("Doge-ADMM, 4096³, k=0", lambda d: grid_iteration((4096, 4096, 4096), 0, d)),
        ("mAIHT, 4096 x 4096 (7B)", lambda d: layer_iteration(4096, 4096, d)),
        ("mAIHT, 11008 x 4096 (7B)", lambda d: layer_iteration(11008, 4096, d)),
        ("mAIHT, 28672 x 8192 (70B)", lambda d: layer_iteration(28672, 8192, d)),
        ("Gram matrix and forward pass, 8192 inputs, 2¹⁸ tokens", lambda d: calibration(8192, 2**18, 1, d)),
    ]

    seconds: dict[str, Callable[[int], float]] = {
        name: lambda d, cost=cost: cost(d).seconds(ACCELERATOR, d) for name, cost in cases
    }
    for name, linears in BLOCKS.items():
        seconds[f"mAIHT, {name}"] = lambda d, linears=linears: block_seconds(linears, ACCELERATOR, d)

    def shown(took: Callable[[int], float], devices: int) -> str:
        return f"{number(1e3 * took(devices))} ({number(took(1) / took(devices))})"

    headings: list[Column] = [("ms per iteration (gain)", field("case"))]
    headings += [(f"{devices:,}", field(str(devices))) for devices in DEVICES]
    return table(
        ({"case": name} | {str(d): shown(took, d) for d in DEVICES} for name, took in seconds.items()), headings
    )
