"""Decoder-only language models in Flax NNX: read from Hugging Face folders or GGUF files, run, exported."""

from sparseopt.models.bundled import bundled_model
from sparseopt.models.decoder import Block, Decoder, DecoderConfig, Embedding, Head, Linear, Rope, no_tap
from sparseopt.models.errors import ModelError
from sparseopt.models.export import OUTER_TAG, ShardedWriter, block_tag
from sparseopt.models.families import FAMILIES, find_family
from sparseopt.models.family import Family, KeyTable
from sparseopt.models.generate import generate
from sparseopt.models.source import Source, TensorInfo, open_source
from sparseopt.models.streaming import StreamedModel, check_keys, load_decoder, open_model
from sparseopt.models.tokenizer import encode_text, load_tokenizer

__all__ = [
    "FAMILIES",
    "OUTER_TAG",
    "Block",
    "Decoder",
    "DecoderConfig",
    "Embedding",
    "Family",
    "Head",
    "KeyTable",
    "Linear",
    "ModelError",
    "Rope",
    "ShardedWriter",
    "Source",
    "StreamedModel",
    "TensorInfo",
    "block_tag",
    "bundled_model",
    "check_keys",
    "encode_text",
    "find_family",
    "generate",
    "load_decoder",
    "load_tokenizer",
    "no_tap",
    "open_model",
    "open_source",
]
