"""Gemma 2, and the text models of Gemma 3, without and with an image encoder."""

from dataclasses import replace
from typing import Any

from sparseopt.models.base.fields import Config, optional, refuse_unless, require
from sparseopt.models.base.rope import Rope, read_rope
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import (
    OUTER_NAMES,
    Family,
    KeyTable,
    SizeFields,
    read_decoder,
    read_windows,
    refuses_undivided_width,
)

_NORMS = (
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "attention_post_norm"),
    ("pre_feedforward_layernorm", "mlp_norm"),
    ("post_feedforward_layernorm", "mlp_post_norm"),
)
_SIZES = SizeFields(by_block=("layer_types",))
_WITH_IMAGES = replace(_SIZES, table="text_config")
# Published configurations of Gemma 3 of 4B and more omit values that equal these.
_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
}


def _read_gemma(
    config: Config, kinds: tuple[BlockKind, ...], score_cap: float | None, logit_cap: float | None, **more: Any
) -> DecoderConfig:
    """Read what Gemma 2 and 3 share; the given caps are defaults."""
    defaults = {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256}
    return read_decoder(
        defaults | dict(config),
        kinds,
        activation="hidden_activation",
        norm="rms_plus_one",
        norms=tuple(name for _, name in _NORMS),
        attention_bias=bool(config.get("attention_bias")),
        score_scale=require(config, "query_pre_attn_scalar", float, default=256.0) ** -0.5,
        score_cap=optional(config, "attn_logit_softcapping", float, score_cap),
        logit_cap=optional(config, "final_logit_softcapping", float, logit_cap),
        embedding_scale=require(config, "hidden_size") ** 0.5,
        **more,
    )


def _read_gemma2(config: Config) -> DecoderConfig:
    """The Gemma 2 family: norms before and after each part, capped scores and logits, every other block local."""
    rope, window = read_rope(config), require(config, "sliding_window", default=4096)
    local = read_windows(config, lambda index: index % 2 == 0)
    return _read_gemma(config, tuple(BlockKind(rope, window if slides else None) for slides in local), 50.0, 30.0)


GEMMA2 = Family("gemma2", _read_gemma2, KeyTable(block=_NORMS), _SIZES, refuses_undivided_width)


def _read_kinds(config: Config) -> tuple[BlockKind, ...]:
    """Five local blocks, then a global one, or as the configuration says; local blocks have their own rope."""
    pattern = require(config, "sliding_window_pattern", default=6)
    window = require(config, "sliding_window", default=4096)
    everywhere = read_rope(config, 1e6, part="full_attention")
    base = require(config, "rope_local_base_freq", float, default=1e4)
    nearby = Rope(base)
    if "sliding_attention" in (config.get("rope_parameters") or {}):
        nearby = read_rope({**config, "rope_theta": base}, part="sliding_attention")
    local = read_windows(config, lambda index: (index + 1) % pattern != 0)
    return tuple(BlockKind(nearby, window) if slides else BlockKind(everywhere) for slides in local)


def _read_gemma3(config: Config) -> DecoderConfig:
    """The text models of Gemma 3: Gemma 2 with norms on queries and keys and a rotary base for local blocks."""
    config = _DEFAULTS | dict(config)
    # transformers ignores this field and does not cap the scores of Gemma 3; other programs do.
    refuse_unless(config, {"attn_logit_softcapping": (None,)})
    return _read_gemma(config, _read_kinds(config), None, None, qk_norm="head")


GEMMA3 = Family("gemma3_text", _read_gemma3, KeyTable(block=_NORMS), _SIZES, refuses_undivided_width)


def _read_with_images(config: Config) -> DecoderConfig:
    """Gemma 3 with an image encoder: its text model; the encoder's tensors pass through unchanged."""
    return _read_gemma3(_WITH_IMAGES.fields(config))


_KEYS = KeyTable(tuple((f"language_model.{key}", path) for key, path in OUTER_NAMES), _NORMS)

GEMMA3_WITH_IMAGES = Family("gemma3", _read_with_images, _KEYS, _WITH_IMAGES, refuses_undivided_width)
