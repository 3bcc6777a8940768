"""The Gemma 2 family: norms before and after each part, capped scores and logits, every other block local."""

from typing import Any

from sparseopt.models.base.fields import Config, optional, require
from sparseopt.models.base.rope import read_rope
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import (
    Family,
    KeyTable,
    SizeFields,
    read_decoder,
    read_windows,
    refuses_undivided_width,
)

GEMMA_NORMS = (
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "attention_post_norm"),
    ("pre_feedforward_layernorm", "mlp_norm"),
    ("post_feedforward_layernorm", "mlp_post_norm"),
)


def read_gemma(
    config: Config, kinds: tuple[BlockKind, ...], score_cap: float | None, logit_cap: float | None, **more: Any
) -> DecoderConfig:
    """Read what Gemma 2 and 3 share; the given caps are defaults."""
    defaults = {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256}
    return read_decoder(
        defaults | dict(config),
        kinds,
        activation="hidden_activation",
        norm="rms_plus_one",
        norms=tuple(name for _, name in GEMMA_NORMS),
        attention_bias=bool(config.get("attention_bias")),
        score_scale=require(config, "query_pre_attn_scalar", float, default=256.0) ** -0.5,
        score_cap=optional(config, "attn_logit_softcapping", float, score_cap),
        logit_cap=optional(config, "final_logit_softcapping", float, logit_cap),
        embedding_scale=require(config, "hidden_size") ** 0.5,
        **more,
    )


def _read_config(config: Config) -> DecoderConfig:
    rope, window = read_rope(config), require(config, "sliding_window", default=4096)
    local = read_windows(config, lambda index: index % 2 == 0)
    return read_gemma(config, tuple(BlockKind(rope, window if slides else None) for slides in local), 50.0, 30.0)


FAMILY = Family(
    "gemma2", _read_config, KeyTable(block=GEMMA_NORMS), SizeFields(by_block=("layer_types",)), refuses_undivided_width
)
