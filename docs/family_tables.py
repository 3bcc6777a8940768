"""The table of model families, from records that the tests against transformers write when they pass.

`make families` runs these tests and writes `docs/benchmarks/families.jsonl`; no cell is written by hand.
"""

import importlib
from collections.abc import Iterable

from records import Record, machine, missing, number, table

from sparseopt.models import FAMILIES

COMMAND = "make families"


def families_machine(records: list[Record]) -> str:
    """Versions used by the tests."""
    return machine(records[-1]) if records else missing(COMMAND)


def families_proved(records: list[Record]) -> str:
    """One row per family: what it is, and what the tests proved."""
    if not records:
        return missing(COMMAND)
    return table(
        [_row(model_type, [r for r in records if r["family"] == model_type]) for model_type in FAMILIES],
        [
            ("`model_type`", lambda row: row["name"]),
            ("What it is", lambda row: row["what"]),
            ("Logits equal: variants, largest difference", lambda row: row["logits"]),
            ("Pruned, exported, loaded by transformers", lambda row: row["pruned"]),
            ("Also from GGUF", lambda row: row["gguf"]),
        ],
    )


def _row(model_type: str, records: list[Record]) -> Record:
    return {
        "name": f"`{model_type}`",
        "what": _summary(model_type),
        "logits": _proof(r for r in records if r["fact"] == "logits"),
        "pruned": _proof(r for r in records if r["fact"] == "pruned"),
        "gguf": any(r["fact"] == "gguf" for r in records),
    }


def _proof(records: Iterable[Record]) -> str | None:
    """How many cases, and the largest difference among them."""
    errors = [record["largest_error"] for record in records]
    return f"{len(errors)}, {number(max(errors))}" if errors else None


def _summary(model_type: str) -> str:
    """The first sentence of the family's file."""
    module = importlib.import_module(FAMILIES[model_type].read_config.__module__)
    line = (module.__doc__ or "").partition("\n")[0]
    return line.removesuffix(".")
