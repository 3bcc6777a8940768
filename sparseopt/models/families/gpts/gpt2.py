"""The GPT-2 family: layer norms, learned positions, fused projections; its matrices are stored `[in, out]`."""

from sparseopt.models.base.fields import Config, refuse_unless, require
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import Family, KeyTable, SizeFields, read_decoder, ungrouped

# Its own field names; the usual ones are read as well.
FIELDS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}


def _read_config(config: Config) -> DecoderConfig:
    refuse_unless(config, {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)})
    usual = dict(config) | {new: config[old] for old, new in FIELDS.items() if old in config}
    inner = 4 * require(usual, "hidden_size") if config.get("n_inner") is None else require(config, "n_inner")
    return read_decoder(
        {"tie_word_embeddings": True, "activation_function": "gelu_new", **ungrouped(usual)},
        (BlockKind(rope=None),),
        activation="activation_function",
        intermediate_size=inner,
        norm="layer",
        norm_eps=require(config, "layer_norm_epsilon", float, default=1e-5),
        qkv="fused",
        attention_bias=True,
        gate=None,
        mlp_bias=True,
        learned_positions=True,
        max_positions=require(usual, "max_position_embeddings"),
    )


OUTER = (
    ("transformer.wpe.weight", "embed_tokens.positions"),
    ("transformer.wte", "embed_tokens"),
    ("transformer.ln_f", "head.norm"),
    ("transformer.h", "layers"),
    ("lm_head", "head.lm_head"),
)
BLOCK = (
    ("ln_1", "attention_norm"),
    ("ln_2", "mlp_norm"),
    ("attn.c_attn", "self_attn.qkv_proj"),
    ("attn.c_proj", "self_attn.o_proj"),
    ("mlp.c_fc", "mlp.up_proj"),
    ("mlp.c_proj", "mlp.down_proj"),
)
KEYS = KeyTable(
    OUTER,
    BLOCK,
    base="transformer.",
    ignored=(r"(.*\.)?attn\.(bias|masked_bias)",),
    transposed=(r"layers\.\d+\.\w+\.\w+_proj\.weight",),
)

SIZES = SizeFields(("n_layer", "num_hidden_layers"), ("n_inner",), ("n_head", "num_attention_heads"))

FAMILY = Family("gpt2", _read_config, KEYS, SIZES)
