"""Floor 7: from a YAML file and `key=value` overrides to resolved runs, with every mistake named at once.

    YAML text -> plain values with line numbers -> overrides -> sweep expanded -> typed tasks

A sweep lists settings to vary by dotted key: `grid` takes every combination, `list` the combinations given.
"""

import itertools
import math
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from sparseopt.experiments.names import AllowCode, Mistakes, code_context, shortened, suggest
from sparseopt.experiments.task import Task
from sparseopt.experiments.tasks import find_task, nearest_task
from sparseopt.experiments.yaml_file import MAX_DEPTH, ConfigError, Location, parse_yaml, path_text, read_yaml

# Of one experiment: runs, and settings of all runs together. More is a mistake, and would fill the memory.
MAX_RUNS = 5_000
MAX_SETTINGS = 1_000_000
# A run is a folder; file systems take 255 bytes.
MAX_NAME = 240
# Mistakes that a message lists.
MAX_MISTAKES = 100


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


def load_config(path: Path, overrides: Sequence[str] = (), *, allow_code: AllowCode = False) -> list[Run]:
    """Read an experiment, apply `key=value` overrides, expand its sweep, and check every run.

    Args:
        path: of the YAML file.
        overrides: `key=value` texts.
        allow_code: whether tasks, penalties and methods that the config names by a path outside this package are
            imported, which runs their modules: True for all, or the names of packages whose paths are.

    Raises:
        ConfigError: listing all mistakes, a line each: place in the file, what is wrong, the nearest known name. A
            path that is not allowed is one, and nothing was imported.
    """
    if not path.is_file():
        raise ConfigError(f"there is no config file {path}; the project's own lie in configs/")
    values, lines = read_yaml(path)
    for override in overrides:
        _override(values, override)
    return expand(values, lines, str(path), allow_code=allow_code)


def expand(
    values: dict[str, Any],
    lines: Mapping[Location, int] | None = None,
    source: str = "config",
    *,
    allow_code: AllowCode = False,
) -> list[Run]:
    """The runs of an experiment given as plain values; see `load_config`."""
    values = dict(values)
    mistakes: dict[tuple[Location, str], None] = {}
    sweep = values.pop("sweep", None)
    combinations = _combinations(sweep, mistakes)
    values_grid = sweep.get("grid") if isinstance(sweep, dict) else None
    values_grid = values_grid if isinstance(values_grid, dict) else {}
    kind = values.get("task")
    near, text = nearest_task(kind, allow_code)
    if text:
        mistakes[(("task",), text)] = None
    if near is None:
        raise _report(mistakes, lines or {}, source)
    # The other mistakes are those of the task that was meant.
    values["task"] = near
    task_class = find_task(near, allow_code)
    if len(combinations) * _count(values) > MAX_SETTINGS:
        text = f"{len(combinations)} runs of {_count(values)} settings are more than {MAX_SETTINGS:,}; split the sweep"
        raise _report({(("sweep",), text): None}, lines or {}, source)
    runs: dict[str, Run] = {}
    identities = Counter(_identity(settings, _short) for settings in combinations)
    for settings in combinations:
        if len(mistakes) >= MAX_MISTAKES:
            break
        resolved = _deep_copy(values)
        for key, value in settings.items():
            try:
                set_by_path(resolved, key, value)
            except ValueError as error:
                mistakes[(("sweep",), str(error))] = None
        try:
            task = task_class.model_validate(resolved, context=code_context(allow_code))
        except ValidationError as error:
            for location, text in itertools.islice(_explain(error, task_class), MAX_MISTAKES):
                swept = next((k for k in settings if f"{path_text(location)}.".startswith(f"{k}.")), None)
                place: Location = ("sweep", "grid", swept) if swept and swept in values_grid else location
                mistakes[(place, text)] = None
            continue
        identity = _identity(settings, _short)
        if identities[identity] > 1:
            identity = _identity(settings, _long)
        if len(identity.encode()) > MAX_NAME:
            text = f"the folder of the run {identity[:80]}... would have a name of more than {MAX_NAME} bytes"
            mistakes[(("sweep",), f"{text}; vary less at once")] = None
        if identity in runs:
            mistakes[(("sweep",), f"the run {identity} appears twice")] = None
        runs[identity] = Run(identity, settings, task)
    if mistakes:
        raise _report(mistakes, lines or {}, source)
    return list(runs.values())


