"""Floor 5: the metadata of a GGUF file's architecture, read key by key; a key that nothing read is refused."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.models.errors import ModelError


class Fields:
    """The values under `{architecture}.`, by the rest of their names.

    Reading marks a key. `refuse_unread` then names those that ask for something that no reader knows.
    """

    def __init__(self, path: Path, architecture: str, metadata: Mapping[str, Any]) -> None:
        self.path, self._prefix, self._metadata = path, f"{architecture}.", metadata
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._metadata

    def get(self, name: str, default: Any = None) -> Any:
        """The stored value of any type, or the default."""
        self._read.add(self._prefix + name)
        return self._metadata.get(self._prefix + name, default)

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer; one given for each block must be the same for all.

        Raises:
            ModelError: if it is absent without a default, of another type, or not positive.
        """
        return self._positive(name, int, default)

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number, as the shortest decimal that rounds to the stored float32. Raises like `count`."""
        return shortest(self._positive(name, float, default))

    def numbers(self, names: Mapping[str, str]) -> dict[str, float]:
        """Those numbers of `{name here: name there}` that the file has, by their names there."""
        return {there: self.number(here) for here, there in names.items() if here in self}

    def require(self, name: str, *allowed: Any) -> None:
        """Check that a key is absent or one of the allowed values.

        Raises:
            ModelError: naming the key.
        """
        if name in self and self.get(name) not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise self.error(name, f"{expected} is the only value supported")

    def refuse_unread(self) -> None:
        """Check that every key of the architecture has been read.

        Raises:
            ModelError: naming the keys that have not.
        """
        unread = [key for key in self._metadata if key.startswith(self._prefix) and key not in self._read]
        if unread:
            raise ModelError(
                f"{self.path} has metadata that are not supported: "
                f"{', '.join(unread)}; use the model's Hugging Face folder instead"
            )

    def error(self, name: str, text: str) -> ModelError:
        """An error that names the key and its value."""
        value = self._metadata.get(self._prefix + name)
        return ModelError(f"{self.path} has {self._prefix}{name} = {repr(value)[:100]}, {text}")

    def _positive(self, name: str, kind: type[int] | type[float], default: Any) -> Any:
        value = self.get(name, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if type(value) is not kind or not 0 < value < math.inf:
            raise self.error(name, f"expected one positive {kind.__name__}; convert the model again")
        return value


def shortest(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 9.99999975e-06 is written 1e-05 again."""
    return float(str(np.float32(value)))
