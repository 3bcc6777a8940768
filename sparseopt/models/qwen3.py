"""Floor 5: the Qwen3 family: Llama with norms on the queries and keys of every head."""

from collections.abc import Mapping
from typing import Any

from sparseopt.models.family import Family, read_decoder
from sparseopt.models.qwen2 import read_kinds
from sparseopt.models.settings import DecoderConfig


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A Hugging Face Qwen3 configuration as a `DecoderConfig`.

    Raises:
        ModelError: naming the field that is missing, inconsistent or not supported.
    """
    bias = bool(config.get("attention_bias", False))
    kinds = read_kinds(config)
    return read_decoder(config, kinds=kinds, head_dim=128, qk_norm="head", qkv_bias=bias, output_bias=bias)


QWEN3 = Family("qwen3", read_config)