def set_by_path(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, making blocks that are not there yet.

    Raises:
        ValueError: if a part of the path is a plain value, or it has too many parts.
    """
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
        set_by_path(values, key, parse_yaml(text))
    except ValueError as error:
        raise ConfigError(f"override {override!r}: {error}") from None


def _combinations(sweep: Any, mistakes: dict[tuple[Location, str], None]) -> list[dict[str, Any]]:
    """Every combination of settings of a sweep; one empty combination without a sweep."""
    if sweep is None:
        return [{}]
    if not isinstance(sweep, dict):
        mistakes[(("sweep",), "must be a block with grid: or list:")] = None
        return [{}]
    for key in sorted(sweep.keys() - {"grid", "list"})[:MAX_MISTAKES]:
        mistakes[(("sweep", key), f"no such key; {suggest(key, ('grid', 'list'))}")] = None
    grid, listed = sweep.get("grid", {}), sweep.get("list", [{}])
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
        mistakes[(("sweep", "grid"), "must map keys to lists of values, as in `order: [0, 1]`")] = None
        grid = {}
    if not isinstance(listed, list) or not listed or not all(isinstance(item, dict) for item in listed):
        mistakes[(("sweep", "list"), "must be a list of blocks of settings, as in `- {method: doge, order: 0}`")] = None
        listed = [{}]
    count = len(listed) * math.prod(map(len, grid.values()))
    if count > MAX_RUNS:
        mistakes[(("sweep",), f"asks for {count:,} runs, at most {MAX_RUNS:,} are possible; split it")] = None
        return [{}]
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
        elif isinstance(inner, ValidationError):
            # Of a block that was given as one word.
            for _, text in _explain(inner, task_class):
                yield place, text
        elif found["type"] == "extra_forbidden":
            model = _model_at(task_class, place[:-1])
            yield place, f"no such key; {suggest(str(place[-1]), model.model_fields if model else ())}"
        elif found["type"] == "missing":
            yield place, "this key is missing"
        elif found["type"] in ("literal_error", "enum") and isinstance(found["input"], str):
            expected = found["ctx"]["expected"]
            known = [word.strip("' ") for word in expected.replace(" or ", ",").split(",")]
            yield place, f"{shortened(found['input'])} is not known; {suggest(found['input'], known)}"
        else:
            pydantic_text = found["msg"][0].lower() + found["msg"][1:]
            yield place, str(inner) if inner else f"{pydantic_text}, given {shortened(found['input'])}"


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
    listed = [f"  {line_of(place)}{path_text(place) or 'the run'}: {text}" for place, text in mistakes]
    count = f"{len(listed)} mistake{'s' if len(listed) > 1 else ''}"
    if len(listed) > MAX_MISTAKES:
        listed[MAX_MISTAKES:] = [f"  and {len(listed) - MAX_MISTAKES} more"]
    return ConfigError(f"{source} cannot be used, {count}:\n" + "\n".join(listed))


def _identity(settings: Mapping[str, Any], word: Callable[[Any], str]) -> str:
    return ",".join(f"{_plain(key)}={word(value)}" for key, value in settings.items())


def _long(value: Any) -> str:
    """As `_short`, with all settings of a block: for blocks of one name that differ in the rest."""
    if not isinstance(value, dict):
        return _short(value)
    return "+".join([_short(value), *(f"{key}_{_long(inner)}" for key, inner in value.items() if key != "name")])


def _short(value: Any) -> str:
    """A value for a run's name."""
    value = value.get("name", value) if isinstance(value, dict) else value
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return _plain(text)


def _plain(text: str) -> str:
    """Plain characters only, so that it is a folder on every system and below the one it is to be in."""
    return "".join(c if c.isalnum() or c in "._+-" else "_" for c in text)


def _deep_copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _deep_copy(inner) for key, inner in value.items()}
    return [_deep_copy(inner) for inner in value] if isinstance(value, list) else value


def _count(value: Any) -> int:
    """How many values a block holds, with itself."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_count, inner))
