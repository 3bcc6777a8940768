"""Decoder-only language models in Flax NNX: reading from Hugging Face folders or GGUF, running, and export.

From the lowest: `base`, `files`, `decoder`, `families`, `streaming`, `reshape`, then `export` and `loaded`.
"""

from typing import Any

from sparseopt.models.base.errors import ModelError
from sparseopt.models.base.rope import Rope
from sparseopt.models.decoder.cached_decoding import generate
from sparseopt.models.decoder.decoder import Block, Decoder, Embedding, Head
from sparseopt.models.decoder.experts import Routed
from sparseopt.models.decoder.layers import Linear
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig, ExpertsConfig, check_window
from sparseopt.models.decoder.tokenizer import Bos, chat_writer, encode_text, load_tokenizer, start_token
from sparseopt.models.export import (
    OUTER_TAG,
    WHOLE_TAG,
    ShardedWriter,
    block_tag,
    check_output,
    trained_tag,
    unread,
)
from sparseopt.models.families import FAMILIES, find_family
from sparseopt.models.files.forms import Compressed, Form, Joined
from sparseopt.models.files.safetensors import TensorInfo, UnreadTensor
from sparseopt.models.files.source import Source, bundled_model, open_source
from sparseopt.models.loaded import LoadedModel, open_any
from sparseopt.models.reshape.reordered import Move, block_moves, reordered_block
from sparseopt.models.reshape.shrunk import Kept, Sizes, possible_kv_heads, sizes_of, sliced_block, smaller_model
from sparseopt.models.streaming.prunable import PrunableModel
from sparseopt.models.streaming.streamed import ModelSource, StreamedModel, load_decoder, open_model, source_of

__all__ = [
    "FAMILIES",
    "OUTER_TAG",
    "WHOLE_TAG",
    "Block",
    "BlockKind",
    "Bos",
    "Compressed",
    "Decoder",
    "DecoderConfig",
    "Embedding",
    "ExpertsConfig",
    "Form",
    "Head",
    "Joined",
    "Kept",
    "Linear",
    "LoadedModel",
    "ModelError",
    "ModelSource",
    "Move",
    "PrunableModel",
    "Rope",
    "Routed",
    "ShardedWriter",
    "Sizes",
    "Source",
    "StreamedModel",
    "TensorInfo",
    "UnreadTensor",
    "block_moves",
    "block_tag",
    "bundled_model",
    "chat_writer",
    "check_output",
    "check_window",
    "encode_text",
    "find_family",
    "generate",
    "load_decoder",
    "load_tokenizer",
    "open_any",
    "open_model",
    "open_source",
    "possible_kv_heads",
    "reordered_block",
    "sizes_of",
    "sliced_block",
    "smaller_model",
    "source_of",
    "start_token",
    "trained_tag",
    "unread",
]


# Names that have ended, and what to use instead.
_PACKED = "write a GGUF file (Joined) or layers of few bits (Compressed)"
_ENDED = {"Packed": _PACKED, "pack_folder": _PACKED, "unpack_folder": "unpack with sparseopt 0.3"}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name in _ENDED:
        raise AttributeError(f"sparseopt.models.{name} has ended: {_ENDED[name]}")
    raise AttributeError(f"module 'sparseopt.models' has no attribute {name!r}; it has {', '.join(__all__)}")
