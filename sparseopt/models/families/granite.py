"""The Granite family: Llama with factors on embeddings, scores, the outputs of each part, and logits."""

from sparseopt.models.base.fields import Config, refuse_unless, require
from sparseopt.models.base.rope import read_rope, rope_table
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import Family, read_decoder


def _read_config(config: Config) -> DecoderConfig:
    # transformers rotates whole heads and ignores the field.
    refuse_unless(rope_table(config), {"partial_rotary_factor": (1.0,)})

    def factor(name: str) -> float:
        return require(config, name, float, default=1.0)

    return read_decoder(
        config,
        (BlockKind(read_rope(config)),),
        attention_bias=bool(config.get("attention_bias")),
        mlp_bias=bool(config.get("mlp_bias")),
        embedding_scale=factor("embedding_multiplier"),
        score_scale=factor("attention_multiplier"),
        residual_scale=factor("residual_multiplier"),
        logit_scale=1 / factor("logits_scaling"),
    )


FAMILY = Family("granite", _read_config)
