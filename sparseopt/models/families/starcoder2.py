"""The StarCoder 2 family: Llama with layer norms, biases everywhere and an MLP without gate."""

from sparseopt.models.base.fields import Config, optional, require
from sparseopt.models.base.rope import read_rope
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import BLOCK_NAMES, Family, KeyTable, read_decoder


def _read_config(config: Config) -> DecoderConfig:
    bias = bool(config.get("use_bias", True))
    return read_decoder(
        {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 2, **config},
        (BlockKind(read_rope(config), optional(config, "sliding_window")),),
        norm="layer",
        norm_eps=require(config, "norm_epsilon", float, default=1e-5),
        attention_bias=bias,
        gate=None,
        mlp_bias=bias,
    )


BLOCK = (*BLOCK_NAMES, ("mlp.c_fc", "mlp.up_proj"), ("mlp.c_proj", "mlp.down_proj"))

STARCODER2 = Family("starcoder2", _read_config, KeyTable(block=BLOCK))
