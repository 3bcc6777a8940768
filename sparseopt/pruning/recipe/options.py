"""The fields of recipes: their description, and what is wrong with a value.

A field is a key in YAML files, an option of the shell, a setting of experiments, a keyword in Python and a line of the
reference. All of these are made from it, so a new option is one new field.
"""

import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any

from pydantic import BaseModel, Field, GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails
from pydantic_core.core_schema import no_info_wrap_validator_function

from sparseopt.core.base.arguments import Mistakes, suggest, unknown
from sparseopt.system.yaml_file import Location

# The headings that options are shown under.
WHAT, KEEP, HOW, CALIBRATION, OUTPUT = "What to prune", "What to keep", "How to prune", "Calibration", "Output"

# Options, and values of options, that no longer exist, and what to use instead; see `ended`.
_ENDED = {
    "samples": "is called `windows` since 0.3",
    "heldout_samples": "is called `heldout_windows` since 0.3",
    "windows first": "is `window_choice` first since 0.3: `windows` is their number",
    "windows spread": "is `window_choice` spread since 0.3: `windows` is their number",
    "windows random": "is `window_choice` random since 0.3: `windows` is their number",
    "reconstruct": "is called `train_epochs` since 0.3",
    "distil": "is called `distil_epochs` since 0.3",
    "sparsities": "is a table in `targets` since 0.3",
    "allocation owl": "has ended: `curves` distributes the sparsity by measured losses",
    "variants": "has ended: more `windows` are better in the same time; effort most uses four times as many",
    "block_score": "has ended: blocks are always removed by the loss; leave it out",
    "preset best": "is called `tuned` since 0.3",
    "latency": "has ended: `parameters` is the budget of a smaller model",
    "pack": "has ended: `bits` int8 or int4, or an output that ends in .gguf, makes a model small",
    "device_memory": "has ended: `--dry-run --memory 80GiB` says whether a run fits",
    "gflops": "has ended: `sparseopt prune --dry-run --measure` measures the time of a run",
}


def ended(name: str, value: Any) -> tuple[str, str] | None:
    """An option, or this value of one, that no longer exists, and what to use instead; None for others."""
    return next(((each, _ENDED[each]) for each in (name, f"{name} {value}") if each in _ENDED), None)


# What a value must be, by pydantic's name for the error.
_KINDS = {"int_type": "a whole number", "float_type": "a number", "bool_type": "true or false", "string_type": "a text"}


class RecipeError(Mistakes):
    """A recipe that cannot be used; the message lists everything that is wrong, one line each."""

    def __str__(self) -> str:
        return "the recipe cannot be used:\n  " + "\n  ".join(text for _, text in self.found)


@dataclass(frozen=True)
class Plain:
    """In `Annotated`: the type of the values that a file can hold; Python code may pass an object instead."""

    type: Any

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def checked(given: Any, check: Callable[[Any], Any]) -> Any:
            return check(given) if isinstance(given, str | int | None) else given

        return no_info_wrap_validator_function(checked, handler.generate_schema(self.type))


def option(default: Any, help: str, panel: str, **limits: float) -> Any:
    """A field with its help, in which `{choices}` stands for its allowed words, and its heading."""
    details: Any = {"description": help, "json_schema_extra": {"panel": panel}, **limits}
    return Field(default, **details)


def plain_type(field: FieldInfo) -> Any:
    """The type of the values that a file can hold, with its annotations; includes None if it may be left open."""
    plain = [each.type for each in field.metadata if isinstance(each, Plain)]
    found = plain[0] if plain else field.rebuild_annotation()
    return found if field.default is not None else found | None


def _parts(annotation: Any) -> Iterator[Any]:
    """The types of a union, and their annotations."""
    if typing.get_origin(annotation) in (typing.Union, UnionType, Annotated):
        for part in typing.get_args(annotation):
            yield from _parts(part)
    else:
        yield annotation


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """The words that a field allows; empty if it allows other values."""
    literals = [part for part in _parts(plain_type(field)) if typing.get_origin(part) is typing.Literal]
    return tuple(word for literal in literals for word in typing.get_args(literal))


def shell_type(field: FieldInfo) -> type:
    """The type of a field on a command line: bool, int, float, or str for all others."""
    parts = () if choices_of(field) else tuple(_parts(plain_type(field)))
    return next((kind for kind in (bool, int, float) if kind in parts), str)


def describe(model: type[BaseModel]) -> None:
    """Write the allowed words into the help of a model's fields, and the fields into its docstring."""
    section = "    Attributes:\n"
    for name, field in model.model_fields.items():
        choices = " or ".join(", ".join(choices_of(field)).rsplit(", ", 1))
        field.description = (field.description or "").format(choices=choices)
        default = "" if field.default is None else f" Default: {field.default}."
        line = f"{name}: {field.description}{default}"
        section += textwrap.fill(line, 110, initial_indent=" " * 8, subsequent_indent=" " * 12) + "\n"
    model.__doc__ = f"{model.__doc__}\n{section}"


def mistakes_in(error: ValidationError, model: type[BaseModel]) -> dict[Location, str]:
    """What is wrong with single fields, by location."""
    return {each["loc"]: _mistake(each, model.model_fields) for each in error.errors(include_url=False)}


def _mistake(error: ErrorDetails, fields: dict[str, FieldInfo]) -> str:
    name, kind, given = str(error["loc"][0]), error["type"], error["input"]
    limits = dict(error.get("ctx", {}))
    if "error" in limits:
        return str(limits["error"])
    if found := ended(name, given):
        return " ".join(found)
    if kind == "extra_forbidden":
        hint = suggest(name, fields)
        if name.endswith(("_stage", "_modifiers")):
            hint = "it is one of llm-compressor's recipes; the documentation has a page on coming from it"
        return f"{name}: no such key; {hint}"
    if kind == "literal_error":
        return unknown(name, given, choices_of(fields[name]))
    if kind == "finite_number":
        return f"{name} must be finite, given {given}"
    if kind in _KINDS:
        return f"{name} must be {_KINDS[kind]}, given {given!r}"
    for each in fields[name].metadata:
        limits |= {key: getattr(each, key) for key in ("ge", "le", "lt") if hasattr(each, key)}
    if "lt" not in limits and "le" not in limits:
        return f"{name} must be at least {limits['ge']:g}, given {given}"
    top, end = (limits["le"], "]") if "le" in limits else (limits["lt"], ")")
    hint = f"; {given:g} % is {given / 100:g}" if top == 1 and 2 <= given <= 100 else ""
    return f"{name} must lie in [{limits['ge']:g}, {top:g}{end}, given {given}{hint}"


def told(field: str, check: Callable[[], Any]) -> Iterator[tuple[str, str]]:
    """The field with the text of the ValueError that a check raises; nothing if it raises none."""
    yield from ((field, text) for text in mistakes_of([check]))


def mistakes_of(checks: Iterable[Callable[[], Any]]) -> list[str]:
    """The texts of the ValueErrors that these checks raise."""
    found = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            found.append(str(error))
    return found
