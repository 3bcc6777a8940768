"""The GLM family (GLM-4-9B-Chat): Llama with partly rotated heads, pairs of neighbouring features, a fused MLP."""

from typing import Any

from sparseopt.models.base.fields import Config
from sparseopt.models.base.rope import read_rope
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import Family, read_decoder


def read_glm(config: Config, **switches: Any) -> DecoderConfig:
    """Read what the GLM families share."""
    return read_decoder(
        {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7, **config},
        (BlockKind(read_rope(config, share=0.5, interleaved=True)),),
        qkv_bias=bool(config.get("attention_bias", True)),
        gate="fused",
        **switches,
    )


FAMILY = Family("glm", read_glm)
