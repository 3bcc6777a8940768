"""Checked reading of Hugging Face configurations: a `ModelError` names the field."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from sparseopt.models.base.errors import JSON_OBJECT, ModelError, checked

# A Hugging Face configuration, or a table in it.
Config = Mapping[str, Any]

# Upper bound of a size or count. Real ones are far smaller, and a product of two still fits in 64 bits.
_LARGEST = 2**31 - 1

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 100


def require(config: Config, name: str, kind: type[int] | type[float] = int, default: float | None = None) -> Any:
    """A positive, finite number of that type from a configuration, or the default if the field is absent."""
    value: Any = config.get(name, default)
    if kind is float and type(value) is int and abs(value) < 2**1000:
        value = float(value)
    if type(value) is not kind or not 0 < value < math.inf:
        raise ModelError(f"the model configuration's {name} must be a positive {kind.__name__}, given {shown(value)}")
    if kind is int and value > _LARGEST:
        raise ModelError(f"the model configuration's {name} is {shown(value)}, at most {_LARGEST} is possible")
    return value


def optional(config: Config, name: str, kind: type[int] | type[float] = int, default: float | None = None) -> Any:
    """Like `require`, but None if the value is None."""
    value = config.get(name, default)
    return None if value is None else require({name: value}, name, kind)


def require_table(config: Config, name: str) -> Config:
    """A table in a configuration."""
    what = f"the model configuration's {name} must be a table"
    return checked(JSON_OBJECT, config.get(name), what, "; compare it with the published one")


def shown(value: Any) -> str:
    """A value of a configuration, shortened for a message."""
    return _SHORT.repr(value)


def refuse_unless(config: Config, allowed: Mapping[str, tuple]) -> None:
    """Raise if a switch is not supported: each named field must be absent or one of its allowed values."""
    wrong = [
        f"{name}={shown(config[name])} (supported: {', '.join(map(repr, values))})"
        for name, values in allowed.items()
        if name in config and config[name] not in values
    ]
    if wrong:
        raise ModelError(f"the model configuration asks for what this decoder does not support: {'; '.join(wrong)}")
