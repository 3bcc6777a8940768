"""Floor 5: the Llama family (Llama 1 to 3, SmolLM, TinyLlama and others with model_type "llama")."""

from collections.abc import Mapping
from typing import Any

from sparseopt.models.family import Family, read_decoder
from sparseopt.models.fields import refuse_unless
from sparseopt.models.rope import read_rope
from sparseopt.models.settings import DecoderConfig


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A Hugging Face Llama configuration, old or new, as a `DecoderConfig`.

    Raises:
        ModelError: naming the field that is missing, inconsistent or not supported.
    """
    refuse_unless(config, {"sliding_window": (None,)})
    bias = bool(config.get("attention_bias", False))
    return read_decoder(
        config,
        read_rope(config),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


LLAMA = Family("llama", read_config)
