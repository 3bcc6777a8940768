"""Floor 5: fields of a Hugging Face configuration, read with checks that name the field."""

import math
from collections.abc import Mapping
from typing import Any

from sparseopt.models.errors import ModelError

# Of a size or count in a configuration: none comes near, and products of two are still whole numbers of 64 bits.
_LARGEST = 2**31 - 1


def require(config: Mapping[str, Any], name: str, kind: type[int] | type[float] = int) -> Any:
    """A positive number from a configuration.

    Raises:
        ModelError: if it is absent, of another type, not positive, not finite, or a whole number beyond 31 bits.
    """
    value: Any = config.get(name)
    if kind is float and type(value) is int and abs(value) < 2**1000:
        value = float(value)
    if type(value) is not kind or not 0 < value < math.inf:
        raise ModelError(f"the model configuration's {name} must be a positive {kind.__name__}, given {shown(value)}")
    if kind is int and value > _LARGEST:
        raise ModelError(f"the model configuration's {name} is {shown(value)}, at most {_LARGEST} is possible")
    return value


def shown(value: Any) -> str:
    """A value of a configuration as a message shows it."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    text = repr(value) if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"
    return text if len(text) < 100 else f"{text[:100]}..."


def refuse_unless(config: Mapping[str, Any], allowed: Mapping[str, tuple]) -> None:
    """Check switches that the decoder does not have: each named field must be absent or one of its values.

    Raises:
        ModelError: naming every field that asks for more.
    """
    wrong = [
        f"{name}={shown(config[name])} (supported: {', '.join(map(repr, values))})"
        for name, values in allowed.items()
        if name in config and config[name] not in values
    ]
    if wrong:
        raise ModelError(f"the model configuration asks for what this decoder does not do: {'; '.join(wrong)}")
