"""Tables of smaller dense models; each function takes the records of its file, and makes a table for each model."""

from collections.abc import Callable
from typing import Any

from records import Column, Record, field, machine, missing, named, table

SHRINK = "make bench-shrink DATA=folder"
TRAININGS = {
    "one shot": "one shot",
    "trained blocks": "trained blocks",
    "trained blocks, then logits": "and logits",
}
SHARES = {"0.75": "75 %", "0.5": "50 %"}
# Of one model, the records by the two parts of their figure, such as a size and a training.
Found = dict[tuple[str, str], Record]


def shrink_machine(records: list[Record]) -> str:
    """Versions and machine of the records."""
    return machine(records[0]) if records else missing(SHRINK)


def shrink_sizes(records: list[Record]) -> str:
    """What is kept, and the perplexity by the training after the one-shot solve."""

    def of_model(found: Found) -> str:
        # What a size keeps is the same in all of its rows.
        kept = {size: record["shape"] for (size, _), record in found.items()}
        last = {size: record for (size, training), record in found.items() if training == list(TRAININGS)[-1]}

        def of_last(show: Callable[[Record], Any]) -> Callable[[Record], Any]:
            return lambda row: show(last[row["name"]]) if row["name"] in last else None

        columns: list[Column] = [
            ("size", field("name")),
            ("channels", lambda row: kept[row["name"]]["channels"]),
            ("groups", lambda row: kept[row["name"]]["kv_heads"]),
            ("blocks", lambda row: len(kept[row["name"]]["blocks"])),
            ("parameters", lambda row: f"{kept[row['name']]['parameters'] / 1e6:.1f} M"),
            *((heading, _at(found, training, _perplexity)) for training, heading in TRAININGS.items()),
            ("by transformers", of_last(lambda record: _digits(record["transformers_perplexity"]))),
        ]
        if any(record["met"] is not None for record in last.values()):
            columns += [
                ("goal", of_last(lambda record: record["target"].removeprefix("at most "))),
                ("met", of_last(field("met"))),
            ]
        return table(_rows(found), columns)

    return _by_model(records, "perplexity, sizes", of_model)


def shrink_methods(records: list[Record]) -> str:
    """How channels are chosen and fitted: perplexity, and the error of the layers on held-out tokens."""

    def of_model(found: Found) -> str:
        columns: list[Column] = [("method", field("name"))]
        for share, heading in SHARES.items():
            setting = f"{share} of the channels"
            columns += [
                (heading, _at(found, setting, _perplexity)),
                ("held-out error", _at(found, setting, _error)),
            ]
        return table(_rows(found), columns)

    return _by_model(records, "perplexity, methods", of_model)


def shrink_windows(records: list[Record]) -> str:
    """Which windows of the text the model is calibrated on: perplexity of several runs."""

    def of_model(found: Found) -> str:
        columns: list[Column] = [("run", field("name"))]
        columns += [(f"--windows {choice}", _at(found, choice, _perplexity)) for choice in ("first", "spread")]
        return table(_rows(found), columns)

    return _by_model(records, "perplexity, windows", of_model)


def _by_model(records: list[Record], start: str, of_model: Callable[[Found], str]) -> str:
    """A table for each model, below its name and the dense perplexity; the figures begin with `start`."""
    models: dict[str, Found] = {}
    for record in records:
        name, _, setting = record["figure"].removeprefix(f"{start}, ").partition(", ")
        if record["figure"].startswith(f"{start}, ") and name != "dense" and record["value"] is not None:
            models.setdefault(record["model"], {})[name, setting] = record
    dense = {record["model"]: record["value"] for record in named(records, "perplexity, sizes, dense")}
    titles = {model: f"**{model}**" + (f", dense {dense[model]:.2f}" if model in dense else "") for model in models}
    tables = [f"{titles[model]}\n\n{of_model(found)}" for model, found in models.items()]
    return "\n".join(tables) or missing(SHRINK)


def _rows(found: Found) -> list[Record]:
    return [{"name": name} for name in dict.fromkeys(name for name, _ in found)]


def _at(found: Found, setting: str, show: Callable[[Record], Any]) -> Callable[[Record], Any]:
    """The column of one setting."""
    return lambda row: show(found[row["name"], setting]) if (row["name"], setting) in found else None


def _digits(perplexity: float | None) -> str | None:
    return None if perplexity is None else f"{perplexity:.2f}"


def _perplexity(record: Record) -> str | None:
    return _digits(record["value"])


def _error(record: Record) -> str | None:
    error = record["mean_heldout_error"]
    return None if error is None else f"{error:.4f}"
