"""The Llama family (Llama 1 to 3, SmolLM, TinyLlama and others with model_type "llama")."""

from sparseopt.models.base.fields import Config, refuse_unless
from sparseopt.models.base.rope import read_rope
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import Family, read_decoder, refuses_undivided_width


def _read_config(config: Config) -> DecoderConfig:
    refuse_unless(config, {"sliding_window": (None,)})
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    return read_decoder(config, (BlockKind(read_rope(config)),), attention_bias=attention_bias, mlp_bias=mlp_bias)


FAMILY = Family("llama", _read_config, refuses=refuses_undivided_width)
