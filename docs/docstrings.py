"""Docstrings as Sphinx reads them: the package writes plain text with backticks, Sphinx wants reStructuredText.

`code`                         -> literal, or a link where it is a public name
an indented block              -> literal block
stray |, * and name_           -> escaped
"""

import enum
import importlib
import inspect
import itertools
import re
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from sphinx.pycode import ModuleAnalyzer
from sphinx.util.inspect import signature as signature_of
from sphinx.util.inspect import stringify_signature

SECTIONS = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Example|Examples|Note):$")
# Code in backticks, or a character that would be markup.
MARKUP = re.compile(r"`+([^`]+)`+|[|*]|(?<=\w)_(?!\w)")
# A sentence of one letter would be the marker of a list.
LETTER = re.compile(r"(^\s*|: )([A-Za-z])\.(?=\s|$)")
# Arrays in a signature, and the names that their own documentation gives them.
ARRAY = re.compile(r"(?<![\w.])(?:jaxlib\._jax\.)?(Array|ndarray)\b")
ARRAYS = {"Array": "~jax.Array", "ndarray": "~numpy.ndarray"}
# Where public names are, in this order of precedence for a name that several hand out.
PUBLIC = ("sparseopt", "core", "trend", "models", "pruning", "scalar")
# Whose methods need no docstring of their own.
PROTOCOLS = ("ScalarLoss", "Penalty", "Norm", "Conjugate", "LinearMap", "Solver")


@cache
def public_names() -> dict[str, Any]:
    """Every public class, function and value, by the path under which it has a page."""
    sparseopt = importlib.import_module("sparseopt")
    found: dict[str, Any] = {}
    for module in PUBLIC:
        holder = getattr(sparseopt, module, sparseopt)
        for name in holder.__all__:
            thing = getattr(holder, name)
            if not inspect.ismodule(thing) and not any(thing is other for other in found.values()):
                found[f"{holder.__name__ if module != 'scalar' else 'sparseopt.scalar'}.{name}"] = thing
    return found


@cache
def links() -> dict[str, str]:
    """The path of a public name or method by what stands for it: `prune_layer`, `pruning.prune_layer`, `Graph.grid`."""
    found: dict[str, str] = {}
    for path, thing in reversed(public_names().items()):
        members = dir(thing) if inspect.isclass(thing) else []
        for place in (path, *(f"{path}.{name}" for name in members if is_shown(name, getattr(thing, name)))):
            found[place.removeprefix(path.rpartition(".")[0] + ".")] = place
            found[place.removeprefix("sparseopt.")] = place
    return found


def is_shown(name: str, thing: Any) -> bool | None:
    """Whether a member of a class, if it is a function, a property or of an enum, is defined here; None for others."""
    function = next((found for key in ("fget", "func") if (found := getattr(thing, key, None))), thing)
    home = getattr(function, "__module__", None) or getattr(getattr(thing, "__objclass__", None), "__module__", "")
    if callable(function) or hasattr(thing, "__objclass__") or isinstance(thing, enum.Enum):
        return home.startswith("sparseopt") and (not name.startswith("_") or name == "__call__")
    return None


def process(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """The `autodoc-process-docstring` hook; it runs before napoleon."""
    if what == "data":
        lines[:] = _comment(name.rpartition(".")[2], thing) or lines
    if what == "method" and (not any(lines) or lines[0] == "Call self as a function."):
        lines[:] = _protocol(*name.rpartition(".")[::2])
    own = _own(name, thing)
    lines[:] = convert(lines, {code: path for code, path in links().items() if code not in own})
    if what in ("property", "attribute"):
        lines.insert(0, "\\ ")  # or napoleon takes the words before the first colon for a type


def _own(name: str, thing: Any) -> set[str]:
    """What a docstring names without a link: the object itself and its arguments."""
    owners = {code for code, path in links().items() if f"{name}.".startswith(f"{path}.")}
    try:
        return owners | set(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        return owners


def _comment(name: str, value: Any) -> list[str]:
    """What the comment `#:` above a value's definition says."""
    ours = {key: vars(module) for key, module in sys.modules.items() if key.startswith("sparseopt.")}
    for module in [key for key, names in ours.items() if names.get(name) is value]:
        if found := ModuleAnalyzer.for_module(module).find_attr_docs().get(("", name)):
            return found
    return []


def _protocol(owner: str, method: str) -> list[str]:
    """Which protocol documents a method of a class that has no docstring."""
    made, core = public_names().get(owner), importlib.import_module("sparseopt.core")
    for name in PROTOCOLS:
        parts = [part for part, _ in inspect.getmembers(getattr(core, name), inspect.isfunction) if part[0] != "_"]
        if method in parts and all(hasattr(made, part) for part in parts):
            return [f"See `{name}.{method}`."]
    return []


def convert(lines: list[str], known: Mapping[str, str] = {}) -> list[str]:
    """The lines of a docstring as reStructuredText; `known` are the paths of the names to link."""
    out: list[str] = []
    section, index = False, 0
    while index < len(lines):
        line = lines[index]
        starts = index == 0 or not lines[index - 1].strip()
        if line and not line[0].isspace():
            section = bool(SECTIONS.fullmatch(line))
        if ">>>" in line or (section and line.lstrip().startswith("...")):
            taken = made = list(itertools.takewhile(str.strip, lines[index:]))
        elif starts and line.startswith("    ") and line.strip() and not section:
            taken = list(itertools.takewhile(lambda row: not row.strip() or row.startswith("    "), lines[index:]))
            while not taken[-1].strip():
                taken.pop()
            made = [".. code-block:: text", "", *taken, ""]
        else:
            taken, made = [line], [inline(line, known) if line.strip() else line]
        out += made
        index += len(taken)
    return out


def inline(text: str, known: Mapping[str, str]) -> str:
    """One line: code in backticks becomes a literal or a link, other markup characters are escaped."""

    def marked(match: re.Match[str]) -> str:
        code, line = match[1], match.string
        if code is None:
            return "\\" + match[0]
        path = known.get(re.sub(r"^(so|sparseopt)\.", "", code))
        made = f":py:obj:`{code} <{path}>`" if path else f"``{code}``"
        before, after = line[: match.start()][-1:].isalnum(), line[match.end() :][:1].isalnum()
        return "\\ " * before + made + "\\ " * after

    return MARKUP.sub(marked, LETTER.sub(r"\1`\2`.", text))


def signature(
    app: Any, what: str, name: str, thing: Any, options: Any, arguments: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Arrays by their public names; protocols, configs and enums list their parts below and show no arguments."""
    if what == "class":
        if getattr(thing, "_is_protocol", False) or hasattr(thing, "model_fields") or issubclass(thing, enum.Enum):
            return "", None
        if (arguments or "").startswith("(*args"):  # of the metaclass of Flax's modules
            own = signature_of(thing.__init__, bound_method=True)
            arguments = stringify_signature(own, unqualified_typehints=True, show_return_annotation=False)
    return tuple(text and ARRAY.sub(lambda found: ARRAYS[found[1]], text) for text in (arguments, returns))  # type: ignore


def skip(app: Any, what: str, name: str, thing: Any, skipped: bool, options: Any) -> bool | None:
    """Show what users call, with or without a docstring, and nothing that is defined outside this package."""
    if what in ("class", "exception") and (shown := is_shown(name, thing)) is not None:
        return not shown
    # "Alias for field number 0" of named tuples, and pydantic's own.
    return True if type(thing).__name__ == "_tuplegetter" or name == "model_config" else None
