"""Committed benchmark records, and MyST tables of them."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Column = tuple[str, Callable[[Record], Any]]


def read(file: Path) -> list[Record]:
    """The records of one file, none if there is no such file."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def table(records: Iterable[Record], columns: list[Column]) -> str:
    """A MyST pipe table; the first column is aligned left, the others right."""
    rows = [[_shown(value(record)) for _, value in columns] for record in records]
    align = ["---" if index == 0 else "---:" for index in range(len(columns))]
    lines = [[heading for heading, _ in columns], align, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def number(value: float) -> str:
    """Three digits; ∞ for a gap without a bound."""
    if value != value:
        return "–"
    if math.isinf(value):
        return "∞"
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        mantissa, exponent = f"{value:.1e}".split("e")
        power = f"10{_superscript(int(exponent))}"
        return power if mantissa == "1.0" else f"{mantissa}·{power}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def field(name: str) -> Callable[[Record], Any]:
    """The value of a field, None if it is absent."""
    return lambda record: record.get(name)


def named(records: list[Record], figure: str) -> list[Record]:
    """The records of one figure."""
    return [record for record in records if record["figure"] == figure]


def missing(command: str) -> str:
    """The text in place of a table without records."""
    return f"No records are committed for this table; `{command}` creates them.\n"


def machine(record: Record) -> str:
    """One line on where the figures come from."""
    versions = record.get("versions") or {
        key: record[key] for key in ("python", "sparseopt", "jax", "numpy") if key in record
    }
    host = record.get("machine", "")
    if isinstance(host, dict):
        # Older records do not name the processor.
        parts = [host["system"], host.get("processor"), f"{host['cores']} cores", *host["devices"]]
        place = ", ".join(filter(None, parts))
    else:
        place = ", ".join(filter(None, [host, record.get("device", "")]))
    if record.get("note"):
        place += f"; {record['note']}"
    return f"Measured with {', '.join(f'{name} {number}' for name, number in versions.items())} on {place}.\n"
