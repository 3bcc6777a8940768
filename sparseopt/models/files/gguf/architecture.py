"""What a GGUF architecture is: names, layout and configuration of a model in GGUF and in Hugging Face, both ways."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparseopt.models.base.errors import ModelError
from sparseopt.models.files.gguf.fields import Config, Fields, Tensors, Values

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


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
