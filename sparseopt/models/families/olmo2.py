"""The OLMo 2 family: norms after each part only, and on the queries and keys of all heads together."""

from sparseopt.models.base.fields import Config
from sparseopt.models.base.rope import read_rope
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import Family, KeyTable, read_decoder

NORMS = (("post_attention_layernorm", "attention_post_norm"), ("post_feedforward_layernorm", "mlp_post_norm"))


def _read_config(config: Config) -> DecoderConfig:
    return read_decoder(
        {"rms_norm_eps": 1e-5, **config},
        (BlockKind(read_rope(config)),),
        norms=tuple(name for _, name in NORMS),
        qk_norm="width",
        attention_bias=bool(config.get("attention_bias")),
    )


OLMO2 = Family("olmo2", _read_config, KeyTable(block=NORMS))
