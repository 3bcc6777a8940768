"""Options: fields of a frozen dataclass that know their help, their values and what is wrong with one."""

import math
import textwrap
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any

from sparseopt.core.base.arguments import unknown

# The headings that options are shown under.
WHAT, KEEP, HOW, CALIBRATION, OUTPUT = "What to prune", "What to keep", "How to prune", "Calibration", "Output"

# Options that are no more, and what to use in their place.
ENDED = {
    "latency": "has ended: `parameters` is the budget of a smaller model",
    "gflops": "has ended: `sparseopt inspect --measure` measures the time of a run",
}

# What the values of a field's type are, and how an error calls them; true and false are no numbers.
_KINDS: dict[Any, tuple[type, str]] = {
    int: (int, "a whole number"),
    float: (Real, "a number"),
    bool: (bool, "true or false"),
    str: (str, "a text"),
}


@dataclass(frozen=True)
class Option:
    """One option; `options_of` fills in its name, its default, and what follows from the type of its field.

    The shell's options, the settings of the experiment tasks, the checks and the reference are made from the options
    of the recipes, so a new option is one new field.
    """

    help: str  # in a sentence or two; `{choices}` stands for its choices
    panel: str  # the heading that it is shown under
    type: Any = None  # of the values that a config can hold; given where Python code may give an object instead
    choices: Collection[str] = ()  # the words that it may be; by default those of a `Literal`
    read: Callable[[Any], Any] | None = None  # makes the value of a text, where the type does not say how
    least: float | None = None
    most: float | None = None
    below: float | None = None
    name: str = ""
    default: Any = None
    objects: bool = False  # whether Python code may give an object instead

    @property
    def allows_none(self) -> bool:
        return type(None) in typing.get_args(self.type)

    def mistake(self, value: Any) -> str | None:
        """Why a value cannot be used, as far as that shows without the other options; None where it can."""
        if value is None and self.allows_none:
            return None
        if self.objects and not isinstance(value, str | int | None):
            return None
        if self.choices:
            return None if value in self.choices else unknown(self.name, value, self.choices)
        for kind in (self.type, *typing.get_args(self.type)):
            expected, name = _KINDS.get(kind, (object, ""))
            if not isinstance(value, expected) or (isinstance(value, bool) and kind in (int, float)):
                return f"{self.name} must be {name}, given {value!r}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{self.name} must be finite, given {value}"
        if self.most is not None or self.below is not None:
            top, end = (self.most, "]") if self.below is None else (self.below, ")")
            if not (self.least <= value <= top and value != self.below):
                hint = f"; {value:g} % is {value / 100:g}" if top == 1 and 2 <= value <= 100 else ""
                return f"{self.name} must lie in [{self.least:g}, {top:g}{end}, given {value}{hint}"
        elif self.least is not None and not value >= self.least:
            return f"{self.name} must be at least {self.least:g}, given {value}"
        return None


def option(default: Any, help: str, panel: str, **details: Any) -> Any:
    """A field of a dataclass that is an option; `details` are further attributes of `Option`."""
    return field(default=default, metadata={"option": Option(help, panel, **details)})


def options_of(kind: type) -> dict[str, Option]:
    """The options of a dataclass, by name."""
    hints, found = typing.get_type_hints(kind), {}
    for each in fields(kind):
        given: Option = each.metadata["option"]
        hint = given.type or hints[each.name]
        literals = [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is typing.Literal]
        choices = tuple(given.choices or (word for part in literals for word in typing.get_args(part)))
        text = given.help.format(choices=" or ".join(", ".join(choices).rsplit(", ", 1)))
        found[each.name] = replace(
            given, help=text, type=hint, choices=choices, name=each.name, default=each.default, objects=bool(given.type)
        )
    return found


def attributes(options: Iterable[Option]) -> str:
    """The "Attributes:" section of a class's docstring."""
    section = "    Attributes:\n"
    for each in options:
        default = "" if each.default is None else f" Default: {each.default}."
        line = f"{each.name}: {each.help}{default}"
        section += textwrap.fill(line, 110, initial_indent=" " * 8, subsequent_indent=" " * 12) + "\n"
    return section


def ended(names: Iterable[str]) -> Mapping[str, str]:
    """Of these names, those of options that are no more, with what to use in their place."""
    return {name: ENDED[name] for name in names if name in ENDED}


def mistakes_of(checks: Iterable[Callable[[], Any]]) -> list[str]:
    """The texts of the ValueErrors that these checks raise."""
    found = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            found.append(str(error))
    return found
