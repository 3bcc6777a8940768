"""Floor 5: the OPT family: layer norms, biases everywhere, learned positions, a ReLU between two linears."""

from collections.abc import Mapping
from typing import Any

from sparseopt.models.family import Family, KeyTable, read_decoder, ungrouped
from sparseopt.models.fields import refuse_unless, require
from sparseopt.models.settings import DecoderConfig

# The first rows of the table of positions stand for padding.
POSITION_OFFSET = 2


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A Hugging Face OPT configuration as a `DecoderConfig`.

    Raises:
        ModelError: naming the field that is missing, inconsistent or not supported.
    """
    width = config.get("hidden_size")
    allowed: dict[str, tuple] = {"do_layer_norm_before": (True,), "layer_norm_elementwise_affine": (True,)}
    refuse_unless(config, allowed | {"_remove_final_layer_norm": (False,), "word_embed_proj_dim": (width, None)})
    bias = bool(config.get("enable_bias", True))
    return read_decoder(
        ungrouped(config),
        tied=True,
        activation="activation_function",
        default_activation="relu",
        intermediate_size=require(config, "ffn_dim"),
        norm="layer",
        norm_eps=1e-5,
        qkv_bias=bias,
        output_bias=bias,
        gate=None,
        mlp_bias=bias,
        learned_positions=True,
        max_positions=require(config, "max_position_embeddings"),
        position_offset=POSITION_OFFSET,
    )


OUTER = (
    ("model.decoder.embed_positions.weight", "embed_tokens.positions"),
    ("model.decoder.embed_tokens", "embed_tokens"),
    ("model.decoder.final_layer_norm", "head.norm"),
    ("model.decoder.layers", "layers"),
    ("lm_head", "head.lm_head"),
)
BLOCK = (
    ("self_attn_layer_norm", "attention_norm"),
    ("final_layer_norm", "mlp_norm"),
    ("self_attn.out_proj", "self_attn.o_proj"),
    ("fc1", "mlp.up_proj"),
    ("fc2", "mlp.down_proj"),
)

OPT = Family("opt", read_config, KeyTable(OUTER, BLOCK, base="model."))
