"""Docstrings as Sphinx reads them: the package writes plain text with backticks, Sphinx wants reStructuredText.

`code`                         -> literal, or a link where it is a public name
an indented block              -> literal block
lines with aligned columns     -> literal block
a Markdown table               -> a list table
stray |, * and name_           -> escaped
"""

import importlib
import itertools
import re
from collections.abc import Callable
from functools import cache
from typing import Any

SECTIONS = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Example|Examples|Note):$")
CODE = re.compile(r"`+([^`]+)`+")
# A sentence of one letter would be the marker of a list.
LETTER = re.compile(r"(^\s*|: )([A-Za-z])\.(?=\s|$)")
STRAY = re.compile(r"([|*])|(?<=\w)_(?!\w)")
LITERAL = (".. code-block:: text", "")
PUBLIC = ("sparseopt", "sparseopt.pruning", "sparseopt.models")


@cache
def public_names() -> dict[str, str]:
    """The full name of every public class and function."""
    found: dict[str, str] = {}
    for module_name in PUBLIC:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            thing = getattr(module, name)
            if getattr(thing, "__module__", "").startswith("sparseopt") and hasattr(thing, "__qualname__"):
                found[name] = f"{thing.__module__}.{thing.__qualname__}"
    return found


def process(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """The `autodoc-process-docstring` hook; it runs before napoleon."""
    lines[:] = convert(lines, own=name)
    if what in ("property", "attribute", "data"):
        lines.insert(0, "\\ ")  # or napoleon takes the words before the first colon for a type


def convert(lines: list[str], own: str = "") -> list[str]:
    """The lines of a docstring as reStructuredText; `own` is the full name of the documented object."""
    out: list[str] = []
    section, index = False, 0
    while index < len(lines):
        line, paragraph = lines[index], _until(lines, index, lambda row: bool(row.strip()))
        starts = index == 0 or not lines[index - 1].strip()
        if line and not line[0].isspace():
            section = bool(SECTIONS.fullmatch(line))
        if ">>>" in line or (section and line.lstrip().startswith("...")):
            taken = made = paragraph
        elif starts and line.startswith("|") and len(paragraph) > 2:
            taken, made = paragraph, _table(paragraph, own)
        elif starts and line.startswith("    ") and line.strip() and not section:
            taken = _until(lines, index, lambda row: not row.strip() or row.startswith("    "))
            while not taken[-1].strip():
                taken.pop()
            made = [*LITERAL, *taken, ""]
        elif starts and not section and _aligned(paragraph):
            taken, made = paragraph, [*LITERAL, *(f"    {row}" for row in paragraph), ""]
        else:
            taken, made = [line], [inline(line, own) if line.strip() else line]
        out += made
        index += len(taken)
    return out


def _until(lines: list[str], start: int, holds: Callable[[str], bool]) -> list[str]:
    """The lines from one on, as long as something holds."""
    return list(itertools.takewhile(holds, lines[start:]))


def _aligned(paragraph: list[str]) -> bool:
    return len(paragraph) > 1 and all(re.search(r"\S {3,}\S", row) for row in paragraph)


def _table(rows: list[str], own: str) -> list[str]:
    cells = [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in rows]
    out = [".. list-table::", "   :header-rows: 1", ""]
    for row in [cells[0], *cells[2:]]:
        for place, cell in enumerate(row):
            out.append(f"   {'* -' if place == 0 else '  -'} {inline(cell, own)}")
    return [*out, ""]


def inline(text: str, own: str = "") -> str:
    """One line: code in backticks becomes a literal or a link, other markup characters are escaped."""
    out: list[str] = []
    last = 0
    text = LETTER.sub(r"\1`\2`.", text)
    for match in CODE.finditer(text):
        out.append(_escaped(text[last : match.start()]))
        before = text[match.start() - 1 : match.start()]
        after = text[match.end() : match.end() + 1]
        out.append(("\\ " if before.isalnum() else "") + _code(match[1], own) + ("\\ " if after.isalnum() else ""))
        last = match.end()
    out.append(_escaped(text[last:]))
    return "".join(out)


def _code(code: str, own: str) -> str:
    target = public_names().get(code.removeprefix("so."))
    if target is None or own == target or own.startswith(f"{target}."):
        return f"``{code}``"
    return f":py:obj:`{code} <{target}>`"


def _escaped(text: str) -> str:
    return STRAY.sub(lambda match: "\\" + match[0], text)


def signature(
    app: Any, what: str, name: str, thing: Any, options: Any, arguments: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Array types by their public name; protocols and configs list their parts below and show no arguments."""
    if what == "class" and (getattr(thing, "_is_protocol", False) or hasattr(thing, "model_fields")):
        return "", None
    return tuple(text and text.replace("jaxlib._jax.Array", "Array") for text in (arguments, returns))  # type: ignore


def skip(app: Any, what: str, name: str, thing: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples ("Alias for field number 0") and pydantic's own attributes."""
    return True if type(thing).__name__ == "_tuplegetter" or name.rpartition(".")[2] == "model_config" else None
