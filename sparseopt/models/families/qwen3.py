"""The Qwen3 family: Llama with norms on the queries and keys of every head."""

from sparseopt.models.base.fields import Config
from sparseopt.models.decoder.settings import DecoderConfig
from sparseopt.models.families.family import Family, read_decoder
from sparseopt.models.families.qwen2 import SIZES, read_kinds


def _read_config(config: Config) -> DecoderConfig:
    bias = bool(config.get("attention_bias"))
    return read_decoder({"head_dim": 128, **config}, read_kinds(config), qk_norm="head", attention_bias=bias)


FAMILY = Family("qwen3", _read_config, sizes=SIZES)
