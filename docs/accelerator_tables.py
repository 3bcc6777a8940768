"""Tables of layer solves that were compiled for accelerators, of which none was run, and of emulated roundings."""

from records import Column, Record, field, machine, missing, named, table

from sparseopt.layers.methods import find_method, method_cost

SHAPE = "4096 x 4096"
METHODS = ("wanda", "sparsegpt", "maiht tuned", "best")
TARGETS = ("v5e", "v6e", "h100")


def accelerators_layers(records: list[Record]) -> str:
    """The memory of layer solves on one device, as the compilers say and as `sparseopt inspect` does."""
    solves = [r for r in named(records, "program") if r["kind"] == "layer" and r["shape"] == SHAPE]
    if not solves:
        return missing("make bench-accelerators")
    found = {(record["program"].removesuffix(", unstructured"), record["target"]): record for record in solves}
    outputs, inputs = map(int, SHAPE.split(" x "))

    def estimated(label: str) -> float:
        name, _, preset = label.partition(" ")
        return method_cost(find_method(name, preset or None)).workspace.nbytes(outputs, inputs) / 1e6

    columns: list[Column] = [("method", field("method")), ("estimate, MB", field("estimate"))]
    columns += [(f"{target}, MB", field(target)) for target in TARGETS]
    rows = (
        {"method": label, "estimate": estimated(label)}
        | {target: found[label, target]["temporaries"] / 1e6 for target in TARGETS if (label, target) in found}
        for label in METHODS
    )
    return table(rows, columns)


def precision_machine(records: list[Record]) -> str:
    """Versions and machine."""
    return machine(records[0]) if records else missing("make bench-precision DATA=folder")


def precision_models(records: list[Record]) -> str:
    """Models that were pruned with rounded products."""
    if not records:
        return missing("make bench-precision DATA=folder")
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
