"""Tables of the committed benchmark records, `docs/benchmarks/FILE.jsonl`, written in the pages that show them.

    ```{records} FILE
    :figure: perplexity, models, (?P<run>.+) at (?P<setting>[^,]+)
    :rows: run

    method = run
    50 % = one(setting="0.5").value|digits(2)
    seconds
    ```

Each line is a column, its heading and a Jinja expression of the record's fields (the heading alone names the field).

    figure     a regular expression for the whole `figure` of a record; its named groups become fields
    where      an expression: the records that count
    sort       an expression: their order
    rows       fields; the records that agree in them are one row, with the fields of the last
    each       fields; the records that agree in them have a table of their own
    title      an expression: the words above each of these tables
    total      the name of a last row that adds up the numbers

In an expression `rows` are the records of the row, `of(field=value)` those of them that agree, `one(field=value)` the
last of these, and `all` the records of the file. A column without any value is left out.

`{machine} FILE` is the line on versions and machine, and with `:peers:` the public solvers and what was not measured.
A table without records becomes a sentence that names the command which makes them.
"""

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from jinja2 import ChainableUndefined, Environment
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

FOLDER = Path(__file__).resolve().parent / "benchmarks"
Record = dict[str, Any]


@cache
def read(name: str) -> list[Record]:
    """The records of one file, none if there is no such file; shared by all tables of it."""
    file = FOLDER / f"{name}.jsonl"
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def select(records: Iterable[Record], figure: str) -> list[Record]:
    """The records whose whole figure matches a regular expression, with its named groups as further fields."""
    found = ((record, re.fullmatch(figure, record.get("figure", ""))) for record in records)
    return [record | match.groupdict() for record, match in found if match]


def missing(name: str) -> str:
    """The text in place of a table without records."""
    needs = {"trend": "TRUTH=folder", "trend_peers": "TRUTH=folder REFERENCES=folder"}
    needs |= dict.fromkeys(("quality", "prune", "shrink", "runtime", "precision"), "DATA=folder")
    target = name if name == "families" else f"bench-{name.replace('_', '-')}"
    command = " ".join(filter(None, ("make", target, needs.get(name))))
    return f"No records are committed for this table; `{command}` creates them."


