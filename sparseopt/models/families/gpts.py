"""OPT, GPT-2 and GPT-NeoX (Pythia): layer norms, biases, an MLP without gate."""

from sparseopt.models.base.fields import Config, refuse_unless, require
from sparseopt.models.base.rope import read_rope
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import Family, KeyTable, SizeFields, read_decoder, ungrouped

# The first rows of the position table are padding.
_POSITION_OFFSET = 2


def _read_opt(config: Config) -> DecoderConfig:
    """The OPT family: layer norms, biases everywhere, learned positions, a ReLU between two linear layers."""
    width = config.get("hidden_size")
    allowed: dict[str, tuple] = {"do_layer_norm_before": (True,), "layer_norm_elementwise_affine": (True,)}
    refuse_unless(config, allowed | {"_remove_final_layer_norm": (False,), "word_embed_proj_dim": (width, None)})
    bias = bool(config.get("enable_bias", True))
    return read_decoder(
        {"tie_word_embeddings": True, "activation_function": "relu", **ungrouped(config)},
        (BlockKind(rope=None),),
        activation="activation_function",
        intermediate_size=require(config, "ffn_dim"),
        norm="layer",
        norm_eps=1e-5,
        attention_bias=bias,
        gate=None,
        mlp_bias=bias,
        learned_positions=True,
        max_positions=require(config, "max_position_embeddings"),
        position_offset=_POSITION_OFFSET,
    )


_OPT_OUTER = (
    ("model.decoder.embed_positions.weight", "embed_tokens.positions"),
    ("model.decoder.embed_tokens", "embed_tokens"),
    ("model.decoder.final_layer_norm", "head.norm"),
    ("model.decoder.layers", "layers"),
    ("lm_head", "head.lm_head"),
)
_OPT_BLOCK = (
    ("self_attn_layer_norm", "attention_norm"),
    ("final_layer_norm", "mlp_norm"),
    ("self_attn.out_proj", "self_attn.o_proj"),
    ("fc1", "mlp.up_proj"),
    ("fc2", "mlp.down_proj"),
)

OPT = Family("opt", _read_opt, KeyTable(_OPT_OUTER, _OPT_BLOCK, base="model."), SizeFields(channels=("ffn_dim",)))


# Its own field names; the usual ones are read as well.
_GPT2_FIELDS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}


def _read_gpt2(config: Config) -> DecoderConfig:
    """The GPT-2 family: layer norms, learned positions, fused projections; its matrices are stored `[in, out]`."""
    refuse_unless(config, {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)})
    usual = dict(config) | {new: config[old] for old, new in _GPT2_FIELDS.items() if old in config}
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


_GPT2_OUTER = (
    ("transformer.wpe.weight", "embed_tokens.positions"),
    ("transformer.wte", "embed_tokens"),
    ("transformer.ln_f", "head.norm"),
    ("transformer.h", "layers"),
    ("lm_head", "head.lm_head"),
)
_GPT2_BLOCK = (
    ("ln_1", "attention_norm"),
    ("ln_2", "mlp_norm"),
    ("attn.c_attn", "self_attn.qkv_proj"),
    ("attn.c_proj", "self_attn.o_proj"),
    ("mlp.c_fc", "mlp.up_proj"),
    ("mlp.c_proj", "mlp.down_proj"),
)
_GPT2_KEYS = KeyTable(
    _GPT2_OUTER,
    _GPT2_BLOCK,
    base="transformer.",
    ignored=(r"(.*\.)?attn\.(bias|masked_bias)",),
    transposed=(r"layers\.\d+\.\w+\.\w+_proj\.weight",),
)

_GPT2_SIZES = SizeFields(("n_layer", "num_hidden_layers"), ("n_inner",), ("n_head", "num_attention_heads"))

GPT2 = Family("gpt2", _read_gpt2, _GPT2_KEYS, _GPT2_SIZES)


def _read_gpt_neox(config: Config) -> DecoderConfig:
    """The GPT-NeoX family (Pythia): parallel attention and MLP, interleaved q, k, v, partly rotated heads."""
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


_GPT_NEOX_OUTER = (
    ("gpt_neox.embed_in", "embed_tokens"),
    ("gpt_neox.layers", "layers"),
    ("gpt_neox.final_layer_norm", "head.norm"),
    ("embed_out", "head.lm_head"),
)
_GPT_NEOX_BLOCK = (
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "mlp_norm"),
    ("attention.query_key_value", "self_attn.qkv_proj"),
    ("attention.dense", "self_attn.o_proj"),
    ("mlp.dense_h_to_4h", "mlp.up_proj"),
    ("mlp.dense_4h_to_h", "mlp.down_proj"),
)
_GPT_NEOX_BUFFERS = (r".*\.attention\.(bias|masked_bias)", r".*\.rotary_emb\.inv_freq")

_GPT_NEOX_KEYS = KeyTable(_GPT_NEOX_OUTER, _GPT_NEOX_BLOCK, base="gpt_neox.", ignored=_GPT_NEOX_BUFFERS)

GPT_NEOX = Family("gpt_neox", _read_gpt_neox, _GPT_NEOX_KEYS)
