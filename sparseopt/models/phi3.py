"""Floor 5: the Phi-3 family: Llama with fused projections and, for long contexts, LongRoPE."""

from collections.abc import Mapping
from typing import Any

from sparseopt.models.family import Family, read_decoder
from sparseopt.models.fields import require
from sparseopt.models.rope import read_rope
from sparseopt.models.settings import BlockKind, DecoderConfig


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A Hugging Face Phi-3 configuration as a `DecoderConfig`.

    Raises:
        ModelError: naming the field that is missing, inconsistent or not supported.
    """
    window = None if config.get("sliding_window") is None else require(config, "sliding_window")
    rope = read_rope({"original_max_position_embeddings": 4096, **config})
    kinds = (BlockKind(rope, window),) * require(config, "num_hidden_layers")
    return read_decoder({"rms_norm_eps": 1e-5, **config}, kinds=kinds, qkv="fused", gate="fused")


PHI3 = Family("phi3", read_config)
