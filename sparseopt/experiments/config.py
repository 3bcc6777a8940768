"""From a YAML file and `key=value` overrides to resolved runs, with every mistake named at once.

    YAML text -> plain values with line numbers -> overrides -> sweep expanded -> typed tasks

A sweep lists settings to vary by dotted key: `grid` takes every combination, `list` the combinations given.
"""

import copy
import difflib
import functools
import itertools
import math
import operator
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from sparseopt.core.base.arguments import Mistakes, suggest
from sparseopt.experiments.names import AllowCode, shortened, worded
from sparseopt.experiments.task import Strict, Task, find_task, nearest_task
from sparseopt.system.yaml_file import (
    MAX_DEPTH,
    MAX_MISTAKES,
    ConfigError,
    Location,
    parse_yaml,
    path_text,
    read_yaml,
    refused,
)

# Limits of one experiment: runs, and settings of all runs together. More is a mistake, and would fill the memory.
MAX_RUNS, MAX_SETTINGS = 5_000, 1_000_000
# The id of a run for a sweep item that varies nothing.
UNCHANGED = "unchanged"
# Bytes in the name of a run's folder; file systems allow 255.
MAX_NAME = 240

_PACKAGE = Path(__file__).parents[1]
# The configs that come with the package. A wheel has them inside; in a checkout they are next to it.
SHIPPED = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"

Settings = dict[str, Any]
# `Sweep` has a field of the name `list`.
_Grid = dict[str, Annotated[list[Any], Field(min_length=1)]]
_List = list[Settings]


class Sweep(Strict):
    """The settings that an experiment varies.

    Attributes:
        grid: a list of values for each key, as in `order: [0, 1]`; every combination is run.
        list: combinations, as in `- {method: doge, order: 0}`; each is combined with every point of the grid.
    """

    grid: _Grid = Field(default={})
    list: _List = Field(default=[{}], min_length=1)


@dataclass(frozen=True)
class Run:
    """One resolved run of an experiment.

    Attributes:
        id: the settings that the sweep varies, as `key=value` joined by commas; "unchanged" if one of several runs
            varies none; empty for a single run.
        settings: those settings.
        task: the typed config.
    """

    id: str
    settings: Mapping[str, Any]
    task: Task

    @property
    def subfolder(self) -> Path:
        """The run's folder, relative to the output folder."""
        return Path(self.task.name) / self.id if self.id else Path(self.task.name)


def find_config(path: Path) -> Path:
    """The file of a config: the path itself, or else the config with this name in the package.

    Raises:
        ConfigError: if neither exists, with a list of the names.
    """
    if path.is_file():
        return path
    shipped = {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}
    if (name := str(path).removesuffix(".yaml")) not in shipped:
        near = "".join(f"; did you mean {close}?" for close in difflib.get_close_matches(name, shipped, n=1))
        known = ", ".join(shipped)
        raise ConfigError(f"there is no config file {path}; the configs that come with sparseopt are {known}{near}")
    return shipped[name]


def load_config(path: Path, overrides: Sequence[str] = (), *, allow_code: AllowCode = False) -> list[Run]:
    """Read an experiment, apply `key=value` overrides, expand its sweep, and check every run.

    `path` may be the name of a config in the package, such as `denoise-volume`; a file takes precedence.
    `allow_code` says whether tasks, penalties and methods that the config names by a path outside this package are
    imported, which runs their modules: True for all, or the names of allowed packages.

    Raises:
        ConfigError: listing all mistakes, one per line: place in the file, what is wrong, the nearest known name. A
            path that is not allowed is one; nothing is then imported.
    """
    path = find_config(path)
    values, lines = read_yaml(path)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r}: expected key=value, as in order=1 or penalty.weight=20")
        value = parse_yaml(text, f"override {override!r}")
        try:
            _set_by_path(values, key, value)
        except ValueError as error:
            raise ConfigError(f"override {override!r}: {error}") from None
        if swept := next((name for name in _swept(values.get("sweep")) if f"{key}.".startswith(f"{name}.")), None):
            raise ConfigError(f"override {override!r}: the sweep sets {swept} for every run; change it there")
    return expand(values, lines, str(path), allow_code=allow_code)


