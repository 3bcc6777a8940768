"""The Cohere family (Command R): parallel attention and MLP after one norm without bias, scaled logits."""

from sparseopt.models.base.fields import Config, refuse_unless, require
from sparseopt.models.base.rope import Rope, read_rope, rope_table
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import Family, KeyTable, read_decoder


def read_cohere_rope(config: Config, theta: float) -> Rope:
    """The position embedding; `theta` is the base if the configuration names none."""
    # transformers rotates whole heads and ignores the field.
    refuse_unless(rope_table(config), {"partial_rotary_factor": (1.0,)})
    return read_rope(config, theta, interleaved=True)


def read_cohere(config: Config, kinds: tuple[BlockKind, ...]) -> DecoderConfig:
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


def _read_config(config: Config) -> DecoderConfig:
    return read_cohere(config, (BlockKind(read_cohere_rope(config, 500000.0)),))


COHERE_KEYS = KeyTable(block=(("input_layernorm", "attention_norm"),))

FAMILY = Family("cohere", _read_config, COHERE_KEYS)
