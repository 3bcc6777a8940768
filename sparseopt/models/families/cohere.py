"""Cohere (Command R) and Cohere 2 (Command R7B, Command A)."""

from sparseopt.models.base.fields import Config, refuse_unless, require
from sparseopt.models.base.rope import Rope, read_rope, rope_table
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import Family, KeyTable, SizeFields, read_decoder, read_windows


def _read_rope(config: Config, theta: float) -> Rope:
    """The position embedding; `theta` is the base if the configuration names none."""
    # transformers rotates whole heads and ignores the field.
    refuse_unless(rope_table(config), {"partial_rotary_factor": (1.0,)})
    return read_rope(config, theta, interleaved=True)


def _read_shared(config: Config, kinds: tuple[BlockKind, ...]) -> DecoderConfig:
    """Read what the Cohere families share."""
    # In transformers only the first family has norms of queries and keys.
    refuse_unless(config, {"use_qk_norm": (False, None)})
    return read_decoder(
        {"tie_word_embeddings": True, **config},
        kinds,
        norm="layer_without_bias",
        norms=("attention_norm",),
        norm_eps=require(config, "layer_norm_eps", float, default=1e-5),
        parallel=True,
        attention_bias=bool(config.get("attention_bias")),
        logit_scale=require(config, "logit_scale", float, default=0.0625),
    )


def _read_cohere(config: Config) -> DecoderConfig:
    """The Cohere family (Command R): parallel attention and MLP after one norm without bias, scaled logits."""
    return _read_shared(config, (BlockKind(_read_rope(config, 500000.0)),))


_KEYS = KeyTable(block=(("input_layernorm", "attention_norm"),))

COHERE = Family("cohere", _read_cohere, _KEYS)


def _read_cohere2(config: Config) -> DecoderConfig:
    """The Cohere 2 family (Command R7B, Command A): Cohere with local blocks, and no positions in the others."""
    rope, window = _read_rope(config, 10000.0), require(config, "sliding_window", default=4096)
    pattern = require(config, "sliding_window_pattern", default=4)
    local = read_windows(config, lambda index: (index + 1) % pattern != 0)
    return _read_shared(config, tuple(BlockKind(rope, window) if slides else BlockKind(None) for slides in local))


COHERE2 = Family("cohere2", _read_cohere2, _KEYS, SizeFields(by_block=("layer_types",)))