def expand(
    values: Settings,
    lines: Mapping[Location, int] | None = None,
    source: str = "config",
    *,
    allow_code: AllowCode = False,
) -> list[Run]:
    """The runs of an experiment given as plain values; see `load_config`."""
    values, sweep = copy.deepcopy(values), Sweep()
    mistakes: dict[tuple[Location, str], None] = {}  # each once

    def wrong(text: str, *place: str | int) -> None:
        mistakes[place, text] = None

    def report() -> ConfigError:
        # A mistake that concerns several keys has no place.
        told = [(place, f"{path_text(place) or 'the run'}: {text}") for place, text in mistakes]
        return refused(told, lines or {}, source)

    try:
        if (given := values.pop("sweep", None)) is not None:
            sweep = Sweep.model_validate(given)
    except ValidationError as error:
        for place, text in _explain(error, Sweep):
            wrong(text, "sweep", *place)
    for key in sweep.grid.keys() & {key for item in sweep.list for key in item}:
        wrong(f"{key} is varied by grid and by list; leave it out of one", "sweep")
    count = len(sweep.list) * math.prod(map(len, sweep.grid.values()))
    if count > MAX_RUNS or count * len(lines or ()) > MAX_SETTINGS:
        limits = f"at most {MAX_RUNS:,} are possible, with {MAX_SETTINGS:,} settings in all"
        wrong(f"asks for {count:,} runs, {limits}; split it", "sweep")
        sweep = Sweep()
    if "task" not in values:
        for key in difflib.get_close_matches("task", values, n=1):
            wrong("no such key; did you mean 'task'?", key)
    near, unknown = nearest_task(values.get("task"), allow_code)
    if unknown:
        wrong(unknown, "task")
    if near is None:
        raise report()
    # Further mistakes are reported for the task that was meant.
    values["task"] = near
    task_class = find_task(near, allow_code)
    points = [dict(zip(sweep.grid, point, strict=True)) for point in itertools.product(*sweep.grid.values())]
    combinations = [{**item, **point} for item in sweep.list for point in points]
    runs: dict[str, Run] = {}
    identities = Counter(_identity(settings) for settings in combinations)
    for settings in combinations:
        if len(mistakes) >= MAX_MISTAKES:
            break
        identity = _identity(settings, whole=identities[_identity(settings)] > 1)
        if not identity and len(combinations) > 1:
            # Without a name its folder would contain the folders of the other runs.
            identity = UNCHANGED
        try:
            task = _task_of(task_class, values, settings, allow_code)
        except ValidationError as error:
            for place, text in itertools.islice(_explain(error, task_class), MAX_MISTAKES):
                swept = next((key for key in sweep.grid if f"{path_text(place)}.".startswith(f"{key}.")), None)
                wrong(text, *(("sweep", "grid", swept) if swept else place))
            continue
        except ValueError as error:
            wrong(str(error), "sweep")
            continue
        if len(identity.encode()) > MAX_NAME:
            text = f"the folder of the run {identity[:80]}... would have a name of more than {MAX_NAME} bytes"
            wrong(f"{text}; vary fewer settings", "sweep")
        if identity in runs:
            wrong(f"the run {identity} appears twice", "sweep")
        runs[identity] = Run(identity, settings, task)
    if mistakes:
        raise report()
    return list(runs.values())


def _swept(sweep: Any) -> list[str]:
    """The keys that a sweep sets in every run; none if it is not a sweep."""
    try:
        read = Sweep.model_validate(sweep or {})
    except ValidationError:
        return []  # `expand` says what is wrong
    return [*read.grid, *sorted(set.intersection(*map(set, read.list)))]


def _task_of(task_class: type[Task], values: Settings, settings: Settings, allow_code: AllowCode) -> Task:
    resolved = copy.deepcopy(values)
    # A block before what is set inside it.
    for key, value in sorted(settings.items(), key=lambda item: item[0].count(".")):
        _set_by_path(resolved, key, copy.deepcopy(value))
    return task_class.model_validate(resolved, context={"allow_code": allow_code})


def _set_by_path(values: Settings, key: str, value: Any) -> None:
    """Set a dotted key, creating missing blocks; ValueError if a part of the path is a plain value."""
    *blocks, last = key.split(".")
    if len(blocks) > MAX_DEPTH:
        raise ValueError(f"cannot set {key[:80]}...: {len(blocks) + 1} parts, at most {MAX_DEPTH} are possible")
    here = values
    for depth, block in enumerate(blocks):
        inner = here.setdefault(block, {})
        if not isinstance(inner, dict):
            raise ValueError(f"cannot set {key}: {'.'.join(blocks[: depth + 1])} is {shortened(inner)} and not a block")
        here = inner
    here[last] = value


def get_by_path(values: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, None if there is none."""
    try:
        return functools.reduce(operator.getitem, key.split("."), values)
    except (KeyError, TypeError):
        return None


def _explain(error: ValidationError, model: type[BaseModel]) -> Iterator[tuple[Location, str]]:
    for found in error.errors(include_url=False):
        place: Location = tuple(found["loc"])
        inner, key = found.get("ctx", {}).get("error"), str(place[-1]) if place else ""
        block = _model_at(model, place[:-1])
        said = getattr(block, "ended", None)
        if said and (instead := said(key, found["input"])):
            yield place, " ".join(instead).removeprefix(f"{key} ")
        elif isinstance(inner, Mistakes):
            for key, text in inner.found:
                # A block may be given as one word.
                yield place if isinstance(found["input"], str) else (*place, key), text
        elif found["type"] == "extra_forbidden":
            yield place, f"no such key; {suggest(key, block.model_fields if block else ())}"
        elif found["type"] == "missing":
            yield place, "this key is missing"
        elif found["type"] in ("literal_error", "enum") and isinstance(found["input"], str):
            expected = found["ctx"]["expected"]
            words = [word.strip("' ") for word in expected.replace(" or ", ",").split(",")]
            yield place, f"{shortened(found['input'])} is not known; {suggest(found['input'], words)}"
        else:
            pydantic_text = found["msg"][0].lower() + found["msg"][1:]
            yield place, str(inner) if inner else f"{pydantic_text}, given {shortened(found['input'])}"


def _model_at(model: type[BaseModel] | None, place: Location) -> type[BaseModel] | None:
    for part in place:
        if model and part in model.model_fields:
            model = _model_in(model.model_fields[str(part)].annotation)
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for a in typing.get_args(annotation) if (m := _model_in(a))), None)


def _identity(settings: Settings, *, whole: bool = False) -> str:
    """The name of a run; for blocks only their `name` or, if that is not unique, all their settings."""
    return ",".join(f"{_plain(key)}={_word(value, whole)}" for key, value in settings.items())


def _word(value: Any, whole: bool) -> str:
    if not isinstance(value, dict):
        return _plain(worded(value))
    if "name" in value and not whole:
        return _word(value["name"], whole)
    parts = {key: _word(inner, whole) for key, inner in value.items()}
    return "+".join(part if key == "name" else f"{_plain(key)}_{part}" for key, part in parts.items())


def _plain(text: str) -> str:
    """Keep only characters that are safe in folder names on every system and cannot leave the output folder."""
    return "".join(c if c.isalnum() or c in "._+-" else "_" for c in text)
