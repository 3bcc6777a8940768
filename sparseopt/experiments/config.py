"""Floor 7: from a YAML file and `key=value` overrides to resolved runs, with every mistake named at once.

    YAML text -> plain values with line numbers -> overrides -> sweep expanded -> typed tasks

A sweep lists settings to vary by dotted key: `grid` takes every combination, `list` the combinations given.
"""

import itertools
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sparseopt.experiments.names import Mistakes, suggest
from sparseopt.experiments.task import Task
from sparseopt.experiments.tasks import find_task, nearest_task

Location = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """Safe YAML where 1e-6 is a number, as everybody but YAML 1.1 reads it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class ConfigError(ValueError):
    """A config that cannot be used; the text lists every mistake with its place and what to do."""


@dataclass(frozen=True)
class Run:
    """One resolved run of an experiment.

    Attributes:
        id: the settings that the sweep varies, as `key=value` joined by commas; empty without a sweep.
        settings: those settings.
        task: the typed config.
    """

    id: str
    settings: Mapping[str, Any]
    task: Task

    @property
    def subfolder(self) -> Path:
        """Where the run lives below the output folder."""
        return Path(self.task.name) / self.id if self.id else Path(self.task.name)


def load_config(path: Path, overrides: Sequence[str] = ()) -> list[Run]:
    """Read an experiment, apply `key=value` overrides, expand its sweep, and check every run.

    Raises:
        ConfigError: listing all mistakes, a line each: place in the file, what is wrong, the nearest known name.
    """
    if not path.is_file():
        raise ConfigError(f"there is no config file {path}; the project's own lie in configs/")
    values, lines = read_yaml(path)
    for override in overrides:
        _override(values, override)
    return expand(values, lines, str(path))


def expand(values: dict[str, Any], lines: Mapping[Location, int] | None = None, source: str = "config") -> list[Run]:
    """The runs of an experiment given as plain values; see `load_config`."""
    values = dict(values)
    mistakes: dict[tuple[Location, str], None] = {}
    sweep = values.pop("sweep", None)
    combinations = _combinations(sweep, mistakes)
    values_grid = sweep.get("grid") if isinstance(sweep, dict) else None
    kind = values.get("task")
    near, text = nearest_task(kind)
    if text:
        mistakes[(("task",), text)] = None
    if near is None:
        raise _report(mistakes, lines or {}, source)
    # The other mistakes are those of the task that was meant.
    values["task"] = near
    task_class = find_task(near)
    runs: dict[str, Run] = {}
    identities = [_identity(settings, _short) for settings in combinations]
    for settings in combinations:
        resolved = _deep_copy(values)
        for key, value in settings.items():
            try:
                set_by_path(resolved, key, value)
            except ValueError as error:
                mistakes[(("sweep",), str(error))] = None
        try:
            task = task_class.model_validate(resolved)
        except ValidationError as error:
            for location, text in _explain(error, task_class):
                swept = next((k for k in settings if f"{_path(location)}.".startswith(f"{k}.")), None)
                place: Location = ("sweep", "grid", swept) if swept and swept in (values_grid or ()) else location
                mistakes[(place, text)] = None
            continue
        identity = _identity(settings, _short)
        if identities.count(identity) > 1:
            identity = _identity(settings, _long)
        if identity in runs:
            mistakes[(("sweep",), f"the run {identity} appears twice")] = None
        runs[identity] = Run(identity, settings, task)
    if mistakes:
        raise _report(mistakes, lines or {}, source)
    return list(runs.values())


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Location, int]]:
    """Plain values of a YAML file, and the line of every key.

    Raises:
        ConfigError: for text that is no YAML mapping, or a key given twice in one block.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text in UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: no valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, `key: value` lines; given {type(values).__name__}")
    lines: dict[Location, int] = {}
    twice: list[str] = []

    def walk(node: yaml.Node, place: Location) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*place, key.value)
                if here in lines:
                    twice.append(f"  line {key.start_mark.line + 1}: {_path(here)} is given twice in one block")
                lines[here] = key.start_mark.line + 1
                walk(value, here)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*place, index)] = value.start_mark.line + 1
                walk(value, (*place, index))

    assert root is not None  # the text holds a mapping
    walk(root, ())
    if twice:
        raise ConfigError(f"{path} cannot be used:\n" + "\n".join(twice))
    return values, lines


