"""Floor 5: fields of a Hugging Face configuration, read with checks that name the field."""

from collections.abc import Mapping
from typing import Any

from sparseopt.models.errors import ModelError


def require(config: Mapping[str, Any], name: str, kind: type[int] | type[float] = int) -> Any:
    """A positive number from a configuration.

    Raises:
        ModelError: if it is absent, of another type, or not positive.
    """
    value: Any = config.get(name)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or not value > 0:
        raise ModelError(f"the model configuration's {name} must be a positive {kind.__name__}, given {value!r}")
    return value


def refuse_unless(config: Mapping[str, Any], allowed: Mapping[str, tuple]) -> None:
    """Check switches that the decoder does not have: each named field must be absent or one of its values.

    Raises:
        ModelError: naming every field that asks for more.
    """
    wrong = [
        f"{name}={config[name]!r} (supported: {', '.join(map(repr, values))})"
        for name, values in allowed.items()
        if name in config and config[name] not in values
    ]
    if wrong:
        raise ModelError(f"the model configuration asks for what this decoder does not do: {'; '.join(wrong)}")
