"""Tables of the programs that were compiled for accelerators, of which none was run, and of emulated roundings."""

from collections.abc import Callable

from records import Column, Record, field, machine, missing, named, table

from sparseopt.layers.methods import find_method, method_cost

ACCELERATORS = "make bench-accelerators"
PRECISION = "make bench-precision DATA=folder"
SLOW = 30  # seconds


def accelerators_machine(records: list[Record]) -> str:
    """The versions of the compilers."""
    found = [record for record in named(records, "program") if "failed" not in record]
    if not found:
        return missing(ACCELERATORS)
    compilers = sorted({record["compiler"] for record in found})
    used, host = found[0]["versions"], found[0]["machine"]
    versions = ", ".join(f"{name} {used[name]}" for name in ("python", "sparseopt", "jax", "jaxlib"))
    by_target = []
    for target in dict.fromkeys(record["target"] for record in found):
        seconds = [record["compile_seconds"] for record in found if record["target"] == target]
        slow = sum(each > SLOW for each in seconds)
        by_target.append(f"{target} {slow} of {len(seconds)}, at most {max(seconds):.0f} s")
    return (
        f"Compiled by {', '.join(compilers)} with {versions}, on {host['system']} with {host['cores']} cores. Programs "
        f"that took more than {SLOW} s to compile: {'; '.join(by_target)}.\n"
    )


def accelerators_layers(records: list[Record]) -> str:
    """Layer solves on one device."""
    return _table(records, "layer", ("method and pattern", "out x in"), [("of the estimate", _of_estimate)])


def accelerators_blocks(records: list[Record]) -> str:
    """Blocks, embedding and head on one device, and what is computed of a linear besides its solve."""
    return _table(records, "block linear", ("program", "of"), [])


def accelerators_trend(records: list[Record]) -> str:
    """The trend filter on one device."""
    return _table(records, "trend", ("order and method", "graph"), [])


def accelerators_mesh(records: list[Record]) -> str:
    """Programs over eight devices; figures are of one device."""
    return _table(records, "mesh", ("program", "of"), [("collectives", _listed("collectives"))])


def precision_machine(records: list[Record]) -> str:
    """Versions and machine."""
    return machine(records[0]) if records else missing(PRECISION)


def precision_models(records: list[Record]) -> str:
    """Models that were pruned with rounded products."""
    if not records:
        return missing(PRECISION)
    columns: list[Column] = [
        ("method", lambda r: r["figure"].rpartition(", ")[2]),
        ("rounding", field("rounding")),
        ("of", field("products")),
        ("perplexity", lambda r: f"{r['value']:.2f}"),
        ("error of the layers", field("mean_relative_error")),
        ("held-out error", field("mean_heldout_error")),
        ("other weights kept", lambda r: f"{r['lost_share']:.2%}"),
    ]
    return table([record for record in records if record["value"] is not None], columns)


def _table(records: list[Record], kinds: str, names: tuple[str, str], more: list[Column]) -> str:
    found = [record for record in named(records, "program") if record["kind"] in kinds.split()]
    if not found:
        return missing(ACCELERATORS)
    columns: list[Column] = [
        (names[0], field("program")),
        (names[1], field("shape")),
        ("target", field("target")),
        ("compile, s", field("compile_seconds")),
        ("arguments, MB", _megabytes("arguments")),
        ("temporaries, MB", _megabytes("temporaries")),
        *more,
        ("Gflop a pass", lambda r: r["flops"] / 1e9 if r.get("flops") is not None else None),
        ("library calls", _libraries),
    ]
    return table(found, columns)


def _megabytes(name: str) -> Callable[[Record], float | None]:
    return lambda record: record[name] / 1e6 if name in record else None


def _of_estimate(record: Record) -> float | None:
    """The temporaries over what `sparseopt inspect` estimates for the solve."""
    label, _, pattern = record["program"].partition(", ")
    name, _, preset = label.partition(" ")
    outputs, inputs = map(int, record["shape"].split(" x "))
    workspace = method_cost(find_method(name, preset or None, pattern=pattern)).workspace
    return record["temporaries"] / workspace.nbytes(outputs, inputs) if "temporaries" in record else None


def _libraries(record: Record) -> str:
    if "failed" in record:
        return "not compiled"
    return _listed("library_calls")(record) or "none"


def _listed(name: str) -> Callable[[Record], str]:
    def listed(record: Record) -> str:
        return ", ".join(f"{count} {call}" for call, count in record.get(name, {}).items())

    return listed
