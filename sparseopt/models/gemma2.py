"""Floor 5: the Gemma 2 family: norms before and behind each part, capped scores and logits, every other block local."""

from collections.abc import Mapping
from typing import Any

from sparseopt.models.family import Family, KeyTable, read_decoder, read_windows
from sparseopt.models.fields import require
from sparseopt.models.rope import read_rope
from sparseopt.models.settings import BlockKind, DecoderConfig

GEMMA_NORMS = (
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "attention_post_norm"),
    ("pre_feedforward_layernorm", "mlp_norm"),
    ("post_feedforward_layernorm", "mlp_post_norm"),
)


def read_gemma(
    config: Mapping[str, Any],
    kinds: tuple[BlockKind, ...],
    score_cap: float | None,
    logit_cap: float | None,
    **more: Any,
) -> DecoderConfig:
    """What Gemma 2 and 3 have in common; the caps are those of a configuration that names none."""
    caps = {"attn_logit_softcapping": score_cap, "final_logit_softcapping": logit_cap, **config}
    bias = bool(config.get("attention_bias", False))
    return read_decoder(
        config,
        kinds=kinds,
        tied=True,
        activation="hidden_activation",
        default_activation="gelu_pytorch_tanh",
        head_dim=256,
        norm="rms_plus_one",
        norms=tuple(name for _, name in GEMMA_NORMS),
        qkv_bias=bias,
        output_bias=bias,
        score_scale=require({"query_pre_attn_scalar": 256, **config}, "query_pre_attn_scalar", float) ** -0.5,
        score_cap=_cap(caps, "attn_logit_softcapping"),
        logit_cap=_cap(caps, "final_logit_softcapping"),
        embedding_scale=require(config, "hidden_size") ** 0.5,
        **more,
    )


def _cap(config: Mapping[str, Any], name: str) -> float | None:
    return None if config[name] is None else require(config, name, float)


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A Hugging Face Gemma 2 configuration as a `DecoderConfig`.

    Raises:
        ModelError: naming the field that is missing, inconsistent or not supported.
    """
    rope, window = read_rope(config), require({"sliding_window": 4096, **config}, "sliding_window")
    local = read_windows(config, lambda index: index % 2 == 0)
    return read_gemma(config, tuple(BlockKind(rope, window if slides else None) for slides in local), 50.0, 30.0)


GEMMA2 = Family("gemma2", read_config, KeyTable(block=GEMMA_NORMS))
