"""Metadata of an architecture as fields of a Hugging Face configuration, and back; fields that all have."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.models.base.errors import ModelError
from sparseopt.models.base.fields import shown
from sparseopt.models.files.gguf.header import GGUFTensor, Value

# Tensors by Hugging Face name; a tensor without one keeps its own.
Tensors = Mapping[str, GGUFTensor]
Config = Mapping[str, Any]
# Metadata under `{architecture}.`, by the rest of their keys.
Values = dict[str, Value]

# Tensors outside the blocks in GGUF and, for most architectures, in Hugging Face.
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class Fields:
    """The metadata under `{architecture}.`, by the rest of their keys; reading marks a key."""

    def __init__(self, path: Path, architecture: str, metadata: Mapping[str, Any]) -> None:
        self.path, self._prefix, self._metadata = path, f"{architecture}.", metadata
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._metadata

    def get(self, name: str, default: Any = None) -> Any:
        self._read.add(self._prefix + name)
        return self._metadata.get(self._prefix + name, default)

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer; if one is given for each block, all must be equal."""
        return self._positive(name, int, default)

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number, as the shortest decimal that rounds to the stored float32."""
        return shortest(self._positive(name, float, default))

    def numbers(self, names: Mapping[str, str]) -> dict[str, float]:
        """The numbers in `{GGUF name: Hugging Face name}` that the file has, by Hugging Face name."""
        return {there: self.number(here) for here, there in names.items() if here in self}

    def require(self, name: str, value: Any) -> None:
        """Raise if a key has another value; it may be absent."""
        if self.get(name, value) != value:
            raise self.error(name, f"{value!r} is the only value supported")

    def refuse_unread(self) -> None:
        """Raise if keys of the architecture were never read: they ask for something that is not supported."""
        unread = [key for key in self._metadata if key.startswith(self._prefix) and key not in self._read]
        if unread:
            raise ModelError(
                f"{self.path} has metadata that are not supported: "
                f"{', '.join(unread)}; use the model's Hugging Face folder instead"
            )

    def error(self, name: str, text: str) -> ModelError:
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
    """The shortest decimal that rounds to the same float32: 1e-05 for 9.99999975e-06."""
    return float(str(np.float32(value)))


def has_bias(tensors: Tensors, linear: str) -> bool:
    """Whether a layer of the first block has a bias."""
    return f"model.layers.0.{linear}.bias" in tensors


def refuse_unless_meant(config: Config, allowed: Mapping[str, tuple]) -> None:
    """Raise if fields that GGUF has no key for have other values; they may be absent."""
    for name, values in allowed.items():
        if name in config and config[name] not in values:
            raise ModelError(
                f"the model configuration has {name}={shown(config[name])}, and a GGUF file of this architecture can "
                f"only mean {' or '.join(map(repr, values))}; write the model as a Hugging Face folder instead"
            )
