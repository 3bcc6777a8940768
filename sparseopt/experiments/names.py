"""Penalties and methods in a config, by short name or by the path of your own class.

penalty: {name: l1, weight: 10}
penalty: {name: my_package.penalties.CappedL1, weight: 10, cap: 60}
method: doge

Importing a path runs its module. A config may come from a stranger, so a path outside this package is imported only if
the caller allows it: all paths, or paths in the listed packages.
"""

import difflib
import hashlib
import importlib
import inspect
import reprlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from sparseopt.core.base.arguments import Mistakes, suggest
from sparseopt.core.penalties.names import PENALTIES
from sparseopt.trend.methods.choice import AUTO, METHODS

# Whether paths outside this package may be imported: all, none, or paths in the listed packages.
AllowCode = bool | Collection[str]


def shortened(value: Any) -> str:
    """A value for an error message, without the middle of a long one."""
    writer = reprlib.Repr()
    writer.maxlevel, writer.maxstring, writer.maxother = 3, 100, 100
    return writer.repr(value)


def worded(value: Any) -> str:
    """A setting as a word of a name or a legend."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def standing(word: str) -> Callable[[], str]:
    """A known name that stands for itself, since its user knows it."""
    return lambda: word


def may_import(path: str, allow_code: AllowCode) -> bool:
    """Whether a dotted path outside this package may be imported."""
    if isinstance(allow_code, bool):
        return allow_code
    packages = [allow_code] if isinstance(allow_code, str) else allow_code
    return any(path.startswith(f"{package}.") for package in packages)


def find_class(
    name: str, known: Mapping[str, Callable[..., Any]], kind: str, allow_code: AllowCode = False
) -> Callable[..., Any]:
    """The class with a short name or at a dotted path; classes of this package are always allowed.

    Raises:
        ValueError: if there is none, with the nearest known name; before any import, if the path is not allowed.
    """
    if name in known:
        return known[name]
    module_name, dot, attribute = name.rpartition(".")
    if not dot or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(
            f"unknown {kind} {name!r}: {suggest(name, known)}; name your own class by its path, module.Class"
        )
    package = name.partition(".")[0]
    allowed = may_import(name, allow_code)
    if not allowed and package != "sparseopt":
        raise ValueError(
            f"{name!r} is the path of a {kind} outside sparseopt: importing it runs whatever code its module holds, so "
            f"nothing was imported. If it is yours, or you trust who wrote it, allow it with --allow-code, or with "
            f"--allow-package {package} for that installed package only; in Python with allow_code=True or "
            f"allow_code=[{package!r}]"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{kind} {name!r}: no module {error.name!r}; modules are looked up among the installed packages and, with "
            "--allow-code, in the current folder and next to the config"
        ) from None
    found = getattr(module, attribute, None)
    if not callable(found):
        classes = [name for name, _ in inspect.getmembers(module, inspect.isclass)]
        raise ValueError(f"{kind} {name!r}: {module_name} has no class {attribute!r}; {suggest(attribute, classes)}")
    # From this package only classes: a function would be called with any arguments in a config.
    if not allowed and not (isinstance(found, type) and found.__module__.partition(".")[0] == "sparseopt"):
        raise ValueError(f"{kind} {name!r}: {attribute} is no class of sparseopt; name a class")
    return found


def file_digest(found: Callable[..., Any]) -> str:
    """A hash of the file that defines a class; empty if there is no file."""
    file = getattr(inspect.getmodule(found), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


class Named(BaseModel):
    """A class by name with its arguments; subclasses set the known names and the methods that your own class must have.

    A name without arguments may be given as a word; a known one is written as a word too.
    Paths are imported if the pydantic context `{"allow_code": ...}` allows; without one, none are.

    Attributes:
        name: short name or dotted path; every other key is an argument of the class.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    kind: ClassVar[str] = "object"
    known: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    methods: ClassVar[tuple[str, ...]] = ()

    name: str
    _found: Callable[..., Any] = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _by_word(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    @model_serializer(mode="wrap")
    def _as_word(self, as_block: SerializerFunctionWrapHandler) -> Any:
        return self.name if self.name in self.known and not self.arguments else as_block(self)

    @model_validator(mode="after")
    def _arguments_fit(self, info: ValidationInfo) -> "Named":
        try:
            found = find_class(self.name, self.known, self.kind, (info.context or {}).get("allow_code", False))
        except ValueError as error:
            raise Mistakes([("name", str(error))]) from error
        self._found = found
        parameters = inspect.signature(found).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        unknown = [] if open_ended else [key for key in self.arguments if key not in parameters]
        wrong = [(key, f"{self.name} has no such argument; {suggest(key, parameters)}") for key in unknown]
        plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        # A mistyped argument is one mistake, not an unknown and a missing one.
        meant = {near for key in unknown for near in difflib.get_close_matches(key, parameters, n=1)}
        wrong += [
            (key, f"{self.name} needs this argument, and it is missing")
            for key, p in parameters.items()
            if p.default is p.empty and p.kind in plain and key not in self.arguments and key not in meant
        ]
        asked = () if self.name in self.known else self.methods
        lacking = [method for method in asked if not _has_method(found, method)]
        if lacking:
            wrong = [("name", f"{self.name} is no {self.kind}: it has no method {', '.join(lacking)}")]
        if wrong:
            raise Mistakes(wrong)
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the class."""
        return dict(self.__pydantic_extra__ or {})

    @property
    def label(self) -> str:
        """The class and its arguments, for tables and legends."""
        short = self.name.rpartition(".")[2]
        parts = [f"{key}={worded(value)}" for key, value in self.arguments.items()]
        return f"{short}({', '.join(parts)})" if parts else short

    def build(self) -> Any:
        """The object."""
        return self._found(**self.arguments)

    def code_digest(self) -> str:
        """A hash of the file of your own class; empty for a known name."""
        return "" if self.name in self.known else file_digest(self._found)


def _has_method(found: Callable[..., Any], method: str) -> bool:
    """Whether instances of a class have a method; `callable` of the class itself says nothing about `__call__`."""
    if isinstance(found, type):
        return any(callable(vars(base).get(method)) for base in found.__mro__)
    return callable(getattr(found, method, None))


class PenaltyConfig(Named):
    """A penalty."""

    kind: ClassVar[str] = "penalty"
    known: ClassVar[Mapping[str, Callable[..., Any]]] = PENALTIES
    methods: ClassVar[tuple[str, ...]] = ("value", "prox")


class TrendMethod(Named):
    """A method of the trend filter: a name for its defaults, or with settings, as in `{name: doge, B: 2}`."""

    kind: ClassVar[str] = "method"
    known: ClassVar[Mapping[str, Callable[..., Any]]] = {
        AUTO: standing(AUTO), **{name: type(method) for name, method in METHODS.items()},
    }  # fmt: skip
    methods: ClassVar[tuple[str, ...]] = ("refuses", "plan")

    @model_validator(mode="after")
    def _settings_fit(self) -> "TrendMethod":
        self.build()
        return self
