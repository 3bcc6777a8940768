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

In an expression `rows` are the records of the row, `of(field=value)` those that agree and `one(field=value)` the
last of these. A column without any value is left out. A table says which version of sparseopt made its records.

`{machine} FILE` links the file and says which versions, peers and machine it is from.
"""

import json
import math
import os
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
# What a column of numbers may hold.
NUMBER = re.compile(r"[-+−]?[\d,.]+(\s×\s10[⁻⁰¹²³⁴-⁹]+)?( %)?|10[⁻⁰¹²³⁴-⁹]+|[–∞]|no")
GRAPHS = {"grid": "image {0} × {0}", "cube": "cube {0} × {0} × {0}", "chain": "chain, {1:,} nodes",
          "road": "road network, {1:,} nodes", "minnesota": "Minnesota's roads, {1:,} nodes",
          "rgg": "random geometric graph, {1:,} nodes"}  # fmt: skip
Record = dict[str, Any]


@cache
def read(name: str) -> list[Record]:
    """The records of one file, shared by all tables of it."""
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def select(records: Iterable[Record], figure: str) -> list[Record]:
    """The records whose whole figure matches a regular expression, with its named groups as further fields."""
    found = ((record, re.fullmatch(figure, record.get("figure", ""))) for record in records)
    return [record | match.groupdict() for record, match in found if match]


def number(value: float) -> str:
    """Three digits; ∞ for a gap without a bound."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        mantissa, exponent = f"{value:.1e}".replace("-", "−", value < 0).split("e")
        power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return power if mantissa == "1.0" else f"{mantissa}\u00a0×\u00a0{power}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def problem_name(name: str, nodes: int, order: int) -> str:
    """A graph and a penalty in words: "grid256_k0" is an image of 256 × 256, order 0."""
    kind, _, rest = name.partition("_")
    word, size, _ = re.fullmatch(r"([a-z]+)(\d*)(k?)", kind).groups()
    return f"{GRAPHS[word].format(size, nodes)}, {'isotropic' if rest == 'isotropic' else f'order {order}'}"


def model_name(file: str) -> str:
    """The name of a model by that of its file."""
    return "Gemma 3" if file.startswith("gemma-3-270m") else "SmolLM2"


def groups(records: list[Record], fields: str | None) -> list[list[Record]]:
    """The records that agree in some fields together, in the order of the first; without fields each alone."""
    if fields is None:
        return [[record] for record in records]
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record.get(name.strip()) for name in fields.split(",")), []).append(record)
    return list(found.values())


def _digits(value: Any, count: int) -> str | None:
    """A fixed number of digits behind the point, none of a large number, nothing for nothing."""
    if not isinstance(value, float | int):
        return None
    return number(value) if abs(value) >= 1000 else f"{value:.{count}f}"


def _fastest(records: Iterable[Record], *names: str) -> str | None:
    """The fewest seconds of the solvers whose names begin so, "no" if none of them reached the target."""
    values = [record["seconds"] for record in records if record["solver"].startswith(names)]
    reached = [value for value in values if value]
    return number(min(reached)) if reached else ("no" if values else None)


def _against(records: list[Record], ours: str) -> Record:
    """How often one solver is the fastest, and its seconds over those of the fastest other one."""
    ratios = []
    for part in groups(records, "data, objective"):
        mine, *others = sorted(part, key=lambda record: record["solver"] != ours)
        least = min(record["seconds"] or math.inf for record in others)
        ratios.append((mine["seconds"] or math.inf) / least if mine["seconds"] or least < math.inf else 1.0)
    return {"problems": len(ratios), "first": sum(ratio < 1 for ratio in ratios), "median": statistics.median(ratios)}


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, int):
        return f"{value:,}"
    return re.sub(r"(?<=\d) x (?=\d)", "\u00a0×\u00a0", str(value or "–"))


