"""What a GGUF architecture is: its names, its layout, and its metadata as fields of a Hugging Face configuration."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.models.base.errors import ModelError
from sparseopt.models.base.fields import Config, shown
from sparseopt.models.files.gguf.header import GGUFTensor, Value

# Tensors by Hugging Face name; a tensor without one keeps its own.
Tensors = Mapping[str, GGUFTensor]
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


@dataclass(frozen=True)
class Architecture:
    """A GGUF architecture in the terms of Hugging Face.

    Attributes:
        model_type: the `model_type`.
        class_name: the class, for `architectures`.
        block: names of a block's tensors in GGUF and Hugging Face, without ".weight" and ".bias".
        read_config: returns the configuration, without the entries that all architectures share.
        write_config: returns the metadata of a configuration, which may omit what transformers fills in; a `ModelError`
            if the format, or the programs that run it, cannot express it.
        rope_factors: returns the tensor `ROPE_FACTORS` of a configuration, float32 `[H/2]`; None if it has none.
        paired_heads: whether the rows of q and k are stored pair by pair and must be put in half-rotation order.
        shifted_norms: whether norm weights are stored with 1 added.
        interleaved: the layer with rows q, k, v of each head, stored as all q, all k, all v; None for none.
        outer: names of tensors outside the blocks in GGUF and Hugging Face.
        layers: prefix of the names of a block's tensors in Hugging Face.
    """

    model_type: str
    class_name: str
    block: Mapping[str, str] = field(repr=False)
    read_config: Callable[[Fields, Tensors], dict[str, Any]] = field(repr=False)
    write_config: Callable[[Config], Values] = field(repr=False)
    rope_factors: Callable[[Config], np.ndarray | None] = field(repr=False, default=lambda config: None)
    paired_heads: bool = False
    shifted_norms: bool = False
    interleaved: str | None = None
    outer: Mapping[str, str] = field(repr=False, default_factory=lambda: OUTER)
    layers: str = "model.layers"

    def hf_name(self, name: str) -> str:
        """The Hugging Face name of a GGUF tensor; without one it keeps its own, and is reported as extra."""
        stem, _, kind = name.rpartition(".")
        if stem in self.outer:
            return f"{self.outer[stem]}.{kind}"
        parts = stem.split(".", 2)
        if len(parts) == 3 and parts[0] == "blk" and parts[2] in self.block:
            return f"{self.layers}.{parts[1]}.{self.block[parts[2]]}.{kind}"
        return name

    def gguf_name(self, name: str) -> str:
        """The GGUF name of a Hugging Face tensor.

        Raises:
            ModelError: if the architecture has no such tensor.
        """
        stem, _, kind = name.rpartition(".")
        names = {long: short for short, long in self.outer.items()}
        if found := re.fullmatch(rf"{re.escape(self.layers)}\.(\d+)\.(.+)", stem):
            names = {
                f"{self.layers}.{found[1]}.{long}": f"blk.{found[1]}.{short}" for short, long in self.block.items()
            }
        if stem in names:
            return f"{names[stem]}.{kind}"
        raise ModelError(
            f"the tensor {name[:200]} has no name in GGUF files of {self.model_type} models; write the model as a "
            "Hugging Face folder instead"
        )

    def undo(self, name: str, tensor: np.ndarray, config: Config) -> np.ndarray:
        """The tensor with a Hugging Face name in the layout of Hugging Face and its own dtype."""
        if self._shifts(name):
            return (tensor.astype(np.float32) - 1).astype(tensor.dtype)
        if not self.moves_rows(name):
            return tensor
        axes, first, second = self._axes(name, tensor, config)
        axes[first], axes[second] = axes[second], axes[first]
        return _exchanged(tensor, axes, first, second)

    def redo(self, name: str, tensor: np.ndarray, config: Config) -> np.ndarray:
        """The tensor with a Hugging Face name in the layout of GGUF: the inverse of `undo`.

        Any array with the tensor's rows as first axis works, such as multiples or scales of a matrix in few bits.
        Norms with 1 added are float32, since 16 bits have no room for the sum.
        """
        if self._shifts(name):
            return tensor.astype(np.float32) + 1
        return _exchanged(tensor, *self._axes(name, tensor, config)) if self.moves_rows(name) else tensor

    def moves_rows(self, name: str) -> bool:
        """Whether `undo` and `redo` change the order of a tensor's rows."""
        owner = _owner(name)
        return owner == self.interleaved or (self.paired_heads and owner in ("q_proj", "k_proj"))

    def _shifts(self, name: str) -> bool:
        return self.shifted_norms and name.endswith("norm.weight")

    def _axes(self, name: str, tensor: np.ndarray, config: Config) -> tuple[list[int], int, int]:
        """The axes of the rows of a Hugging Face tensor, and which two of them GGUF exchanges.

        They are [heads, q k v, H] if these are interleaved, or [heads, halves, H / 2] for q or k.
        """
        owner, heads = _owner(name), config["num_attention_heads"]
        if owner == "k_proj":
            heads = config.get("num_key_value_heads") or heads
        parts, first, second = (3, 0, 1) if owner == self.interleaved else (2, 1, 2)
        if not tensor.ndim or tensor.shape[0] % (parts * heads):
            raise ModelError(
                f"the tensor {name[:200]} {list(tensor.shape)} has no rows of {heads} heads; convert the model again"
            )
        return [heads, parts, tensor.shape[0] // (parts * heads)], first, second


def _owner(name: str) -> str:
    """The module that a tensor belongs to, without the enclosing modules."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _exchanged(tensor: np.ndarray, axes: list[int], first: int, second: int) -> np.ndarray:
    """The rows split over these axes, with two of them exchanged."""
    split = tensor.reshape(*axes, *tensor.shape[1:])
    return np.ascontiguousarray(split.swapaxes(first, second)).reshape(tensor.shape)
