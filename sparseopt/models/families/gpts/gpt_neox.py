"""The GPT-NeoX family (Pythia): parallel attention and MLP, interleaved q, k, v, partly rotated heads."""

from sparseopt.models.base.fields import Config, require
from sparseopt.models.base.rope import read_rope
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import Family, KeyTable, read_decoder, ungrouped


def _read_config(config: Config) -> DecoderConfig:
    rope = read_rope(config, config.get("rotary_emb_base") or 10000.0, config.get("rotary_pct") or 0.25)
    return read_decoder(
        {"hidden_act": "gelu", **ungrouped(config)},
        (BlockKind(rope),),
        norm="layer",
        norm_eps=require(config, "layer_norm_eps", float, default=1e-5),
        parallel=bool(config.get("use_parallel_residual", True)),
        qkv="interleaved",
        attention_bias=bool(config.get("attention_bias", True)),
        gate=None,
        mlp_bias=True,
    )


OUTER = (
    ("gpt_neox.embed_in", "embed_tokens"),
    ("gpt_neox.layers", "layers"),
    ("gpt_neox.final_layer_norm", "head.norm"),
    ("embed_out", "head.lm_head"),
)
BLOCK = (
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "mlp_norm"),
    ("attention.query_key_value", "self_attn.qkv_proj"),
    ("attention.dense", "self_attn.o_proj"),
    ("mlp.dense_h_to_4h", "mlp.up_proj"),
    ("mlp.dense_4h_to_h", "mlp.down_proj"),
)
BUFFERS = (r".*\.attention\.(bias|masked_bias)", r".*\.rotary_emb\.inv_freq")

FAMILY = Family("gpt_neox", _read_config, KeyTable(OUTER, BLOCK, base="gpt_neox.", ignored=BUFFERS))
