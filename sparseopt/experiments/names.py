"""Floor 7: penalties, solvers and pruning methods named in a config, by short name or by the path of your own class.

penalty: {name: l1, weight: 10}
penalty: {name: my_package.penalties.LogSum, weight: 10, sharpness: 2}
"""

import difflib
import hashlib
import importlib
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

import sparseopt as so

PENALTIES: Mapping[str, Callable[..., Any]] = {
    "l0": so.L0,
    "l1": so.L1,
    "mcp": so.MCP,
    "scad": so.SCAD,
    "group": so.GroupL2,
    "top_k": so.TopK,
    "n_of_m": so.NM,
}
SOLVERS: Mapping[str, Callable[..., Any]] = {
    "maiht": so.Maiht,
    "proximal_gradient": so.ProximalGradient,
    "iht": so.ProximalGradient,
}


def suggest(given: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the nearest known name, else the list of what is known."""
    known = list(known)
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(map(str, known))}"


def find_class(name: str, known: Mapping[str, Callable[..., Any]], kind: str) -> Callable[..., Any]:
    """The class of a short name, or the one at a dotted path.

    Raises:
        ValueError: if there is none, with the nearest known name.
    """
    if name in known:
        return known[name]
    module_name, dot, attribute = name.rpartition(".")
    if not dot:
        raise ValueError(
            f"unknown {kind} {name!r}: {suggest(name, known)}; your own class goes by its path, module.Class"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{kind} {name!r}: no module {error.name!r}; modules are looked up in the current folder, beside the "
            "config and among the installed packages"
        ) from None
    found = getattr(module, attribute, None)
    if not callable(found):
        classes = [n for n, value in vars(module).items() if isinstance(value, type)]
        raise ValueError(f"{kind} {name!r}: {module_name} has no class {attribute!r}; {suggest(attribute, classes)}")
    return found


def file_digest(found: Callable[..., Any]) -> str:
    """A hash of the file that defines a class; empty where there is no file."""
    file = getattr(inspect.getmodule(found), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


class Mistakes(ValueError):
    """Several mistakes in one block of a config, each with the key it sits at."""

    def __init__(self, found: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{key}: {text}" for key, text in found))
        self.found = found


class Named(BaseModel):
    """A class by name with its arguments; subclasses say which names are known and what the object must do.

    Attributes:
        name: short name or dotted path; every other key is an argument of the class.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    kind: ClassVar[str] = "object"
    known: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    methods: ClassVar[tuple[str, ...]] = ()

    name: str

    @model_validator(mode="after")
    def _arguments_fit(self) -> "Named":
        found = find_class(self.name, self.known, self.kind)
        parameters = inspect.signature(found).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        unknown = [] if open_ended else [key for key in self.arguments if key not in parameters]
        wrong = [(key, f"{self.name} has no such argument; {suggest(key, parameters)}") for key in unknown]
        plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        # An argument that a mistyped key stands for is one mistake, not two.
        meant = {near for key in unknown for near in difflib.get_close_matches(key, parameters, n=1)}
        wrong += [
            (key, f"{self.name} needs this argument, and it is missing")
            for key, p in parameters.items()
            if p.default is p.empty and p.kind in plain and key not in self.arguments and key not in meant
        ]
        lacking = [method for method in self.methods if not callable(getattr(found, method, None))]
        if lacking:
            wrong = [("name", f"{self.name} is no {self.kind}: it has no method {', '.join(lacking)}")]
        if wrong:
            raise Mistakes(wrong)
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """What the class is called with."""
        return dict(self.__pydantic_extra__ or {})

    @property
    def label(self) -> str:
        """For tables and legends: the class and its arguments."""
        parts = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in
                 self.arguments.items()]  # fmt: skip
        return f"{self.name.rpartition('.')[2]}({', '.join(parts)})" if parts else self.name.rpartition(".")[2]

    def build(self) -> Any:
        """The object."""
        return find_class(self.name, self.known, self.kind)(**self.arguments)

    def code_digest(self) -> str:
        """A hash of the file that holds a class of yours; empty for the package's own."""
        if self.name in self.known:
            return ""
        return file_digest(find_class(self.name, self.known, self.kind))


class PenaltyConfig(Named):
    """A penalty."""

    kind: ClassVar[str] = "penalty"
    known: ClassVar[Mapping[str, Callable[..., Any]]] = types.MappingProxyType(PENALTIES)
    methods: ClassVar[tuple[str, ...]] = ("value", "prox")


class SolverConfig(Named):
    """A solver for `sparseopt.solve`."""

    kind: ClassVar[str] = "solver"
    known: ClassVar[Mapping[str, Callable[..., Any]]] = types.MappingProxyType(SOLVERS)
    methods: ClassVar[tuple[str, ...]] = ("init", "step", "measure", "extract")
