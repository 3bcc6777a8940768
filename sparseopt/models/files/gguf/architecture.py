"""What a GGUF architecture is: names, layout and configuration of a model in GGUF and in Hugging Face, both ways."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.models.base.errors import ModelError
from sparseopt.models.files.gguf.header import GGUFTensor, Value

# Tensors by their Hugging Face names; one without keeps its own.
Tensors = Mapping[str, GGUFTensor]
Config = Mapping[str, Any]
# Metadata under `{architecture}.`, by the rest of their keys.
Values = dict[str, Value]

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


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
        """A positive integer; where one is given for each block, all must be equal."""
        return self._positive(name, int, default)

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number, as the shortest decimal that rounds to the stored float32."""
        return shortest(self._positive(name, float, default))

    def numbers(self, names: Mapping[str, str]) -> dict[str, float]:
        """Those numbers of `{GGUF name: Hugging Face name}` that the file has, by their Hugging Face names."""
        return {there: self.number(here) for here, there in names.items() if here in self}

    def require(self, name: str, value: Any) -> None:
        """Refuse a key with another value; it may be absent."""
        if self.get(name, value) != value:
            raise self.error(name, f"{value!r} is the only value supported")

    def refuse_unread(self) -> None:
        """Refuse keys of the architecture that were never read: they ask for something that is not supported."""
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


@dataclass(frozen=True)
class Architecture:
    """A GGUF architecture in the terms of Hugging Face.

    Attributes:
        model_type: its `model_type`.
        class_name: its class, for `architectures`.
        block: names of a block's tensors in GGUF and Hugging Face, without the endings ".weight" and ".bias".
        read_config: the configuration, without the entries that all architectures share.
        write_config: the metadata of a configuration, which may leave out what transformers fills in; a `ModelError`
            for a configuration that the format, or the programs that run it, cannot express.
        rope_factors: the tensor `ROPE_FACTORS` of a configuration, float32 `[H/2]`; None for a model without.
        paired_heads: the rows of q and k are stored pair by pair and must be put in half-rotation order.
        shifted_norms: norm weights are stored with 1 added.
    """

    model_type: str
    class_name: str
    block: Mapping[str, str] = field(repr=False)
    read_config: Callable[[Fields, Tensors], dict[str, Any]] = field(repr=False)
    write_config: Callable[[Config], Values] = field(repr=False)
    rope_factors: Callable[[Config], np.ndarray | None] = field(repr=False, default=lambda config: None)
    paired_heads: bool = False
    shifted_norms: bool = False

    def hf_name(self, name: str) -> str:
        """The Hugging Face name of a GGUF tensor; one without keeps its own, to be reported as extra."""
        stem, _, kind = name.rpartition(".")
        if stem in _OUTER:
            return f"{_OUTER[stem]}.{kind}"
        parts = stem.split(".", 2)
        if len(parts) == 3 and parts[0] == "blk" and parts[2] in self.block:
            return f"model.layers.{parts[1]}.{self.block[parts[2]]}.{kind}"
        return name

    def gguf_name(self, name: str) -> str:
        """The GGUF name of a Hugging Face tensor.

        Raises:
            ModelError: for a tensor that the architecture does not have.
        """
        stem, _, kind = name.rpartition(".")
        names = {long: short for short, long in _OUTER.items()}
        if found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem):
            names = {f"model.layers.{found[1]}.{long}": f"blk.{found[1]}.{short}" for short, long in self.block.items()}
        if stem in names:
            return f"{names[stem]}.{kind}"
        raise ModelError(
            f"the tensor {name[:200]} has no name in GGUF files of {self.model_type} models; write the model as a "
            "Hugging Face folder instead"
        )

    def undo(self, name: str, tensor: np.ndarray, config: Config) -> np.ndarray:
        """The tensor of a Hugging Face name in the layout of Hugging Face and its own dtype."""
        if self._shifts(name):
            return (tensor.astype(np.float32) - 1).astype(tensor.dtype)
        return unpair_heads(tensor, _heads(name, config)) if self.moves_rows(name) else tensor

    def redo(self, name: str, tensor: np.ndarray, config: Config) -> np.ndarray:
        """The tensor of a Hugging Face name in the layout of GGUF: the inverse of `undo`.

        Any array whose first axis is the tensor's rows will do, such as multiples or scales of a matrix in few bits.
        Norms with 1 added are float32, since 16 bits have no room for the sum.
        """
        if self._shifts(name):
            return tensor.astype(np.float32) + 1
        return pair_heads(tensor, _heads(name, config)) if self.moves_rows(name) else tensor

    def moves_rows(self, name: str) -> bool:
        """Whether `undo` and `redo` change the order of a tensor's rows."""
        return self.paired_heads and _owner(name) in ("q_proj", "k_proj")

    def _shifts(self, name: str) -> bool:
        return self.shifted_norms and name.endswith("norm.weight")


def _owner(name: str) -> str:
    """The module that a tensor belongs to, without those around it."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _heads(name: str, config: Config) -> int:
    """The number of heads in the rows of q or k."""
    heads: int = config["num_attention_heads"]
    return heads if _owner(name) == "q_proj" else config.get("num_key_value_heads") or heads


def unpair_heads(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of every head from the order (0, H/2, 1, H/2 + 1, ...) back to 0 .. H - 1; `[heads H, ...]`."""
    return _exchanged(tensor, heads, (-1, 2))


def pair_heads(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of every head from 0 .. H - 1 to the order (0, H/2, 1, H/2 + 1, ...); `[heads H, ...]`."""
    return _exchanged(tensor, heads, (2, -1))


def _exchanged(tensor: np.ndarray, heads: int, split: tuple[int, int]) -> np.ndarray:
    """The rows of every head split over two axes, which are then exchanged."""
    if not tensor.ndim or tensor.shape[0] % (2 * heads):
        raise ModelError(f"a tensor {list(tensor.shape)} has no rows of {heads} heads; convert the model again")
    axes = tensor.reshape(heads, *split, *tensor.shape[1:])
    return np.ascontiguousarray(axes.swapaxes(1, 2)).reshape(tensor.shape)