def set_by_path(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, making blocks that are not there yet.

    Raises:
        ValueError: if a part of the path is a plain value.
    """
    *blocks, last = key.split(".")
    here = values
    for depth, block in enumerate(blocks):
        inner = here.setdefault(block, {})
        if not isinstance(inner, dict):
            raise ValueError(f"cannot set {key}: {'.'.join(blocks[: depth + 1])} is {inner!r} and not a block")
        here = inner
    here[last] = value


def get_by_path(values: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, None where there is none."""
    here: Any = values
    for part in key.split("."):
        if not isinstance(here, Mapping) or part not in here:
            return None
        here = here[part]
    return here


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key=value, as in order=1 or penalty.weight=20")
    try:
        set_by_path(values, key, yaml.load(text, Loader=_Loader))
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"override {override!r}: {error}") from None


def _combinations(sweep: Any, mistakes: dict[tuple[Location, str], None]) -> list[dict[str, Any]]:
    """Every combination of settings of a sweep; one empty combination without a sweep."""
    if sweep is None:
        return [{}]
    if not isinstance(sweep, dict):
        mistakes[(("sweep",), "must be a block with grid: or list:")] = None
        return [{}]
    for key in sweep.keys() - {"grid", "list"}:
        mistakes[(("sweep", key), f"no such key; {suggest(key, ('grid', 'list'))}")] = None
    grid, listed = sweep.get("grid", {}), sweep.get("list", [{}])
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
        mistakes[(("sweep", "grid"), "must map keys to lists of values, as in `order: [0, 1]`")] = None
        grid = {}
    if not isinstance(listed, list) or not listed or not all(isinstance(item, dict) for item in listed):
        mistakes[(("sweep", "list"), "must be a list of blocks of settings, as in `- {method: doge, order: 0}`")] = None
        listed = [{}]
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [{**item, **combination} for item in listed for combination in combinations]


def _explain(error: ValidationError, task_class: type[BaseModel]) -> Iterator[tuple[Location, str]]:
    """Place and text of every mistake that pydantic found."""
    for found in error.errors(include_url=False):
        place: Location = tuple(found["loc"])
        inner = found.get("ctx", {}).get("error")
        if isinstance(inner, Mistakes):
            for key, text in inner.found:
                yield (*place, key), text
        elif found["type"] == "extra_forbidden":
            model = _model_at(task_class, place[:-1])
            yield place, f"no such key; {suggest(str(place[-1]), model.model_fields if model else ())}"
        elif found["type"] == "missing":
            yield place, "this key is missing"
        elif found["type"] in ("literal_error", "enum") and isinstance(found["input"], str):
            expected = found["ctx"]["expected"]
            known = [word.strip("' ") for word in expected.replace(" or ", ",").split(",")]
            yield place, f"{found['input']!r} is not known; {suggest(found['input'], known)}"
        else:
            pydantic_text = found["msg"][0].lower() + found["msg"][1:]
            yield place, str(inner) if inner else f"{pydantic_text}, given {found['input']!r}"


def _model_at(model: type[BaseModel] | None, place: Location) -> type[BaseModel] | None:
    """The model class of the block at a place in a config."""
    for part in place:
        if model is None:
            return None
        if isinstance(part, str) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation)
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for a in typing.get_args(annotation) if (m := _model_in(a))), None)


def _report(mistakes: Mapping[tuple[Location, str], None], lines: Mapping[Location, int], source: str) -> ConfigError:
    def line_of(place: Location) -> str:
        while place and place not in lines:
            place = place[:-1]
        return f"line {lines[place]}: " if place else ""

    # What no single key is to blame for has no place.
    listed = [f"  {line_of(place)}{_path(place) or 'the run'}: {text}" for place, text in mistakes]
    count = f"{len(listed)} mistake{'s' if len(listed) > 1 else ''}"
    return ConfigError(f"{source} cannot be used, {count}:\n" + "\n".join(listed))


def _path(place: Location) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")


def _identity(settings: Mapping[str, Any], word: Callable[[Any], str]) -> str:
    return ",".join(f"{key}={word(value)}" for key, value in settings.items())


def _long(value: Any) -> str:
    """As `_short`, with all settings of a block: for blocks of one name that differ in the rest."""
    if not isinstance(value, dict):
        return _short(value)
    return "+".join([_short(value), *(f"{key}_{_long(inner)}" for key, inner in value.items() if key != "name")])


def _short(value: Any) -> str:
    """A value for a run's name: plain characters only, so that it is a folder on every system."""
    value = value.get("name", value) if isinstance(value, dict) else value
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isalnum() or c in "._+-" else "_" for c in text)


def _deep_copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _deep_copy(inner) for key, inner in value.items()}
    return [_deep_copy(inner) for inner in value] if isinstance(value, list) else value