EXPRESSIONS = Environment(undefined=ChainableUndefined, autoescape=False)
EXPRESSIONS.globals |= {"problem_name": problem_name, "model_name": model_name}
EXPRESSIONS.filters |= {
    "digits": _digits,
    "number": number,
    "fastest": _fastest,
    "against": _against,
    "reached": lambda r: number(r["seconds"]) if r["gap"] <= 1e-9 else f"gap {number(r['gap'])}",
    "median": lambda values: statistics.median(found) if (found := list(values)) else None,
}
compiled = cache(EXPRESSIONS.compile_expression)


def evaluate(expression: str, rows: list[Record]) -> Any:
    """The value of an expression for the records of one row."""

    def of(**fields: Any) -> list[Record]:
        return [row for row in rows if fields.items() <= {key: row.get(key) for key in fields}.items()]

    def one(**fields: Any) -> Record | None:
        found = of(**fields)
        return found[-1] if found else None

    return compiled(expression)(EXPRESSIONS.globals | rows[-1] | {"rows": rows, "of": of, "one": one})


def versions(records: list[Record]) -> str:
    """The versions of sparseopt that made some records."""
    return ", ".join(sorted({record["versions"]["sparseopt"] for record in records if "versions" in record}))


def table(name: str, columns: list[str], options: dict[str, str]) -> str:
    """The pipe table that a directive asks for; columns of numbers are aligned right, others left."""
    every = read(name)
    records = select(every, options["figure"]) if "figure" in options else every
    if "where" in options:
        records = [record for record in records if evaluate(options["where"], [record])]
    if "sort" in options:
        records = sorted(records, key=lambda record: evaluate(options["sort"], [record]))
    rows = groups(records, options.get("rows"))
    found = []
    for column in columns:
        heading, _, expression = column.partition(" = ")
        found.append((heading, [evaluate(expression or heading, row) for row in rows]))
    made = [versions(row) for row in rows]
    several = len({*made} - {""}) > 1
    if several:
        found.append(("sparseopt", made))
    shown = []
    for heading, values in found:
        if any(value not in (None, "") for value in values):
            cells = [_shown(value) for value in values]
            numbers = all(map(NUMBER.fullmatch, cells)) and not {"no", "–"}.issuperset(cells)
            shown.append([heading, "---:" if numbers else ":---", *cells])
    lines = "\n".join(f"| {' | '.join(line)} |" for line in zip(*shown, strict=True))
    return lines if several else f"{lines}\n\nMeasured with sparseopt {versions(records) or versions(every)}."


def machine(name: str, place: str) -> str:
    """The link to a file of records, and where they come from."""
    records = read(name)
    first = next(record for record in records if "machine" in record)
    listed: dict[str, str] = {}
    for record in records:
        listed |= record.get("versions", {}) | record.get("runtime_versions", {})
    listed["sparseopt"] = versions(records).replace(", ", " and ")
    peers = first.get("peers", {}) | {
        {"cut": "cut pursuit"}.get(word := record["solver"].split()[0], word): record["version"]
        for record in records
        if record.get("version") and not record["solver"].startswith("sparseopt")
    }
    host = first["machine"]
    made = ", ".join(f"{package} {version}" for package, version in listed.items())
    where = ", ".join(filter(None, (host["system"], host.get("processor"), f"{host['cores']} cores")))
    against = ", ".join(f"{package} {version}" for package, version in peers.items())
    return f"`{name}.jsonl`, [all {len(records):,} records]({place}): {made}; {where}." + (
        f" Peers: {against}." if against else ""
    )


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
        ("figure", "where", "sort", "rows"), directives.unchanged_required
    )

    def make(self) -> str:
        return table(self.arguments[0], [line for line in self.content if line.strip()], self.options)


class Machine(_Shown):
    """`{machine}`."""

    def make(self) -> str:
        file = FOLDER / f"{self.arguments[0]}.jsonl"
        return machine(self.arguments[0], os.path.relpath(file, Path(self.env.doc2path(self.env.docname)).parent))


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the two directives."""
    app.add_directive("records", Records)
    app.add_directive("machine", Machine)
    return {"parallel_read_safe": True}
