"""Floor 5: the OLMo 2 family: norms behind each part only, and on the queries and keys of all heads together."""

from collections.abc import Mapping
from typing import Any

from sparseopt.models.family import Family, KeyTable, read_decoder
from sparseopt.models.rope import read_rope
from sparseopt.models.settings import DecoderConfig

NORMS = (("post_attention_layernorm", "attention_post_norm"), ("post_feedforward_layernorm", "mlp_post_norm"))


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A Hugging Face OLMo 2 configuration as a `DecoderConfig`.

    Raises:
        ModelError: naming the field that is missing, inconsistent or not supported.
    """
    bias = bool(config.get("attention_bias", False))
    return read_decoder(
        {"rms_norm_eps": 1e-5, **config},
        read_rope(config),
        norms=tuple(name for _, name in NORMS),
        qk_norm="width",
        qkv_bias=bias,
        output_bias=bias,
    )


OLMO2 = Family("olmo2", read_config, KeyTable(block=NORMS))