def number(value: float) -> str:
    """Three digits; ∞ for a gap without a bound."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        mantissa, exponent = f"{value:.1e}".split("e")
        power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return power if mantissa == "1.0" else f"{mantissa}·{power}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def _digits(value: Any, count: int) -> str | None:
    """A fixed number of digits behind the point, nothing for nothing."""
    return f"{value:.{count}f}" if isinstance(value, float | int) else None


def _spread(values: Iterable[float]) -> str | None:
    """The median, and the range in parentheses."""
    values = list(values)
    if not values:
        return None
    between = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.2f}{between}"


def _fastest(values: Iterable[float | None]) -> str | None:
    """The least of the seconds of those who reached the target."""
    values = list(values)
    reached = [value for value in values if value]
    return number(min(reached)) if reached else ("no" if values else None)


def _times(records: Iterable[Record]) -> str:
    """Each solver with its seconds, the fastest first."""
    order = sorted(records, key=lambda record: record["seconds"] or math.inf)
    return ", ".join(f"{r['solver']} {number(r['seconds']) if r['seconds'] else '–'}" for r in order)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, int):
        return f"{value:,}"
    return str(value or "") or "–"


EXPRESSIONS = Environment(undefined=ChainableUndefined, autoescape=False)
EXPRESSIONS.filters |= {
    "digits": _digits,
    "number": number,
    "spread": _spread,
    "fastest": _fastest,
    "times": _times,
    "median": lambda values: statistics.median(found) if (found := list(values)) else None,
}
EXPRESSIONS.tests["startswith"] = str.startswith
compiled = cache(EXPRESSIONS.compile_expression)


def evaluate(expression: str, rows: list[Record], every: list[Record]) -> Any:
    """The value of an expression for the records of one row."""

    def of(**fields: Any) -> list[Record]:
        return [row for row in rows if fields.items() <= {key: row.get(key) for key in fields}.items()]

    def one(**fields: Any) -> Record | None:
        found = of(**fields)
        return found[-1] if found else None

    known = EXPRESSIONS.globals | rows[-1] | {"rows": rows, "of": of, "one": one, "all": every}
    return compiled(expression)(known)


def groups(records: list[Record], fields: str | None) -> list[list[Record]]:
    """The records that agree in some fields together, in the order of the first; without fields each alone."""
    if fields is None:
        return [[record] for record in records]
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record.get(name.strip()) for name in fields.split(",")), []).append(record)
    return list(found.values())


def tables(name: str, columns: list[str], options: dict[str, str]) -> str:
    """The MyST text of the tables that a directive asks for."""
    every = read(name)
    records = select(every, options["figure"]) if "figure" in options else every
    if "where" in options:
        records = [record for record in records if evaluate(options["where"], [record], every)]
    if "sort" in options:
        records = sorted(records, key=lambda record: evaluate(options["sort"], [record], every))
    if not records:
        return "None of the records." if every else missing(name)
    parts = []
    for part in groups(records, options["each"]) if "each" in options else [records]:
        if "each" in options:
            parts.append(f"**{evaluate(options.get('title', options['each']), part, every)}**")
        parts.append(_table(groups(part, options.get("rows")), columns, every, options.get("total")))
    return "\n\n".join(parts)


def _table(rows: list[list[Record]], columns: list[str], every: list[Record], total: str | None) -> str:
    """A pipe table; the first column is aligned left, the others right."""
    shown = []
    for column in columns:
        heading, _, expression = column.partition(" = ")
        values = [evaluate(expression or heading, row, every) for row in rows]
        if total:
            numbers = [value for value in values if isinstance(value, int | float)]
            values.append(sum(numbers) if numbers else total)
        if any(value not in (None, "") for value in values):
            align = "---:" if shown else "---"
            shown.append([heading, align, *map(_shown, values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*shown, strict=True))


def machine(file: str, peers: bool) -> str:
    """Where the figures of a file come from, and on request whom they compare with."""
    records = read(file)
    if not records:
        return missing(file)
    first = next((record for record in records if "machine" in record), {})
    versions: Record = {}
    for record in records:
        versions |= record.get("runtime_versions", {})
    host = first["machine"]
    parts = [host["system"], host.get("processor"), f"{host['cores']} cores", *host["devices"]]
    listed = ", ".join(f"{package} {version}" for package, version in (versions or first["versions"]).items())
    lines = [f"Measured with {listed} on {', '.join(filter(None, parts))}."]
    if peers:
        others = [r for r in records if r.get("version") and not r["solver"].startswith("sparseopt")]
        python = "".join({f" with Python {r['python']}" for r in others if "python" in r})
        solvers: dict[str, set[str]] = {}
        for record in others:
            name = record["solver"].partition(",")[0]
            version = f"{record['version']}{python}"
            solvers.setdefault(f"{name.split()[0]} {version}", set()).add(f"{name} {version}")
        # Several solvers of one package are one peer.
        named = [package if len(same) > 1 else same.pop() for package, same in solvers.items()]
        seen = {record["solver"] for record in others}
        lines.append(f"Each solver had {first['cores']} core. Peers: {', '.join(named) or 'none'}.")
        skipped = {r.get("solver") or r.get("part"): r["reason"] for r in select(records, "SKIPPED")}
        lines += [f"Not measured: {what} ({why})." for what, why in skipped.items() if what and what not in seen]
    return " ".join(lines)


class _Shown(SphinxDirective):
    """Markdown made from the records of a file, which the page then depends on."""

    required_arguments = 1
    has_content = True

    def make(self) -> str:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(FOLDER / f"{self.arguments[0]}.jsonl"))
        try:
            text = self.make()
        except Exception as error:
            raise self.error(f"{self.arguments[0]}: {error!r}") from error
        holder = nodes.container()
        self.state.nested_parse(StringList(text.splitlines(), self.get_source_info()[0]), self.content_offset, holder)
        return holder.children


class Records(_Shown):
    """`{records}`."""

    option_spec: ClassVar[dict[str, Callable[[str], Any]]] = dict.fromkeys(
        ("figure", "where", "sort", "rows", "each", "title", "total"), directives.unchanged_required
    )

    def make(self) -> str:
        return tables(self.arguments[0], [line for line in self.content if line.strip()], self.options)


class Machine(_Shown):
    """`{machine}`."""

    option_spec: ClassVar[dict[str, Callable[[str], Any]]] = {"peers": directives.flag}

    def make(self) -> str:
        return machine(self.arguments[0], "peers" in self.options)


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the two directives."""
    app.add_directive("records", Records)
    app.add_directive("machine", Machine)
    return {"parallel_read_safe": True}
