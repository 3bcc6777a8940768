"""Floor 5: the GPT-2 family: layer norms, learned positions, fused projections; its matrices are stored `[in, out]`."""

from collections.abc import Mapping
from typing import Any

from sparseopt.models.family import Family, KeyTable, read_decoder, ungrouped
from sparseopt.models.fields import refuse_unless, require
from sparseopt.models.settings import DecoderConfig

# Its own names of fields, beside which the usual ones are read as well.
FIELDS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A Hugging Face GPT-2 configuration as a `DecoderConfig`.

    Raises:
        ModelError: naming the field that is missing, inconsistent or not supported.
    """
    refuse_unless(config, {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)})
    usual = dict(config) | {new: config[old] for old, new in FIELDS.items() if old in config}
    inner = 4 * require(usual, "hidden_size") if config.get("n_inner") is None else require(config, "n_inner")
    return read_decoder(
        ungrouped(usual),
        tied=True,
        activation="activation_function",
        default_activation="gelu_new",
        intermediate_size=inner,
        norm="layer",
        norm_eps=require({"layer_norm_epsilon": 1e-5, **config}, "layer_norm_epsilon", float),
        qkv="fused",
        qkv_bias=True,
        output_bias=True,
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

GPT2 = Family("gpt2", read_config, KEYS)
