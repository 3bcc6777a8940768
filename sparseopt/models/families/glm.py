"""GLM (GLM-4-9B-Chat) and GLM-4 (GLM-4-0414)."""

from typing import Any

from sparseopt.models.base.fields import Config
from sparseopt.models.base.rope import read_rope
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import Family, KeyTable, read_decoder


def _read_glm(config: Config, **switches: Any) -> DecoderConfig:
    """Llama with partly rotated heads, pairs of neighbouring features, a fused MLP."""
    return read_decoder(
        {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7, **config},
        (BlockKind(read_rope(config, share=0.5, interleaved=True)),),
        qkv_bias=bool(config.get("attention_bias", True)),
        gate="fused",
        **switches,
    )


GLM = Family("glm", _read_glm)


_NORMS = (
    ("input_layernorm", "attention_norm"),
    ("post_self_attn_layernorm", "attention_post_norm"),
    ("post_attention_layernorm", "mlp_norm"),
    ("post_mlp_layernorm", "mlp_post_norm"),
)


def _read_glm4(config: Config) -> DecoderConfig:
    """GLM with norms before and after each part."""
    return _read_glm(config, norms=tuple(name for _, name in _NORMS))


GLM4 = Family("glm4", _read_glm4, KeyTable(block=_NORMS))
