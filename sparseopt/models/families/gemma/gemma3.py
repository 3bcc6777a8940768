"""The text models of Gemma 3: Gemma 2 with norms on queries and keys and a rotary base for local blocks."""

from sparseopt.models.base.fields import Config, refuse_unless, require
from sparseopt.models.base.rope import Rope, read_rope
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import Family, KeyTable, SizeFields, read_windows, refuses_undivided_width
from sparseopt.models.families.gemma.gemma2 import GEMMA_NORMS, read_gemma

# Published configurations of 4B and more omit values that equal these.
_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
}


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


def read_text_config(config: Config) -> DecoderConfig:
    """Read the configuration of a text model, with or without an image encoder."""
    config = _DEFAULTS | dict(config)
    # transformers ignores this field and does not cap the scores of Gemma 3; other programs do.
    refuse_unless(config, {"attn_logit_softcapping": (None,)})
    return read_gemma(config, _read_kinds(config), None, None, qk_norm="head")


SIZES = SizeFields(by_block=("layer_types",))

FAMILY = Family("gemma3_text", read_text_config, KeyTable(block=GEMMA_NORMS), SIZES, refuses_undivided_width)
